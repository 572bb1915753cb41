"""Evaluate a run or a checkpoint on a store: predict, score, and write the report."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from lunaprep.store.reader import Store, open_store
from lunatrain.config import SUBTYPE, TARGETS
from lunatrain.crop_kind import check_fits
from lunatrain.data import CropLoader
from lunatrain.errors import UsageError
from lunatrain.evaluate import Evaluation, evaluate, learnt_notes
from lunatrain.evaluate_classes import ClassEvaluation, evaluate_classes
from lunatrain.labelled import rows_of_classes
from lunatrain.log import read_metrics
from lunatrain.loop import amp_context
from lunatrain.mapping import open_crops
from lunatrain.marks import read_annotations
from lunatrain.models import prepare_for
from lunatrain.report import worst_pictures, write_report
from lunatrain.report_classes import write_class_report, wrong_pictures
from lunatrain.sampling import Rows, columns_of, select_rows
from lunatrain.tasks.classify import in_batches, predict_classes
from lunatrain.training import CLASSIFIERS, best_of, load_model, newest_run, pick_device, store_of

BATCH = 256
MALIGNANT = TARGETS["malignant"]
BY_CANDIDATE = "candidate"
NO_FROC = (
    "no FROC and no CPM: split candidate holds out some of each scan's candidates, which are not all marks of the scan"
)


@dataclass(frozen=True)
class EvalOptions:
    """What is to be evaluated; what is None is taken from the run."""

    run: Path | None = None
    checkpoint: Path | None = None
    store: Path | None = None
    split: str | None = None
    part: str = "val"
    target: str | None = None
    annotations: Path | None = None
    excluded: Path | None = None
    bootstrap: int = 0
    device: str = "auto"
    out: Path | None = None


@dataclass(frozen=True, eq=False)
class Evaluated:
    """An evaluation and the folder its report lies in."""

    result: Evaluation | ClassEvaluation
    out: Path


@dataclass(frozen=True, eq=False)
class _Judged:
    """A network, and the part of a store it is to be judged on."""

    options: EvalOptions
    store: Store
    model: torch.nn.Module
    split: str
    trained: str | None
    """The split that the network was trained on; None where that is not known."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of any figures must know."""
        return learnt_notes(self.trained, self.split, self.options.part) if self.trained else ()

    def predict(self, rows: Rows) -> Any:
        """Probabilities of rows, (n, classes)."""
        return predict_rows(self.model, self.store, rows, pick_device(self.options.device))


def run_evaluation(options: EvalOptions) -> Evaluated:
    """Predict a part of a split, score it, write report.html, predictions.csv and metrics.json.

    Raises
    ------
    UsageError
        The store lacks what is asked for, or the network has not learnt it.
    CheckpointError
        Damaged, or of another model.
    """
    checkpoint, run = _checkpoint(options)
    store = open_store(_store(options, run))
    model, facts = load_model(checkpoint, store.crop_shape)
    check_fits(checkpoint, facts["model_args"], store)
    classes = tuple(facts["config"].get("classes", ()))
    target = TARGETS[options.target] if options.target else facts["config"].get("target", "is_nodule")
    if (target == SUBTYPE) != bool(classes):
        learnt = facts["config"].get("target", "is_nodule")
        message = (
            f"--target {options.target}: {checkpoint} has learnt {learnt}. Leave --target out, or name another run"
        )
        raise UsageError(message)
    trained = facts["config"].get("split")
    split = options.split or trained or "series"
    judged = _Judged(options, store, model, split, trained)
    result = _of_classes(judged, classes) if classes else _of_two(judged, target)
    out = options.out or (run or Path()) / f"eval-{split.replace(':', '')}-{options.part}"
    given: dict[str, Any] = {
        "title": f"{run.name if run else checkpoint.name}: {options.part}",
        "facts": _facts(judged, result.rows, (checkpoint, run), facts),
        "curves": read_metrics(run) if run else None,
    }
    if isinstance(result, ClassEvaluation):
        write_class_report(result, out, **given, pictures=wrong_pictures(result, store.crops))
    else:
        write_report(result, out, **given, pictures=worst_pictures(result, store.crops))
    return Evaluated(result, out)


