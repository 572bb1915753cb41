"""All crops of a store as one array, and the gathering of any rows of it into a buffer."""

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from lunaprep.errors import StoreError
from lunaprep.store.reader import ShardFile, Store
from lunatrain.crop_sources import CropSource, Rows, is_one_map, open_source
from lunatrain.errors import UsageError

Io = Literal["auto", "mmap", "willneed", "pread"]
"""How bytes come from the disk: mmap for a warm page cache, willneed for a cold disk (each crop is asked for some
batches ahead), pread for network disks; auto is mmap that asks ahead for what this process hasn't read yet."""

PREAD_THREADS = 8


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
        self._source: CropSource | None = open_source(shards, crop_shape, self.dtype, read=io == "pread")
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
        return is_one_map(self._source)

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
        source = self._opened()
        rows = self._checked(rows)
        flat = self._flat(len(rows), out)
        if self.threads == 1 or len(rows) < 2 * self.threads:
            source.gather(rows, flat)
            return
        parts = zip(np.array_split(rows, self.threads), np.array_split(flat, self.threads), strict=True)
        futures = [self._threads().submit(source.gather, part, into) for part, into in parts]
        for future in futures:
            future.exception()  # `out` may be let go of only when no thread writes to it any more
        for future in futures:
            future.result()

    def advise(self, rows: Rows) -> None:
        """Tell the system that these rows are wanted soon, without waiting for them; mmap and pread don't."""
        if self.io in ("mmap", "pread"):
            return
        source = self._opened()
        rows = self._checked(rows)
        if self._unread is not None:
            rows = rows[self._unread[rows]]
            self._unread[rows] = False
        source.advise(np.unique(rows))

    def close(self) -> None:
        """Let go of the maps; gathers that run elsewhere still end well."""
        self._source = None
        if self._pool is not None:
            self._pool[1].shutdown()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> CropSource:
        if self._source is None:
            message = "the map of the crops is closed"
            raise ValueError(message)
        return self._source

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


def _identity(path: Path) -> tuple[tuple[int, int] | None, int]:
    """Which file has this name now, and its size; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None, 0
    return (status.st_dev, status.st_ino), status.st_size
