"""Judge the lung boxes of one run, or of several and of their mean, on a part of the data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lunatrain.box_pictures import boxes_png, drawn_slices
from lunatrain.box_slices import BoxSlices, predict_boxes
from lunatrain.box_table import IMAGE, SIDES
from lunatrain.boxes import Floats, iou, iou_figures, mean_of
from lunatrain.errors import UsageError
from lunatrain.evaluate import learnt_notes, note_lines
from lunatrain.localisation import Localiser, load_localiser, read_slices
from lunatrain.sampling import Rows, select_rows
from lunatrain.training import pick_device, slices_of, store_of

METRICS_FILE, PREDICTIONS_FILE, PICTURE_FILE = "metrics.json", "predictions.csv", "boxes.png"
DIGITS = 5
TOGETHER, BASELINE = "their mean", "mean training box"


@dataclass(frozen=True)
class BoxEvalOptions:
    """What is to be evaluated; what is None is taken from the first run."""

    runs: tuple[Path, ...]
    store: Path | None = None
    split: str | None = None
    part: str = "val"
    device: str = "auto"
    out: Path | None = None


@dataclass(frozen=True, eq=False)
class BoxEvaluation:
    """How well boxes fit.

    Attributes
    ----------
    figures : dict of str to dict
        For each run by name, for their mean where they are several, and for the mean training box: see `iou_figures`.
    found, true : ndarray, (n, 4)
        Boxes of all runs together, and the true ones.
    slices : BoxSlices
    rows : ndarray, (n,)
        Slices that were judged.
    notes : tuple of str
    out : Path
        Folder of what was written.
    """

    figures: dict[str, dict[str, float]]
    found: Floats
    true: Floats
    slices: BoxSlices
    rows: Rows
    notes: tuple[str, ...]
    out: Path

    def to_json(self) -> dict[str, Any]:
        """Figures of all runs together, flat; those of each in `runs`."""
        runs = [{"name": name, **values} for name, values in self.figures.items() if name not in (TOGETHER, BASELINE)]
        return {
            "num_slices": len(self.rows),
            "num_series": int(self.slices.table["series_uid"].iloc[self.rows].nunique()),
            **iou_figures(self.found, self.true),
            "iou_mean_box": self.figures[BASELINE]["iou"],
            "runs": runs,
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """A line for each."""
        width = max(map(len, self.figures))
        lines = [f"{'':{width}}  IoU mean  5th percentile  0.9 and more"]
        for name, values in self.figures.items():
            share = f"{100 * values['share_iou_90']:.1f} %"
            lines.append(f"{name:{width}}  {values['iou']:8.3f}  {values['iou_p5']:14.3f}  {share:>12}")
        facts = self.to_json()
        lines.append(f"\n{facts['num_slices']:,} slices of {facts['num_series']:,} series")
        return "\n".join([*lines, *note_lines(self.notes), "", str(self.out / PICTURE_FILE)])


def evaluate_boxes(options: BoxEvalOptions) -> BoxEvaluation:
    """Judge runs on a part of a split; write metrics.json, predictions.csv and boxes.png.

    Raises
    ------
    UsageError
        Runs whose splits differ, or data that lack what is asked for.
    CheckpointError
        A run that gives no boxes.
    """
    device = pick_device(options.device)
    localisers = [load_localiser(run, device) for run in options.runs]
    split = options.split or _common_split(localisers)
    source = options.store or store_of(options.runs[0])
    folder = slices_of(options.runs[0])
    made: dict[int, BoxSlices] = {}
    for item in localisers:
        if item.side not in made:
            made[item.side] = read_slices(source, folder, item.side, localisers[0].config.slice_mm, show=True)
    slices = made[localisers[0].side]
    train_rows, rows = (select_rows(slices.table, split, part) for part in ("train", options.part))
    boxes = slices.boxes
    true = boxes[rows]
    found = [predict_boxes(item.model, made[item.side].pictures[rows], device) for item in localisers]
    figures = {name: iou_figures(item, true) for name, item in zip(_names(options.runs), found, strict=True)}
    if len(found) > 1:
        figures[TOGETHER] = iou_figures(mean_of(found), true)
    figures[BASELINE] = iou_figures(np.tile(boxes[train_rows].mean(axis=0), (len(true), 1)), true)
    trained = dict.fromkeys(item.config.split for item in localisers)
    learnt = [note for name in trained for note in learnt_notes(name, split, options.part)]
    other = [
        f"{run.name} was trained on other data ({item.data_id})"
        for run, item in zip(options.runs, localisers, strict=True)
        if item.data_id != slices.data_id
    ]
    out = options.out or options.runs[0] / f"eval-{split.replace(':', '')}-{options.part}"
    done = BoxEvaluation(figures, mean_of(found), true, slices, rows, (*learnt, *other), out)
    _write(done)
    return done


def _common_split(localisers: Sequence[Localiser]) -> str:
    splits = sorted({item.config.split for item in localisers})
    if len(splits) > 1:
        message = f"the runs have splits {' and '.join(splits)}: what one held out, another has learnt. Give --split"
        raise UsageError(message)
    return splits[0]


def _names(runs: Sequence[Path]) -> list[str]:
    """A name for each run, different ones."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]


def _write(done: BoxEvaluation) -> None:
    done.out.mkdir(parents=True, exist_ok=True)
    (done.out / METRICS_FILE).write_text(json.dumps(done.to_json(), indent=2) + "\n", encoding="utf-8")
    columns = {IMAGE: done.slices.table["name"].iloc[done.rows].to_numpy()}
    columns |= dict(zip(SIDES, done.found.T, strict=True))
    columns |= {f"true_{side}": values for side, values in zip(SIDES, done.true.T, strict=True)}
    table = pd.DataFrame({**columns, "iou": iou(done.found, done.true)}).round(DIGITS)
    table.to_csv(done.out / PREDICTIONS_FILE, index=False, lineterminator="\n")
    (done.out / PICTURE_FILE).write_bytes(boxes_png(*drawn_slices(done.slices, done.rows, done.found, done.true)))
