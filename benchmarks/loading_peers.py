"""What people store and load crops with otherwise, each through its own interface: for `loading.py`.

A peer writes crops as int16 or float32 into a folder and delivers them as float32 batches in random order, in one or
more ways (workers of a DataLoader, or its own kind of batch read); the benchmark takes its fastest. Packages are
imported when they are wanted, so each is optional. Nothing is compressed but what says so.
"""

import contextlib
import copy
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

Crops = np.ndarray
"""(n, slices, rows, columns), int16 or float32."""

Batches = Generator[torch.Tensor, None, None]
Way = Callable[[np.ndarray, int], Batches]
"""From an order of rows and the size of a batch to the batches; what shuffles by itself takes no order."""

WORKERS = (0, 1, 2)
TAR_CROPS = 500
ZARR_SHARD_CROPS = 128
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Peer:
    """A way of storing, and the ways of reading it."""

    name: str
    package: str
    """What to import, and to install."""
    write: Callable[[Crops, Path], None]
    ways: Callable[[Crops, Path], dict[str, Way]]
    """Ways of reading by a short name. Only peers that are fed from memory look at the crops."""
    on_disk: bool = True


class Items(Dataset[Any]):
    """A Dataset of `read(row)`, what it reads from being opened in the process that reads."""

    def __init__(self, length: int, opened: Callable[[], Callable[[int], Any]]) -> None:
        self.length, self.opened = length, opened
        self.read: Callable[[int], Any] | None = None
        self.pid = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> Any:
        if self.read is None or self.pid != os.getpid():
            self.read, self.pid = self.opened(), os.getpid()
        return self.read(row)


def collate(items: list[Any]) -> torch.Tensor:
    """A float32 batch, made as torch makes its own: in a worker, in shared memory."""
    batch: torch.Tensor = default_collate([torch.as_tensor(item).float() for item in items])
    return batch


def stock(dataset: Any, workers: Iterable[int] = WORKERS, loader: Any = DataLoader) -> dict[str, Way]:
    """A way for each number of workers of a DataLoader."""

    def way(number: int) -> Way:
        def batches(order: np.ndarray, batch_size: int) -> Batches:
            chosen = [rows.tolist() for rows in np.split(order, range(batch_size, len(order), batch_size))]
            fresh = copy.copy(dataset)  # what it opens is closed with it
            yield from loader(fresh, batch_sampler=chosen, num_workers=number, collate_fn=collate)

        return batches

    return {f"{number} workers": way(number) for number in workers}


def no_write(crops: Crops, folder: Path) -> None:
    """Nothing: it reads from memory."""


def ram_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """The crops in memory through torch's DataLoader."""
    tensor = torch.from_numpy(crops)
    return stock(Items(len(crops), lambda: lambda row: tensor[row]))


def npy_write(crops: Crops, folder: Path) -> None:
    """A file for each crop."""
    for row, crop in enumerate(crops):
        np.save(folder / f"{row}.npy", crop)


def npy_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """np.load in a Dataset."""
    return stock(Items(len(crops), lambda: lambda row: np.load(folder / f"{row}.npy")))


def h5_write(crops: Crops, folder: Path) -> None:
    """One file, a chunk for each crop, gzip 4: the chunks are deflated as h5py's filter does, but by two threads."""
    with h5py.File(folder / "crops.h5", "w") as file, ThreadPoolExecutor(2) as pool:
        chunk = (1, *crops.shape[1:])
        dataset = file.create_dataset(
            "crops", crops.shape, crops.dtype, chunks=chunk, compression="gzip", compression_opts=4
        )
        for row, data in enumerate(pool.map(lambda crop: zlib.compress(crop, 4), crops)):
            dataset.id.write_direct_chunk((row, 0, 0, 0), data)


def h5_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """`dataset[row]` in a Dataset; each worker opens the file."""

    def opened() -> Callable[[int], Any]:
        dataset = h5py.File(folder / "crops.h5", "r")["crops"]
        return lambda row: dataset[row]

    return stock(Items(len(crops), opened))


def monai_cache_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """CacheDataset with all crops cached, through MONAI's DataLoader and its ThreadDataLoader."""
    from monai.data import CacheDataset, DataLoader, ThreadDataLoader
    from monai.transforms import Compose, Lambda

    load = Compose([Lambda(func=lambda row: torch.tensor(crops[row]), track_meta=False)])
    dataset = CacheDataset(list(range(len(crops))), load, num_workers=2, progress=False)
    threads = stock(dataset, (0,), ThreadDataLoader)["0 workers"]
    return {**stock(dataset, loader=DataLoader), "ThreadDataLoader": threads}


def monai_persistent(crops: Crops, folder: Path) -> Any:
    """PersistentDataset: a pickled tensor for each crop."""
    from monai.data import PersistentDataset
    from monai.transforms import Compose, Lambda

    load = Compose([Lambda(func=lambda row: torch.tensor(crops[row]), track_meta=False)])
    return PersistentDataset(list(range(len(crops))), load, folder)


