"""Evaluate a run or a checkpoint on a store: predict, score, and write the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lunaprep.store.reader import Store, open_store
from lunatrain.data import CropLoader
from lunatrain.evaluate import Evaluation, evaluate
from lunatrain.log import read_metrics
from lunatrain.loop import amp_context
from lunatrain.mapping import open_crops
from lunatrain.marks import read_annotations
from lunatrain.models import prepare_for
from lunatrain.report import worst_pictures, write_report
from lunatrain.sampling import Rows, select_rows
from lunatrain.tasks.classify import in_batches, predict
from lunatrain.training import CLASSIFIERS, best_of, load_model, newest_run, pick_device, store_of

BATCH = 256


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

    result: Evaluation
    out: Path


def run_evaluation(options: EvalOptions) -> Evaluated:
    """Predict a part of a split, score it, write report.html, predictions.csv and metrics.json.

    Raises
    ------
    UsageError
        The store lacks what is asked for.
    CheckpointError
        Damaged, or of another model.
    """
    checkpoint, run = _checkpoint(options)
    store = open_store(_store(options, run))
    model, facts = load_model(checkpoint, store.crop_shape)
    target = f"is_{options.target}" if options.target else facts["config"].get("target", "is_nodule")
    split = options.split or facts["config"].get("split", "series")
    rows = select_rows(store.manifest, split, options.part, target)
    probability = predict_rows(model, store, rows, pick_device(options.device))
    chosen = store.manifest.iloc[rows]
    result = evaluate(
        chosen,
        probability,
        label=target,
        annotations=read_annotations(options.annotations) if options.annotations else None,
        excluded=read_annotations(options.excluded) if options.excluded else None,
        series_uids=_series(store, split, options.part),
        num_bootstrap=options.bootstrap,
    )
    out = options.out or (run or Path()) / f"eval-{split.replace(':', '')}-{options.part}"
    about = {
        "checkpoint": checkpoint.name,
        "run": run.name if run else "-",
        "epoch": str(facts["progress"].get("best_epoch", -1) + 1) if facts["progress"] else "-",
        "samples seen": f"{facts['progress'].get('samples', 0):,}" if facts["progress"] else "-",
        "store": str(store.record["store_id"]),
        "split": f"{split}, {options.part}",
        "crops": f"{len(rows):,} of {chosen['series_uid'].nunique()} scans",
    }
    if facts["store_id"] not in (None, store.record["store_id"]):
        about["trained on"] = f"another store, {facts['store_id']}"
    write_report(
        result,
        out,
        title=f"{run.name if run else checkpoint.name}: {options.part}",
        facts=about,
        pictures=worst_pictures(result, store.crops),
        curves=read_metrics(run) if run else None,
    )
    return Evaluated(result, out)


def predict_rows(model: torch.nn.Module, store: Store, rows: Rows, device: torch.device) -> Any:
    """Probability of the positive class of each row, (n,) float64."""
    model = prepare_for(device, model)
    with CropLoader(open_crops(store), BATCH, device=device) as loader:
        batches = loader.batches(in_batches(rows, BATCH))
        return predict(model, batches, device, amp_context("off", device))


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
    rows = select_rows(store.manifest, split, part)
    seen = set(store.manifest["series_uid"].iloc[rows])
    if part == "all":
        seen |= set(store.scans[store.scans["status"] == "ok"]["series_uid"])
    return sorted(seen)
