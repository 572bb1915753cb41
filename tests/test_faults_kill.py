"""F1: a build that is killed at any system call leaves the old store or the new one, and goes on from there."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from .conftest import Figure, files_of
from .fault_cases import SLOW_CASES, Case, make_case
from .fault_driver import CALLS, Driver, need_strace, points, spread

NOTES = 3
"""How often the notes on seen scans may be written less: once after each shard."""


@pytest.fixture(scope="module", params=SLOW_CASES)
def case(request: pytest.FixtureRequest, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tiny_root, tmp_path_factory.mktemp("case"))


def test_killed_at_any_system_call(case: Case, driver: Driver, tmp_path: Path, figure: Figure) -> None:
    need_strace()
    out = tmp_path / "s"
    case.begin(out)
    done, log = driver.traced(case.command(out), ["-e", f"trace={CALLS}"])
    assert done.code == 0, done.stderr
    assert files_of(out) == files_of(case.new)
    calls = points(log)
    assert len(calls) > 100
    most = dict(calls)
    for _, name, nth in spread(calls, figure(2, len(calls))):
        case.begin(out)
        done, _ = driver.traced(
            case.command(out), ["-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={nth}"]
        )
        # by the clock the notes on seen scans are written again after a shard, or not: the last writes may not come
        is_last = name == "write" and nth > most[name] - NOTES
        assert done.code == -signal.SIGKILL or (is_last and done.code == 0), (name, nth, done)
        case.check(out, (name, nth))


@pytest.mark.soak  # quick: test_workers_of_a_killed_build_end_by_themselves
def test_killed_at_any_time_with_its_workers_at_work(
    case: Case, driver: Driver, tmp_path: Path, figure: Figure
) -> None:
    out = tmp_path / "s"
    draw = random.Random(1)
    for number in range(figure(1, 12)):
        case.begin(out)
        child = driver.start(case.command(out, workers=3))
        time.sleep(draw.uniform(0.3, 3))
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait().code in (-signal.SIGKILL, 0)
        case.check(out, number)  # at once: workers may still be at it
