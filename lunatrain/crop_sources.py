"""Where crops come from: one map over all shards, a map a shard, or open files that are read.

A shard is a flat array of whole pages behind a header of one page, so on Linux all shards are mapped back to back into
one reserved region ("stitched"), and a batch is a single C loop. Elsewhere each shard has a map of its own.

A batch is larger than the cache, so the memory's bandwidth binds, and a store that goes past the cache saves a third of
it: gather.c does that where the package was compiled. Crops/s, 5,400 warm crops of 32×48×48, batches of 256, one thread
(2026-11-22, Zen 3, quiet):

    stored   delivered   memcpy   NumPy    gather.c
    float32  float32     29,500   28,300   46,500
    int16    float32              39,500   58,000

Without it equal types take np.take (with mode='clip': 'raise', the default, copies twice), and a cast goes crop by
crop, as an assignment (np.copyto and torch are slower; a cast into a small buffer that stays in the cache, copied from
there, had half the speed). `madvise(WILLNEED)` costs 4 to 6 µs for a crop that is already in memory, a quarter of its
copy: 'auto' asks once for each row.
"""

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lunaprep.errors import StoreError
from lunaprep.store.reader import ShardFile
from lunatrain.errors import UsageError

try:
    from lunatrain._gather import gather_rows
except ImportError:  # installed where there was no compiler
    gather_rows = None  # type: ignore[assignment]

Rows = npt.NDArray[np.int64]

MAP_FIXED = 0x10  # the same on every Linux this runs on; `_can_stitch` leaves out the others
ALIGNMENT = 64
SPARE_FILES = 256
"""Files a process may have open besides the shards."""

FAILED = ctypes.c_void_p(-1).value


class CropSource(Protocol):
    """Where the crops come from. Rows are checked, `out` is (k, voxels)."""

    def gather(self, rows: Rows, out: npt.NDArray[Any]) -> None:
        """Copy crops into a buffer."""

    def advise(self, rows: Rows) -> None:
        """Ask the system for them, without waiting."""


def open_source(
    shards: Sequence[ShardFile], crop_shape: tuple[int, int, int], dtype: "np.dtype[Any]", read: bool
) -> CropSource:
    """Open the shards the best way the system has: `read` by reading, else mapped, as one where that can be."""
    shards = [shard for shard in shards if shard.rows]
    voxels = int(np.prod(crop_shape))
    if read:
        return _Files(shards, voxels, dtype)
    if _can_stitch(shards, voxels * dtype.itemsize):
        try:
            return _Stitched(shards, voxels, dtype)
        except _MapError:
            pass  # each shard may still be mapped by itself
    return _Maps(shards, voxels, dtype)


def is_one_map(source: CropSource | None) -> bool:
    """Whether all shards are mapped as one region."""
    return isinstance(source, _Stitched)


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Like `np.empty`, but at a multiple of 64 bytes.

    A large `np.empty` begins 16 bytes into a page, where memcpy of whole pages has half its speed.
    """
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def is_compiled() -> bool:
    """Whether gather.c was compiled when the package was installed."""
    return gather_rows is not None


class _Stitched:
    """One region for all shards."""

    def __init__(self, shards: Sequence[ShardFile], voxels: int, dtype: "np.dtype[Any]") -> None:
        self._crop_bytes = voxels * dtype.itemsize
        region = _Region(sum(shard.rows for shard in shards) * self._crop_bytes)
        start = 0
        for shard in shards:
            size = shard.rows * self._crop_bytes
            with _opened_whole(shard, size) as fd:
                region.map_file(start, size, fd, shard.offset)
            start += size
        self._address = region.address
        self._crops = np.asarray(region).view(dtype).reshape(-1, voxels)

    def gather(self, rows: Rows, out: npt.NDArray[Any]) -> None:
        if gather_rows is not None:
            gather_rows(self._crops, rows, out)
            return
        if out.dtype == self._crops.dtype:
            np.take(self._crops, rows, axis=0, out=out, mode="clip")
            return
        for crop, row in zip(out, rows.tolist(), strict=True):
            crop[:] = self._crops[row]

    def advise(self, rows: Rows) -> None:
        madvise, size = _libc().madvise, self._crop_bytes
        for row in rows.tolist():  # crop by crop: a range longer than the device's readahead would be cut
            start = self._address + row * size
            begin = start - start % mmap.PAGESIZE
            madvise(begin, start + size - begin, mmap.MADV_WILLNEED)


class _MapError(Exception):
    """The system would not map it there."""


class _Region:
    """Reserved addresses that files are mapped into; given back when the last array on it is gone."""

    def __init__(self, size: int) -> None:
        address = _libc().mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if address == FAILED:
            raise _MapError
        self.address: int = address
        self.__array_interface__ = {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}
        weakref.finalize(self, _libc().munmap, address, size).atexit = False

    def map_file(self, start: int, size: int, fd: int, offset: int) -> None:
        """Put `size` bytes of a file from `offset` on at `start` of the region."""
        place = self.address + start
        if _libc().mmap(place, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, fd, offset) != place:
            raise _MapError


class _ByShard:
    """Which shard holds a row, and where."""

    def __init__(self, shards: Sequence[ShardFile]) -> None:
        self._first = np.cumsum([0, *(shard.rows for shard in shards)], dtype=np.int64)

    def places(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """Shard and row in it, for each row."""
        owner = np.searchsorted(self._first, rows, side="right") - 1
        return zip(owner.tolist(), (rows - self._first[owner]).tolist(), strict=True)


class _Maps:
    """A map for each shard: where pages are larger, crops aren't whole pages, or the system is not Linux."""

    def __init__(self, shards: Sequence[ShardFile], voxels: int, dtype: "np.dtype[Any]") -> None:
        self._by_shard = _ByShard(shards)
        self._offsets = [shard.offset for shard in shards]
        self._crop_bytes = voxels * dtype.itemsize
        self._maps, self._crops = [], []
        for shard in shards:
            with _opened_whole(shard, size := shard.rows * self._crop_bytes) as fd:
                mapped = mmap.mmap(fd, shard.offset + size, access=mmap.ACCESS_READ)
            flat = np.frombuffer(mapped, dtype=dtype, offset=shard.offset)
            self._maps.append(mapped)
            self._crops.append(flat.reshape(shard.rows, voxels))

    def gather(self, rows: Rows, out: npt.NDArray[Any]) -> None:
        for crop, (shard, row) in zip(out, self._by_shard.places(rows), strict=True):
            crop[:] = self._crops[shard][row]

    def advise(self, rows: Rows) -> None:
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for shard, row in self._by_shard.places(rows):
            start = self._offsets[shard] + row * self._crop_bytes
            begin = start - start % mmap.PAGESIZE
            self._maps[shard].madvise(mmap.MADV_WILLNEED, begin, start + self._crop_bytes - begin)