def _of_two(judged: _Judged, target: str) -> Evaluation:
    options, store = judged.options, judged.store
    if target == MALIGNANT:
        _refuse(options, "of malignancy", "annotations", "excluded", "bootstrap")
    if options.excluded is not None and options.annotations is None:
        message = "--excluded needs --annotations: both belong to the challenge's score. Give both, or neither"
        raise UsageError(message)
    is_whole = judged.split != BY_CANDIDATE or options.part == "all"
    rows = select_rows(store.columns(*columns_of(judged.split, target)), judged.split, options.part, target)
    result = evaluate(
        store.rows(rows),
        judged.predict(rows)[:, 1],
        label=target,
        annotations=read_annotations(options.annotations) if options.annotations else None,
        excluded=read_annotations(options.excluded) if options.excluded else None,
        series_uids=_series(store, judged.split, options.part),
        num_bootstrap=options.bootstrap,
        with_froc=is_whole,
    )
    of_split = () if is_whole or target == MALIGNANT else (NO_FROC,)
    return replace(result, notes=(*judged.notes, *of_split, *result.notes))


def _of_classes(judged: _Judged, classes: tuple[str, ...]) -> ClassEvaluation:
    options, store = judged.options, judged.store
    _refuse(options, f"of a {SUBTYPE}", "annotations", "excluded")
    manifest = store.columns(*columns_of(judged.split, SUBTYPE))
    rows, notes = rows_of_classes(manifest, judged.split, options.part, classes)
    probability = judged.predict(rows)
    notes = (*judged.notes, *notes)
    return evaluate_classes(store.rows(rows), probability, classes, num_bootstrap=options.bootstrap, notes=notes)


def _refuse(options: EvalOptions, of_what: str, *names: str) -> None:
    """Refuse options of the challenge's score where there is none."""
    for name in names:
        if getattr(options, name):
            message = f"--{name} is for the challenge's score, and there is none {of_what}. Leave it out"
            raise UsageError(message)


def _facts(
    judged: _Judged, rows: pd.DataFrame, places: tuple[Path, Path | None], facts: dict[str, Any]
) -> dict[str, str]:
    """Where a result comes from, for the report."""
    checkpoint, run = places
    progress, store_id = facts["progress"], str(judged.store.record["store_id"])
    about = {
        "checkpoint": checkpoint.name,
        "run": run.name if run else "-",
        "epoch": _epoch_text(progress) if progress else "-",
        "samples seen": f"{progress.get('samples', 0):,}" if progress else "-",
        "store": store_id,
        "split": f"{judged.split}, {judged.options.part}",
        "crops": f"{len(rows):,} of {rows['series_uid'].nunique()} scans",
    }
    if facts["store_id"] not in (None, store_id):
        about["trained on"] = f"another store, {facts['store_id']}"
    return about


def _epoch_text(progress: Mapping[str, Any]) -> str:
    """Epochs whose weights a checkpoint holds: it is saved after its epoch has been counted."""
    steps = f" and {progress['step']:,} steps" if progress["step"] else ""
    return f"{progress['epoch']}{steps}"


def predict_rows(model: torch.nn.Module, store: Store, rows: Rows, device: torch.device) -> Any:
    """Probability of each class of each row, (n, classes) float64."""
    model = prepare_for(device, model)
    with CropLoader(open_crops(store), BATCH, device=device) as loader:
        batches = loader.batches(in_batches(rows, BATCH))
        bar = tqdm(batches, desc="eval", total=-(-len(rows) // BATCH), unit="batch", disable=None)
        return predict_classes(model, bar, device, amp_context("off", device))


def _checkpoint(options: EvalOptions) -> tuple[Path, Path | None]:
    """The checkpoint asked for, and the run it belongs to, if to any."""
    if options.checkpoint is not None:
        parent = options.checkpoint.parent
        return options.checkpoint, options.run or (parent if (parent / "run.json").exists() else None)
    run = options.run or newest_run(*CLASSIFIERS)
    return best_of(run), run


def _store(options: EvalOptions, run: Path | None) -> Path:
    if options.store is not None:
        return options.store
    return store_of(run) if run else Path("crops.h5")


def _series(store: Store, split: str, part: str) -> list[str]:
    """All scans of a part, those without any candidate too: they count in FP per scan."""
    manifest = store.columns(*columns_of(split, "series_uid"))
    seen = set(manifest["series_uid"].iloc[select_rows(manifest, split, part)])
    if part == "all":
        seen |= set(store.scans[store.scans["status"] == "ok"]["series_uid"])
    return sorted(seen)
