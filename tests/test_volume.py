"""Volumes: read back by plain h5py, the same bytes from any slabs, and what a full disk leaves."""

import errno
import hashlib
import math
import os
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.errors import NoSpaceError
from lunaprep.geometry import IDENTITY, Geometry
from lunaprep.store.volume import VolumeWriter

UID = "1.2.840.113"
TILTED = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, -1.0)
SHAPES = [
    (1, 1, 1), (1, 40, 30), (3, 5, 7), (8, 128, 128), (9, 129, 127), (16, 128, 256), (17, 130, 40), (7, 300, 20),
    (33, 16, 16), (8, 127, 129),
]  # fmt: skip


def grid(shape: tuple[int, int, int], direction=IDENTITY) -> Geometry:
    return Geometry((-195.5, -182.123456789, 1e-3), (0.703125, 0.703125, 2.4999999), direction, shape)


def noise(shape: tuple[int, int, int], seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(-300, 500, shape), -1000, 1000).round(1).astype(np.float32)


def write(path: Path, voxels: np.ndarray, cuts=(), geometry: Geometry | None = None) -> tuple[int, str, list[str]]:
    """A finished volume at the path; its size, hash and the chunks' hashes."""
    partial = path.with_suffix(".partial")
    with VolumeWriter(partial, UID, geometry or grid(voxels.shape)) as writer:
        for slab in np.split(voxels, list(cuts)):
            writer.append(slab)
        size, sha256 = writer.finish()
        writer.publish_as(path)
        return size, sha256, list(writer.chunk_xxh3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_volume_reads_back_equal(tmp_path, shape):
    voxels = noise(shape)
    path = tmp_path / "volumes" / "v.h5"
    size, sha256, _ = write(path, voxels)
    with h5py.File(path, "r") as h5:
        hu = h5["hu"]
        assert hu.shape == hu.maxshape == shape
        assert hu.dtype == np.dtype("<f4")
        assert (hu[...] == voxels).all()
    assert size == path.stat().st_size
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_filters_and_chunks_are_as_declared(tmp_path, shape):
    write(tmp_path / "v.h5", noise(shape))
    with h5py.File(tmp_path / "v.h5", "r") as h5:
        plist = h5["hu"].id.get_create_plist()
        kinds = [plist.get_filter(k)[0] for k in range(plist.get_nfilters())]
        assert kinds == [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]
        assert h5["hu"].chunks == tuple(min(a, b) for a, b in zip(shape, (8, 128, 128), strict=True))
        assert h5["hu"].id.get_num_chunks() == math.prod(
            -(-n // c) for n, c in zip(shape, h5["hu"].chunks, strict=True)
        )
        assert list(h5) == ["hu"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_checksums_are_of_the_stored_chunks_in_row_major_order(tmp_path, shape):
    *_, chunk_xxh3 = write(tmp_path / "v.h5", noise(shape))
    with h5py.File(tmp_path / "v.h5", "r") as h5:
        hu = h5["hu"]
        expected = []
        for corner in np.ndindex(*(-(-n // c) for n, c in zip(shape, hu.chunks, strict=True))):
            mask, data = hu.id.read_direct_chunk(tuple(k * c for k, c in zip(corner, hu.chunks, strict=True)))
            assert mask == 0
            expected.append(xxhash.xxh3_64_hexdigest(data))
    assert chunk_xxh3 == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(depth=st.integers(1, 40), data=st.data())
def test_slabs_of_any_size_give_the_same_bytes(tmp_path_factory, depth, data):
    folder = tmp_path_factory.getbasetemp()
    voxels = noise((depth, 20, 9))
    cuts = sorted(data.draw(st.lists(st.integers(0, depth), max_size=8)))  # empty slabs, too
    assert write(folder / "cut.h5", voxels, cuts) == write(folder / "whole.h5", voxels)
    assert (folder / "cut.h5").read_bytes() == (folder / "whole.h5").read_bytes()
    with h5py.File(folder / "cut.h5", "r") as h5:
        assert (h5["hu"][...] == voxels).all()


def test_volume_does_not_hold_the_time_of_day(tmp_path):
    write(tmp_path / "v.h5", np.zeros((2, 8, 8), dtype=np.float32))
    data, now = (tmp_path / "v.h5").read_bytes(), int(time.time())
    assert not any(second.to_bytes(4, "little") in data for second in range(now - 5, now + 2))


def test_int16_slabs_give_the_same_bytes_as_float32(tmp_path):
    voxels = noise((9, 20, 30)).round() + 0.0  # no -0.0
    assert write(tmp_path / "a.h5", voxels.astype(np.int16), [4]) == write(tmp_path / "b.h5", voxels)


def test_writer_does_not_keep_a_slab_that_its_caller_uses_again(tmp_path):
    voxels = noise((11, 12, 13))
    buffer = np.empty((5, 12, 13), dtype=np.float32)
    with VolumeWriter(tmp_path / "p", UID, grid(voxels.shape)) as writer:
        for first in range(0, 11, 5):
            part = voxels[first : first + 5]
            buffer[: len(part)] = part
            writer.append(buffer[: len(part)])
            buffer[:] = 7777
        writer.finish()
        writer.publish_as(tmp_path / "v.h5")
    with h5py.File(tmp_path / "v.h5", "r") as h5:
        assert (h5["hu"][...] == voxels).all()


@pytest.mark.parametrize(
    "direction", [IDENTITY, TILTED, (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)], ids=["plain", "tilted", "flipped"]
)
def test_geometry_is_what_simpleitk_gives(tmp_path, direction):
    shape = (4, 5, 6)
    image = SimpleITK.Image(shape[::-1], SimpleITK.sitkFloat32)
    image.SetOrigin((-195.5, -182.123456789, 1e-3))
    image.SetSpacing((0.703125, 0.703125, 2.4999999))
    image.SetDirection(direction)
    geometry = Geometry(image.GetOrigin(), image.GetSpacing(), image.GetDirection(), shape)
    write(tmp_path / "v.h5", noise(shape), geometry=geometry)
    with h5py.File(tmp_path / "v.h5", "r") as h5:
        attrs = h5["hu"].attrs
        assert sorted(attrs) == ["direction", "origin", "spacing"]
        assert tuple(attrs["origin"]) == image.GetOrigin()
        assert tuple(attrs["spacing"]) == image.GetSpacing()
        assert tuple(attrs["direction"]) == image.GetDirection()
        assert {attrs[name].dtype.str for name in attrs} == {"<f8"}
        assert dict(h5.attrs) == {"format": b"lunaprep-store", "version": 1, "series_uid": UID.encode()}


def test_last_chunk_is_padded_with_zeros_not_with_the_layer_before(tmp_path):
    write(tmp_path / "v.h5", np.full((10, 130, 140), 500, dtype=np.float32))
    with h5py.File(tmp_path / "v.h5", "r") as h5:
        _, data = h5["hu"].id.read_direct_chunk((8, 128, 128))
        values = np.frombuffer(zlib.decompress(data), np.uint8).reshape(4, -1).T.copy().view("<f4")
    chunk = values.reshape(8, 128, 128)
    assert (chunk[:2, :2, :12] == 500).all()
    assert np.count_nonzero(chunk) == 2 * 2 * 12


def write_some(partial: Path, error: type[Exception] | None) -> None:
    """Nine of twenty slices, then an exception or a hasty finish."""
    with VolumeWriter(partial, UID, grid((20, 8, 8))) as writer:
        writer.append(noise((9, 8, 8)))
        if error:
            raise error
        writer.finish()


def test_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_some(tmp_path / "p", ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_volume_is_never_taken_for_whole(tmp_path):
    with pytest.raises(AssertionError, match="8 of 20"):
        write_some(tmp_path / "p", None)
    assert list(tmp_path.iterdir()) == []


# Full disks

VOXELS = noise((20, 140, 9))


class Disk:
    """os.pwrite that fails from the k-th write on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 1 << 30
        self.count = 0
        self._real = os.pwrite
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def pwrite(self, fd: int, data: object, offset: int) -> int:
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        self.count += 1
        return self._real(fd, data, offset)


def num_writes(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        write(folder / "count.h5", VOXELS, [8, 16])
        (folder / "count.h5").unlink()
        return disk.count


def test_disk_that_fills_up_at_any_write_is_a_plain_error_and_leaves_nothing(tmp_path, monkeypatch):
    writes = num_writes(tmp_path)
    assert writes > 8
    disk = Disk(monkeypatch)
    left_over = []
    for count in range(writes):
        disk.left = count
        with pytest.raises(NoSpaceError) as info:
            write(tmp_path / "v.h5", VOXELS, [8, 16])
        assert str(info.value).isprintable()
        left_over += [(count, path.name) for path in tmp_path.iterdir()]
        for path in tmp_path.iterdir():
            path.unlink()
    assert left_over == []
    disk.left = writes
    write(tmp_path / "v.h5", VOXELS, [8, 16])


def test_disk_that_is_full_for_one_write_only_is_still_an_error(tmp_path, monkeypatch):
    """A file with a hole in it must not be published."""
    writes = num_writes(tmp_path)
    real, calls = os.pwrite, [0]
    for bad in range(writes):
        calls[0] = 0

        def pwrite(fd, data, offset, bad=bad):
            calls[0] += 1
            if calls[0] == bad + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(NoSpaceError):
            write(tmp_path / "v.h5", VOXELS, [8, 16])
        assert not (tmp_path / "v.h5").exists()


def test_interrupt_at_any_write_comes_through_and_leaves_nothing(tmp_path, monkeypatch):
    """HDF5 calls back into Python here; an exception must neither be lost in it nor crash it."""
    writes = num_writes(tmp_path)
    real, calls = os.pwrite, [0]
    left_over: list[tuple[int, str]] = []
    for bad in range(writes):
        calls[0] = 0

        def pwrite(fd, data, offset, bad=bad):
            calls[0] += 1
            if calls[0] == bad + 1:
                raise KeyboardInterrupt
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "v.h5", VOXELS, [8, 16])
        left_over += [(bad, path.name) for path in tmp_path.iterdir()]
    assert left_over == []


@pytest.mark.parametrize("call", ["fsync", "open", "ftruncate"])
def test_full_disk_met_by_another_call_is_a_plain_error_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(NoSpaceError):
            write(tmp_path / "v.h5", VOXELS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fstat", "pread"])
def test_hdf5_never_meets_a_disk_that_does_not_answer(tmp_path, monkeypatch, call):
    """What it asks of its file is known without asking the disk; an error from there would be a SystemError."""
    whole = write(tmp_path / "whole.h5", VOXELS)
    refused = []

    def refuse(*args: object) -> None:
        refused.append(args)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        writer = VolumeWriter(tmp_path / "v.h5", UID, grid(VOXELS.shape))
        writer.append(VOXELS)
    size_and_hash = writer.finish()
    assert (size_and_hash, refused) == (whole[:2], [])


def test_writes_that_take_only_some_bytes_are_gone_on_with(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole.h5", VOXELS)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:997], offset))
    assert write(tmp_path / "pieces.h5", VOXELS) == whole
    assert (tmp_path / "pieces.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_no_file_stays_open(tmp_path, monkeypatch):
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    write(tmp_path / "v.h5", VOXELS)
    before = open_files()
    write(tmp_path / "v.h5", VOXELS)
    disk = Disk(monkeypatch)
    for count in (0, 3, 6):
        disk.left = count
        with pytest.raises(NoSpaceError):
            write(tmp_path / "w.h5", VOXELS)
    assert open_files() == before
