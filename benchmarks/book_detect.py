"""Seconds a scan of `lunatrain detect`, against the book's `nodule_analysis` (chapter 14) with the same weights.

    python benchmarks/book_detect.py --book CLONE [--extra EXTRA] [--data DIR] [--workers 0 4] [--rounds 3]

Both load the weights the book published. Without --data (a folder as LUNA16's), one hard phantom of LUNA16's size
(512x512x250) is made. Rounds alternate. Each program does all of its work: reading, segmenting, grouping, classifying;
imports and pictures are left out. Three arms: the book's program, at each number of DataLoader workers; ours as
shipped, which classifies at most 50 candidates; ours with no such limit. What the clone and EXTRA are: `book.py`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from book import CLS_STATE, SEG_STATE, Book, add_arguments

from lunaprep.sources.phantom import write_phantom
from lunatrain.detect.loading import DetectOptions, load_detector
from lunatrain.detect.pipeline import search
from lunatrain.detect.reading import find_inputs

SIZE = (250, 512, 512)
STAGES = {
    "read": ("read", "lungs"),
    "segmentCt": ("segment",),
    "groupSegmentationOutput": ("group",),
    "classifyCandidates": ("classify",),
}
"""The book's methods and our stages that do their work."""
NO_LIMIT = 1_000_000


def theirs(book: Book, workers: int) -> dict[str, Any]:
    """The book's program over all scans: seconds a scan, of each stage, and candidates."""
    book.clear_cache()
    states = {"segmentation": str(book.state(SEG_STATE)), "classification": str(book.state(CLS_STATE))}
    done = book.run("detect", workers=workers, **states)
    count = len(done["candidates"])
    stages = {name: seconds / count for name, seconds in done["stages"].items()}
    return {"all": done["seconds"] / count, **stages, "candidates": sum(done["candidates"]) / count}


def ours(book: Book, data: Path, limit: int) -> dict[str, Any]:
    """Our detector over all scans: the same."""
    scans = (data,)
    options = DetectOptions(scans, book.state(SEG_STATE), book.state(CLS_STATE), max_candidates=limit)
    detector = load_detector(options)
    started = time.perf_counter()
    done = search(find_inputs(scans), detector, pictures=False)
    seconds = time.perf_counter() - started
    reasons = [item.result.reason for item in done if item.result.reason]
    assert not reasons, reasons
    stages = {
        name: sum(item.result.stages_s[own] for item in done for own in names) / len(done)
        for name, names in STAGES.items()
    }
    candidates = sum(len(item.result.table) for item in done) / len(done)
    return {"all": seconds / len(done), **stages, "candidates": candidates}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = args.data
    if data is None:
        data = args.folder / "book-detect"
        write_phantom(data, 1, 11, SIZE, hard=True, num_subsets=1)
    book = Book(args, data, args.threads)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        f"book, {count} workers": partial(theirs, book, count) for count in args.workers
    }
    books = list(ways)
    ways["lunatrain"] = partial(ours, book, data, DetectOptions.max_candidates)
    ways["lunatrain, all candidates"] = partial(ours, book, data, NO_LIMIT)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            runs[name].append(way())
    book.clear_cache()
    figures = {
        name: {key: statistics.median(run.get(key, 0.0) for run in told) for key in ("all", *STAGES, "candidates")}
        for name, told in runs.items()
    }
    fastest = min(books, key=lambda name: figures[name]["all"])
    print(f"{args.threads} threads, {args.rounds} rounds; median seconds a scan\n")
    print("| what | read | segment | group | classify | all | candidates | book's fastest / this |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, row in figures.items():
        row["ratio"] = figures[fastest]["all"] / row["all"]
        stages = " | ".join(f"{row[stage]:.2f}" for stage in STAGES)
        print(f"| {name} | {stages} | {row['all']:.2f} | {row['candidates']:.0f} | {row['ratio']:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
