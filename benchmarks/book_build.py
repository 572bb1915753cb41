"""Seconds a scan of `lunaprep build`, against the book's `prepcache` (chapter 11) on the same scans.

    python benchmarks/book_build.py --book CLONE [--extra EXTRA] [--scans 4] [--workers 2 8] [--rounds 3] [--json FILE]

Phantom scans of LUNA16's size (512x512x250) with as many candidates as LUNA16 has a scan (620). Alternating rounds,
scans out of the page cache, output removed; both in their working state: our worker processes have been started, the
book's imports are done. Ours flush to the disk and write tables, checksums and the commit; the book's cache is in the
page cache when it ends, and is not waited for. What the clone and EXTRA are: `book.py`.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from functools import partial

from book import Book, add_arguments
from build_speed import SIZE, drop_caches, ours
from rounds import alternate

from lunaprep.sources.phantom import write_phantom

NUM_CANDIDATES = 620
"""551,065 candidates in 888 scans."""
PROCESSES = (1, 2)


def show(times: dict[str, list[float]], books: list[str]) -> dict[str, float]:
    """Print the table; the medians and ratios, with the book at its fastest."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(books, key=medians.__getitem__)
    print("| what | s/scan median | best | book's fastest / this |\n|---|--:|--:|--:|")
    for name, values in times.items():
        ratio = medians[fastest] / medians[name]
        print(f"| {name} | {medians[name]:.2f} | {min(values):.2f} | {ratio:.1f} |")
        medians[f"book / {name}"] = ratio
    return medians


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--scans", type=int, default=4)
    args = parser.parse_args()
    data, out = args.folder / "book-data", args.folder / "out"
    write_phantom(data, args.scans, 3, SIZE, num_candidates=NUM_CANDIDATES, num_subsets=2)
    book = Book(args, data, threads=1)

    def theirs(workers: int) -> float:
        book.clear_cache()
        drop_caches(data)
        seconds: float = book.run("prepcache", workers=workers)["seconds"]
        return seconds / int(args.scans)

    def lunaprep(workers: int, volumes: bool) -> float:
        drop_caches(data)
        return ours(data, out, workers, volumes=volumes)

    lunaprep(max(PROCESSES), volumes=True)  # starts the workers
    ways: dict[str, Callable[[], float]] = {}
    for count in args.workers:
        ways[f"book's prepcache, {count} workers"] = partial(theirs, count)
    books = list(ways)
    for count in PROCESSES:
        ways[f"lunaprep, crops alone, {count}"] = partial(lunaprep, count, volumes=False)
        ways[f"lunaprep, crops, volumes and targets, {count}"] = partial(lunaprep, count, volumes=True)
    times = alternate(ways, args.rounds)
    print(f"{args.scans} scans 512x512x250, {NUM_CANDIDATES} candidates each, {args.rounds} rounds\n")
    medians = show(times, books)
    if args.json:
        args.json.write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")
    book.clear_cache()
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
