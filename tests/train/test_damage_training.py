"""Training that is stopped anywhere, loses its store under way, or runs into numbers that are none."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lunatrain.loop as loop
from lunaprep.errors import LunaprepError, StoreError
from lunaprep.store.reader import open_store
from lunatrain import segmentation, training
from lunatrain.checkpoint import BEST, LAST, load_checkpoint
from lunatrain.config import MALIGNANCY, TrainConfig
from lunatrain.data import CropLoader
from lunatrain.errors import TrainingError
from lunatrain.log import RunLog, read_metrics
from lunatrain.loop import Trainer, train
from lunatrain.mapping import CropMap, open_crops
from lunatrain.segmentation_config import SegConfig
from lunatrain.training import TrainOptions

from ..conftest import Figure

QUICK = TrainConfig(model="luna", epochs=2, samples=24, batch_size=8, lr=1e-3, save_steps=2)
STEPS = 6
POINTS = (2, 3, 1, 4, STEPS)
"""Steps to stop after: amid an epoch, its last, the first, the next one's first, the very last."""
TASKS: dict[str, tuple[Any, Any]] = {
    "mal": (training, replace(MALIGNANCY, model="luna", epochs=2, samples=24, batch_size=8, save_steps=2)),
    "seg": (segmentation, SegConfig(epochs=2, samples=24, batch_size=8, side=32, seed=3, val_slices=12, save_steps=2)),
}


