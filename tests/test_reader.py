"""Reading a store: any rows in any order, and a store that comes from elsewhere is not trusted."""

import os
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.errors import BusyError, StoreError, UsageError
from lunaprep.geometry import IDENTITY, Geometry
from lunaprep.schema import MANIFEST_COLUMNS, SCAN_COLUMNS
from lunaprep.store.commit import build_lock
from lunaprep.store.files import canonical_json
from lunaprep.store.front_door import Rows, front_door_bytes
from lunaprep.store.reader import open_store
from lunaprep.store.record import make_record, read_record, store_id_of
from lunaprep.store.shard import ShardWriter, shard_header
from lunaprep.store.tables import table_bytes
from lunaprep.store.volume import VolumeWriter

CROP = (8, 9, 10)
ROWS = {
    "subset0-000-aaaaaaaaaaaa": 4,
    "subset0-001-bbbbbbbbbbbb": 0,
    "subset1-000-cccccccccccc": 1,
    "subset2-000-dddddddddddd": 6,
}
TOTAL = sum(ROWS.values())
VOLUME = (9, 20, 30)


def all_crops(dtype: str) -> np.ndarray:
    return np.random.default_rng(4).integers(-1000, 1001, (TOTAL, *CROP)).astype(dtype)


def voxels() -> np.ndarray:
    return np.random.default_rng(5).normal(0, 300, VOLUME).clip(-1000, 1000).astype(np.float32)


def manifest() -> pd.DataFrame:
    frame = pd.DataFrame({c.name: pd.Series([None if c.optional else 0] * TOTAL) for c in MANIFEST_COLUMNS})
    names = [name for name, count in ROWS.items() for _ in range(count)]
    rows = [k for count in ROWS.values() for k in range(count)]
    texts = dict.fromkeys(("series_uid", "patient_id", "split_series", "split_candidate"), "x")
    flags = dict.fromkeys(("is_padded", "is_nodule", "is_malignant"), False)
    return frame.assign(candidate_id=range(TOTAL), shard_id=names, shard_row=rows, **texts, **flags)


def scans(volume: dict | None) -> pd.DataFrame:
    rows = []
    for uid, facts in (("1.2.3", volume), ("1.2.4", None)):
        row = dict.fromkeys(c.name for c in SCAN_COLUMNS)
        row |= {"series_uid": uid, "subset": 0, "status": "ok", "file": "f", "num_crops": 0}
        row |= dict(zip(("num_slices", "num_rows", "num_cols"), VOLUME, strict=True))
        rows.append(row | (facts or {}))
    return pd.DataFrame(rows, dtype=object)


def front_door(shards: list[tuple[str, int]], dtype: str, store_id: str) -> bytes:
    return front_door_bytes([Rows("crops", shards, CROP, dtype)], "crops.parquet", store_id)


def make_store(out: Path, dtype: str = "int16") -> Path:
    """A small store, by the writers."""
    crops = all_crops(dtype)
    shards, first = [], 0
    for name, count in ROWS.items():
        entry = {
            "id": name,
            "file": None,
            "rows": count,
            "bytes": 0,
            "sha256": None,
            "receipt": "r",
            "receipt_sha256": "s",
        }
        if count:
            with ShardWriter(out / "p", count, CROP, dtype) as writer:
                writer.append(crops[first : first + count])
                size, sha256 = writer.finish()
                writer.publish_as(out / "crops" / f"{name}.h5")
            entry |= {"file": f"crops/{name}.h5", "bytes": size, "sha256": sha256}
        shards.append(entry)
        first += count
    with VolumeWriter(out / "v", "1.2.3", Geometry((0, 0, 0), (1, 1, 1), IDENTITY, VOLUME)) as volume:
        volume.append(voxels())
        size, sha256 = volume.finish()
        volume.publish_as(out / "volumes" / "subset0" / "1.2.3.h5")
    facts = {"volume_file": "volumes/subset0/1.2.3.h5", "volume_bytes": size, "volume_sha256": sha256}
    (out / "crops.parquet").write_bytes(table_bytes(manifest(), MANIFEST_COLUMNS))
    (out / "scans.parquet").write_bytes(table_bytes(scans(facts), SCAN_COLUMNS))
    store_id = store_id_of({}, shards, {})
    door = front_door([(s["file"], s["rows"]) for s in shards if s["file"]], dtype, store_id)
    (out / "crops.h5").write_bytes(door)
    content = {
        "store_id": store_id,
        "parameters": {"crop_shape": list(CROP), "dtype": dtype},
        "inputs": [],
        "counts": {"scans_ok": 2, "scans_failed": 0, "crops": TOTAL, "nodules": 0, "volumes": 1},
        "crops": {"shape": [TOTAL, *CROP], "dtype": dtype},
        "shards": shards,
        "files": [],
    }
    (out / "store.json").write_bytes(make_record(content))
    return out


