"""A store built from DICOM: the same crops as from .mhd, kept when nothing changed, bad series named."""

import json
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lunaprep.cli import cli
from lunaprep.parameters import Parameters
from lunaprep.plan import make_plan
from lunaprep.scans.dicom import describe, find_series
from lunaprep.schema import MANIFEST_COLUMNS, SCAN_COLUMNS
from lunaprep.sources.known import SOURCES
from lunaprep.sources.lidc_nodules import place_mask, reader_nodules
from lunaprep.sources.lidc_xml import read_reading
from lunaprep.store.reader import open_store
from lunaprep.store.tables import read_table, table_bytes

from .dicom_files import GAP, ORIGIN, SERIES_UID, SPACING, stored_values, write_series


@pytest.fixture
def folder(tmp_path):
    """A series, one without its third slice, and tables."""
    values = stored_values(shape=(12, 48, 48))
    write_series(tmp_path / "data" / "good", values=values)
    bad = write_series(tmp_path / "data" / "bad", values=values, series_uid=f"{SERIES_UID}.77")
    bad[2].unlink()
    centre = [ORIGIN[0] + 24 * SPACING[1], ORIGIN[1] + 24 * SPACING[0], ORIGIN[2] + 6 * GAP]
    place = ",".join(map(str, centre))
    (tmp_path / "a.csv").write_text(f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{SERIES_UID},{place},6\n")
    (tmp_path / "c.csv").write_text(f"seriesuid,coordX,coordY,coordZ,class\n{SERIES_UID},{place},1\n")
    return tmp_path


def test_a_dicom_folder_is_built_verified_and_kept(folder, run):
    args = ["build", "--source", "dicom", "--data", "data", "--out", "s", "--workers", 1]
    args += ["--candidates", "c.csv", "--annotations", "a.csv", "--json"]
    first = run(args)
    assert first.returncode == 3, first.stderr
    assert "1 missing there" in first.stderr
    scans = pd.read_parquet(folder / "s" / "scans.parquet").set_index("series_uid")
    assert scans["status"].to_dict() == {SERIES_UID: "ok", f"{SERIES_UID}.77": "failed"}
    assert scans.loc[SERIES_UID, "patient_id"] == "P-1"
    assert run(["verify", "s", "--level", "source", "--data", "data"]).returncode == 0
    before = json.loads((folder / "s" / "store.json").read_text())["store_id"]
    again = run(args)
    assert again.returncode == 3
    assert json.loads((folder / "s" / "store.json").read_text())["store_id"] == before
    for path in (folder / "s").rglob("*"):
        if path.is_file():
            assert b"Secret" not in path.read_bytes()


def test_a_changed_slice_is_noticed(folder, run):
    args = ["build", "--source", "dicom", "--data", "data/good", "--out", "s", "--workers", 1]
    args += ["--candidates", "c.csv", "--annotations", "a.csv"]
    assert run(args).returncode == 0
    path = folder / "data" / "good" / "004.dcm"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    report = run(["verify", "s", "--level", "source", "--data", "data/good"])
    assert report.returncode == 4
    assert "changed since" in report.stderr
    assert run(args).returncode == 0
    assert run(["verify", "s", "--level", "source", "--data", "data/good"]).returncode == 0


def test_options_that_a_source_does_not_take(folder, run):
    result = run(["build", "--source", "lidc", "--data", "data", "--out", "s", "--candidates", "c.csv"])
    assert result.returncode == 2
    assert "--candidates is no option of --source lidc" in result.stderr


@pytest.mark.shared_data
def test_crops_from_dicom_equal_those_from_mhd(shared_data, run, tmp_path):
    real, dicom = shared_data / "real_ct", shared_data / "dicom" / "lidc"
    tables = ["--candidates", real / "candidates.csv", "--annotations", real / "annotations.csv"]
    common = ["--workers", 1, "--no-volumes"]
    assert run(["build", "--source", "dicom", "--data", dicom, "--out", "a", *tables, *common]).returncode == 0
    assert run(["build", "--data", real, "--subsets", "1,2", "--out", "b", *common]).returncode == 0
    one, other = (pd.read_parquet(tmp_path / name / "crops.parquet").set_index("candidate_id") for name in "ab")
    assert len(one) == 74
    columns = ["series_uid", "index", "row", "col", "is_nodule", "xxh3"]
    pd.testing.assert_frame_equal(one[columns].sort_index(), other[columns].sort_index())


@pytest.mark.shared_data
def test_masks_of_lidc_are_the_readers_and_verify_holds_them_to_their_own_law(shared_data, run, tmp_path):
    data = shared_data / "dicom" / "lidc"
    args = ["build", "--source", "lidc", "--data", data, "--out", "s", "--workers", 1, "--csv", "csv"]
    assert run(args).returncode == 0
    excluded = pd.read_csv(tmp_path / "csv" / "annotations_excluded.csv")
    assert excluded.columns.tolist() == ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]
    assert (excluded["diameter_mm"] == -1).sum() == 73
    assert pd.read_csv(tmp_path / "csv" / "candidates.csv")["class"].sum() == 1
    assert len(pd.read_csv(tmp_path / "csv" / "annotations.csv")) == 1
    assert len((tmp_path / "csv" / "seriesuids.csv").read_text().split()) == 2
    for level in (["full"], ["source", "--data", data]):
        assert run(["verify", "s", "--level", *level]).returncode == 0
    store = open_store(tmp_path / "s")
    scans = store.scans.set_index("patient_id")
    assert scans["mask_source"].notna().to_dict() == {"LIDC-IDRI-0001": True, "LIDC-IDRI-0002": False}
    assert scans["study_uid"].notna().all()
    mask, _ = store.masks(scans.loc["LIDC-IDRI-0001", "series_uid"])
    (series,) = find_series(data / "LIDC-IDRI-0001").series
    grid = describe(series).geometry
    nodules, _ = reader_nodules(read_reading(data / "LIDC-IDRI-0001" / "69.xml"), grid)
    votes = np.zeros(mask.shape, dtype=int)
    for nodule in nodules:
        first, part = place_mask(nodule, grid)
        votes[tuple(slice(a, a + n) for a, n in zip(first, part.shape, strict=True))] += part
    np.testing.assert_array_equal(mask, votes >= 2)
    assert len(nodules) == 4
    slabs = store.slabs[store.slabs["annotation_id"].notna()]
    for row in slabs.itertuples():
        part = mask[row.index, row.start_row : row.start_row + 96, row.start_col : row.start_col + 96]
        assert part.sum() == row.num_mask_voxels


