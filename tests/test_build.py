"""A build is right to the voxel, the same however it is run, and goes on after whatever stops it."""

import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

import lunaprep
from lunaprep.build import BuildOptions, build, preview
from lunaprep.errors import BusyError, NoSpaceError, StoreError, UsageError
from lunaprep.parameters import Parameters
from lunaprep.store.commit import build_lock
from lunaprep.verify import verify_store

from .bad_headers import CASES as BAD_HEADERS
from .conftest import Figure, Run, files_of
from .fault_driver import Driver

SMALL = Parameters(shard_bytes=1)


def make(data: Path, out: Path, parameters: Parameters = SMALL, **options: object):
    return build(BuildOptions(data, out, **{"workers": 1, **options}), parameters)


def stamps(store: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in store.glob(pattern)}


def naive_crop(image: sitk.Image, row: pd.Series, shape: tuple[int, int, int], edge: str, hu: tuple[int, int]):
    """Cut as the book does, voxel by voxel bounds, with SimpleITK's own transform."""
    array = np.clip(sitk.GetArrayFromImage(image).astype(np.float64), *hu)
    index = image.TransformPhysicalPointToContinuousIndex((row.x_mm, row.y_mm, row.z_mm))
    center = [int(np.rint(v)) for v in reversed(index)]
    crop = np.full(shape, float(hu[0]))
    spans = []
    for c, side, limit in zip(center, shape, array.shape, strict=True):
        start = c - side // 2
        if edge == "shift":
            start = min(max(start, min(0, limit - side)), max(0, limit - side))
        spans.append((start, max(start, 0), min(start + side, limit)))
    source = tuple(slice(low, high) for _, low, high in spans)
    target = tuple(slice(low - start, high - start) for start, low, high in spans)
    crop[target] = array[source]
    return crop


@pytest.mark.parametrize("edge", ["shift", "pad"])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_every_crop_and_volume_equals_a_naive_one(phantom_root: Path, tmp_path: Path, edge: str, dtype: str) -> None:
    shape = (48, 20, 24)  # deeper than the scans, and narrow
    parameters = Parameters(crop_shape=shape, hu=(-900, 700), edge=edge, dtype=dtype)
    make(phantom_root, tmp_path / "s", parameters)
    store = lunaprep.open_store(tmp_path / "s")
    scans = store.scans.set_index("series_uid")
    assert store.manifest["is_padded"].all()
    assert store.dtype == dtype
    for series_uid, rows in store.manifest.groupby("series_uid"):
        image = sitk.ReadImage(str(phantom_root / scans["file"][series_uid]))
        crops = store.crops(rows.index)
        for crop, (_, row) in zip(crops, rows.iterrows(), strict=True):
            np.testing.assert_array_equal(crop, naive_crop(image, row, shape, edge, (-900, 700)))
        np.testing.assert_array_equal(store.volume(series_uid), np.clip(sitk.GetArrayFromImage(image), -900, 700))


