"""Training against the book's own program (chapter 11, `training`): an epoch, and the time to a validation AUC.

    python benchmarks/book_training.py epoch --book CLONE [--extra EXTRA] [--scans 12] [--amp off,bf16] [--rounds 3]
    python benchmarks/book_training.py race  --book CLONE [--extra EXTRA] [--data PHANTOM] [--auc 0.95] [--cap 5]

    lunaprep phantom PHANTOM --scans 200 --size 160 320 320 --hard --seed 101      # 6.2 GB, for race

Both train on the same hard phantom, caches filled and warm, batches of 32. `epoch`: the book's model and optimizer on
both sides, from the same weights, the same crops in the same order, so that the losses of the steps must agree; an
epoch is training, validation and what is logged; rounds alternate. `race`: `lunatrain cls` with no option but the
book's split (by candidate) against the book's programs with theirs, the same crops held out, each until its AUC on
them, by scikit-learn, is --auc. It is looked at every --look samples, while the clock stands still. The book's get
--cap times our time (the median of --seeds) each. What the clone and EXTRA are: `book.py`.
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
from sklearn.metrics import roc_auc_score

from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.sources.phantom import DEFAULT_SIZE, write_phantom
from lunaprep.store.reader import open_store
from lunatrain.config import BOOK, TrainConfig
from lunatrain.log import RunLog
from lunatrain.loop import Run, Trainer, train
from lunatrain.metrics import binary_metrics
from lunatrain.sampling import Rows
from lunatrain.tasks.classify import in_batches, predict
from lunatrain.training import TrainOptions, open_training

SEED = 1
PROGRAMS: dict[str, tuple[int, list[str]]] = {
    "ch11": (11, []),
    "ch12": (12, ["--balanced"]),
    "ch12-augmented": (12, ["--balanced", "--augmented"]),
}
"""The book's trainings of this network: as chapter 11 leaves it, and with what chapter 12 adds."""

Look = tuple[float, int, float]
"""Seconds and samples of training, and the validation AUC then."""


class ReachedError(Exception):
    """A run is good enough to end."""


def book_rows(manifest: Any, wanted: Iterable[tuple[Any, ...]]) -> Rows:
    """Rows of the manifest for the book's candidates (series, x, y, z)."""
    columns = (manifest[name] for name in ("series_uid", "x_mm", "y_mm", "z_mm"))
    row_of = {key: row for row, key in enumerate(zip(*columns, strict=True))}
    return np.array([row_of[tuple(key)] for key in wanted], dtype=np.int64)


def theirs(book: Book, result: Path, workers: int) -> dict[str, Any]:
    """An epoch of the book's program: weights it started from, rows and figures."""
    book.run("train", workers=workers, seed=SEED, epochs=1, result=str(result.resolve()))
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
    theirs(book, store.parent / "warm.pt", args.workers[0])  # fills its cache
    for _ in range(args.rounds):
        for name, count in books.items():
            told = theirs(book, store.parent / "book.pt", count)
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


class Looking(Trainer):
    """Trains as it is, and stands still for looks at its validation AUC, until that or the time is enough."""

    def __init__(self, run: Run, args: argparse.Namespace) -> None:
        super().__init__(run)
        self.args = args
        self.tell = getattr(time, args.clock)
        self.looks: list[Look] = []
        self.started = self.tell()

    def step(self, batch: Any) -> None:
        """One optimizer step, and a look where one is due."""
        before = self.progress.samples
        super().step(batch)
        samples = self.progress.samples
        if samples // self.args.look == before // self.args.look:
            return
        spent = self.tell() - self.started
        task: Any = self.run.task
        batches = task.val_loader.batches(in_batches(task.val_rows, task.val_loader.batch_size))
        found = predict(self.judged, batches, self.run.device, self.amp)
        self.looks.append((spent, samples, float(roc_auc_score(task.labels[task.val_rows], found))))
        if self.looks[-1][2] >= self.args.auc:
            raise ReachedError
        self.started = self.tell() - spent


def our_race(args: argparse.Namespace, store: Path, seed: int) -> Looking:
    """`lunatrain cls` with its default settings, on the book's split, until it has reached the AUC or ends."""
    config = replace(TrainConfig(), split="candidate", seed=seed)
    options = TrainOptions(store, store.parent / f"run-race-{seed}", device="cpu")
    shutil.rmtree(options.run, ignore_errors=True)
    trainer = Looking(open_training(options, config).run, args)
    with RunLog(options.run) as log, suppress(ReachedError):
        train(trainer, log)
    return trainer


def race(args: argparse.Namespace, book: Book, store: Path) -> dict[str, Any]:
    """Time to a validation AUC on both sides."""
    ours = [our_race(args, store, seed) for seed in args.seeds]
    curves = {f"lunatrain, seed {seed}": run.looks for seed, run in zip(args.seeds, ours, strict=True)}
    took = [run.looks[-1][0] for run in ours]
    limit = args.cap * statistics.median(took)
    held = set(ours[0].run.task.val_rows.tolist())  # type: ignore[attr-defined]
    for name in args.programs:
        chapter, options = PROGRAMS[name]
        book.run("prepcache", workers=8, chapter=chapter)
        told = book.run(
            "race", chapter=chapter, options=options, workers=args.workers[0], seed=args.seeds[0], every=args.look,
            seconds=limit, target=args.auc, clock=args.clock,
        )  # fmt: skip
        curves[f"book, {name}"] = told["looks"]
        assert held == set(book_rows(open_store(store).manifest, told["val_rows"]).tolist())
    for name, looks in curves.items():
        print(f"\n{name}: seconds, samples, AUC")
        print("\n".join(f"{spent:8.1f} {samples:8,d} {area:.4f}" for spent, samples, area in looks))
    verdicts(curves, args.auc, statistics.median(took))
    return {"clock": args.clock, "limit_s": limit, "curves": curves}


def verdicts(curves: dict[str, list[Look]], wanted: float, ours_s: float) -> None:
    """Print what each run reached by when, and how many times our median that is."""
    all_reach = all(looks[-1][2] >= wanted for name, looks in curves.items() if name.startswith("lunatrain"))
    print(f"\n| what | samples | best AUC | AUC {wanted:g} after | times ours |\n|---|--:|--:|--:|--:|")
    for name, looks in curves.items():
        spent, samples, _ = looks[-1]
        best = max(area for _, _, area in looks)
        after, mark = (f"{spent:.0f} s", "") if best >= wanted else (f"never in {spent:.0f} s", "> ")
        times = f"{mark}{spent / ours_s:.1f}" if all_reach else "no ratio: not all of ours reach it"
        print(f"| {name} | {samples:,} | {best:.3f} | {after} | {times} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["epoch", "race"])
    add_arguments(parser)
    parser.add_argument("--scans", type=int, default=12)
    parser.add_argument("--data", type=Path, help="scans to take, instead of making a hard phantom of --scans")
    parser.add_argument("--phantom-seed", type=int, default=5)
    parser.add_argument("--amp", default="off", help="epoch: off, bf16, or both with a comma")
    parser.add_argument("--auc", type=float, default=0.95, help="race: where it ends")
    parser.add_argument("--cap", type=float, default=5.0, help="race: the book's time, over ours")
    parser.add_argument("--look", type=int, default=2048, help="race: samples between two looks at the AUC")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="race: of ours; the first is the book's too")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=["ch11", "ch12"], help="race: the book's")
    parser.add_argument("--clock", choices=["perf_counter", "process_time"], default="perf_counter", help="race")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, store = args.data or args.folder / "book-train", args.folder / "store"
    if not args.data:
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
