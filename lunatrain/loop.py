"""The training loop: step, validate, save, each one call. It knows no task and no files but its checkpoints.

Stopping loses nothing: a place in training is (epoch, step), everything random is seeded by it, so a run that was
stopped and resumed is the run that was not, bit for bit on a CPU.
"""

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from lunatrain.checkpoint import BEST, LAST, save_checkpoint
from lunatrain.config import TrainConfig
from lunatrain.distributed import Processes
from lunatrain.errors import TrainingError
from lunatrain.log import RunLog, figure_text
from lunatrain.sampling import EpochPlan
from lunatrain.tasks.task import LOSS, Batch, Loader, Task

NAN_FILE = "nan_batch.json"
PLATEAU_EPOCHS, PLATEAU_FACTOR = 3, 0.3
"""Epochs without a better score after which the schedule "plateau" lowers the learning rate, and to what share."""


@dataclass
class Progress:
    """Where a run is. `step` counts within the epoch; `sums` are those of the epoch so far; `best` is a score."""

    epoch: int = 0
    step: int = 0
    samples: int = 0
    best: float = -1.0
    best_epoch: int = -1
    best_figures: dict[str, float] = field(default_factory=dict)
    """The validation of the best epoch."""
    figures: dict[str, float] = field(default_factory=dict)
    """The validation of the last epoch that has ended."""
    kept: list[tuple[float, int]] = field(default_factory=list)
    """Scores and epochs whose weights have a file of their own, the best first."""
    sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """All parts of a training run, put together by `lunatrain.training`."""

    path: Path
    config: TrainConfig
    device: torch.device
    task: Task
    model: nn.Module
    plan: EpochPlan
    loader: Loader
    store_id: str
    model_args: dict[str, Any]
    processes: Processes = field(default_factory=Processes)
    frozen: tuple[nn.Module, ...] = ()
    """Parts of the model that don't learn."""
    notes: tuple[str, ...] = ()
    """What a user should know before it starts, a line each."""


class Trainer:
    """The parts of a run that change: weights, optimizer, schedule, progress."""

    def __init__(self, run: Run) -> None:
        self.run = run
        config = run.config
        self.model = run.model
        called = run.processes.wrap(self.model)
        self.forward: nn.Module = torch.compile(called) if config.compile else called  # type: ignore[assignment]
        self.averaged = (
            AveragedModel(self.model, multi_avg_fn=partial(_average, config.ema), use_buffers=True)
            if config.ema
            else None
        )
        self.optimizer = _optimizer(config, self.model)
        self.schedule = _schedule(config, self.optimizer, config.epochs * len(run.plan))
        self.amp = amp_context(config.amp, run.device)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=_amp_dtype(config.amp, run.device) == torch.float16)
        self.progress = Progress()

    @property
    def judged(self) -> nn.Module:
        """The model that is validated: the averaged one, where there is one; see `Loaded.weights`."""
        return self.averaged.module if self.averaged is not None else self.model

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress) | {"sums": dict(self.progress.sums)},
            "config": self.run.config.to_json(),
            "model_args": self.run.model_args,
            "store_id": self.run.store_id,
        }
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.model.load_state_dict(state["model"])
        if self.averaged is not None and state["averaged"] is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # not where mixed precision was another then
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if not self.run.processes.is_first:
            self.progress.sums = dict.fromkeys(self.progress.sums, 0.0)  # the first process has those of all

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        progress, config, processes = self.progress, self.run.config, self.run.processes
        place = (config.seed, progress.epoch, progress.step, *([processes.rank] if processes.rank else []))
        generator = _seed_step(place, self.run.device)
        self.forward.train()
        for module in self.run.frozen:
            module.eval()  # its statistics stand still as well
        with self.amp():
            loss, logits = self.run.task.train_loss(self.forward, batch, generator)
        value = float(loss.detach())
        if processes.any(not np.isfinite(value)):
            self._stop_at_nan(batch, value)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if isinstance(self.schedule, OneCycleLR):
            self.schedule.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        size = len(batch.rows)
        counted = {"samples": float(size), "loss": value * size, **self.run.task.count(batch, logits)}
        for name, amount in counted.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + amount
        progress.step += 1
        progress.samples += size * processes.world_size

    def _stop_at_nan(self, batch: Batch, value: float) -> None:
        progress = self.progress
        path = self.run.path / NAN_FILE
        if not np.isfinite(value):  # else it is another process's batch, and its to note
            rows = [int(row) for row in batch.rows]
            noted = {"epoch": progress.epoch, "step": progress.step, "loss": str(value), "rows": rows}
            path.write_text(json.dumps(noted))
        shown = value if not np.isfinite(value) else float("nan")
        message = (
            f"the loss became {shown} at epoch {progress.epoch}, step {progress.step}; the batch's rows are in {path}. "
            "Try a smaller --lr, or --amp off"
        )
        raise TrainingError(message)


