"""Builds that can be killed cheaply: one process has everything imported, and forks a child for each command.

Run as a program it is that process; `Driver` is the test's end of the line. A child may be made to wait until strace
is attached to it; strace then kills it, or lets a call fail, at the N-th call of a kind.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CALLS = "write,pwrite64,fsync,rename,unlink,unlinkat,rmdir,mkdir,ftruncate,fallocate"
"""Every system call by which a build changes the disk, but the opening of files."""


MARK = "LUNAPREP_TEST"
"""Environment variable by which a command's workers are known."""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or minus the signal; and what it wrote to stderr."""

    code: int
    stderr: str


class Driver:
    """Starts `lunaprep` commands as forks of a warm process.

    Parameters
    ----------
    folder : Path
        For its notes.
    before : Path, optional
        Folder to look for Python modules in before all others.
    """

    def __init__(self, folder: Path, before: Path | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="driver-", dir=folder))  # two may share a folder
        self._count = 0
        command = [sys.executable, "-m", "tests.fault_driver"]
        root = Path(__file__).parents[1]
        path = [*([str(before)] if before else []), str(root), *filter(None, sys.path)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=env
        )

    def close(self) -> None:
        """End the warm process."""
        self._process.communicate()

    def start(self, args: Sequence[str | Path], *tweaks: str, waits: bool = False) -> "Running":
        """Start a command; `tweaks` are names of functions below, called in the child first."""
        self._count += 1
        notes = self._folder / f"{self._count}"
        order = {"argv": [str(arg) for arg in args], "tweaks": tweaks, "notes": str(notes), "waits": waits}
        return Running(self, notes, self._ask(order))

    def run(self, args: Sequence[str | Path], *tweaks: str) -> Done:
        """Run a command to its end."""
        return self.start(args, *tweaks).wait()

    def traced(self, args: Sequence[str | Path], options: Sequence[str], *tweaks: str) -> tuple[Done, str]:
        """Run a command, single-threaded, under strace; return strace's log too."""
        child = self.start(args, "one_thread", *tweaks, waits=True)
        log = child.notes.with_suffix(".strace")
        command = ["strace", "-o", str(log), *options, "-p", str(child.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline()
            child.go()
            done = child.wait()
            if "ptrace" in said:
                pytest.skip(f"strace may not attach here: {said.strip()}")
            assert "attached" in said
        return done, log.read_text()

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@dataclass(frozen=True)
class Running:
    """A command at work."""

    driver: Driver
    notes: Path
    pid: int

    def go(self) -> None:
        """Let a child that waits begin."""
        self.notes.with_suffix(".go").touch()

    def workers(self) -> list[int]:
        """Processes it has started that are still there."""
        mark, found = f"{MARK}={self.notes}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        path = self.notes.with_suffix(".err")
        return path.read_text() if path.exists() else ""

    def wait(self) -> Done:
        """Wait for its end."""
        code = self.driver._ask({"wait": self.pid})
        return Done(code, self.stderr)


def need_strace() -> None:
    """Skip the test where there is no strace."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")


def points(log: str, place: Path | str = "") -> list[tuple[str, int]]:
    """Each call of a log that went well, as (name, how many-th of its name), in order; of `place` alone."""
    counts: Counter[str] = Counter()
    found = []
    for name, rest, result in re.findall(r"^(\w+)\((.*)= (-?\d+)", log, re.MULTILINE):
        counts[name] += 1
        if result != "-1" and str(place) in rest:
            found.append((name, counts[name]))
    return found


def spread(calls: Sequence[tuple[str, int]], count: int) -> Iterator[tuple[int, str, int]]:
    """So many of the calls, from all of a build's time, each with its number."""
    for number in range(count):
        yield number, *calls[(2 * number + 1) * len(calls) // (2 * count)]


# What follows runs in the child


class _Inline:
    """An executor without threads, so that the order of a build's calls is fixed."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, task: Any, *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        pass


def one_thread() -> None:
    """strace counts the calls of each thread by itself."""
    import lunaprep.scan_pass

    lunaprep.scan_pass.ThreadPoolExecutor = _Inline  # type: ignore[attr-defined,assignment]


def short_writes() -> None:
    """Let every write take a third of what it is given."""
    real = os.pwrite
    os.pwrite = lambda fd, data, offset: real(fd, data[: max(1, len(data) // 3)], offset)


def own_group() -> None:
    """As a shell does: Ctrl-C then goes to all of the group."""
    os.setsid()


def private() -> None:
    """Files for nobody else."""
    os.umask(0o077)


def open_to_all() -> None:
    """Files that all may write to."""
    os.umask(0)


def no_space_check() -> None:
    """Let a build begin on a disk that it knows to be too small."""
    import lunaprep.build

    lunaprep.build._check_space = lambda about: None


def _child(order: dict[str, Any]) -> None:
    notes = Path(order["notes"])
    err = os.open(notes.with_suffix(".err"), os.O_WRONLY | os.O_CREAT, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    for source, target in ((null, 0), (null, 1), (err, 2)):
        os.dup2(source, target)
    os.environ[MARK] = str(notes)
    from lunaprep.cli import main

    for tweak in order["tweaks"]:
        globals()[tweak]()
    while order["waits"] and not notes.with_suffix(".go").exists():
        time.sleep(0.002)
    sys.argv = ["lunaprep", *order["argv"]]
    code: object = 1
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(int(str(code or 0)))


def _serve() -> None:
    for name in ("lunaprep.cli", "lunaprep.build"):  # imported, but nothing run: a fork has one thread only
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(order)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
