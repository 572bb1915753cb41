"""Notes on DICOM headers that were read, so that going on with a build doesn't read them all again.

A note counts as long as size and both times of its file are the same, the time of change included, which copying or
editing always moves. It is a hint: the pixels are read only from files whose header still has the noted hash.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from lunaprep.scans.dicom_header import HeaderError, PixelFormat, SliceHeader, read_headers

METHOD = 1
"""Number of the way headers are read; notes of another one are of no use."""

OWN = ("header_xxh3", "sop_uid", "position", "start", "length")
"""Facts of a slice that its neighbours don't share; the others are written once for all slices that do."""

_HEADER = tuple(field.name for field in fields(SliceHeader))
_PIXELS = tuple(field.name for field in fields(PixelFormat))
_SHARED = tuple(name for name in (*_HEADER, *_PIXELS) if name not in (*OWN, "path", "real_path", "num_bytes", "pixels"))


Found = SliceHeader | HeaderError | None
Spread = Callable[[Callable[[Sequence[Path]], list[Found]], Sequence[Path]], Iterable[Found]]
"""Calls a function with parts of a list, on several processes perhaps; gives its results in order."""


class HeaderNotes:
    """Reads headers, or recalls them; `save` keeps those of the files that were asked for.

    Parameters
    ----------
    file : Path
        Where the notes are; it may be missing, or damaged, and may be deleted at any time.
    spread : Spread, optional
        How headers that are not known are read; without it one after another.
    """

    def __init__(self, file: Path, spread: Spread | None = None) -> None:
        self._file = file
        self._spread = spread or (lambda work, paths: work(paths))
        self._new: dict[str, list[Any]] = {}
        self._groups: dict[tuple[Any, ...], int] = {}
        self.num_read = 0
        try:
            digest, body = file.read_bytes().split(b"\n", 1)
            noted = json.loads(body if xxhash.xxh3_128_hexdigest(body).encode() == digest else b"{}")
            groups = [tuple(_frozen(value) for value in group) for group in noted["groups"]]
            self._old = {k: (*note[:-1], groups[note[-1]]) for k, note in noted["files"].items()}
            self._old = self._old if noted["method"] == METHOD else {}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            self._old = {}

    def read(self, paths: Sequence[Path], root: Path) -> list[Found]:
        """As `lunaprep.scans.dicom_header.read_headers`."""
        names = [path.relative_to(root).as_posix() for path in paths]
        stamps = [_stamp(path) for path in paths]  # before any of them is read
        found: list[Found] = [self._recall(*facts) for facts in zip(paths, names, stamps, strict=True)]
        unknown = [k for k, header in enumerate(found) if header is None]
        self.num_read += len(unknown)
        fresh = self._spread(partial(read_headers, root=root), [paths[k] for k in unknown])
        for k, header in zip(unknown, fresh, strict=True):
            found[k] = header
        for name, stamp, header in zip(names, stamps, found, strict=True):
            if isinstance(header, SliceHeader) and stamp is not None:
                self._new[name] = [*stamp, *_own(header), self._group(header)]
        return found

    def _recall(self, path: Path, name: str, stamp: tuple[int, int, int] | None) -> SliceHeader | None:
        note = self._old.get(name)
        return _recalled(path, note) if note is not None and note[:3] == stamp else None

    def save(self) -> None:
        """Write the notes, whole or not at all; without one, nothing. A disk that refuses them does no harm."""
        if not self._new or (not self.num_read and len(self._new) == len(self._old)):
            return
        noted = {"method": METHOD, "groups": list(self._groups), "files": self._new}
        partial = self._file.with_name(self._file.name + ".partial")
        with suppress(OSError):
            body = json.dumps(noted, separators=(",", ":")).encode()
            partial.write_bytes(xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body)
            partial.replace(self._file)

    def _group(self, header: SliceHeader) -> int:
        shared = tuple(_value(header, name) for name in _SHARED)
        return self._groups.setdefault(shared, len(self._groups))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Size and times of a file; None of a link, which is looked at anew each time."""
    try:
        stat = os.lstat(path)
    except OSError:
        return None
    is_plain = stat.st_mode & 0o170000 == 0o100000
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) if is_plain else None


def _value(header: SliceHeader, name: str) -> Any:
    return getattr(header.pixels if name in _PIXELS else header, name)


def _own(header: SliceHeader) -> list[Any]:
    return [_value(header, name) for name in OWN]


def _recalled(path: Path, note: tuple[Any, ...]) -> SliceHeader | None:
    """The header that a note holds; None where it is none."""
    try:
        known = dict(zip((*OWN, *_SHARED), (*map(_frozen, note[3:-1]), *note[-1]), strict=True))
        pixels = PixelFormat(**{name: known[name] for name in _PIXELS})
        rest = {name: known[name] for name in _HEADER if name in known}
        return SliceHeader(path=path, real_path=path, num_bytes=note[0], pixels=pixels, **rest)
    except (KeyError, TypeError, ValueError):
        return None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
