"""Files hashed in one sequential pass: SHA-256 of the whole and XXH3-64 of each crop in it."""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep import schema
from lunaprep.verify.places import BadFileError, open_plain

BLOCK_BYTES = 1 << 18
"""Read at a time: what stays in a processor's own cache until it is hashed."""

TELL_BYTES = 1 << 23
"""Bytes between two calls of `progress`."""


class Meter:
    """Bytes read so far, and masks looked at, told to the caller's `progress`; may be used from several threads."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.total = total
        self.done = 0
        self.bytes_read = 0
        self._progress = progress
        self._told = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        """Count `number` more bytes that were read."""
        with self._lock:
            self.bytes_read += number
            self._go_on(number)

    def add_unpacked(self, number: int) -> None:
        """Count the `number` bytes that masks unpack to: work to wait for, of files that have been read already."""
        with self._lock:
            self._go_on(number)

    def _go_on(self, number: int) -> None:
        self.done += number
        if self._progress is not None and (self.done - self._told >= TELL_BYTES or self.done >= self.total):
            self._told = self.done
            self._progress(self.done, max(self.total, self.done))


@dataclass(frozen=True)
class Hashes:
    """What was found in a file, or why it could not be read to its end."""

    sha256: str
    size: int
    crops: npt.NDArray[np.uint64]
    problem: str | None = None
    code: str = "unreadable"


def hash_shard(store: Path, place: str, crop_bytes: int, meter: Meter) -> Hashes:
    """Hash a file as a whole, and each whole crop after its first 4096 bytes.

    A file that can't be opened or read gives the hashes of what could be, and a `problem`.
    """
    whole, crops, size, problem, code = hashlib.sha256(), [], 0, None, "unreadable"
    buffer = memoryview(bytearray(min(crop_bytes, BLOCK_BYTES)))
    try:
        with os.fdopen(open_plain(store, place), "rb", buffering=0) as file:
            size = _feed(file.readinto, buffer, schema.DATA_OFFSET, (whole,), meter)
            while True:
                crop = xxhash.xxh3_64()
                got = _feed(file.readinto, buffer, crop_bytes, (whole, crop), meter)
                size += got
                if got < crop_bytes:
                    break
                crops.append(crop.intdigest())
    except BadFileError as bad:
        problem, code = str(bad), bad.code
    except OSError as error:
        problem = f"reading stopped after byte {size}: {error.strerror}"
    return Hashes(whole.hexdigest(), size, np.array(crops, dtype=np.uint64), problem, code)


def hash_file(store: Path, place: str, meter: Meter) -> Hashes:
    """Hash a file as a whole."""
    whole, size, problem, code = hashlib.sha256(), 0, None, "unreadable"
    buffer = memoryview(bytearray(BLOCK_BYTES))
    try:
        with os.fdopen(open_plain(store, place), "rb", buffering=0) as file:
            while got := _feed(file.readinto, buffer, BLOCK_BYTES, (whole,), meter):
                size += got
    except BadFileError as bad:
        problem, code = str(bad), bad.code
    except OSError as error:
        problem = f"reading stopped after byte {size}: {error.strerror}"
    return Hashes(whole.hexdigest(), size, np.empty(0, dtype=np.uint64), problem, code)


def _feed(
    readinto: Callable[[memoryview], int | None],
    buffer: memoryview,
    number: int,
    hashers: tuple["hashlib._Hash | xxhash.xxh3_64", ...],
    meter: Meter,
) -> int:
    """Read up to `number` bytes in pieces of the buffer into all hashers; fewer mean the file's end."""
    done = 0
    while done < number:
        got = readinto(buffer[: number - done])
        if not got:
            break
        for hasher in hashers:
            hasher.update(buffer[:got])
        done += got
    meter.add(done)
    return done
