"""verify: a clean store passes; every damage is found, and named where it is."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from lunaprep.errors import UsageError
from lunaprep.verify import Finding, VerifyReport, verify_store

from .handmade_store import (
    ALIKE,
    CROP,
    MANIFEST_TYPES,
    SCAN_TYPES,
    Handmade,
    canonical,
    make_store,
    resign,
    sha256,
    write_record,
    write_shard,
    write_table,
)

LEVELS = ("quick", "full", "source")
SHARD, OTHER = (f"crops/{shard}.h5" for shard in ALIKE)
RECEIPT = SHARD.replace(".h5", ".json")
VOLUME = "volumes/subset1/1.2.840.3.h5"
FLIPS = 320


@pytest.fixture(scope="session", params=["int16", "float32"])
def pristine(request, tmp_path_factory) -> Handmade:
    """A store that no test may change."""
    edge = "shift" if request.param == "int16" else "pad"
    return make_store(tmp_path_factory.mktemp(request.param), request.param, edge)


@pytest.fixture
def store(pristine, tmp_path) -> Handmade:
    """A store of the test's own."""
    shutil.copytree(pristine.path.parent, tmp_path / "own")
    own = tmp_path / "own"
    return Handmade(own / "store", own / "data", pristine.crop_bytes, pristine.dtype)


def errors(report: VerifyReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity == "error"]


def codes(report: VerifyReport) -> set[tuple[str, str]]:
    return {(finding.code, finding.place) for finding in errors(report)}


