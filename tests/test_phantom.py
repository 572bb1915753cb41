"""The synthetic data set: LUNA16's files, the right way round, repeatable, and as hard as it says."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lunaprep.errors import UsageError
from lunaprep.sources.phantom import write_phantom
from lunaprep.sources.phantom_anatomy import draw_anatomy
from lunaprep.sources.phantom_findings import draw_diameter, draw_nodule
from lunaprep.sources.phantom_scan import draw_grid, fit_body, make_scan

SMALL = (32, 56, 56)
MEDIUM = (48, 96, 96)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "data"
    return folder, write_phantom(folder, num_scans=10, seed=0, size=MEDIUM)


@pytest.fixture(scope="module")
def scans():
    return {hard: [make_scan(5, k, MEDIUM, hard, 40) for k in range(8)] for hard in (False, True)}


def hashes(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows(folder, name):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def point(row):
    return tuple(float(row[f"coord{axis}"]) for axis in "XYZ")


def images(folder):
    return {p.stem: sitk.ReadImage(str(p)) for p in sorted(folder.glob("subset*/*.mhd"))}


def value_at(image, xyz):
    return image[image.TransformPhysicalPointToIndex([float(v) for v in xyz])]


def test_same_seed_gives_the_same_bytes_also_over_an_earlier_phantom(tmp_path):
    write_phantom(tmp_path / "a", num_scans=2, seed=3, size=SMALL)
    write_phantom(tmp_path / "b", num_scans=3, seed=4, size=SMALL, hard=True)
    other = hashes(tmp_path / "b")
    write_phantom(tmp_path / "b", num_scans=2, seed=3, size=SMALL)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    raw = {v for k, v in hashes(tmp_path / "a").items() if k.endswith(".raw")}
    assert not raw & set(other.values())


def test_a_scan_does_not_depend_on_how_many_there_are(tmp_path):
    write_phantom(tmp_path / "one", num_scans=1, seed=3, size=SMALL)
    write_phantom(tmp_path / "two", num_scans=2, seed=3, size=SMALL)
    one, two = ({k: v for k, v in hashes(tmp_path / n).items() if "subset0/" in k} for n in ("one", "two"))
    assert len(one) == 2
    assert one == two


def test_files_and_columns_are_those_of_luna16(phantom):
    folder, summary = phantom
    assert sorted(p.name for p in folder.glob("subset*")) == [f"subset{k}" for k in range(10)]
    heads = {p.name: p.read_text().splitlines()[0] for p in folder.glob("*.csv")}
    assert heads.pop("seriesuids.csv").startswith("1.3.6.1.4.1.14519.5.2.1.6279.6001.")
    assert heads == {
        "patients.csv": "seriesuid,patient_id",
        "annotations.csv": "seriesuid,coordX,coordY,coordZ,diameter_mm",
        "annotations_excluded.csv": "seriesuid,coordX,coordY,coordZ,diameter_mm",
        "annotations_with_malignancy.csv": "seriesuid,coordX,coordY,coordZ,diameter_mm,mal_bool,patient_id",
        "candidates.csv": "seriesuid,coordX,coordY,coordZ,class",
    }
    header = next(folder.glob("subset0/*.mhd"))
    keys = " ".join(line.split(" = ")[0] for line in header.read_text().splitlines())
    assert keys == (
        "ObjectType NDims BinaryData BinaryDataByteOrderMSB CompressedData TransformMatrix Offset CenterOfRotation "
        "AnatomicalOrientation ElementSpacing DimSize ElementType ElementDataFile"
    )
    assert header.with_suffix(".raw").stat().st_size == 2 * np.prod(MEDIUM)
    assert summary.bytes == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert (summary.scans, summary.nodules) == (10, len(rows(folder, "annotations.csv")))
    candidates = rows(folder, "candidates.csv")
    assert (summary.candidates, summary.positives) == (len(candidates), sum(r["class"] == "1" for r in candidates))
    assert [r["seriesuid"] for r in candidates] == sorted(r["seriesuid"] for r in candidates)


def test_nodules_stand_out_at_their_annotated_centres(phantom):
    folder, _ = phantom
    series = images(folder)
    annotated = rows(folder, "annotations.csv")
    values = [value_at(series[r["seriesuid"]], point(r)) for r in annotated]
    assert len(values) >= 10
    assert min(values) > -720
    assert np.median(values) > -200


def test_flipped_scans_hold_their_anatomy_the_right_way_round(phantom):
    folder, _ = phantom
    series = images(folder)
    uids = [make_scan(0, k, SMALL, False, 0).series_uid for k in range(3)]
    assert [series[uid].GetDirection() == FLIPPED for uid in uids] == [False, False, True]
    for number, uid in enumerate(uids):
        frame = fit_body(draw_grid(0, number, MEDIUM))
        heart, lung, spine, air = (
            value_at(series[uid], frame.to_world(np.array(p)))
            for p in ((58.0, -42.0, 96.0), (-62.0, -42.0, 110.0), (0.0, 60.0, 13.5), (0.0, -130.0, 13.5))
        )
        assert heart > -150, number
        assert lung < -500, number
        assert spine > 80, number
        assert air < -800, number


def test_ignoring_the_direction_misses_the_nodules_of_a_flipped_scan():
    scan = next(s for s in (make_scan(seed, 2, MEDIUM, False, 0) for seed in range(9)) if s.nodules[0].diameter_mm > 8)
    geometry, nodule = scan.geometry, scan.nodules[0]
    assert geometry.is_flipped
    right = geometry.nearest_irc(nodule.center_xyz)
    mirrored = np.array([right[0], geometry.shape_irc[1] - 1 - right[1], geometry.shape_irc[2] - 1 - right[2]])
    assert scan.hu[tuple(right)] > -650
    far = np.abs(geometry.irc_to_xyz(mirrored) - nodule.center_xyz).max()
    assert far > nodule.diameter_mm
    assert abs(int(scan.hu[tuple(mirrored)]) - int(scan.hu[tuple(right)])) > 30


def test_grids_are_as_varied_as_luna16s(phantom):
    series = images(phantom[0]).values()
    directions = [image.GetDirection() for image in series]
    assert directions.count(FLIPPED) == 2
    assert directions.count(IDENTITY) == 8
    assert len({image.GetOrigin() for image in series}) == 10
    assert {np.sign(image.GetOrigin()[0]) for image in series} == {-1.0, 1.0}
    for image in series:
        x, y, z = image.GetSpacing()
        assert x == y != z
        assert 0.5 < x <= 2.0
        assert 0.6 < z < 2.5
        assert not float(image.GetOrigin()[2]).is_integer()
    full = [draw_grid(0, k, (250, 512, 512)).spacing for k in range(40)]
    assert all(0.55 < x < 0.85 and 0.6 < z < 2.5 for x, _, z in full)


def test_positives_lie_in_a_nodule_and_negatives_do_not(phantom):
    folder, _ = phantom
    annotated = rows(folder, "annotations.csv")
    on_disk = set(images(folder))
    doubles = 0
    for uid in on_disk:
        mine = [r for r in annotated if r["seriesuid"] == uid]
        centers = np.array([point(r) for r in mine]).reshape(-1, 3)
        radii = np.array([float(r["diameter_mm"]) / 2 for r in mine])
        hit = np.zeros(len(mine), dtype=int)
        for row in (r for r in rows(folder, "candidates.csv") if r["seriesuid"] == uid):
            inside = np.sqrt(((centers - point(row)) ** 2).sum(axis=1)) < radii
            assert inside.any() == (row["class"] == "1"), row
            hit += inside & (np.abs(centers - point(row)) <= radii[:, None] / 2).all(axis=1)
        assert (hit >= 1).all()
        doubles += int((hit == 2).sum())
    assert 0 < doubles < len(annotated) / 2
    assert all(3 <= float(r["diameter_mm"]) <= 30 for r in annotated)
    assert any(float(r["diameter_mm"]) > 15 for r in annotated)


def test_candidates_are_inside_their_scan_and_off_the_half_voxels(scans):
    for scan in scans[False] + scans[True]:
        irc = scan.geometry.xyz_to_irc([row.xyz for row in scan.candidates])
        assert scan.geometry.contains_irc(np.rint(irc).astype(int)).all()
        assert (np.abs(irc - np.floor(irc) - 0.5) > 0.015).all()
        assert sum(row.value == 0 for row in scan.candidates) == 40


def test_one_series_with_candidates_is_not_on_disk(phantom):
    folder, _ = phantom
    listed = set((folder / "seriesuids.csv").read_text().split())
    absent = listed - set(images(folder))
    assert len(absent) == 1
    assert len(listed) == 11
    assert [r["class"] for r in rows(folder, "candidates.csv") if r["seriesuid"] in absent] == ["0"] * 3


def test_excluded_findings_and_patients(phantom):
    folder, _ = phantom
    diameters = [float(r["diameter_mm"]) for r in rows(folder, "annotations_excluded.csv")]
    assert -1.0 in diameters
    assert all(d == -1 or d < 3 for d in diameters)
    labelled = rows(folder, "annotations_with_malignancy.csv")
    assert {r["mal_bool"] for r in labelled} == {"True", "False"}
    names = [make_scan(0, k, SMALL, False, 0).patient_id for k in (0, 4, 5, 6)]
    assert names == ["PHANTOM-0001", "PHANTOM-0005", "PHANTOM-0005", "PHANTOM-0006"]


def test_hu_outside_the_field_of_view_and_of_metal(phantom):
    series = images(phantom[0])
    tops = []
    for image in series.values():
        hu = sitk.GetArrayFromImage(image)
        assert hu.dtype == np.int16
        assert (hu[:, 0, 0] == -3024).all()
        inside = hu[hu != -3024]
        assert 0.18 < 1 - inside.size / hu.size < 0.26
        assert inside.min() == -1024
        tops.append(int(inside.max()))
    assert tops.count(3071) == 2


def test_lungs_are_lung_and_the_left_differs_from_the_right():
    body = draw_anatomy(np.random.default_rng(0))
    inside = body.lung_distance(
        np.array([-70.0, 70.0, 0.0, 70.0, -150.0]), np.zeros(5), np.array([160.0] * 3 + [20, 160])
    )
    assert (inside < 0).tolist() == [True, True, False, False, False]
    heart = body.lung_distance(np.array([-60.0, 60.0]), np.array([-42.0, -42.0]), np.array([100.0, 100.0]))
    assert heart[0] < 0 < heart[1]


def rank_auc(positives, negatives):
    p, n = np.array(positives)[:, None], np.array(negatives)[None]
    return float((p > n).mean() + 0.5 * (p == n).mean())


def mean_hu(scan, xyz, radius_mm=3.0):
    center = scan.geometry.xyz_to_irc(xyz)
    reach = radius_mm / np.array(scan.geometry.spacing_irc)
    low = np.maximum(np.ceil(center - reach), 0).astype(int)
    stop = np.minimum(np.floor(center + reach) + 1, scan.hu.shape).astype(int)
    index = np.stack(np.meshgrid(*map(np.arange, low, stop), indexing="ij"), axis=-1)
    near = (((index - center) * scan.geometry.spacing_irc) ** 2).sum(axis=-1) <= radius_mm**2
    return scan.hu[low[0] : stop[0], low[1] : stop[1], low[2] : stop[2]][near].mean()


def threshold_auc(scans):
    values = {0: [], 1: []}
    for scan in scans:
        for row in scan.candidates:
            values[row.value].append(mean_hu(scan, row.xyz))
    return rank_auc(values[1], values[0])


def test_a_threshold_solves_the_easy_phantom_and_not_the_hard_one(scans):
    easy, hard = threshold_auc(scans[False]), threshold_auc(scans[True])
    assert easy > 0.85
    assert hard < 0.78


def test_malignancy_goes_with_size_and_spicules():
    rng = np.random.default_rng(0)
    nodules = [draw_nodule(rng, np.zeros(3), draw_diameter(rng, 30.0), "solid", False) for _ in range(2000)]
    diameters = np.array([n.diameter_mm for n in nodules])
    malignant = np.array([n.is_malignant for n in nodules])
    spiculated = np.array([len(n.spikes) > 0 for n in nodules])
    assert 0.15 < malignant.mean() < 0.45
    assert 0.7 < rank_auc(diameters[malignant], diameters[~malignant]) < 0.97
    assert spiculated[malignant].mean() > 0.5 > 0.2 > spiculated[~malignant].mean() > 0
    assert 6.0 < np.median(diameters) < 7.5
    assert 0.05 < (diameters > 15).mean() < 0.15


def test_progress_and_number_of_candidates(tmp_path):
    seen = []
    summary = write_phantom(
        tmp_path, num_scans=2, size=SMALL, num_subsets=1, progress=lambda k, n: seen.append((k, n)), num_candidates=7
    )
    assert seen == [(1, 2), (2, 2)]
    assert summary.candidates - summary.positives == 2 * 7 + 3
    assert len(list(tmp_path.glob("subset0/*.mhd"))) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_scans": 0}, "got 0 scans, expected 1 or more"),
        ({"seed": -1}, "got seed -1, expected 0 or more"),
        ({"size": (15, 64, 64)}, "got size 15 x 64 x 64, expected at least 16 x 48 x 48"),
        ({"size": (40, 64)}, "got size 40 x 64, expected at least"),
        ({"num_subsets": 11}, "got 11 subsets, expected 1 to 10"),
        ({"num_candidates": -1}, "got -1 candidates a scan, expected 0 or more"),
    ],
)
def test_numbers_that_cannot_work_are_refused_before_anything_is_written(tmp_path, options, words):
    with pytest.raises(UsageError, match=words) as error:
        write_phantom(tmp_path / "new", **{"size": SMALL, **options})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "foreign", ["thesis.txt", "subset0/scan.raw", "subset0", "subset10/scan.mhd", "annotations.csv"]
)
def test_a_folder_with_anything_else_is_refused_and_left_alone(tmp_path, foreign):
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    for _ in range(2):
        with pytest.raises(UsageError, match="expected a new or empty folder or an earlier phantom") as error:
            write_phantom(tmp_path, size=SMALL)
        assert foreign.split("/")[0] in str(error.value)
        assert path.read_text() == "mine"
        if foreign == "annotations.csv":
            return  # with the marker beside it, this is a phantom's own file
        (tmp_path / "phantom.json").write_text(json.dumps({}))


def test_a_link_in_the_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "phantom.json").write_text("{}")
    Path(tmp_path / "data" / "subset0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="holds 'subset0'"):
        write_phantom(tmp_path / "data", size=SMALL)
    with pytest.raises(UsageError, match="is a file"):
        write_phantom(tmp_path / "data" / "phantom.json", size=SMALL)
