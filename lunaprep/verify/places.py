"""Where a store's files may lie: inside the store, plain files, reached by no symbolic link."""

import os
import stat
from pathlib import Path, PurePosixPath

LARGEST_JSON = 1 << 30
"""Bytes; a store.json or receipt longer than this isn't read."""


class BadFileError(Exception):
    """A file isn't there or isn't what a store may hold; caught inside verify and made a finding."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def look(root: Path, place: str) -> os.stat_result:
    """Find a file below `root` without following any link.

    Parameters
    ----------
    root : Path
        The store, or the data folder.
    place : str
        Relative path as recorded, ``/`` between its parts.

    Returns
    -------
    os.stat_result
        Of a regular file.

    Raises
    ------
    BadFileError
        ``path-escapes``, ``symlink``, ``missing-file``, ``not-a-file`` or ``unreadable``.
    """
    parts = PurePosixPath(place).parts
    if not parts or place != "/".join(parts) or ".." in parts or "\0" in place or "\\" in place:
        code, message = "path-escapes", f"not a plain relative path: {place!r}; nothing outside is opened"
        raise BadFileError(code, message)
    try:
        for depth in range(1, len(parts) + 1):
            below = "/".join(parts[:depth])
            status = os.lstat(f"{root}/{below}")
            if stat.S_ISLNK(status.st_mode):
                code, message = "symlink", f"{below} is a symbolic link; none is followed"
                raise BadFileError(code, message)
    except (FileNotFoundError, NotADirectoryError):
        code, message = "missing-file", "the file is missing"
        raise BadFileError(code, message) from None
    except OSError as error:
        code, message = "unreadable", f"can't be reached: {error.strerror}"
        raise BadFileError(code, message) from None
    if not stat.S_ISREG(status.st_mode):
        code, message = "not-a-file", "expected a plain file, got a folder, device or pipe"
        raise BadFileError(code, message)
    return status


def open_plain(root: Path, place: str) -> int:
    """Open a file found by `look` for reading and return its descriptor; a pipe or link is refused."""
    look(root, place)
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(root / place, flags)
    except OSError as error:
        code, message = "unreadable", f"can't be opened: {error.strerror}"
        raise BadFileError(code, message) from None


def read_whole(root: Path, place: str) -> bytes:
    """Bytes of a small file (JSON), refused above `LARGEST_JSON`."""
    size = look(root, place).st_size
    if size > LARGEST_JSON:
        code, message = "wrong-size", f"{size} bytes are more than such a file can have"
        raise BadFileError(code, message)
    try:
        with open(open_plain(root, place), "rb") as file:
            return file.read(LARGEST_JSON)
    except OSError as error:
        code, message = "unreadable", f"can't be read: {error.strerror}"
        raise BadFileError(code, message) from None
