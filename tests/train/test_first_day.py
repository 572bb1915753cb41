"""What goes wrong on a user's first day: runs mixed up, settings that are not heeded, stops, resumes, odd figures."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lunatrain import localisation, loop, segmentation, training
from lunatrain.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from lunatrain.cli import cli
from lunatrain.config import TrainConfig
from lunatrain.dense import HU_WINDOW, predict_volume, read_slabs
from lunatrain.detect.segmenting import check_window
from lunatrain.distributed import Processes, join_processes
from lunatrain.errors import UsageError
from lunatrain.images import ImageFolder
from lunatrain.log import RunLog, figure_text, progress_bar
from lunatrain.models.unet import UNet
from lunatrain.segmentation_config import IMAGES, SegConfig
from lunatrain.slabs import HeldOutVolumes, TrueSlice, _ScanSlices
from lunatrain.tasks.segment import Segment
from lunatrain.tasks.task import Validation
from lunatrain.training import TrainOptions, newest_run, open_training, resume_training

from ..conftest import typed

QUICK = TrainConfig(model="luna", epochs=2, samples=16, batch_size=8, lr=1e-3, ema=0.9)
FEW = ["--model", "luna", "--epochs", "2", "--samples", "16", "--batch-size", "8"]


@pytest.fixture(scope="module")
def home(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of two epochs has been trained; never written to."""
    folder = tmp_path_factory.mktemp("home")
    done = typed(cli, ["cls", "--store", small_store, *FEW], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    return next(home.glob("runs/*-cls"))


@pytest.fixture
def own(home: Path, trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "run"))


def refusal(folder: Path, *args: object) -> str:
    """What a command that is refused says: one line."""
    done = typed(cli, args, folder)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


# --- runs are not mixed


def test_a_run_is_not_written_over(own: Path, small_store: Path) -> None:
    before = {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()}
    said = refusal(own.parent, "cls", "--store", small_store, *FEW, "--out", "run")
    assert "run holds a run already. Go on with --resume, or give another --out" in said
    assert {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()} == before


def test_a_run_without_a_checkpoint_is_not_the_newest(trained: Path, home: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(home)
    junk = home / "runs/2099-01-01_00.00.00-cls"
    junk.mkdir()
    (junk / "run.json").write_text("{}")
    assert newest_run("cls").name == trained.name


@pytest.mark.parametrize("command", ["cls", "seg", "loc"])
def test_init_takes_a_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    assert "runs/a has no checkpoint. Name a run" in refusal(tmp_path, command, "--init", "runs/a")
    (tmp_path / "runs/a" / LAST).write_bytes(b"")
    home = {"cls": training, "seg": segmentation, "loc": localisation}[command]

    def opened(options: TrainOptions, config: TrainConfig) -> None:
        raise UsageError(str(options.init))

    monkeypatch.setattr(home, "open_training", opened)
    assert refusal(tmp_path, command, "--init", "runs/a") == f"lunatrain: {Path('runs/a') / LAST}\n"


# --- settings are heeded or refused


@pytest.mark.parametrize(
    ("more", "name"),
    [(["--epochs", "4"], "--epochs"), (["--no-balanced"], "--no-balanced"), (["--init", "run"], "--init")],
)
def test_a_resumed_run_keeps_its_settings_and_says_so(own: Path, more: list[str], name: str) -> None:
    said = refusal(own.parent, "cls", "--resume", "--out", "run", *more)
    assert f"{name}: a resumed run keeps its settings. Leave it out, or start a new run with --init" in said


def test_a_resumed_run_may_have_another_device_and_way_of_reading(own: Path) -> None:
    done = typed(cli, ["cls", "--resume", "--out", "run", "--device", "cpu", "--io", "pread"], own.parent)
    assert done.returncode == 0, done.stderr


def test_images_refuse_what_is_of_slabs_by_name(tmp_path: Path) -> None:
    of_slabs = ["--preset", "book-ch13", "--split", "all", "--ratio", "2", "--no-balanced", "--val-slices", "9"]
    (tmp_path / "cells").mkdir()
    said = refusal(tmp_path, "seg", "--images", "cells", *of_slabs)
    for name in ("--preset", "--split", "--ratio", "--no-balanced", "--val-slices"):
        assert name in said


def test_images_of_several_classes_refuse_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "read_images", lambda path: ImageFolder(path, (), (), (0, 1, 2)))
    with pytest.raises(UsageError, match="--loss: got book for images of 3 classes"):
        segmentation.open_training(TrainOptions(tmp_path, tmp_path / "r"), replace(IMAGES, loss="book"))


