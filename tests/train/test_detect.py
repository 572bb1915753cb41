"""The detector from scan to page, with networks made by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from click.testing import CliRunner
from matplotlib.image import imread

import lunaprep
from lunaprep.build import BuildOptions, build
from lunaprep.candidates import read_candidates
from lunaprep.geometry import Geometry
from lunaprep.parameters import Parameters
from lunatrain.checkpoint import save_checkpoint
from lunatrain.cli import cli
from lunatrain.crop_kind import CropKind, kind_of_model, kind_of_store
from lunatrain.detect import pipeline, reading
from lunatrain.detect.classifying import Classifier, classify, cut_crops, load_classifier
from lunatrain.detect.findings import ScanResult, candidate_table, patient_score
from lunatrain.detect.findings_page import findings_page
from lunatrain.detect.grouping import GroupingOptions, group
from lunatrain.detect.harvest import write_harvest
from lunatrain.detect.loading import DetectOptions, Detector, load_detector
from lunatrain.detect.pictures import View, grey_of, montage, outline, png
from lunatrain.detect.reading import find_inputs, open_input, read_volume
from lunatrain.detect.segmenting import Lungs, segment
from lunatrain.detect.truth import nodule_fates
from lunatrain.errors import TableError, UsageError
from lunatrain.marks import read_annotations, read_marks
from lunatrain.models.unet import UNet

from .detect_phantom import Blobs, belly, bright, write_scan

DETECTOR = Detector(Blobs(), bright(), grouping=GroupingOptions(limit=20))


def detect(places, out, detector=DETECTOR, annotations=None, harvest=None):
    table = read_annotations(annotations) if annotations else None
    searched = pipeline.search(find_inputs(places), detector, table)
    return pipeline.report(searched, detector, DetectOptions(tuple(places), out=out, harvest=harvest), table)


@pytest.fixture(scope="module")
def found(phantom_root, tmp_path_factory):
    """All scans of the phantom searched, with its annotations; a false-positive file beside the findings."""
    out = tmp_path_factory.mktemp("found")
    detector = replace(DETECTOR, malignancy=bright("is_malignant"))
    return detect([phantom_root], out / "new", detector, phantom_root / "annotations.csv", out / "hard.csv")


def page_of(found):
    text = (found.out / "report.html").read_text(encoding="utf-8")
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "data:PICTURE", text)


def test_findings_csv_is_a_submission_and_says_more(found, phantom_root):
    table = pd.read_csv(found.out / "findings.csv")
    assert list(table)[:11] == [
        "seriesuid", "coordX", "coordY", "coordZ", "probability", "malignancy", "diameter_mm", "index", "row", "col",
        "is_finding",
    ]  # fmt: skip
    assert len(read_marks(found.out / "findings.csv")) == len(table) == found.record["num_candidates"] > 20
    assert ((table["probability"] >= 0.5) == (table["is_finding"] == 1)).all()
    assert (table["malignancy"].notna() == (table["is_finding"] == 1)).all()
    image = {path.stem: sitk.ReadImage(str(path)) for path in phantom_root.rglob("*.mhd")}
    for row in table.to_dict("records"):
        place = [row[name] for name in ("coordX", "coordY", "coordZ")]
        index = image[row["seriesuid"]].TransformPhysicalPointToContinuousIndex(place)
        assert np.abs(np.array(index[::-1]) - (row["index"], row["row"], row["col"])).max() <= 0.5 + 1e-3


def test_findings_json_and_the_patient_score(found):
    record = json.loads((found.out / "findings.json").read_text())
    assert record == json.loads(json.dumps(found.record))
    assert len(record["scans"]) == 6
    for scan, result in zip(record["scans"], found.results, strict=True):
        assert scan["status"] == "ok"
        assert scan["num_candidates"] == len(scan["findings"]) + len(scan["other_candidates"]) <= 20
        highest = max((row["malignancy"] for row in scan["findings"]), default=0)
        assert scan["patient_score"] == highest == patient_score(result.table, has_malignancy=True)
        assert set(scan["stages_s"]) == {"read", "lungs", "segment", "group", "classify", "malignancy", "draw"}
        counts = scan["grouping"]
        lost = counts["too_small"] + counts["too_large"] + counts["merged"] + counts["beyond_limit"]
        assert counts["components"] + counts["split"] == lost + counts["kept"]


def test_the_truth_accounts_for_each_nodule_and_agrees_with_froc(found, phantom_root):
    figures = found.record["truth"]
    number = len(read_annotations(phantom_root / "annotations.csv"))
    assert sum(value for name, value in figures.items() if name.startswith("fate_")) == number
    hit = figures["fate_found"] + figures["fate_rejected"]
    assert hit == figures["nodules_found"] >= 1
    assert figures["sensitivity_candidates"] == pytest.approx(hit / number)
    arguments = ["froc", found.out / "findings.csv", "--annotations", phantom_root / "annotations.csv", "--no-excluded"]
    uids = found.out.parent / "uids.csv"
    uids.write_text("".join(f"{result.series_uid}\n" for result in found.results))
    done = CliRunner().invoke(cli, [*map(str, arguments), "--seriesuids", str(uids), "--bootstrap", "0", "--json"])
    assert json.loads(done.stdout)["cpm"] == pytest.approx(figures["cpm"])


def test_the_page_needs_nothing_else_and_names_what_is_there(found):
    page = page_of(found)
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|<script src", page)
    assert set(re.findall(r'(?:src|href|srcset)="([^"#][^"]*)"', page)) == {"data:PICTURE"}
    for word in (
        "Annotated nodules",
        "FROC",
        "Montage",
        "axial plane",
        "sagittal plane",
        "Patient score",
        "segment ",
        "nodule, again",
    ):
        assert word in page
    for result in found.results:
        assert result.series_uid in page
    assert page.count("<svg") == page.count("</svg>") > 6 * 3
    assert not re.search(r'[">= ]nan["< ,]', page)


def test_a_scan_without_findings_is_a_page(phantom_root, tmp_path):
    nothing = replace(DETECTOR, segmenter=Blobs(above_hu=5000.0))
    scan = sorted(phantom_root.rglob("*.mhd"))[0]
    done = detect([scan], tmp_path, nothing, phantom_root / "annotations.csv")
    assert "No findings" in page_of(done)
    assert "marked nothing in the lungs" in page_of(done)
    assert (tmp_path / "findings.csv").read_text().count("\n") == 1
    assert done.results[0].patient_score == 0
    assert done.record["truth"]["fate_found"] == 0
    json.dumps(done.record, allow_nan=False)


def test_nobody_can_write_into_the_page():
    evil = "<script>alert(1)</script>"
    page = findings_page([ScanResult(evil, evil, reason=evil)], {}, {evil: evil}, None, [evil])
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in page


# ---- bad scans ------------------------------------------------------------------------------------------------------

GOOD = np.random.default_rng(0).integers(-1000, 400, (8, 16, 16)).astype(np.int16)
BAD = {
    "thin": (GOOD[:5], "5 slices, expected at least 7"),
    "zeros": (np.zeros((9, 16, 16), np.int16), "all voxels are 0, expected HU"),
    "grey": (np.arange(9 * 256).reshape(9, 16, 16).astype(np.int16) % 256, "0 to 255, are not those of a chest CT"),
    "bytes": (np.zeros((9, 16, 16), np.uint8), "its voxels are uint8, expected HU"),
    "stored": (np.full((9, 16, 16), 24, np.uint16) + GOOD[:1].astype(np.uint16) % 4000, "expected HU"),
    "scaled": ((GOOD / 1000).astype(np.float32), "0 % of the voxels lie from -1100 to -500 (air or lung)"),
    "belly": (belly(), "no lungs found, expected a CT of the chest"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_scan_that_is_no_chest_ct_is_refused_with_what_was_expected(tmp_path, name):
    voxels, words = BAD[name]
    path = write_scan(tmp_path, name, np.ascontiguousarray(voxels))
    done = detect([path], tmp_path / "out")
    (reason,) = done.failed
    assert reason.startswith(f"{name}.mhd: ")
    assert words in reason
    assert "\n" not in reason
    assert "could not be searched" in page_of(done)
    assert len(pd.read_csv(tmp_path / "out/findings.csv")) == 0


def test_a_huge_scan_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_VOXELS", 1000)
    path = write_scan(tmp_path, "huge", GOOD)
    with pytest.raises(lunaprep.errors.ScanError, match="16 x 16 x 8 voxels, expected at most 1,000"):
        open_input(find_inputs([path])[0])


def test_one_bad_scan_does_not_stop_the_others(data, tmp_path):
    first = sorted(data.rglob("*.mhd"))[0]
    first.with_suffix(".raw").write_bytes(b"short")
    annotations = data / "annotations.csv"
    done = detect([data], tmp_path / "out", annotations=annotations)
    assert len(done.failed) == 1
    assert first.name in done.failed[0]
    assert sum(result.reason is None for result in done.results) == 5
    lost = (read_annotations(annotations)["series_uid"] == first.stem).sum()
    assert done.record["truth"]["fate_scan_failed"] == lost
    assert done.record["truth"]["num_scans"] == 5


def test_a_series_named_twice_is_searched_once(data, tmp_path):
    scan = sorted(data.rglob("*.mhd"))[0]
    copy = write_scan(tmp_path / "copy", scan.stem, GOOD)
    done = detect([scan, scan, copy], tmp_path / "out")
    assert len(done.results) == 2
    assert "has been searched as" in done.failed[0]


def test_floats_are_rounded_and_clipped(tmp_path):
    voxels = np.tile(np.array([-3024.0, -899.6, 0.4, 40.0, 3071.0, -700.0, 2.5, 60.0], np.float32), (8, 16, 2))
    volume = read_volume(open_input(find_inputs([write_scan(tmp_path, "f", voxels)])[0]), 7)
    assert volume.hu[0, 0, :8].tolist() == [-1000, -900, 0, 40, 1000, -700, 2, 60]
    assert any("rounded" in note for note in volume.notes)


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_segmenting_the_lungs_alone_gives_what_whole_slices_give():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, (21, 120, 140)).astype(np.int16)
    near = np.zeros((17, 60, 70), dtype=bool)
    near[2:9, 10:30, 5:40] = near[10:16, 30:60, 30:70] = True
    lungs = Lungs((3, 33, 41), near, 1.0, ())
    model = UNet().eval()
    done = []
    found = segment(model, hu, lungs, done.append)
    padded = torch.from_numpy(np.concatenate([hu[:1]] * 3 + [hu] + [hu[-1:]] * 3).astype(np.float32))
    with torch.inference_mode():
        whole = [torch.sigmoid(model(padded[None, k : k + 7]))[0, 0].numpy() for k in range(len(hu))]
    expected = np.where(near, np.stack(whole)[lungs.box], 0)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert sum(done) == len(near)


def test_crops_are_those_of_the_store(built_store, phantom_root):
    store = lunaprep.open_store(built_store)
    rows = store.manifest
    for path in sorted(phantom_root.rglob("*.mhd"))[:2]:
        mine = rows.index[rows["series_uid"] == path.stem].to_numpy()
        volume = read_volume(open_input(find_inputs([path])[0]), 7)
        places = rows.loc[mine, ["index", "row", "col"]].to_numpy()
        crops = cut_crops(volume.hu, places, kind_of_store(store), volume.scan.geometry.spacing_irc)
        assert (crops[:, 0] == store.crops(mine)).all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.8, 1.3)])
@pytest.mark.parametrize(("edge", "hu"), [("shift", (-1000, 1000)), ("pad", (-900, 400))])
def test_resampled_crops_are_those_of_the_store(phantom_root, tmp_path, spacing, edge, hu):
    parameters = Parameters(crop_shape=(20, 24, 28), hu=hu, edge=edge, resample_mm=spacing)
    build(BuildOptions(phantom_root, tmp_path / "s", workers=1, volumes=False, targets=False), parameters)
    store = lunaprep.open_store(tmp_path / "s")
    rows, kind = store.manifest, kind_of_store(store)
    assert kind == CropKind((20, 24, 28), hu, edge, spacing)
    assert kind_of_model({"crop_shape": [20, 24, 28], "crops": kind.to_json()}) == kind  # by way of a checkpoint
    for path in sorted(phantom_root.rglob("*.mhd"))[:3]:  # the third is flipped
        mine = rows.index[rows["series_uid"] == path.stem].to_numpy()
        volume = read_volume(open_input(find_inputs([path])[0]), 7)
        grid = volume.scan.geometry
        places = grid.xyz_to_irc(rows.loc[mine, ["x_mm", "y_mm", "z_mm"]].to_numpy())
        crops = cut_crops(np.clip(volume.hu, *hu), places, kind, grid.spacing_irc)
        np.testing.assert_array_equal(crops[:, 0], store.crops(mine))


def test_classify_clips_to_the_window_the_classifier_has_learnt_from():
    class Watch(torch.nn.Module):
        """Notes the extremes of what it is given."""

        def __init__(self):
            super().__init__()
            self.seen, self.weight = [], torch.nn.Parameter(torch.zeros(1))

        def forward(self, crops):
            self.seen.append((float(crops.min()), float(crops.max())))
            return torch.zeros((len(crops), 2))

    hu = np.linspace(-1000, 1000, 20**3).reshape(20, 20, 20).round().astype(np.int16)
    kind = CropKind((8, 8, 8), (-300, 200), "pad", (4.0, 4.0, 4.0))
    model = Watch()
    classify(
        Classifier(model, kind, Path("m"), "is_nodule"), hu, np.array([[0.0, 0, 0], [9.5, 9.5, 9.5]]), (1.0, 1.0, 1.0)
    )
    assert model.seen == [(-300.0, 200.0)]


@pytest.mark.parametrize("hu", [(-1200, 600), (-1000, 1500)])
def test_a_classifier_of_hu_that_the_detector_does_not_keep_is_refused(tmp_path, hu):
    args = {"name": "luna", "num_classes": 2, "crop_shape": [32, 48, 48]}
    args["crops"] = CropKind((32, 48, 48), hu).to_json()
    save_checkpoint(tmp_path / "best.pt", {"model_args": args})
    with pytest.raises(UsageError, match=rf"trained on HU {hu[0]} to {hu[1]}, the detector keeps -1000 to 1000"):
        load_classifier(tmp_path, torch.device("cpu"))


def nodule(*xyz, diameter=10.0):
    names = ("x_mm", "y_mm", "z_mm")
    return {"series_uid": "1", **dict(zip(names, map(float, xyz), strict=True)), "diameter_mm": diameter}


def test_each_fate():
    geometry = Geometry((0, 0, 0), (1, 1, 1), (1, 0, 0, 0, 1, 0, 0, 0, 1), (40, 100, 100))
    near = np.ones((30, 80, 80), dtype=bool)
    lungs = Lungs((5, 10, 10), near, 1.0, ())
    probability = np.zeros(near.shape, dtype=np.float32)
    for i, r, c in ((10, 20, 20), (10, 20, 50), (10, 50, 20)):  # of the box
        probability[i : i + 3, r : r + 3, c : c + 3] = 0.9
    probability[15, 50, 50] = 0.9
    found = group(probability, (1, 1, 1), start_irc=lungs.start_irc)
    assert len(found) == 3
    nodules = pd.DataFrame(
        [nodule(31, 31, 16), nodule(61, 31, 16), nodule(60, 60, 20), nodule(80, 80, 20), nodule(2, 2, 20),
         nodule(500, 0, 0), nodule(31, 66, 16, diameter=10.5)]
    )  # fmt: skip
    probabilities = np.where(found.center_irc[:, 2] < 40, 0.8, 0.3)
    table = candidate_table("1", found, geometry, probabilities, 0.5)
    fates = nodule_fates(nodules, geometry, lungs, probability >= 0.5, table)
    assert fates["fate"].tolist() == [
        "found", "rejected", "grouped_away", "not_segmented", "outside_lungs", "outside_scan", "found",
    ]  # fmt: skip
    assert fates["probability"][:2].tolist() == pytest.approx([0.8, 0.3])
    assert fates["probability"][2:6].isna().all()


# ---- hard negatives -------------------------------------------------------------------------------------------------


def test_the_harvest_is_a_candidates_file_and_grows_only_by_what_is_new(found, phantom_root, tmp_path):
    first = read_candidates(found.out.parent / "hard.csv")
    assert not first.faults
    assert len(first.frame) == found.harvest.added > 0
    assert not first.frame["is_nodule"].any()
    annotations = read_annotations(phantom_root / "annotations.csv")
    for row in first.frame.itertuples():
        of_scan = annotations[annotations["series_uid"] == row.series_uid]
        off = np.linalg.norm(of_scan[["x_mm", "y_mm", "z_mm"]] - [row.x_mm, row.y_mm, row.z_mm], axis=1)
        assert (off >= np.maximum(of_scan["diameter_mm"], 5)).all()
    merged = write_harvest(found.truth, tmp_path / "all.csv", phantom_root / "candidates.csv")
    both = read_candidates(tmp_path / "all.csv").frame
    before = read_candidates(phantom_root / "candidates.csv").frame
    assert len(both) == len(before) + merged.added
    pd.testing.assert_frame_equal(both.iloc[: len(before)], before)
    again = write_harvest(found.truth, tmp_path / "again.csv", tmp_path / "all.csv")
    assert again.added == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()


def test_a_build_takes_the_harvest(found, phantom_root, tmp_path):
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters
    from lunaprep.sources.luna16 import TablePaths

    write_harvest(found.truth, tmp_path / "all.csv", phantom_root / "candidates.csv")
    tables = TablePaths(candidates=tmp_path / "all.csv")
    options = BuildOptions(phantom_root, tmp_path / "store", workers=1, volumes=False, tables=tables)
    build(options, Parameters(crop_shape=(16, 24, 24)))
    assert len(lunaprep.open_store(tmp_path / "store")) >= found.harvest.added


def test_a_file_that_is_no_candidates_file_is_refused(found, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match="expected seriesuid,coordX"):
        write_harvest(found.truth, tmp_path / "y.csv", tmp_path / "x.csv")


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_png_and_outline(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (13, 7)).astype(np.uint8)
    (tmp_path / "x.png").write_bytes(png(grey))
    assert (np.rint(imread(tmp_path / "x.png") * 255) == grey).all()
    assert grey_of(np.array([-3000, -1350, -600, 150, 900])).tolist() == [0, 0, 127, 255, 255]
    mask = np.zeros((6, 6), dtype=bool)
    mask[1:3, 2:5] = True
    path = outline(mask, (2.0, 0.5), (0.0, 0.0))
    assert path.count("h") == 2 * 3
    assert path.count("v") == 2 * 2
    assert "M1.00 2.00h0.50" in path
    assert outline(mask & False, (1, 1), (0, 0)) == ""


def test_numbers_in_a_montage_cover_neither_each_other_nor_a_finding():
    hu = np.full((3, 100, 100), -800, dtype=np.int16)
    lungs = Lungs((0, 0, 0), np.ones(hu.shape, dtype=bool), 1000.0, ())
    random = np.random.default_rng(0)
    table = [
        {"number": k + 1, "index": 1, "row": row, "col": col, "diameter_mm": 5.0}
        for k, (row, col) in enumerate(random.integers(2, 98, (50, 2)).tolist())
    ]
    (tile,) = [tile for tile in montage(View(hu, (1.0,) * 3, None), lungs, table) if 'aria-label="slice 1"' in tile]
    assert tile.count("<circle") == 50
    numbers = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" font-size="([\d.]+)" class="mark">(\d+)', tile)
    assert 5 < len(numbers) < 50
    boxes = [
        (float(x), float(y) - 0.7 * float(s), float(x) + 0.6 * float(s) * len(n), float(y)) for x, y, s, n in numbers
    ]
    assert all(min(box) >= 0 and max(box) <= 100 for box in boxes)
    middles = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', tile)]
    for k, (a, b, c, d) in enumerate(boxes):
        assert not any(a < right and c > left and b < low and d > top for left, top, right, low in boxes[:k])
        assert not any(a < x < c and b < y < d for x, y in middles)


def test_a_flipped_scan_is_shown_as_the_same_patient():
    hu = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    usual = View.of(hu, Geometry((0, 0, 0), (1, 1, 1), (1, 0, 0, 0, 1, 0, 0, 0, 1), hu.shape))
    flipped = View.of(hu[:, ::-1, ::-1], Geometry((0, 0, 0), (1, 1, 1), (-1, 0, 0, 0, -1, 0, 0, 0, 1), hu.shape))
    assert (usual.turned(usual.hu[1], "axial") == flipped.turned(flipped.hu[1], "axial")).all()
    assert (usual.turned(usual.hu[1], "axial") == hu[1]).all()
    assert (usual.turned(usual.hu[:, 1], "coronal") == hu[::-1, 1]).all(), "the head is up"
    swapped = Geometry((0, 0, 0), (1, 1, 1), (0, 1, 0, 1, 0, 0, 0, 0, 1), hu.shape)
    assert View.of(hu, swapped).flips is None


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(monkeypatch):
    """The command with networks made by hand in place of runs."""
    monkeypatch.setattr(pipeline, "load_detector", lambda options: replace(DETECTOR, threshold=options.threshold))


def call(*arguments):
    return CliRunner().invoke(cli, ["detect", *map(str, arguments)])


def test_exit_codes_say_how_many_scans_failed(by_hand, phantom_root, tmp_path):
    scan = sorted(phantom_root.rglob("*.mhd"))[0]
    bad = write_scan(tmp_path, "bad", GOOD[:3])
    done = call(scan, bad, "--out", tmp_path / "a", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["num_failed"] == 1
    assert "bad.mhd: 3 slices" in done.stderr
    assert call(bad, "--out", tmp_path / "b").exit_code == 1
    done = call(scan, "--out", tmp_path / "c", "--threshold", "0.999")
    assert done.exit_code == 0
    assert "report.html" in done.stdout


def fails_at(number, error):
    """A search whose scan of that number raises an error."""
    search, calls = pipeline._search_one, []

    def one(*given):
        calls.append(given)
        if len(calls) == number:
            raise error
        return search(*given)

    return one


def test_an_interrupt_leaves_the_report_of_the_scans_before(by_hand, phantom_root, tmp_path, monkeypatch):
    scans = sorted(phantom_root.rglob("*.mhd"))[:4]
    monkeypatch.setattr(pipeline, "_search_one", fails_at(3, KeyboardInterrupt()))
    done = call(*scans, "--no-pictures", "--annotations", phantom_root / "annotations.csv", "--out", tmp_path / "a")
    assert done.exit_code == 130
    assert done.stderr == "lunatrain: interrupted: 2 of 4 scans were not searched; the report is of the others\n"
    record = json.loads((tmp_path / "a/findings.json").read_text())
    assert [scan["series_uid"] for scan in record["scans"]] == [path.stem for path in scans[:2]]
    assert record["truth"]["num_scans"] == 2
    assert "interrupted: 2 of 4 scans were not searched" in record["notes"]
    monkeypatch.setattr(pipeline, "_search_one", fails_at(1, KeyboardInterrupt()))
    done = call(*scans, "--out", tmp_path / "b")
    assert (done.exit_code, len(done.stderr.splitlines()), (tmp_path / "b").exists()) == (130, 1, False)


@pytest.mark.parametrize("allocate", [lambda: np.empty(1 << 60, np.int8), lambda: torch.empty(1 << 60)])
def test_a_scan_too_large_for_the_memory_costs_itself_alone(by_hand, phantom_root, tmp_path, monkeypatch, allocate):
    scans = sorted(phantom_root.rglob("*.mhd"))[:2]
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    monkeypatch.setattr(pipeline, "_search_one", fails_at(1, caught.value))
    done = call(*scans, "--no-pictures", "--out", tmp_path / "a")
    assert (done.exit_code, len(done.stderr.splitlines())) == (3, 1)
    assert f"{scans[0].name}: the memory was not enough" in done.stderr
    assert json.loads((tmp_path / "a/findings.json").read_text())["num_failed"] == 1


def test_a_bug_in_one_scan_is_not_hidden(by_hand, phantom_root, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_search_one", fails_at(1, RuntimeError("shapes differ")))
    assert isinstance(call(sorted(phantom_root.rglob("*.mhd"))[0], "--out", tmp_path / "a").exception, RuntimeError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.mhd"], "no such file or folder"),
        (["."], "no scan"),
        (["x.mhd", "--harvest", "h.csv"], "--harvest needs --annotations"),
        (["x.mhd", "--excluded", __file__], "--excluded needs --annotations"),
    ],
)
def test_wrong_usage_is_said_in_a_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_a_run_it_says_how_to_get_one(phantom_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(sorted(phantom_root.rglob("*.mhd"))[0])
    assert done.exit_code == 2
    assert "lunatrain seg" in done.stderr


def test_the_books_weights_make_a_detector(phantom_root, tmp_path):
    from lunatrain.models import build_model

    torch.manual_seed(0)
    torch.save({"model_state": UNet().state_dict()}, tmp_path / "seg.state")
    torch.save({"model_state": build_model("luna").state_dict()}, tmp_path / "cls.state")
    scan = sorted(phantom_root.rglob("*.mhd"))[0]
    done = call(scan, "--seg", tmp_path / "seg.state", "--cls", tmp_path / "cls.state", "--out", tmp_path / "out",
                "--max-candidates", "3")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    record = json.loads((tmp_path / "out/findings.json").read_text())
    assert "seg.state" in record["networks"]["segmentation"]
    assert record["num_candidates"] <= 3


def test_a_wrong_kind_of_network_is_refused(phantom_root, tmp_path):
    torch.save({"model_state": UNet().state_dict()}, tmp_path / "seg.state")
    options = DetectOptions((Path("x"),), seg=tmp_path / "seg.state", cls=tmp_path / "seg.state")
    with pytest.raises(UsageError):
        load_detector(options)


@pytest.mark.shared_data
def test_a_dicom_folder_gives_what_the_mhd_of_the_same_series_gives(shared_data, tmp_path):
    mhd = next((shared_data / "real_ct/subset2").glob("*.mhd"))
    folder = next(path for path in (shared_data / "dicom/lidc").iterdir() if "0002" in path.name)
    tables = [detect([place], tmp_path / str(k)).results[0].table for k, place in enumerate((mhd, folder))]
    assert len(tables[0]) > 5
    pd.testing.assert_frame_equal(*tables, atol=1e-3)
