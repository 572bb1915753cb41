"""How fast `lunaprep build` is, against reading the scans once and writing the same bytes once.

    python benchmarks/build_speed.py [--folder build/bench] [--scans 8] [--rounds 5] [--size 250 512 512]
                                     [--candidates 600]

Makes phantom scans of LUNA16's size (512x512x250, 600 candidates each), then, in alternating rounds with the
scans dropped from the page cache: the limit (read each raw once, write as many bytes as the store has, fsync), the
build of crops alone, and the build with volumes and targets; with one process and with two. Medians and best. Also the
encoder alone, a plain build of one scan (SimpleITK, float32, h5py's gzip), and the peak memory of a worker.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its own name for itself

from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.schema import volume_chunk
from lunaprep.sources.phantom import write_phantom
from lunaprep.store.encoder import deflate

SIZE = (250, 512, 512)
NUM_CANDIDATES = 600
BLOCK = 1 << 20


def drop_caches(folder: Path) -> None:
    """Put the scans out of the page cache, as far as the system lets us."""
    os.sync()
    for path in folder.rglob("*.raw"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_bytes(raw: Path, target: Path, sizes: list[int]) -> None:
    """The limit for one scan: read its raw once, write so many bytes, flush them to the disk."""
    block = memoryview(bytearray(BLOCK))
    with raw.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
    for number, size in enumerate(sizes):
        fd = os.open(target.with_suffix(f".{number}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.posix_fallocate(fd, 0, size)
        while size > 0:
            size -= os.write(fd, block[: min(size, BLOCK)])
        os.fsync(fd)
        os.close(fd)


def limit(raws: list[Path], out: Path, sizes: list[int], pool: Pool | None) -> float:
    """Seconds a scan to read and write the bytes and nothing else, in this process or in a pool's."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    jobs = [(raw, out / raw.stem, sizes) for raw in raws]
    start = time.perf_counter()
    if pool is None:
        for job in jobs:
            copy_bytes(*job)
    else:
        pool.starmap(copy_bytes, jobs, chunksize=1)
    return (time.perf_counter() - start) / len(raws)


def ours(data: Path, out: Path, workers: int, *, volumes: bool) -> float:
    """Seconds a scan of a whole build, tables and commit included."""
    shutil.rmtree(out, ignore_errors=True)
    parameters = Parameters(shard_bytes=2 * NUM_CANDIDATES * 147456)
    start = time.perf_counter()
    account = build(BuildOptions(data, out, workers=workers, volumes=volumes, targets=volumes), parameters)
    return (time.perf_counter() - start) / account.scans_ok


def plain(raw: Path, out: Path, num_crops: int) -> float:
    """One scan as one would write it down first: SimpleITK, float32, crops and volume through h5py with gzip."""
    start = time.perf_counter()
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(raw.with_suffix(".mhd")))).astype(np.float32)
    array = np.clip(array, -1000, 1000)
    with h5py.File(out, "w") as h5:
        crops = h5.create_dataset("crops", (num_crops, 32, 48, 48), "f4", chunks=(1, 32, 48, 48), compression="gzip")
        rng = np.random.default_rng(0)
        for row in range(num_crops):
            i, r, c = (int(rng.integers(0, n - w + 1)) for n, w in zip(array.shape, (32, 48, 48), strict=True))
            crops[row] = array[i : i + 32, r : r + 48, c : c + 48]
        h5.create_dataset("hu", data=array, compression="gzip", chunks=volume_chunk(array.shape))
    return time.perf_counter() - start


def encoder(store: Path) -> float:
    """Seconds to deflate one volume's shuffled chunks, nothing else."""
    path = next(store.glob("volumes/*/*.h5"))
    with h5py.File(path) as h5:
        hu = h5["hu"][...]
    depth, height, width = volume_chunk(hu.shape)
    planes = []
    for i in range(0, hu.shape[0], depth):
        for r in range(0, hu.shape[1], height):
            for c in range(0, hu.shape[2], width):
                values = np.ascontiguousarray(hu[i : i + depth, r : r + height, c : c + width])
                planes.append(values.reshape(-1).view(np.uint8).reshape(-1, 4).T.copy())
    start = time.perf_counter()
    for plane in planes:
        deflate(plane)
    return time.perf_counter() - start


