"""Read a store: the tables as DataFrames, crops by row, volumes by series. No torch.

HDF5 only says at opening whether a shard is built as it should be; the crops are then read from the memory map.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep import schema
from lunaprep.errors import LunaprepError, StoreError
from lunaprep.store.commit import Version, inside, recover_if_idle, version_of
from lunaprep.store.layout import ADVICE, check_packing, check_shard, explained, open_h5, plain_dataset
from lunaprep.store.record import read_record
from lunaprep.store.tables import read_table

_MASKS = (schema.NODULE_MASK_DATASET, schema.LUNG_MASK_DATASET)


@dataclass(frozen=True)
class ShardFile:
    """Where a run of crops lies: `rows` crops from byte `offset` on, one behind the other."""

    id: str
    path: Path
    offset: int
    rows: int


def open_store(path: str | Path) -> "Store":
    """Open a store for reading.

    Parameters
    ----------
    path : str or Path
        The store's folder, or its crops.h5 or slabs.h5.

    Returns
    -------
    Store
        Nothing but store.json has been read; each shard is known to be laid out as the format says. It stays at this
        version: if a build replaces the store, what can no longer be read of it is an error, and nothing is mixed.

    Raises
    ------
    StoreError
        No store, a damaged one, or another format version.

    Examples
    --------
    >>> store = open_store("store")                             # doctest: +SKIP
    >>> nodules = store.manifest.query("is_nodule").index       # doctest: +SKIP
    >>> store.crops(nodules[:8]).shape                          # doctest: +SKIP
    (8, 32, 48, 48)
    """
    folder = store_folder(Path(path).absolute())  # what is opened stays the same wherever the program goes
    while True:
        recover_if_idle(folder)
        version = version_of(folder)
        try:
            store = _open(folder, version)
        except LunaprepError:
            if version == version_of(folder):
                raise
        else:
            if version == version_of(folder):
                return store


def store_folder(path: Path) -> Path:
    """The folder of a store that may be named by its crops.h5 or slabs.h5."""
    return path.parent if path.name in (schema.FRONT_DOOR_FILE, schema.SLAB_DOOR_FILE) else path


def _open(folder: Path, version: Version | None) -> "Store":
    record = read_record(folder)
    shards = tuple(_shard_file(folder, record, shard) for shard in record["shards"] if shard["file"])
    return Store(folder, record, shards, *_slab_files(folder, record), version=version)


def crop_centers(rows: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Voxel of each crop that holds its candidate's centre, (n, 3): slice, row, column of the crop.

    Parameters
    ----------
    rows : DataFrame
        Rows of `Store.manifest`.
    """
    names = ("index", "row", "col")
    plain = rows[list(names)].to_numpy() - rows[[f"start_{name}" for name in names]].to_numpy()
    own = rows.reindex(columns=[f"center_{name}" for name in names]).to_numpy(dtype=np.float64)
    return np.asarray(np.where(np.isnan(own), plain, np.rint(np.nan_to_num(own))), dtype=np.int64)


