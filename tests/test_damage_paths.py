"""Names and kinds of files that no data set has: each costs at most itself, and nothing waits for ever."""

import os
import random
import shutil
import socket
from pathlib import Path

import pandas as pd
import pytest

from lunaprep.candidates import read_candidates
from lunaprep.errors import TableError

from .bad_tables import CASES as ODD_TABLES
from .conftest import Figure, Run
from .fuzz_store import spoil

SMALL = ("--crop-shape", "8", "16", "16", "--no-volumes", "--no-targets", "--workers", "1")


@pytest.fixture
def odd(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy of three scans that a test may spoil."""
    return Path(shutil.copytree(tiny_root, tmp_path / "odd"))


def good_uids(store: Path) -> set[str]:
    scans = pd.read_parquet(store / "scans.parquet")
    return set(scans.series_uid[scans.status == "ok"])


@pytest.mark.timeout(100)
def test_odd_names_and_kinds_cost_themselves_alone(odd: Path, tmp_path: Path, run: Run) -> None:
    folder = odd / "subset0"
    header = sorted(folder.glob("*.mhd"))[0].read_bytes()
    for name in (b"\xff\xfe.mhd", b"9" * 251 + b".mhd", b"a" * 255, "ü.mhd".encode(), b"-rf.mhd", b"*.mhd", b" .mhd"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(header)
    os.mkfifo(folder / "1.2.3.mhd")
    (folder / "1.2.4.mhd").symlink_to("1.2.4.mhd")
    (folder / "1.2.5.mhd").symlink_to("/dev/zero")
    (folder / "1.2.6.mhd").mkdir()
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(os.path.relpath(folder / "1.2.7.mhd"))
    if os.geteuid() == 0:
        os.mknod(folder / "1.2.8.mhd", 0o20644, os.makedev(1, 5))
    done = run(["build", "--data", odd, "--out", "s", *SMALL])
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert r"\udcff\udcfe.mhd': passed over, its name is no text" in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines())
    assert len(good_uids(tmp_path / "s")) == 3
    assert run(["verify", "s"]).returncode == 0


@pytest.mark.timeout(100)
@pytest.mark.parametrize("kind", ["pipe", "loop", "file", "device"])
def test_a_subset_that_is_no_folder_waits_for_nothing(odd: Path, run: Run, kind: str) -> None:
    shutil.rmtree(odd / "subset1")
    if kind == "pipe":
        os.mkfifo(odd / "subset1")
    elif kind == "loop":
        (odd / "subset1").symlink_to("subset1")
    elif kind == "device":
        (odd / "subset1").symlink_to("/dev/zero")
    else:
        (odd / "subset1").write_bytes(b"")
    done = run(["build", "--data", odd, "--out", "s", *SMALL])
    assert done.returncode in (0, 2, 3), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(100)
@pytest.mark.parametrize("name", ["candidates.csv", "annotations.csv"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_a_table_that_is_no_file_waits_for_nothing(odd: Path, run: Run, name: str, kind: str) -> None:
    (odd / name).unlink()
    if kind == "pipe":
        os.mkfifo(odd / name)
    else:
        (odd / name).symlink_to("/dev/zero" if kind == "device" else name)
    done = run(["build", "--data", odd, "--out", "s", *SMALL])
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Arrow's, where a row is no UTF-8
def test_mutated_tables_are_read_or_named(tmp_path: Path, figure: Figure) -> None:
    goods = [case.content for case in ODD_TABLES if case.reader == "candidates" and isinstance(case.content, bytes)]
    path = tmp_path / "candidates.csv"
    for number in range(figure(300, 10_000)):
        rng = random.Random(number)
        path.write_bytes(spoil(rng.choice(goods) or b"\n", rng))
        try:
            read_candidates(path)
        except TableError as error:
            if "\n" in str(error) or not str(error).isprintable():
                raise
