"""Run one of the book's programs and time it; started by `book.py`, in the folder of the book's copy.

    python book_program.py PROGRAM '{"option": value}'

The last line printed is a JSON object. Only the programs' own classes and methods are called, in their order.
"""

import json
import random
import sys
import time
from typing import Any

import numpy as np
import torch


def prepcache(workers: int) -> dict[str, Any]:
    """Chapter 11's `prepcache`: seconds."""
    from p2ch11.prepcache import LunaPrepCacheApp

    app = LunaPrepCacheApp(["--num-workers", str(workers)])
    started = time.perf_counter()
    app.main()
    return {"seconds": time.perf_counter() - started, "crops": len(app.prep_dl.dataset)}


def train(
    workers: int, seed: int, epochs: int, result: str, seconds: float = 1e9, target: float = 2.0
) -> dict[str, Any]:
    """Chapter 11's `training`: epochs until one of the limits, as its `main` goes through them.

    Into the file `result` go the weights it started from, rows in its order, the loss of each step and validated
    probabilities of each epoch.
    """
    from p2ch11.training import METRICS_LABEL_NDX, METRICS_LOSS_NDX, METRICS_PRED_NDX, LunaTrainingApp

    random.seed(seed)
    torch.manual_seed(seed)
    app = LunaTrainingApp(["--num-workers", str(workers)])
    weights = {name: value.clone() for name, value in app.model.state_dict().items()}
    loaders = app.initTrainDl(), app.initValDl()
    rows = [[(c.series_uid, *c.center_xyz) for c in loader.dataset.candidateInfo_list] for loader in loaders]
    told, started = [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        lap = time.perf_counter()
        trained = app.doTraining(epoch, loaders[0])
        train_s = time.perf_counter() - lap
        app.logMetrics(epoch, "trn", trained)
        validated = app.doValidation(epoch, loaders[1])
        app.logMetrics(epoch, "val", validated)
        now = time.perf_counter()
        truth, found = validated[METRICS_LABEL_NDX].numpy(), validated[METRICS_PRED_NDX].numpy()
        losses = [float(part.mean()) for part in trained[METRICS_LOSS_NDX].split(loaders[0].batch_size)]
        told.append({
            "train_s": train_s, "epoch_s": now - lap, "since_start_s": now - started, "auc": auc(truth, found),
            "losses": losses, "val_loss": float(validated[METRICS_LOSS_NDX].mean()), "probability": found.tolist(),
        })  # fmt: skip
        if told[-1]["auc"] >= target or now - started >= seconds:
            break
    app.trn_writer.close()
    app.val_writer.close()
    torch.save({"weights": weights, "train_rows": rows[0], "val_rows": rows[1], "epochs": told}, result)
    return {"epochs": len(told)}


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


def auc(truth: Any, score: Any) -> float:
    """Area under the ROC curve by ranks, ties halved."""
    from scipy.stats import rankdata

    positive = truth > 0.5
    num, rest = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(score)
    return float((ranks[positive].sum() - num * (num + 1) / 2) / (num * rest)) if num and rest else float(np.nan)


if __name__ == "__main__":
    done = {"prepcache": prepcache, "train": train, "detect": detect}[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(done))
