"""Slices with a box around the lungs: small windowed pictures, all in memory, so that an epoch reads nothing.

Of a store the box is that of the slice's lung mask. Every few millimetres one slice is taken: neighbours show the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import interpolate

from lunaprep.store.reader import Store
from lunatrain.boxes import Floats, around, outline_of
from lunatrain.dense import HU_WINDOW
from lunatrain.errors import UsageError
from lunatrain.overlays import LUNG_WINDOW
from lunatrain.sampling import Rows

MIN_LUNG_MM2 = 100.0
"""Slices that show less lung than this, a square centimetre, count as without."""
LAYER = 8
"""Slices read together: a layer of a volume's chunks."""
BRIGHT = 255
PREDICT_BATCH = 64

Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class BoxSlices:
    """Pictures and what is known of each.

    Attributes
    ----------
    pictures : ndarray, (n, side, side) uint8
        Slices in the lung window; see `picture_of`.
    outlines : ndarray, (n, k, 2) float32
        Points around the lungs, fractions of columns and rows; see `lunatrain.boxes.outline_of`.
    table : DataFrame
        `name` (for people and for CSV files) and, for splits, `series_uid`, `split_series` and `fold`.
    num_without : int
        Slices that were left out because they show no lung.
    data_id : str
        Tells data apart: a store's id.
    """

    pictures: Pictures
    outlines: npt.NDArray[np.float32]
    table: pd.DataFrame
    num_without: int
    data_id: str

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def boxes(self) -> Floats:
        """x0, y0, x1, y1, fractions, (n, 4)."""
        return around(self.outlines)


@dataclass(frozen=True, eq=False)
class BoxBatch:
    """Some slices: pictures (k, 1, S, S) float32 0 to 1, outlines (k, points, 2) and their rows."""

    pictures: torch.Tensor
    outlines: torch.Tensor
    rows: Rows


@dataclass(frozen=True, eq=False)
class BoxLoader:
    """Batches of slices that are in memory."""

    slices: BoxSlices
    device: torch.device
    wait_share = 0.0

    def batches(self, rows: Iterable[Rows]) -> Iterator[BoxBatch]:
        """A batch for each array of rows, in their order."""
        for chosen in rows:
            pictures = to_tensor(self.slices.pictures[chosen], self.device)
            yield BoxBatch(pictures, torch.from_numpy(self.slices.outlines[chosen]).to(self.device), chosen)


def picture_of(hu: npt.NDArray[Any], side: int) -> Pictures:
    """Slices as the networks see them.

    Parameters
    ----------
    hu : ndarray, (k, R, C)
        HU. As in a store, nothing is below -1000.
    side : int
        Rows and columns of the pictures; what is larger is averaged.

    Returns
    -------
    ndarray, (k, side, side) uint8
        Centre -600, width 1500: 0 is -1350 HU and less, 255 is 150 HU and more.
    """
    low, high = LUNG_WINDOW
    level = (torch.from_numpy(np.asarray(hu, dtype=np.float32)[:, None]).clamp(*HU_WINDOW) - low) / (high - low)
    small = interpolate(level.clamp_(0, 1), (side, side), mode="bilinear", align_corners=False, antialias=True)
    return np.asarray((small[:, 0] * BRIGHT).round_().to(torch.uint8).numpy())


def to_tensor(pictures: Pictures, device: torch.device | str) -> torch.Tensor:
    """Pictures (k, S, S) uint8 as a network takes them, (k, 1, S, S) float32, 0 to 1."""
    return torch.from_numpy(pictures)[:, None].to(device).float() / BRIGHT


