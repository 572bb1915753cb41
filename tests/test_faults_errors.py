"""F3, F4: calls that fail and disks that are full cost an exit code and a line, never the store."""

import errno
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import SimpleITK

from lunaprep.build import BuildOptions, build
from lunaprep.errors import PassingScanError
from lunaprep.scans import gate, itk
from lunaprep.scans.open import open_scan, read_voxels
from lunaprep.targets import TargetMaker
from lunaprep.verify import verify_store

from .conftest import Figure, files_of
from .fault_cases import SLOW_CASES, SMALL, Case, make_case, store_id
from .fault_driver import CALLS, Done, Driver, need_strace, points, spread

FULL = ("ENOSPC", "EDQUOT")
ERRORS = (*FULL, "EIO", "EINTR")
NEVER_INTERRUPTED = ("rename", "unlink", "unlinkat", "mkdir", "rmdir")
READS = "openat,read,mmap,newfstatat,readlink,getdents64"
READ_ERRORS = ("EIO", "EMFILE", "EACCES", "ENOMEM")


@pytest.fixture(scope="module", params=SLOW_CASES[1:])
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
    errors = itertools.cycle(ERRORS)
    codes = set()
    for _, name, nth in spread(calls, figure(3, len(calls))):
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


@pytest.mark.parametrize("place", ["scans", pytest.param("store", marks=pytest.mark.soak)])
def test_any_read_that_fails_costs_a_line_once(
    case: Case, driver: Driver, tmp_path: Path, figure: Figure, place: str
) -> None:
    need_strace()
    out = tmp_path / "s"
    case.begin(out)
    _, log = driver.traced(case.command(out), ["-y", "-e", f"trace={READS}"])
    calls = points(log, case.root if place == "scans" else out)
    assert len(calls) > 100
    for number, name, nth in spread(calls, figure(2, len(calls))):
        error = READ_ERRORS[number % len(READ_ERRORS)]
        when = (name, nth, error)
        case.begin(out)
        done, _ = driver.traced(
            case.command(out), ["-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={nth}"]
        )
        assert done.code in (0, 1, 3), (when, done)  # 0: the system's own buffers; 1: a table or a folder
        check_is_one_line(done, when)
        assert store_id(out), when  # opening it also finishes a commit that was cut off
        assert verify_store(out).ok, when
        case.finish(out, when)


def test_a_store_that_the_disk_will_not_give_is_not_called_damaged(
    case: Case, driver: Driver, tmp_path: Path, figure: Figure
) -> None:
    need_strace()
    command = ["info", case.new]
    _, log = driver.traced(command, ["-y", "-e", f"trace={READS},pread64"])
    calls = points(log, case.new)
    for number, name, nth in spread(calls, figure(4, len(calls))):
        error = READ_ERRORS[number % len(READ_ERRORS)]
        done, _ = driver.traced(command, ["-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={nth}"])
        when = (name, nth, error, done)
        assert done.code in (0, 1), when
        check_is_one_line(done, when)
        assert "delete" not in done.stderr, when


def test_a_scan_that_the_system_would_not_open_is_tried_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What says so is a ScanError as of a bad file, but the file never changes."""
    real, victim = os.open, str(sorted(case.root.glob("subset0/*.raw"))[0])
    opened = []

    def refuse(path: str | Path, flags: int) -> int:
        opened.append(str(path))
        if str(path) == victim and opened.count(victim) == 2:  # the first time is the plan's, then the worker's
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags)

    with monkeypatch.context() as patch:
        patch.setattr(gate, "os", SimpleNamespace(**vars(os) | {"open": refuse}))
        account = build(BuildOptions(case.root, tmp_path / "s", workers=1), SMALL)
    (reason,) = account.failed
    assert reason.endswith("cannot be opened: too many open files")
    case.finish(tmp_path / "s")


def test_memory_that_runs_out_in_simpleitk_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "1.2.mha"
    SimpleITK.WriteImage(SimpleITK.Image(4, 4, 4, SimpleITK.sitkInt16), str(path), True)
    scan = open_scan(path, tmp_path)
    assert read_voxels(scan).shape == (4, 4, 4)

    class Reader:
        def Execute(self) -> None:
            message = "itkImportImageContainer.hxx:179:\nFailed to allocate memory for image."
            raise RuntimeError(message)

    monkeypatch.setattr(itk, "_reader", lambda *_: Reader())
    with pytest.raises(PassingScanError, match=r"^1\.2\.mha: not enough memory to decode it$"):
        read_voxels(scan)
    with pytest.raises(PassingScanError):  # of a given mask too: its lungs are not computed instead
        TargetMaker(scan.geometry, [], scan)


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
