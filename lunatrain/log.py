"""What a run leaves for people: metrics.jsonl and TensorBoard, both against samples seen. The home of tensorboard."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
SMALL = 0.01
"""Smaller figures are shown with two digits."""


def figure_text(value: float | None) -> str:
    """A figure as a line shows it; what is none is a dash.

    >>> figure_text(0.12345), figure_text(0.00012345), figure_text(float("nan"))
    ('0.123', '0.00012', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3f}" if value >= SMALL or not value else f"{value:.2g}"


def progress_bar(total: int | None, what: str, unit: str, *, show: bool) -> "tqdm[Any]":
    """A bar on stderr, which goes when it is done; none without a terminal, nor where it is not to be shown."""
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=None if show else True)


class RunLog:
    """Writes one JSON line for each epoch and part, and TensorBoard events where tensorboard is installed."""

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.run = run
        self._path = run / METRICS_FILE
        self._board = _summary_writer(run)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._board is not None:
            self._board.close()

    def forget_after(self, samples: int) -> None:
        """Drop the lines of a stopped run that the resumed one will write again."""
        if self._path.exists():
            lines = [line for line in read_metrics(self._path.parent) if line["samples"] <= samples]
            partial = self._path.with_name(f"{METRICS_FILE}.partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            partial.replace(self._path)

    def write(self, part: str, epoch: int, samples: int, figures: Mapping[str, float]) -> None:
        """Note the figures of one part (train or val) of an epoch."""
        plain = {name: None if math.isnan(value) else value for name, value in figures.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, "epoch": epoch, "samples": samples, **plain}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{name}/{part}", value, samples)

    def draw_picture(self, name: str, samples: int, image: npt.NDArray[np.uint8], png: bytes) -> None:
        """Note a picture: as an image (R, C, 3) in TensorBoard, as a file with its captions in the run's folder."""
        self.write_picture(f"{name}/{samples:09d}.png", png)
        if self._board is not None:
            self._board.add_image(name, image, samples, dataformats="HWC")

    def write_picture(self, name: str, png: bytes) -> None:
        """Write a PNG file into the run's folder; one of the same name is replaced."""
        path = self.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)

    def draw_scores(self, samples: int, labels: npt.NDArray[np.int64], probability: npt.NDArray[np.float64]) -> None:
        """Note the precision-recall curve and the histograms of both classes of the validation part."""
        if self._board is None:
            return
        self._board.add_pr_curve("pr", labels, probability, samples)
        for name, scores in (("negative", probability[labels == 0]), ("positive", probability[labels == 1])):
            if len(scores):
                self._board.add_histogram(f"probability/{name}", scores, samples, bins=50)

    def draw_class_scores(
        self,
        samples: int,
        labels: npt.NDArray[np.int64],
        probability: npt.NDArray[np.float64],
        classes: Sequence[str],
    ) -> None:
        """Note of each class its precision-recall curve against the others, and what its crops are given for it."""
        for number, name in enumerate(classes if self._board is not None else ()):
            scores, is_own = probability[:, number], labels == number
            self._board.add_pr_curve(f"pr/{name}", is_own, scores, samples)
            if is_own.any():
                self._board.add_histogram(f"probability/{name}", scores[is_own], samples, bins=50)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    path = run / METRICS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _summary_writer(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run))
