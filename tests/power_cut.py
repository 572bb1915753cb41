"""What a disk may hold after a power cut: strace's log of a build, replayed on a model of a file system.

The model is stricter than any file system in use. What a file holds is only sure once the file was flushed, and that a
name leads to it only once its folder was; all else may be lost or not, each by itself, in any order. A rename is
atomic, and sure when either of its folders was flushed.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CALLS = "openat,write,pwrite64,fsync,rename,unlink,unlinkat,rmdir,mkdir,ftruncate,fallocate"
TEXT = r"""[<"]((?:\\x[0-9a-f]{2})*)[>"]"""
"""How strace shows strings, and the paths of descriptors, when told to use hexadecimal."""

Loss = Literal["dropped", "zeroed", "half", "reordered"]
LOSSES: tuple[Loss, ...] = ("dropped", "zeroed", "half", "reordered")


@dataclass
class File:
    """Bytes of a file: as last flushed, and the changes since, in order (offset and data, or a length)."""

    flushed: bytes = b""
    changes: list[tuple[int, bytes] | int] = field(default_factory=list)

    def bytes_after(self, loss: Loss | None, draw: random.Random) -> bytes:
        """What it holds if what was not flushed is lost in this way; None: nothing is lost."""
        if loss == "dropped":
            return self.flushed
        kept = len(self.changes) if loss in (None, "zeroed") else draw.randint(0, len(self.changes))
        data = bytearray(self.flushed)
        for change in self.changes[:kept]:
            if isinstance(change, int):
                data = data[:change].ljust(change, b"\0")
                continue
            at, new = change
            if loss == "zeroed":
                new = bytes(len(new))
            elif loss == "half":
                new = new[: len(new) // 2]
            data = data.ljust(at, b"\0")
            data[at : at + len(new)] = new
        return bytes(data)


@dataclass
class Change:
    """A change of names: `old` no longer leads to `what`, `new` does (None: a folder)."""

    old: str | None
    new: str | None
    what: File | None = None

    @property
    def folders(self) -> set[str]:
        """Folders it changes."""
        return {name.rpartition("/")[0] for name in (self.old, self.new) if name}


Names = dict[str, File | None]
"""Path within the disk to its file; None: a folder."""


class Disk:
    """A model of one folder's file system."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.now: Names = {}
        self.sure: Names = {}
        self.pending: list[Change] = []
        for path in sorted(root.rglob("*")) if root.exists() else ():
            self.now[path.relative_to(root).as_posix()] = File(path.read_bytes()) if path.is_file() else None
        self.now[""] = None
        self.sure = dict(self.now)

    def replay(self, log: str) -> Iterator[str]:
        """Do what a log says, call by call; yields the name of each call that changed or flushed something here."""
        for line in log.splitlines():
            match = re.match(r"(\w+)\((.*)\) += \d", line)
            if match is None:
                continue
            texts = [_decoded(text) for text in re.findall(TEXT, match[2])]
            places = [text.decode(errors="replace") for text in texts[: 1 if "write" in match[1] else 2]]
            if match[1] in ("openat", "unlinkat"):  # the second is a path of its own, or goes on from the first
                places = [str(Path(*places))]
            if all(place.startswith(self.root) for place in places):
                names = [place[len(self.root) :].lstrip("/") for place in places]
                if self._do(match[1], names, texts[-1], re.sub(TEXT, "", match[2])):
                    yield match[1]

    def _do(self, call: str, names: list[str], data: bytes, rest: str) -> bool:
        last = int((re.findall(r"\d+", rest) or "0")[-1])
        if call == "openat":
            return self._open(names[0], rest)
        if call in ("pwrite64", "write"):
            file = self._file(names[0])
            at = last if call == "pwrite64" else len(file.bytes_after(None, random.Random()))
            file.changes.append((at, data))
        elif call in ("ftruncate", "fallocate"):
            file = self._file(names[0])
            size = len(file.bytes_after(None, random.Random()))
            file.changes.append(last if call == "ftruncate" else max(last, size))
        elif call == "fsync":
            self._flush(names[0])
        elif call == "rename":
            self._change(Change(names[0], names[1], self.now[names[0]]))
        elif call == "mkdir":
            self._change(Change(None, names[0]))
        else:
            self._change(Change(names[0], None))
        return True

    def _file(self, name: str) -> File:
        file = self.now[name]
        assert file is not None, name
        return file

    def _open(self, name: str, text: str) -> bool:
        if "O_CREAT" in text and name not in self.now:
            self._change(Change(None, name, File()))
        elif "O_TRUNC" in text:
            self._file(name).changes.append(0)
        else:
            return False
        return True

    def _change(self, change: Change) -> None:
        _apply(self.now, change)
        self.pending.append(change)

    def _flush(self, name: str) -> None:
        file = self.now[name]
        if file is not None:
            file.flushed = file.bytes_after(None, random.Random())
            file.changes.clear()
            return
        flushed = [change for change in self.pending if name in change.folders]
        for change in flushed:
            _apply(self.sure, change)
            self.pending.remove(change)

    def after_cut(self, loss: Loss, draw: random.Random) -> dict[str, bytes | None]:
        """What is there when the power comes back: bytes by name, None for a folder."""
        names = dict(self.sure)
        for change in self.pending:
            is_kept = loss in ("zeroed", "half") or (loss == "reordered" and draw.random() < 0.5)
            has_place = change.new is None or change.new.rpartition("/")[0] in names  # nothing moves to nowhere
            if is_kept and has_place:
                _apply(names, change)
        whole: Loss | None = None if loss == "reordered" and draw.random() < 0.5 else loss
        held = {name: file and file.bytes_after(whole, draw) for name, file in names.items()}
        return {name: data for name, data in held.items() if _is_reached(name, held)}


def _is_reached(name: str, held: dict[str, bytes | None]) -> bool:
    """Whether all folders above a name are there."""
    above = name.rpartition("/")[0]
    return not name or (above in held and held[above] is None and _is_reached(above, held))


def _apply(names: Names, change: Change) -> None:
    if change.old is not None:
        names.pop(change.old, None)
    if change.new is not None:
        names[change.new] = change.what


def _decoded(text: str) -> bytes:
    """Bytes of a string in strace's hexadecimal form."""
    return bytes.fromhex(text.replace("\\x", ""))
