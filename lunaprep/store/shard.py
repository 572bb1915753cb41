"""A shard: crops one after another behind a 4 KiB HDF5 header, written as plain bytes.

h5py makes the header in memory and never sees the disk, so a full disk is an ordinary error and a killed
writer leaves no HDF5 file at all. See docs/decisions/0001.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep import schema
from lunaprep.store.files import BLOCK_BYTES, explain_disk, open_partial, publish, start_writing, write_all

START_BYTES = 8 << 20
"""Crops are sent to the disk by so much, while the next are cut; the flush at the end then has little to wait for."""


class _HeaderFile:
    """File object for h5py that keeps the first `DATA_OFFSET` bytes and knows how long the file would be."""

    def __init__(self) -> None:
        self.header = bytearray(schema.DATA_OFFSET)
        self.size = 0
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        stop = None if count < 0 else self._at + count
        return bytes(self.header[self._at : stop])

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer)).ljust(len(buffer), b"\0")
        buffer[:] = data
        self._at += len(buffer)
        return len(buffer)

    def write(self, data: Any) -> int:
        stop = self._at + len(data)
        if stop <= schema.DATA_OFFSET:
            self.header[self._at : stop] = data
        self._at = stop
        self.size = max(self.size, stop)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def flush(self) -> None:
        pass


def shard_header(
    num_rows: int, crop_shape: tuple[int, int, int], dtype: str, dataset: str = schema.CROPS_DATASET
) -> bytes:
    """The `DATA_OFFSET` bytes that make a run of crops an HDF5 file with one chunked dataset.

    Parameters
    ----------
    num_rows : int
        Crops in the shard, at least 1.
    crop_shape : tuple of 3 int
        Slices, rows, columns of a crop.
    dtype : {"int16", "float32", "uint8"}
        Stored type, little-endian.
    dataset : str
        Name of the dataset.
    """
    file = _HeaderFile()
    with h5py.File(file, "w", libver=schema.LIBVER, alignment_threshold=1024, alignment_interval=4096) as h5:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((1, *crop_shape))
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_obj_track_times(False)
        space = h5py.h5s.create_simple((num_rows, *crop_shape))
        type_id = h5py.h5t.py_create(np.dtype(dtype).newbyteorder("<"))
        h5py.h5d.create(h5.id, dataset.encode(), type_id, space, plist)
    expected = schema.DATA_OFFSET + num_rows * schema.crop_bytes(crop_shape, dtype)
    assert file.size == expected, f"HDF5 laid the shard out over {file.size} bytes, not {expected}"
    return bytes(file.header)


class ShardWriter:
    """Write crops in row order into a partial file; `finish` makes it a shard.

    Parameters
    ----------
    partial : Path
        Temporary name, on the same file system as the shard's final one.
    num_rows : int
        Crops expected; the space is reserved, so that a full disk is met before the work.
    crop_shape, dtype, dataset
        As in `shard_header`.
    """

    def __init__(
        self,
        partial: Path,
        num_rows: int,
        crop_shape: tuple[int, int, int],
        dtype: str,
        dataset: str = schema.CROPS_DATASET,
    ) -> None:
        self.partial = partial
        self.crop_shape = crop_shape
        self.dtype = dtype
        self._dataset = dataset
        self.crop_xxh3: list[str] = []
        self._crop_bytes = schema.crop_bytes(crop_shape, dtype)
        # the hash of the file as planned grows with the crops; a scan that fails spoils it, see `finish`
        self._header = shard_header(num_rows, crop_shape, dtype, dataset)
        self._planned = num_rows
        self._started = 0
        self._sha256: Any = hashlib.sha256(self._header)
        self._fd = open_partial(partial)
        try:
            os.posix_fallocate(self._fd, 0, schema.DATA_OFFSET + num_rows * self._crop_bytes)
        except OSError as error:
            self.discard()
            raise explain_disk(error, partial) from error

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._fd >= 0:
            self.discard()

    @property
    def num_rows(self) -> int:
        """Crops written so far."""
        return len(self.crop_xxh3)

    def rewind(self, num_rows: int) -> None:
        """Forget all crops from row `num_rows` on (a scan that failed half-way)."""
        if num_rows < self.num_rows:
            self._sha256 = None
        del self.crop_xxh3[num_rows:]

    def append(self, crops: npt.NDArray[Any]) -> None:
        """Add a C-contiguous (k, slices, rows, columns) array of crops in the shard's dtype."""
        assert crops.dtype == self.dtype
        assert crops.flags.c_contiguous
        data = memoryview(crops.reshape(-1).view(np.uint8).data)
        offset = schema.DATA_OFFSET + self.num_rows * self._crop_bytes
        try:
            write_all(self._fd, data, offset)
        except OSError as error:
            raise explain_disk(error, self.partial) from error
        self._start_writing(offset, offset + data.nbytes)
        if self._sha256 is not None:
            self._sha256.update(data)
        for start in range(0, data.nbytes, self._crop_bytes):
            self.crop_xxh3.append(xxhash.xxh3_64_hexdigest(data[start : start + self._crop_bytes]))

    def _start_writing(self, offset: int, stop: int) -> None:
        self._started = min(self._started, offset)  # less only after a scan that failed
        if stop - self._started >= START_BYTES:
            start_writing(self._fd, self._started, stop - self._started)
            self._started = stop

    def finish(self) -> tuple[int, str]:
        """Write the header and flush to the disk; return the file's size and SHA-256."""
        is_planned = self.num_rows == self._planned
        header = self._header
        if not is_planned:
            header = shard_header(self.num_rows, self.crop_shape, self.dtype, self._dataset)
        size = schema.DATA_OFFSET + self.num_rows * self._crop_bytes
        try:
            write_all(self._fd, header, 0)
            os.ftruncate(self._fd, size)
            sha256 = str(self._sha256.hexdigest()) if is_planned and self._sha256 is not None else self._hash()
            os.fsync(self._fd)
        except OSError as error:
            raise explain_disk(error, self.partial) from error
        return size, sha256

    def publish_as(self, final: Path) -> None:
        """Give the finished shard its final name."""
        os.close(self._fd)
        self._fd = -1
        publish(self.partial, final)

    def discard(self) -> None:
        """Drop the partial file."""
        os.close(self._fd)
        self._fd = -1
        with suppress(FileNotFoundError):
            self.partial.unlink()

    def _hash(self) -> str:
        hasher = hashlib.sha256()
        block = memoryview(bytearray(BLOCK_BYTES))
        offset = 0
        while count := os.preadv(self._fd, [block], offset):
            hasher.update(block[:count])
            offset += count
        return hasher.hexdigest()