def flip(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def row_of(store: Handmade, place: str, row: int) -> dict:
    shard = Path(place).stem
    return next(r for r in store.manifest() if (r["shard_id"], r["shard_row"]) == (shard, row))


def is_crop(finding: Finding, row: dict) -> bool:
    names = ("shard_id", "shard_row", "series_uid", "candidate_id")
    return all(getattr(finding, name) == row[name] for name in names)


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
    assert seen[-1][0] == report.counts["bytes_read"]
    assert seen[-1][0] <= seen[-1][1]


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


def rewrite_manifest(store: Handmade, edit: Callable[[list[dict]], object], sign: bool = True) -> None:
    rows = store.manifest()
    edit(rows)
    write_table(store.path / "crops.parquet", rows, MANIFEST_TYPES)
    if sign:
        resign(store.path)


def set_value(name: str, value: object, row: int = 2) -> Callable[[list[dict]], object]:
    return lambda rows: rows[row].update({name: value})


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


# ------------------------------------------------------------------------------------- hostile HDF5 files


def crops_of(store: Handmade) -> np.ndarray:
    with h5py.File(store.path / SHARD) as h5:
        return h5["crops"][:]


def external_storage(store: Handmade, h5: h5py.File) -> None:
    h5.create_dataset("crops", (5, *CROP), store.dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual(store: Handmade, h5: h5py.File) -> None:
    layout = h5py.VirtualLayout((5, *CROP), store.dtype)
    layout[:] = h5py.VirtualSource("/etc/passwd", "crops", (5, *CROP))
    h5.create_virtual_dataset("crops", layout)


def growing_virtual(store: Handmade, h5: h5py.File) -> None:
    """Map a pipe without end: asking this dataset for its shape would open the pipe and never return."""
    os.mkfifo(store.path.parent / "pipe")
    layout = h5py.VirtualLayout((5, *CROP), store.dtype, maxshape=(None, *CROP))
    source = h5py.VirtualSource(str(store.path.parent / "pipe"), "crops", (5, *CROP), maxshape=(None, *CROP))
    unlimited = np.s_[: h5py.h5s.UNLIMITED, :, :, :]
    layout[unlimited] = source[unlimited]
    h5.create_virtual_dataset("crops", layout)


def filtered(store: Handmade, h5: h5py.File) -> None:
    h5.create_dataset("crops", data=crops_of(store), chunks=(1, *CROP), compression="gzip")


def other_chunks(store: Handmade, h5: h5py.File) -> None:
    h5.create_dataset("crops", data=crops_of(store), chunks=(1, *CROP[:2], 6))


def growing(store: Handmade, h5: h5py.File) -> None:
    h5.create_dataset("crops", data=crops_of(store), chunks=(1, *CROP), maxshape=(None, *CROP))


def big_endian(store: Handmade, h5: h5py.File) -> None:
    kind = np.dtype(store.dtype).newbyteorder(">")
    h5.create_dataset("crops", data=crops_of(store).astype(kind), chunks=(1, *CROP))


def bomb(store: Handmade, h5: h5py.File) -> None:
    h5.create_dataset("crops", (1 << 40, *CROP), store.dtype, chunks=(1, *CROP))


def late(store: Handmade, h5: h5py.File) -> None:
    h5.create_dataset("crops", (5, *CROP), store.dtype, chunks=(1, *CROP))


HOSTILE: dict[str, tuple[Callable[[Handmade, h5py.File], object], str]] = {
    "external storage": (external_storage, "hdf5-layout"),
    "external link": (lambda s, h5: h5.__setitem__("crops", h5py.ExternalLink(s.path / OTHER, "/crops")), "hdf5-link"),
    "soft link": (lambda s, h5: h5.__setitem__("crops", h5py.SoftLink("/elsewhere")), "hdf5-link"),
    "virtual": (virtual, "hdf5-layout"),
    "growing virtual": (growing_virtual, "hdf5-layout"),
    "contiguous": (lambda s, h5: h5.create_dataset("crops", data=crops_of(s)), "hdf5-layout"),
    "filter": (filtered, "hdf5-filter"),
    "group": (lambda s, h5: h5.create_group("crops"), "hdf5-object"),
    "type": (lambda s, h5: h5.__setitem__("crops", np.dtype("i2")), "hdf5-object"),
    "empty": (lambda s, h5: None, "hdf5-object"),
    "other dtype": (lambda s, h5: h5.create_dataset("crops", (5, *CROP), "u2", chunks=(1, *CROP)), "hdf5-dtype"),
    "byte order": (big_endian, "hdf5-dtype"),
    "null space": (lambda s, h5: h5.create_dataset("crops", data=h5py.Empty(s.dtype)), "hdf5-layout"),
    "shape": (lambda s, h5: h5.create_dataset("crops", (6, *CROP), s.dtype, chunks=(1, *CROP)), "hdf5-shape"),
    "shape bomb": (bomb, "hdf5-shape"),
    "growing": (growing, "hdf5-shape"),
    "chunks": (other_chunks, "hdf5-chunks"),
    "not allocated": (late, "hdf5-offset"),
}


def plant(store: Handmade, make: Callable[[Handmade, h5py.File], object], libver: str = "v110") -> None:
    """Put a shard of the recorded size in place of a good one, and sign it."""
    path, size = store.path / SHARD, (store.path / SHARD).stat().st_size
    new = store.path.parent / "new.h5"
    with h5py.File(new, "w", libver=(libver, "v114")) as h5:
        make(store, h5)
    assert new.stat().st_size <= size
    with new.open("r+b") as file:
        file.truncate(size)
    new.replace(path)
    resign(store.path)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_shard_is_refused(store, case):
    make, code = HOSTILE[case]
    plant(store, make)
    for level in ("quick", "full"):
        found = errors(verify_store(store.path, level))
        assert (code, SHARD) in {(f.code, f.place) for f in found}, [f.line() for f in found]


def test_attribute_second_object_user_block_and_shifted_crops(store):
    def attribute(s: Handmade, h5: h5py.File) -> None:
        h5.create_dataset("crops", (5, *CROP), s.dtype, chunks=(1, *CROP))
        h5.attrs["more"] = 1

    def second(s: Handmade, h5: h5py.File) -> None:
        h5.create_dataset("crops", (5, *CROP), s.dtype, chunks=(1, *CROP))
        h5["more"] = 1

    plant(store, attribute)
    assert ("hdf5-attribute", SHARD) in codes(verify_store(store.path, "quick"))
    plant(store, second)
    assert ("hdf5-object", SHARD) in codes(verify_store(store.path, "quick"))


def test_crops_in_another_order(store):
    """A chunk index of its own order: HDF5 would show other crops than the map."""
    crops = np.zeros((5, *CROP), store.dtype)
    path, size = store.path / SHARD, (store.path / SHARD).stat().st_size
    with h5py.File(path, "w", libver=("v110", "v110")) as h5:
        dataset = h5.create_dataset("crops", crops.shape, store.dtype, chunks=(1, *CROP))
        for k in (3, 1, 2, 0, 4):
            dataset.id.write_direct_chunk((k, 0, 0, 0), crops[k].tobytes())
    os.truncate(path, size)
    resign(store.path)
    assert ("hdf5-offset", SHARD) in codes(verify_store(store.path, "quick"))


def test_front_door_that_leads_elsewhere(store):
    value = store.record()
    for files in ([OTHER, SHARD], [SHARD, "/etc/passwd"], [SHARD]):
        layout = h5py.VirtualLayout((10, *CROP), store.dtype)
        for k, file in enumerate(files):
            layout[5 * k : 5 * k + 5] = h5py.VirtualSource(file, "crops", (5, *CROP))
        with h5py.File(store.path / "crops.h5", "w", libver=("v110", "v110")) as h5:
            h5.create_virtual_dataset("crops", layout)
        resign(store.path)
        assert codes(verify_store(store.path)) == {("hdf5-mapping", "crops.h5")}
    assert value["shards"][0]["file"] == SHARD


def test_volume_of_another_scan(store):
    shutil.copy(store.path / "volumes/subset0/1.2.840.1.h5", store.path / VOLUME)
    table = pq.read_table(store.path / "scans.parquet").to_pylist()
    mine = next(row for row in table if row["volume_file"] == VOLUME)
    mine |= {"volume_bytes": (store.path / VOLUME).stat().st_size, "volume_sha256": sha256(store.path / VOLUME)}
    write_table(store.path / "scans.parquet", table, SCAN_TYPES)
    resign(store.path)
    report = verify_store(store.path)
    assert ("hdf5-shape", VOLUME) in codes(report)
    assert ("receipt-differs", OTHER.replace(".h5", ".json")) in codes(report)


def test_random_bytes_as_hdf5_do_not_crash(store):
    """Damage to a header with the size kept, in a child process: HDF5 itself might fall over."""
    code = (
        "import random, sys; from pathlib import Path; from lunaprep.verify import verify_store\n"
        "store, path = Path(sys.argv[1]), Path(sys.argv[2]); raw = path.read_bytes(); rng = random.Random(2)\n"
        "for _ in range(50):\n"
        "    new = bytearray(raw)\n"
        "    for _ in range(rng.choice([1, 4, 40])): new[rng.randrange(min(len(raw), 1200))] = rng.randrange(256)\n"
        "    path.write_bytes(new)\n"
        "    assert not verify_store(store).ok or new == raw\n"
    )
    for place in (SHARD, VOLUME, "crops.h5"):
        subprocess.run([sys.executable, "-c", code, store.path, store.path / place], check=True, timeout=60)


# --------------------------------------------------------------------------------------- against the scans


def forge_crop(store: Handmade, row: int) -> None:
    """Change a crop and every record of it."""
    with h5py.File(store.path / SHARD) as h5:
        crops = h5["crops"][:]
    crops[row, 0, 0, 0] -= 1
    write_shard(store.path / SHARD, crops)
    digest = xxhash.xxh3_64_intdigest(crops[row].tobytes())
    rewrite_manifest(store, set_value("xxh3", digest, row))
    receipt = json.loads((store.path / RECEIPT).read_bytes())
    receipt["crop_xxh3"][row] = f"{digest:016x}"
    receipt["sha256"] = sha256(store.path / SHARD)
    (store.path / RECEIPT).write_bytes(canonical(receipt))
    resign(store.path)


def test_source_finds_a_forged_crop(store):
    forge_crop(store, 3)
    assert verify_store(store.path, "full").ok
    found = errors(verify_store(store.path, "source", store.data))
    assert [(f.code, f.place) for f in found] == [("crop-differs", SHARD)]
    assert is_crop(found[0], row_of(store, SHARD, 3))


def test_source_finds_a_forged_volume(store):
    with h5py.File(store.path / VOLUME, "r+") as h5:
        h5["hu"][9, 3, 3] += 1
        chunks = [h5["hu"].id.read_direct_chunk((k, 0, 0))[1] for k in (0, 8)]
    table = pq.read_table(store.path / "scans.parquet").to_pylist()
    mine = next(row for row in table if row["volume_file"] == VOLUME)
    mine |= {"volume_bytes": (store.path / VOLUME).stat().st_size, "volume_sha256": sha256(store.path / VOLUME)}
    mine["volume_chunk_xxh3"] = [xxhash.xxh3_64_intdigest(chunk) for chunk in chunks]
    write_table(store.path / "scans.parquet", table, SCAN_TYPES)
    receipt = OTHER.replace(".h5", ".json")
    value = json.loads((store.path / receipt).read_bytes())
    value["scans"][0]["volume"] |= {"bytes": mine["volume_bytes"], "sha256": mine["volume_sha256"]}
    (store.path / receipt).write_bytes(canonical(value))
    resign(store.path)
    assert verify_store(store.path, "full").ok
    assert codes(verify_store(store.path, "source", store.data)) == {("volume-differs", VOLUME)}


def test_source_missing_is_a_warning(store):
    (store.data / "subset1/1.2.840.3.raw").unlink()
    report = verify_store(store.path, "source", store.data)
    assert report.ok
    assert [(f.code, f.place, f.series_uid) for f in report.findings] == [
        ("source-missing", "subset1/1.2.840.3.mhd", "1.2.840.3")
    ]


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("ElementDataFile = 1.2.840.3.raw", "ElementDataFile = /etc/passwd", "source-unreadable"),
        ("ElementDataFile = 1.2.840.3.raw", "ElementDataFile = %s", "source-unreadable"),
        ("ElementDataFile = 1.2.840.3.raw", "ElementDataFile = LIST", "source-unreadable"),
        ("NDims = 3", "NDims = 1000", "source-unreadable"),
        ("DimSize = 40 24 12", "DimSize = 40 24 13", "source-unreadable"),
        ("DimSize = 40 24 12", "DimSize = 24 40 12", "geometry-differs"),
        ("Offset = -100.25", "Offset = -101.25", "geometry-differs"),
    ],
)
def test_source_header_changed(store, old, new, code):
    path = store.data / "subset1/1.2.840.3.mhd"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    found = errors(verify_store(store.path, "source", store.data))
    assert code in {f.code for f in found}
    assert {f.series_uid for f in found} == {"1.2.840.3"}


def test_source_voxels_changed(store):
    flip(store.data / "subset1/1.2.840.3.raw", 100)
    found = errors(verify_store(store.path, "source", store.data))
    assert [(f.code, f.place) for f in found] == [("source-changed", "subset1/1.2.840.3.mhd")]


def test_source_may_lie_behind_a_link_inside_the_data_folder(store):
    (store.data / "subset1").rename(store.data / "disk2")
    (store.data / "subset1").symlink_to("disk2")
    assert verify_store(store.path, "source", store.data).findings == ()
    (store.data / "disk2").rename(store.data.parent / "outside")
    (store.data / "subset1").unlink()
    (store.data / "subset1").symlink_to(store.data.parent / "outside")
    assert {f.code for f in errors(verify_store(store.path, "source", store.data))} == {"source-unreadable"}


# ------------------------------------------------------------------------------------------------ the report


def test_lines_are_one_printable_line(store):
    hostile = store.path / "crops/a\nb\x1b[31m\udcff.h5"
    hostile.write_bytes(b"")
    lines = [finding.line() for finding in verify_store(store.path, "quick").findings]
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert lines[0].startswith("warning: crops/a\\nb\\x1b[31m")


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
