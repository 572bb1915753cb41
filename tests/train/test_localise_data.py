"""Lung boxes from a table and DICOM slices; runs judged together; the detector bounded; the commands."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lunaprep.errors import ScanError
from lunaprep.geometry import Geometry
from lunaprep.scans.dicom_pixels import read_slice
from lunatrain.box_slices import picture_of
from lunatrain.box_table import read_box_table, read_csv_slices
from lunatrain.boxes import iou
from lunatrain.checkpoint import save_checkpoint
from lunatrain.cli import cli
from lunatrain.detect import pipeline
from lunatrain.detect.bounding import Bounding, load_bounding, union_of
from lunatrain.detect.grouping import GroupingOptions
from lunatrain.detect.loading import DetectOptions, Detector
from lunatrain.detect.reading import find_inputs
from lunatrain.detect.segmenting import Lungs
from lunatrain.errors import TableError, UsageError
from lunatrain.localisation import load_localiser, open_training
from lunatrain.localisation_config import LocConfig
from lunatrain.models.boxnet import build_boxnet
from lunatrain.training import TrainOptions

from ..dicom_files import save, slice_dataset
from .detect_phantom import Blobs, bright

CPU = torch.device("cpu")
HEADER = "Image,Xmin,Ymin,Xmax,Ymax\n"


def invoke(*args):
    return CliRunner().invoke(cli, [*map(str, args)])


def fixed_run(folder: Path, box, side: int = 32, split: str = "series", name: str = "resnet") -> Path:
    """A run whose network gives one box, whatever it sees."""
    torch.manual_seed(0)
    model = build_boxnet(name)
    model.head.begin_with(box)
    config = LocConfig(side=side, model=name, split=split)
    state = {
        "model_args": {"name": name, "kind": "boxes", "side": side},
        "model": model.state_dict(),
        "config": config.to_json(),
        "store_id": "?",
    }
    save_checkpoint(folder / "best.pt", state)
    return folder


@pytest.fixture(scope="module")
def dicom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve slices of three patients, a bright square on air in each, and a table of their boxes."""
    folder = tmp_path_factory.mktemp("slices")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        values = np.full((40, 40), 24, dtype=np.int16)
        top, left = rng.integers(2, 20, 2)
        values[top : top + 15, left : left + 12] = 1124
        ds = slice_dataset(number, values, series_uid=f"1.2.{number % 3 + 1}")
        ds.PatientID = f"P-{number % 3}"
        save(ds, folder / f"slice{number}.dcm")
        name = f"slice{number}" if number % 2 else f"slice{number}.dcm"
        rows.append(f"{name},{left / 40},{top / 40},{(left + 12) / 40},{(top + 15) / 40}\n")
    rows[5] = "slice5,,,,\n"
    (folder / "boxes.csv").write_text(HEADER + "".join(rows))
    return folder


# --- the table


def test_one_slice_is_read_as_its_series_is(dicom_folder):
    hu, header = read_slice(dicom_folder / "slice0.dcm", dicom_folder)
    assert (hu.shape, header.patient_id) == ((40, 40), "P-0")
    assert set(np.unique(hu).tolist()) == {24 - 1024, 1124 - 1024}
    with pytest.raises(ScanError, match="no DICOM image"):
        read_slice(dicom_folder / "boxes.csv", dicom_folder)


def test_boxes_and_slices_of_a_table(dicom_folder):
    slices = read_csv_slices(dicom_folder / "boxes.csv", dicom_folder, 40)
    assert (len(slices), slices.num_without) == (11, 1)
    for picture, box in zip(slices.pictures, slices.boxes, strict=True):
        rows, cols = np.nonzero(picture > 128)
        sides = np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]) / 40
        np.testing.assert_allclose(box, sides, atol=1e-6)
    part = slices.table.groupby("series_uid")["split_series"].unique().map(list).to_dict()
    assert part == {"1.2.1": ["val"], "1.2.2": ["train"], "1.2.3": ["train"]}


BAD_ROWS = {
    "slice0,0.5,0.1,0.4,0.9": r"line 3: got Xmin '0.5', .* Xmax '0.4'.*; expected .* Xmin < Xmax",
    "slice0,0.1,0.1,0.4,1.2": "line 3: .*'1.2'; expected fractions from 0 to 1",
    "slice0,0.1,0.1,0.4,high": "line 3: .*'high'",
    "slice0,0.1,0.1,0.4": "line 3: .*Ymax ''",
    "slice0,0.1,nan,0.4,0.9": "line 3: .*'nan'",
    "slice99,0.1,0.1,0.4,0.9": "line 3: got Image 'slice99', expected the name of a DICOM file",
    ",0.1,0.1,0.4,0.9": "line 3: got Image ''",
    "../slice0.dcm,0.1,0.1,0.4,0.9": "line 3: .*leads out of",
    "slice1.dcm,0.1,0.1,0.4,0.9": "line 3: slice1.dcm is on line 2 already",
}


