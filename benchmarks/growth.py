"""How the cost grows with the work: build, verify, open and an epoch at 1, 4 and 16 times the scans.

    python benchmarks/growth.py [--folder build/growth] [--scans 8] [--times 1 4 16]

Small phantom scans, copied under other UIDs (their voxel files are linked, so the data take no room), in shards of
32 MiB. Each part runs in a process of its own, one worker. Processor seconds of that process and its threads, wall
seconds, and the highest anonymous memory (what is the process's own: not mapped files, which the system may drop at any
time). The exponent is that of a power law between the smallest and the largest: 1 is linear. Input and store are in the
page cache. Crops only, then, as one may want to know it, with volumes and targets too.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd

TABLES = ("annotations.csv", "candidates.csv")
SHARD_BYTES = 32 << 20
BATCH = 64


def multiply(base: Path, target: Path, times: int) -> None:
    """So many copies of each scan, under UIDs of their own; the voxels are linked."""
    for header in sorted(base.glob("subset*/*.mhd")):
        for k in range(times):
            name = f"{header.stem}.{k}"
            folder = target / header.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            text = header.read_text(encoding="ascii").replace(f"{header.stem}.raw", f"{name}.raw")
            (folder / f"{name}.mhd").write_text(text, encoding="ascii")
            os.link(header.with_suffix(".raw"), folder / f"{name}.raw")
    for table in TABLES:
        frame = pd.read_csv(base / table, dtype=str)
        copies = [frame.assign(seriesuid=frame["seriesuid"] + f".{k}") for k in range(times)]
        pd.concat(copies).to_csv(target / table, index=False)


def run_build(data: Path, out: Path, *, whole: bool) -> int:
    """Build, or find nothing to do."""
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters

    options = BuildOptions(data, out, workers=1, volumes=whole, targets=whole)
    return build(options, Parameters(shard_bytes=SHARD_BYTES)).crops


def run_verify(out: Path) -> int:
    """Every checksum."""
    from lunaprep.verify import verify_store

    report = verify_store(out)
    assert report.ok
    return int(report.counts["crops"])


def run_open(out: Path) -> int:
    """Open the store, read the manifest, map the shards."""
    from lunaprep.store.reader import open_store
    from lunatrain.mapping import open_crops

    store = open_store(out)
    return len(open_crops(store)) + 0 * len(store.manifest)


def run_epoch(out: Path) -> int:
    """All crops once, in random order, as a training loop gets them."""
    import numpy as np

    from lunaprep.store.reader import open_store
    from lunatrain.data import CropLoader
    from lunatrain.mapping import open_crops
    from lunatrain.sampling import Shuffled, select_rows

    store = open_store(out)
    order = Shuffled(select_rows(store.manifest, "series", "all"), 0).order(0)
    loader = CropLoader(open_crops(store), BATCH, deliver="float32")
    parts = np.array_split(order, -(-len(order) // BATCH))
    return sum(len(batch.rows) for batch in loader.batches(parts))


def run_start(_: Path) -> int:
    """Only the imports, to be taken off."""
    import torch

    import lunaprep.build
    import lunaprep.verify
    import lunatrain.data

    return bool(torch and lunaprep.build and lunaprep.verify and lunatrain.data)


WAYS = {
    "start": lambda data, out: run_start(out),
    "build, crops": lambda data, out: run_build(data, out / "crops-only", whole=False),
    "build again, nothing to do": lambda data, out: run_build(data, out / "crops-only", whole=False),
    "verify": lambda data, out: run_verify(out / "crops-only"),
    "open": lambda data, out: run_open(out / "crops-only"),
    "epoch": lambda data, out: run_epoch(out / "crops-only"),
    "build, with volumes and targets": lambda data, out: run_build(data, out / "whole", whole=True),
    "verify, with volumes and targets": lambda data, out: run_verify(out / "whole"),
}


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def child(way: str, data: Path, out: Path) -> None:
    """Run one part, watching its memory."""
    import torch

    torch.set_num_threads(1)
    run_start(out)
    peak, stop = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    begin = anonymous_bytes()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    cpu, wall = time.process_time(), time.perf_counter()
    crops = WAYS[way](data, out)
    figures = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "crops": crops}
    stop.set()
    thread.join()
    print(json.dumps({**figures, "anon_mb": max(peak[0], anonymous_bytes()) / 1e6, "own_mb": (peak[0] - begin) / 1e6}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/growth"))
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), Path(args.child[2]))
        return
    from lunaprep.sources.phantom import write_phantom

    shutil.rmtree(args.folder, ignore_errors=True)
    write_phantom(args.folder / "base", args.scans, 5, (64, 160, 160), num_candidates=60, num_subsets=2)
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for times in args.times:
        data, out = args.folder / f"data{times}", args.folder / f"out{times}"
        multiply(args.folder / "base", data, times)
        for way, figures in results.items():
            command = [sys.executable, __file__, "--child", way, str(data), str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            figures.append(json.loads(done.stdout))
        shutil.rmtree(out)
    crops = [str(figures["crops"]) for figures in results["build, crops"]]
    scans = [str(args.scans * times) for times in args.times]
    print(f"scans {', '.join(scans)}; crops {', '.join(crops)}\n")
    print(
        "| part | cpu s, wall s at "
        + " | at ".join(f"{n}×" for n in args.times)
        + " | exponent, cpu | own memory, MB |"
    )
    print("|---|" + "--:|" * (len(args.times) + 2))
    for way, figures in results.items():
        if way == "start":
            continue
        cells = " | ".join(f"{f['cpu_s']:.2f}, {f['wall_s']:.2f}" for f in figures)
        power = math.log(figures[-1]["cpu_s"] / figures[0]["cpu_s"]) / math.log(args.times[-1] / args.times[0])
        memory = ", ".join(f"{f['own_mb']:.0f}" for f in figures)
        print(f"| {way} | {cells} | {power:.2f} | {memory} |")
    print(f"\nown memory is above the {results['start'][0]['anon_mb']:.0f} MB after all imports")
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
