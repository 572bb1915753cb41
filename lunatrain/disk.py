"""The disk without the page cache: drop what is cached, and read from end to end as fast as one thread can."""

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

Span = tuple[Path, int, int]
"""File, first byte, number of bytes."""

BLOCK_BYTES = 4 * 2**20


def drop_from_cache(spans: Sequence[Span]) -> None:
    """Ask the system to forget these bytes; maps of them must be closed, or it keeps them."""
    for path, start, size in spans:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)  # what isn't on the disk yet can't be dropped
            os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_through(spans: Sequence[Span], direct: bool = True) -> float:
    """Seconds to read the bytes in order; `direct`: past the page cache, where the file system can."""
    buffer = mmap.mmap(-1, BLOCK_BYTES)  # O_DIRECT wants whole pages
    started = time.perf_counter()
    for path, start, size in spans:
        fd = _open_direct(path) if direct else os.open(path, os.O_RDONLY)
        try:
            for at in range(start, start + size, BLOCK_BYTES):
                os.preadv(fd, [buffer], at)
        finally:
            os.close(fd)
    return time.perf_counter() - started


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return os.open(path, os.O_RDONLY)
