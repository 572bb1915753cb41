"""Slabs with their masks, in batches: a slab is a slice with its neighbours, what a segmentation network sees."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lunaprep.store.reader import Store
from lunatrain.data import CropLoader
from lunatrain.dense import read_slabs
from lunatrain.log import progress_bar
from lunatrain.mapping import CropMap
from lunatrain.sampling import Rows

MIN_EMPTY = 4
"""Slices without a nodule that are looked at of each held-out scan, at least."""

Planes = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SlabBatch:
    """Some slabs.

    Attributes
    ----------
    slabs : Tensor, (k, context, R, C), float32 or int16
        HU. On the CPU valid until the next batch is asked for.
    masks : Tensor, (k, R, C), uint8
        1 in a nodule, of the middle slice.
    rows : ndarray, (k,) int64
        Rows of slabs.parquet.
    """

    slabs: torch.Tensor
    masks: torch.Tensor
    rows: Rows


class SlabLoader:
    """Delivers the slabs and masks of given rows: two `CropLoader` side by side.

    Parameters
    ----------
    slabs, masks : CropMap
        Where they come from; of the same rows.
    batch_size : int
        Most rows of a batch.
    device : str or device
        Where batches go.
    """

    def __init__(self, slabs: CropMap, masks: CropMap, batch_size: int, device: str | torch.device = "cpu") -> None:
        self.batch_size = batch_size
        self._slabs = CropLoader(slabs, batch_size, device=device)
        self._masks = CropLoader(masks, batch_size, device=device)
        self._middle = slabs.crop_shape[0] // 2

    @property
    def wait_share(self) -> float:
        """Share of the loop's time that went into waiting for data, 0 to 1."""
        return min(1.0, self._slabs.wait_share + self._masks.wait_share)

    def batches(self, rows: Iterable[Rows]) -> Iterator[SlabBatch]:
        """A batch for each array of rows, in their order."""
        order = list(rows)  # two threads take from it
        pairs = zip(self._slabs.batches(iter(order)), self._masks.batches(iter(order)), strict=True)
        for slabs, masks in pairs:
            yield SlabBatch(slabs.crops[:, 0], masks.crops[:, 0, self._middle], slabs.rows)


@dataclass(frozen=True, eq=False)
class TrueSlice:
    """What is true of a slice: which pixels belong to which nodule.

    Attributes
    ----------
    places : ndarray, (v,) int64
        Pixels of the mask, as indices into the flattened slice.
    nodules : ndarray, (v,) int64
        Number of the nodule each belongs to, counted over all that is validated.
    caption : str
        Where the slice comes from.
    lungs : ndarray, uint8, optional
        Bits of the flattened lung mask (numpy's packbits): what the detector searches.
    """

    places: npt.NDArray[np.int64]
    nodules: npt.NDArray[np.int64]
    caption: str
    lungs: npt.NDArray[np.uint8] | None = None

    def searched(self, shape: Sequence[int]) -> Planes | None:
        """Where marks count, (R, C) bool; None for everywhere."""
        if self.lungs is None:
            return None
        rows, cols = shape
        return np.unpackbits(self.lungs, count=rows * cols).reshape(rows, cols).astype(np.bool_)


ValBatch = tuple[torch.Tensor, Sequence[TrueSlice]]
"""Slabs (k, context, R, C) float32 HU, and what is true of the middle slice of each."""


class ValSlices(Protocol):
    """What a segmentation is judged on."""

    def __len__(self) -> int:
        """Slices."""
        ...

    @property
    def num_nodules(self) -> int:
        """Nodules there are."""
        ...

    def batches(self) -> Iterator[ValBatch]:
        """All slices, the same in each epoch."""
        ...


@dataclass(frozen=True, eq=False)
class HeldOutSlabs:
    """Middle slices of slabs: where the store has no volumes.

    Attributes
    ----------
    loader : SlabLoader
        Delivers them.
    rows : ndarray, (n,) int64
        Rows to be judged on.
    nodules : ndarray, (number of rows of the table,) int64
        Number of each row's nodule.
    num_nodules : int
        Nodules there are.
    """

    loader: SlabLoader
    rows: Rows
    nodules: npt.NDArray[np.int64]
    num_nodules: int

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self) -> Iterator[ValBatch]:
        """All slabs, in their order."""
        size = self.loader.batch_size
        for batch in self.loader.batches(self.rows[at : at + size] for at in range(0, len(self.rows), size)):
            truths = []
            for row, mask in zip(batch.rows.tolist(), batch.masks.cpu().numpy(), strict=True):
                places = np.flatnonzero(mask)
                truths.append(TrueSlice(places, np.full(len(places), self.nodules[row]), f"slab {row}"))
            yield batch.slabs.float(), truths


