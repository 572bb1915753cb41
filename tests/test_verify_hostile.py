"""verify before HDF5 files made to harm: refused, followed nowhere."""

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunaprep import schema
from lunaprep.store.front_door import Rows, front_door_bytes
from lunaprep.verify import verify_store
from lunaprep.verify.heaps import HEAP, lookup3, require_heaps
from lunaprep.verify.places import BadFileError
from lunaprep.verify.structure import unpack

from .handmade_store import (
    CROP,
    DTYPES,
    OTHER,
    SCAN_TYPES,
    SHARD,
    VOLUME,
    Handmade,
    codes,
    errors,
    make_store,
    resign,
    sha256,
    write_table,
)


@pytest.fixture(params=DTYPES)
def store(request, tmp_path) -> Handmade:
    """A store of the test's own."""
    return make_store(tmp_path / "own", request.param, DTYPES[request.param])


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


@pytest.mark.parametrize("num_shards", [1, 7, 30])
def test_every_changed_byte_of_a_list_of_mapped_files_is_seen_before_hdf5_sees_it(num_shards):
    """HDF5 2.0 crashes on some: it looks at that checksum last. That it wrote the file is the oracle."""
    shards = [(f"crops/subset0-{k:03}-0123456789ab.h5", k + 1) for k in range(num_shards)]
    whole = front_door_bytes([Rows("crops", shards, CROP, "int16")], "crops.parquet", "0" * 64)
    require_heaps(whole)
    heap = whole.index(HEAP)
    stop = heap + 32 + int.from_bytes(whole[heap + 24 : heap + 32], "little")
    for at in range(heap + 32, stop, 1 + num_shards // 2):
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << at % 8
        with pytest.raises(BadFileError, match="isn't let near it"):
            require_heaps(bytes(spoilt))


def test_lookup3_as_its_author_published_it():
    assert lookup3(b"") == 0xDEADBEEF
    assert lookup3(b"Four score and seven years ago") == 0x17770551


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
        "store, rng = Path(sys.argv[1]), random.Random(2)\n"
        "for path in map(store.joinpath, sys.argv[2:]):\n"
        "    raw = path.read_bytes()\n"
        "    for _ in range(50):\n"
        "        new = bytearray(raw)\n"
        "        for _ in range(rng.choice([1, 4, 40])): new[rng.randrange(min(len(raw), 1200))] = rng.randrange(256)\n"
        "        path.write_bytes(new)\n"
        "        assert not verify_store(store).ok or new == raw\n"
        "    path.write_bytes(raw)\n"
    )
    subprocess.run([sys.executable, "-c", code, store.path, SHARD, VOLUME, "crops.h5"], check=True, timeout=100)


@given(st.binary(max_size=300), st.integers(1, 6000), st.integers(0, 60), st.integers(0, 9))
def test_chunks_are_unpacked_as_far_as_zlib_does(plain, size, cut, level):
    packed = zlib.compress(plain * 20, level)
    stored = packed[: len(packed) - cut]
    assert unpack(stored, size) == zlib.decompressobj().decompress(stored, size)


def test_no_more_is_unpacked_than_a_chunk_of_the_format():
    bomb = zlib.compress(bytes(1 << 24))
    largest = int(np.prod(schema.VOLUME_CHUNK_IRC)) * 4
    assert len(unpack(bomb, largest)) == largest
    with pytest.raises(BadFileError, match="expected"):
        unpack(bomb, largest + 1)
    with pytest.raises(zlib.error):
        unpack(b"not deflated", largest)


def test_lines_are_one_printable_line(store):
    hostile = store.path / "crops/a\nb\x1b[31m\udcff.h5"
    hostile.write_bytes(b"")
    lines = [finding.line() for finding in verify_store(store.path, "quick").findings]
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert lines[0].startswith("warning: crops/a\\nb\\x1b[31m")
