"""Masks and slabs of a built store: equal to naive ones, optional, resumable, checked; stores without them go on."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import xxhash

import lunaprep
from lunaprep.build import BuildOptions, build, preview
from lunaprep.lungs import lung_box, lung_mask
from lunaprep.masks import Nodule, nodule_mask
from lunaprep.parameters import Parameters
from lunaprep.scans.open import open_scan
from lunaprep.slabs import lots, nodule_slices
from lunaprep.store.reader import Store, open_store
from lunaprep.targets import TargetMaker
from lunaprep.verify import verify_store

from .conftest import files_of
from .handmade_store import make_store as make_handmade
from .handmade_store import sha256, write_record
from .test_damage_store import sign, table

SMALL = Parameters(shard_bytes=1, crop_shape=(8, 8, 8))
DEPTH, HEIGHT, WIDTH = 7, 96, 96


def make(data: Path, out: Path, parameters: Parameters = SMALL, **options: object):
    return build(BuildOptions(data, out, **{"workers": 1, **options}), parameters)


@pytest.fixture(scope="module")
def made(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's store with small crops; never written to."""
    out = tmp_path_factory.mktemp("targets") / "s"
    make(phantom_root, out)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "s"))


def masks_of(store: Store) -> np.ndarray:
    with h5py.File(store.path / "slabs.h5") as h5:
        return h5["masks"][...]


def test_every_slab_and_mask_equals_a_naive_one(phantom_root: Path, made: Path) -> None:
    store = open_store(made)
    annotations = pd.read_csv(phantom_root / "annotations.csv")
    with h5py.File(made / "slabs.h5") as h5:
        slabs, masks = h5["slabs"][...], h5["masks"][...]
    assert len(store.slabs) == len(slabs) == len(masks) > 20
    for uid, rows in store.slabs.groupby("series_uid"):
        image = sitk.ReadImage(str(next(phantom_root.glob(f"*/{uid}.mhd"))))
        hu = sitk.GetArrayFromImage(image)
        mine = annotations[annotations["seriesuid"] == uid]
        spots = [
            Nodule(image.TransformPhysicalPointToContinuousIndex((a.coordX, a.coordY, a.coordZ))[::-1], a.diameter_mm)
            for a in mine.itertuples()
        ]
        nodules = nodule_mask(hu, image.GetSpacing(), spots)
        lungs = lung_mask(hu, image.GetSpacing())
        stored = store.masks(uid)
        np.testing.assert_array_equal(stored[0], nodules)
        np.testing.assert_array_equal(stored[1], lungs)
        box = store.scans.set_index("series_uid")["lung_box"][uid]
        assert lung_box(lungs) == (tuple(box[:3]), tuple(box[3:]))
        pad = [(100, 100)] * 3
        wide = np.pad(np.clip(hu, -1000, 1000), pad, constant_values=-1000), np.pad(nodules, pad)
        for k, row in rows.iterrows():
            at = [row.start_index + 100, row.start_row + 100, row.start_col + 100]
            part = tuple(slice(a, a + n) for a, n in zip(at, (DEPTH, HEIGHT, WIDTH), strict=True))
            np.testing.assert_array_equal(slabs[k], wide[0][part])
            np.testing.assert_array_equal(masks[k], wide[1][part])
            assert row.num_mask_voxels == np.count_nonzero(masks[k, 3])
            assert row.is_positive == (row.num_mask_voxels > 0)
            assert row.xxh3 == xxhash.xxh3_64_intdigest(slabs[k].tobytes())
            assert row.mask_xxh3 == xxhash.xxh3_64_intdigest(masks[k].tobytes())