def change(out: Path, **values) -> None:
    """Rewrite store.json with some keys changed (None: removed), its checksum right."""
    record = read_record(out)
    content = {key: value for key, value in (record | values).items() if value is not None}
    (out / "store.json").write_bytes(make_record({k: v for k, v in content.items() if k not in ("format", "version")}))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A store of one's own to spoil."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def refused(out: Path, match: str = ".") -> str:
    with pytest.raises(StoreError, match=match) as info:
        open_store(out)
    message = str(info.value)
    assert message.isprintable(), repr(message)
    return message


# Crops


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_all_crops_are_what_h5py_reads_through_the_front_door(tmp_path, dtype):
    out = make_store(tmp_path, dtype)
    store = open_store(out)
    got = store.crops(range(TOTAL))
    with h5py.File(out / "crops.h5", "r") as h5:
        through_the_door = h5["crops"][...]
    assert got.dtype == np.float32
    assert got.tobytes() == all_crops(dtype).astype(np.float32).tobytes()
    assert through_the_door.dtype == dtype
    assert (got == through_the_door).all()
    assert (len(store), store.crop_shape, store.dtype) == (TOTAL, CROP, np.dtype(dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(0, TOTAL - 1), max_size=25), kind=st.sampled_from([list, np.array, pd.Index]))
def test_rows_in_any_order_and_repeated(made, rows, kind):
    got = open_store(made).crops(kind(rows) if rows else [])
    assert got.shape == (len(rows), *CROP)
    assert (got == all_crops("int16")[np.array(rows, dtype=int)]).all()


def test_crops_belong_to_the_caller(made):
    store = open_store(made)
    store.crops([0])[:] = 12345
    assert (store.crops([0])[0] == all_crops("int16")[0]).all()


@pytest.mark.parametrize("rows", [[TOTAL], [-1], [0, TOTAL + 5, 1], [2**40]], ids=str)
def test_row_that_is_not_there_is_an_index_error(made, rows):
    with pytest.raises(IndexError, match=f"rows must lie in 0 to {TOTAL - 1}"):
        open_store(made).crops(rows)


@pytest.mark.parametrize("rows", [np.arange(TOTAL) < 3, [0.5, 2.5]], ids=["mask", "fractions"])
def test_what_is_no_row_number_is_refused_not_read_as_one(made, rows):
    """A mask of the manifest would otherwise give row 0 and row 1, over and over."""
    with pytest.raises((TypeError, IndexError, ValueError)):
        open_store(made).crops(rows)


def test_shard_without_crops_has_no_file_and_no_rows(made):
    store = open_store(made)
    assert [shard.rows for shard in store.shards] == [4, 1, 6]
    assert [shard.offset for shard in store.shards] == [4096] * 3


def test_store_without_any_crop_opens(out):
    shards = [{**s, "file": None, "rows": 0} for s in read_record(out)["shards"]]
    counts = {**read_record(out)["counts"], "crops": 0}
    change(out, shards=shards, counts=counts, crops={"shape": [0, *CROP], "dtype": "int16"})
    (out / "crops.parquet").write_bytes(table_bytes(manifest().iloc[:0], MANIFEST_COLUMNS))
    store = open_store(out)
    assert len(store) == len(store.manifest) == 0
    assert store.crops([]).shape == (0, *CROP)
    with pytest.raises(IndexError):
        store.crops([0])


def test_manifest_rows_name_the_crops_they_stand_for(made):
    store = open_store(made)
    for k, row in store.manifest.iterrows():
        with h5py.File(made / "crops" / f"{row['shard_id']}.h5", "r") as h5:
            assert (h5["crops"][row["shard_row"]] == store.crops([k])[0]).all()


def test_store_opens_by_its_front_door(made):
    assert (open_store(made / "crops.h5").crops([3]) == open_store(str(made)).crops([3])).all()


def test_store_opens_from_within_its_own_folder(made, monkeypatch):
    monkeypatch.chdir(made)
    assert len(open_store(".")) == len(open_store("crops.h5")) == TOTAL


