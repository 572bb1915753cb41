"""Shards: the 4 KiB header, the flat run of crops behind it, and what a full disk leaves."""

import errno
import hashlib
import os
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.errors import NoSpaceError
from lunaprep.store.files import start_writing
from lunaprep.store.shard import ShardWriter, shard_header

OFFSET = 4096
SHAPES = [
    (1, (32, 48, 48)), (7, (32, 48, 48)), (1000, (32, 48, 48)), (1_000_000, (32, 48, 48)), (3, (8, 8, 8)),
    (1, (1, 1, 512)), (2, (512, 1, 1)), (5, (7, 96, 96)), (2, (9, 11, 13)), (4, (1, 23, 29)), (3, (512, 512, 1)),
    (2, (64, 64, 64)), (1, (128, 128, 128)),
]  # fmt: skip
SMALL = (8, 9, 10)
"""720 voxels: crops that aren't whole pages."""


def random_crops(count: int, dtype: str, shape=SMALL, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(-1000, 1001, (count, *shape)).astype(dtype)


def write(path, crops: np.ndarray, pieces=None, reserved=None) -> tuple[int, str, list[str]]:
    """A finished shard at the path; its size, hash and the crops' hashes."""
    with ShardWriter(path.with_suffix(".partial"), reserved or len(crops), crops.shape[1:], str(crops.dtype)) as writer:
        for piece in [crops] if pieces is None else np.split(crops, pieces):
            writer.append(piece)
        size, sha256 = writer.finish()
        writer.publish_as(path)
        return size, sha256, list(writer.crop_xxh3)


# The header


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize(("count", "shape"), SHAPES, ids=str)
def test_header_makes_a_run_of_crops_one_plain_chunked_dataset(tmp_path, count, shape, dtype):
    header = shard_header(count, shape, dtype)
    assert len(header) == OFFSET
    stride = int(np.prod(shape)) * np.dtype(dtype).itemsize
    path = tmp_path / "s.h5"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(OFFSET + count * stride)  # sparse: costs nothing
    with h5py.File(path, "r") as h5:
        assert list(h5) == ["crops"]
        assert dict(h5.attrs) == {}
        crops = h5["crops"]
        assert dict(crops.attrs) == {}
        assert crops.shape == crops.maxshape == (count, *shape)
        assert crops.chunks == (1, *shape)
        assert crops.dtype == np.dtype(dtype).newbyteorder("<")
        assert (crops.compression, crops.shuffle, crops.fletcher32, crops.scaleoffset) == (None, False, False, None)
        assert crops.id.get_create_plist().get_nfilters() == 0
        assert crops.external is None
        assert not crops.is_virtual
        for k in {0, min(1, count - 1), count // 2, count - 1}:
            place = crops.id.get_chunk_info_by_coord((k, 0, 0, 0))
            assert (place.byte_offset, place.size, place.filter_mask) == (OFFSET + k * stride, stride, 0)
        assert h5.id.get_filesize() == OFFSET + count * stride


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_header_is_the_same_bytes_twice(dtype):
    assert shard_header(5, SMALL, dtype) == shard_header(5, SMALL, dtype)
    assert shard_header(5, SMALL, dtype) != shard_header(6, SMALL, dtype)


def test_header_does_not_hold_the_time_of_day():
    data = shard_header(5, SMALL, "int16")
    now = int(time.time())
    assert not any(second.to_bytes(4, "little") in data for second in range(now - 5, now + 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 50),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)).filter(lambda s: np.prod(s) >= 512),
    dtype=st.sampled_from(["int16", "float32"]),
)
def test_any_shape_a_build_may_ask_for_reads_back(tmp_path_factory, count, shape, dtype):
    path = tmp_path_factory.getbasetemp() / "any.h5"
    stride = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with path.open("wb") as file:
        file.write(shard_header(count, shape, dtype))
        last = np.arange(np.prod(shape)).astype(dtype)
        file.seek(OFFSET + (count - 1) * stride)
        file.write(last.tobytes())
    with h5py.File(path, "r") as h5:
        assert (h5["crops"][count - 1].ravel() == last).all()
        assert h5["crops"].shape == (count, *shape)


# The writer


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("pieces", [[], [1], [1, 2, 3], [5, 5, 7], range(1, 11)], ids=str)
def test_crops_written_in_pieces_read_back_equal(tmp_path, pieces, dtype):
    crops = random_crops(11, dtype)
    path = tmp_path / "crops" / "s.h5"
    size, sha256, _ = write(path, crops, list(pieces))
    with h5py.File(path, "r") as h5:
        assert (h5["crops"][...] == crops).all()
    data = path.read_bytes()
    assert size == len(data) == OFFSET + crops.nbytes
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert data[OFFSET:] == crops.tobytes()
    assert list(path.parent.iterdir()) == [path]


def test_checksums_are_those_of_the_crops_h5py_reads(tmp_path):
    path = tmp_path / "s.h5"
    *_, crop_xxh3 = write(path, random_crops(6, "int16"), [2, 3])
    with h5py.File(path, "r") as h5:
        assert crop_xxh3 == [xxhash.xxh3_64_hexdigest(crop.tobytes()) for crop in h5["crops"]]


def test_any_pieces_give_the_same_bytes(tmp_path):
    crops = random_crops(9, "float32")
    made = [write(tmp_path / f"{n}.h5", crops, pieces) for n, pieces in enumerate(([], [4], [1, 2, 8]))]
    assert made[0] == made[1] == made[2]
    assert len({(tmp_path / f"{n}.h5").read_bytes() for n in range(3)}) == 1