def worker_peak(data: Path, out: Path, *, volumes: bool) -> int:
    """Peak resident memory of a process that does nothing but the shards' work, bytes."""
    code = f"""
import pickle
from lunaprep.shard_work import run_shard
for task in pickle.load(open({str(out / "tasks.pickle")!r}, "rb")):
    run_shard(task)
status = open("/proc/self/status").read()  # ru_maxrss would count the parent before the exec
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""
    import pickle

    from lunaprep.build import _plan
    from lunaprep.shard_work import ShardTask

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    plan, _, _ = _plan(BuildOptions(data, out, volumes=volumes, targets=volumes), Parameters(), None, keep_notes=False)
    tasks = [ShardTask(out, s, (32, 48, 48), (-1000, 1000), plan.dtype, volumes, plan.targets) for s in plan.to_do]
    (out / "tasks.pickle").write_bytes(pickle.dumps(tasks))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def compare(args: argparse.Namespace, data: Path, out: Path) -> dict[str, list[float]]:
    """Seconds a scan of the limits and the builds in each round; prints what a scan's bytes are."""
    raws = sorted(data.rglob("*.raw"))
    ours(data, out, 2, volumes=True)  # starts the workers, and tells the sizes
    crops = sum(path.stat().st_size for path in out.glob("crops/*.h5")) // len(raws)
    volume = sum(path.stat().st_size for path in out.glob("volumes/*/*.h5")) // len(raws)
    shape = "x".join(map(str, (*args.size[1:], args.size[0])))
    print(f"{args.scans} scans {shape}, {args.candidates} candidates each, cold input, fsync'ed output")
    raw_bytes = raws[0].stat().st_size
    print(f"bytes a scan: raw {raw_bytes / 1e6:.0f} MB, crops {crops / 1e6:.0f} MB, volume {volume / 1e6:.0f} MB\n")
    with get_context("spawn").Pool(2) as two:
        ways: dict[str, Callable[[], float]] = {}
        for workers, pool in ((1, None), (2, two)):
            ways[f"limit, crops, {workers}"] = partial(limit, raws, out, [crops], pool)
            ways[f"build, crops, {workers}"] = partial(ours, data, out, workers, volumes=False)
            ways[f"limit, volumes, {workers}"] = partial(limit, raws, out, [crops, volume], pool)
            ways[f"build, volumes, {workers}"] = partial(ours, data, out, workers, volumes=True)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                drop_caches(data)
                times[name].append(way())
    return times


def print_table(times: dict[str, list[float]]) -> None:
    """Medians, bests, and how near each build comes to its limit."""
    print("| what, processes | s/scan median | best | limit / build (medians) | (best) |")
    print("|---|--:|--:|--:|--:|")
    for name, values in times.items():
        row = f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} |"
        if name.startswith("build"):
            base = times[name.replace("build", "limit")]
            row += f" {statistics.median(base) / statistics.median(values):.2f} | {min(base) / min(values):.2f} |"
        else:
            row += " | |"
        print(row)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, help="slices, rows, columns")
    parser.add_argument("--candidates", type=int, default=NUM_CANDIDATES, help="of each scan")
    args = parser.parse_args()
    data, out = args.folder / "data", args.folder / "out"
    write_phantom(data, args.scans, 3, tuple(args.size), num_candidates=args.candidates, num_subsets=2)
    times = compare(args, data, out)
    print_table(times)
    ours(data, out, 2, volumes=True)
    encode_s = encoder(out)
    slow = plain(next(data.rglob("*.raw")), out / "plain.h5", args.candidates)
    both = statistics.median(times["build, volumes, 1"])
    print(f"\nencoder alone: {encode_s:.3f} s a volume = {encode_s / both:.2f} of a build with volumes by one process")
    print(f"plain SimpleITK + float32 + gzip: {slow:.1f} s a scan = {slow / both:.0f} times ours with volumes, "
          f"{slow / statistics.median(times['build, crops, 1']):.0f} times ours without")  # fmt: skip
    float_volume = int(np.prod(args.size)) * 4
    for volumes in (False, True):
        peak = worker_peak(data, out, volumes=volumes)
        what = "with" if volumes else "no"
        share = peak / float_volume
        print(f"peak memory of a worker, {what} volumes: {peak / 1e6:.0f} MB = {share:.2f} of a float32 volume")
    print(json.dumps({name: round(statistics.median(values), 4) for name, values in times.items()}))
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
