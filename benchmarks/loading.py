"""Crops/s of lunatrain's batches against what people load crops with otherwise.

    python benchmarks/loading.py [--folder build/bench/loading] [--rounds 3] [--batch-size 256] [--book CLONE]
                                 [--only NAME ...] [--json FILE] [--scans 6] [--size 96 256 256] [--candidates 900]
                                 [--seconds 0.4]

About 5,400 crops of 32x48x48 from six phantom scans of 96x256x256, stored as int16 and as float32; all come back as
float32 batches in random order, from the page cache. The limit is one thread's memcpy of as many float32 crops into a
buffer that is used again. A peer is written, tried in each of its ways (workers, batch reads), and the fastest way then
takes turns with the limit and with lunatrain; then its copy is removed. Ratios are of medians of those rounds.

What isn't installed is told and left out: `pip install --no-deps -r benchmarks/peers.txt`. CLONE is a clone of
github.com/deep-learning-with-pytorch/dlwpt-code. Takes six minutes and 5 GB of disk on two cores.
"""

import argparse
import importlib
import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from loading_peers import DISK_PEERS, MONAI_CACHE, RAM, Crops, Peer, Way, book_peer, quiet
from rounds import alternate

from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.sources.phantom import write_phantom
from lunaprep.store.reader import Store, open_store
from lunatrain.bench import memcpys
from lunatrain.crop_sources import aligned_empty
from lunatrain.data import CropLoader
from lunatrain.mapping import open_crops

SCANS, SIZE, CANDIDATES = 6, (96, 256, 256), 900
DTYPES: tuple[Literal["int16", "float32"], ...] = ("int16", "float32")
WARM_UP = 4
"""Batches that aren't timed: those that workers get ready while they start."""
MIN_BATCHES, MIN_S, MAX_S = 6, 0.4, 1.5
"""What a round goes on for: so many batches and seconds (--seconds), or the most seconds."""


@dataclass(frozen=True)
class Row:
    """One peer and type, with what took turns with it."""

    peer: str
    dtype: str
    on_disk: bool
    note: str
    """Its fastest way, or why there is none."""
    crops_per_s: float = 0.0
    ours_per_s: float = 0.0
    limit_per_s: float = 0.0

    @property
    def ratio(self) -> float:
        """Ours over the peer's."""
        return self.ours_per_s / self.crops_per_s if self.crops_per_s else 0.0


def make_stores(given: argparse.Namespace) -> dict[str, Store]:
    """The store of each type; made once."""
    folder, data = given.folder, given.folder / "data"
    for dtype in DTYPES:
        if not (folder / dtype / "crops.h5").is_file():
            write_phantom(data, given.scans, 5, tuple(given.size), num_candidates=given.candidates, num_subsets=2)
            options = BuildOptions(data, folder / dtype, workers=2, volumes=False, targets=False)
            build(options, Parameters(dtype=dtype, shard_bytes=2**31))
    return {dtype: open_store(folder / dtype) for dtype in DTYPES}


def in_memory(store: Store, crops: np.ndarray | None = None) -> Crops:
    """All crops as stored, in new memory or in an array that is given."""
    crops = np.empty((len(store), *store.crop_shape), store.dtype) if crops is None else crops
    with open_crops(store) as mapped:
        mapped.gather(np.arange(len(store)), crops.reshape(-1, *store.crop_shape))
    return crops


def speed(batches: Iterator[torch.Tensor], least_s: float) -> float:
    """Crops/s of some batches after the first few."""
    started = time.perf_counter()
    for _ in itertools.islice(batches, WARM_UP):
        if time.perf_counter() - started > least_s:
            break
    count = number = 0
    started = time.perf_counter()
    for batch in batches:
        assert batch.dtype == torch.float32
        count, number, spent = count + len(batch), number + 1, time.perf_counter() - started
        if (number >= MIN_BATCHES and spent >= least_s) or (number > 1 and spent >= MAX_S):
            break
    return count / (time.perf_counter() - started)


def of_peer(way: Way, num_crops: int, given: argparse.Namespace, random: np.random.Generator) -> Callable[[], float]:
    """Its speed in a round of its own order."""

    def run() -> float:
        order = random.permutation(num_crops)
        with quiet():
            batches = way(order[: num_crops - num_crops % given.batch_size], given.batch_size)
            try:
                return speed(batches, given.seconds)
            finally:
                batches.close()

    return run


def references(
    stores: dict[str, Store], given: argparse.Namespace, random: np.random.Generator
) -> dict[str, Callable[[], float]]:
    """The limit, and lunatrain from each store."""
    store, batch_size = stores["float32"], given.batch_size
    copy = np.memmap(given.folder / "crops.f32", np.float32, "w+", shape=(len(store), int(np.prod(store.crop_shape))))
    in_memory(store, copy)
    buffer = aligned_empty((batch_size, copy.shape[1]), np.float32)
    delivered = torch.from_numpy(buffer)

    def orders() -> Iterator[np.ndarray]:
        while True:
            order = random.permutation(len(copy))
            yield from np.split(order, range(batch_size, len(order), batch_size))[:-1]

    def limit(way: Callable[..., None]) -> Callable[[], float]:
        def batches() -> Iterator[torch.Tensor]:
            for rows in orders():
                way(rows, buffer)
                yield delivered

        return lambda: speed(batches(), given.seconds)

    def ours(dtype: str) -> Callable[[], float]:
        loader = CropLoader(open_crops(stores[dtype]), batch_size, "float32")

        def run() -> float:
            with loader:
                return speed((batch.crops for batch in loader.batches(orders())), given.seconds)

        return run

    limits = {name: limit(way) for name, way in memcpys(copy, buffer).items()}
    ways: dict[str, Callable[[], float]] = {**limits, **{dtype: ours(dtype) for dtype in DTYPES}}
    tried = alternate(ways, 3)
    fastest = max(limits, key=lambda name: statistics.median(tried[name]))
    return {"limit": limits[fastest], **{dtype: ways[dtype] for dtype in DTYPES}}