def test_store_opens_where_nothing_can_be_written(out):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    store = open_store(out)
    store.crops([1, 9])
    assert len(store.scans) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_store_can_be_moved(out, tmp_path):
    moved = out.rename(tmp_path / "elsewhere=1")
    store = open_store(moved)
    assert len(store.manifest) == TOTAL
    assert (store.crops([5])[0] == all_crops("int16")[5]).all()


# The front door


def test_missing_shard_shows_as_fill_in_the_front_door(tmp_path):
    for dtype, is_fill in (("int16", lambda v: v == -32768), ("float32", np.isnan)):
        out = make_store(tmp_path / dtype, dtype)
        (out / "crops" / "subset1-000-cccccccccccc.h5").unlink()
        with h5py.File(out / "crops.h5", "r") as h5:
            got = h5["crops"][...]
            assert h5.attrs["NX_class"] == b"NXdata"
            assert h5.attrs["signal"] == b"crops"
            assert h5.attrs["store_id"] == read_record(out)["store_id"].encode()
        assert is_fill(got[4]).all()
        assert (np.delete(got, 4, 0) == np.delete(all_crops(dtype), 4, 0)).all()


def test_front_door_is_the_same_bytes_twice():
    args = ([("crops/a.h5", 3), ("crops/b.h5", 2)], "float32", "0" * 16)
    assert front_door(*args) == front_door(*args)


@pytest.mark.parametrize("shards", [[("crops/a.h5", 3)], []], ids=str)
def test_front_door_does_not_hold_the_time_of_day(shards):
    data = front_door(shards, "int16", "0" * 16)
    now = int(time.time())
    assert not any(second.to_bytes(4, "little") in data for second in range(now - 5, now + 2))


# Spoilt shards


def shard_path(out: Path) -> Path:
    return out / "crops" / "subset2-000-dddddddddddd.h5"