def test_every_nodule_has_slabs_around_slices_of_its_sphere(phantom_root: Path, made: Path) -> None:
    store = open_store(made)
    slabs, scans = store.slabs, store.scans.set_index("series_uid")
    annotations = pd.read_csv(phantom_root / "annotations.csv")
    assert set(slabs["annotation_id"].dropna()) == set(range(len(annotations)))
    for number, rows in slabs.dropna(subset="annotation_id").groupby("annotation_id"):
        scan = scans.loc[rows["series_uid"].iloc[0]]
        center = (annotations["coordZ"][number] - scan["origin"][2]) / scan["spacing"][2]
        expected = nodule_slices(center, annotations["diameter_mm"][number] / 2, scan["spacing"][2], scan["num_slices"])
        assert rows["index"].tolist() == expected
        assert rows["is_positive"].any()
        assert set(rows["candidate_id"]) <= set(store.manifest[store.manifest["is_nodule"]]["candidate_id"])
    negatives = slabs[slabs["annotation_id"].isna()]
    assert (negatives["diameter_mm"].isna()).all()
    assert len(negatives) >= 0.4 * (len(slabs) - len(negatives))
    by_id = store.manifest.set_index("candidate_id")
    assert not by_id.loc[negatives["candidate_id"], "is_nodule"].any()


def test_slices_are_a_nodule_s_own_and_hold_the_middle_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(1, 60))
        center, radius, spacing = rng.uniform(-0.49, count - 0.51), rng.uniform(0.1, 30), rng.uniform(0.4, 5)
        slices = nodule_slices(center, radius, spacing, count)
        assert sorted(set(slices)) == slices
        assert 1 <= len(slices) <= 5
        assert round(center) in slices
        assert all(0 <= k < count for k in slices)
        touched = [k for k in range(count) if abs(k - center) * spacing <= radius]
        assert set(slices) <= {*touched, round(center)}
        assert len(slices) == min(5, len({*touched, round(center)}))


def test_lots_are_even_and_each_its_own() -> None:
    uids = pd.Series([f"1.2.{k % 50}" for k in range(20000)])
    drawn = lots(uids, pd.Series(np.arange(20000)))
    assert len(np.unique(drawn)) == 20000
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert counts.min() > 880
    assert counts.max() < 1120
    again = lots(uids[::-1], pd.Series(np.arange(20000))[::-1])
    assert (again[::-1] == drawn).all()


def test_more_negatives_hold_the_fewer(phantom_root: Path, tmp_path: Path, made: Path) -> None:
    ids = []
    for ratio in (0.0, 1.0, 4.0):
        make(phantom_root, tmp_path / str(ratio), replace(SMALL, slab_negatives=ratio), volumes=False)
        slabs = open_store(tmp_path / str(ratio)).slabs
        ids.append(set(slabs[slabs["annotation_id"].isna()]["candidate_id"]))
    assert not ids[0]
    assert ids[0] < ids[1] < ids[2]


@pytest.mark.parametrize("way", ["pad", "shift"])
def test_slabs_of_small_scans_and_at_borders(data: Path, tmp_path: Path, way: str) -> None:
    path = next(data.glob("subset0/*.mhd"))
    image = sitk.ReadImage(str(path))
    lines = []
    for at in ((0, 0, 0), (63, 63, 39), (0, 63, 20)):
        x, y, z = image.TransformIndexToPhysicalPoint(at)
        lines.append(f"{path.stem},{x},{y},{z},9.0")
    (data / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n" + "\n".join(lines) + "\n")
    make(data, tmp_path / "s", replace(SMALL, edge=way), subsets=(0,))
    store = open_store(tmp_path / "s")
    assert store.slabs["is_padded"].all()  # 64 pixels are fewer than 96
    assert masks_of(store).any(axis=(1, 2, 3)).sum() >= 9
    assert verify_store(tmp_path / "s", "source", data).ok


def old_store(data: Path, out: Path) -> None:
    """A store as it was before there were targets."""
    make(data, out, targets=False)


def test_a_store_without_targets_opens_and_a_new_build_adds_them(
    phantom_root: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    old_store(phantom_root, out)
    names = files_of(out)
    assert not any("slab" in name for name in names)
    text = "".join(data.decode() for name, data in names.items() if name.endswith(".json"))
    assert not any(word in text for word in ("slab", "lungs", "masks_key"))
    store = open_store(out)
    assert (store.has_slabs, store.slab_shards, store.slab_mask_shards) == (False, (), ())
    with pytest.raises(lunaprep.errors.StoreError, match="has no slabs"):
        _ = store.slabs
    with pytest.raises(lunaprep.errors.StoreError, match="no masks"):
        store.masks(store.scans["series_uid"][0])
    before = {path: path.stat().st_mtime_ns for path in out.glob("crops/*.h5")}
    account = make(phantom_root, out)
    assert account.crops_built == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("crops/*.h5")}
    assert files_of(out) == files_of(made)


def test_no_targets_keeps_those_that_fit_and_drops_the_others(data: Path, out: Path, made: Path) -> None:
    make(data, out, targets=False)
    assert files_of(out) == files_of(made)
    path = data / "annotations.csv"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].rsplit(",", 1)[0] + ",29.5"
    path.write_text("\n".join(lines) + "\n")
    make(data, out, targets=False)
    assert verify_store(out).ok
    store = open_store(out)
    uid = lines[1].split(",")[0]
    assert not store.has_masks(uid)
    assert uid not in set(store.slabs["series_uid"])
    assert len(store.slabs)