@pytest.mark.parametrize(("row", "words"), BAD_ROWS.items())
def test_a_bad_row_is_named_by_its_line(dicom_folder, tmp_path, row, words):
    folder = dicom_folder / "inner" if row.startswith("..") else dicom_folder
    folder.mkdir(exist_ok=True)
    (tmp_path / "bad.csv").write_text(f"{HEADER}slice1,0.1,0.1,0.4,0.9\n{row}\n")
    if row.startswith(".."):
        (folder / "slice1.dcm").write_bytes(b"")
    with pytest.raises(TableError, match=words) as found:
        read_box_table(tmp_path / "bad.csv", folder)
    assert "\n" not in str(found.value)


def test_a_bad_table_is_named(dicom_folder, tmp_path):
    for text, words in (
        ("Image,Xmin,Ymin,Xmax\n", "no Ymax"),
        ("", "no Image"),
        (HEADER, "no box in 0 rows"),
        (f"{HEADER}slice1,,,,\n", "no box in 1 rows"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(TableError, match=words):
            read_box_table(tmp_path / "bad.csv", dicom_folder)
    (tmp_path / "bad.csv").write_bytes(HEADER.encode() + b"\xff\xfe,1\n")
    with pytest.raises(TableError, match="cannot be read as CSV"):
        read_box_table(tmp_path / "bad.csv", dicom_folder)


def test_a_run_on_a_table_is_resumed_with_it(dicom_folder, tmp_path):
    run = tmp_path / "run"
    options = ["--boxes", dicom_folder / "boxes.csv", "--side", "32", "--batch-size", "4", "--out", run]
    done = invoke("loc", *options, "--epochs", "1", "--model", "depthwise", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "11 slices of 3 series, 7 to learn and 4 to be judged on; 1 without lung left out" in done.stderr
    assert "iou_mean_box" in done.stdout
    done = invoke("loc", "--resume", "--out", run)
    assert done.exit_code == 0, done.output
    assert "going on at epoch 2" in done.stderr


def test_slices_of_one_patient_cannot_be_held_out(dicom_folder, tmp_path):
    lines = (dicom_folder / "boxes.csv").read_text().splitlines()
    (tmp_path / "one.csv").write_text("\n".join([lines[0], lines[1], lines[4]]))
    options = TrainOptions(tmp_path / "one.csv", tmp_path / "run", "cpu", slices=dicom_folder)
    with pytest.raises(UsageError, match="--split all"):
        open_training(options, LocConfig(side=32))
    assert len(open_training(options, LocConfig(side=32, split="all")).run.task.val_rows) == 2


# --- runs judged together


def test_eval_tells_each_run_and_their_mean(loc_store, tmp_path):
    boxes = [[0.1, 0.2, 0.9, 0.8], [0.3, 0.4, 0.7, 0.8]]
    runs = [fixed_run(tmp_path / name, box) for name, box in zip("ab", boxes, strict=True)]
    done = invoke("eval", *runs, "--store", loc_store, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    table = np.genfromtxt(tmp_path / "a" / "eval-series-val" / "predictions.csv", delimiter=",", names=True, dtype=None)
    found = np.stack([table[name] for name in ("Xmin", "Ymin", "Xmax", "Ymax")], axis=1)
    true = np.stack([table[f"true_{name}"] for name in ("Xmin", "Ymin", "Xmax", "Ymax")], axis=1)
    np.testing.assert_allclose(found, np.tile(np.mean(boxes, axis=0), (len(true), 1)), atol=1e-5)
    assert figures["iou"] == pytest.approx(iou(found, true).mean(), abs=1e-4)
    for item, box in zip(figures["runs"], boxes, strict=True):
        assert item["iou"] == pytest.approx(iou(np.tile(box, (len(true), 1)), true).mean(), abs=1e-4)
    assert figures["num_slices"] == len(true)
    assert any("other data" in note for note in figures["notes"])
    assert not any("trained on split" in note for note in figures["notes"])
    assert (tmp_path / "a" / "eval-series-val" / "boxes.png").read_bytes().startswith(b"\x89PNG")
    text = invoke("eval", *runs, "--store", loc_store).stdout
    for words in ("their mean", "mean training box", "5th percentile", "boxes.png"):
        assert words in text
    figures = json.loads(invoke("eval", *runs, "--store", loc_store, "--split", "all", "--json").stdout)
    assert any("trained on split series: crops judged here" in note for note in figures["notes"])


def test_runs_that_do_not_go_together_are_named(loc_store, tmp_path):
    runs = [fixed_run(tmp_path / name, [0.1, 0.1, 0.9, 0.9], split=f"fold:{name}") for name in "01"]
    done = invoke("eval", *runs, "--store", loc_store)
    assert (done.exit_code, "splits fold:0 and fold:1" in done.stderr) == (2, True)
    save_checkpoint(tmp_path / "cls" / "best.pt", {"model_args": {"name": "luna", "crop_shape": [1]}, "model": {}})
    done = invoke("eval", tmp_path / "cls", *runs)
    assert (done.exit_code, "several runs are judged together of 'loc' alone" in done.stderr) == (2, True)
    done = invoke("eval", runs[0], tmp_path / "cls", "--store", loc_store)
    assert (done.exit_code, "gives no lung boxes" in done.stderr) == (1, True)
    done = invoke("eval", runs[0], "--store", loc_store, "--target", "nodule")
    assert (done.exit_code, "--target is for classifiers" in done.stderr) == (2, True)
    done = invoke("loc", "--store", loc_store, "--boxes", loc_store / "store.json")
    assert (done.exit_code, "choose one of them" in done.stderr) == (2, True)


# --- the detector


def test_one_wild_slice_does_not_count():
    boxes = np.tile([0.2, 0.3, 0.8, 0.7], (9, 1))
    boxes[4] = [0, 0, 1, 1]
    assert union_of(boxes) == pytest.approx([0.2, 0.3, 0.8, 0.7])
    boxes[5] = [0.1, 0, 0.9, 1]  # two beside each other are no whim
    assert union_of(boxes) == pytest.approx([0.1, 0, 0.9, 1])
    assert union_of(boxes[:2]) == pytest.approx([0.2, 0.3, 0.8, 0.7])


def lungs_at(rows: slice, cols: slice) -> Lungs:
    near = np.zeros((4, 60, 80), dtype=bool)
    near[:, rows, cols] = True
    return Lungs((2, 10, 5), near, 100.0, ())


def test_the_box_and_its_margin_in_pixels(tmp_path):
    run = fixed_run(tmp_path, [0.205, 0.255, 0.595, 0.495])
    geometry = Geometry((0.0, 0.0, 0.0), (2.0, 1.0, 5.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), (8, 100, 100))
    hu = np.zeros((8, 100, 100), dtype=np.int16)
    lungs, bounds = load_bounding([run, run], 10.0, CPU).bound(hu, geometry, lungs_at(slice(10, 40), slice(20, 50)))
    assert (bounds.rows, bounds.cols) == ((15, 60), (15, 65))  # 10 mm are ten rows, five columns
    assert bounds.share_of_scan == pytest.approx(0.45 * 0.5)
    assert (bounds.is_used, bounds.left_out, lungs.near.sum()) == (True, 0, 4 * 30 * 30)
    whole = lungs_at(slice(0, 40), slice(20, 50))
    kept, bounds = load_bounding([run], 0.0, CPU).bound(hu, geometry, whole)
    assert not bounds.is_used
    assert kept is whole
    assert bounds.left_out == pytest.approx(1 - 25 / 40)  # of the lungs' rows 10 to 50 those before 25
    assert "would leave out" in bounds.note


DETECTOR = Detector(Blobs(), bright(), grouping=GroupingOptions(limit=20))


@pytest.mark.parametrize("box", [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.2, 0.2]])
def test_findings_are_the_same_inside_a_box(phantom_root, tmp_path, box):
    """A box that holds the lungs changes nothing, and one that does not is not used."""
    places = sorted(phantom_root.rglob("*.mhd"))[:2]
    bounded = replace(DETECTOR, bounding=Bounding((load_localiser(fixed_run(tmp_path, box), CPU),), CPU, 0.0))
    done = []
    for name, detector in (("plain", DETECTOR), ("bounded", bounded)):
        searched = pipeline.search(find_inputs(places), detector, pictures=False)
        done.append(pipeline.report(searched, detector, DetectOptions(tuple(places), out=tmp_path / name)))
    tables = [(tmp_path / name / "findings.csv").read_bytes() for name in ("plain", "bounded")]
    assert tables[0] == tables[1]
    assert tables[0].count(b"\n") > 10
    for scan in json.loads((tmp_path / "bounded" / "findings.json").read_text())["scans"]:
        assert scan["searched_box"]["is_used"] == (box[2] > 0.9)
        assert any("the box of --loc" in note for note in scan["notes"])
    assert all(scan["searched_box"] is None for scan in done[0].record["scans"])


def test_detect_wants_a_run_of_loc(phantom_root, loc_store, tmp_path):
    save_checkpoint(tmp_path / "cls.pt", {"model_args": {"name": "luna", "crop_shape": [1]}, "model": {}})
    with pytest.raises(ValueError, match="gives no lung boxes"):
        load_bounding([tmp_path / "cls.pt"], 15.0, CPU)
    assert load_bounding([], 15.0, CPU) is None
    assert "--loc-margin" in invoke("detect", "--help").stdout


def test_pictures_of_a_table_are_those_of_its_slices(dicom_folder):
    slices = read_csv_slices(dicom_folder / "boxes.csv", dicom_folder, 20)
    hu, _ = read_slice(dicom_folder / "slice0.dcm", dicom_folder)
    assert np.array_equal(slices.pictures[0], picture_of(hu[None], 20)[0])