@pytest.mark.shared_data
def test_lung_pet_ct_dx_is_built_with_subtypes_and_says_that_they_are_all_the_same(shared_data, run, tmp_path):
    data = shared_data / "dicom" / "lung-pet-ct-dx"
    args = ["build", "--source", "lung-pet-ct-dx", "--data", data, "--out", "s", "--workers", 1, "--no-volumes"]
    result = run([*args, "--no-targets"])
    assert result.returncode == 0
    assert "all subtypes are 'A'" in result.stderr
    assert run(["verify", "s", "--level", "source", "--data", data]).returncode == 0
    crops = open_store(tmp_path / "s").manifest
    assert crops["subtype"][crops["is_nodule"]].tolist() == ["A", "A"]
    assert crops["subtype"][~crops["is_nodule"]].isna().all()


def test_verify_knows_what_the_optional_columns_may_hold(folder, run):
    args = ["build", "--source", "dicom", "--data", "data/good", "--out", "s", "--workers", 1, "--no-volumes"]
    assert run([*args, "--candidates", "c.csv", "--annotations", "a.csv"]).returncode == 0
    assert "mask_source" not in pq.read_schema(folder / "s" / "scans.parquet").names
    for name, columns, column in (
        ("scans", SCAN_COLUMNS, "mask_source"),
        ("crops", MANIFEST_COLUMNS, "subtype"),
    ):
        path = folder / "s" / f"{name}.parquet"
        table = read_table(path, columns).assign(annotation_id=pd.array([pd.NA], dtype="Int64"), **{column: "painted"})
        path.write_bytes(table_bytes(table, columns))
    report = run(["verify", "s"])
    assert report.returncode == 4
    assert "mask_source is 'painted'" in report.stderr
    assert "subtype is of a nodule, and it has none" in report.stderr


def test_the_page_on_other_scans_shows_a_source_that_works(tmp_path, phantom_root):
    import SimpleITK

    page = (Path(__file__).parents[1] / "docs" / "other-scans.md").read_text()
    example = re.search(r"\n\n((?: {8}.*\n|\n)+)", page[page.index("1. Write") :])[1]
    names: dict = {}
    exec(textwrap.dedent(example), names)
    path = next(phantom_root.glob("subset*/*.mhd"))
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(tmp_path / f"{path.stem}.nii.gz"))
    shutil.copy(phantom_root / "annotations.csv", tmp_path / "a.csv")
    shutil.copy(phantom_root / "candidates.csv", tmp_path / "c.csv")
    plan = make_plan(names["read_mine"](tmp_path), Parameters())
    assert (plan.num_scans, plan.failed) == (1, ())
    assert len(plan.rows) > 5


def test_every_source_is_a_choice_of_the_command():
    for command in ("build", "verify"):
        (option,) = (item for item in cli.commands[command].params if item.name == "source")
        assert tuple(option.type.choices) == SOURCES
