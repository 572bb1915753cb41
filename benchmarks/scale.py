"""What a large data set costs before and after the voxels: by simulation, up to 50 million candidates.

    python benchmarks/scale.py [--candidates 500000 1500000 5000000] [--folder build/scale] [--read-only 50000000]

Each size runs in a process of its own, 500 candidates a scan. It makes LUNA16's tables (random places, 1.3 nodules a
scan), then runs the code of a build and of a training as it is, with scans that exist in memory only and receipts for
shards that were never cut; the shards are sparse files, right in header and size. For each part: seconds, the peak
of resident memory over what it began with, and between the largest two sizes the exponent (1 is linear). --read-only
writes the manifest of a larger store in pieces, and measures what a reader of it needs.
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

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lunaprep import schema
from lunaprep.assemble import assemble
from lunaprep.candidates import read_candidates
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
from lunaprep.store.tables import ROW_GROUP_ROWS, arrow_schema

PER_SCAN = 500
NODULES_PER_SCAN = 1.3
SHAPE = (150, 512, 512)
CROP = (32, 48, 48)
BATCH = 256


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
    """Seconds and peak memory of each part."""

    def __init__(self) -> None:
        self.figures: dict[str, tuple[float, float, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure one."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
        before, start = memory("VmRSS"), time.process_time()
        yield
        self.figures[name] = time.process_time() - start, memory("VmHWM") - before, memory("VmHWM")
        print(f"    {name}: {self.figures[name]}", file=sys.stderr)


def uid_of(number: int) -> str:
    """A series UID as long as LUNA16's."""
    return f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{number * 7919 % 10**9:09d}{number:021d}"


