"""The commands as a user types them: output, exit codes, one-line errors."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from .conftest import Run, files_of


def one_line(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("lunaprep: ")
    return lines[0]


def test_help_ends_with_an_example_and_imports_nothing_heavy(run: Run) -> None:
    for command in ([], ["phantom"], ["build"], ["verify"], ["info"], ["show"]):
        text = run([*command, "--help"]).stdout
        assert "\n  Example:\n" in text
        assert "lunaprep" in text.split("Example:")[1]
    code = "import sys; sys.argv = ['lunaprep', '--help']\nfrom lunaprep.cli import main\ntry: main()\n"
    code += "except SystemExit: pass\n"
    code += "heavy = {'numpy', 'pandas', 'h5py', 'SimpleITK', 'matplotlib', 'pyarrow', 'joblib', 'tqdm', 'torch'}\n"
    code += "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_default_phantom_is_made_and_told(run: Run, tmp_path: Path) -> None:
    done = run(["phantom", "p", "--scans", "1", "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scans"] == 1
    assert run(["phantom", "p", "--scans", "1"]).stdout.startswith("p: 1 scans, in place of 1 that were there, ")
    assert "DimSize = 160 160 96" in next(tmp_path.glob("p/subset0/*.mhd")).read_text()


def test_phantom_build_verify_info_show_follow_each_other(run: Run, tmp_path: Path) -> None:
    assert run(["phantom", "data", "--scans", "3", "--size", "40", "64", "64"]).returncode == 0
    built = run(["build", "--out", "store"])  # ./data is the default
    assert built.returncode == 0, built.stderr
    assert "3 in the store (3 built, 0 kept), 0 failed" in built.stdout
    verified = run(["verify", "store"])
    assert (verified.returncode, verified.stdout.count("no damage found")) == (0, 1)
    assert run(["verify", "store", "--level", "source"]).returncode == 0
    assert "subset" in run(["info", "store"]).stdout
    for args in ([], ["--candidate", "3"], ["--series", next(tmp_path.glob("data/subset1/*.mhd")).stem[-8:]]):
        shown = run(["show", "store", *args, "--out", "picture.png"])
        assert shown.returncode == 0, shown.stderr
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_environment_names_the_data_folder_and_the_current_folder_is_the_store(
    run: Run, run_apart: Run, phantom_root: Path, tmp_path: Path
) -> None:
    assert run_apart(["build", "--subsets", "0", "--no-volumes"], LUNA16_ROOT=str(phantom_root)).returncode == 0
    assert (tmp_path / "store.json").exists()
    assert run_apart(["verify"]).returncode == 0
    assert json.loads(run(["info", "--json"]).stdout)["store_id"]


def test_json_is_one_object_on_stdout(run: Run, built_store: Path, phantom_root: Path) -> None:
    build = json.loads(run(["build", "--data", phantom_root, "--out", "s", "--json"]).stdout)
    assert (build["scans_ok"], build["crops"]) == (
        6,
        json.loads((built_store / "store.json").read_text())["counts"]["crops"],
    )
    verify = json.loads(run(["verify", built_store, "--json"]).stdout)
    assert (verify["ok"], verify["findings"]) == (True, [])
    dry = json.loads(run(["build", "--data", phantom_root, "--out", "t", "--dry-run", "--json"]).stdout)
    assert dry["shards_to_build"] == 3


def test_damage_exits_4_and_is_named(run: Run, data: Path, tmp_path: Path) -> None:
    run(["build", "--data", data, "--out", "s"])
    shard = sorted((tmp_path / "s/crops").glob("*.h5"))[0]
    spoiled = bytearray(shard.read_bytes())
    spoiled[4096 + 5] ^= 4
    shard.write_bytes(spoiled)
    done = run(["verify", "s"])
    assert done.returncode == 4
    assert shard.name in done.stderr
    assert "row 0" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["build", "--data", "nowhere"], 2, "nowhere: no such folder"),
        (["build", "--data", "."], 2, "holds no subset folder"),
        (["verify", "nowhere"], 2, "nowhere"),
        (["info", "nowhere"], 2, "is no store"),
        (["show", "nowhere", "--out", "x.png"], 2, "is no store"),
        (["phantom", "p", "--scans", "0"], 2, "scans"),
        (["phantom", "p", "--size", "2", "2", "2"], 2, "size"),
    ],
)
def test_a_wrong_folder_or_number_is_one_line(run: Run, args: list[str], code: int, words: str) -> None:
    done = run(args)
    assert done.returncode == code, done.stderr
    assert words in one_line(done.stderr)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["build", "--subsets", "9-0"], "names no subset"),
        (["build", "--subsets", "a"], "names no subsets"),
        (["build", "--shard-size", "1 furlong"], "is no size"),
        (["build", "--dtype", "int8"], "int8"),
        (["build", "--workers", "0"], "workers"),
        (["bild"], "bild"),
        (["show", "s"], "--out"),
        (["build", "--candidates", "none.csv"], "none.csv"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(run: Run, args: list[str], words: str) -> None:
    done = run(args)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--subsets", "0-9"], "has no subset3 (it has 0, 1, 2)"),
        (["--hu", "5", "5"], "--hu"),
        (["--crop-shape", "2", "2", "2"], "--crop-shape"),
        (["--val-stride", "1"], "--val-stride"),
    ],
)
def test_wrong_parameters_exit_2_in_one_line(run: Run, phantom_root: Path, args: list[str], words: str) -> None:
    done = run(["build", "--data", phantom_root, "--out", "s", *args])
    assert words in one_line(done.stderr)
    assert done.returncode == 2


def test_the_picture_must_be_a_png_and_the_candidate_known(run: Run, built_store: Path) -> None:
    assert ".png" in one_line(run(["show", built_store, "--out", "x.jpg"]).stderr)
    assert "candidate" in one_line(run(["show", built_store, "--candidate", "99999", "--out", "x.png"]).stderr)
    assert "choose one" in one_line(
        run(["show", built_store, "--candidate", "1", "--series", "1", "--out", "x.png"]).stderr
    )


def test_the_version_is_told(run_apart: Run) -> None:
    import lunaprep

    assert run_apart(["--version"]).stdout.strip().endswith(lunaprep.__version__)


def test_the_progress_bar_counts_scans_on_a_terminal(phantom_root: Path, tmp_path: Path) -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "lunaprep", "build", "--data", str(phantom_root), "--out", str(tmp_path / "s")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=child)
    os.close(child)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            part = os.read(parent, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait(timeout=60) == 0
    assert b"6/6" in shown
    assert b"scan" in shown
    assert files_of(tmp_path / "s")


def test_an_interrupt_that_python_would_ignore_is_raised_again(tmp_path: Path):
    """What a destructor or a weak reference's callback raises is ignored; Ctrl-C at that moment must not be."""
    program = """
import signal, time, lunaprep.cli as cli
class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def info(**_):
    Dying()
    time.sleep(20)
cli.cli.commands["info"].callback = info
cli.main()
"""
    command = [sys.executable, "-c", program, "info", "."]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr
    assert "interrupted; what was finished is kept" in done.stderr
