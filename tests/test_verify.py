"""verify: a clean store passes; every damage is found, and named where it is."""

import json
import os
import random
import shutil

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from lunaprep.errors import UsageError
from lunaprep.schema import SLAB_SHAPE
from lunaprep.verify import hashing, verify_store

from .conftest import NUM_SCANS, SIZE
from .handmade_store import (
    ALIKE,
    DTYPES,
    OTHER,
    RECEIPT,
    SHARD,
    VOLUME,
    Handmade,
    canonical,
    codes,
    errors,
    flip,
    is_crop,
    make_store,
    resign,
    rewrite_manifest,
    row_of,
    set_value,
    write_record,
)

LEVELS = ("quick", "full", "source")
FLIPS = 320


@pytest.fixture(scope="module", params=DTYPES)
def pristine(request, tmp_path_factory) -> Handmade:
    """A store that no test may change."""
    return make_store(tmp_path_factory.mktemp(request.param), request.param, DTYPES[request.param])


@pytest.fixture(params=DTYPES)
def store(request, tmp_path) -> Handmade:
    """A store of the test's own."""
    return make_store(tmp_path / "own", request.param, DTYPES[request.param])


@pytest.mark.parametrize("level", LEVELS)
def test_clean_store_passes(pristine, level):
    report = verify_store(pristine.path, level, pristine.data)
    assert report.ok
    assert report.findings == ()
    assert report.counts["shards"] == 2
    assert report.counts["crops"] == 10
    assert report.counts["volumes"] == 3
    assert (report.counts["bytes_read"] > 0) == (level != "quick")
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_handmade_store_reads_through_its_front_door(pristine):
    with h5py.File(pristine.path / "crops.h5") as door, h5py.File(pristine.path / OTHER) as shard:
        assert np.array_equal(door["crops"][5:], shard["crops"][:])
        assert -1000 <= door["crops"][:].min() < door["crops"][:].max() <= 1000


def test_progress_ends_at_its_total(pristine):
    seen: list[tuple[int, int]] = []
    report = verify_store(pristine.path, "source", pristine.data, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.counts["bytes_read"], report.counts["bytes_read"])


def test_masks_that_are_looked_at_go_on_with_the_progress(built_store, monkeypatch):
    monkeypatch.setattr(hashing, "TELL_BYTES", 1)
    seen: list[tuple[int, int]] = []
    report = verify_store(built_store, "full", progress=lambda done, total: seen.append((done, total)))
    receipts = sum(path.stat().st_size for path in built_store.glob("crops/*.json"))  # no record says how large
    assert seen[0][1] + receipts == seen[-1][1] == seen[-1][0]
    slabs = np.prod(SLAB_SHAPE) * report.counts["slabs"]
    assert seen[-1][0] - report.counts["bytes_read"] == 2 * NUM_SCANS * np.prod(SIZE) + slabs
    assert sum(done > report.counts["bytes_read"] for done, _ in seen) == NUM_SCANS


@pytest.mark.parametrize("case", ["no folder", "no store", "level", "no data"])
def test_usage_errors(pristine, tmp_path, case):
    arguments = {
        "no folder": (tmp_path / "none", "full"),
        "no store": (tmp_path, "full"),
        "level": (pristine.path, "fast"),
        "no data": (pristine.path, "source"),
    }[case]
    with pytest.raises(UsageError) as error:
        verify_store(*arguments)
    assert "\n" not in str(error.value)