def monai_persistent_write(crops: Crops, folder: Path) -> None:
    """Go through it once: that fills it."""
    for _ in DataLoader(monai_persistent(crops, folder), batch_size=64, num_workers=2, collate_fn=len):
        pass


def monai_persistent_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """Through MONAI's DataLoader."""
    from monai.data import DataLoader

    return stock(monai_persistent(crops, folder), loader=DataLoader)


def webdataset_write(crops: Crops, folder: Path) -> None:
    """Tar files of some hundred .npy each."""
    import webdataset

    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=TAR_CROPS, verbose=0) as writer:
        for row, crop in enumerate(crops):
            writer.write({"__key__": f"{row:06d}", "npy": crop})


def webdataset_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """Shuffled tars, a shuffle buffer, batches made in the worker: as its documents do."""
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))

    def way(workers: int) -> Way:
        def batches(order: np.ndarray, batch_size: int) -> Batches:
            dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=int(order[0]))
            dataset = dataset.shuffle(SHUFFLE_BUFFER).decode().to_tuple("npy")
            dataset = dataset.batched(batch_size, collation_fn=lambda items: collate([item[0] for item in items]))
            yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)

        return batches

    return {f"{workers} workers": way(workers) for workers in WORKERS}


def litdata_write(crops: Crops, folder: Path) -> None:
    """Its optimised chunks of 64 MB; the copy is numpy's, as torch's threads do not live through the fork."""
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    import litdata

    with quiet():
        litdata.optimize(
            lambda row: torch.from_numpy(np.array(crops[row])), list(range(len(crops))), str(folder / "data"),
            chunk_bytes="64MB", num_workers=1, start_method="fork", verbose=False, keep_data_ordered=False,
        )  # fmt: skip


def litdata_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """StreamingDataset through its StreamingDataLoader."""
    import litdata

    def way(workers: int) -> Way:
        def batches(order: np.ndarray, batch_size: int) -> Batches:
            dataset = litdata.StreamingDataset(str(folder / "data"), shuffle=True, seed=int(order[0]))
            yield from litdata.StreamingDataLoader(
                dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate
            )

        return batches

    return {f"{workers} workers": way(workers) for workers in WORKERS}


def zarr_write(crops: Crops, folder: Path) -> None:
    """A chunk for each crop, shards of 128: written by tensorstore where it is there, which is faster."""
    import zarr

    chunk, shard = (1, *crops.shape[1:]), (ZARR_SHARD_CROPS, *crops.shape[1:])
    made = zarr.create_array(
        str(folder / "crops.zarr"), shape=crops.shape, dtype=crops.dtype, chunks=chunk, shards=shard, compressors=None
    )
    try:
        target = open_tensorstore(folder)
    except ImportError:
        target = made
    for start in range(0, len(crops), ZARR_SHARD_CROPS):
        stop = min(start + ZARR_SHARD_CROPS, len(crops))
        target[start:stop] = crops[start:stop]


def zarr_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """Crop by crop in a DataLoader, and a batch by one orthogonal index."""
    import zarr

    def opened() -> Callable[[int], Any]:
        array = zarr.open_array(str(folder / "crops.zarr"), mode="r")
        return lambda row: array[row]

    def by_index(order: np.ndarray, batch_size: int) -> Batches:
        array = zarr.open_array(str(folder / "crops.zarr"), mode="r")
        for start in range(0, len(order), batch_size):
            yield as_float(array.oindex[order[start : start + batch_size]])

    return {**stock(Items(len(crops), opened)), "oindex": by_index}


