"""What goes wrong on the first day: the folder one level off, tables elsewhere, ~, names in capitals. One line each."""

import json
import shutil
from pathlib import Path

import pytest

from lunaprep.sources.luna16 import TablePaths, find_files, read_source
from lunaprep.sources.phantom import write_phantom

from .conftest import Run
from .dicom_files import stored_values, write_series

QUICK = ("--crop-shape", "8", "16", "16", "--no-volumes", "--no-targets", "--workers", "1")
TABLES = ("candidates.csv", "annotations.csv", "annotations_with_malignancy.csv", "patients.csv")


@pytest.fixture
def data(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy of three scans in two subsets, named `data` in the folder of `run`."""
    return Path(shutil.copytree(tiny_root, tmp_path / "data"))


def refusal(run: Run, *args: object) -> str:
    """The one line of a build that is refused."""
    done = run(["build", *args, "--out", "s", *QUICK])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def deeper(folder: Path) -> None:
    """Put what is in a folder into one of the same name in it, as some programs unpack archives."""
    inner = folder / folder.name
    shutil.move(folder, folder.with_name("moved"))
    folder.mkdir()
    shutil.move(folder.with_name("moved"), inner)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def capitals(folder: Path) -> None:
    for path in folder.glob("*.mhd"):
        path.rename(path.with_suffix(".MHD"))


NO_SCANS = [
    (deeper, "'subset1/subset1' holds the scans, one level too deep; move its files up"),
    (empty, "subset1 is empty; unpack its archive again"),
    (capitals, "subset1: 1 passed over, such as "),
]


@pytest.mark.parametrize(("spoil", "words"), NO_SCANS)
def test_a_build_without_a_scan_is_refused(data, run, tmp_path, spoil, words):
    spoil(data / "subset1")
    line = refusal(run, "--subsets", "1")
    assert "data: no scan (.mhd, .mha, .nii.gz) in subset1: " in line
    assert words in line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("spoil", "words"), NO_SCANS)
def test_a_subset_without_a_scan_is_told(data, run, spoil, words):
    spoil(data / "subset1")
    done = run(["build", "--out", "s", *QUICK])
    assert done.returncode == 0, done.stderr
    assert words in done.stderr
    assert "2 in the store" in done.stdout


def test_other_names_of_subsets_are_told_and_take_nothing_away(data):
    shutil.copytree(data / "subset1", data / "subset00")
    source = read_source(data, None, TablePaths())
    assert {scan.path.parent.name for scan in source.scans} == {"subset0", "subset1"}
    (note,) = source.notes
    assert note.startswith("'subset00' is passed over; subsets are named subset0, subset1, …")


def test_a_subset_of_dicom_that_nobody_is_in_is_refused(run, tmp_path):
    write_series(tmp_path / "d", values=stored_values(shape=(8, 40, 40)))
    line = refusal(run, "--source", "dicom", "--data", "d", "--subsets", "77")
    assert "d: no scan of subset 77; its patients are of subset " in line
    assert line.endswith("Choose of these with --subsets, or leave it out")


@pytest.mark.parametrize("folder", ["CSVFILES", "evaluationScript/annotations"])
def test_tables_are_found_where_the_archives_put_them(data, folder):
    beside = read_source(data, None, TablePaths())
    (data / folder).mkdir(parents=True)
    for name in TABLES:
        shutil.move(data / name, data / folder / name)
    found = read_source(data, None, TablePaths())
    assert [item.to_json() for item in found.files] == [item.to_json() for item in beside.files]
    assert {item.path.parent for item in found.files} == {data / folder}


def test_a_table_that_is_nowhere_is_named_with_all_places(data, run):
    (data / "annotations.csv").unlink()
    line = refusal(run)
    assert "data has no annotations.csv, nor have evaluationScript/annotations, CSVFILES in it. Put it beside" in line


def test_the_newer_list_of_candidates_is_taken_wherever_it_lies(data):
    (data / "CSVFILES").mkdir()
    shutil.copy(data / "candidates.csv", data / "CSVFILES" / "candidates_V2.csv")
    assert find_files(data, None, TablePaths()).tables.candidates == data / "CSVFILES" / "candidates_V2.csv"


def test_home_is_meant_by_a_tilde_that_the_shell_left(data, run, run_apart, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--data=~/data", "--candidates=~/data/candidates.csv", "--csv=~/tables", *QUICK]
    done = run(["build", "--out=~/st", *options])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "st" / "store.json").exists()
    assert (tmp_path / "tables" / "annotations.csv").exists()
    assert not (tmp_path / "~").exists()
    assert run(["info", "~/st"]).returncode == 0
    done = run_apart(["build", "--out=~/st", "--dry-run", "--json", *QUICK], LUNA16_ROOT="~/data")
    assert json.loads(done.stdout)["shards_kept"] == 2, done.stderr


def test_home_is_meant_in_the_name_of_the_schedulers_file_too(data, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run(["build", "--backend", "dask", "--scheduler=~/none.json", "--out", "s", *QUICK[:-2]])
    assert str(tmp_path / "none.json") in done.stderr


def test_a_folder_that_is_a_subset_names_the_one_above(data, run):
    assert refusal(run, "--data", data / "subset1").endswith(
        f"subset1 holds no subset folder: it is one. Give the folder above it: --data {data} --subsets 1"
    )
    assert "--data data --subsets 1" in refusal(run, "--data", "data/subset1")


def test_a_folder_above_the_subsets_names_the_one_below(data, run):
    assert refusal(run, "--data", ".").endswith(". holds no subset folder, data does. Give --data data")


def test_scans_without_a_subset_are_told_where_to_go(data, run):
    (data / "subset1").rename(data.parent / "mine")
    assert refusal(run, "--data", "mine").endswith("but scans. Move them into a folder subset0 in it")


def test_a_folder_of_dicom_asks_what_it_is(run, tmp_path):
    write_series(tmp_path / "d", values=stored_values(shape=(8, 40, 40)))
    line = refusal(run, "--data", "d")
    assert "d holds DICOM files" in line
    assert "--source lidc, --source lung-pet-ct-dx, or --source dicom" in line


def test_a_wrong_folder_leaves_nothing_behind(run, tmp_path):
    (tmp_path / "none").mkdir()
    for args in ([], ["--data", "none"], ["--data", "none", "--source", "lidc"], ["--data", "typo", "--out", "s"]):
        done = run(["build", *args])
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["none"]


def test_luna16_given_as_dicom_says_so(data, run):
    done = run(["build", "--source", "lidc", "--dry-run"])
    assert done.returncode == 2
    assert done.stderr.strip().endswith("leave --source out")


def test_the_option_is_named_as_it_is_typed(run, data):
    assert "--shard-size: got 0, expected 1 byte or more" in refusal(run, "--shard-size", "0")


def test_a_size_beyond_all_numbers_is_no_size(run):
    done = run(["build", "--shard-size", "9" * 400])
    assert done.returncode == 2, done.stderr
    assert "is no size" in done.stderr


def test_subsets_given_twice_are_both_taken(data, run):
    done = run(["build", "--subsets", "0", "--subsets", "1", "--dry-run", "--json"])
    assert json.loads(done.stdout)["scans"] == 3, done.stderr


def test_a_phantom_says_how_many_scans_it_replaces(tmp_path):
    size = (16, 48, 48)
    assert write_phantom(tmp_path, num_scans=2, size=size).replaced == 0
    assert write_phantom(tmp_path, num_scans=1, size=size).replaced == 2
