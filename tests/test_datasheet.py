"""The data sheets, and a download held against one."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lunaprep import download
from lunaprep.datasheet import load_sheet
from lunaprep.download import check_data
from lunaprep.errors import UsageError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
UIDS = [f"1.2.840.{k}" for k in range(10, 16)]
ANNOTATIONS = b"seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.840.10,1,2,3,4\n"
CANDIDATES = b"seriesuid,coordX,coordY,coordZ,class\n1.2.840.10,1,2,3,1\n1.2.840.11,1,2,3,0\n"
SERIES = "".join(f"{uid}\n" for uid in UIDS).encode()

SHEET = {
    "dataset": {"name": "tiny", "title": "Tiny"},
    "counts": {"series": 6, "subsets": [3, 2, 1], "slices": 12, "flipped": 2},
    "tables": {"needed": ["annotations", "candidates"], "csv_folders": ["", "more"]},
    "files": [
        {
            "name": "annotations.csv",
            "role": "annotations",
            "rows": 1,
            "sha256": hashlib.sha256(ANNOTATIONS).hexdigest(),
        },
        {"name": "candidates_V2.csv", "role": "candidates", "rows": 3},
        {"name": "candidates.csv", "role": "candidates", "rows": 2, "positives": 1},
        {"name": "excluded.csv", "role": "excluded", "rows": 0},
        {"name": "seriesuids.csv", "role": "series", "rows": 6, "header": False},
    ],
    "patients": {"P-1": [UIDS[0], UIDS[1]]},
    "flipped": {"certain": [UIDS[0]], "possible": [UIDS[1]]},
}


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A complete copy of the tiny data set."""
    monkeypatch.setattr(download, "load_sheet", lambda name: SHEET)
    for k, uid in enumerate(UIDS):
        write_scan(tmp_path / f"subset{[0, 0, 0, 1, 1, 2][k]}", uid, is_flipped=k < 2)
    (tmp_path / "annotations.csv").write_bytes(ANNOTATIONS)
    (tmp_path / "candidates.csv").write_bytes(CANDIDATES)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/seriesuids.csv").write_bytes(SERIES)
    (tmp_path / "more/excluded.csv").write_bytes(b"seriesuid\n")
    return tmp_path


def write_scan(folder: Path, uid: str, is_flipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.arange(2 * 4 * 4, dtype="<i2").tofile(folder / f"{uid}.raw")
    sign = "-1 0 0 0 -1 0 0 0 1" if is_flipped else "1 0 0 0 1 0 0 0 1"
    (folder / f"{uid}.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        f"TransformMatrix = {sign}\nOffset = 0 0 0\nCenterOfRotation = 0 0 0\nAnatomicalOrientation = RAI\n"
        f"ElementSpacing = 1 1 2\nDimSize = 4 4 2\nElementType = MET_SHORT\nElementDataFile = {uid}.raw\n"
    )


def found(report: download.DataReport) -> set[tuple[str, str]]:
    return {(finding.code, finding.severity) for finding in report.findings}


def test_complete_copy(copy):
    report = check_data(copy, "tiny")
    assert report.ok
    assert report.findings == ()
    assert report.account() == "6 of 6 scans: all there"
    assert [(s.found, s.expected) for s in report.subsets] == [(3, 3), (2, 2), (1, 1)]
    assert report.flipped == tuple(UIDS[:2])
    assert "2 flipped scans, 2 of them named in the sheet (2 in a complete copy)" in report.notes
    assert f"patient P-1 has 2 scans: {UIDS[0]}, {UIDS[1]}" in report.notes
    assert "12 slices; 12 in a complete copy" in report.notes
    assert "annotations.csv: 1 rows, as published" in report.text()
    assert json.loads(json.dumps(report.to_json()))["data"]["ok"] is True


def test_missing_scan_is_counted_and_named(copy):
    (copy / f"subset1/{UIDS[3]}.mhd").unlink()
    report = check_data(copy, "tiny")
    assert not report.ok
    assert report.account() == "5 of 6 scans: 1 missing (subset1: 1 of 2)"
    assert report.missing == (UIDS[3],)
    assert f"not on disk: {UIDS[3]}" in report.text()
    assert found(report) == {("subset-incomplete", "error"), ("series-missing", "warning")}


def test_missing_subset_is_a_warning(copy):
    for path in (copy / "subset2").iterdir():
        path.unlink()
    (copy / "subset2").rmdir()
    report = check_data(copy, "tiny")
    assert report.ok
    assert report.account() == "5 of 6 scans: 1 missing (no subset 2)"
    assert ("subset-missing", "warning") in found(report)


def test_unreadable_scans(copy):
    (copy / f"subset0/{UIDS[0]}.raw").write_bytes(b"short")
    (copy / f"subset0/{UIDS[2]}.mhd").write_text("nonsense")
    report = check_data(copy, "tiny")
    assert report.account() == "6 of 6 scans: 2 unreadable"
    bad = [finding for finding in report.findings if finding.code == "scan-unreadable"]
    assert [finding.series_uid for finding in bad] == [UIDS[0], UIDS[2]]
    assert all("\n" not in finding.line() for finding in bad)


def test_duplicate_and_foreign_series(copy):
    write_scan(copy / "subset1", UIDS[0], is_flipped=True)
    write_scan(copy / "subset7", "1.2.3")
    report = check_data(copy, "tiny")
    codes = {finding.code: finding for finding in report.findings}
    assert codes["duplicate-series"].series_uid == UIDS[0]
    assert f"subset0/{UIDS[0]}.mhd, subset1/{UIDS[0]}.mhd" in codes["duplicate-series"].message
    assert codes["subset-incomplete"].place == "subset1"
    assert codes["series-unknown"].series_uid == "1.2.3"
    assert codes["subset-unknown"].place == "subset7"


def test_flips_that_differ(copy):
    write_scan(copy / "subset0", UIDS[0], is_flipped=False)
    report = check_data(copy, "tiny")
    assert report.ok
    assert [(f.code, f.series_uid) for f in report.findings] == [("flip-differs", UIDS[0]), ("flip-differs", None)]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("annotations.csv", ANNOTATIONS.replace(b"4\n", b"5\n"), ("table-differs", "error")),
        ("annotations.csv", ANNOTATIONS + b"x\n", ("table-differs", "error")),
        ("annotations.csv", None, ("table-missing", "error")),
        ("candidates.csv", CANDIDATES.replace(b",0\n", b",1\n"), ("table-differs", "error")),
        ("candidates.csv", None, ("table-missing", "error")),
        ("more/excluded.csv", None, ("table-missing", "warning")),
    ],
)
def test_tables_that_differ(copy, name, content, code):
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    assert found(check_data(copy, "tiny")) == {code}


