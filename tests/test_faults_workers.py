"""F5, F6: a worker that dies or hangs costs one scan; Ctrl-C ends all of it soon, and nothing stays behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lunaprep
from lunaprep.verify import verify_store

from .conftest import Figure, files_of
from .fault_cases import CASES, Case, make_case
from .fault_driver import MARK, Driver, Running

DEATHS = ("SIGKILL", "SIGSEGV", "memory", "exit")
PLACES = ("read", "write")

# Imported by every Python process of a build, workers too; FATE says what befalls which series
SITE = """
import json, os, resource, signal
import lunaprep.parallel, lunaprep.scan_pass, lunaprep.shard_work

def meet(series_uid, place):
    fate, where = json.loads(os.environ["FATE"]).get(series_uid, (None, None))
    if where != place:
        return
    if fate == "exit":
        os._exit(3)
    elif fate == "hang":
        signal.pause()
    elif fate == "memory":
        limits = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), limits[1]))
        try:
            bytearray(1 << 30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    else:
        os.kill(os.getpid(), getattr(signal, fate))

def iter_slabs(scan, *rest, inner=lunaprep.scan_pass.iter_slabs):
    meet(scan.series_uid, "read")
    return inner(scan, *rest)

def stage_volume(task, job, *rest, inner=lunaprep.shard_work._stage_volume):
    meet(job.scan.series_uid, "write")
    return inner(task, job, *rest)

lunaprep.parallel.SLOW_S = 0.3
lunaprep.scan_pass.iter_slabs = iter_slabs
lunaprep.shard_work._stage_volume = stage_volume
"""


@pytest.fixture
def fated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, tuple[str, str]]], Driver]:
    """A driver all of whose processes know what befalls which series."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)

    def make(fates: dict[str, tuple[str, str]]) -> Driver:
        monkeypatch.setenv("FATE", json.dumps(fates))
        return Driver(tmp_path, before=tmp_path / "site")

    return make


def belongings(store: Path, series: set[str]) -> dict[str, bytes]:
    """Shards, receipts, slabs and volumes of some scans, each of which has a shard for itself."""
    ids = [path.stem for path in store.glob("crops/*.json") if any(uid in path.read_text() for uid in series)]
    places = [name.rsplit("-", 1)[0] for name in ids]  # the slabs' fingerprint is another
    return {
        name: data
        for name, data in files_of(store).items()
        if Path(name).stem in series or any(Path(name).name.startswith(place) for place in places)
    }


def test_workers_that_die_cost_their_scans_alone(
    phantom_root: Path,
    built_store: Path,
    tmp_path: Path,
    fated: Callable[[dict[str, tuple[str, str]]], Driver],
    figure: Figure,
) -> None:
    series = sorted(lunaprep.open_store(built_store).scans["series_uid"])
    draw = random.Random(3)
    victims = figure(2, 3)
    for number in range(figure(1, 12)):
        out = tmp_path / f"{number}"
        args = ["build", "--data", phantom_root, "--out", out, "--shard-size", "1", "--workers", "2"]
        ways = [(DEATHS[(number + k) % 4], PLACES[(number + k) // 2 % 2]) for k in range(1, victims + 1)]
        fates = dict(zip(draw.sample(series, victims), ways, strict=True))
        driver = fated(fates)
        done = driver.run(args)
        driver.close()
        assert done.code == 3, (fates, done)
        assert "Traceback" not in done.stderr
        scans = lunaprep.open_store(out).scans.set_index("series_uid")
        assert set(scans.index[scans["status"] == "failed"]) == set(fates), fates
        for uid, (fate, _) in fates.items():
            expected = "not enough memory" if fate == "memory" else "killed its worker twice"
            assert expected in scans["reason"][uid], (fates, scans["reason"][uid])
            assert uid in done.stderr
        good = set(series) - set(fates)
        assert len(belongings(built_store, good)) == len(good) * 5
        assert belongings(out, good) == belongings(built_store, good), fates
        assert verify_store(out).ok
        driver = fated({})
        assert driver.run(args).code == 0  # they may have been passing reasons: the same command tries again
        driver.close()
        assert files_of(out) == files_of(built_store)


def gone_within(child: Running, seconds: float) -> bool:
    """Whether all of a command's workers have gone by then."""
    until = time.monotonic() + seconds
    while workers := child.workers():
        if time.monotonic() > until:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def test_a_worker_that_hangs_is_named_and_ctrl_c_ends_it(
    phantom_root: Path,
    built_store: Path,
    tmp_path: Path,
    fated: Callable[[dict[str, tuple[str, str]]], Driver],
) -> None:
    victim = lunaprep.open_store(built_store).scans["series_uid"][0]
    out = tmp_path / "s"
    driver = fated({victim: ("hang", "read")})
    child = driver.start(["build", "--data", phantom_root, "--out", out, "--shard-size", "1", "--workers", "2"])
    until = time.monotonic() + 60
    while f"series {victim} has been read for" not in child.stderr or len(list(out.glob("crops/*.h5"))) < 5:
        assert time.monotonic() < until, child.stderr
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    begun = time.monotonic()
    done = child.wait()
    assert time.monotonic() - begun < 5
    assert done.code == 130
    assert gone_within(child, 5)
    driver.close()


@pytest.fixture(scope="module")
def case(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(CASES[2], tiny_root, tmp_path_factory.mktemp("case"))


def test_ctrl_c_and_sigterm_end_a_build_soon_and_it_goes_on(
    case: Case, driver: Driver, tmp_path: Path, figure: Figure
) -> None:
    out = tmp_path / "s"
    draw = random.Random(4)
    codes = []
    for number in range(figure(2, 40)):
        case.begin(out)
        child = driver.start(case.command(out, workers=1 + number % 2 * 2), "own_group")
        time.sleep(draw.uniform(0.1, 0.5 if number % 2 == 0 else 2))
        begun = time.monotonic()
        kill = os.killpg if number % 4 < 2 else os.kill
        kill(child.pid, draw.choice([signal.SIGINT, signal.SIGTERM]))
        done = child.wait()
        assert time.monotonic() - begun < 5, number
        assert done.code in (130, 0), (number, done)
        assert "Traceback" not in done.stderr, (number, done)  # at the very end only a library may complain
        assert done.code == 0 or len(done.stderr.strip().splitlines()) == 1, (number, done)
        assert gone_within(child, 5), number
        codes.append(done.code)
        case.check(out, number)
    assert 130 in codes


def test_workers_never_see_ctrl_c() -> None:
    """In a process of its own, where nothing of multiprocessing has been started yet."""
    code = (
        "import signal; from lunaprep.parallel import spread\n"
        "def is_blocked(items=(0,)):\n"
        "    return [signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []) for _ in items]\n"
        "print(set(spread(is_blocked, range(600), 3, what='', progress=False)), is_blocked())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "{True} [False]", done


def test_workers_of_a_killed_build_end_by_themselves(case: Case, driver: Driver, tmp_path: Path) -> None:
    case.begin(tmp_path / "s")
    child = driver.start(case.command(tmp_path / "s", workers=3))
    until = time.monotonic() + 30
    while not list((tmp_path / "s/.build/tmp").glob("*.now")):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert child.workers()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert gone_within(child, 5)
    assert MARK not in os.environ
    case.check(tmp_path / "s", "killed")