def test_without_volumes_there_are_slabs_and_lung_boxes_alone(phantom_root: Path, made: Path, tmp_path: Path) -> None:
    make(phantom_root, tmp_path / "s", volumes=False)
    store, full = open_store(tmp_path / "s"), open_store(made)
    pd.testing.assert_frame_equal(store.slabs, full.slabs)
    assert [list(box) for box in store.scans["lung_box"]] == [list(box) for box in full.scans["lung_box"]]
    assert not list((tmp_path / "s").glob("volumes/*/*"))
    make(phantom_root, tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(made)


def test_a_dry_run_counts_slabs(phantom_root: Path, tmp_path: Path, made: Path) -> None:
    about = preview(BuildOptions(phantom_root, tmp_path / "s"), SMALL)
    assert about.slabs == len(open_store(made).slabs)
    less = preview(BuildOptions(phantom_root, tmp_path / "s", targets=False), SMALL)
    assert less.slabs == 0
    assert about.write_bytes - less.write_bytes > about.slabs * 190_000


def give_lungs(folder: Path, data: Path, spoil: Callable[[np.ndarray], np.ndarray] = lambda a: a) -> str:
    """A mask of one scan as LUNA16 has them, compressed; returns the series."""
    path = next(data.glob("subset0/*.mhd"))
    image = sitk.ReadImage(str(path))
    values = np.zeros(image.GetSize()[::-1], dtype=np.uint8)
    values[5:30, 10:40, 5:25], values[5:30, 10:40, 35:60], values[20:30, 20:24, 28:32] = 3, 4, 5
    folder.mkdir(exist_ok=True)
    mask = sitk.GetImageFromArray(spoil(values))
    mask.SetSpacing(image.GetSpacing())
    sitk.WriteImage(mask, str(folder / path.name), useCompression=True)
    return path.stem


def test_lungs_that_come_with_the_data_are_taken(data: Path, out: Path) -> None:
    uid = give_lungs(data / "seg-lungs-LUNA16", data)
    account = make(data, out)
    assert (account.scans_built, account.crops_built, account.left_out) == (1, 0, ())
    store = open_store(out)
    lungs = store.masks(uid)[1]
    assert lungs.sum() == 25 * 30 * (20 + 25)  # no trachea
    assert list(store.scans.set_index("series_uid")["lung_box"][uid]) == [5, 10, 5, 30, 40, 60]
    assert verify_store(out, "source", data).ok
    assert make(data, out).scans_built == 0
    give_lungs(data / "seg-lungs-LUNA16", data, np.zeros_like)  # another file: seen, and taken
    make(data, out)
    assert open_store(out).masks(uid)[1].sum() == 0


@pytest.mark.parametrize("way", ["size", "cut", "header"])
def test_a_bad_lung_mask_is_said_and_computed(data: Path, out: Path, made: Path, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "lungs"
    uid = give_lungs(folder, data, (lambda a: a[1:]) if way == "size" else (lambda a: a))
    if way == "cut":
        raw = folder / f"{uid}.zraw"
        raw.write_bytes(raw.read_bytes()[:40] + b"\0" * (raw.stat().st_size - 40))
    if way == "header":
        (folder / f"{uid}.mhd").write_text("NDims = 7\n")
    account = make(data, out, tables=lunaprep.sources.luna16.TablePaths(lungs=folder))
    assert (account.scans_ok, account.scans_failed) == (6, 0)
    assert len(account.left_out) == 1
    assert uid in account.left_out[0]
    np.testing.assert_array_equal(open_store(out).masks(uid)[1], open_store(made).masks(uid)[1])
    assert verify_store(out).ok


@pytest.mark.parametrize("victim", ["slabs/*.masks.h5", "slabs/*[0-9a-f].h5", "slabs.parquet", "slabs.h5"])
def test_a_lost_or_cut_target_file_is_made_again(phantom_root: Path, out: Path, made: Path, victim: str) -> None:
    path = sorted(out.glob(victim))[0]
    path.write_bytes(path.read_bytes()[:-3])
    report = verify_store(out, "quick")
    assert any(f.place == path.relative_to(out).as_posix() and f.code == "wrong-size" for f in report.findings)
    make(phantom_root, out)
    assert files_of(out) == files_of(made)
    path.unlink()
    make(phantom_root, out)
    assert files_of(out) == files_of(made)


def forge(out: Path, place: str, edit: Callable[[bytearray], None]) -> None:
    """Change a file of slabs and sign store.json anew, as a forger would."""
    raw = bytearray((out / place).read_bytes())
    edit(raw)
    (out / place).write_bytes(raw)
    value = lunaprep.store.record.read_record(out)
    for shard in value["slabs"]["shards"]:
        for key in ("", "mask_"):
            if shard[f"{key}file"] == place:
                shard[f"{key}sha256"] = sha256(out / place)
    write_record(out, value)


@pytest.mark.parametrize(("value", "code"), [(2, "mask-value"), (1, "mask-differs")])
def test_a_forged_mask_is_found_by_what_it_says(out: Path, value: int, code: str) -> None:
    shard = open_store(out).slab_mask_shards[0]
    place = shard.path.relative_to(out).as_posix()

    def edit(raw: bytearray) -> None:
        raw[4096 + 3 * HEIGHT * WIDTH + 5] = value  # the middle slice's corner

    forge(out, place, edit)
    found = {finding.code for finding in verify_store(out).findings if finding.place == place}
    assert code in found


@pytest.mark.parametrize("dataset", ["nodule_mask", "lung_mask"])
def test_a_volumes_mask_that_cannot_be_unpacked_is_named(out: Path, dataset: str) -> None:
    path = sorted(out.glob("volumes/*/*.h5"))[0]
    with h5py.File(path, "r+") as h5:
        h5[dataset].id.write_direct_chunk((0, 0, 0), b"not deflated")

    def agree(rows: list[dict]) -> None:
        row = next(row for row in rows if row["series_uid"] == path.stem)
        row |= {"volume_bytes": path.stat().st_size, "volume_sha256": sha256(path)}

    table(out, "scans.parquet", agree)
    sign(out)
    place = path.relative_to(out).as_posix()
    assert [finding.code for finding in verify_store(out).findings if finding.place == place] == ["mask-value"]


def test_a_store_made_by_hand_without_targets_is_right(tmp_path: Path) -> None:
    store = make_handmade(tmp_path)
    assert verify_store(store.path, "source", store.data).ok
    assert not open_store(store.path).has_slabs


def test_the_maker_of_targets_keeps_no_scan(phantom_root: Path) -> None:
    scan = open_scan(next(phantom_root.glob("subset0/*.mhd")), phantom_root)
    maker = TargetMaker(scan.geometry, [Nodule((20.0, 30.0, 30.0), 8.0)])
    slab = np.full((1, *scan.geometry.shape_irc[1:]), -800, dtype=np.int16)
    for _ in range(scan.geometry.shape_irc[0]):
        slab[:] = random.Random(0).randrange(-900, 0)
        maker.take(slab)
        slab[:] = 30000  # what was taken must not be looked at again
    assert not maker.finish().lung_record().box