def test_line_ends_do_not_matter(copy):
    (copy / "annotations.csv").write_bytes(ANNOTATIONS.replace(b"\n", b"\r\n"))
    assert check_data(copy, "tiny").findings == ()


def test_unknown_sheet_and_folder(tmp_path):
    with pytest.raises(UsageError, match=r"no data sheet 'luna17'; there are: .*luna16"):
        load_sheet("luna17")
    with pytest.raises(UsageError, match="no such folder"):
        check_data(tmp_path / "none")


def test_luna16_sheet_is_consistent():
    sheet = load_sheet("luna16")
    counts = sheet["counts"]
    assert sum(counts["subsets"]) == counts["series"] == 888
    two = [uid for uids in sheet["patients"].values() for uid in uids]
    assert counts["patients"] + len(two) - len(sheet["patients"]) == counts["series"]
    flipped = [uid for group in ("certain", "likely") for uid in sheet["flipped"][group]]
    assert len(set(flipped)) == 11 < counts["flipped"]
    assert all(len(entry["sha256"]) == 64 for entry in sheet["files"] if "sha256" in entry)
    assert sheet["dataset"]["licence"].startswith("CC BY 4.0")


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "luna16_csv").is_dir(), reason="needs the published tables")
def test_published_tables_are_known():
    sheet, folder = load_sheet("luna16"), SHARED / "luna16_csv"
    report = check_data(folder)
    tables = {table.name: table for table in report.tables}
    for name in ("annotations.csv", "annotations_excluded.csv", "seriesuids.csv"):
        assert tables[name].is_known
        assert tables[name].rows == tables[name].expected_rows
    listed = set((folder / "seriesuids.csv").read_text().split())
    named = [uid for group in (sheet["patients"], sheet["flipped"]) for uids in group.values() for uid in uids]
    assert set(named) <= listed
    assert len(report.missing) == 888
    assert report.account() == "0 of 888 scans: 888 missing (no subset 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"
    patients: dict[str, list[str]] = {}
    for line in (folder / "luna16_series_to_lidc_patient.csv").read_text().split()[1:]:
        patients.setdefault(line.split(",")[1], []).append(line.split(",")[0])
    assert {patient: uids for patient, uids in patients.items() if len(uids) > 1} == sheet["patients"]


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "real_ct").is_dir(), reason="needs the real scans")
def test_other_data_is_told_apart():
    report = check_data(SHARED / "real_ct")
    assert not report.ok
    assert report.found == 3
    assert not [finding for finding in report.findings if finding.code == "scan-unreadable"]
    assert {f.code for f in report.findings} >= {"subset-incomplete", "table-differs"}
