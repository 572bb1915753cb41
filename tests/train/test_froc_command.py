"""`lunatrain froc` as a user types it: the table, the files, and a clear line for each known trap."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from lunatrain.cli import cli

HEADER = "seriesuid,coordX,coordY,coordZ,"
UIDS = [f"{k:03d}" for k in range(1, 21)]
FIGURES = ("cpm", "cpm_low", "cpm_high", "num_scans", "num_nodules", "marks_read", "false_positives", "nodules_missed")

Froc = Callable[..., Result]


def lines(*rows: str) -> str:
    return "\n".join(rows) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty scans with a nodule each, a mark on each nodule, an excluded finding in the first scan."""
    (tmp_path / "seriesuids.csv").write_text(lines(*UIDS))
    (tmp_path / "annotations.csv").write_text(lines(f"{HEADER}diameter_mm", *(f"{uid},1,2,3,6" for uid in UIDS)))
    (tmp_path / "excluded.csv").write_text(lines(f"{HEADER}diameter_mm", "001,50,50,50,-1"))
    marks = [f"{uid},1,2,{3 + k / 10},{1 - k / 20}" for k, uid in enumerate(UIDS)]
    (tmp_path / "marks.csv").write_text(lines(f"{HEADER}probability", *marks, "001,50,50,50,0.99", "002,90,90,90,0.45"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TABLES = ["--annotations", "annotations.csv", "--seriesuids", "seriesuids.csv", "--excluded", "excluded.csv"]


@pytest.fixture
def froc(folder: Path) -> Froc:
    def call(*args: str, tables: list[str] = TABLES, draws: int = 10) -> Result:
        return CliRunner().invoke(cli, ["froc", "marks.csv", *tables, "--bootstrap", str(draws), *args])

    return call


def complaint(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("lunatrain: ")
    return result.stderr


def warning(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("lunatrain: warning: ")
    return result.stderr


def change(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def test_help_ends_with_an_example_and_imports_nothing_heavy() -> None:
    for args in ([], ["froc"]):
        text = CliRunner().invoke(cli, [*args, "--help"]).stdout
        assert "\n  Example:\n" in text
        assert "lunatrain froc" in text.split("Example:")[1]
    code = "import sys; sys.argv = ['lunatrain', '--help']\nfrom lunatrain.cli import main\ntry: main()\n"
    code += "except SystemExit: pass\n"
    code += "heavy = {'numpy', 'pandas', 'torch', 'matplotlib', 'pyarrow', 'tqdm', 'sklearn'}\n"
    code += "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_scoring_needs_neither_scikit_learn_nor_torch_nor_matplotlib(folder: Path) -> None:
    code = "import sys\nfor name in ('sklearn', 'torch', 'matplotlib', 'h5py'): sys.modules[name] = None\n"
    code += f"sys.argv = ['lunatrain', 'froc', 'marks.csv', *{TABLES}]\nfrom lunatrain.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CPM" in done.stdout


def test_the_table_names_the_rates_the_interval_and_what_became_of_the_marks(froc: Froc) -> None:
    result = froc()
    assert (result.exit_code, result.stderr) == (0, "")
    assert "20 scans, 20 nodules, 1 excluded findings" in result.stdout
    assert "CPM" in result.stdout
    assert " to 1.0000" in result.stdout
    assert "22 read, 0 beyond 100 a scan" in result.stdout
    assert "20 hit, 0 hit what was found already, 1 on excluded findings, 1 false positives" in result.stdout
    assert "95 %" not in froc(draws=0).stdout


def test_json_is_one_flat_object(froc: Froc) -> None:
    figures = json.loads(froc("--json").stdout)
    assert set(FIGURES) <= set(figures)
    assert figures["fp_per_scan"] == [0.125, 0.25, 0.5, 1, 2, 4, 8]
    assert np.mean(figures["sensitivity_at"]) == pytest.approx(figures["cpm"], abs=1e-12)
    assert (figures["num_scans"], figures["false_positives"], figures["warnings"]) == (20, 1, [])
    assert not any(isinstance(value, dict) for value in figures.values())
    assert json.loads(froc("--json", draws=0).stdout)["cpm_low"] is None


def test_out_holds_the_curve_the_verdicts_and_what_was_missed(froc: Froc, folder: Path) -> None:
    change("marks.csv", "020,1,2,4.9,0.05", "020,1,2,40,0.05")
    assert froc("--out", "result").exit_code == 0
    out = folder / "result"
    assert {path.name for path in out.iterdir()} == {
        "froc.png", "froc.csv", "froc_interval.csv", "missed.csv", "marks.csv",
    }  # fmt: skip
    picture = (out / "froc.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    marks = pd.read_csv(out / "marks.csv", dtype={"seriesuid": str})
    assert [*marks] == [*(HEADER + "probability").split(","), "verdict", "annotation"]
    assert marks["verdict"].value_counts().to_dict() == {"hit": 19, "false_positive": 2, "on_excluded": 1}
    missed = pd.read_csv(out / "missed.csv", dtype={"seriesuid": str})
    assert missed["seriesuid"].tolist() == ["020"]
    curve = pd.read_csv(out / "froc.csv")
    assert curve["sensitivity"].iloc[-1] == pytest.approx(19 / 20)
    assert froc("--out", "result").exit_code == 0
    assert (out / "froc.png").read_bytes() == picture


def test_files_of_other_systems_are_read(froc: Froc) -> None:
    expected = froc().stdout
    for name in ("marks.csv", "annotations.csv", "excluded.csv", "seriesuids.csv"):
        text = Path(name).read_text().replace(",", ", ").replace("\n", "\r\n\r\n")
        Path(name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    change("seriesuids.csv", "001", "seriesuid\n001")
    assert froc().stdout == expected


def test_more_columns_in_any_order_are_read(froc: Froc) -> None:
    expected = froc("--json").stdout
    table = pd.read_csv("marks.csv", dtype=str).assign(malignancy="x")
    table[[*reversed(table.columns)]].to_csv("marks.csv", index=False)
    assert froc("--json").stdout == expected


# ---- the traps


def test_a_missing_excluded_file_is_refused_and_can_be_insisted_on(froc: Froc) -> None:
    assert "--no-excluded" in complaint(froc(tables=TABLES[:4]), 2)
    result = froc("--no-excluded", "--json", tables=TABLES[:4])
    assert json.loads(result.stdout)["false_positives"] == 2
    assert "choose one" in complaint(froc("--no-excluded"), 2)


@pytest.mark.parametrize(("old", "new"), [("\n0", "\n"), ("\n0", "\n0.")])
def test_ids_read_as_numbers_are_named(froc: Froc, old: str, new: str) -> None:
    change("marks.csv", old, new)
    text = complaint(froc(), 2)
    assert "none of the marks is in a listed scan" in text
    assert "listed is '001'" in text
    assert ("read as numbers" in text) == (new == "\n")


def test_ids_with_a_file_ending_are_named(froc: Froc) -> None:
    change("marks.csv", ",1,2,", ".mhd,1,2,")
    assert "file names: leave folder and ending away" in froc().stderr


def test_marks_of_scans_that_are_not_listed_are_left_out_and_counted(froc: Froc) -> None:
    change("marks.csv", "002,90,90,90,0.45", "2.0,90,90,90,0.45\nabc,0,0,0,1")
    text = warning(froc())
    assert "2 marks of 2 scans that are not listed are left out, such as '2.0'" in text
    assert "read as numbers" in text


def test_one_fold_held_against_all_scans_is_noticed(froc: Froc) -> None:
    Path("marks.csv").write_text(lines(f"{HEADER}probability", "001,1,2,3,0.9", "002,1,2,3,0.8"))
    assert "marks in 2 of 20 scans: looks like one fold" in warning(froc())
    Path("marks.csv").write_text(lines(f"{HEADER}probability", *(f"{uid},1,2,3,0.9" for uid in UIDS[:8])))
    assert "looks like a part of the folds" in warning(froc())


def test_one_fold_with_its_own_scans_needs_no_other_annotations(froc: Froc) -> None:
    Path("seriesuids.csv").write_text(lines(*UIDS[:2]))
    Path("marks.csv").write_text(lines(f"{HEADER}probability", "001,1,2,3,0.9", "002,1,2,3,0.8"))
    result = froc("--json")
    assert result.stderr == ""
    assert (json.loads(result.stdout)["num_nodules"], json.loads(result.stdout)["cpm"]) == (2, 1)


def test_no_marks_is_a_clear_statement_and_a_score_of_0(froc: Froc) -> None:
    Path("marks.csv").write_text(f"{HEADER}probability\n")
    result = froc("--out", "result")
    assert "there are no marks: the sensitivity is 0" in warning(result)
    assert "CPM       0.0000" in result.stdout


def test_repeated_marks_are_counted_and_named(froc: Froc) -> None:
    change("marks.csv", "002,90,90,90,0.45", "002,90,90,90,0.45\n002,90,90,90,0.45")
    result = froc()
    assert "1 marks are there twice" in warning(result)
    assert "2 false positives" in result.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "marks.csv is empty, expected at least the header"),
        ("001,1,2,3,0.9\n", "marks.csv has no header line"),
        (f"{HEADER}class\n001,1,2,3,1\n", "marks.csv has no column probability"),
        (f"{HEADER}probability,probability\n", "marks.csv has the column probability twice"),
        (f"{HEADER}probability\n001,1,2,3,0.9\n001,1,2,3,high\n", "marks.csv, line 3: probability is 'high'"),
        (f"{HEADER}probability\n\n001,1,2,3,nan\n001,1,2,3,\n", "line 3: probability is 'nan', expected a finite num"),
        (f"{HEADER}probability\n001,1,2,3,inf\n", "line 2: probability is 'inf'"),
        (f"{HEADER}probability\n001,1,2,1e9,0.5\n", "line 2: coordZ is '1e9', expected a number of mm"),
        (f"{HEADER}probability\n001,1,2,3\n", "line 2: 4 fields, expected 5"),
        (f"{HEADER}probability\n,1,2,3,0.5\n", "line 2: seriesuid is '', expected a series id"),
        (f"{HEADER}probability\n001,1,2,3,0.5,6\n", "line 2: 6 fields, expected 5"),
        (f"{HEADER}probability\n001,1,2,3,0.5\n".replace(",", ";"), "marks.csv is not separated by commas"),
        ("\x00\x01", "marks.csv"),
        (b"\xff\xfe\x00a", "marks.csv is not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_submission_that_cannot_be_read_is_one_line(froc: Froc, text: str | bytes, words: str) -> None:
    Path("marks.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in complaint(froc(), 1)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("annotations.csv", f"{HEADER}diameter_mm\n001,1,2,3,NaN\n", "annotations.csv, line 2: diameter_mm is 'NaN'"),
        ("excluded.csv", f"{HEADER}probability\n001,1,2,3,1\n", "excluded.csv has no column diameter_mm"),
        ("seriesuids.csv", "\n", "seriesuids.csv lists no scans"),
        ("seriesuids.csv", "001\n002\n001\n", "seriesuids.csv, line 3: 001 is on line 1 already"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(froc: Froc, name: str, text: str, words: str) -> None:
    Path(name).write_text(text)
    assert words in complaint(froc(), 1)


def test_annotations_of_other_scans_are_refused(froc: Froc) -> None:
    change("annotations.csv", "\n0", "\n9")
    assert "none of the annotations is in a listed scan" in complaint(froc(), 2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["froc", "nowhere.csv", *TABLES], "nowhere.csv"),
        (["froc", "marks.csv", *TABLES[2:]], "--annotations"),
        (["froc", "marks.csv", *TABLES, "--bootstrap", "-1"], "--bootstrap"),
        (["frok"], "frok"),
    ],
)
def test_wrong_usage_exits_2(folder: Path, args: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert words in result.stderr


def test_an_output_folder_that_cannot_be_made_is_one_line(froc: Froc) -> None:
    assert "excluded.csv" in froc("--out", "excluded.csv/x").stderr
    Path("there").mkdir()
    Path("there/froc.csv").mkdir()
    assert "froc.csv" in complaint(froc("--out", "there"), 1)


def test_the_module_runs_as_a_command(folder: Path) -> None:
    command = [sys.executable, "-m", "lunatrain", "froc", "marks.csv", *TABLES, "--bootstrap", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "CPM" in done.stdout


@pytest.mark.shared_data
def test_the_challenge_s_own_tables(folder: Path, shared_data: Path) -> None:
    tables = shared_data / "luna16_csv"
    table = pd.read_csv(tables / "annotations.csv", dtype=str).rename(columns={"diameter_mm": "probability"})
    table.to_csv("marks.csv", index=False)
    names = {"annotations": "annotations", "excluded": "annotations_excluded", "seriesuids": "seriesuids"}
    args = [item for option, name in names.items() for item in (f"--{option}", str(tables / f"{name}.csv"))]
    result = CliRunner().invoke(cli, ["froc", "marks.csv", *args, "--bootstrap", "10", "--json"])
    assert result.stderr == ""
    figures = json.loads(result.stdout)
    assert (figures["cpm"], figures["num_scans"], figures["num_nodules"]) == (1, 888, 1186)
