"""What a large data set costs before and after the voxels: by simulation, 50 million candidates.

    python benchmarks/scale.py [--candidates 500000 1500000 5000000 50000000] [--folder build/scale]

500 candidates a scan. Each size writes LUNA16's tables (random places, 1.3 nodules a scan), then runs the code of a
build in one process and that of a training in another, as they are, with scans that exist in memory only and receipts
for shards that were never cut; the shards are sparse files, right in header and size. For each part: processor seconds,
the peak of the process's resident memory in all, and between the largest two sizes the exponents (1 is linear).
50 million take 15 GB of memory, 8 GB of disk and some minutes.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from lunaprep import schema
from lunaprep.assemble import assemble
from lunaprep.candidates import read_annotations, read_candidates
from lunaprep.carried import carry_over
from lunaprep.finished import SeenInputs, find_finished
from lunaprep.geometry import Geometry
from lunaprep.parameters import Parameters
from lunaprep.plan import Plan, decide, make_plan
from lunaprep.scans.scan import Scan
from lunaprep.sources.source import FoundScan, SourceData
from lunaprep.store.reader import open_store
from lunaprep.store.receipt import Receipt, ScanRecord, SlabRecord, receipt_bytes
from lunaprep.store.shard import shard_header

PER_SCAN = 500
NODULES_PER_SCAN = 1.3
SHAPE = (150, 512, 512)
CROP = (32, 48, 48)
BATCH = 256
PIECE_SCANS = 2_000
"""Scans whose rows are made at a time, so that making the tables takes no memory."""


@dataclass(frozen=True)
class MadeUp(FoundScan):
    """A scan that is nowhere."""

    def open(self) -> Scan:
        """As if its header had been read."""
        grid = Geometry((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), SHAPE)
        raw = self.path.with_suffix(".raw")
        return Scan(self.series_uid, self.path, grid, np.dtype("int16"), raw, 78643200, self.series_uid[-16:], "map")


def memory(key: str) -> float:
    """VmRSS, VmHWM, RssAnon ... of this process, MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


