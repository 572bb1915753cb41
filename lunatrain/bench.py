"""How fast a store feeds a training loop on this machine, against what the machine can copy and read.

Every ratio comes from one run in which the ways alternate, over one of two limits: `limit`, one thread's memcpy of the
same random float32 crops from the page cache into a reused aligned buffer, and `sequential`, the disk read from end to
end past the page cache.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader

from lunaprep.store.reader import ShardFile, Store, open_store
from lunatrain.crop_sources import Rows, aligned_empty, is_compiled
from lunatrain.data import BATCH_SIZE, CropLoader, Deliver
from lunatrain.dataset import CropDataset
from lunatrain.disk import drop_from_cache, read_through
from lunatrain.mapping import CropMap, Io, open_crops

COPY_BYTES = 10**9
"""Most bytes of the float32 copy the limit is measured on, and of the crops that are read cold."""

BATCHES_PER_ROUND = 8
CONSUMER_CROPS_PER_S = 25_000
CONSUMER_BATCHES = 60
LARGE_STORE_CROPS = 551_065
LARGE_SHARD_BYTES = 2**30

FIRST_BATCH = """
import sys, numpy as np
from lunaprep.store.reader import open_store
from lunatrain.data import CropLoader
from lunatrain.mapping import open_crops
crops = open_crops(open_store(sys.argv[1]))
next(CropLoader(crops).batches([np.arange(min(256, len(crops)))]))
"""

Way = Callable[[list[Rows]], tuple[int, float]]
"""Delivers the crops of some batches; gives how many, and the seconds it took."""


@dataclass(frozen=True)
class BenchRow:
    """One figure."""

    name: str
    """Its name in JSON, with the unit last: `…_crops_per_s`, `…_s`, `…_share`."""
    what: str
    value: float
    ratio: float | None = None
    """Over the limit: medians of the rounds."""
    best_ratio: float | None = None
    """Over the limit: best round of each."""


@dataclass
class BenchReport:
    """All figures of a run, and what they were measured on."""

    facts: dict[str, Any]
    rows: list[BenchRow] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """One flat object of figures; the table as a list under `table`."""
        values = {row.name: row.value for row in self.rows}
        ratios = {_ratio_name(row.name): row.ratio for row in self.rows if row.ratio is not None}
        return {**self.facts, **values, **ratios, "table": [asdict(row) for row in self.rows]}

    def to_text(self) -> str:
        """A table for people."""
        lines = [f"{name.replace('_', ' '):<12} {value}" for name, value in self.facts.items()]
        lines += ["", f"{'':<58}{'':>18}{'ratio':>9}{'best':>9}"]
        for row in self.rows:
            ratios = "".join(
                f"{'' if ratio is None else format(ratio, '.2f'):>9}" for ratio in (row.ratio, row.best_ratio)
            )
            lines.append(f"{row.what:<58}{_with_unit(row):>18}{ratios}".rstrip())
        return "\n".join(lines) + "\n"


def run_bench(
    path: str | Path,
    rounds: int = 9,
    cold: bool = True,
    batch_size: int = BATCH_SIZE,
    scratch: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Measure a store.

    Parameters
    ----------
    path : str or Path
        The store.
    rounds : int
        Rounds over all ways; figures are their medians.
    cold : bool
        Also drop the crops from the page cache and read them again, where the system lets a program do so (Linux).
    batch_size : int
        Crops of a batch.
    scratch : Path, optional
        Folder for up to 1 GB of temporary files; default the system's.
    progress : callable
        Told what is being measured.

    Raises
    ------
    LunaprepError
        No store (UsageError), a damaged one, or no crops in it (StoreError).
    """
    store = open_store(path)
    shape, dtype = store.crop_shape, store.dtype
    facts = {"store": str(path), "crops": len(store), "crop_shape": "x".join(map(str, shape)), "dtype": str(dtype)}
    facts["gathered_by"] = "compiled code" if is_compiled() else "NumPy (installed without a compiler)"
    report = BenchReport({**facts, "batch_size": batch_size, "cores": os.cpu_count(), "rounds": rounds})
    with tempfile.TemporaryDirectory(dir=scratch, prefix="lunatrain-bench-") as folder:
        progress("opening and starting")
        report.rows += _opening(store, Path(folder))
        progress("warm crops")
        report.rows += _warm(store, Path(folder), rounds, batch_size)
    progress(f"waiting of a consumer of {CONSUMER_CROPS_PER_S:,} crops/s")
    report.rows += _waiting(store, batch_size)
    if cold and hasattr(os, "posix_fadvise"):
        progress("cold crops")
        report.rows += _cold(store, batch_size, max(1, rounds // 3))
    return report


def _opening(store: Store, folder: Path) -> list[BenchRow]:
    opened: list[float] = []
    large: list[float] = []
    one = int(np.prod(store.crop_shape)) * store.dtype.itemsize
    shards = _sparse_shards(folder, one)
    for _ in range(5):
        with _timed(opened):
            open_crops(open_store(store.path)).close()
        with _timed(large):
            CropMap(shards, store.crop_shape, store.dtype).close()
    rows = sum(shard.rows for shard in shards)
    run = [sys.executable, "-c"]
    bare = _seconds_of([*run, "import torch, pandas"])
    first = _seconds_of([*run, FIRST_BATCH, str(store.path)])
    return [
        BenchRow("open_s", f"open this store of {len(store.shards)} shards as one view", statistics.median(opened)),
        BenchRow("open_large_s", f"map {rows:,} crops in {len(shards)} shards as one", statistics.median(large)),
        BenchRow("import_torch_s", "start-up: python, torch and pandas alone", bare),
        BenchRow("first_batch_s", "start-up: python to the first batch", first),
    ]


def _warm(store: Store, folder: Path, rounds: int, batch_size: int) -> list[BenchRow]:
    copy = _float32_copy(store, folder)
    buffer = aligned_empty((batch_size, copy.shape[1]), np.float32)
    ways = {name: _gathering(one, buffer) for name, one in memcpys(copy, buffer).items()}
    random = np.random.default_rng(0)

    def some_batches() -> list[Rows]:
        return list(random.integers(0, len(copy), (BATCHES_PER_ROUND, batch_size)))

    first = _alternate(ways, 3, some_batches)
    fastest = max(first, key=lambda name: statistics.median(first[name][1:]))
    with open_crops(store) as crops, open_crops(store, threads=2) as two:
        names = {"limit": f"limit: memcpy ({fastest}), float32, 1 thread"}
        ways = {"limit": ways[fastest]}
        for dtype in ("int16", "float32"):
            if dtype == "int16" and store.dtype != np.int16:
                continue
            for threads, source in ((1, crops), (2, two)):
                out = aligned_empty((batch_size, *store.crop_shape), dtype)
                names[f"gather_{dtype}_{threads}"] = f"store to {dtype}, {threads} thread{'s' * (threads > 1)}"
                ways[f"gather_{dtype}_{threads}"] = _gathering(source.gather, out)
            names[f"loader_{dtype}"] = f"store to {dtype}, through the prefetch thread"
            ways[f"loader_{dtype}"] = _loading(CropLoader(crops, batch_size, _deliver(dtype)))
        dataset = CropDataset(store.path)
        for workers in (0, 2):
            names[f"dataloader_{workers}"] = f"torch's own DataLoader on CropDataset, {workers} workers"
            ways[f"dataloader_{workers}"] = _stock(dataset, workers)
        return _rows(names, _alternate(ways, rounds, some_batches), "limit")


def _waiting(store: Store, batch_size: int) -> list[BenchRow]:
    rows = []
    for dtype in dict.fromkeys((str(store.dtype), "float32")):
        with open_crops(store) as crops, CropLoader(crops, batch_size, _deliver(dtype)) as loader:
            random = np.random.default_rng(1)
            plan = list(random.integers(0, min(len(crops), 4096), (CONSUMER_BATCHES, batch_size)))
            for batch in loader.batches(plan[: CONSUMER_BATCHES // 4]):  # warm pages and buffers
                del batch
            loader.wait_s = loader.total_s = 0.0
            for batch in loader.batches(plan):
                time.sleep(len(batch.rows) / CONSUMER_CROPS_PER_S)
            what = f"share of waiting, {dtype}, consumer of {CONSUMER_CROPS_PER_S:,}/s"
            rows.append(BenchRow(f"data_wait_{dtype}_share", what, loader.wait_share))
    return rows


def _cold(store: Store, batch_size: int, rounds: int) -> list[BenchRow]:
    one = int(np.prod(store.crop_shape)) * store.dtype.itemsize
    count = min(len(store), max(1, COPY_BYTES // one))
    spans = list(_spans(store.shards, count, one))
    random = np.random.default_rng(2)

    def sequential(direct: bool) -> Way:
        def run(_: list[Rows]) -> tuple[int, float]:
            drop_from_cache(spans)
            return count, read_through(spans, direct)

        return run

    def epoch(io: Io) -> Way:
        def run(batches: list[Rows]) -> tuple[int, float]:
            drop_from_cache(spans)
            with open_crops(store, io) as crops:
                return _loading(CropLoader(crops, batch_size))(batches)

        return run

    def all_once() -> list[Rows]:
        return np.array_split(random.permutation(count), range(batch_size, count, batch_size))

    names = {"sequential": "cold: limit: the disk from end to end, past the cache"}
    names |= {"sequential_cached": "cold: the same through the page cache"}
    names |= {f"cold_{io}": f"cold: random epoch, --io {io}" for io in ("auto", "willneed", "pread")}
    ways = {"sequential": sequential(direct=True), "sequential_cached": sequential(direct=False)}
    ways |= {"cold_auto": epoch("auto"), "cold_willneed": epoch("willneed"), "cold_pread": epoch("pread")}
    return _rows(names, _alternate(ways, rounds, all_once), "sequential")


def _alternate(ways: dict[str, Way], rounds: int, batches: Callable[[], list[Rows]]) -> dict[str, list[float]]:
    """Crops/s of each way, in each round."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        rows = batches()
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in order:
            count, seconds = ways[name](rows)
            speeds[name].append(count / seconds)
    return speeds


def _rows(names: dict[str, str], speeds: dict[str, list[float]], limit: str) -> list[BenchRow]:
    middle = {name: statistics.median(speed) for name, speed in speeds.items()}
    rows = []
    for name, what in names.items():
        ratio, best = middle[name] / middle[limit], max(speeds[name]) / max(speeds[limit])
        rows.append(BenchRow(f"{name}_crops_per_s", what, middle[name], ratio, best))
    return rows


def memcpys(copy: npt.NDArray[np.float32], buffer: npt.NDArray[np.float32]) -> dict[str, Callable[..., None]]:
    """The ways one thread may copy whole crops; the fastest is the limit."""
    memmove = ctypes.PyDLL(None).memmove if sys.platform != "win32" else ctypes.cdll.msvcrt.memmove
    memmove.argtypes, memmove.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], None
    size, start, into = copy.shape[1] * copy.itemsize, copy.ctypes.data, buffer.ctypes.data

    def by_memmove(rows: Rows, _: npt.NDArray[Any]) -> None:
        for at, row in enumerate(rows.tolist()):
            memmove(into + at * size, start + row * size, size)

    def by_copyto(rows: Rows, out: npt.NDArray[Any]) -> None:
        for crop, row in zip(out, rows.tolist(), strict=True):
            np.copyto(crop, copy[row])

    def by_take(rows: Rows, out: npt.NDArray[Any]) -> None:
        np.take(copy, rows, axis=0, out=out, mode="clip")

    return {"memmove": by_memmove, "np.copyto": by_copyto, "np.take": by_take}


def _gathering(gather: Callable[[Rows, npt.NDArray[Any]], None], out: npt.NDArray[Any]) -> Way:
    def run(batches: list[Rows]) -> tuple[int, float]:
        started = time.perf_counter()
        for rows in batches:
            gather(rows, out)
        return len(batches) * len(out), time.perf_counter() - started

    return run


def _loading(loader: CropLoader) -> Way:
    def run(batches: list[Rows]) -> tuple[int, float]:
        started = time.perf_counter()
        count = sum(len(batch.rows) for batch in loader.batches(batches))
        return count, time.perf_counter() - started

    return run


def _stock(dataset: CropDataset, workers: int) -> Way:
    def run(batches: list[Rows]) -> tuple[int, float]:
        source = iter(DataLoader(dataset, batch_sampler=[rows.tolist() for rows in batches], num_workers=workers))
        next(source)  # its workers' start is not counted
        started = time.perf_counter()
        return sum(len(rows) for _, _, rows in source), time.perf_counter() - started

    return run


def _float32_copy(store: Store, folder: Path) -> npt.NDArray[np.float32]:
    """The first crops of the store in a file of float32, mapped: (n, voxels)."""
    voxels = int(np.prod(store.crop_shape))
    count = min(len(store), max(1, COPY_BYTES // (4 * voxels)))
    copy = np.memmap(folder / "crops.f32", dtype=np.float32, mode="w+", shape=(count, voxels))
    with open_crops(store) as crops:
        for start in range(0, count, BATCH_SIZE):
            rows = np.arange(start, min(start + BATCH_SIZE, count))
            crops.advise(rows)
            crops.gather(rows, copy[start : start + len(rows)].reshape(-1, *store.crop_shape))
    copy.flush()
    return copy


def _sparse_shards(folder: Path, crop_bytes: int) -> list[ShardFile]:
    """Files without data, as many and as long as the shards of all LUNA16."""
    rows = max(1, LARGE_SHARD_BYTES // crop_bytes)
    shards = []
    for number, start in enumerate(range(0, LARGE_STORE_CROPS, rows)):
        shard = ShardFile(str(number), folder / f"{number}.h5", 4096, min(rows, LARGE_STORE_CROPS - start))
        with shard.path.open("wb") as file:
            file.truncate(shard.offset + shard.rows * crop_bytes)
        shards.append(shard)
    return shards


def _spans(shards: tuple[ShardFile, ...], count: int, crop_bytes: int) -> Iterator[tuple[Path, int, int]]:
    """File, start and bytes of the first `count` crops."""
    for shard in shards:
        rows = min(shard.rows, count)
        if rows:
            yield shard.path, shard.offset, rows * crop_bytes
        count -= rows


@contextmanager
def _timed(into: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    into.append(time.perf_counter() - started)


def _seconds_of(command: list[str]) -> float:
    seconds: list[float] = []
    for _ in range(3):
        with _timed(seconds):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return min(seconds)


def _deliver(dtype: str) -> Deliver:
    return "int16" if dtype == "int16" else "float32"


def _ratio_name(name: str) -> str:
    return name.removesuffix("_crops_per_s") + "_ratio"


def _with_unit(row: BenchRow) -> str:
    if row.name.endswith("_crops_per_s"):
        return f"{row.value:,.0f} crops/s"
    return f"{row.value:.1%}" if row.name.endswith("_share") else f"{row.value * 1000:,.1f} ms"
