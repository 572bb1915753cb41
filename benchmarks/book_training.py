"""Training against the book's own program (chapter 11, `training`): an epoch, and the time to a validation AUC.

    python benchmarks/book_training.py epoch --book CLONE [--extra EXTRA] [--scans 12] [--amp off,bf16] [--rounds 3]
    python benchmarks/book_training.py race  --book CLONE [--extra EXTRA] [--scans 60] [--auc 0.95] [--cap 5]

Both train on the same hard phantom, caches filled and warm, batches of 32. `epoch`: the book's model and optimizer on
both sides, from the same weights, the same crops in the same order, so that the losses of the steps must agree; an
epoch is training, validation and what is logged; rounds alternate. `race`: ours as shipped (model, sampling,
augmentation, schedule) against the book's program as it is, on the book's split (by candidate) with the same crops held
out, each until its validation reaches --auc; the book's gets at most --cap times our time. What the clone and EXTRA
are: `book.py`.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from book import Book, add_arguments

from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.sources.phantom import DEFAULT_SIZE, write_phantom
from lunaprep.store.reader import open_store
from lunatrain.config import BOOK, TrainConfig
from lunatrain.log import RunLog
from lunatrain.loop import Trainer, train
from lunatrain.metrics import binary_metrics
from lunatrain.sampling import Rows
from lunatrain.tasks.classify import in_batches, predict
from lunatrain.training import TrainOptions, open_training

SEED = 1


class ReachedError(Exception):
    """A run is good enough to end."""


def book_rows(manifest: Any, wanted: Iterable[tuple[Any, ...]]) -> Rows:
    """Rows of the manifest for the book's candidates (series, x, y, z)."""
    columns = (manifest[name] for name in ("series_uid", "x_mm", "y_mm", "z_mm"))
    row_of = {key: row for row, key in enumerate(zip(*columns, strict=True))}
    return np.array([row_of[tuple(key)] for key in wanted], dtype=np.int64)


def theirs(book: Book, result: Path, workers: int, **limits: Any) -> dict[str, Any]:
    """The book's program: weights it started from, rows and figures of its epochs."""
    book.run("train", workers=workers, seed=SEED, result=str(result.resolve()), **limits)
    told: dict[str, Any] = torch.load(result, weights_only=True)
    return told


def our_epoch(run: Trainer, told: dict[str, Any], log: RunLog) -> dict[str, Any]:
    """The book's first epoch by our loop: seconds, loss of each step, validated probabilities."""
    trainer = Trainer(run.run)
    trainer.model.load_state_dict(told["weights"])
    manifest = open_store(run.run.path.parent / "store").manifest
    rows = book_rows(manifest, told["train_rows"])
    losses, before = [], 0.0
    started = time.perf_counter()
    for batch in trainer.run.loader.batches(in_batches(rows, BOOK.batch_size)):
        trainer.step(batch)
        total = trainer.progress.sums["loss"]
        losses.append((total - before) / len(batch.rows))
        before = total
    trained = time.perf_counter()
    validation = trainer.run.task.validate(trainer.model, trainer.run.device, trainer.amp)
    log.write("val", 0, len(rows), validation.figures)
    validation.draw(log, len(rows))
    seconds = time.perf_counter() - started
    val_rows = book_rows(manifest, told["val_rows"])
    loader = trainer.run.task.val_loader  # type: ignore[attr-defined]
    found = predict(trainer.model, loader.batches(in_batches(val_rows, 256)), trainer.run.device, trainer.amp)
    truth = manifest["is_nodule"].to_numpy()[val_rows]
    return {
        "train_s": trained - started, "epoch_s": seconds, "losses": losses, "count": len(rows),
        "probability": found, "auc": binary_metrics(truth, found).auc,
    }  # fmt: skip


def epoch(args: argparse.Namespace, book: Book, store: Path) -> dict[str, Any]:
    """Alternate the arms, print the table."""
    trainers = {
        f"lunatrain, amp {kind}": open_training(
            TrainOptions(store, store.parent / f"run-{kind}", device="cpu"), replace(BOOK, amp=kind, seed=SEED)
        )
        for kind in args.amp.split(",")
    }
    books = {f"book, {count} workers": count for count in args.workers}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*books, *trainers)}
    theirs(book, store.parent / "warm.pt", args.workers[0], epochs=1)  # fills its cache
    for _ in range(args.rounds):
        for name, count in books.items():
            told = theirs(book, store.parent / "book.pt", count, epochs=1)
            runs[name].append(told["epochs"][0] | {"count": len(told["train_rows"])})
        for name, trainer in trainers.items():
            with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder)) as log:
                runs[name].append(our_epoch(trainer, told, log))
    return table(runs, list(books))


