"""Run one of the book's programs and time it; started by `book.py`, in the folder of the book's copy.

    python book_program.py PROGRAM '{"option": value}'

The last line printed is a JSON object. Only the programs' own classes and methods are called, in their order.
"""

import importlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, Dataset

LABEL, PROBABILITY, LOSS = 0, 1, 2
"""Rows of the book's tables of metrics."""


def prepcache(workers: int, chapter: int = 11) -> dict[str, Any]:
    """Chapter 11's `prepcache`, or that of another chapter: seconds."""
    app = importlib.import_module(f"p2ch{chapter}.prepcache").LunaPrepCacheApp(["--num-workers", str(workers)])
    started = time.perf_counter()
    app.main()
    return {"seconds": time.perf_counter() - started, "crops": len(app.prep_dl.dataset)}


def train(workers: int, seed: int, epochs: int, result: str) -> dict[str, Any]:
    """Chapter 11's `training`: epochs, as its `main` goes through them.

    Into the file `result` go the weights it started from, rows in its order, the loss of each step and validated
    probabilities of each epoch.
    """
    app, loaders, rows = training_app(11, (), workers, seed)
    weights = {name: value.clone() for name, value in app.model.state_dict().items()}
    told = []
    for epoch in range(1, epochs + 1):
        lap = time.perf_counter()
        trained = app.doTraining(epoch, loaders[0])
        train_s = time.perf_counter() - lap
        app.logMetrics(epoch, "trn", trained)
        validated = app.doValidation(epoch, loaders[1])
        app.logMetrics(epoch, "val", validated)
        losses = [float(part.mean()) for part in trained[LOSS].split(loaders[0].batch_size)]
        told.append({
            "train_s": train_s, "epoch_s": time.perf_counter() - lap, "auc": auc(validated), "losses": losses,
            "probability": validated[PROBABILITY].tolist(),
        })  # fmt: skip
    app.trn_writer.close()
    app.val_writer.close()
    torch.save({"weights": weights, "train_rows": rows[0], "val_rows": rows[1], "epochs": told}, result)
    return {"epochs": len(told)}


def race(  # noqa: PLR0913 - each is a number of the race
    chapter: int, options: list[str], workers: int, seed: int, every: int, seconds: float, target: float, clock: str
) -> dict[str, Any]:
    """Train by chapter 11's or 12's program until its validation AUC is `target`, or for so long.

    The validation is looked at after each `every` samples, and at the end of an epoch; `clock`, a function of `time`,
    stands still then.
    """
    app, loaders, rows = training_app(chapter, options, workers, seed)
    tell = getattr(time, clock)
    looks: list[tuple[float, int, float]] = []
    started = tell()
    for epoch in count(1):
        for part in parts(loaders[0], every):
            app.doTraining(epoch, part)
            spent = tell() - started
            looks.append((spent, app.totalTrainingSamples_count, auc(app.doValidation(epoch, loaders[1]))))
            if looks[-1][2] >= target or spent >= seconds:
                return {"looks": looks, "val_rows": rows[1]}
            started = tell() - spent
    raise AssertionError


def training_app(chapter: int, options: Sequence[str], workers: int, seed: int) -> tuple[Any, list[Any], list[Any]]:
    """The program with its fresh model, its loaders for training and validation, and their candidates."""
    program = importlib.import_module(f"p2ch{chapter}.training")
    random.seed(seed)
    torch.manual_seed(seed)
    app = program.LunaTrainingApp([*options, "--num-workers", str(workers)])
    loaders = [app.initTrainDl(), app.initValDl()]
    return app, loaders, [[(c.series_uid, *c.center_xyz) for c in x.dataset.candidateInfo_list] for x in loaders]


class Part(Dataset[Any]):
    """Some samples of one of the book's data sets, in their order."""

    def __init__(self, whole: Any, start: int, size: int) -> None:
        self.whole, self.start, self.size = whole, start, min(size, len(whole) - start)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        """A sample."""
        return self.whole[self.start + index]

    def shuffleSamples(self) -> None:  # noqa: N802 - what chapter 12 calls at the start of an epoch
        """Let the data set shuffle where its epoch begins."""
        if self.start == 0:
            self.whole.shuffleSamples()


def parts(loader: Any, size: int) -> Iterator[Any]:
    """An epoch as loaders of `size` samples, the same batches in the same order."""
    for start in range(0, len(loader.dataset), size):
        yield DataLoader(Part(loader.dataset, start, size), loader.batch_size, num_workers=loader.num_workers)


def auc(validated: Any) -> float:
    """Area under the ROC curve, by scikit-learn, of the book's table of metrics."""
    return float(roc_auc_score(validated[LABEL].numpy() > 0.5, validated[PROBABILITY].numpy()))


def detect(workers: int, segmentation: str, classification: str) -> dict[str, Any]:
    """Chapter 14's `nodule_analysis` over all scans: seconds of all and of each stage, candidates of each."""
    from p2ch14 import nodule_analysis

    stages: dict[str, float] = {}
    candidates: list[int] = []
    app = nodule_analysis.NoduleAnalysisApp(
        ["--run-validation", "--include-train", "--num-workers", str(workers),
         "--segmentation-path", segmentation, "--classification-path", classification]
    )  # fmt: skip
    for name in ("segmentCt", "groupSegmentationOutput", "classifyCandidates"):
        setattr(app, name, timed(getattr(app, name), stages))
    classify = app.classifyCandidates

    def counted(ct: Any, found: list[Any]) -> Any:
        candidates.append(len(found))
        return classify(ct, found) if found else []  # without a candidate the book classifies its whole data set

    app.classifyCandidates = counted
    nodule_analysis.getCt = timed(nodule_analysis.getCt, stages, "read")
    started = time.perf_counter()
    app.main()
    return {"seconds": time.perf_counter() - started, "stages": stages, "candidates": candidates}


def timed(function: Any, stages: dict[str, float], name: str | None = None) -> Any:
    """The function, with its seconds added up under its name."""

    def wrapped(*args: Any, **named: Any) -> Any:
        started = time.perf_counter()
        done = function(*args, **named)
        key = name or function.__name__
        stages[key] = stages.get(key, 0.0) + time.perf_counter() - started
        return done

    return wrapped


if __name__ == "__main__":
    programs: dict[str, Any] = {"prepcache": prepcache, "train": train, "race": race, "detect": detect}
    print(json.dumps(programs[sys.argv[1]](**json.loads(sys.argv[2]))))
