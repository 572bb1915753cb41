"""F7: builds at one store keep apart, and whoever reads it meanwhile sees one version."""

import itertools
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lunaprep
from lunaprep.build import BuildOptions, build
from lunaprep.errors import BusyError, StoreError
from lunaprep.store import commit
from lunaprep.store.commit import JOURNAL, build_lock, version_of
from lunaprep.verify import verify_store

from .conftest import Figure, files_of
from .fault_cases import OTHER, SMALL, Case, make_case, store_id
from .fault_driver import Driver, Running


@pytest.fixture(scope="module")
def case(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("other crops", tiny_root, tmp_path_factory.mktemp("case"))


def test_of_two_builds_at_once_one_works_and_the_other_exits_75(
    case: Case, driver: Driver, tmp_path: Path, figure: Figure
) -> None:
    draw = random.Random(2)
    for _ in range(figure(1, 100)):
        case.begin(tmp_path / "s")
        first = driver.start(case.command(tmp_path / "s"))
        time.sleep(draw.uniform(0, 0.1))
        second = driver.start(case.command(tmp_path / "s"))
        done = [second.wait(), first.wait()]
        assert sorted(one.code for one in done) in ([0, 75], [0, 0])  # both, where one came after the other's end
        assert all(len(one.stderr.strip().splitlines()) == (one.code == 75) for one in done)
        case.check(tmp_path / "s", done)


def both_ways(case: Case, driver: Driver, out: Path, rounds: int) -> Iterator[Running]:
    """Turn a store into another and back, again and again."""
    there = case.command(out)
    back = [*there, "--hu", "-900", "900"]
    for command in itertools.islice(itertools.cycle((there, back)), rounds):
        child = driver.start(command)
        yield child
        assert child.wait().code == 0


def test_a_reader_sees_one_version_while_builds_come_and_go(
    case: Case, driver: Driver, tmp_path: Path, figure: Figure
) -> None:
    out = tmp_path / "s"
    case.begin(out)
    truth = {}
    for store in (case.old, case.new):
        opened = lunaprep.open_store(store)
        uid = opened.scans["series_uid"][0]
        everything = (opened.manifest, opened.scans, opened.slabs, opened.crops(range(len(opened))), opened.volume(uid))
        truth[opened.record["store_id"]] = everything
    seen, refused = set(), set()
    for child in both_ways(case, driver, out, figure(2, 60)):
        until = time.monotonic() + 0.7  # about as long as a build takes
        while time.monotonic() < until:
            opened = lunaprep.open_store(out)
            manifest, scans, slabs, crops, volume = truth[opened.record["store_id"]]
            seen.add(opened.record["store_id"])
            try:
                assert opened.manifest.equals(manifest)
                assert opened.scans.equals(scans)
                assert opened.slabs.equals(slabs)
                np.testing.assert_array_equal(opened.crops(range(len(opened))), crops)
                np.testing.assert_array_equal(opened.volume(opened.scans["series_uid"][0]), volume)
            except StoreError as error:
                refused.add(str(error).split(": ")[1].split(". ")[0])
        assert child.pid
    assert seen == set(truth)
    assert refused <= {"a build has replaced this store since it was opened"}


def test_verify_beside_builds_reports_no_damage(case: Case, driver: Driver, tmp_path: Path, figure: Figure) -> None:
    out = tmp_path / "s"
    case.begin(out)
    codes = []
    for _ in both_ways(case, driver, out, figure(1, 40)):
        for pause in (0.0, 0.1, 0.3):
            time.sleep(pause)
            done = driver.run(["verify", out])
            assert done.code in (0, 75), done
            codes.append(done.code)
    assert 0 in codes


# In small steps, so that it does not hang on luck


@pytest.fixture
def turning(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store; calling `turn` makes another of it."""
    case.begin(tmp_path / "s")
    monkeypatch.setattr(commit, "RENAMES_S", 0.0)
    return tmp_path / "s"


def turn(case: Case, out: Path) -> None:
    build(BuildOptions(case.root, out, workers=1), SMALL)


@pytest.mark.parametrize("what", ["manifest", "scans", "slabs"])
def test_a_table_of_a_replaced_store_is_refused(case: Case, turning: Path, what: str) -> None:
    opened = lunaprep.open_store(turning)
    turn(case, turning)
    with pytest.raises(StoreError, match="a build has replaced this store"):
        getattr(opened, what)


def test_crops_and_volumes_of_a_replaced_store_are_refused_unless_they_are_still_there(
    case: Case, turning: Path
) -> None:
    early, late = lunaprep.open_store(turning), lunaprep.open_store(turning)
    uid = late.scans["series_uid"][0]
    crops = early.crops([0])
    turn(case, turning)
    np.testing.assert_array_equal(early.crops([0]), crops)  # mapped before
    for read in (lambda: late.crops([0]), lambda: late.volume(uid)):
        with pytest.raises(StoreError, match="a build has replaced this store"):
            read()


def test_what_a_later_subset_does_not_touch_stays_readable(tiny_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    build(BuildOptions(tiny_root, out, subsets=(0,), workers=1), SMALL)
    opened = lunaprep.open_store(out)
    uid = opened.scans["series_uid"][0]
    build(BuildOptions(tiny_root, out, workers=1), SMALL)
    fresh = lunaprep.open_store(out)
    assert opened.is_replaced
    np.testing.assert_array_equal(opened.crops([0, 1]), fresh.crops([0, 1]))
    np.testing.assert_array_equal(opened.volume(uid), fresh.volume(uid))


def test_a_store_replaced_while_it_is_opened_is_opened_again(
    case: Case, turning: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lunaprep.store import reader

    real, calls, expected = reader.read_record, [], [store_id(case.old), store_id(case.new)]

    def read_record(folder: Path) -> object:
        record = real(folder)
        if not calls:
            turn(case, turning)  # now the record is of the old store, and its shards are gone
        calls.append(record["store_id"])
        return record

    monkeypatch.setattr(reader, "read_record", read_record)
    opened = lunaprep.open_store(turning)
    assert calls == expected
    assert opened.record["store_id"] == expected[1]


def test_verify_of_a_store_replaced_meanwhile_is_no_damage(
    case: Case, turning: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lunaprep.verify import run

    real = run.check_small_files

    def check(*args: object) -> object:
        turn(case, turning)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "check_small_files", check)
        with pytest.raises(BusyError, match="replaced the store while it was verified"):
            verify_store(turning)
    assert verify_store(turning).ok


def test_a_reader_waits_for_renames_and_not_for_ever(
    case: Case, turning: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = turning / ".build" / JOURNAL
    with build_lock(turning):
        journal.write_text('{"deletes": [], "moves": []}\n')
        assert version_of(turning) is None
        with pytest.raises(BusyError):
            lunaprep.open_store(turning)
        monkeypatch.setattr(commit, "RENAMES_S", 60.0)
        monkeypatch.setattr(time, "sleep", lambda _: journal.unlink())
        assert lunaprep.open_store(turning).record["store_id"] == store_id(case.old)


def test_what_a_build_never_gone_on_with_left_is_cleared_away(case: Case, driver: Driver, tmp_path: Path) -> None:
    out = tmp_path / "s"
    shutil.copytree(case.new, out)
    build(BuildOptions(case.root, tmp_path / "other", workers=1), OTHER)
    (out / ".build/receipts").mkdir()
    for shard in (tmp_path / "other/crops").iterdir():  # a build with another --hu, killed before its commit
        shutil.copy(shard, out / ("crops" if shard.suffix == ".h5" else ".build/receipts"))
    shutil.copytree(tmp_path / "other/volumes", out / ".build/volumes")
    assert verify_store(out).findings  # extra files
    case.finish(out)
    assert files_of(out) == files_of(case.new)