def table(runs: dict[str, list[dict[str, Any]]], books: list[str]) -> dict[str, Any]:
    """Print medians, ratios and how far apart the results are."""
    medians = {
        name: {key: statistics.median(run[key] for run in told) for key in ("train_s", "epoch_s")}
        for name, told in runs.items()
    }
    fastest = min(books, key=lambda name: medians[name]["epoch_s"])
    first = runs[fastest][0]
    print("| what | training, samples/s | epoch, s | book's fastest / this | loss apart | probability apart | AUC |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    figures = {}
    for name, told in runs.items():
        row, last = medians[name], told[0]
        ratio = medians[fastest]["epoch_s"] / row["epoch_s"]
        pairs = zip(last["losses"], first["losses"], strict=True)
        loss = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
        apart = float(np.abs(np.array(last["probability"]) - np.array(first["probability"])).max())
        rate = last["count"] / row["train_s"]
        line = f"| {name} | {rate:.1f} | {row['epoch_s']:.1f} | {ratio:.2f} |"
        print(f"{line} {loss:.0e} | {apart:.0e} | {last['auc']:.3f} |")
        figures[name] = {**row, "rate": rate, "ratio": ratio, "loss_apart": loss, "auc": last["auc"]}
    return figures


def race(args: argparse.Namespace, book: Book, store: Path) -> dict[str, Any]:
    """Time to a validation AUC on both sides."""
    theirs(book, store.parent / "warm.pt", args.workers[0], epochs=1)
    config = replace(TrainConfig(), split="candidate", samples=args.samples, epochs=args.epochs, seed=SEED)
    options = TrainOptions(store, store.parent / "run-race", device="cpu")
    started = time.perf_counter()
    trainer = open_training(options, config)
    curve: list[tuple[float, float]] = []

    class Watch(RunLog):
        """Notes the AUC of each epoch, and ends the run that has reached it."""

        def write(self, part: str, *rest: Any) -> None:
            super().write(part, *rest)
            if part == "val":
                curve.append((time.perf_counter() - started, rest[-1]["auc"]))
                print(f"lunatrain {curve[-1][0]:7.1f} s  AUC {curve[-1][1]:.3f}", flush=True)
                if curve[-1][1] >= args.auc:
                    raise ReachedError

    with Watch(options.run) as log, suppress(ReachedError):
        train(trainer, log)
    ours_s, ours_auc = curve[-1]
    told = theirs(
        book, store.parent / "race.pt", args.workers[0], epochs=1000, seconds=args.cap * ours_s, target=args.auc
    )
    for row in told["epochs"]:
        print(f"book      {row['since_start_s']:7.1f} s  AUC {row['auc']:.3f}")
    last = told["epochs"][-1]
    held = set(trainer.run.task.val_rows.tolist())  # type: ignore[attr-defined]
    assert held == set(book_rows(open_store(store).manifest, told["val_rows"]).tolist())
    reached = "reached" if last["auc"] >= args.auc else "not reached, stopped"
    print(
        f"\nAUC {args.auc}: lunatrain {ours_s:.1f} s ({ours_auc:.3f}); book {reached} at {last['since_start_s']:.1f} s"
    )
    print(f"ratio {last['since_start_s'] / ours_s:.1f}{'' if last['auc'] >= args.auc else ' or more'}")
    return {"ours": curve, "book": [[row["since_start_s"], row["auc"]] for row in told["epochs"]]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["epoch", "race"])
    add_arguments(parser)
    parser.add_argument("--scans", type=int, default=12)
    parser.add_argument("--phantom-seed", type=int, default=5)
    parser.add_argument("--amp", default="off", help="epoch: off, bf16, or both with a comma")
    parser.add_argument("--auc", type=float, default=0.95, help="race: where it ends")
    parser.add_argument("--cap", type=float, default=5.0, help="race: the book's time, over ours")
    parser.add_argument("--samples", type=int, default=2048, help="race: samples between two validations of ours")
    parser.add_argument("--epochs", type=int, default=10, help="race: epochs of ours that the schedule is made for")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, store = args.folder / "book-train", args.folder / "store"
    write_phantom(data, args.scans, args.phantom_seed, DEFAULT_SIZE, hard=True, num_subsets=3)
    shutil.rmtree(store, ignore_errors=True)
    build(BuildOptions(data, store, volumes=False, targets=False), Parameters(match="book"))
    book = Book(args, data, args.threads)
    figures = {"epoch": epoch, "race": race}[args.what](args, book, store)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    book.clear_cache()


if __name__ == "__main__":
    main()