def open_tensorstore(folder: Path) -> Any:
    """The zarr store by tensorstore."""
    import tensorstore

    kvstore = {"driver": "file", "path": str(folder / "crops.zarr")}
    spec = {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_data": False, "recheck_cached_metadata": False}
    return tensorstore.open(spec).result()


def tensorstore_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """A batch by one index, by a future for each crop, and into a buffer that is used again."""
    import tensorstore

    def by_index(order: np.ndarray, batch_size: int) -> Batches:
        store = open_tensorstore(folder)
        for start in range(0, len(order), batch_size):
            yield as_float(store[order[start : start + batch_size]].read().result())

    def by_futures(order: np.ndarray, batch_size: int) -> Batches:
        store = open_tensorstore(folder)
        for start in range(0, len(order), batch_size):
            with tensorstore.Batch() as batch:
                futures = [store[row].read(batch=batch) for row in order[start : start + batch_size].tolist()]
            yield collate([future.result() for future in futures])

    def into_buffer(order: np.ndarray, batch_size: int) -> Batches:
        store = open_tensorstore(folder)
        buffer = np.empty((batch_size, *crops.shape[1:]), crops.dtype)
        floats = torch.empty(buffer.shape)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            tensorstore.array(buffer).write(store[order[start : start + batch_size]]).result()
            yield floats.copy_(torch.from_numpy(buffer)) if crops.dtype != np.float32 else torch.from_numpy(buffer)

    return {"index": by_index, "futures": by_futures, "index, own buffer": into_buffer}


def lmdb_write(crops: Crops, folder: Path) -> None:
    """A value for each crop."""
    import lmdb

    with lmdb.open(str(folder), map_size=2 * crops.nbytes + 2**24) as env, env.begin(write=True) as txn:
        for row, crop in enumerate(crops):
            txn.put(f"{row:08d}".encode(), crop, append=True)


def lmdb_ways(crops: Crops, folder: Path) -> dict[str, Way]:
    """Without lock and readahead; values are views of its map, got one by one in a Dataset, or a batch at once."""
    import lmdb

    def begin() -> Any:
        env = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
        return env, env.begin(buffers=True)

    def as_crop(value: Any) -> torch.Tensor:
        return torch.frombuffer(value, dtype=getattr(torch, str(crops.dtype))).view(crops.shape[1:])

    def opened() -> Callable[[int], Any]:
        env, txn = begin()
        return lambda row: as_crop(txn.get(f"{row:08d}".encode(), default=env))

    def by_cursor(order: np.ndarray, batch_size: int) -> Batches:
        env, txn = begin()
        with env, txn, txn.cursor() as cursor:
            for start in range(0, len(order), batch_size):
                keys = [f"{row:08d}".encode() for row in order[start : start + batch_size]]
                yield collate([as_crop(value) for _, value in cursor.getmulti(keys)])

    return {**stock(Items(len(crops), opened)), "getmulti": by_cursor}


def as_float(crops: np.ndarray) -> torch.Tensor:
    """As float32, copied only where it must be."""
    return torch.from_numpy(crops).float()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No talk of libraries on stdout."""
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def book_peer(book: Path) -> Peer:
    """The book's own `LunaDataset` with its cache filled with our crops, through torch's DataLoader.

    The cache stands where the program runs, so the way is gone through in its folder. It is the book's code that
    reads: `LunaDataset.__getitem__`, `getCtRawCandidate` and `GzipDisk`; only the scan behind the cache is ours.
    """

    def dataset(crops: Crops, folder: Path) -> Any:
        for name in [name for name in sys.modules if name.split(".")[0] in ("util", "p2ch11")]:
            del sys.modules[name]
        sys.path.insert(0, str(book.resolve()))
        try:
            with contextlib.chdir(folder):
                from p2ch11 import dsets
        finally:
            sys.path.remove(str(book.resolve()))
        candidates = [dsets.CandidateInfoTuple(False, 0.0, "1", (float(row), 0.0, 0.0)) for row in range(len(crops))]
        dsets.getCandidateInfoList = lambda: candidates
        dsets.getCt = lambda _: SimpleNamespace(
            getRawCandidate=lambda center, width: (crops[int(center[0])], dsets.XyzTuple(16, 200, 200))
        )
        return dsets.LunaDataset(sortby_str="label_and_size")

    def write(crops: Crops, folder: Path) -> None:
        with contextlib.chdir(folder):
            filled = dataset(crops, folder)
            for row in range(len(crops)):
                filled[row]

    def ways(crops: Crops, folder: Path) -> dict[str, Way]:
        found = dataset(crops, folder)

        def way(number: int) -> Way:
            def batches(order: np.ndarray, batch_size: int) -> Batches:
                chosen = [rows.tolist() for rows in np.split(order, range(batch_size, len(order), batch_size))]
                with contextlib.chdir(folder):
                    for batch in DataLoader(found, batch_sampler=chosen, num_workers=number):
                        yield batch[0]

            return batches

        return {f"{number} workers": way(number) for number in (*WORKERS, 8)}

    return Peer("the book's cache", "diskcache", write, ways)


warnings.filterwarnings("ignore", message="The given buffer is not writable")

RAM = Peer("in RAM, torch's DataLoader", "torch", no_write, ram_ways, on_disk=False)
MONAI_CACHE = Peer("MONAI CacheDataset (in RAM)", "monai", no_write, monai_cache_ways, on_disk=False)
DISK_PEERS = (
    Peer("MONAI PersistentDataset", "monai", monai_persistent_write, monai_persistent_ways),
    Peer("WebDataset", "webdataset", webdataset_write, webdataset_ways),
    Peer("LitData", "litdata", litdata_write, litdata_ways),
    Peer("zarr v3, sharded", "zarr", zarr_write, zarr_ways),
    Peer("tensorstore, zarr v3 sharded", "tensorstore", zarr_write, tensorstore_ways),
    Peer("LMDB", "lmdb", lmdb_write, lmdb_ways),
    Peer(".npy per crop", "numpy", npy_write, npy_ways),
    Peer("h5py, gzip 4", "h5py", h5_write, h5_ways),
)
