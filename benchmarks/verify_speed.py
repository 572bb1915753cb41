"""GB/s of `lunaprep verify`, against SHA-256 of the same files alone, on one processor.

    python benchmarks/verify_speed.py [STORE] [--volumes] [--folder build/bench] [--rounds 5] [--json FILE]
                                      [--size 250 512 512] [--candidates 600]

Without STORE one is made: two phantom scans of LUNA16's size with 600 candidates each. Page cache warm.
Alternating rounds; medians. Also as shipped, with all processors.
"""

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from build_speed import NUM_CANDIDATES, SIZE, ours
from rounds import alternate

from lunaprep.sources.phantom import write_phantom
from lunaprep.verify import verify_store

BLOCK = 1 << 18  # stays in a processor's own cache; 1 MiB is a third slower when others use the memory


def hash_files(paths: list[Path]) -> None:
    """SHA-256 of each file, in the blocks that any program would take."""
    buffer = memoryview(bytearray(BLOCK))
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])


def seconds(way: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def pinned(cpus: set[int], way: Callable[[], object]) -> float:
    """How long it takes on these processors alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        return seconds(way)
    finally:
        os.sched_setaffinity(0, before)


def check(store: Path) -> None:
    """Verify, and make sure that nothing was found."""
    report = verify_store(store, "full")
    assert not report.findings, report.findings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--volumes", action="store_true", help="with volumes and masks, which are also unpacked")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, help="slices, rows, columns of the phantoms")
    parser.add_argument("--candidates", type=int, default=NUM_CANDIDATES, help="of each phantom")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    store = args.store
    if store is None:
        store, data = args.folder / "verify-store", args.folder / "verify-data"
        write_phantom(data, 2, 3, tuple(args.size), num_candidates=args.candidates, num_subsets=1)
        ours(data, store, 1, volumes=args.volumes)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    num_bytes = sum(path.stat().st_size for path in files)
    all_cpus = os.sched_getaffinity(0)
    one = {min(all_cpus)}
    ways: dict[str, Callable[[], float]] = {
        "SHA-256 of its files, one processor": lambda: pinned(one, lambda: hash_files(files)),
        "verify, one processor": lambda: pinned(one, lambda: check(store)),
        f"verify, {len(all_cpus)} processors": lambda: seconds(lambda: check(store)),
    }
    times = alternate(ways, args.rounds)
    rates = {name: num_bytes / statistics.median(values) / 1e9 for name, values in times.items()}
    base = next(iter(rates.values()))
    print(f"{store}: {num_bytes / 1e6:.0f} MB in {len(files)} files, {args.rounds} rounds\n")
    print("| what | GB/s median | of SHA-256 alone |\n|---|--:|--:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.2f} | {rate / base:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
