"""Files of a store spoilt at random, whole stores made to harm: a report or a line, in bounded memory, and no crash."""

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lunaprep import schema
from lunaprep.build import BuildOptions, build
from lunaprep.errors import StoreError
from lunaprep.parameters import Parameters
from lunaprep.sources.phantom import write_phantom
from lunaprep.store.reader import open_store
from lunaprep.verify import verify_store

from .conftest import Figure
from .test_damage_store import kinds_of, sign

KINDS = (
    "crops.h5", "crops.parquet", "scans.parquet", "slabs.h5", "slabs.parquet", "store.json", "crops False .h5",
    "crops False .json", "slabs False .h5", "slabs True .h5", "volumes False .h5",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans, with all kinds of files; never written to."""
    root = tmp_path_factory.mktemp("fuzz")
    write_phantom(root / "data", num_scans=2, seed=7, size=(16, 48, 48), num_subsets=2, num_candidates=1)
    build(BuildOptions(root / "data", root / "store", workers=1), Parameters(crop_shape=(8, 16, 16), shard_bytes=1))
    shutil.rmtree(root / "store" / ".build")
    return root / "store"


@pytest.fixture
def store(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "store")


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kinds", [KINDS[:6], KINDS[6:]], ids=["tables and front doors", "pieces"])
def test_no_spoilt_file_crashes_hangs_or_fills_the_memory(store: Path, kinds: tuple[str, ...], figure: Figure) -> None:
    places = kinds_of(store)
    files = [text for kind in kinds for text in (places[kind][0], str(1_000_000 * KINDS.index(kind)))]
    program = str(Path(__file__).with_name("fuzz_store.py"))
    command = [sys.executable, program, str(store), str(figure(12, 1_800)), *files]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, f"exit {done.returncode} in{done.stdout[-40:]}\n{done.stderr[-2000:]}"


def volume_of(store: Path) -> tuple[Path, str]:
    path = sorted((store / "volumes").rglob("*.h5"))[0]
    return path, path.stem


def agree(store: Path, path: Path, **changes: object) -> None:
    """Have scans.parquet and store.json say that a volume is meant to be so."""
    table, columns = pq.read_table(store / "scans.parquet").to_pylist(), pq.read_schema(store / "scans.parquet")
    row = next(row for row in table if row["series_uid"] == path.stem)
    row |= {"volume_bytes": path.stat().st_size, **changes}
    pq.write_table(pa.Table.from_pylist(table, schema=columns), store / "scans.parquet")
    sign(store)


def peak_of(store: Path, uid: str) -> tuple[int, str]:
    """Most memory, MiB, of a process that reads a volume and verifies its store, and what it prints."""
    command = [sys.executable, "-c", READ, str(store), uid]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *said, peak = done.stdout.splitlines()
    return int(peak), "\n".join(said)


READ = """
import resource, sys
from pathlib import Path
from lunaprep.errors import StoreError
from lunaprep.store.reader import open_store
from lunaprep.verify import verify_store
store = open_store(sys.argv[1])
for read in (store.volume, store.masks):
    try: read(sys.argv[2])
    except StoreError as error: print("reader:", error)
for finding in verify_store(Path(sys.argv[1])).findings: print("verify:", finding.line())
status = open("/proc/self/status").read()  # ru_maxrss would count the parent before the exec
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A gigabyte of zeros, deflated."""
    block = zlib.compressobj(1)
    return b"".join(block.compress(bytes(1 << 24)) for _ in range(64)) + block.flush()


@pytest.mark.parametrize("attack", ["stored long", "chunk of a gigabyte", "a terabyte"])
def test_a_volume_that_unpacks_to_a_gigabyte_is_refused(store: Path, bomb: bytes, attack: str) -> None:
    path, uid = volume_of(store)
    with h5py.File(path) as h5:
        shape = h5["hu"].shape
    side = {"stored long": shape, "chunk of a gigabyte": shape, "a terabyte": (4096, 8192, 8192)}[attack]
    path.unlink()
    with h5py.File(path, "w", libver=schema.LIBVER) as h5:
        chunk = (64, 2048, 2048) if attack == "chunk of a gigabyte" else None
        chunk = chunk or tuple(min(a, b) for a, b in zip(side, schema.VOLUME_CHUNK_IRC, strict=True))
        big = tuple(max(a, b) for a, b in zip(side, chunk, strict=True))
        hu = h5.create_dataset("hu", big, "<f4", chunks=chunk, shuffle=True, compression="gzip")
        hu.id.write_direct_chunk((0, 0, 0), bomb)
    agree(store, path)
    peak, said = peak_of(store, uid)
    assert f"reader: {path.name}" in said
    assert f"verify: error: {path.relative_to(store).as_posix()}" in said
    assert peak < 512


def test_a_chunk_as_long_as_its_voxels_unpacks_to_less_than_a_gigabyte(store: Path) -> None:
    """The longest stored chunk that a reader lets HDF5 unpack."""
    path, uid = volume_of(store)
    with h5py.File(path, "r+") as h5:
        plain = int(np.prod(h5["hu"].chunks)) * 4
        block = zlib.compressobj(9)
        bomb = b"".join(block.compress(bytes(1 << 20)) for _ in range(plain * 1000 >> 20)) + block.flush()
        assert 0.9 * plain < len(bomb) < 1.1 * plain
        h5["hu"].id.write_direct_chunk((0, 0, 0), bomb[:plain])
    agree(store, path)
    peak, _ = peak_of(store, uid)
    assert peak < 1024


@pytest.mark.parametrize("kind", ["contiguous", "lzf", "szip or none", "fletcher", "no filter"])
def test_a_volume_packed_in_another_way_is_refused(store: Path, kind: str) -> None:
    path, uid = volume_of(store)
    with h5py.File(path) as h5:
        voxels, chunk = h5["hu"][...], h5["hu"].chunks
    path.unlink()
    options: dict[str, object] = {
        "contiguous": {},
        "lzf": {"chunks": chunk, "compression": "lzf", "shuffle": True},
        "szip or none": {"chunks": chunk, "scaleoffset": 2},
        "fletcher": {"chunks": chunk, "compression": "gzip", "shuffle": True, "fletcher32": True},
        "no filter": {"chunks": chunk},
    }[kind]
    with h5py.File(path, "w", libver=schema.LIBVER) as h5:
        h5.create_dataset("hu", data=voxels, **options)
    agree(store, path)
    with pytest.raises(StoreError, match=path.name):
        open_store(store).volume(uid)
    assert not verify_store(store).ok


def test_a_front_door_with_a_page_of_zeros_hangs_nobody_who_verifies(store: Path) -> None:
    """HDF5 2.0 walks in a circle on it, so it isn't shown to it."""
    door = store / "crops.h5"
    raw = bytearray(door.read_bytes())
    heap = raw.index(b"GCOL")
    raw[heap + 16 : heap + 512] = bytes(496)
    door.write_bytes(raw)
    assert {f.code for f in verify_store(store).findings if f.place == "crops.h5"} == {"wrong-sha256"}
    sign(store)
    assert {f.code for f in verify_store(store).findings if f.place == "crops.h5"} == {"hdf5-layout"}
    open_store(store)
