"""Whole files or none: write, flush to the disk, rename. And the hashes and JSON the store records."""

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from lunaprep.errors import DiskError, NoSpaceError

BLOCK_BYTES = 1 << 20

SYNC_FILE_RANGE_WRITE = 2
"""Begin to write what is not being written yet, and don't wait; linux/fs.h."""


def canonical_json(value: Any) -> bytes:
    """The one way a value is written as JSON in a store: keys sorted, two spaces, UTF-8, final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def hash_file(path: Path, name: str = "sha256") -> str:
    """Hash of a file's bytes, hexadecimal; `name` is ``sha256`` or ``xxh3_128``."""
    return hash_files((path,), name)


def hash_files(paths: Iterable[Path], name: str = "sha256") -> str:
    """Hash of the bytes of several files, one after another, as `hash_file` gives it of one."""
    hasher: Any = hashlib.sha256() if name == "sha256" else xxhash.xxh3_128()
    block = memoryview(bytearray(BLOCK_BYTES))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                hasher.update(block[:count])
    return str(hasher.hexdigest())


def no_space(error: OSError) -> bool:
    """Whether an operating-system error means that the disk, or the quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain_disk(error: OSError, path: Path) -> DiskError:
    """The error of a file of the store that could not be written, with the file's name and what to do."""
    if isinstance(error, DiskError):
        return error
    name = path.name.removesuffix(".partial")
    if no_space(error):
        return NoSpaceError(
            f"{name}: the disk is full ({error.strerror}). Free some space or choose another --out, then run the same "
            "command again: finished shards are kept"
        )
    return DiskError(
        f"{name}: the disk of the store failed ({error.strerror or error}). Look at the disk and at the rights on "
        "--out, then run the same command again: finished shards are kept"
    )


def open_partial(path: Path) -> int:
    """Create a half-written file for reading and writing; return its descriptor.

    Raises
    ------
    DiskError
        The disk is full, or failed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    except OSError as error:
        raise explain_disk(error, path) from error


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file, however many calls that takes."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def start_writing(fd: int, offset: int, count: int) -> None:
    """Let the system begin to send a part of an open file to the disk, so that a flush has less to wait for.

    Only a hint, and only Linux takes it: what is safely on the disk, the flush alone decides.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, count, SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Any:
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries, so that a rename survives a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(partial: Path, final: Path) -> None:
    """Rename a finished, flushed file to its final name, durably.

    Raises
    ------
    DiskError
        The disk is full, or failed.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        raise explain_disk(error, final) from error


def write_file(path: Path, data: bytes, partial: Path | None = None) -> None:
    """Write a whole file durably under a temporary name, then rename it.

    Raises
    ------
    DiskError
        The disk is full, or failed; the temporary file is removed.
    """
    partial = partial or path.with_name(path.name + ".partial")
    try:
        fd = open_partial(partial)
        try:
            write_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        publish(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise explain_disk(error, path) from error
