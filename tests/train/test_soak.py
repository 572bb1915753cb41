"""Round after round of build, verify, train, evaluate: memory, files and threads stay as they are; and no network."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.store.reader import open_store
from lunaprep.verify import verify_store
from lunatrain.checkpoint import BEST
from lunatrain.config import TrainConfig
from lunatrain.log import RunLog
from lunatrain.loop import train
from lunatrain.training import TrainOptions, open_training

WARM = 8
PARAMETERS = Parameters(crop_shape=(16, 24, 24), val_stride=3)
SMALL = ("--crop-shape", "16", "24", "24", "--val-stride", "3")
TRAIN = ("--model", "luna", "--epochs", "1", "--samples", "24", "--batch-size", "8")


def resident_kib() -> int:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def left_behind() -> dict[str, int]:
    """What a process may leave open, or lying about: counted."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": threading.active_count(),
        "children": len(children),
        "temporary": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
        "shared": sum(1 for _ in Path("/dev/shm").glob(f"*{os.getpid()}*")),  # others work there as well
    }


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def one_round(data: Path, folder: Path) -> None:
    """Build, verify, read, train; everything is gone afterwards."""
    store, run = folder / "store", folder / "run"
    build(BuildOptions(data, store, workers=1), PARAMETERS)
    assert verify_store(store).ok
    opened = open_store(store)
    opened.crops(np.arange(len(opened)))
    for uid in opened.scans["series_uid"]:
        opened.volume(uid)
        opened.masks(uid)
    config = TrainConfig(model="luna", epochs=1, samples=24, batch_size=8, ema=0.9)
    trainer = open_training(TrainOptions(store, run), config)
    with RunLog(run) as log:
        train(trainer, log)
    assert (run / BEST).exists()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files go where nobody else's are."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_rounds_in_one_process_leave_nothing(tiny_root: Path, tmp_path: Path) -> None:
    memory = []
    for number in range(WARM + 20):
        one_round(tiny_root, tmp_path / "round")
        memory.append(resident_kib())
        if number == WARM - 1:
            before = left_behind()
    assert left_behind() == before
    early, late = np.median(memory[WARM : WARM + 6]), np.median(memory[-6:])
    assert late <= 1.01 * early, f"{early} to {late} KiB: {memory}"


def run_offline(*command: str, cwd: Path) -> None:
    """Run a command in a network namespace of its own, in which there is nothing."""
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def offline_round(data: Path, folder: Path, *, trains: bool) -> None:
    run_offline("lunaprep", "build", "--data", str(data), "--out", "store", "--workers", "2", *SMALL, cwd=folder)
    run_offline("lunaprep", "verify", "store", "--level", "source", "--data", str(data), cwd=folder)
    if trains:
        run_offline("lunatrain", "cls", "--store", "store/crops.h5", *TRAIN, "--out", "run", cwd=folder)
        run_offline("lunatrain", "eval", "run", "--bootstrap", "10", cwd=folder)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_a_build_needs_no_network(tiny_root: Path, empty: Path) -> None:
    offline_round(tiny_root, empty, trains=False)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_rounds_of_commands_need_no_network_and_leave_nothing(tiny_root: Path, empty: Path) -> None:
    before = left_behind()
    files = None
    for _ in range(20):
        offline_round(tiny_root, empty, trains=True)
        now = {name for name in files_in(empty) if "events.out" not in name}
        assert files is None or now == files
        files = now
        shutil.rmtree(empty)
        empty.mkdir()
    assert left_behind() == before
