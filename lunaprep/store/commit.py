"""One build at a time, and all of its files at once.

A build writes new files beside the store and, when all are safely on the disk, a journal: the list of renames
that make them the store. From then on the new store is decided; whoever comes next finishes the renames if the
builder could not.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import filelock

from lunaprep import schema
from lunaprep.errors import BusyError, StoreError
from lunaprep.store.files import canonical_json, sync_folder, write_file

Version = tuple[int, int, int]
"""What tells one version of a store from the next: store.json's inode, time of change (ns) and size."""

JOURNAL = schema.JOURNAL_FILE
LOCK = "lock"

RENAMES_S = 10.0
"""How long a reader waits for a build that is at its renames."""

POLL_S = 0.02


@contextmanager
def build_lock(out: Path) -> Iterator[None]:
    """Hold the store's lock; the operating system frees it when the process ends, however it ends.

    Raises
    ------
    BusyError
        Another build holds it.
    """
    work = out / schema.WORK_DIR
    is_new = not out.exists()
    work.mkdir(parents=True, exist_ok=True)
    if is_new:
        with suppress(OSError):  # a folder that may be written to and not read
            sync_folder(out.parent)
    lock = filelock.FileLock(work / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        message = f"{out}: another build is at work on this store. Wait for it, or choose another --out"
        raise BusyError(message) from error
    try:
        yield
    finally:
        lock.release()


def commit(out: Path, moves: Sequence[tuple[str, str]], deletes: Sequence[str]) -> None:
    """Make finished files the store.

    Parameters
    ----------
    out : Path
        The store; the caller holds its lock.
    moves : sequence of (str, str)
        Finished, flushed files and their final names, relative to `out`; store.json should come last.
    deletes : sequence of str
        Files of the old store that the new one no longer names.
    """
    for folder in (out, out / schema.WORK_DIR):  # no journal may outlive the folders whose files it names
        sync_folder(folder)
    journal = {"moves": [list(move) for move in moves], "deletes": sorted(deletes)}
    write_file(out / schema.WORK_DIR / JOURNAL, canonical_json(journal))
    _finish(out)


def recover(out: Path) -> None:
    """Finish a commit that was cut off, if there is one; the caller holds the lock."""
    if (out / schema.WORK_DIR / JOURNAL).exists():
        _finish(out)


def recover_if_idle(out: Path) -> None:
    """Finish a commit that was cut off, or wait for the build that is at it.

    Raises
    ------
    BusyError
        A build is between decision and last rename, and stays there.
    StoreError
        The store cannot be written to, so the commit cannot be finished here.
    """
    last = time.monotonic() + RENAMES_S
    while (out / schema.WORK_DIR / JOURNAL).exists():
        try:
            with build_lock(out):
                recover(out)
        except BusyError:
            if time.monotonic() > last:
                raise
            time.sleep(POLL_S)
        except OSError as error:
            message = (
                f"{out}: a build was cut off while committing. Run 'lunaprep build' once where the store is writable"
            )
            raise StoreError(message) from error


def version_of(out: Path) -> Version | None:
    """Which version of a store is there; None while there is none, or one is being replaced.

    Whatever was opened between two calls that give the same is of that version.
    """
    if (out / schema.WORK_DIR / JOURNAL).exists():  # looked for first: the journal goes after store.json has come
        return None
    try:
        stat = (out / schema.STORE_FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _finish(out: Path) -> None:
    path = out / schema.WORK_DIR / JOURNAL
    moves, deletes = _read_journal(path)
    folders = {out}
    for source, target in moves:
        inside(out, target).parent.mkdir(parents=True, exist_ok=True)
        if inside(out, source).exists():
            inside(out, source).replace(inside(out, target))
        folders.update(out / above for above in PurePosixPath(target).parents)  # each may be new
    for folder in sorted(folders):
        sync_folder(folder)
    for name in deletes:
        with suppress(FileNotFoundError):
            inside(out, name).unlink()
    path.unlink()
    sync_folder(path.parent)  # or the journal could come back, and find files of a later build under its names


def _read_journal(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        journal = json.loads(path.read_bytes())
        moves = [(source, target) for source, target in journal["moves"]]
        deletes = list(journal["deletes"])
        if all(isinstance(name, str) for name in [*itertools.chain(*moves), *deletes]):
            return moves, deletes
        message = "not all of it are names"
        raise TypeError(message)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{path} is no journal of a commit. Delete it and run 'lunaprep build' again"
        raise StoreError(message) from error


def inside(out: Path, name: object) -> Path:
    """Path of a file of the store.

    Raises
    ------
    StoreError
        The name leads out of the store.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name else ()
    path = out.joinpath(*parts)
    if not parts or parts[0] == "/" or ".." in parts or not path.resolve().is_relative_to(out.resolve()):
        message = f"{out}: the store names a file outside itself: {name!r:.100}. Don't trust it"
        raise StoreError(message)
    return path