def test_every_flipped_bit_is_found_and_named(pristine):
    rng = random.Random(1)
    files = pristine.files()
    rows = {(row["shard_id"], row["shard_row"]): row for row in pristine.manifest()}
    for number in range(FLIPS // 2):  # the fixture comes in two dtypes
        place = files[number % len(files)]
        path = pristine.path / place
        raw = path.read_bytes()
        at, bit = rng.randrange(len(raw)), rng.randrange(8)
        try:
            flip(path, at, bit)
            found = [f for f in errors(verify_store(pristine.path)) if f.place == place]
        finally:
            path.write_bytes(raw)
        assert found, f"bit {bit} of byte {at} of {place} changed unseen"
        if place in (SHARD, OTHER) and at >= 4096:
            row = rows[path.stem, (at - 4096) // pristine.crop_bytes]
            assert any(f.code == "crop-damaged" and is_crop(f, row) for f in found)
            assert len(found) == 1
        elif place in (SHARD, OTHER):
            assert any(f.code in ("header-damaged", "hdf5-unreadable") for f in found)
        elif place.startswith("volumes/"):
            assert any(f.code in ("chunk-damaged", "header-damaged") and f.series_uid == path.stem for f in found)


def test_missing_shard(store):
    (store.path / SHARD).unlink()
    for level in LEVELS:
        found = errors(verify_store(store.path, level, store.data))
        assert [(f.code, f.place, f.shard_id) for f in found] == [("missing-file", SHARD, ALIKE[0])]
        assert "5 crops" in found[0].message


@pytest.mark.parametrize("left", [0, 100, 4095, 4096, 4097, 9000, -1])
def test_cut_shard(store, left):
    path = store.path / SHARD
    size = path.stat().st_size
    os.truncate(path, left % size)
    for level in ("quick", "full"):
        found = errors(verify_store(store.path, level))
        assert [(f.code, f.place) for f in found] == [("wrong-size", SHARD)]
        whole = max(0, left % size - 4096) // store.crop_bytes
        assert f"{left % size} bytes, expected {size}; crops of rows {whole} to 4 are lost" in found[0].message


def test_longer_shard(store):
    with (store.path / SHARD).open("ab") as file:
        file.write(b"more")
    for level in ("quick", "full"):
        found = errors(verify_store(store.path, level))
        assert [(f.code, f.place) for f in found] == [("wrong-size", SHARD)]
        assert "longer" in found[0].message


def test_cut_shard_still_names_its_damaged_crop(store):
    flip(store.path / SHARD, 4096 + store.crop_bytes)
    os.truncate(store.path / SHARD, 4096 + 3 * store.crop_bytes)
    found = errors(verify_store(store.path))
    assert [f.code for f in found] == ["wrong-size", "crop-damaged"]
    assert is_crop(found[1], row_of(store, SHARD, 1))


def test_flipped_bit_in_crop_and_in_header(store):
    flip(store.path / SHARD, 4096 + 2 * store.crop_bytes + 7)
    flip(store.path / OTHER, 4000)
    found = errors(verify_store(store.path))
    assert [(f.code, f.place) for f in found] == [("crop-damaged", SHARD), ("header-damaged", OTHER)]
    assert is_crop(found[0], row_of(store, SHARD, 2))
    assert verify_store(store.path, "quick").ok


@pytest.mark.parametrize("kind", ["zeros", "words", "page"])
def test_overwritten_crops(store, kind):
    raw = bytearray((store.path / SHARD).read_bytes())
    begin, end = {"zeros": (5000, 5512), "words": (4096, 4736), "page": (4096, 8192)}[kind]
    raw[begin:end] = (b"\xff" if kind == "words" else b"\0") * (end - begin)
    (store.path / SHARD).write_bytes(raw)
    hit = {(at - 4096) // store.crop_bytes for at in (begin, end - 1)}
    found = errors(verify_store(store.path))
    assert {f.code for f in found} == {"crop-damaged"}
    assert [f.shard_row for f in found] == list(range(min(hit), max(hit) + 1))


def test_swapped_crops(store):
    raw = (store.path / SHARD).read_bytes()
    n = store.crop_bytes
    crops = [raw[4096 + k * n : 4096 + (k + 1) * n] for k in range(5)]
    crops[1], crops[3] = crops[3], crops[1]
    (store.path / SHARD).write_bytes(raw[:4096] + b"".join(crops))
    found = errors(verify_store(store.path))
    assert [(f.code, f.shard_row) for f in found] == [("crop-misplaced", 1), ("crop-misplaced", 3)]
    assert "row 3" in found[0].message
    assert "row 1" in found[1].message
    assert is_crop(found[0], row_of(store, SHARD, 1))


def test_swapped_shards(store):
    a, b = store.path / SHARD, store.path / OTHER
    raw_a, raw_b = a.read_bytes(), b.read_bytes()
    a.write_bytes(raw_b)
    b.write_bytes(raw_a)
    found = errors(verify_store(store.path))
    assert {(f.code, f.place) for f in found} == {("file-misplaced", SHARD), ("file-misplaced", OTHER)}
    assert ALIKE[1] in found[0].message


def test_renamed_and_extra_shard(store):
    (store.path / SHARD).rename(store.path / "crops/subset9-000-000000000000.h5")
    report = verify_store(store.path, "quick")
    assert codes(report) == {("missing-file", SHARD)}
    assert [(f.code, f.severity) for f in report.findings[1:]] == [("extra-file", "warning")]


def test_extra_files_are_a_warning(store):
    shutil.copy(store.path / SHARD, store.path / "crops/subset0-000-ffffffffffff.h5")
    (store.path / "volumes/subset0/old.h5").write_bytes(b"")
    report = verify_store(store.path)
    assert report.ok
    assert {f.place for f in report.findings} == {"crops/subset0-000-ffffffffffff.h5", "volumes/subset0/old.h5"}


ALTERED = {
    "x_mm": (1000.0, "bad-place"),
    "y_mm": (float("nan"), "bad-value"),
    "row": (28, "bad-place"),
    "index": (-1, "bad-place"),
    "start_col": (3, "bad-start"),
    "is_padded": (None, "bad-value"),
    "diameter_mm": (0.0, "bad-value"),
    "split_series": ("test", "bad-value"),
    "split_candidate": ("test", "bad-value"),
    "series_uid": ("1.2.3", "unknown-series"),
    "patient_id": ("P-2", "bad-value"),
    "subset": (4, "bad-value"),
    "candidate_id": (99, "duplicate-candidate"),
    "size_rank": (0, "bad-rank"),
    "shard_id": ("subset0-000-ffffffffffff", "unknown-shard"),
    "shard_row": (1, "bad-order"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_manifest(store, name):
    value, code = ALTERED[name]
    value = not store.manifest()[2][name] if value is None else value
    rewrite_manifest(store, set_value(name, value), sign=False)
    assert ("wrong-sha256", "crops.parquet") in codes(verify_store(store.path))
    resign(store.path)  # even a forger who signs again leaves the values at odds with each other
    assert (code, "crops.parquet") in codes(verify_store(store.path, "quick"))


def test_altered_checksum_in_manifest_and_in_receipt(store):
    rewrite_manifest(store, set_value("xxh3", 5))
    receipt = json.loads((store.path / RECEIPT).read_bytes())
    receipt["crop_xxh3"][4] = "0" * 16
    (store.path / RECEIPT).write_bytes(canonical(receipt))
    resign(store.path)
    found = errors(verify_store(store.path))
    assert [(f.code, f.place, f.shard_row) for f in found] == [
        ("manifest-differs", "crops.parquet", 2),
        ("receipt-differs", RECEIPT, 4),
    ]


def test_older_manifest(store):
    rewrite_manifest(store, lambda rows: rows.pop(), sign=False)
    assert {("wrong-sha256", "crops.parquet"), ("wrong-count", "crops.parquet")} <= codes(verify_store(store.path))
    resign(store.path)
    assert ("wrong-count", "crops.parquet") in codes(verify_store(store.path, "quick"))


def test_manifest_out_of_order(store):
    rewrite_manifest(store, lambda rows: rows.reverse())
    assert codes(verify_store(store.path, "quick")) == {("bad-order", "crops.parquet")}


def test_manifest_of_another_schema(store):
    table = pq.read_table(store.path / "crops.parquet")
    for other in (table.drop_columns(["fold"]), table.append_column("more", table["fold"])):
        pq.write_table(other, store.path / "crops.parquet", write_page_checksum=True)
        resign(store.path)
        assert codes(verify_store(store.path, "quick")) == {("table-schema", "crops.parquet")}


def test_crop_damage_is_named_without_a_manifest(store):
    (store.path / "crops.parquet").write_bytes(b"PAR1" + bytes(200) + b"PAR1")
    flip(store.path / SHARD, 4096 + 4 * store.crop_bytes)
    found = [f for f in errors(verify_store(store.path)) if f.place == SHARD]
    assert [(f.code, f.shard_row) for f in found] == [("crop-damaged", 4)]
    assert ("table-unreadable", "crops.parquet") in codes(verify_store(store.path))


RECORD_EDITS = {
    "hand edit": lambda value: value["counts"].update(nodules=0),
    "rows": lambda value: value["shards"][0].update(rows=4),
    "outside": lambda value: value["shards"][0].update(file="../data/subset0/1.2.840.1.raw"),
    "absolute": lambda value: value["files"][0].update(file="/etc/passwd"),
    "no key": lambda value: value.pop("counts"),
    "not a list": lambda value: value.update(shards={}),
    "wrong kind": lambda value: value["parameters"].update(crop_shape=["4", 12, 12]),
    "tiny crop": lambda value: value["parameters"].update(crop_shape=[1, 1, 1]),
    "huge rows": lambda value: value["shards"][0].update(rows=2**70),
}


@pytest.mark.parametrize("edit", RECORD_EDITS)
def test_edited_record(store, edit):
    value = store.record()
    RECORD_EDITS[edit](value)
    (store.path / "store.json").write_bytes(canonical(value))
    assert ("store-json-edited", "store.json") in codes(verify_store(store.path, "quick"))
    write_record(store.path, value)
    found = codes(verify_store(store.path, "quick"))
    expected = ("wrong-count", "crops.parquet") if edit == "hand edit" else ("store-json-invalid", "store.json")
    assert found == {expected}


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": 1e999, "a": "\\ud800"}'])
def test_record_that_is_no_json(store, raw):
    (store.path / "store.json").write_bytes(raw)
    found = errors(verify_store(store.path))
    assert {f.place for f in found} == {"store.json"}
    assert found


def test_record_in_another_form(store):
    value = store.record()
    (store.path / "store.json").write_text(json.dumps(value))
    assert codes(verify_store(store.path, "quick")) == {("json-not-canonical", "store.json")}


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [("version", 2, "newer-version"), ("version", 0, "unknown-format"), ("format", "zarr", "unknown-format")],
)
def test_other_format(store, key, value, code):
    write_record(store.path, {**store.record(), key: value})
    assert [f.code for f in verify_store(store.path).findings] == [code]


def test_missing_volume(store):
    (store.path / VOLUME).unlink()
    found = errors(verify_store(store.path, "quick"))
    assert [(f.code, f.place, f.series_uid) for f in found] == [("missing-file", VOLUME, "1.2.840.3")]


def test_flipped_bit_in_volume_names_the_slices(store):
    with h5py.File(store.path / VOLUME) as h5:
        offset = h5["hu"].id.get_chunk_info_by_coord((8, 0, 0)).byte_offset
    flip(store.path / VOLUME, offset + 20)
    found = errors(verify_store(store.path))
    assert [(f.code, f.place, f.series_uid) for f in found] == [("chunk-damaged", VOLUME, "1.2.840.3")]
    assert "slices 8 to 11" in found[0].message


def test_missing_and_swapped_receipts(store):
    (store.path / RECEIPT).rename(store.path / "receipt")
    assert codes(verify_store(store.path, "quick")) == {("missing-file", RECEIPT)}
    other = store.path / OTHER.replace(".h5", ".json")
    shutil.copy(other, store.path / RECEIPT)
    assert codes(verify_store(store.path)) == {("wrong-sha256", RECEIPT)}
    resign(store.path)
    assert ("receipt-differs", RECEIPT) in codes(verify_store(store.path))


@pytest.mark.parametrize("place", ["crops.parquet", "scans.parquet", "crops.h5", SHARD, RECEIPT, VOLUME])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
def test_no_plain_file(store, place, kind):
    path = store.path / place
    path.rename(store.path.parent / "aside")
    if kind == "symlink":
        path.symlink_to(store.path.parent / "aside")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    code = "symlink" if kind == "symlink" else "not-a-file"
    for level in ("quick", "full"):
        assert (code, place) in codes(verify_store(store.path, level))


def test_linked_folder_is_not_followed(store):
    (store.path / "crops").rename(store.path.parent / "aside")
    (store.path / "crops").symlink_to(store.path.parent / "aside")
    assert ("symlink", SHARD) in codes(verify_store(store.path))
    (store.path / "store.json").rename(store.path.parent / "record")
    (store.path / "store.json").symlink_to(store.path.parent / "record")
    assert codes(verify_store(store.path)) == {("symlink", "store.json")}


def test_all_damage_is_named_at_once(store):
    flip(store.path / SHARD, 4096)
    (store.path / OTHER).unlink()
    flip(store.path / "crops.parquet", 300)
    flip(store.path / VOLUME, (store.path / VOLUME).stat().st_size - 1)
    (store.path / RECEIPT).unlink()
    assert {f.place for f in errors(verify_store(store.path))} == {SHARD, OTHER, "crops.parquet", VOLUME, RECEIPT}


def test_many_alike_are_counted(store):
    for k in range(130):
        (store.path / f"crops/{k}").mkdir()
        (store.path / f"crops/{k}/x").write_bytes(b"")
    assert len(verify_store(store.path, "quick").findings) == 130  # one for each place
    rewrite_manifest(store, lambda rows: [row.update(diameter_mm=-1.0) for row in rows])
    report = verify_store(store.path, "quick")
    assert sum(f.code == "bad-value" for f in report.findings) == 10
    assert not report.to_json()["ok"]
    assert report.findings[0].severity == "error"
