"""`lunaprep verify` as a user types it: what it says of stores, of scans and of downloads, and its exit codes."""

import json
import shutil
from pathlib import Path

import pytest

from lunaprep import download_dicom
from lunaprep.download import check_data
from lunaprep.errors import UsageError

from .conftest import NUM_SCANS, Run
from .handmade_store import flip
from .test_cli import one_line


def last(stdout: str) -> str:
    return stdout.strip().splitlines()[-1]


@pytest.fixture
def store(built_store: Path, tmp_path: Path) -> Path:
    """A copy of the built store that a test may spoil."""
    return Path(shutil.copytree(built_store, tmp_path / "s"))


def test_a_scan_that_was_changed_is_no_reason_to_delete_anything(run: Run, store: Path, data: Path) -> None:
    path = next(data.glob("subset0/*.raw"))
    flip(path, 100)
    done = run(["verify", store, "--level", "source", "--data", data])
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert f"{path.name} changed since the build" in done.stderr
    assert "THE SCANS named are not those it was built from. Nothing in the store needs deleting" in last(done.stdout)
    assert f" {NUM_SCANS - 1} of {NUM_SCANS} scans cut again, " in done.stdout
    flip(next(store.glob("crops/*.h5")), 5000)
    done = run(["verify", store, "--level", "source", "--data", data])
    assert last(done.stdout).endswith("DAMAGED. Delete the files of the store that are named; build makes them again")


def test_a_folder_without_the_scans_is_wrong_usage(run: Run, built_store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    done = run(["verify", built_store, "--level", "source", "--data", "other"])
    assert (done.returncode, done.stdout) == (2, "")
    assert f"other: not one of the store's {NUM_SCANS} scans is there" in one_line(done.stderr)


def test_scans_that_are_not_there_are_counted(run: Run, built_store: Path, data: Path) -> None:
    shutil.rmtree(data / "subset1")
    done = run(["verify", built_store, "--level", "source", "--data", data])
    assert done.returncode == 0
    assert "4 of 6 scans cut again, " in last(done.stdout)
    value = json.loads(run(["verify", built_store, "--level", "source", "--data", data, "--json"]).stdout)
    assert (value["scans"], value["scans_cut_again"]) == (6, 4)


def test_subset_folders_may_be_links_to_another_disk(run: Run, built_store: Path, data: Path, tmp_path: Path) -> None:
    (data / "subset0").rename(tmp_path / "disk2")
    (data / "subset0").symlink_to(tmp_path / "disk2")
    done = run(["verify", built_store, "--level", "source", "--data", data])
    assert (done.returncode, done.stderr) == (0, "")
    done = run(["verify", "--data", data])
    assert done.returncode == 0, done.stdout
    path = next((tmp_path / "disk2").glob("*.raw"))
    path.rename(tmp_path / "elsewhere.raw")
    path.symlink_to(tmp_path / "elsewhere.raw")
    done = run(["verify", "--data", data])
    assert done.returncode == 4
    assert "[scan-unreadable]" in done.stdout


def test_store_and_download_have_a_last_line_each_and_the_very_last_agrees_with_the_code(
    run: Run, store: Path, data: Path
) -> None:
    done = run(["verify", store, "--data", data])
    assert done.returncode == 0, done.stdout
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()[-2:]] == [
        "no damage found",
        "no error found",
    ]
    next(data.glob("subset0/*.raw")).unlink()
    done = run(["verify", store, "--data", data])
    assert done.returncode == 4
    assert last(done.stdout) == f"{data} (data): 1 error, named above"
    assert json.loads(run(["verify", store, "--data", data, "--json"]).stdout)["ok"] is False
    next(data.glob("subset0/*.mhd")).unlink()
    flip(next(store.glob("crops/*.h5")), 5000)
    done = run(["verify", store, "--data", data])
    assert "DAMAGED" in "".join(done.stdout.splitlines()[-2:])


def test_a_phantom_is_held_against_what_it_was_made_as(run: Run, data: Path) -> None:
    done = run(["verify", "--data", data])
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Synthetic LUNA16")
    assert lines[1] == "6 of 6 scans: all there"
    assert "candidates.csv: " in lines[3]
    assert not [line for line in lines if line.startswith(("warning", "error"))]
    next(data.glob("subset1/*.mhd")).unlink()
    (data / "annotations.csv").unlink()
    report = check_data(data)
    assert report.account() == "5 of 6 scans: 1 missing (subset1: 1 of 2)"
    assert {f.code for f in report.findings} == {"subset-incomplete", "table-missing"}


@pytest.mark.parametrize("text", ["{", "[]", '{"num_scans": 0, "num_subsets": 3}', '{"num_scans": null}'])
def test_a_phantom_of_unknown_size_is_counted(data: Path, text: str) -> None:
    (data / "phantom.json").write_text(text)
    report = check_data(data)
    assert (report.ok, report.account()) == (True, "6 scans")


def test_other_folders_are_held_against_luna16(run: Run, data: Path) -> None:
    (data / "phantom.json").unlink()
    done = run(["verify", "--data", data])
    assert done.returncode == 4
    assert "6 of 888 scans" in done.stdout
    assert "errors, named above" in last(done.stdout)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--source", "lidc"], "--source says what a download is a copy of: give it with --data"),
        (["--level", "source", "--data", "data", "--source", "luna16"], "not with --level source"),
        (["--data", "nowhere", "--source", "lidc"], "nowhere: no such folder"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    run: Run, built_store: Path, data: Path, args: list[str], words: str
) -> None:
    done = run(["verify", built_store, *args])
    assert (done.returncode, done.stdout) == (2, "")
    assert words in one_line(done.stderr)


def test_a_level_asks_for_a_store(run: Run, data: Path) -> None:
    done = run(["verify", "--data", data, "--level", "quick"])
    assert done.returncode == 2
    assert ".: isn't a store" in one_line(done.stderr)


def test_a_front_door_stands_for_its_store_and_another_file_does_not(
    run: Run, built_store: Path, tmp_path: Path
) -> None:
    for name in ("crops.h5", "slabs.h5"):
        done = run(["verify", built_store / name, "--level", "quick"])
        assert (done.returncode, done.stderr) == (0, "")
        assert last(done.stdout).startswith(f"{built_store} (quick): ")
    done = run(["verify", built_store / "store.json"])
    assert done.returncode == 2
    assert "store.json: is a file; give the folder" in one_line(done.stderr)


def test_headers_of_a_download_are_read_with_a_bar(phantom_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    check_data(phantom_root, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, NUM_SCANS) for k in range(1, NUM_SCANS + 1)]
    asked: dict[str, object] = {}

    def spread(work, paths, workers, **kwargs):
        asked.update(kwargs)
        return work(paths)

    monkeypatch.setattr(download_dicom, "spread", spread)
    with pytest.raises(UsageError, match="holds no CT series"):
        download_dicom.check_dicom(phantom_root, "lidc", progress=True)
    assert asked == {"what": "headers", "progress": True}
