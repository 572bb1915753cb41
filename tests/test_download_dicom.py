"""DICOM downloads held against their data sheets."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from lunaprep import download_dicom
from lunaprep.cli import cli
from lunaprep.download import source_of
from lunaprep.download_dicom import check_dicom
from lunaprep.errors import UsageError
from lunaprep.sources.advice import looks_like_dicom

from .dicom_files import SERIES_UID, write_series
from .test_dicom_folders import box_file

OTHER = "1.2.826.0.1.3680043.10.1.2"
SHEET = {
    "dataset": {"title": "Tiny"},
    "counts": {"series": 3, "slices": 20, "outlined": 5},
    "layout": {"patient_id": "P-[0-9]+"},
    "refused": {"patients": ["P-9"]},
    "patients": {"P-1": [SERIES_UID, OTHER]},
}


def rename(patient: str):
    def edit(ds, _number):
        ds.PatientID = patient

    return edit


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two series of one patient, six slices each."""
    monkeypatch.setattr(download_dicom, "load_sheet", lambda name: SHEET)
    write_series(tmp_path / "a")
    write_series(tmp_path / "b", series_uid=OTHER)
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_what_is_there_is_counted_and_what_is_not_is_no_fault(folder):
    report = check_dicom(folder, "dicom")
    assert (report.ok, report.account()) == (True, "2 series, 1 patient, 12 slices")
    report = check_dicom(folder, "lidc")
    assert report.account() == "2 of 3 series, 1 patient, 12 of 20 slices"
    assert report.notes == ("patient P-1 has 2 scans here", "0 of 2 usable series have readings")
    assert {(f.code, f.severity) for f in report.findings} == {("reading-missing", "warning")}
    assert report.ok


def test_a_series_that_cannot_be_used_is_named_unless_the_sheet_knows_of_it(folder):
    (folder / "b/003.dcm").unlink()
    report = check_dicom(folder, "dicom")
    (finding,) = report.findings
    assert (report.ok, report.unreadable, finding.code, finding.place) == (False, 1, "scan-unreadable", "b")
    assert "1 missing there" in finding.message
    assert report.account().endswith("6 slices; 1 cannot be used")
    shutil.rmtree(folder / "b")
    write_series(folder / "b", series_uid=OTHER, edit=rename("P-9"))
    (folder / "b/003.dcm").unlink()
    assert [f.severity for f in check_dicom(folder, "lidc").findings if f.code == "scan-unreadable"] == ["warning"]


def test_damaged_files_without_a_series_are_named_too(folder):
    (folder / "c").mkdir()
    (folder / "c/cut.dcm").write_bytes((folder / "a/000.dcm").read_bytes()[:300])
    report = check_dicom(folder, "dicom")
    assert [(f.code, "cut.dcm" in f.message) for f in report.findings] == [("file-unreadable", True)]


def test_another_data_set_is_told(folder):
    write_series(folder / "b", series_uid=OTHER, edit=rename("Someone"))
    found = [f for f in check_dicom(folder, "lidc").findings if f.code == "series-unknown"]
    assert [(f.place, "patient 'Someone', expected P-[0-9]+" in f.message) for f in found] == [("b", True)]


def test_boxes_that_are_missing_damaged_or_of_other_scans(folder):
    assert {f.code for f in check_dicom(folder, "lung-pet-ct-dx").findings} == {"boxes-missing"}
    (folder / f"{SERIES_UID}.99.xml").write_text("<annotation>")
    assert {f.code for f in check_dicom(folder, "lung-pet-ct-dx").findings} == {"boxes-missing", "boxes-unreadable"}
    (folder / f"{SERIES_UID}.99.xml").unlink()
    box_file(folder, 98, (1, 4), (1, 4))
    assert {f.code for f in check_dicom(folder, "lung-pet-ct-dx").findings} == {"boxes-unknown"}
    box_file(folder, 2, (1, 4), (1, 4))
    report = check_dicom(folder, "lung-pet-ct-dx")
    assert report.ok
    assert report.notes[-1] == "2 box files, on slices of 1 of 2 usable series; 1 match no slice that is here"


def test_the_source_follows_from_the_store_or_the_folder_or_must_be_said(folder, phantom_root, tmp_path):
    assert source_of(phantom_root, None) == "luna16"
    assert looks_like_dicom(folder)
    assert not looks_like_dicom(phantom_root)
    with pytest.raises(UsageError, match=r"holds DICOM files and no subset0 .*--source lidc"):
        source_of(folder, None)
    for roles, expected in (((), "dicom"), (("boxes",), "lung-pet-ct-dx"), (("readings",), "lidc")):
        record = tmp_path / "-".join(("s", *roles))
        record.mkdir()
        write_record(record, roles)
        assert source_of(folder, record) == expected
    (record / "store.json").write_text("{")
    with pytest.raises(UsageError, match="--source"):
        source_of(folder, record)


def write_record(folder: Path, roles) -> None:
    from lunaprep.store.record import make_record

    content = {
        "store_id": "0" * 16,
        "parameters": {},
        "inputs": [{"role": role, "file": "*.xml", "bytes": 0, "sha256": "0" * 64} for role in roles],
        "counts": {"crops": 0},
        "crops": {"shape": [0, 8, 8, 8], "dtype": "int16"},
        "shards": [],
        "files": [],
    }
    (folder / "store.json").write_bytes(make_record(content))


def test_the_command(folder, tmp_path):
    assert run("--data", folder).exit_code == 2
    done = run("--data", folder, "--source", "dicom")
    assert (done.exit_code, done.stdout.splitlines()[1]) == (0, "2 series, 1 patient, 12 slices")
    value = json.loads(run("--data", folder, "--source", "lidc", "--json").stdout)
    assert (value["ok"], value["data"]["found"], value["data"]["expected"]) == (True, 2, 3)
    (folder / "b/003.dcm").unlink()
    assert run("--data", folder, "--source", "dicom").exit_code == 4
    (tmp_path / "empty").mkdir()
    assert run("--data", tmp_path / "empty", "--source", "dicom").exit_code == 2


def test_real_downloads(shared_data):
    report = check_dicom(shared_data / "dicom/lidc", "lidc")
    assert report.account() == "2 of 1,018 series, 2 of 1,010 patients, 28 of 243,945 slices"
    assert report.findings == ()
    report = check_dicom(shared_data / "dicom/lung-pet-ct-dx", "lung-pet-ct-dx")
    assert report.account() == "2 series, 1 of 355 patients, 128 slices"
    assert report.findings == ()