@torch.inference_mode()
def predict_boxes(
    model: nn.Module,
    pictures: Pictures,
    device: torch.device,
    amp: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Floats:
    """Boxes that a network gives for pictures (n, side, side), in their order, (n, 4) float64."""
    model.eval()
    parts = []
    for start in range(0, len(pictures), PREDICT_BATCH):
        batch = to_tensor(pictures[start : start + PREDICT_BATCH], device)
        with amp():
            parts.append(model(batch.contiguous(memory_format=torch.channels_last)).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.empty((0, 4))


def chosen_slices(num_slices: int, gap_mm: float, slice_mm: float) -> Rows:
    """Slices about `slice_mm` apart, from the middle of the first stretch on.

    >>> chosen_slices(10, 1.25, 5.0).tolist()
    [2, 6]
    """
    step = max(1, round(slice_mm / gap_mm))
    return np.arange(min(step // 2, num_slices - 1), num_slices, step, dtype=np.int64)


def read_store_slices(
    store: Store, side: int, slice_mm: float, progress: Callable[[str], object] = lambda text: None
) -> BoxSlices:
    """Slices of a store's volumes, with the outlines of their lung masks.

    Parameters
    ----------
    store : Store
        With volumes and masks.
    side : int
        Rows and columns of a picture.
    slice_mm : float
        How far apart the slices are.
    progress : callable
        Told now and then how far it is.

    Raises
    ------
    UsageError
        No volume shows a lung.
    StoreError
        A volume without masks.
    """
    scans = store.scans[store.scans["volume_file"].notna()]
    parts: list[tuple[Pictures, npt.NDArray[np.float32]]] = []
    names: list[tuple[str, int]] = []
    total = 0
    for number, scan in enumerate(scans.to_dict("records")):
        wanted = chosen_slices(scan["num_slices"], float(scan["spacing"][2]), slice_mm)
        total += len(wanted)
        for found, picture, outline in _read_scan(store, scan, wanted, side):
            parts.append((picture, outline))
            names += [(scan["series_uid"], index) for index in found]
        progress(f"slices of scan {number + 1} of {len(scans)}")
    if not names:
        message = f"{store.path} has no volume that shows a lung. Build it with targets and volumes, from chest scans"
        raise UsageError(message)
    table = pd.DataFrame(names, columns=["series_uid", "index"])
    table["name"] = table["series_uid"] + " slice " + table["index"].astype(str)
    return BoxSlices(
        np.concatenate([picture for picture, _ in parts]),
        np.concatenate([outline for _, outline in parts]),
        _with_split(table, store),
        total - len(names),
        str(store.record["store_id"]),
    )


def _read_scan(
    store: Store, scan: dict[Any, Any], wanted: Rows, side: int
) -> Iterator[tuple[list[int], Pictures, npt.NDArray[np.float32]]]:
    """Of one scan layer by layer: slices that show lungs, their pictures and outlines."""
    box = scan["lung_box"]
    if box is None or not len(box):
        return
    pixel_mm2 = float(scan["spacing"][0] * scan["spacing"][1])
    wanted = wanted[(wanted >= box[0]) & (wanted < box[3])]
    with store.open_volume(scan["series_uid"]) as hu, store.open_masks(scan["series_uid"]) as (_, lungs):
        for layer in np.unique(wanted // LAYER).tolist():
            here = wanted[wanted // LAYER == layer]
            span = slice(int(here[0]), int(here[-1]) + 1)
            masks = np.asarray(lungs[span])[here - here[0]] > 0
            shows = masks.sum(axis=(1, 2)) * pixel_mm2 >= MIN_LUNG_MM2
            if shows.any():
                planes = np.asarray(hu[span])[here - here[0]][shows]
                outlines = np.stack([outline_of(mask) for mask in masks[shows]]).astype(np.float32)
                yield here[shows].tolist(), picture_of(planes, side), outlines


def _with_split(table: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Each slice with its scan's part and fold; without a candidate a scan has its patient's part, else 'train'."""
    known = store.columns("series_uid", "split_series", "fold").drop_duplicates("series_uid").astype(object)
    known = known.set_index("series_uid")
    scans = store.scans.set_index("series_uid")
    uids, patients = table["series_uid"], scans["patient_id"]
    of_patient = known["split_series"].groupby(patients.reindex(known.index)).first()
    part = uids.map(known["split_series"]).fillna(uids.map(patients).map(of_patient)).fillna("train")
    return table.assign(split_series=part, fold=uids.map(known["fold"]).fillna(uids.map(scans["subset"])))