def train(trainer: Trainer, log: RunLog | None, *, show_progress: bool = False) -> Progress:
    """Train to the end, or to the first stop asked for; the last and the best weights are on the disk then.

    Of several processes the first has a log, and writes the checkpoints.

    Returns
    -------
    Progress
        Where the run is.

    Raises
    ------
    TrainingError
        The loss is no number any more.
    KeyboardInterrupt
        A stop was asked for; the checkpoint has been written, unless a second stop did not wait for it.
    """
    try:
        with stop_request() as is_stopping:
            _train(trainer, log, is_stopping, show_progress)
    except KeyboardInterrupt:
        last = trainer.run.path / LAST
        if not last.exists():
            raise
        message = f"interrupted; {last} is kept, go on with --resume --out {trainer.run.path}"
        raise KeyboardInterrupt(message) from None
    return trainer.progress


def _train(trainer: Trainer, log: RunLog | None, is_stopping: Callable[[], bool], show_progress: bool) -> None:
    run, progress = trainer.run, trainer.progress
    while progress.epoch < run.config.epochs and not _is_patience_over(run.config, progress):
        for batch in _show(run, progress, show_progress):
            trainer.step(batch)
            if run.processes.any(is_stopping()):
                _save(trainer, LAST)
                raise KeyboardInterrupt
            if progress.step % run.config.save_steps == 0:
                _save(trainer, LAST)
        line = _end_epoch(trainer, log)
        if show_progress and run.processes.is_first:
            tqdm.write(line, file=sys.stderr)


def _end_epoch(trainer: Trainer, log: RunLog | None) -> str:
    """Validate, log, save; go on to the next epoch. What came of it, in a line."""
    run, progress = trainer.run, trainer.progress
    _require_finite(trainer)
    sums = run.processes.sum(progress.sums)
    mean_loss = sums["loss"] / max(1.0, sums["samples"])
    trained = {"loss": mean_loss, **run.task.summarize(sums), "data_wait_share": run.loader.wait_share}
    validation = run.task.validate(trainer.judged, run.device, trainer.amp)
    if log is not None:
        log.write("train", progress.epoch, progress.samples, trained)
        log.write("val", progress.epoch, progress.samples, validation.figures)
        validation.draw(log, progress.samples)
    progress.figures = dict(validation.figures)
    score = _score(trainer, validation.figures[run.task.score_name])
    if isinstance(trainer.schedule, ReduceLROnPlateau):
        trainer.schedule.step(score)
    is_best = progress.best_epoch < 0 or score > progress.best or math.isnan(progress.best)
    if is_best:
        progress.best, progress.best_epoch, progress.best_figures = score, progress.epoch, progress.figures
    dropped = _rank(progress, score, run.config.keep_best)
    progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
    if is_best:
        _save(trainer, BEST)
    if any(epoch == progress.epoch - 1 for _, epoch in progress.kept):
        _save(trainer, epoch_file(progress.epoch - 1))
    _save(trainer, LAST)  # last: a run stopped before this ends the epoch again
    if run.processes.is_first:
        for epoch in dropped:
            (run.path / epoch_file(epoch)).unlink(missing_ok=True)
    figures = progress.figures
    shown = [f"{name} {figure_text(figures[name])}" for name in run.task.shown if name in figures]
    best = ", the best so far" if is_best else ""
    return f"epoch {progress.epoch}/{run.config.epochs}: loss {mean_loss:.4f}; validation: {', '.join(shown)}{best}"