def test_crops_at_every_border_equal_naive_ones(data: Path, tmp_path: Path) -> None:
    path = next(data.glob("subset0/*.mhd"))
    image = sitk.ReadImage(str(path))
    size = np.array(image.GetSize())
    corners = [
        image.TransformIndexToPhysicalPoint([int(v) for v in (size - 1) * np.array(at) // 2])
        for at in np.ndindex(3, 3, 3)
    ]
    lines = [f"{path.stem},{x},{y},{z},0" for x, y, z in corners]
    (data / "candidates.csv").write_text("seriesuid,coordX,coordY,coordZ,class\n" + "\n".join(lines) + "\n")
    for edge in ("shift", "pad"):
        parameters = Parameters(crop_shape=(16, 24, 24), edge=edge)
        account = make(data, tmp_path / edge, parameters)
        store = lunaprep.open_store(tmp_path / edge)
        assert (len(store), account.candidates_outside) == (27, 0)
        assert store.manifest["is_padded"].sum() == (0 if edge == "shift" else 26)
        for crop, (_, row) in zip(store.crops(range(27)), store.manifest.iterrows(), strict=True):
            np.testing.assert_array_equal(crop, naive_crop(image, row, (16, 24, 24), edge, (-1000, 1000)))


def test_plain_h5py_sees_all_crops_in_manifest_order(built_store: Path) -> None:
    store = lunaprep.open_store(built_store)
    with h5py.File(built_store / "crops.h5") as h5:
        assert h5["crops"].shape == (len(store), 32, 48, 48)
        for row in (0, len(store) // 2, len(store) - 1):
            np.testing.assert_array_equal(h5["crops"][row], store.crops([row])[0])


def test_scans_of_one_patient_share_a_split(built_store: Path) -> None:
    scans = lunaprep.open_store(built_store)
    assert scans.scans["patient_id"].nunique() == 5  # of 6 scans
    assert (scans.manifest.groupby("patient_id")["split_series"].nunique() == 1).all()
    assert set(scans.manifest["split_series"]) == {"train", "val"}


def test_a_missing_shard_shows_as_fill_in_the_front_door(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s")
    store = lunaprep.open_store(tmp_path / "s")
    store.shards[0].path.unlink()
    with h5py.File(tmp_path / "s/crops.h5") as h5:
        assert (h5["crops"][0] == -32768).all()
        assert (h5["crops"][store.shards[0].rows] != -32768).any()


def test_subsets_added_later_give_the_store_built_at_once(
    phantom_root: Path, built_store: Path, tmp_path: Path
) -> None:
    make(phantom_root, tmp_path / "s", subsets=(1,))
    before = stamps(tmp_path / "s", "crops/*")
    make(phantom_root, tmp_path / "s", subsets=(0,))
    account = make(phantom_root, tmp_path / "s", subsets=(2,))
    assert (account.scans_built, account.scans_kept) == (2, 4)
    assert before.items() <= stamps(tmp_path / "s", "crops/*").items()
    assert files_of(tmp_path / "s") == files_of(built_store)


def test_a_subset_whose_scans_are_gone_stays_in_the_store(data: Path, built_store: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s", subsets=(0,))
    shutil.rmtree(data / "subset0")
    make(data, tmp_path / "s", subsets=(1, 2))
    assert files_of(tmp_path / "s") == files_of(built_store)
    with pytest.raises(UsageError, match=r"subset0 of the store was made with another edge.*Use --edge shift"):
        make(data, tmp_path / "s", replace(SMALL, edge="pad"), subsets=(1, 2))
    assert files_of(tmp_path / "s") == files_of(built_store)


def test_a_limit_does_not_throw_away_what_the_store_has(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s", limit=2)
    before = files_of(tmp_path / "s")
    with pytest.raises(UsageError, match="holds 1 scan that this build would leave out"):
        make(data, tmp_path / "s", limit=1)
    assert files_of(tmp_path / "s") == before
    assert make(data, tmp_path / "s").scans_ok == 6


def test_a_damaged_store_json_does_not_cost_a_subset_whose_scans_are_gone(
    phantom_root: Path, built_store: Path, data: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built_store, tmp_path / "s"))
    for name in ("store.json", "crops.parquet"):
        (out / name).write_bytes((out / name).read_bytes()[:-3])
    shutil.rmtree(data / "subset0")
    before = files_of(out)
    with pytest.raises(StoreError, match=r"rows of subset0 cannot be kept.*Put them back"):
        make(data, out, subsets=(1,))
    assert files_of(out) == before
    make(phantom_root, out, subsets=(1,))
    assert files_of(out) == files_of(built_store)


def test_a_receipt_with_a_flipped_digit_is_not_believed(phantom_root: Path, built_store: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built_store, tmp_path / "s"))
    path = sorted(out.glob("crops/*.json"))[0]
    text = path.read_text()
    digit = text.index('"crop_xxh3"') + 30
    path.write_text(text[:digit] + ("1" if text[digit] != "1" else "2") + text[digit + 1 :])
    make(phantom_root, out)
    assert files_of(out) == files_of(built_store)


def test_a_second_build_changes_nothing(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*") if ".build" not in p.parts}
    account = make(data, tmp_path / "s")
    assert (account.scans_built, account.crops_built, account.changes) == (0, 0, ())
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*") if ".build" not in p.parts}


def enlarge_first_nodule(data: Path) -> str:
    path = data / "annotations.csv"
    lines = path.read_text().splitlines()
    uid, x, y, z, _ = lines[1].split(",")
    lines[1] = f"{uid},{x},{y},{z},29.5"
    path.write_text("\n".join(lines) + "\n")
    return uid


def test_another_label_touches_the_manifest_alone(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s", targets=False)
    shards = stamps(tmp_path / "s", "crops/*") | stamps(tmp_path / "s", "volumes/*/*")
    enlarge_first_nodule(data)
    account = make(data, tmp_path / "s", targets=False)
    assert account.scans_built == 0
    assert any("annotations.csv" in change for change in account.changes)
    assert shards == stamps(tmp_path / "s", "crops/*") | stamps(tmp_path / "s", "volumes/*/*")
    assert lunaprep.open_store(tmp_path / "s").manifest["diameter_mm"].max() == 29.5
    assert verify_store(tmp_path / "s").ok


def test_another_label_touches_no_crop_and_the_targets_of_its_scan_alone(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s")
    crops, volumes, slabs = (stamps(tmp_path / "s", at) for at in ("crops/*.h5", "volumes/*/*", "slabs/*"))
    uid = enlarge_first_nodule(data)
    account = make(data, tmp_path / "s")
    assert (account.scans_built, account.crops_built) == (1, 0)
    assert crops == stamps(tmp_path / "s", "crops/*.h5")
    assert {name for name, _ in volumes.items() ^ stamps(tmp_path / "s", "volumes/*/*").items()} == {f"{uid}.h5"}
    assert len(slabs.items() - stamps(tmp_path / "s", "slabs/*").items()) == 2  # a shard of slabs, and its masks
    assert verify_store(tmp_path / "s", "source", data).ok
    make(data, tmp_path / "fresh")
    assert files_of(tmp_path / "s") == files_of(tmp_path / "fresh")


def test_a_changed_scan_is_built_again_and_no_other(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s")
    before = stamps(tmp_path / "s", "crops/*")
    raw = sorted(data.glob("subset1/*.raw"))[0]
    voxels = np.fromfile(raw, dtype="<i2")
    voxels[:] = np.roll(voxels, 1000)
    voxels.tofile(raw)
    account = make(data, tmp_path / "s")
    assert (account.scans_built, len(account.changes)) == (1, 1)
    after = stamps(tmp_path / "s", "crops/*")
    assert len(before.items() - after.items()) == len(after.items() - before.items()) == 2  # a shard and its receipt
    assert verify_store(tmp_path / "s", "source", data).ok


def test_a_touched_scan_is_only_read_and_found_unchanged(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s")
    before = files_of(tmp_path / "s")
    raw = next(data.glob("subset1/*.raw"))
    os.utime(raw, ns=(1, 1))
    assert preview(BuildOptions(data, tmp_path / "s"), SMALL).shards_to_check == 1
    assert make(data, tmp_path / "s").scans_built == 0
    assert preview(BuildOptions(data, tmp_path / "s"), SMALL).shards_to_check == 0
    assert files_of(tmp_path / "s") == before


def test_volumes_can_be_added_later_and_crops_stay(data: Path, built_store: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s", volumes=False)
    assert not list((tmp_path / "s").glob("volumes/*/*"))
    assert verify_store(tmp_path / "s").ok
    before = stamps(tmp_path / "s", "crops/*.h5")
    account = make(data, tmp_path / "s")
    assert (account.crops_built, account.volumes) == (0, 6)
    assert before == stamps(tmp_path / "s", "crops/*.h5")
    assert files_of(tmp_path / "s") == files_of(built_store)
    make(data, tmp_path / "s", volumes=False)  # says "don't build", not "throw away"
    assert files_of(tmp_path / "s") == files_of(built_store)


@pytest.mark.parametrize("victim", ["crops/*.h5", "crops/*.json", "volumes/*/*.h5", "crops.parquet", "store.json"])
@pytest.mark.parametrize("way", ["missing", "cut"])
def test_a_lost_or_cut_file_is_made_again(
    phantom_root: Path, built_store: Path, tmp_path: Path, victim: str, way: str
) -> None:
    out = Path(shutil.copytree(built_store, tmp_path / "s"))
    path = sorted(out.glob(victim))[0]
    if way == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7])
    make(phantom_root, out)
    assert files_of(out) == files_of(built_store)


def test_bad_scans_cost_themselves_alone(data: Path, built_store: Path, tmp_path: Path, run: Run) -> None:
    made = [case.make(data / "subset0") for case in BAD_HEADERS]
    # int16 is said: one scan of floats would make the default choose float32 for the whole store
    args = ["build", "--data", data, "--out", tmp_path / "s", "--shard-size", "1", "--dtype", "int16"]
    done = run(args)
    assert done.returncode == 3, done.stderr[-2000:]
    store = lunaprep.open_store(tmp_path / "s")
    failed = store.scans.query("status == 'failed'")
    good = lunaprep.open_store(built_store).scans
    known = set(good["series_uid"])
    named = {path.name for path in made if path.name.endswith((".mhd", ".mha", ".nii.gz")) and os.path.lexists(path)}
    assert {Path(file).name for file in failed["file"]} == named
    assert len(failed) >= 60
    assert all("\n" not in reason and len(reason) < 300 for reason in failed["reason"])
    assert known == set(store.scans.query("status == 'ok'")["series_uid"])
    reference = lunaprep.open_store(built_store)
    columns = ["series_uid", "candidate_id", "xxh3", "split_series"]
    pd.testing.assert_frame_equal(store.manifest[columns], reference.manifest[columns])
    assert verify_store(tmp_path / "s").ok


def test_bad_rows_cost_themselves_alone(data: Path, built_store: Path, tmp_path: Path, run: Run) -> None:
    good = (data / "candidates.csv").read_text()
    uid = next(data.glob("subset0/*.mhd")).stem
    bad = [f"{uid},x,0,0,0", f"{uid},0,nan,0,0", f"{uid},0,0,1e300,0", f"{uid},0,0,0,2", ",0,0,0,0", f"{uid},0,0"]
    (data / "candidates.csv").write_text(good + "".join(f"{line}\n" for line in bad))
    (data / "annotations.csv").write_text((data / "annotations.csv").read_text() + f"{uid},0,0,0,-5\n")
    done = run(["build", "--data", data, "--out", tmp_path / "s", "--shard-size", "1"])
    assert done.returncode == 3
    first = len(good.splitlines()) + 1
    for number in range(len(bad)):
        assert f"candidates.csv, line {first + number}: " in done.stderr
    assert "diameter_mm is '-5'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == len(bad) + 1
    same = {name: value for name, value in files_of(built_store).items() if name != "store.json"}
    assert {name: value for name, value in files_of(tmp_path / "s").items() if name != "store.json"} == same


def test_a_series_in_two_subsets_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    path = next(data.glob("subset0/*.mhd"))
    for file in data.glob(f"subset0/{path.stem}.*"):
        shutil.copy(file, data / "subset1")
    account = make(data, tmp_path / "s")
    assert account.scans_failed == 1
    assert f"{path.stem}.mhd is there twice" in account.failed[0]
    assert "subset1" in account.failed[0]


def test_candidates_outside_their_scan_are_named_and_left_out(data: Path, tmp_path: Path) -> None:
    path = data / "candidates.csv"
    uid = next(data.glob("subset0/*.mhd")).stem
    path.write_text(path.read_text() + f"{uid},9000.5,0,0,1\n")
    account = make(data, tmp_path / "s")
    assert account.candidates_outside == 1
    assert "outside the scan" in account.left_out[0]
    assert uid in account.left_out[0]


def test_two_builds_at_once_the_second_exits_75(data: Path, tmp_path: Path, run: Run) -> None:
    with build_lock(tmp_path / "s"):
        done = run(["build", "--data", data, "--out", tmp_path / "s"])
        with pytest.raises(BusyError):
            make(data, tmp_path / "s")
    assert done.returncode == 75
    assert len(done.stderr.strip().splitlines()) == 1
    assert make(data, tmp_path / "s").scans_ok == 6


def test_a_dry_run_writes_nothing(data: Path, tmp_path: Path, run: Run) -> None:
    done = run(["build", "--data", data, "--out", tmp_path / "s", "--dry-run"])
    assert done.returncode == 0, done.stderr
    for word in ("scans", "candidates", "disk", "memory", "MB"):
        assert word in done.stdout
    assert not (tmp_path / "s").exists()


def test_a_disk_too_small_is_known_before_the_work(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lunaprep.build.free_disk_bytes", lambda folder: 1000)
    with pytest.raises(NoSpaceError, match="kB free"):
        make(data, tmp_path / "s")
    assert not (tmp_path / "s/store.json").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_exits_5_and_the_same_command_goes_on(
    data: Path, built_store: Path, tmp_path: Path, run: Run
) -> None:
    for limit in (2_000, 100_000, 200_000):  # shards of this phantom fit into the last, the larger volumes don't
        with largest_file(limit):
            done = run(["build", "--data", data, "--out", tmp_path / "s", "--shard-size", "1"])
        assert done.returncode == 5, done.stderr
        assert "disk is full" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "s/store.json").exists()
        assert not list((tmp_path / "s").rglob("*.partial"))
    make(data, tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(built_store)


@pytest.mark.parametrize("moment", range(2))
def test_killed_at_any_moment_the_same_command_goes_on(
    phantom_root: Path, built_store: Path, tmp_path: Path, driver: Driver, moment: int
) -> None:
    out, wanted = tmp_path / "s", 3 * (moment + 1)  # files in the store's folder when the kill comes
    args = ["build", "--data", phantom_root, "--out", out, "--shard-size", "1", "--workers", "1"]
    process = driver.start(args)
    while not (out / "store.json").exists() and len(list(out.rglob("*.h5"))) < wanted:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().code in (0, -signal.SIGKILL)
    assert not (tmp_path / "s/store.json").exists() or verify_store(tmp_path / "s").ok
    make(phantom_root, tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(built_store)
    assert not list((tmp_path / "s/.build").glob("*/*"))


@pytest.mark.shared_data
def test_real_scans_build_and_verify_at_all_levels(shared_data: Path, tmp_path: Path) -> None:
    account = make(shared_data / "real_ct", tmp_path / "s", Parameters(), workers=2)
    assert (account.crops, account.scans_failed) == (374, 0)
    assert lunaprep.open_store(tmp_path / "s").scans["is_thin"].sum() == 2
    assert verify_store(tmp_path / "s", "source", shared_data / "real_ct").ok


@pytest.mark.shared_data
def test_real_nodules_of_many_patients_build_and_verify(shared_data: Path, tmp_path: Path, figure: Figure) -> None:
    """Each a small scan of its own, most of them thinner than a crop; in the soak all of them."""
    data, limit = shared_data / "lidc_nodules", figure(60, 486)
    account = make(data, tmp_path / "s", Parameters(), limit=limit)
    assert (account.crops, account.scans_failed) == (limit, 0)
    scans = lunaprep.open_store(tmp_path / "s").scans
    sides = scans[["num_slices", "num_rows", "num_cols"]].to_numpy()
    assert scans["is_thin"].tolist() == (sides < (32, 48, 48)).any(axis=1).tolist()
    assert scans["is_thin"].any()
    assert verify_store(tmp_path / "s", "source", data).ok