def compare(
    peer: Peer, crops: Crops, folder: Path, base: dict[str, Callable[[], float]], given: argparse.Namespace
) -> Row:
    """Write a peer's copy, find its fastest way, and let it take turns with the limit and with lunatrain."""
    dtype = str(crops.dtype)
    random = np.random.default_rng(0)
    try:
        importlib.import_module(peer.package)
    except ImportError as error:
        return Row(peer.name, dtype, peer.on_disk, f"not installed (pip install {peer.package}): {error}")
    folder.mkdir(parents=True)
    try:
        peer.write(crops, folder)
        os.sync()
        ways = {name: of_peer(way, len(crops), given, random) for name, way in peer.ways(crops, folder).items()}
        tried = {name: way() for name, way in ways.items()}
        best = max(tried, key=lambda name: tried[name])
        turns = {"limit": base["limit"], "ours": base[dtype], "peer": ways[best]}
        figures = {name: statistics.median(values) for name, values in alternate(turns, given.rounds).items()}
        return Row(peer.name, dtype, peer.on_disk, best, figures["peer"], figures["ours"], figures["limit"])
    except Exception as error:  # a peer that fails is told, the others go on
        return Row(peer.name, dtype, peer.on_disk, f"failed: {type(error).__name__}: {error}"[:300])
    finally:
        shutil.rmtree(folder)


def table(rows: list[Row]) -> str:
    """All rows, then what was reached."""
    lines = [f"{'':32s}{'stored':>8s}{'crops/s':>10s}{'ours':>10s}{'limit':>10s}{'ours/peer':>11s}{'ours/limit':>12s}"]
    for row in rows:
        line = f"{row.peer:32s}{row.dtype:>8s}"
        if row.crops_per_s:
            line += f"{row.crops_per_s:10,.0f}{row.ours_per_s:10,.0f}{row.limit_per_s:10,.0f}{row.ratio:11.1f}"
            line += f"{row.ours_per_s / row.limit_per_s:12.2f}"
        lines.append(f"{line}  {row.note}")
    return "\n".join([*lines, "", *(f"{name:50s}{value:8.2f}" for name, value in reached(rows).items())])


def reached(rows: list[Row]) -> dict[str, float]:
    """The ratios that are aimed at."""
    found: dict[str, float] = {}
    rows = [row for row in rows if row.crops_per_s]
    for dtype in DTYPES:
        of = [row for row in rows if row.dtype == dtype]
        if of:
            over = [row.ours_per_s / row.limit_per_s for row in of]
            found[f"{dtype} store to float32 / limit"] = statistics.median(over)
        disk = [row for row in of if row.on_disk]
        if disk:
            best = max(disk, key=lambda row: row.crops_per_s)
            found[f"{dtype} / best of disk ({best.peer})"] = best.ratio
        for row in of:
            if row.peer in (RAM.name, "the book's cache"):
                found[f"{dtype} / {row.peer}"] = row.ratio
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench/loading"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--book", type=Path, help="a clone of the book's repository")
    parser.add_argument("--only", nargs="+", default=[], help="peers whose name has one of these words")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scans", type=int, default=SCANS)
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, help="slices, rows, columns")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="of each scan")
    parser.add_argument("--seconds", type=float, default=MIN_S, help="least time of a round")
    given = parser.parse_args()
    peers = [RAM, MONAI_CACHE, *DISK_PEERS]
    jobs = [(peer, dtype) for peer in peers for dtype in DTYPES]
    if given.book:
        jobs.append((book_peer(given.book), "float32"))
    jobs = [job for job in jobs if not given.only or any(word.lower() in job[0].name.lower() for word in given.only)]
    stores = make_stores(given)
    base = references(stores, given, np.random.default_rng(1))
    shutil.rmtree(given.folder / "peer", ignore_errors=True)
    begun, rows = time.perf_counter(), []
    for dtype in DTYPES:
        crops = in_memory(stores[dtype])
        for peer in (peer for peer, of in jobs if of == dtype):
            started = time.perf_counter()
            rows.append(compare(peer, crops, given.folder / "peer", base, given))
            took = time.perf_counter() - started
            print(f"# {peer.name}, {dtype}: ours / peer {rows[-1].ratio:.1f}, {took:.0f} s", flush=True)
    print(f"\n{len(crops):,} crops, batches of {given.batch_size}, {given.rounds} rounds, {os.cpu_count()} cores, "
          f"{time.perf_counter() - begun:.0f} s\n")  # fmt: skip
    print(table(rows))
    if given.json:
        told = {"rows": [asdict(row) for row in rows], "reached": reached(rows)}
        given.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
