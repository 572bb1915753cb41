"""F2: whatever a power cut leaves of what was not flushed, the old store or the new one is there."""

import random
import shutil
from pathlib import Path

import pytest

from .conftest import Figure, files_of
from .fault_cases import SLOW_CASES, Case, make_case
from .fault_driver import Driver, need_strace
from .power_cut import CALLS, LOSSES, Disk


@pytest.fixture(scope="module", params=SLOW_CASES)
def case(request: pytest.FixtureRequest, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tiny_root, tmp_path_factory.mktemp("case"), targets=False)


def write(state: dict[str, bytes | None], out: Path) -> None:
    """Make a folder hold what a disk held."""
    shutil.rmtree(out, ignore_errors=True)
    for name, data in sorted(state.items()):
        if data is None:
            (out / name).mkdir()
        else:
            (out / name).write_bytes(data)


def test_a_power_cut_at_any_call_leaves_a_whole_store(
    case: Case, driver: Driver, tmp_path: Path, figure: Figure
) -> None:
    need_strace()
    out = tmp_path / "s"
    case.begin(out)
    disk, twin = Disk(out), Disk(out)
    options = ["-e", f"trace={CALLS}", "-y", "-xx", "-s", str(1 << 26)]
    done, log = driver.traced(case.command(out), options)
    assert done.code == 0, done.stderr
    calls = sum(1 for _ in twin.replay(log))
    assert calls > 50
    step = max(1, calls // figure(2, calls))
    draw = random.Random(5)
    seen = set()
    for number, call in enumerate(disk.replay(log)):
        if number % step:
            continue
        for loss in LOSSES if step < 10 else [LOSSES[number // step % len(LOSSES)]]:
            state = disk.after_cut(loss, draw)
            if (mark := hash(frozenset(state.items()))) not in seen:
                seen.add(mark)
                write(state, out)
                case.check(out, (number, call, loss))
    # exit code 0 is a promise: nothing of the store was left to be flushed (files of the old one may come back)
    write(disk.after_cut("dropped", draw), out)
    assert files_of(out).items() >= files_of(case.new).items()