@pytest.mark.parametrize("size", [0, 1, 8, 4096, -1])
def test_shard_of_another_size_is_refused_and_named(out, size):
    path = shard_path(out)
    with path.open("r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size + size)
    assert path.name in refused(out, "bytes, expected")


def test_shard_that_is_longer_is_refused(out):
    with shard_path(out).open("ab") as file:
        file.write(b"x")
    refused(out, "bytes, expected")


def test_shard_that_is_no_hdf5_file_is_refused(out):
    with shard_path(out).open("r+b") as file:
        file.write(b"PK")
    assert shard_path(out).name in refused(out, "cannot be opened.*signature")


def test_missing_shard_is_refused_and_named(out):
    shard_path(out).unlink()
    assert shard_path(out).name in refused(out, "No such file")


def test_folder_in_the_place_of_a_shard_is_refused(out):
    shard_path(out).unlink()
    shard_path(out).mkdir()
    refused(out, shard_path(out).name)


def test_shard_of_another_dtype_and_the_same_size_is_refused(tmp_path):
    """Format page: a reader checks dtype, shape, chunking, offset and size of each shard."""
    out = make_store(tmp_path, "float32")
    path = shard_path(out)
    data = path.read_bytes()
    path.write_bytes(shard_header(12, CROP, "int16") + data[4096:])
    assert len(path.read_bytes()) == len(data)
    refused(out, path.name)


def test_shard_of_another_crop_shape_and_the_same_size_is_refused(out):
    path = shard_path(out)
    path.write_bytes(shard_header(6, (10, 9, 8), "int16") + path.read_bytes()[4096:])
    refused(out, path.name)


def test_link_out_of_the_store_is_not_followed(out, tmp_path):
    shard_path(out).rename(tmp_path / "elsewhere.h5")
    shard_path(out).symlink_to(tmp_path / "elsewhere.h5")
    refused(out, "outside itself")


def test_pipe_in_the_place_of_a_shard_does_not_hang(out):
    shard_path(out).unlink()
    os.mkfifo(shard_path(out))

    class HungError(Exception):
        """Not a TimeoutError, which is an OSError."""

    def too_long(*_):
        raise HungError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        refused(out, shard_path(out).name)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Spoilt store.json


@pytest.mark.parametrize("name", [".", "nowhere", "nowhere/crops.h5"])
def test_folder_without_a_store_says_how_to_make_one(tmp_path, name):
    with pytest.raises(UsageError, match="lunaprep build") as info:
        open_store(tmp_path / name)
    assert str(info.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_of_store_json_is_found(out):
    path = out / "store.json"
    data = path.read_bytes()
    rng = np.random.default_rng(8)
    for at in {0, len(data) - 1, *rng.integers(0, len(data), 80).tolist()}:
        spoilt = bytearray(data)
        spoilt[at] ^= int(rng.integers(1, 256))
        path.write_bytes(spoilt)
        refused(out, r"store\.json is damaged")


JUNK = [b"", b"{}", b"[]", b"null", b"1", b'"x"', b"\xff", b"[" * 100_000, b'{"self_sha256": 1}', b'{"a": NaN}']


@pytest.mark.parametrize("content", JUNK, ids=lambda b: repr(b[:20]))
def test_what_is_no_record_is_damaged(out, content):
    (out / "store.json").write_bytes(content)
    refused(out, r"store\.json is damaged")


def test_cut_store_json_is_damaged(out):
    path = out / "store.json"
    path.write_bytes(path.read_bytes()[:-200])
    refused(out, "damaged")


def test_record_with_other_spaces_is_damaged(out):
    path = out / "store.json"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    refused(out, "damaged")


@pytest.mark.parametrize(("key", "value"), [("version", 2), ("version", "1"), ("version", None), ("format", "other")])
def test_store_of_another_version_says_so(out, monkeypatch, key, value):
    record = read_record(out)
    monkeypatch.setattr(f"lunaprep.store.record.schema.{'FORMAT_VERSION' if key == 'version' else 'FORMAT'}", value)
    data = make_record(record)
    monkeypatch.undo()
    (out / "store.json").write_bytes(data)
    refused(out, "this lunaprep reads lunaprep-store 1")


@pytest.mark.parametrize(
    "file", ["../elsewhere.h5", "/etc/passwd", "crops/../../x.h5", "", ".", "crops/\0.h5", 5], ids=repr
)
def test_record_that_names_a_file_outside_is_refused(out, file):
    shards = read_record(out)["shards"]
    (out.parent / "elsewhere.h5").write_bytes(shard_path(out).read_bytes())
    change(out, shards=[*shards[:-1], {**shards[-1], "file": file}])
    if file == "":  # no file, but rows: crops would be missing
        with pytest.raises((StoreError, IndexError)):
            open_store(out).crops([TOTAL - 1])
    else:
        refused(out)


def spoilt_records() -> dict[str, dict]:
    one = {"id": "a", "file": "crops/subset2-000-dddddddddddd.h5", "rows": 6}
    return {
        "no-shards": {"shards": None},
        "no-crops": {"crops": None},
        "no-counts": {"counts": None},
        "shards-a-number": {"shards": 5},
        "shard-a-text": {"shards": ["a"]},
        "shard-without-rows": {"shards": [{"id": "a", "file": one["file"]}]},
        "rows-a-text": {"shards": [{**one, "rows": "6"}]},
        "rows-a-fraction": {"shards": [{**one, "rows": 6.0}]},
        "rows-negative": {"shards": [{**one, "rows": -1}]},
        "shape-of-two": {"crops": {"shape": [TOTAL, 720], "dtype": "int16"}},
        "shape-of-none": {"crops": {"shape": [], "dtype": "int16"}},
        "shape-of-texts": {"crops": {"shape": ["a", "b", "c", "d"], "dtype": "int16"}},
        "dtype-a-number": {"crops": {"shape": [TOTAL, *CROP], "dtype": 2}},
        "count-too-large": {"counts": {"crops": TOTAL + 3}, "crops": {"shape": [TOTAL + 3, *CROP], "dtype": "int16"}},
        "count-too-small": {"counts": {"crops": 2}},
    }


@pytest.mark.parametrize("name", list(spoilt_records()))
def test_record_with_a_right_checksum_and_wrong_content_is_refused(out, name):
    """Anybody can make a checksum; what a reader relies on, it must look at."""
    change(out, **spoilt_records()[name])
    refused(out)


@pytest.mark.parametrize("dtype", ["object", "uint32", "float64", ">f4", "f4", "no such type"])
def test_dtype_that_the_format_does_not_have_is_refused(tmp_path, dtype):
    out = make_store(tmp_path, "float32")
    change(out, crops={"shape": [TOTAL, *CROP], "dtype": dtype})
    refused(out)


def test_manifest_of_another_length_is_refused(out):
    (out / "crops.parquet").write_bytes(table_bytes(manifest().iloc[:5], MANIFEST_COLUMNS))
    store = open_store(out)
    with pytest.raises(StoreError, match=f"has 5 rows, expected {TOTAL}"):
        _ = store.manifest


def test_build_that_is_between_decision_and_last_rename_is_waited_for(out, monkeypatch):
    monkeypatch.setattr("lunaprep.store.commit.RENAMES_S", 0.3)
    work = out / ".build"
    work.mkdir(exist_ok=True)
    (work / "store.json").write_bytes((out / "store.json").read_bytes())
    (out / "store.json").write_bytes(b"half")
    (work / "commit.json").write_bytes(canonical_json({"moves": [[".build/store.json", "store.json"]], "deletes": []}))
    with build_lock(out), pytest.raises(BusyError):
        open_store(out)
    assert len(open_store(out)) == TOTAL


# Volumes


def volume_path(out: Path) -> Path:
    return out / "volumes" / "subset0" / "1.2.3.h5"


def volume_refused(out: Path, match: str = ".") -> None:
    store = open_store(out)
    with pytest.raises(StoreError, match=match) as info:
        store.volume("1.2.3")
    assert str(info.value).isprintable()


def test_volume_is_read_back_whole_and_in_parts(made):
    store = open_store(made)
    assert (store.volume("1.2.3") == voxels()).all()
    with store.open_volume("1.2.3") as hu:
        assert (hu[3:5, ::2, 7] == voxels()[3:5, ::2, 7]).all()
    assert not hu  # closed


@pytest.mark.parametrize("uid", ["1.2.4", "9.9", "../1.2.3", ""])
def test_series_without_a_volume_is_a_store_error(made, uid):
    with pytest.raises(StoreError, match="no volume"):
        open_store(made).volume(uid)


def test_volume_that_is_missing_or_no_hdf5_file_is_refused(out):
    volume_path(out).write_bytes(b"x" * 5000)
    volume_refused(out, r"1\.2\.3\.h5 cannot be opened")
    volume_path(out).unlink()
    volume_refused(out, r"1\.2\.3\.h5 cannot be read: No such file")


def test_cut_volume_is_refused(out):
    volume_path(out).write_bytes(volume_path(out).read_bytes()[:-100])
    volume_refused(out)


@pytest.mark.parametrize(
    "kind", ["external link", "soft link", "external storage", "virtual", "group", "missing", "flat"]
)
def test_volume_that_leads_elsewhere_is_not_followed(out, tmp_path, kind):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as h5:
        h5["hu"] = np.zeros(VOLUME, dtype=np.float32)
    (tmp_path / "raw").write_bytes(bytes(4 * 5400))
    with h5py.File(volume_path(out), "w") as h5:
        if kind == "external link":
            h5["hu"] = h5py.ExternalLink(str(other), "hu")
        elif kind == "soft link":
            h5["real"] = np.zeros(VOLUME, dtype=np.float32)
            h5["hu"] = h5py.SoftLink("/real")
        elif kind == "external storage":
            h5.create_dataset("hu", VOLUME, dtype="<f4", external=[(str(tmp_path / "raw"), 0, 4 * 5400)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout(VOLUME, dtype="<f4")
            layout[...] = h5py.VirtualSource(str(other), "hu", VOLUME)
            h5.create_virtual_dataset("hu", layout)
        elif kind == "group":
            h5.create_group("hu")
        elif kind == "flat":
            h5["hu"] = np.zeros(5400, dtype=np.float32)
    volume_refused(out, "holds float32" if kind == "flat" else "no plain dataset")


def test_volume_that_is_a_link_out_of_the_store_is_not_followed(out, tmp_path):
    volume_path(out).rename(tmp_path / "elsewhere.h5")
    volume_path(out).symlink_to(tmp_path / "elsewhere.h5")
    volume_refused(out, "outside itself")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((9, 20, 31), "<f4"), ((9, 20), "<f4"), (VOLUME, "<f8"), (VOLUME, "S4"), ((10**5, 10**5, 10**5), "<f4")],
    ids=str,
)
def test_volume_of_another_shape_or_dtype_than_the_table_says_is_refused(out, shape, dtype):
    """The last one would ask for four petabytes of memory."""
    with h5py.File(volume_path(out), "w") as h5:
        h5.create_dataset("hu", shape, dtype=dtype, chunks=True)
    volume_refused(out)