def tables(count: int, root: Path) -> SourceData:
    """The tables of a data set that is nowhere."""
    rng = np.random.default_rng(0)
    uids = np.array([uid_of(i) for i in range(count // PER_SCAN)])
    owner = np.sort(rng.integers(0, len(uids), count))
    candidates = pd.DataFrame(
        {
            "candidate_id": np.arange(count),
            "series_uid": pd.Series(pd.array(uids, dtype="str")).take(owner).reset_index(drop=True),
            "x_mm": rng.uniform(0, 511, count).round(2),
            "y_mm": rng.uniform(0, 511, count).round(2),
            "z_mm": rng.uniform(0, 149, count).round(2),
            "is_nodule": rng.random(count) < 0.002,
        }
    )
    marks = candidates.iloc[np.sort(rng.choice(count, int(NODULES_PER_SCAN * len(uids)), replace=False))]
    annotations = marks[["series_uid", "x_mm", "y_mm", "z_mm"]].reset_index(drop=True)
    annotations = annotations.assign(annotation_id=np.arange(len(marks)), diameter_mm=rng.uniform(3, 30, len(marks)))
    scans = tuple(MadeUp(uid, i % 10, root / f"subset{i % 10}/{uid}.mhd") for i, uid in enumerate(uids.tolist()))
    return SourceData(root, tuple(range(10)), scans, candidates, annotations, None, {}, (), ())


def read_table(source: SourceData, folder: Path, parts: Parts) -> None:
    """Write candidates.csv (not measured) and read it."""
    path = folder / "candidates.csv"
    rows = source.candidates[["series_uid", "x_mm", "y_mm", "z_mm"]].assign(label=source.candidates["is_nodule"] * 1)
    names = dict(zip(rows, ("seriesuid", "coordX", "coordY", "coordZ", "class"), strict=True))
    rows.rename(columns=names).to_csv(path, index=False)
    with parts.part("read candidates.csv"):
        assert len(read_candidates(path).frame) == len(source.candidates)
    path.unlink()


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


def train_side(out: Path, parts: Parts) -> None:
    """What a training does before its first step."""
    from lunatrain.mapping import open_crops
    from lunatrain.sampling import Shuffled, row_labels, select_rows

    with parts.part("open_store: look at each shard"):
        store = open_store(out)
    with parts.part("read crops.parquet"):
        manifest = store.manifest
    with parts.part("split, labels, first epoch's order"):
        rows = select_rows(manifest, "series", "train")
        row_labels(manifest, rows)
        order = Shuffled(rows, 0).order(0)
    with parts.part("map all shards"):
        crops = open_crops(store)
    with parts.part("first batch's rows (256)"):
        crops.gather(order[:BATCH], np.empty((BATCH, *CROP), dtype=store.dtype))


def measure(count: int, folder: Path) -> dict[str, object]:
    """All parts for one size, in this process."""
    parts, out = Parts(), folder / "store"
    shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    source = tables(count, folder)
    read_table(source, folder, parts)
    parameters = Parameters()
    with parts.part("plan"):
        plan = make_plan(source, parameters, volumes=False, targets=True)
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
    sizes |= {
        "store.json MB": len(new.files[schema.STORE_FILE]) / 1e6,
        "rows MB": plan.rows.memory_usage(deep=True).sum() / 1e6,
    }
    del plan, new, finished, source, carried
    train_side(out, parts)
    shutil.rmtree(folder)
    return {"parts": parts.figures, "sizes": sizes}


def print_tables(results: dict[int, dict], counts: list[int]) -> None:
    """Seconds, peaks and exponents."""
    last = counts[-2:]
    head = " | ".join(f"{count / 1e6:g} M: s | peak MB" for count in counts)
    print(f"\n| part | {head} | exponent, s | MB |\n|---|{'--:|--:|' * len(counts)}--:|--:|")
    for name in results[counts[0]]["parts"]:
        cells = [results[count]["parts"][name] for count in counts]
        text = " | ".join(f"{s:.3f} | {peak:.0f}" for s, peak, _ in cells)
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


def write_manifest(count: int, path: Path) -> None:
    """A crops.parquet of so many rows, row group by row group, as a build writes it."""
    columns = arrow_schema([column for column in schema.MANIFEST_COLUMNS if not column.optional])
    rng = np.random.default_rng(0)
    per_shard = (1 << 30) // schema.crop_bytes(CROP, "int16")
    with pq.ParquetWriter(path, columns, compression="zstd", write_page_checksum=True) as writer:
        for first in range(0, count, ROW_GROUP_ROWS):
            at = np.arange(first, min(first + ROW_GROUP_ROWS, count))
            texts = {"series_uid": [uid_of(i) for i in (at // PER_SCAN).tolist()]}
            texts |= {"shard_id": [f"subset{i % 10}-{i:03d}-0123456789ab" for i in (at // per_shard).tolist()]}
            texts |= dict.fromkeys(("split_series", "split_candidate"), np.where(at % 10, "train", "val"))
            arrays = []
            for field in columns:
                if field.name in texts:
                    arrays.append(pa.array(texts[field.name], type=pa.string()))
                elif field.name in ("patient_id", "is_malignant", "annotation_id"):
                    arrays.append(pa.nulls(len(at), field.type))
                elif pa.types.is_boolean(field.type):
                    arrays.append(pa.array(rng.random(len(at)) < 0.002))
                else:
                    arrays.append(pa.array(rng.integers(0, 500, len(at))).cast(field.type))
            writer.write_table(pa.Table.from_arrays(arrays, schema=columns))


def read_only(count: int, folder: Path) -> dict[str, object]:
    """What a reader of a larger store needs: its table, and its order of rows."""
    from lunaprep.store.tables import read_table as read_parquet
    from lunatrain.sampling import Shuffled, row_labels, select_rows

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path, parts = folder / schema.MANIFEST_FILE, Parts()
    write_manifest(count, path)
    with parts.part("read crops.parquet"):
        manifest = read_parquet(path, schema.MANIFEST_COLUMNS)
    with parts.part("split, labels, first epoch's order"):
        rows = select_rows(manifest, "series", "train")
        row_labels(manifest, rows)
        Shuffled(rows, 0).order(0)
    sizes = {"crops.parquet MB": path.stat().st_size / 1e6}
    shutil.rmtree(folder)
    return {"parts": parts.figures, "sizes": sizes}


def main() -> None:
    """Measure all sizes, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[500_000, 1_500_000, 5_000_000])
    parser.add_argument("--read-only", type=int, nargs="*", default=[])
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--child", choices=["measure", "read_only"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(globals()[args.child](args.candidates[0], args.folder)))
        return
    for child, counts in (("measure", args.candidates), ("read_only", args.read_only)):
        results = {}
        for count in counts:
            more = ["--child", child, "--candidates", str(count), "--folder", str(args.folder)]
            done = subprocess.run([sys.executable, __file__, *more], stdout=subprocess.PIPE, check=True, env=os.environ)
            results[count] = json.loads(done.stdout)
        if results:
            print_tables(results, list(counts))


if __name__ == "__main__":
    main()