@pytest.mark.parametrize("pair", [("--no-balanced", "3"), ("--balanced", "0")])
def test_a_ratio_and_no_balance_contradict(tmp_path: Path, pair: tuple[str, str]) -> None:
    said = refusal(tmp_path, "cls", pair[0], "--ratio", pair[1])
    assert f"{pair[0]} and --ratio {pair[1]}: choose one of them" in said


@pytest.mark.parametrize("name", ["patience", "seed"])
def test_below_zero_is_refused_and_leaves_nothing(small_store: Path, tmp_path: Path, name: str) -> None:
    said = refusal(tmp_path, "cls", "--store", small_store, *FEW, f"--{name}", "-1")
    assert f"--{name}: got -1, expected 0 or more" in said
    assert not list(tmp_path.iterdir())


def test_help_says_how_many_samples(tmp_path: Path) -> None:
    said = " ".join(typed(cli, ["seg", "--help"], tmp_path).stdout.split())
    assert "[default: as many as there are training slabs]" in said


def test_a_missing_part_of_slabs_is_said_of_slabs(small_store: Path, tmp_path: Path) -> None:
    slabs = segmentation.open_store(small_store).slabs
    none = slabs[slabs["split_series"] == "train"]
    with pytest.raises(UsageError, match="has no val slabs among the store's"):
        segmentation.select_rows(none, "series", "val", "is_positive", "slab")


# --- stops and resumes


def stopping_at(count: int) -> Any:
    asked = 0

    @contextmanager
    def stop() -> Iterator[Any]:
        def is_stopping() -> bool:
            nonlocal asked
            asked += 1
            return asked == count

        if not count:
            raise KeyboardInterrupt
        yield is_stopping

    return stop


