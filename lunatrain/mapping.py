"""All crops of a store as one array in address space, and the gathering of any rows of it into a buffer.

A shard is a flat array of whole pages behind a header of one page, so on Linux all shards are mapped back to back into
one reserved region ("stitched"), and a batch is a single C loop of memcpy. Elsewhere each shard has a map of its own.

Measured 2026-11-22, 2 cores Zen 4, 6,021 warm crops of 32×48×48, batches of 256, median of 23 alternating rounds, as a
ratio over one thread's memmove of the same crops in float32 (31,093/s = 9.2 GB/s):

    stored   delivered   np.take   torch.index_select   np.copyto per crop   blocks of 8, then cast
    float32  float32     1.06      1.03                 1.00                 -
    int16    int16       2.08      2.03                 1.95                 -
    int16    float32     -         -                    1.55                 1.24

so equal types take np.take (with mode='clip': 'raise', the default, copies twice), and a cast goes crop by crop, as an
assignment: on Zen 3 1.52 where np.copyto had 1.39, and writing alone, without reading, 1.9. A cast into a small buffer
that stays in the cache, copied from there, had 0.8. `madvise(WILLNEED)` costs 4 to 6 µs for a crop that is already in
memory, a quarter of its copy: 'auto' asks once for each row.
"""

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import numpy.typing as npt

from lunaprep.errors import StoreError
from lunaprep.store.reader import ShardFile, Store
from lunatrain.errors import UsageError

Io = Literal["auto", "mmap", "willneed", "pread"]
"""How bytes come from the disk: mmap for a warm page cache, willneed for a cold disk (each crop is asked for some
batches ahead), pread for network disks; auto is mmap that asks ahead for what this process hasn't read yet."""

Rows = npt.NDArray[np.int64]

PREAD_THREADS = 8
ALIGNMENT = 64
MAP_FIXED = 0x10  # the same on every Linux this runs on; `_can_stitch` leaves out the others
SPARE_FILES = 256
"""Files a process may have open besides the shards."""

FAILED = ctypes.c_void_p(-1).value


class _Backend(Protocol):
    """Where the crops come from. Rows are checked, `out` is (k, voxels)."""

    def gather(self, rows: Rows, out: npt.NDArray[Any]) -> None: ...
    def advise(self, rows: Rows) -> None: ...


