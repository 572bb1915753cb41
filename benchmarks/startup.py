"""How long it takes to begin: `--help`, and the first batch of a store of 755,000 crops.

    python benchmarks/startup.py [--folder build/startup] [--rounds 7] [--crops 755000]

The store is made as in scale.py: all its tables and receipts, and sparse files of the right header and size for
shards. The first batch is what a training does: open the store, read the manifest, split it, draw an epoch's order, map
the shards, gather 256 crops; in a new process each time, from the moment torch is imported.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import scale

from lunaprep.assemble import assemble
from lunaprep.carried import carry_over
from lunaprep.parameters import Parameters
from lunaprep.plan import make_plan

CROPS = 755_000

FIRST_BATCH = """
import sys, time
import torch
import lunatrain.data
start, cpu = time.perf_counter(), time.process_time()
from lunaprep.store.reader import open_store
from lunatrain.mapping import open_crops
from lunatrain.sampling import columns_of, row_labels, select_rows, Shuffled
store = open_store(sys.argv[1])
opened = time.perf_counter()
manifest = store.columns(*columns_of("series", "is_nodule"))
read = time.perf_counter()
rows = select_rows(manifest, "series", "train")
labels = row_labels(manifest, rows)
order = Shuffled(rows, 0).order(0)
chosen = time.perf_counter()
next(iter(lunatrain.data.CropLoader(open_crops(store)).batches([order[:256]])))
end = time.perf_counter()
print(end - start, opened - start, read - opened, chosen - read, end - chosen, time.process_time() - cpu)
"""


def make_store(folder: Path, crops: int) -> Path:
    """A store of so many crops, of which only the tables are real."""
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "store"
    out.mkdir(parents=True)
    source = scale.tables(crops, folder)
    plan = make_plan(source, Parameters(), volumes=False, targets=True)
    receipts = scale.receipts_of(plan)
    new = assemble(plan, receipts, carry_over(out, None, source.subsets))
    scale.write_store(dict(new.files), plan, receipts, out)
    return out


def seconds(*args: str) -> tuple[float, float]:
    """Wall and processor seconds of a Python process, the interpreter's own start included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *args], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/startup"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--crops", type=int, default=CROPS)
    args = parser.parse_args()
    print("| what | median, s | best, s |\n|---|--:|--:|")
    for program in ("lunaprep", "lunatrain"):
        runs = [seconds("-m", program, "--help") for _ in range(args.rounds)]
        for name, times in zip(("", ", processor"), zip(*runs, strict=True), strict=True):
            print(f"| {program} --help{name} | {statistics.median(times):.3f} | {min(times):.3f} |")
    store = make_store(args.folder, args.crops)
    command = [sys.executable, "-c", FIRST_BATCH, str(store)]
    lines = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(args.rounds)]
    names = (
        f"first batch of {args.crops:,} crops",
        "open, each shard looked at",
        "manifest",
        "split, order",
        "map, gather",
        "processor",
    )
    for name, times in zip(names, zip(*(map(float, line.split()) for line in lines), strict=True), strict=True):
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} |")
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
