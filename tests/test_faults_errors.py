"""F3, F4: calls that fail and disks that are full cost an exit code and a line, never the store."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Figure, files_of
from .fault_cases import CASES, Case, make_case
from .fault_driver import CALLS, Done, Driver, need_strace, points

FULL = ("ENOSPC", "EDQUOT")
ERRORS = (*FULL, "EIO", "EINTR")
NEVER_INTERRUPTED = ("rename", "unlink", "unlinkat", "mkdir", "rmdir")


@pytest.fixture(scope="module", params=CASES[1:])
def case(request: pytest.FixtureRequest, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tiny_root, tmp_path_factory.mktemp("case"))


def check_is_one_line(done: Done, when: object) -> None:
    assert "Traceback" not in done.stderr, when
    assert len(done.stderr.strip().splitlines()) == (done.code != 0), (when, done)


def test_any_call_that_fails_is_one_line_and_costs_nothing(
    case: Case, driver: Driver, tmp_path: Path, figure: Figure
) -> None:
    need_strace()
    out = tmp_path / "s"
    case.begin(out)
    _, log = driver.traced(case.command(out), ["-e", f"trace={CALLS}"])
    calls = points(log)
    count = figure(3, len(calls))
    errors = itertools.cycle(ERRORS)
    codes = set()
    for number in range(count):
        name, nth = calls[number * len(calls) // count]
        error = next(errors)
        while error == "EINTR" and name in NEVER_INTERRUPTED:
            error = next(errors)
        when = (name, nth, error)
        case.begin(out)
        done, _ = driver.traced(
            case.command(out), ["-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={nth}"]
        )
        codes.add(done.code)
        # 0 where it does no harm: a folder that was to be cleared away, a call that is simply made again
        expected = (0,) if error == "EINTR" else (0, 5) if error in FULL else (0, 1)
        assert done.code in expected, (when, done)
        check_is_one_line(done, when)
        case.check(out, when)
    assert {0, 1, 5} >= codes
    assert len(codes) > 1


def test_writes_that_take_a_part_only_are_gone_on_with(case: Case, driver: Driver, tmp_path: Path) -> None:
    case.begin(tmp_path / "s")
    done = driver.run(case.command(tmp_path / "s"), "short_writes")
    assert done.code == 0, done.stderr
    assert files_of(tmp_path / "s") == files_of(case.new)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk, which root can mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def used(disk: Path) -> int:
    usage = os.statvfs(disk)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def test_a_disk_that_fills_up_exits_5_and_the_build_goes_on_when_it_is_larger(
    case: Case, driver: Driver, disk: Path, figure: Figure
) -> None:
    out = disk / "s"
    case.begin(out)
    before = used(disk)
    assert driver.run(case.command(out), "no_space_check").code == 0
    most = used(disk)
    count = figure(1, 20)
    for number in range(count):
        resize(disk, 64 << 20)
        case.begin(out)
        # the last sizes are near to what is needed
        resize(disk, before + 4096 + (most - before) * (number + 1) // (count + 1))
        done = driver.run(case.command(out), "no_space_check")
        when = (number, done)
        assert done.code == 5, when
        check_is_one_line(done, when)
        assert case.old is not None
        assert files_of(out).items() >= files_of(case.old).items(), when
        assert not list(out.rglob("*.partial")), when
        resize(disk, 64 << 20)
        done = driver.run(case.command(out), "no_space_check")
        assert done.code == 0, (when, done)
        case.check(out, when)


def test_a_disk_known_to_be_too_small_is_refused_before_anything_is_written(
    case: Case, driver: Driver, disk: Path
) -> None:
    out = disk / "s"
    case.begin(out)
    before = used(disk)
    done = driver.run(case.command(out))
    assert done.code == 5
    assert "are needed" in done.stderr
    check_is_one_line(done, done)
    assert used(disk) <= before + 8192  # the lock, and its folder