class CropMap:
    """All crops of a store as one array (n, slices, rows, columns), read only, in the stored type.

    Parameters
    ----------
    shards : sequence of ShardFile
        Files, in manifest order.
    crop_shape : tuple of int
        Slices, rows, columns.
    dtype : dtype
        Type on disk: int16 or float32.
    io : {'auto', 'mmap', 'willneed', 'pread'}
        See `Io`.
    threads : int, optional
        Threads that share the rows of one `gather`. Default 1 (one fills the memory bandwidth), 8 with pread.

    Raises
    ------
    StoreError
        A shard that is missing or too short: it would otherwise end the process by SIGBUS.
    """

    def __init__(
        self,
        shards: Sequence[ShardFile],
        crop_shape: tuple[int, int, int],
        dtype: "np.dtype[Any]",
        io: Io = "auto",
        threads: int | None = None,
    ) -> None:
        if io not in get_args(Io):
            message = f"io must be one of {', '.join(get_args(Io))}, got {io!r}"
            raise UsageError(message)
        self.crop_shape = crop_shape
        self.dtype = np.dtype(dtype)
        self.io = io
        self.threads = threads or (PREAD_THREADS if io == "pread" else 1)
        self._num_rows = sum(shard.rows for shard in shards)
        if self._num_rows == 0:
            message = "the store has no crops to map. Build it from scans that have candidates"
            raise StoreError(message)
        self._files = [(shard.path, *_identity(shard.path)) for shard in shards if shard.rows]
        self._backend: _Backend | None = self._open(shards)
        memory = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE if hasattr(os, "sysconf") else 0
        fits = self._num_rows * self.crop_bytes < memory // 2  # else pages read once may be gone again
        self._unread = np.ones(self._num_rows, dtype=np.bool_) if io == "auto" and fits else None
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __len__(self) -> int:
        return self._num_rows

    @property
    def crop_bytes(self) -> int:
        """Bytes of one stored crop."""
        return int(np.prod(self.crop_shape)) * self.dtype.itemsize

    @property
    def is_stitched(self) -> bool:
        """Whether all shards are mapped as one region."""
        return isinstance(self._backend, _Stitched)

    def check(self) -> None:
        """See that no file has become shorter since it was opened: to touch what it lost ends the process (SIGBUS).

        One that was removed, or replaced by another of its name, goes on as it was: the map holds it.

        Raises
        ------
        StoreError
            Names the file.
        """
        for path, file, size in self._files:
            now, left = _identity(path)
            if now == file and left < size:
                message = f"{path} had {size} bytes and now has {left}: it was cut while in use. Run 'lunaprep verify'"
                raise StoreError(message)

    def gather(self, rows: Rows, out: npt.NDArray[Any]) -> None:
        """Copy crops into a buffer.

        Parameters
        ----------
        rows : ndarray, (k,) int64
            Rows of the manifest, in any order, also repeated.
        out : ndarray, (k, ..., slices, rows, columns)
            Contiguous, of the stored type or float32; best reused, and aligned to 64 bytes (`aligned_empty`).

        Raises
        ------
        IndexError
            A row that is not there.
        """
        backend = self._opened()
        rows = self._checked(rows)
        flat = self._flat(len(rows), out)
        if self.threads == 1 or len(rows) < 2 * self.threads:
            backend.gather(rows, flat)
            return
        parts = zip(np.array_split(rows, self.threads), np.array_split(flat, self.threads), strict=True)
        futures = [self._threads().submit(backend.gather, part, into) for part, into in parts]
        for future in futures:
            future.exception()  # `out` may be let go of only when no thread writes to it any more
        for future in futures:
            future.result()

    def advise(self, rows: Rows) -> None:
        """Tell the system that these rows are wanted soon, without waiting for them; mmap and pread don't."""
        if self.io in ("mmap", "pread"):
            return
        backend = self._opened()
        rows = self._checked(rows)
        if self._unread is not None:
            rows = rows[self._unread[rows]]
            self._unread[rows] = False
        backend.advise(np.unique(rows))

    def close(self) -> None:
        """Let go of the maps; gathers that run elsewhere still end well."""
        self._backend = None
        if self._pool is not None:
            self._pool[1].shutdown()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, shards: Sequence[ShardFile]) -> _Backend:
        shards = [shard for shard in shards if shard.rows]
        voxels = int(np.prod(self.crop_shape))
        if self.io == "pread":
            return _Files(shards, voxels, self.dtype)
        if _can_stitch(shards, self.crop_bytes):
            try:
                return _Stitched(shards, voxels, self.dtype)
            except _MapError:
                pass  # each shard may still be mapped by itself
        return _Maps(shards, voxels, self.dtype)

    def _opened(self) -> _Backend:
        if self._backend is None:
            message = "the map of the crops is closed"
            raise ValueError(message)
        return self._backend

    def _checked(self, rows: Rows) -> Rows:
        if rows.dtype.kind not in "iu" or rows.ndim != 1:
            message = (
                f"rows must be a list of whole numbers, got {rows.dtype} {rows.shape}; for a mask, np.flatnonzero(mask)"
            )
            raise IndexError(message)
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            message = f"rows must lie in 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}"
            raise IndexError(message)
        return rows

    def _flat(self, count: int, out: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if out.dtype not in (self.dtype, np.dtype(np.float32)):
            message = f"crops stored as {self.dtype} cannot be delivered as {out.dtype}. Use {self.dtype} or float32"
            raise UsageError(message)
        if not out.flags.c_contiguous or out.shape[:1] != (count,) or out.shape[-3:] != self.crop_shape:
            message = f"out must be contiguous, ({count}, ..., {self.crop_shape}), got {out.shape}"
            raise ValueError(message)
        return out.reshape(count, int(np.prod(self.crop_shape)))

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # a fork has none of its parent's threads
            self._pool = os.getpid(), ThreadPoolExecutor(self.threads, thread_name_prefix="gather")
        return self._pool[1]


def open_crops(store: Store, io: Io = "auto", threads: int | None = None) -> CropMap:
    """Map the crops of a store: `open_crops(open_store(path))`."""
    return CropMap(store.shards, store.crop_shape, store.dtype, io, threads)


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Like `np.empty`, but at a multiple of 64 bytes.

    A large `np.empty` begins 16 bytes into a page, where memcpy of whole pages has half its speed.
    """
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


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


def _identity(path: Path) -> tuple[tuple[int, int] | None, int]:
    """Which file has this name now, and its size; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None, 0
    return (status.st_dev, status.st_ino), status.st_size


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