class Parts:
    """Processor seconds and peak memory in all, MB, of each part."""

    def __init__(self) -> None:
        self.figures: dict[str, tuple[float, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure one."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
        start = time.process_time()
        yield
        self.figures[name] = time.process_time() - start, memory("VmHWM")
        print(f"    {name}: {self.figures[name]}", file=sys.stderr)


def uid_of(number: int) -> str:
    """A series UID as long as LUNA16's."""
    return f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{number * 7919 % 10**9:09d}{number:021d}"


def write_tables(count: int, root: Path) -> None:
    """candidates.csv and annotations.csv of a data set that is nowhere."""
    scans = count // PER_SCAN
    for name, columns in (("candidates", ("class",)), ("annotations", ("diameter_mm",))):
        rng = np.random.default_rng(len(name))
        with (root / f"{name}.csv").open("wb") as file:
            for first in range(0, scans, PIECE_SCANS):
                stop = min(first + PIECE_SCANS, scans)
                share = 1.0 if name == "candidates" else NODULES_PER_SCAN / PER_SCAN
                rows = round((stop - first) * PER_SCAN * share)
                owner = np.sort(rng.integers(0, stop - first, rows))
                last = (rng.random(rows) < 0.002) * 1 if name == "candidates" else rng.uniform(3, 30, rows).round(2)
                table = {
                    "seriesuid": pa.array([uid_of(i) for i in range(first, stop)]).take(pa.array(owner)),
                    **{
                        f"coord{axis}": rng.uniform(0, side, rows).round(2)
                        for axis, side in zip("XYZ", (511, 511, 149), strict=True)
                    },
                    columns[0]: last,
                }
                how = pyarrow.csv.WriteOptions(include_header=not first, quoting_style="none")
                pyarrow.csv.write_csv(pa.table(table), file, how)


def found_source(count: int, root: Path, parts: Parts) -> SourceData:
    """The data set, its tables as read."""
    with parts.part("read candidates.csv"):
        candidates = read_candidates(root / "candidates.csv").frame
    assert len(candidates) == count
    annotations = read_annotations(root / "annotations.csv").frame
    uids = [uid_of(i) for i in range(count // PER_SCAN)]
    scans = tuple(MadeUp(uid, i % 10, root / f"subset{i % 10}/{uid}.mhd") for i, uid in enumerate(uids))
    return SourceData(root, tuple(range(10)), scans, candidates, annotations, None, {}, (), ())


def tables(count: int, root: Path) -> SourceData:
    """A data set that is nowhere."""
    write_tables(count, root)
    return found_source(count, root, Parts())


def hole_bytes(rows: int, shape: tuple[int, int, int], dtype: str) -> int:
    """Size of a shard."""
    return schema.DATA_OFFSET + rows * schema.crop_bytes(shape, dtype)


def dig(path: Path, rows: int, shape: tuple[int, int, int], dtype: str, dataset: str) -> None:
    """Write a shard that is a hole behind a right header."""
    with path.open("wb") as file:
        file.write(shard_header(rows, shape, dtype, dataset))
        file.truncate(hole_bytes(rows, shape, dtype))


def receipts_of(plan: Plan) -> list[Receipt]:
    """Receipts of shards that were never cut."""
    made = []
    for shard in plan.shards:
        name, rows = f"{shard.name}-{shard.plan_key[:12]}", shard.rows
        checks = tuple(f"{value:016x}" for value in range(rows))
        scans = tuple(
            ScanRecord(job.scan.series_uid, "ok", None, False, 1, "0" * 32, -1000.0, 1000.0, 0.1, len(job.starts))
            for job in shard.jobs
        )
        file, slab = f"{schema.SHARDS_DIR}/{name}.h5", f"{schema.SLABS_DIR}/{name}.h5"
        n, zeros, masks = shard.num_slabs, "0" * 64, f"{schema.SLABS_DIR}/{name}.masks.h5"
        some, sizes = checks[:n], [hole_bytes(n, schema.SLAB_SHAPE, dtype) for dtype in (plan.dtype, "uint8")]
        slabs = SlabRecord(
            shard.slabs_key, name, n, slab, sizes[0], zeros, masks, sizes[1], zeros, some, some, (1,) * n
        )
        size = hole_bytes(rows, CROP, plan.dtype)
        made.append(Receipt(shard.plan_key, name, file, rows, size, zeros, checks, scans, slabs))
    return made


def write_store(files: dict[str, bytes], plan: Plan, receipts: list[Receipt], out: Path) -> None:
    """Put the store on the disk; shards are holes behind a right header."""
    for folder in (schema.SHARDS_DIR, schema.SLABS_DIR):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    for receipt in receipts:
        dig(out / str(receipt.file), receipt.rows, CROP, plan.dtype, schema.CROPS_DATASET)
        if receipt.slabs and receipt.slabs.rows:
            given = receipt.slabs
            dig(out / str(given.file), given.rows, schema.SLAB_SHAPE, plan.dtype, schema.SLABS_DATASET)
            dig(out / str(given.mask_file), given.rows, schema.SLAB_SHAPE, "uint8", schema.MASKS_DATASET)
        (out / schema.SHARDS_DIR / f"{receipt.shard_id}.json").write_bytes(receipt_bytes(receipt))


def train_side(count: int, folder: Path) -> dict[str, object]:
    """What a training does before its first step."""
    from lunatrain.mapping import open_crops
    from lunatrain.sampling import Shuffled, columns_of, row_labels, select_rows

    parts, before = Parts(), memory("RssAnon")
    with parts.part("open_store: look at each shard"):
        store = open_store(folder / "store")
    with parts.part("read what is needed of crops.parquet"):
        manifest = store.columns(*columns_of("series", "is_nodule"))
    with parts.part("split, labels, first epoch's order"):
        rows = select_rows(manifest, "series", "train")
        labels = row_labels(manifest, rows)
        order = Shuffled(rows, 0).order(0)
    with parts.part("map all shards"):
        crops = open_crops(store)
    with parts.part("first batch's rows (256)"):
        crops.gather(order[:BATCH], np.empty((BATCH, *CROP), dtype=store.dtype))
    pa.default_memory_pool().release_unused()
    held = memory("RssAnon") - before
    assert len(labels) == len(rows) == len(order) <= count
    return {"parts": parts.figures, "sizes": {"a training's own memory, bytes a crop": held * 2**20 / count}}


def build_side(count: int, folder: Path) -> dict[str, object]:
    """What a build does besides cutting."""
    parts, out = Parts(), folder / "store"
    shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    write_tables(count, folder)
    source = found_source(count, folder, parts)
    (folder / "candidates.csv").unlink()
    with parts.part("plan"):
        plan = make_plan(source, Parameters(), volumes=False, targets=True)
    receipts = receipts_of(plan)
    carried = carry_over(out, None, plan.source.subsets)
    with parts.part("tables, front doors, store.json"):
        new = assemble(plan, receipts, carried)
    write_store(dict(new.files), plan, receipts, out)
    del receipts
    with parts.part("a build with nothing to do: read the receipts, decide"):
        finished = find_finished(out, new.record)
        decide(plan, finished.receipts, lambda receipt: True, lambda scan, said: True)
    seen = SeenInputs(out)
    seen._seen = {str(item.path): [1, 2, "0" * 32] for item in source.scans}
    (out / schema.WORK_DIR).mkdir()
    with parts.part("notes on seen scans, one writing"):
        seen.save()
    sizes = {"shards": len(plan.shards), "crops.parquet MB": len(new.files[schema.MANIFEST_FILE]) / 1e6}
    sizes |= {"store.json MB": len(new.files[schema.STORE_FILE]) / 1e6}
    sizes |= {"planned rows, bytes a candidate": plan.rows.memory_usage(deep=True).sum() / count}
    return {"parts": parts.figures, "sizes": sizes}


def print_tables(results: dict[int, dict[str, Any]], counts: list[int]) -> None:
    """Seconds, peaks and exponents."""
    last = counts[-2:]
    head = " | ".join(f"{count / 1e6:g} M: s | peak MB" for count in counts)
    print(f"\n| part | {head} | exponent, s | MB |\n|---|{'--:|--:|' * len(counts)}--:|--:|")
    for name in results[counts[0]]["parts"]:
        cells = [results[count]["parts"][name] for count in counts]
        text = " | ".join(f"{s:.3f} | {peak:.0f}" for s, peak in cells)
        print(
            f"| {name} | {text} | {slope(last, [c[0] for c in cells[-2:]])} | "
            f"{slope(last, [c[1] for c in cells[-2:]])} |"
        )
    for name in results[counts[0]]["sizes"]:
        values = [results[count]["sizes"][name] for count in counts]
        print(f"| {name} | {' | '.join(f'{v:.1f} | ' for v in values)} | {slope(last, values[-2:])} | |")


def slope(counts: list[int], values: list[float]) -> str:
    """Exponent of a power law through two points."""
    if len(counts) < 2 or min(values) <= 0:
        return "–"
    return f"{math.log(values[1] / values[0]) / math.log(counts[1] / counts[0]):.2f}"


def main() -> None:
    """Measure all sizes, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[500_000, 1_500_000, 5_000_000, 50_000_000])
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--child", choices=["build_side", "train_side"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(globals()[args.child](args.candidates[0], args.folder)))
        return
    results: dict[int, dict[str, Any]] = {}
    for count in args.candidates:
        results[count] = {"parts": {}, "sizes": {}}
        for child in ("build_side", "train_side"):
            more = ["--child", child, "--candidates", str(count), "--folder", str(args.folder)]
            done = subprocess.run([sys.executable, __file__, *more], stdout=subprocess.PIPE, check=True, env=os.environ)
            for name, figures in json.loads(done.stdout).items():
                results[count][name] |= figures
        shutil.rmtree(args.folder)
    print_tables(results, list(args.candidates))


if __name__ == "__main__":
    main()