def test_rewound_crops_are_gone_without_a_trace(tmp_path):
    crops, wrong = random_crops(6, "int16"), random_crops(4, "int16", seed=1)
    whole = write(tmp_path / "whole.h5", crops)
    with ShardWriter(tmp_path / "p", 10, SMALL, "int16") as writer:
        writer.append(crops[:2])
        writer.append(wrong)
        writer.rewind(2)
        assert writer.num_rows == 2
        writer.append(crops[2:])
        assert (*writer.finish(), writer.crop_xxh3) == whole
        writer.publish_as(tmp_path / "rewound.h5")
    assert (tmp_path / "rewound.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_crops_are_sent_to_the_disk_as_they_come_or_all_at_the_end(tmp_path, monkeypatch):
    crops, wrong = random_crops(6, "int16"), random_crops(3, "int16", seed=1)
    monkeypatch.setattr("lunaprep.store.files._sync_file_range", lambda: None)  # not on this system
    whole = write(tmp_path / "whole.h5", crops)
    monkeypatch.undo()
    monkeypatch.setattr("lunaprep.store.shard.START_BYTES", 1)
    asked: list[tuple[int, int]] = []

    def start(fd: int, offset: int, count: int) -> None:
        asked.append((offset, offset + count))
        start_writing(fd, offset, count)

    monkeypatch.setattr("lunaprep.store.shard.start_writing", start)
    with ShardWriter(tmp_path / "p", 6, SMALL, "int16") as writer:
        for part, keep in ((crops[:2], 2), (wrong, 2), (crops[2:4], 4), (crops[4:], 6)):
            writer.append(part)
            writer.rewind(keep)
        assert (*writer.finish(), writer.crop_xxh3) == whole
        writer.publish_as(tmp_path / "s.h5")
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    one, first = crops[0].nbytes, OFFSET
    assert asked == [(0, first + 2 * one)] + [(first + a * one, first + b * one) for a, b in ((2, 5), (2, 4), (4, 6))]


def test_rewinding_the_last_scan_shortens_the_file(tmp_path):
    crops = random_crops(6, "int16")
    whole = write(tmp_path / "whole.h5", crops[:4])
    with ShardWriter(tmp_path / "p", 6, SMALL, "int16") as writer:
        writer.append(crops)
        writer.rewind(4)
        assert (*writer.finish(), writer.crop_xxh3) == whole
        writer.publish_as(tmp_path / "rewound.h5")
    assert (tmp_path / "rewound.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_rewinding_and_writing_as_many_others_gives_the_hash_of_the_file(tmp_path):
    crops, wrong = random_crops(6, "int16"), random_crops(2, "int16", seed=1)
    with ShardWriter(tmp_path / "p", 6, SMALL, "int16") as writer:
        writer.append(crops[:4])
        writer.append(wrong)
        writer.rewind(4)
        writer.append(crops[4:])
        _, sha256 = writer.finish()
        writer.publish_as(tmp_path / "s.h5")
    assert sha256 == hashlib.sha256((tmp_path / "s.h5").read_bytes()).hexdigest()


def test_fewer_crops_than_planned_give_the_file_of_that_many(tmp_path):
    crops = random_crops(3, "float32")
    assert write(tmp_path / "a.h5", crops, reserved=50) == write(tmp_path / "b.h5", crops)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def write_and_fail(partial: Path) -> None:
    with ShardWriter(partial, 3, SMALL, "int16") as writer:
        writer.append(random_crops(2, "int16"))
        raise ZeroDivisionError


def test_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_and_fail(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_writer_that_is_never_finished_leaves_nothing(tmp_path):
    with ShardWriter(tmp_path / "p", 3, SMALL, "int16") as writer:
        writer.append(random_crops(3, "int16"))
    assert list(tmp_path.iterdir()) == []


def test_left_over_partial_of_a_killed_writer_is_no_harm(tmp_path):
    (tmp_path / "s.partial").write_bytes(b"\xff" * 200_000)
    write(tmp_path / "s.h5", random_crops(2, "int16"))
    write(tmp_path / "t.h5", random_crops(2, "int16"))
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "t.h5").read_bytes()


# Full disks and short writes


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def over_quota(*args, **kwargs):
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def write_one(folder) -> None:
    write(folder / "s.h5", random_crops(3, "int16"), [1, 2])


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "ftruncate", "fsync", "open"])
@pytest.mark.parametrize("fault", [full, over_quota])
def test_full_disk_is_a_plain_error_and_leaves_nothing(tmp_path, monkeypatch, call, fault):
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fault)
        with pytest.raises(NoSpaceError) as info:
            write_one(tmp_path)
    assert str(info.value).isprintable()
    assert info.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_at_any_write_leaves_nothing(tmp_path, monkeypatch):
    real, left = os.pwrite, [0]

    def pwrite(fd, data, offset):
        if left[0] == 0:
            full()
        left[0] -= 1
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for count in range(4):
        left[0] = count
        with pytest.raises(NoSpaceError):
            write_one(tmp_path)
        assert list(tmp_path.iterdir()) == []
    left[0] = 4
    write_one(tmp_path)  # three pieces and the header: that is all


def test_other_faults_of_the_disk_are_not_called_full(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        with pytest.raises(OSError, match="Input/output") as info:
            write_one(tmp_path)
    assert not isinstance(info.value, NoSpaceError)
    assert list(tmp_path.iterdir()) == []


def test_writes_that_take_only_some_bytes_are_gone_on_with(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole.h5", random_crops(3, "int16"))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:1009], offset))
    assert write(tmp_path / "pieces.h5", random_crops(3, "int16")) == whole
    assert (tmp_path / "pieces.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
