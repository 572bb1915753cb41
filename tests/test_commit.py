"""Commit: cut off anywhere, the old store or the new one is there; nothing outside the store is touched."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lunaprep.errors import BusyError, StoreError
from lunaprep.store.commit import JOURNAL, build_lock, commit, inside, recover, recover_if_idle

MOVES = [
    (f".build/new/{n}", name)
    for n, name in enumerate(["crops/a.h5", "crops/b.h5", "volumes/subset0/c.h5", "crops.parquet", "store.json"])
]
DELETES = ["crops/old.h5", "volumes/subset0/gone.h5"]


class Cut(Exception):
    """The power went."""


@pytest.fixture
def store(tmp_path) -> Path:
    """A store with old files, and new ones that are finished."""
    out = tmp_path / "store"
    for source, target in MOVES:
        for name, content in ((source, f"new {target}"), (target, f"old {target}")):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            if name != "volumes/subset0/c.h5":
                (out / name).write_text(content)
    (out / "crops/old.h5").write_text("old")
    (tmp_path / "elsewhere").write_text("mine")
    return out


def contents(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): path.read_text()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


NEW = {target: f"new {target}" for _, target in MOVES}


def test_commit_moves_deletes_and_leaves_no_journal(store):
    commit(store, MOVES, DELETES)
    assert contents(store) == NEW


def cut_after(monkeypatch, count: int) -> None:
    """Let the (count+1)-th rename fail."""
    real, left = Path.replace, [count]

    def replace(self, target):
        if left[0] == 0:
            raise Cut
        left[0] -= 1
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("count", range(1, len(MOVES) + 1))
def test_commit_cut_after_any_rename_is_finished_by_the_next(store, monkeypatch, count):
    with monkeypatch.context() as patch:
        cut_after(patch, count)  # the first rename is the journal's own
        with pytest.raises(Cut):
            commit(store, MOVES, DELETES)
    assert sum(text.startswith("new") for name, text in contents(store).items() if name in NEW) == count - 1
    recover(store)
    assert contents(store) == NEW


def test_commit_cut_before_the_journal_leaves_the_old_store(store, monkeypatch):
    before = contents(store)
    with monkeypatch.context() as patch:
        cut_after(patch, 0)
        with pytest.raises(Cut):
            commit(store, MOVES, DELETES)
    recover(store)
    after = {name: text for name, text in contents(store).items() if not name.startswith(".build/commit")}
    assert after == before


@pytest.mark.parametrize("count", range(len(DELETES) + 1))
def test_commit_cut_while_deleting_is_finished_by_the_next(store, monkeypatch, count):
    (store / "volumes/subset0/gone.h5").write_text("old")
    real, left = Path.unlink, [count]

    def unlink(self, missing_ok=False):
        if left[0] == 0:
            raise Cut
        left[0] -= 1
        real(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Cut):
            commit(store, MOVES, DELETES)
    recover(store)
    assert contents(store) == NEW


def test_recovery_that_is_cut_off_itself_can_be_done_again(store, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, 2)
        with pytest.raises(Cut):
            commit(store, MOVES, DELETES)
    for _ in range(3):
        with monkeypatch.context() as patch:
            cut_after(patch, 1)
            with pytest.raises(Cut):
                recover(store)
    recover(store)
    assert contents(store) == NEW


def test_recover_without_a_journal_does_nothing(store):
    before = contents(store)
    recover(store)
    recover_if_idle(store)
    assert contents(store) == before


def test_journal_is_on_the_disk_before_the_first_rename(store, monkeypatch):
    """All of it, flushed, as otherwise a power cut leaves half a store."""
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd):
        events.append("sync")
        real_fsync(fd)

    def replace(self, target):
        events.append(Path(target).name)
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    commit(store, MOVES, DELETES)
    assert events[:5] == ["sync", "sync", "sync", JOURNAL, "sync"]  # first of all, the folders of what it names
    assert events[5:10] == [Path(target).name for _, target in MOVES]
    assert events[10:] == ["sync"] * 5  # the four folders, and the journal's when it is gone


# Names that lead out

OUTSIDE = ["../elsewhere", "/etc/passwd", "crops/../../elsewhere", "", ".", "..", "link/x", "crops/\0", "/"]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_name_that_leads_out_of_the_store_is_refused(store, name):
    (store / "link").symlink_to(store.parent)
    with pytest.raises(StoreError) as info:
        inside(store, name)
    assert str(info.value).isprintable()


@pytest.mark.parametrize("name", ["store.json", "crops/a.h5", "volumes/subset0/1.2.h5", "not/there/yet", "..a/b..h5"])
def test_name_within_the_store_is_its_path(store, name):
    assert inside(store, name) == store / name


def test_store_that_is_itself_behind_a_link_is_no_matter(store):
    link = store.parent / "link"
    link.symlink_to(store)
    assert inside(link, "crops/a.h5").read_text() == "old crops/a.h5"


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "link/elsewhere"])
@pytest.mark.parametrize("kind", ["source", "target", "delete"])
def test_journal_that_reaches_outside_is_refused(store, name, kind):
    (store / "link").symlink_to(store.parent)
    moves = [[name, "store.json"]] if kind == "source" else [[".build/new/0", name]] if kind == "target" else []
    journal = {"moves": moves, "deletes": [name] if kind == "delete" else []}
    (store / ".build" / JOURNAL).write_text(json.dumps(journal))
    with pytest.raises(StoreError, match="outside itself"):
        recover_if_idle(store)
    assert (store.parent / "elsewhere").read_text() == "mine"


JUNK = [
    b"", b"{", b"[]", b"null", b"{}", b'{"moves": 1, "deletes": []}', b'{"moves": [["a"]], "deletes": []}',
    b'{"moves": [], "deletes": [1]}', b'{"moves": [], "deletes": ["a\\u0000"]}', b"\xff\xfe", b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("content", JUNK, ids=lambda b: repr(b[:40]))
def test_journal_that_makes_no_sense_is_a_store_error(store, content):
    (store / ".build" / JOURNAL).write_bytes(content)
    with pytest.raises(StoreError) as info:
        recover_if_idle(store)
    assert str(info.value).isprintable()


# The lock


def test_second_lock_is_busy_and_the_first_stays(store):
    with build_lock(store):
        for _ in range(2):
            with pytest.raises(BusyError, match="another build") as info, build_lock(store):
                pass
            assert info.value.exit_code == 75
    with build_lock(store):
        pass


def test_lock_is_freed_when_a_build_fails(store):
    with pytest.raises(Cut), build_lock(store):
        raise Cut
    with build_lock(store):
        pass


HOLD = """
import sys
from pathlib import Path
from lunaprep.store.commit import build_lock
with build_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_of_another_process_is_busy_and_freed_when_it_is_killed(store):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    ) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(BusyError), build_lock(store):
                pass
        finally:
            holder.kill()
    with build_lock(store):
        pass


def test_reader_finishes_a_cut_commit_when_no_build_is_at_work(store, monkeypatch):
    monkeypatch.setattr("lunaprep.store.commit.RENAMES_S", 0)
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            commit(store, MOVES, DELETES)
    with build_lock(store), pytest.raises(BusyError):
        recover_if_idle(store)
    recover_if_idle(store)
    assert contents(store) == NEW


def test_cut_commit_on_a_read_only_disk_is_a_store_error(store, monkeypatch):
    def read_only(self, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            commit(store, MOVES, DELETES)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", read_only)
        with pytest.raises(StoreError, match="cut off while committing") as info:
            recover_if_idle(store)
        assert str(info.value).isprintable()