@dataclass(frozen=True)
class Store:
    """A store on disk. Use `open_store`."""

    path: Path
    record: dict[str, Any]
    shards: tuple[ShardFile, ...]
    """All shards that hold crops, in manifest order."""

    slab_shards: tuple[ShardFile, ...] = ()
    """All shards of slabs, in the order of `slabs`; none where the store was built without targets."""

    slab_mask_shards: tuple[ShardFile, ...] = ()
    """The masks of the same slabs, uint8, row by row alike."""

    version: Version | None = None
    """Which version of the files this is."""

    def __len__(self) -> int:
        return int(self.record["counts"]["crops"])

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters the store was built with."""
        return dict(self.record["parameters"])

    @property
    def crop_shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns of a crop."""
        slices, rows, cols = self.record["crops"]["shape"][1:]
        return slices, rows, cols

    @property
    def crop_spacing(self) -> tuple[float, float, float] | None:
        """Millimetres to a slice, row, column of every crop; None where a crop has its scan's spacing."""
        given = self.record["parameters"].get("resample_mm")
        return None if given is None else (float(given[0]), float(given[1]), float(given[2]))

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Type of the crops on disk."""
        dtype: np.dtype[Any] = np.dtype(self.record["crops"]["dtype"])
        return dtype

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """crops.parquet: a row per crop, columns as `schema.MANIFEST_COLUMNS`."""
        return self._manifest(None)

    def columns(self, *names: str) -> pd.DataFrame:
        """Some columns of `manifest`, texts as categories: a few bytes a row, where the whole takes hundreds.

        Raises
        ------
        StoreError
            The table is damaged.
        """
        return self._manifest(names)

    def rows(self, rows: npt.ArrayLike) -> pd.DataFrame:
        """Some rows of `manifest`, ascending, with their index; the others are not held."""
        return self._table(schema.MANIFEST_FILE, schema.MANIFEST_COLUMNS, rows=np.asarray(rows, dtype=np.int64))

    def _manifest(self, names: Sequence[str] | None) -> pd.DataFrame:
        frame = self._table(schema.MANIFEST_FILE, schema.MANIFEST_COLUMNS, names)
        if len(frame) != len(self):
            message = f"{schema.MANIFEST_FILE} has {len(frame)} rows, expected {len(self)}. Run 'lunaprep verify'"
            raise StoreError(message)
        return frame

    @cached_property
    def scans(self) -> pd.DataFrame:
        """scans.parquet: a row per scan, columns as `schema.SCAN_COLUMNS`."""
        return self._table(schema.SCANS_FILE, schema.SCAN_COLUMNS)

    @property
    def has_slabs(self) -> bool:
        """Whether the store was built with targets."""
        return "slabs" in self.record

    @property
    def slab_shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns of a slab."""
        return schema.SLAB_SHAPE

    @cached_property
    def slabs(self) -> pd.DataFrame:
        """slabs.parquet: a row per slab, columns as `schema.SLAB_COLUMNS`.

        Raises
        ------
        StoreError
            The store has none, or the table is damaged.
        """
        if not self.has_slabs:
            message = f"{self.path} has no slabs. Run 'lunaprep build' on it once more, without --no-targets"
            raise StoreError(message)
        frame = self._table(schema.SLABS_FILE, schema.SLAB_COLUMNS)
        expected = self.record["slabs"]["shape"][0]
        if len(frame) != expected:
            message = f"{schema.SLABS_FILE} has {len(frame)} rows, expected {expected}. Run 'lunaprep verify'"
            raise StoreError(message)
        return frame

    def crops(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]] | pd.Index) -> npt.NDArray[np.float32]:
        """Crops by row of the manifest.

        Parameters
        ----------
        rows : sequence of int
            Rows, in any order, also repeated.

        Returns
        -------
        ndarray, (n, slices, rows, columns) float32
            HU.

        Raises
        ------
        IndexError
            A row that is not there, or no row number at all.
        """
        given = np.asarray(rows).reshape(-1)
        if given.size and not np.issubdtype(given.dtype, np.integer):
            message = f"rows must be whole numbers, got {given.dtype}; for a mask, give np.flatnonzero(mask)"
            raise IndexError(message)
        wanted = given.astype(np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            message = f"rows must lie in 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}"
            raise IndexError(message)
        out = np.empty((len(wanted), *self.crop_shape), dtype=np.float32)
        owner = np.searchsorted(self._first_rows, wanted, side="right") - 1
        for number in np.unique(owner):
            at = np.flatnonzero(owner == number)
            crops = self._map(int(number))
            for position, row in zip(at, wanted[at] - self._first_rows[number], strict=True):
                out[position] = crops[row]
        return out

    @contextmanager
    def open_volume(self, series_uid: str) -> Iterator[Any]:
        """Open a scan's volume: its /hu as an h5py dataset, (slices, rows, columns) float32, HU.

        Raises
        ------
        StoreError
            The store has no volume of this series, or the file is not one.
        """
        with self._open_volume(series_uid) as (path, file, shape):
            yield _volume_dataset(path, file, schema.HU_DATASET, shape, "float32")

    def volume(self, series_uid: str) -> npt.NDArray[np.float32]:
        """A scan's whole volume, (slices, rows, columns) float32, HU.

        Raises
        ------
        StoreError
            As `open_volume`.
        """
        with self.open_volume(series_uid) as hu:
            return np.asarray(hu[...], dtype=np.float32)

    def has_masks(self, series_uid: str) -> bool:
        """Whether a scan's volume, which must be there, has masks."""
        with self._open_volume(series_uid) as (_, file, _):
            return all(name in file for name in _MASKS)

    @contextmanager
    def open_masks(self, series_uid: str) -> Iterator[tuple[Any, Any]]:
        """Open a scan's masks: nodules and lungs, h5py datasets (slices, rows, columns) uint8, 1 inside.

        Raises
        ------
        StoreError
            The store has no volume of this series, it has no masks, or the file is not one.
        """
        with self._open_volume(series_uid) as (path, file, shape):
            if any(name not in file for name in _MASKS):
                message = f"the store has no masks of series {series_uid}. Build it with targets and volumes"
                raise StoreError(message)
            nodules, lungs = (_volume_dataset(path, file, name, shape, "uint8") for name in _MASKS)
            yield nodules, lungs

    def masks(self, series_uid: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """A scan's nodule mask and lung mask, (slices, rows, columns) uint8, 1 inside.

        Raises
        ------
        StoreError
            As `open_masks`.
        """
        with self.open_masks(series_uid) as (nodules, lungs):
            return np.asarray(nodules[...]), np.asarray(lungs[...])

    @contextmanager
    def _open_volume(self, series_uid: str) -> Iterator[tuple[Path, Any, tuple[int, ...]]]:
        """Path, open file and shape of a scan's volume."""
        scans = self.scans[self.scans["series_uid"] == series_uid]
        if scans.empty or pd.isna(scans["volume_file"].iloc[0]):
            message = f"the store has no volume of series {series_uid}. Build it with volumes"
            raise StoreError(message)
        scan = scans.iloc[0]
        path = self._file(str(scan["volume_file"]))
        with open_h5(path) as file, explained(path):
            if self.is_replaced and not self._is_kept(scan):
                raise self._replaced()
            yield path, file, tuple(int(scan[name]) for name in ("num_slices", "num_rows", "num_cols"))

    @cached_property
    def _first_rows(self) -> npt.NDArray[np.int64]:
        """First manifest row of each shard."""
        return np.cumsum([0, *(shard.rows for shard in self.shards)], dtype=np.int64)[:-1]

    @cached_property
    def _maps(self) -> dict[int, npt.NDArray[Any]]:
        return {}

    def _map(self, number: int) -> npt.NDArray[Any]:
        if number not in self._maps:
            shard = self.shards[number]
            try:
                with shard.path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError as error:  # its name tells its content, so one that is there is the right one
                if self.is_replaced:
                    raise self._replaced() from error
                raise
            count = shard.rows * int(np.prod(self.crop_shape))
            flat = np.frombuffer(mapped, dtype=self.dtype, offset=shard.offset, count=count)
            self._maps[number] = flat.reshape(shard.rows, *self.crop_shape)
        return self._maps[number]

    def _file(self, name: str) -> Path:
        return inside(self.path, name)

    def _table(
        self,
        name: str,
        columns: Sequence[schema.Column],
        names: Sequence[str] | None = None,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> pd.DataFrame:
        try:
            frame = read_table(self._file(name), columns, names, rows)
        except StoreError as error:
            if self.is_replaced:
                raise self._replaced() from error
            raise
        if self.is_replaced:  # asked after it was opened: it may be the other store's
            raise self._replaced()
        return frame

    def _is_kept(self, scan: "pd.Series[Any]") -> bool:
        """Whether the store that replaced this one has the same volume of a scan."""
        scans = open_store(self.path).scans
        return scan["volume_sha256"] in set(scans["volume_sha256"][scans["series_uid"] == scan["series_uid"]])

    def _replaced(self) -> StoreError:
        return StoreError(f"{self.path}: a build has replaced this store since it was opened. Open it again")

    @property
    def is_replaced(self) -> bool:
        """Whether a build has made another store of it since it was opened."""
        return self.version is not None and version_of(self.path) != self.version


def _volume_dataset(path: Path, file: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    dataset = plain_dataset(path, file, name)
    if dataset.shape != shape or dataset.dtype != np.dtype(dtype).newbyteorder("<"):
        message = f"{path.name} holds {dataset.dtype} {dataset.shape}, expected {dtype} {shape}. {ADVICE}"
        raise StoreError(message)
    check_packing(path, dataset)
    return dataset


def _slab_files(folder: Path, record: dict[str, Any]) -> tuple[tuple[ShardFile, ...], tuple[ShardFile, ...]]:
    """Shards of the slabs and of their masks, each known to be laid out as the format says."""
    slabs: list[ShardFile] = []
    masks: list[ShardFile] = []
    for shard in record["slabs"]["shards"] if "slabs" in record else ():
        for key, dataset, dtype, files in (
            ("file", schema.SLABS_DATASET, record["slabs"]["dtype"], slabs),
            ("mask_file", schema.MASKS_DATASET, "uint8", masks),
        ):
            path = inside(folder, shard[key])
            check_shard(path, shard["rows"], schema.SLAB_SHAPE, dtype, dataset)
            files.append(ShardFile(shard["id"], path, schema.DATA_OFFSET, shard["rows"]))
    return tuple(slabs), tuple(masks)


def _shard_file(folder: Path, record: dict[str, Any], shard: dict[str, Any]) -> ShardFile:
    path = inside(folder, shard["file"])
    check_shard(path, shard["rows"], tuple(record["crops"]["shape"][1:]), record["crops"]["dtype"])
    return ShardFile(shard["id"], path, schema.DATA_OFFSET, shard["rows"])