def _score(trainer: Trainer, figure: float) -> float:
    """What decides on the best epoch, patience and the learning rate: the first process's, the higher, the better."""
    score = trainer.run.processes.of_first(-figure if trainer.run.task.score_name == LOSS else figure)
    return -math.inf if math.isnan(score) else score


def epoch_file(epoch: int) -> str:
    """Name of the checkpoint of an epoch that is one of the best; `epoch` counts from 0, the name from 1."""
    return f"epoch-{epoch + 1:03d}.pt"


def _rank(progress: Progress, score: float, keep_best: int) -> list[int]:
    """Take the epoch's score among those kept; return the epochs that fall out."""
    if keep_best == 1:
        return []
    ranked = sorted([*progress.kept, (score, progress.epoch)], key=lambda item: (-item[0], item[1]))
    progress.kept = ranked[:keep_best]
    return [epoch for _, epoch in ranked[keep_best:]]


def _require_finite(trainer: Trainer) -> None:
    """Stop before weights that are no numbers are judged or saved; a gradient can spoil them after a good loss.

    Raises
    ------
    TrainingError
        Some are not.
    """
    for name, tensor in trainer.model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            place = f"epoch {trainer.progress.epoch}, step {trainer.progress.step}"
            message = (
                f"the weights {name} are no numbers any more at {place}; the checkpoint before this is kept. Try a "
                "smaller --lr, or --amp off"
            )
            raise TrainingError(message)


def _save(trainer: Trainer, name: str) -> None:
    _require_finite(trainer)
    processes = trainer.run.processes
    sums = processes.sum(trainer.progress.sums)
    if processes.is_first:
        state = trainer.state()
        state["progress"]["sums"] = sums
        save_checkpoint(trainer.run.path / name, state)
    processes.wait()


def _show(run: Run, progress: Progress, show: bool) -> Iterator[Batch]:
    batches = run.loader.batches(run.plan.batches(progress.epoch, progress.step))
    bar: Any = tqdm(
        batches,
        desc=f"epoch {progress.epoch + 1}/{run.config.epochs}",
        initial=progress.step,
        total=len(run.plan),
        unit="batch",
        disable=None if show and run.processes.is_first else True,
    )
    for batch in bar:
        yield batch
        bar.set_postfix(loss=f"{progress.sums['loss'] / max(1, progress.sums['samples']):.4f}", refresh=False)


def _is_patience_over(config: TrainConfig, progress: Progress) -> bool:
    return bool(config.patience) and progress.epoch - 1 - progress.best_epoch >= config.patience and progress.step == 0


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(learning, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(learning, config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(learning, config.lr, weight_decay=config.weight_decay)


def _schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler | None:
    if config.schedule == "one-cycle":
        return OneCycleLR(optimizer, config.lr, total_steps=max(total_steps, 2))
    if config.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_EPOCHS)
    return None


@torch.no_grad()
def _average(decay: float, averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
    """Move averaged weights and statistics towards the current ones.

    The first steps move them farther, or a short run would be judged by the weights it began with; the ramp is
    TensorFlow's, of its ExponentialMovingAverage.
    """
    steps = float(count)
    share = 1 - min(decay, (1 + steps) / (10 + steps))
    if averaged[0].is_floating_point():
        torch._foreach_lerp_(averaged, current, share)
        return
    for one, other in zip(averaged, current, strict=True):
        one.copy_(other)  # counts of batches


def _seed_step(place: tuple[int, ...], device: torch.device) -> torch.Generator:
    """Seed all that is random in a step (dropout, augmentation) from its place in training."""
    value = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(value)
    return torch.Generator(device).manual_seed(value)


def _amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def amp_context(amp: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What to run a model under, for the given mixed precision."""
    dtype = _amp_dtype(amp, device)
    return nullcontext if dtype is None else partial(torch.autocast, device.type, dtype)


@contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C (or SIGTERM) finish its step; a second one breaks off at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