def test_an_interrupt_names_the_checkpoint_it_left(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(at: int, run: str) -> str:
        monkeypatch.setattr(loop, "stop_request", stopping_at(at))
        done = typed(cli, ["cls", "--store", small_store, *FEW, "--out", run], tmp_path)
        assert done.returncode == 130
        return done.stderr.splitlines()[-1]

    assert stopped(1, "a") == f"lunatrain: interrupted; {Path('a') / LAST} is kept, go on with --resume --out a"
    assert stopped(0, "b") == "lunatrain: interrupted"


def test_an_interrupt_of_another_command_promises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lunatrain.bench.run_bench", interrupted)
    done = typed(cli, ["bench"], tmp_path)
    assert (done.returncode, done.stderr) == (130, "lunatrain: interrupted\n")


def test_a_finished_run_without_its_log_is_resumed(own: Path) -> None:
    (own / "metrics.jsonl").unlink()
    done = typed(cli, ["cls", "--resume", "--out", "run", "--json"], own.parent)
    assert done.returncode == 0, done.stderr
    best = load_checkpoint(own / LAST).state["progress"]
    found = json.loads(done.stdout)
    assert (found["epochs"], found["epoch"]) == (2, best["best_epoch"])
    assert found["auc"] == best["best_figures"]["auc"]


def test_going_on_from_the_best_is_said_and_exact(small_store: Path, tmp_path: Path) -> None:
    def fit(trainer: loop.Trainer) -> dict[str, Any]:
        with RunLog(trainer.run.path) as log:
            loop.train(trainer, log)
        return load_checkpoint(trainer.run.path / LAST).state

    whole = fit(open_training(TrainOptions(small_store, tmp_path / "whole"), QUICK))
    options = TrainOptions(small_store, tmp_path / "run")
    trainer = open_training(options, QUICK)
    for batch in trainer.run.loader.batches(trainer.run.plan.batches(0)):
        trainer.step(batch)
    loop._end_epoch(trainer, None)
    training.note_store(options)
    (options.run / LAST).write_bytes(b"half")
    resumed, loaded = resume_training(options)
    assert loaded.path.name == BEST
    assert "is damaged" in str(loaded.fault)
    again = fit(resumed)  # from weights that are not the averaged ones
    for part in ("model", "averaged"):
        assert all(torch.equal(tensor, again[part][name]) for name, tensor in whole[part].items())
    (options.run / LAST).write_bytes(b"half")
    done = typed(cli, ["cls", "--resume", "--out", options.run], tmp_path)
    assert f"lunatrain: {options.run / LAST} is damaged" in done.stderr
    assert "; going on from best.pt" in done.stderr


def test_a_scaler_is_resumed_where_there_was_one(small_store: Path, tmp_path: Path) -> None:
    trainer = open_training(TrainOptions(small_store, tmp_path / "r"), QUICK)
    state = trainer.state()
    assert state["scaler"] == {}
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer.load(state)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_torchruns_words_count_together_alone(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv(missing)
    with join_processes("cpu") as processes:
        assert processes == Processes()


# --- figures and weights


def test_what_was_validated_is_what_is_loaded(trained: Path) -> None:
    state = load_checkpoint(trained / LAST).state
    model, _ = training.load_model(trained / LAST, (16, 24, 24))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["averaged"][f"module.{name}"])
    assert any(not torch.equal(tensor, state["model"][name]) for name, tensor in model.state_dict().items())


def seg_checkpoint(path: Path, **args: Any) -> Path:
    state = {
        "model": UNet().state_dict(), "averaged": None, "config": {}, "store_id": "x",
        "model_args": {"name": "unet", "in_channels": 7, "num_classes": 1, "kind": "slices", **args},
        "progress": {"figures": {"threshold": 0.2}, "best_figures": {"threshold": 0.7}},
    }  # fmt: skip
    save_checkpoint(path, state)
    return path


def test_a_checkpoint_has_the_threshold_of_its_own_epoch(small_store: Path, tmp_path: Path) -> None:
    assert segmentation.load_segmenter(seg_checkpoint(tmp_path / "last.pt"))[1]["threshold"] == 0.2
    trainer = open_training(TrainOptions(small_store, tmp_path / "r"), QUICK)
    values = iter([0.6, 0.4])
    task = SimpleNamespace(
        score_name="auc", shown=(), summarize=lambda sums: {},
        validate=lambda *given: Validation({"auc": next(values)}),
    )  # fmt: skip
    object.__setattr__(trainer.run, "task", task)
    for _ in range(2):
        trainer.progress.sums = {"loss": 1.0, "samples": 1.0}
        loop._end_epoch(trainer, None)
    progress = load_checkpoint(tmp_path / "r" / LAST).state["progress"]
    assert (progress["figures"], progress["best_figures"]) == ({"auc": 0.4}, {"auc": 0.6})


@pytest.mark.parametrize(("values", "best"), [([math.nan, 0.1], 1), ([0.1, math.nan], 0), ([math.nan, math.nan], 0)])
def test_a_score_that_is_none_gives_way_to_any(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], best: int
) -> None:
    trainer = open_training(TrainOptions(small_store, tmp_path / "r"), replace(QUICK, keep_best=2))
    given = iter(values)
    monkeypatch.setattr(
        type(trainer.run.task), "validate", lambda *args: Validation({"average_precision": next(given)})
    )
    lines = []
    for _ in values:
        trainer.progress.sums = {"loss": 1.0, "samples": 1.0, **dict.fromkeys(
            ("num_negative", "num_positive", "right_negative", "right_positive"), 1.0)}  # fmt: skip
        lines.append(loop._end_epoch(trainer, None))
    assert trainer.progress.best_epoch == best
    assert "nan" not in "".join(lines)
    assert "average_precision -" in "".join(lines)
    assert load_checkpoint(tmp_path / "r" / BEST).state["progress"]["epoch"] == best + 1


def test_a_best_that_was_none_in_an_older_checkpoint_gives_way(small_store: Path, tmp_path: Path) -> None:
    trainer = open_training(TrainOptions(small_store, tmp_path / "r"), QUICK)
    trainer.progress.best, trainer.progress.best_epoch, trainer.progress.epoch = math.nan, 0, 1
    next_batch = next(trainer.run.loader.batches(trainer.run.plan.batches(1)))
    trainer.step(next_batch)
    loop._end_epoch(trainer, None)
    assert trainer.progress.best_epoch == 1


