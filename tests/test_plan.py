"""Plans: packing, what is kept and what is built, and that a plan of LUNA16's size comes about."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lunaprep.sources.source
from lunaprep.errors import ScanError, UsageError
from lunaprep.geometry import IDENTITY, Geometry
from lunaprep.parameters import Parameters, parameters_from_json
from lunaprep.plan import Plan, decide, make_plan, pack
from lunaprep.scans.scan import Scan
from lunaprep.sources.source import FoundScan, SourceData
from lunaprep.store.receipt import Receipt, ScanRecord, SlabRecord, VolumeRecord

ROOT = Path("/nowhere")
SHAPE = (40, 64, 64)
SMALL = Parameters(crop_shape=(8, 8, 8), shard_bytes=20 * 8**3 * 2)


def fake_scan(uid: str, dtype: str = "int16", shape: tuple[int, int, int] = SHAPE, origin_z: float = 0.0) -> Scan:
    grid = Geometry((0.0, 0.0, origin_z), (1.0, 1.0, 1.0), IDENTITY, shape)
    path = ROOT / "subset0" / f"{uid}.mhd"
    return Scan(uid, path, grid, np.dtype(dtype), path.with_suffix(".raw"), int(np.prod(shape)) * 2, f"h-{uid}", "map")


def table(rows: list[tuple]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["series_uid", "x_mm", "y_mm", "z_mm", "is_nodule"])
    frame = frame.astype({"series_uid": "str", "x_mm": float, "y_mm": float, "z_mm": float, "is_nodule": bool})
    frame.insert(0, "candidate_id", range(len(frame)))
    return frame


def nodules(rows: list[tuple]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["series_uid", "x_mm", "y_mm", "z_mm", "diameter_mm"])
    frame = frame.astype({"series_uid": "str", "x_mm": float, "y_mm": float, "z_mm": float, "diameter_mm": float})
    frame.insert(0, "annotation_id", range(len(frame)))
    return frame


def source_of(uids: dict[str, int], candidates: pd.DataFrame, annotations: pd.DataFrame | None = None) -> SourceData:
    scans = tuple(FoundScan(uid, uids[uid], ROOT / f"subset{uids[uid]}" / f"{uid}.mhd") for uid in sorted(uids))
    return SourceData(
        root=ROOT,
        subsets=tuple(sorted(set(uids.values()))),
        scans=scans,
        candidates=candidates,
        annotations=nodules([]) if annotations is None else annotations,
        malignancy=None,
        patients={},
        files=(),
        faults=(),
    )


@pytest.fixture
def scans(monkeypatch):
    """What open_scan gives, by series; an exception is raised."""
    known: dict[str, Scan | Exception] = {}

    def open_scan(path: Path, root: Path) -> Scan:
        scan = known.get(path.stem) or fake_scan(path.stem)
        if isinstance(scan, Exception):
            raise scan
        return scan

    monkeypatch.setattr(lunaprep.sources.source, "open_scan", open_scan)
    return known


UIDS = {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1}
ROWS = [(uid, 10 + k, 20, 10, k == 0) for uid in "abde" for k in range(9)]


# Packing


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 30), max_size=30), limit=st.integers(1, 40))
def test_pack_takes_every_scan_once_in_order_within_the_limit(sizes, limit):
    named = {f"s{i}": size for i, size in enumerate(sizes)}
    shards = pack(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    assert all(shards)
    for shard in shards:
        assert len(shard) == 1 or sum(named[name] for name in shard) <= limit
    for shard, following in itertools.pairwise(shards):
        total = sum(named[name] for name in shard)
        assert total + named[following[0]] > limit  # no shard was closed too early


# What a plan holds


def test_every_candidate_of_a_scan_on_disk_is_planned_once(scans):
    plan = make_plan(source_of(UIDS, table([*ROWS, ("absent", 1, 1, 1, True)])), SMALL)
    assert sorted(plan.rows["candidate_id"]) == list(range(len(ROWS)))
    assert plan.num_scans == 5
    assert sum(shard.rows for shard in plan.shards) == len(ROWS)
    assert [[job.scan.series_uid for job in shard.jobs] for shard in plan.shards] == [["a", "b", "c"], ["d", "e"]]


def test_rows_lie_in_the_order_of_the_shards(scans):
    rng = np.random.default_rng(3)
    rows = [(uid, *rng.integers(0, 40, 3), False) for uid in "edcba" for _ in range(30)]
    plan = make_plan(source_of(UIDS, table(rows)), SMALL)
    starts = [start for shard in plan.shards for job in shard.jobs for start in job.starts.tolist()]
    owners = [job.scan.series_uid for shard in plan.shards for job in shard.jobs for _ in job.starts]
    assert plan.rows[["start_index", "start_row", "start_col"]].to_numpy().tolist() == starts
    assert plan.rows["series_uid"].tolist() == owners
    key = list(zip(plan.rows["unit"], plan.rows["series_uid"], starts, plan.rows["candidate_id"], strict=True))
    assert key == sorted(key)
    assert plan.rows["subset"].tolist() == [UIDS[uid] for uid in owners]


def test_plan_does_not_depend_on_the_order_of_the_candidates(scans):
    rows = table(ROWS)
    first = make_plan(source_of(UIDS, rows), SMALL)
    second = make_plan(source_of(UIDS, rows.iloc[::-1].reset_index(drop=True)), SMALL)
    assert [shard.plan_key for shard in first.shards] == [shard.plan_key for shard in second.shards]
    pd.testing.assert_frame_equal(first.rows, second.rows)


def test_candidate_outside_its_scan_is_named_and_left_out(scans):
    outside = [("a", -1, 20, 10, False), ("a", 20, 20, 40, False), ("b", 1e5, -1e5, 1e5, True)]
    plan = make_plan(source_of(UIDS, table([*ROWS, *outside, ("a", 63.4, 63.4, 39.4, False)])), SMALL)
    assert len(plan.outside) == 3
    assert all("\n" not in line and "outside the scan" in line for line in plan.outside)
    assert sorted(plan.rows["candidate_id"]) == [*range(len(ROWS)), len(ROWS) + 3]


def test_nodule_of_a_candidate_is_joined(scans):
    rows = table([("a", 10, 10, 10, True), ("a", 30, 30, 30, False)])
    plan = make_plan(source_of(UIDS, rows, nodules([("b", 10, 10, 10, 50), ("a", 11, 10, 10, 6)])), SMALL)
    assert plan.rows["annotation_id"].tolist() == [1, pd.NA]
    assert plan.rows["diameter_mm"].tolist()[0] == 6
    assert np.isnan(plan.rows["diameter_mm"].tolist()[1])
    assert plan.rows["is_malignant"].isna().all()


def test_failed_scan_does_not_move_the_others(scans):
    good = make_plan(source_of(UIDS, table(ROWS)), replace(SMALL, shard_bytes=9 * 8**3 * 2))
    scans["a"] = ScanError("a.mhd: broken")
    bad = make_plan(source_of(UIDS, table(ROWS)), replace(SMALL, shard_bytes=9 * 8**3 * 2))
    assert [failed.reason for failed in bad.failed] == ["a.mhd: broken"]
    kept = {(shard.name, shard.plan_key) for shard in bad.shards}
    assert kept == {(s.name, s.plan_key) for s in good.shards if "a" not in [j.scan.series_uid for j in s.jobs]}
    assert "a" not in set(bad.rows["series_uid"])


def test_added_subset_leaves_the_shards_of_the_others(scans):
    some = make_plan(source_of({uid: n for uid, n in UIDS.items() if n == 1}, table(ROWS)), SMALL)
    all_of_them = make_plan(source_of(UIDS, table(ROWS)), SMALL)
    assert {shard.plan_key for shard in some.shards} < {shard.plan_key for shard in all_of_them.shards}


def test_series_there_twice_fails_and_names_both(scans):
    source = source_of(UIDS, table(ROWS))
    twin = replace(source.scans[0], twin=ROOT / "subset1" / "a.mhd")
    plan = make_plan(replace(source, scans=(twin, *source.scans[1:])), SMALL)
    assert len(plan.failed) == 1
    assert re.search(r"a\.mhd is there twice: also as subset1/a\.mhd", plan.failed[0].reason)


def test_limit_takes_the_first_scans(scans):
    plan = make_plan(source_of(UIDS, table(ROWS)), SMALL, limit=2)
    assert set(plan.rows["series_uid"]) == {"a", "b"}
    assert plan.num_scans == 2


@pytest.mark.parametrize("rows", [[], [("absent", 1, 1, 1, True)], [("a", -50, 0, 0, True)]], ids=str)
def test_no_usable_candidate_is_a_plan_of_scans_alone(scans, rows):
    plan = make_plan(source_of(UIDS, table(rows)), SMALL)
    assert len(plan.rows) == 0
    assert plan.num_scans == 5
    assert {shard.rows for shard in plan.shards} == {0}
    assert {"unit", "subset", "diameter_mm", "annotation_id", "start_index", "is_padded"} <= set(plan.rows)


def test_no_usable_scan_is_an_empty_plan(scans):
    scans.update({uid: ScanError(f"{uid}.mhd: broken") for uid in UIDS})
    plan = make_plan(source_of(UIDS, table(ROWS)), SMALL)
    assert (len(plan.rows), plan.shards, len(plan.failed)) == (0, (), 5)


# dtype


@pytest.mark.parametrize(
    ("kinds", "asked", "expected"),
    [
        (["int16", "int16"], "auto", "int16"),
        (["int16", "uint8"], "auto", "int16"),
        (["int16", "float32"], "auto", "float32"),
        (["float64", "float64"], "auto", "float32"),
        (["int16", "int16"], "float32", "float32"),
        (["float32", "int16"], "int16", "int16"),
    ],
)
def test_dtype_auto_is_int16_only_where_every_scan_holds_integers(scans, kinds, asked, expected):
    for uid, kind in zip("ab", kinds, strict=True):
        scans[uid] = fake_scan(uid, kind)
    plan = make_plan(source_of({"a": 0, "b": 0}, table(ROWS[:18])), replace(SMALL, dtype=asked), targets=False)
    assert plan.dtype == expected
    one = 8**3 * (2 if expected == "int16" else 4)
    assert plan.write_bytes == sum(shard.rows * one + 4096 for shard in plan.shards) + 2 * 2 * int(np.prod(SHAPE))


# The key of a shard


def test_plan_key_changes_with_all_that_reaches_the_crops(scans):
    source = source_of({"a": 0}, table(ROWS[:9]))
    base = make_plan(source, SMALL).shards[0].plan_key
    for change in ({"crop_shape": (8, 8, 9)}, {"hu": (-1000, 400)}, {"edge": "pad"}, {"dtype": "float32"}):
        assert make_plan(source, replace(SMALL, **change)).shards[0].plan_key != base, change
    moved = source_of({"a": 0}, table([*ROWS[:8], ("a", 30, 30, 30, False)]))
    assert make_plan(moved, SMALL).shards[0].plan_key != base
    scans["a"] = replace(fake_scan("a"), header_xxh3="other")
    assert make_plan(source, SMALL).shards[0].plan_key != base


def test_plan_key_stays_with_what_only_the_manifest_holds(scans):
    source = source_of({"a": 0}, table(ROWS[:9]))
    base = make_plan(source, SMALL).shards[0].plan_key
    for change in ({"match": "book"}, {"val_stride": 5}, {"shard_bytes": 1 << 40}):
        assert make_plan(source, replace(SMALL, **change)).shards[0].plan_key == base, change
    assert make_plan(source, SMALL, volumes=False).shards[0].plan_key == base


# What is left to do


def receipt_for(plan: Plan, unit: int = 0, **changes) -> Receipt:
    """A receipt as a finished build of this shard would leave it."""
    shard = plan.shards[unit]
    records = []
    for job in shard.jobs:
        volume = VolumeRecord(f"volumes/{job.scan.series_uid}.h5", 9, "f", job.volume_key, (), job.targets_key)
        record = ScanRecord(job.scan.series_uid, "ok", data_bytes=1, data_xxh3="same", volume=volume)
        records.append(replace(record, **changes))
    slabs = SlabRecord(shard.slabs_key, shard.name + "-y", shard.num_slabs, "slabs/y.h5", 1, "f", "slabs/m.h5", 1, "f")
    return Receipt(shard.plan_key, shard.name + "-x", "crops/x.h5", shard.rows, 1, "f", (), tuple(records), slabs)


@pytest.fixture
def plan(scans):
    return make_plan(source_of(UIDS, table(ROWS)), SMALL)


def decided(plan: Plan, *receipts: Receipt, there: bool = True, unchanged: bool = True) -> list[str]:
    known = {receipt.plan_key: receipt for receipt in receipts}
    done = decide(plan, known, lambda receipt: there, lambda scan, data_xxh3: unchanged and data_xxh3 == "same")
    assert [shard.plan_key for shard in done.shards] == [shard.plan_key for shard in plan.shards]
    return [shard.action for shard in done.shards]


def test_finished_shard_is_kept_and_the_other_built(plan):
    done = decide(plan, {plan.shards[0].plan_key: receipt_for(plan)}, lambda _: True, lambda *_: True)
    assert [shard.action for shard in done.shards] == ["keep", "build"]
    assert [shard.name for shard in done.to_do] == ["subset1-000"]
    assert done.shards[0].receipt == receipt_for(plan)
    assert done.read_bytes == sum(job.scan.data_bytes for job in plan.shards[1].jobs)


def test_nothing_is_kept_of_a_first_build(plan):
    assert decided(plan) == ["build", "build"]


def test_touched_scan_is_checked(plan):
    assert decided(plan, receipt_for(plan), unchanged=False) == ["check", "build"]


def test_scan_with_another_hash_is_checked(plan):
    assert decided(plan, receipt_for(plan, data_xxh3="other")) == ["check", "build"]


def test_shard_whose_file_is_missing_is_built_again(plan):
    assert decided(plan, receipt_for(plan), there=False) == ["build", "build"]


def test_scan_that_failed_for_a_passing_reason_is_tried_again(plan):
    assert decided(plan, receipt_for(plan, status="failed", retry=True, volume=None)) == ["build", "build"]


def test_scan_that_failed_for_good_is_not_tried_again_and_wants_no_volume(plan):
    assert decided(plan, receipt_for(plan, status="failed", reason="bad", volume=None)) == ["keep", "build"]


def test_missing_volumes_are_added_where_volumes_are_wanted(plan):
    bare = receipt_for(plan, volume=None)
    assert decided(plan, bare) == ["add", "build"]
    assert decided(replace(plan, volumes=False), bare) == ["keep", "build"]


def test_volume_made_with_other_parameters_is_made_again(plan):
    old = VolumeRecord("volumes/a.h5", 9, "f", "another key", ())
    assert decided(plan, receipt_for(plan, volume=old)) == ["add", "build"]


def test_missing_and_outdated_targets_are_added_where_targets_are_wanted(plan):
    finished = receipt_for(plan)
    job = plan.shards[0].jobs[0]
    bare = VolumeRecord("volumes/a.h5", 9, "f", job.volume_key, ())
    stale = replace(bare, masks_key="of other annotations")
    without = replace(plan, targets=False)
    for receipt, wanted, not_wanted in (
        (replace(finished, slabs=None), "add", "keep"),
        (replace(finished, slabs=replace(finished.slabs, key="other")), "add", "add"),
        (replace(finished, scans=(replace(finished.scans[0], volume=bare), *finished.scans[1:])), "add", "keep"),
        (replace(finished, scans=(replace(finished.scans[0], volume=stale), *finished.scans[1:])), "add", "add"),
    ):
        assert decided(plan, receipt)[0] == wanted
        assert decided(without, receipt)[0] == not_wanted


def test_receipt_that_does_not_know_a_scan_of_its_shard_is_not_trusted(plan):
    receipt = receipt_for(plan)
    assert decided(plan, replace(receipt, scans=receipt.scans[:-1])) == ["build", "build"]


# Parameters


@pytest.mark.parametrize(
    "change",
    [
        {"crop_shape": (8, 8)}, {"crop_shape": (0, 48, 48)}, {"crop_shape": (513, 8, 8)}, {"crop_shape": (7, 8, 8)},
        {"hu": (400, 400)}, {"hu": (400, -1000)}, {"hu": (-40000, 0)}, {"hu": (0, 32768)}, {"dtype": "int8"},
        {"edge": "wrap"}, {"match": "nearest"}, {"val_stride": 1}, {"shard_bytes": 0},
    ],
    ids=str,
)  # fmt: skip
def test_parameter_that_cannot_be_is_one_clean_line(change):
    option = next(iter(change)).replace("_", "-").replace("bytes", "size")
    with pytest.raises(UsageError, match=rf"--{option}: got .* expected ") as info:
        Parameters(**change)
    assert str(info.value).isprintable()


def test_parameters_come_back_from_json():
    parameters = Parameters(crop_shape=(8, 16, 24), hu=(-900, 300), dtype="float32", edge="pad", match="book")
    assert parameters_from_json(parameters.to_json()) == parameters


# LUNA16's size


def test_plan_of_755_000_candidates_in_888_scans(scans):
    rng = np.random.default_rng(0)
    uids = {f"1.3.6.1.{i:04d}": i % 10 for i in range(888)}
    names = np.array(sorted(uids))
    count = 755_000
    for uid in uids:
        scans[uid] = fake_scan(uid, shape=(150, 512, 512))
    candidates = pd.DataFrame(
        {
            "candidate_id": np.arange(count),
            "series_uid": pd.array(names[rng.integers(0, 888, count)], dtype="str"),
            "x_mm": rng.uniform(0, 511, count),
            "y_mm": rng.uniform(0, 511, count),
            "z_mm": rng.uniform(0, 149, count),
            "is_nodule": rng.random(count) < 0.002,
        }
    )
    annotations = candidates.iloc[:1186].assign(diameter_mm=6.0, annotation_id=range(1186))
    plan = make_plan(source_of(uids, candidates, annotations), Parameters())
    assert len(plan.rows) == count == sum(shard.rows for shard in plan.shards)
    assert plan.dtype == "int16"
    assert (plan.rows["diameter_mm"] == 6.0).sum() >= 1186
    assert plan.num_scans == 888
    one = 32 * 48 * 48 * 2
    assert all(shard.rows * one <= 1 << 30 for shard in plan.shards)
    assert plan.write_bytes > count * one
