"""Every benchmark runs, at its smallest size, from its command line to its last line. No figure is judged here.

They are called here and not started, which would take longer than what they do; only what they start is started.
"""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if "def main()" in path.read_text(encoding="utf-8"))
SIZE = ["--size", "32", "64", "64"]
ONCE = ["--rounds", "1"]
PHANTOM = [*SIZE, "--candidates", "5"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call a benchmark with these arguments, in a folder of its own; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_says_what_it_does(call: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as end:
        call(name, "--help")
    assert end.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_building(call: Any, tmp_path: Path) -> None:
    told = call("build_speed", "--folder", tmp_path, "--scans", 1, *ONCE, *PHANTOM)
    assert told.startswith("1 scans 64x64x32, 5 candidates each")
    for words in ("build, volumes, 2", "encoder alone", "SimpleITK", "peak memory of a worker, with volumes"):
        assert words in told
    assert all(value > 0 for value in json.loads(told.splitlines()[-1]).values())


def test_verifying(call: Any, built_store: Path) -> None:
    assert "| verify, one processor |" in call("verify_speed", built_store, *ONCE)


def test_detecting(call: Any, tmp_path: Path) -> None:
    told = call("detect_speed", "--folder", tmp_path, *ONCE, "--num-scans", 1, "--threads", 1, *SIZE)
    assert "| all |" in told
    assert "candidates classified" in told


def test_loading(tmp_path: Path) -> None:
    """Started, not called: the peer's loader forks workers, which a process of tests is not for."""
    small = ["--scans", 1, "--batch-size", 8, "--size", 32, 48, 48, "--candidates", 200, "--seconds", 0.01]
    given = ["--folder", tmp_path, *ONCE, *small, "--only", "npy", "--json", tmp_path / "figures"]
    command = [sys.executable, str(FOLDER / "loading.py"), *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False)
    assert "float32 / best of disk (.npy per crop)" in done.stdout, done
    assert [row["dtype"] for row in json.loads((tmp_path / "figures").read_text())["rows"]] == ["int16", "float32"]


def test_starting(call: Any, tmp_path: Path) -> None:
    assert "first batch of 1,000 crops" in call("startup", "--folder", tmp_path / "s", *ONCE, "--crops", 1000)


def test_scale(call: Any, tmp_path: Path) -> None:
    counts = [1000, 2000]
    results: dict[int, dict[str, dict[str, Any]]] = {}
    for count in counts:
        results[count] = {"parts": {}, "sizes": {}}
        for side in ("build_side", "train_side"):  # each is a process of its own where figures are wanted
            told = json.loads(call("scale", "--child", side, "--candidates", count, "--folder", tmp_path / "s"))
            for name, figures in told.items():
                results[count][name] |= figures
    importlib.import_module("scale").print_tables(results, counts)


def test_growth(phantom_root: Path, tmp_path: Path) -> None:
    growth = importlib.import_module("growth")
    growth.multiply(phantom_root, tmp_path / "data", 2)
    done = {way: run(tmp_path / "data", tmp_path / "out") for way, run in growth.WAYS.items() if "volumes" not in way}
    assert done["epoch"] == done["open"] == done["verify"] == done["build, crops"] > 0


def test_training(call: Any, small_store: Path) -> None:
    told = call("training_speed", small_store, "--samples", 8, *ONCE)
    assert "lunatrain, amp off" in told


def test_choosing_a_model(call: Any, small_store: Path) -> None:
    told = call("model_choice", small_store, "--seconds", 0.01, "--no-speed", "--arms", "luna", "--set", "lr=0.01")
    assert "luna" in told


def test_the_books_programs_are_changed_as_told(tmp_path: Path) -> None:
    book = importlib.import_module("book")
    for name in book.PACKAGES:
        (tmp_path / "clone" / name).mkdir(parents=True)
    for name, changes in book.CHANGES.items():
        (tmp_path / "clone" / name).write_text("\n".join(old for old, _ in changes))
    given = Namespace(book=tmp_path / "clone", folder=tmp_path, extra=None)
    (tmp_path / "data").mkdir()
    for name in book.TABLES:
        (tmp_path / "data" / name).touch()
    copy = book.Book(given, tmp_path / "data", 1).copy
    for name, changes in book.CHANGES.items():
        assert (copy / name).read_text() == "\n".join(new for _, new in changes)