def test_all_processes_decide_by_the_first_ones_score(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunatrain.distributed._summed", lambda values: values + 0.25)
    assert [Processes(rank, 2).of_first(0.5) for rank in (0, 1)] == [0.75, 0.25]
    monkeypatch.setattr(Processes, "of_first", lambda self, value: 0.125)
    trainer = open_training(TrainOptions(small_store, tmp_path / "r"), QUICK)
    trainer.step(next(trainer.run.loader.batches(trainer.run.plan.batches(0))))
    loop._end_epoch(trainer, None)
    assert trainer.progress.best == 0.125


def test_figures_are_shown_alike() -> None:
    assert [figure_text(value) for value in (0.5, 0.001234, 0.0, math.nan, None)] == [
        "0.500",
        "0.0012",
        "0.000",
        "-",
        "-",
    ]


def test_bf16_that_is_emulated_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert loop._amp_dtype("auto", torch.device("cuda")) is torch.float16


# --- segmentation


class OnDevice(torch.Tensor):
    """Behaves as a tensor on CUDA does, in this one thing."""

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def cpu(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


class OneSlab:
    """A validation on one slab that lies on a device."""

    num_nodules = 1

    def __len__(self) -> int:
        return 1

    def batches(self) -> Iterator[Any]:
        truth = TrueSlice(np.array([5]), np.array([0]), "slab 0")
        yield torch.zeros(1, 7, 16, 16).as_subclass(OnDevice), [truth]


def test_slabs_on_a_device_are_validated() -> None:
    task = Segment(segmentation.Augmentation.parse(""), 16, segmentation.pick_loss("dice-bce"), OneSlab())
    figures = task.validate(UNet(), torch.device("cpu"), loop.amp_context("off", torch.device("cpu"))).figures
    assert 0 <= figures["recall"] <= 1


def test_a_held_out_part_without_a_nodule_is_refused(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "_validation", lambda *args: SimpleNamespace(num_nodules=0))
    with pytest.raises(UsageError, match="no held-out slice of split series shows a nodule") as info:
        segmentation.open_training(TrainOptions(small_store, tmp_path / "r"), SegConfig(batch_size=8))
    assert "\n" not in str(info.value)


def test_a_segmentation_remembers_its_window(small_store: Path, tmp_path: Path) -> None:
    trainer = segmentation.open_training(TrainOptions(small_store, tmp_path / "r"), SegConfig(batch_size=8))
    assert trainer.run.model_args["hu"] == [-1000, 1000]
    assert segmentation.load_segmenter(seg_checkpoint(tmp_path / "old.pt"))[1]["hu_window"] == HU_WINDOW
    model, facts = segmentation.load_segmenter(seg_checkpoint(tmp_path / "a.pt", hu=[-900, 400]))
    assert facts["hu_window"] == (-900.0, 400.0)
    hu = np.random.default_rng(0).integers(-1000, 1000, (3, 16, 16)).astype(np.int16)
    clipped = predict_volume(model, hu.clip(-900, 400), "cpu")
    np.testing.assert_array_equal(predict_volume(model, hu, "cpu"), clipped)
    check_window(model)
    wide, _ = segmentation.load_segmenter(seg_checkpoint(tmp_path / "b.pt", hu=[-1200, 2000]))
    with pytest.raises(UsageError, match=r"runs/b was trained on HU -1200 to 2000, the detector keeps -1000 to 1000"):
        check_window(wide, "runs/b")


def test_validation_slices_are_clipped_as_the_store_is() -> None:
    hu = np.full((3, 2, 2), 1800, dtype=np.float32)

    @contextmanager
    def open_volume(series_uid: str) -> Iterator[Any]:
        yield hu

    store: Any = SimpleNamespace(parameters={"hu": [-1200, 2000]}, open_volume=open_volume)
    truth = TrueSlice(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), "")
    val = HeldOutVolumes(store, (_ScanSlices("1.2", np.array([1]), (truth,)),), 0, 3, 4)
    ((slabs, _),) = val.batches()
    assert float(slabs.max()) == 1800
    assert float(read_slabs(hu, [1], 3, slice(None), slice(None)).max()) == 1000


# --- what takes long is seen


def test_bars_are_drawn_for_those_who_ask(loc_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def bar(total: int | None, what: str, unit: str, *, show: bool) -> Any:
        shown.append((what, show))
        return progress_bar(total, what, unit, show=False)

    monkeypatch.setattr("lunatrain.localisation.progress_bar", bar)
    monkeypatch.setattr("lunatrain.slabs.progress_bar", bar)
    localisation.read_slices(loc_store, None, 32, 9.0, show=True)
    options = TrainOptions(loc_store, Path("unused"), show_progress=True)
    trainer = segmentation.open_training(options, SegConfig(batch_size=8, val_slices=8))
    assert shown == [("reading", True), ("held-out masks", True)]
    assert trainer.run.task.show_progress
    assert progress_bar(3, "x", "y", show=False).disable