@pytest.fixture(scope="module")
def targets_store(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's store with small crops, volumes and slabs."""
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters

    out = tmp_path_factory.mktemp("targets") / "store"
    build(BuildOptions(phantom_root, out, workers=1), Parameters(crop_shape=(16, 24, 24), val_stride=3))
    return out


def fit(trainer: Trainer) -> None:
    with RunLog(trainer.run.path) as log:
        log.forget_after(trainer.progress.samples)
        train(trainer, log)


def stop_after(count: int) -> Callable[[], Any]:
    """A `stop_request` that asks at the given step."""
    steps = 0

    @contextmanager
    def stop() -> Iterator[Callable[[], bool]]:
        def is_stopping() -> bool:
            nonlocal steps
            steps += 1
            return steps == count

        yield is_stopping

    return stop


def plain(state: dict[str, Any]) -> list[tuple[str, object]]:
    """All of a checkpoint's state, one value a place; tensors as their bytes."""
    values: list[tuple[str, object]] = []

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key in value:
                walk(f"{name}/{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                walk(f"{name}/{key}", item)
        else:
            is_tensor = isinstance(value, torch.Tensor)
            values.append((name, value.contiguous().numpy().tobytes() if is_tensor else repr(value)))

    walk("", state)
    return sorted(values, key=lambda item: item[0])


@pytest.mark.parametrize("task", TASKS)
def test_stopped_at_five_points_and_resumed_is_not_stopped(
    task: str, targets_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """For cls see test_training."""
    module, config = TASKS[task]
    fit(module.open_training(TrainOptions(targets_store, tmp_path / "whole"), config))
    whole = {name: plain(load_checkpoint(tmp_path / "whole" / name).state) for name in (LAST, BEST)}
    lines = [{k: v for k, v in line.items() if k != "data_wait_share"} for line in read_metrics(tmp_path / "whole")]
    assert len(lines) == 4
    for stop_at in POINTS[: figure(1, 5)]:
        options = TrainOptions(targets_store, tmp_path / f"cut{stop_at}")
        with monkeypatch.context() as patch:
            patch.setattr(loop, "stop_request", stop_after(stop_at))
            with pytest.raises(KeyboardInterrupt):
                fit(module.open_training(options, config))
        trainer, loaded = module.resume_training(options)
        assert loaded.path.name == LAST
        fit(trainer)
        for name, state in whole.items():
            assert plain(load_checkpoint(options.run / name).state) == state, (stop_at, name)
        assert [
            {k: v for k, v in line.items() if k != "data_wait_share"} for line in read_metrics(options.run)
        ] == lines


# The store changes under way


@pytest.fixture
def own(small_store: Path, tmp_path: Path) -> Path:
    """A store of the test's own."""
    return shutil.copytree(small_store, tmp_path / "own")


def first_shard(store: Path) -> Path:
    return open_store(store).shards[0].path


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(os.urandom(path.stat().st_size))
    other.replace(path)


def rebuilt_shorter(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:8192])
    other.replace(path)


HELD: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "replaced": replaced,
    "replaced by a shorter": rebuilt_shorter,
    "the whole store removed": lambda path: shutil.rmtree(path.parent.parent),
}


@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
@pytest.mark.parametrize("change", HELD)
def test_what_was_opened_is_kept(own: Path, change: str, io: Any) -> None:
    store = open_store(own)
    rows = np.arange(len(store))
    crops = open_crops(store, io)
    loader = CropLoader(crops, len(rows))
    before = next(loader.batches([rows])).crops.clone()
    HELD[change](first_shard(own))
    for _ in range(2):
        assert torch.equal(next(loader.batches([rows])).crops, before)
    loader.close()


@pytest.mark.parametrize("size", [0, 4096, 10_000, -1])
def test_a_shard_cut_between_epochs_is_one_line(own: Path, tmp_path: Path, size: int) -> None:
    trainer = training.open_training(TrainOptions(own, tmp_path / "r"), replace(QUICK, epochs=50))
    path, epochs = first_shard(own), 0

    class CutsIt(RunLog):
        def write(self, part: str, *args: Any) -> None:
            nonlocal epochs
            epochs += part == "val"
            if part == "val" and epochs == 2:
                os.truncate(path, size if size >= 0 else path.stat().st_size + size)
            super().write(part, *args)

    with CutsIt(tmp_path / "r") as log, pytest.raises(StoreError, match="cut while in use") as info:
        train(trainer, log)
    assert path.name in str(info.value)
    assert "\n" not in str(info.value)
    assert load_checkpoint(tmp_path / "r" / LAST).state["progress"]["epoch"] == 2


def test_a_shard_cut_within_an_epoch_ends_with_a_message(own: Path) -> None:
    """The system gives no other chance than a signal; but it doesn't end without a word, nor with wrong crops."""
    code = """
import os, sys, numpy as np, lunatrain.cli as cli
from lunaprep.store.reader import open_store
from lunatrain.mapping import open_crops
def train(**kwargs):
    store = open_store(sys.argv[1])
    crops, rows = open_crops(store, "mmap"), np.arange(len(store))
    os.truncate(store.shards[0].path, 4096)
    crops.gather(rows, np.empty((len(rows), *store.crop_shape), np.float32))
cli.cli = train
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code, own], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert "mapping.py" in done.stderr
    help_page = (Path(__file__).parents[2] / "docs/when-it-fails.md").read_text()
    assert "Fatal Python error: Bus error" in help_page


def test_by_pread_a_cut_shard_is_a_line_at_once(own: Path) -> None:
    store = open_store(own)
    with open_crops(store, "pread") as crops:
        os.truncate(first_shard(own), 4096)
        with pytest.raises(StoreError, match="ends before row 0"):
            crops.gather(np.arange(len(store)), np.empty((len(store), *store.crop_shape), np.float32))


@pytest.mark.parametrize("way", ["removed", "cut", "another's"])
def test_a_changed_store_is_not_resumed_on(own: Path, built_store: Path, tmp_path: Path, way: str) -> None:
    options = TrainOptions(own, tmp_path / "r")
    fit(training.open_training(options, replace(QUICK, epochs=1)))
    before = (tmp_path / "r" / LAST).read_bytes()
    if way == "removed":
        first_shard(own).unlink()
    elif way == "cut":
        os.truncate(first_shard(own), 9000)
    else:
        shutil.rmtree(own)
        shutil.copytree(built_store, own)
    with pytest.raises((LunaprepError, loop.TrainingError, ValueError)) as info:
        training.resume_training(options)
    assert "\n" not in str(info.value)
    assert (tmp_path / "r" / LAST).read_bytes() == before


def test_a_map_checks_what_it_mapped_alone(own: Path) -> None:
    store = open_store(own)
    with CropMap(store.shards[1:], store.crop_shape, store.dtype) as crops:
        os.truncate(store.shards[0].path, 0)
        crops.check()
        with store.shards[1].path.open("ab") as file:
            file.write(b"longer is no harm")
        crops.check()


# Numbers that are none


@pytest.mark.parametrize(("factor", "steps"), [(float("inf"), 1), (float("nan"), 1), (1e38, 1), (float("inf"), 2)])
def test_an_exploding_gradient_stops_and_spoils_no_checkpoint(
    small_store: Path, tmp_path: Path, factor: float, steps: int
) -> None:
    """The loss of the step was good, the weights after it are not: also where the epoch, or a save, comes next."""
    config = replace(QUICK, samples=8 * steps, epochs=3, save_steps=1, clip_grad=0.0, optimizer="sgd", lr=1.0, ema=0.9)
    trainer = training.open_training(TrainOptions(small_store, tmp_path / "r"), config)
    calls = 0

    def explode(grad: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return grad * factor * factor if calls == 3 else grad

    next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad).register_hook(explode)
    with RunLog(tmp_path / "r") as log, pytest.raises(TrainingError, match="no numbers any more") as info:
        train(trainer, log)
    assert "\n" not in str(info.value)
    for name in (LAST, BEST):
        state = load_checkpoint(tmp_path / "r" / name).state
        for part in ("model", "averaged"):
            assert all(bool(tensor.isfinite().all()) for tensor in state[part].values())
        assert state["progress"]["samples"] <= 16
    resumed, _ = training.resume_training(TrainOptions(small_store, tmp_path / "r"))
    fit(resumed)
    assert resumed.progress.epoch == 3


@pytest.mark.parametrize(("batch_size", "samples"), [(1000, 0), (1000, 24), (1, 3), (24, 24)])
def test_a_batch_may_be_larger_than_the_set_or_one(
    small_store: Path, tmp_path: Path, batch_size: int, samples: int
) -> None:
    config = replace(QUICK, batch_size=batch_size, samples=samples, epochs=1)
    trainer = training.open_training(TrainOptions(small_store, tmp_path / "r"), config)
    fit(trainer)
    assert trainer.progress.samples == (samples or trainer.run.plan.sampler.num_samples)
    assert all(
        bool(tensor.isfinite().all()) for tensor in load_checkpoint(tmp_path / "r" / LAST).state["model"].values()
    )


def test_a_log_that_a_full_disk_keeps_from_being_rewritten_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def write_half(path: Path, text: str, **options: Any) -> None:
        real(path, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunLog(tmp_path) as log:
        for epoch in (1, 2, 3):
            log.write("val", epoch, 10 * epoch, {"loss": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", write_half)
            with pytest.raises(OSError, match="No space"):
                log.forget_after(20)
        assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]
        log.forget_after(20)
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2]