class _Files:
    """Open files that are read from; closed with the last reference."""

    def __init__(self, shards: Sequence[ShardFile], voxels: int, dtype: "np.dtype[Any]") -> None:
        if not hasattr(os, "preadv"):
            message = "io 'pread' is not there on this system. Use 'mmap'"
            raise UsageError(message)
        self._by_shard = _ByShard(shards)
        self._shards = shards
        self._voxels, self._dtype = voxels, dtype
        self._fds: list[int] = []
        weakref.finalize(self, _close_all, self._fds)
        _allow_open(len(shards))
        for shard in shards:
            with _opened_whole(shard, shard.rows * voxels * dtype.itemsize) as fd:
                self._fds.append(os.dup(fd))

    def gather(self, rows: Rows, out: npt.NDArray[Any]) -> None:
        same = out.dtype == self._dtype
        scratch = aligned_empty((self._voxels,), self._dtype)
        for crop, (shard, row) in zip(out, self._by_shard.places(rows), strict=True):
            self._read(shard, row, crop if same else scratch)
            if not same:
                crop[:] = scratch

    def _read(self, shard: int, row: int, crop: Any) -> None:
        into = memoryview(crop).cast("B")
        file = self._shards[shard]
        at = file.offset + row * len(into)
        while into:
            try:
                count = os.preadv(self._fds[shard], [into], at)
            except OSError as error:
                message = f"{file.path} cannot be read at row {row}: {error.strerror}. Run 'lunaprep verify'"
                raise StoreError(message) from error
            if count == 0:
                message = f"{file.path} ends before row {row}: it is cut or changed. Run 'lunaprep verify'"
                raise StoreError(message)
            into, at = into[count:], at + count

    def advise(self, rows: Rows) -> None: ...


@contextmanager
def _opened_whole(shard: ShardFile, num_bytes: int) -> Iterator[int]:
    """Open a shard and look at its size again: the open file is what gets mapped."""
    try:
        fd = os.open(shard.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        message = f"{shard.path} cannot be opened: {error.strerror}. Run 'lunaprep verify'"
        raise StoreError(message) from error
    try:
        size, expected = os.fstat(fd).st_size, shard.offset + num_bytes
        if size < expected:
            message = f"{shard.path} has {size} bytes, expected {expected}: it is cut. Run 'lunaprep build' again"
            raise StoreError(message)
        yield fd
    finally:
        os.close(fd)


def _can_stitch(shards: Sequence[ShardFile], crop_bytes: int) -> bool:
    if sys.platform != "linux" or sys.maxsize < 2**32 or os.uname().machine not in ("x86_64", "aarch64", "riscv64"):
        return False
    whole = all(shard.rows * crop_bytes % mmap.PAGESIZE == 0 for shard in shards[:-1])
    return whole and all(shard.offset % mmap.PAGESIZE == 0 for shard in shards)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _allow_open(count: int) -> None:
    """Raise this process's limit of open files, 1,024 on most systems, as far as it may be raised."""
    import resource  # not on Windows, which has no preadv either

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with suppress(OSError, ValueError):  # then opening one too many says so
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