def held_out_slabs(loader: SlabLoader, slabs: pd.DataFrame, rows: Rows) -> HeldOutSlabs:
    """Validation on slabs; each annotation is a nodule, and so is a mask that has none."""
    shows = rows[slabs["is_positive"].to_numpy(dtype=np.bool_)[rows]]
    names = slabs["annotation_id"].iloc[shows]
    known = names.notna().to_numpy()
    keys = np.where(known, names.fillna(0).to_numpy(dtype=np.int64), -1 - shows)
    nodules = np.zeros(len(slabs), dtype=np.int64)
    found, nodules[shows] = np.unique(keys, return_inverse=True)
    return HeldOutSlabs(loader, rows, nodules, len(found))


@dataclass(frozen=True, eq=False)
class _ScanSlices:
    """Slices of one scan, and what is true of each."""

    series_uid: str
    indices: npt.NDArray[np.int64]
    truths: tuple[TrueSlice, ...]


@dataclass(frozen=True, eq=False)
class HeldOutVolumes:
    """Whole slices of held-out scans. Use `held_out_volumes`."""

    store: Store
    scans: tuple[_ScanSlices, ...]
    num_nodules: int
    context: int
    batch_size: int

    def __len__(self) -> int:
        return sum(len(scan.indices) for scan in self.scans)

    def batches(self) -> Iterator[ValBatch]:
        """All slices, scan by scan."""
        whole, (low, high) = slice(None), self.store.parameters["hu"]
        for scan in self.scans:
            with self.store.open_volume(scan.series_uid) as hu:
                for at in range(0, len(scan.indices), self.batch_size):
                    part = slice(at, at + self.batch_size)
                    slabs = read_slabs(hu, scan.indices[part], self.context, whole, whole, (low, high))
                    yield slabs, scan.truths[part]


def held_out_volumes(
    store: Store,
    series_uids: Sequence[str],
    context: int,
    batch_size: int,
    max_slices: int = 0,
    *,
    show_progress: bool = False,
) -> HeldOutVolumes:
    """Choose slices of scans to validate on: each that shows a nodule, and half as many others, evenly spread.

    Parameters
    ----------
    store : Store
        With volumes and masks.
    series_uids : sequence of str
        Scans.
    context : int
        Slices of a slab.
    batch_size : int
        Most slices of a batch.
    max_slices : int
        Most slices in all, thinned evenly; 0 for no limit.
    show_progress : bool
        Whether to draw a bar.
    """
    scans, num_nodules = [], 0
    with progress_bar(len(series_uids), "held-out masks", "scan", show=show_progress) as bar:
        for series_uid in series_uids:
            nodules, lungs = store.masks(series_uid)
            scan, found = _true_slices(series_uid, nodules > 0, lungs > 0, num_nodules)
            scans.append(scan)
            num_nodules += found
            bar.update()
    total = sum(len(scan.indices) for scan in scans)
    if max_slices and total > max_slices:
        scans = [_thinned(scan, max_slices / total) for scan in scans]
        num_nodules = _renumber(scans)
    return HeldOutVolumes(store, tuple(scans), num_nodules, context, batch_size)


def _true_slices(series_uid: str, mask: Planes, lungs: Planes, first: int) -> tuple[_ScanSlices, int]:
    from scipy import ndimage

    has_lungs = bool(lungs.any())
    labels, found = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    shows = mask.any(axis=(1, 2))
    empty = np.flatnonzero(~shows)
    num_empty = min(len(empty), max(MIN_EMPTY, -(-int(shows.sum()) // 2)))
    spread = np.linspace(0, len(empty) - 1, num_empty).round().astype(np.int64)
    indices = np.sort(np.concatenate([np.flatnonzero(shows), empty[spread]]))
    truths = []
    for index in indices.tolist():
        places = np.flatnonzero(labels[index])
        nodules = labels[index].reshape(-1)[places].astype(np.int64) - 1 + first
        searched = np.packbits(lungs[index]) if has_lungs else None
        truths.append(TrueSlice(places, nodules, f"{series_uid[-12:]} slice {index}", searched))
    return _ScanSlices(series_uid, indices, tuple(truths)), int(found)


def _thinned(scan: _ScanSlices, share: float) -> _ScanSlices:
    count = max(1, int(len(scan.indices) * share))
    kept = np.linspace(0, len(scan.indices) - 1, count).round().astype(np.int64)
    return _ScanSlices(scan.series_uid, scan.indices[kept], tuple(scan.truths[k] for k in kept.tolist()))


def _renumber(scans: list[_ScanSlices]) -> int:
    """Number the nodules that are still shown from 0 on; the arrays are changed."""
    shown = [truth.nodules for scan in scans for truth in scan.truths]
    kept = np.unique(np.concatenate(shown)) if shown else np.empty(0, dtype=np.int64)
    for nodules in shown:
        nodules[:] = np.searchsorted(kept, nodules)
    return len(kept)


def open_slabs(store: Store, io: Any = "auto") -> tuple[CropMap, CropMap]:
    """Map the slabs of a store, and their masks."""
    shape = store.slab_shape
    slabs = CropMap(store.slab_shards, shape, np.dtype(store.record["slabs"]["dtype"]), io)
    return slabs, CropMap(store.slab_mask_shards, shape, np.dtype(np.uint8), io)
