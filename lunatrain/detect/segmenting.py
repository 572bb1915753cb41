"""Which voxels look like a nodule: the lungs found, and the segmentation network run where they are, no further.

What bounds the memory: a scan is int16; floats exist of one batch at a time, `BATCH_PIXELS` of it; probabilities are
float16 of the lungs' box alone. What bounds the time: each batch is cut to the lungs in its slices and a halo, about
a third of a scan's pixels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lunaprep.errors import ScanError
from lunatrain.dense import HU_WINDOW, channels_of, read_slabs, window_of
from lunatrain.detect.grouping import Triple, near
from lunatrain.detect.reading import AnyScan
from lunatrain.errors import UsageError

BATCH_PIXELS = 1 << 18
"""Pixels a network sees in one go: 18 MB a 16-channel layer."""

BATCH_SLICES = 16
ALIGN_PX = 16
"""Sides of what the network gets are multiples of this: few different shapes, and its own grid, see `_cut`."""

LUNG_MARGIN_MM = 6.0
"""How far beyond the lung mask candidates may lie: nodules on the wall belong to no lung mask."""

MIN_LUNG_ML = 5.0
PARTIAL_LUNG_ML = 1000.0


@dataclass(frozen=True)
class _Grid:
    """How many pixels away a network looks, and the multiple that its pooling wants sides to be of."""

    reach: int
    multiple: int


FindLungs = Callable[[npt.NDArray[Any], tuple[float, float, float]], npt.NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Lungs:
    """The box of a scan that is searched, and within it what is near a lung.

    Attributes
    ----------
    start_irc : tuple of 3 int
        First voxel of the box.
    near : ndarray of bool
        Lung and margin, as large as the box.
    volume_ml : float
        Of the lungs, without margin.
    notes : tuple of str
    """

    start_irc: tuple[int, int, int]
    near: npt.NDArray[np.bool_]
    volume_ml: float
    notes: tuple[str, ...]

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The box as an index into the scan."""
        i, r, c = (slice(at, at + size) for at, size in zip(self.start_irc, self.near.shape, strict=True))
        return i, r, c


def find_lungs(scan: AnyScan, hu: npt.NDArray[np.int16], find: FindLungs, margin_mm: float = LUNG_MARGIN_MM) -> Lungs:
    """Find the lungs, and refuse a scan that shows none.

    Parameters
    ----------
    scan : Scan or DicomScan
        For its grid, and its name in errors.
    hu : ndarray, (slices, rows, columns)
    find : callable
        `lunaprep.lungs.lung_mask`.
    margin_mm : float
        What is added to the lungs on each side.

    Raises
    ------
    ScanError
        No lungs.
    """
    mask = find(hu, scan.geometry.spacing)
    steps = scan.geometry.spacing_irc
    volume_ml = float(np.count_nonzero(mask)) * float(np.prod(steps)) / 1000.0
    expected = "expected a CT of the chest"
    if volume_ml < MIN_LUNG_ML:
        got = "no lungs" if not volume_ml else f"only {volume_ml:.3g} ml of lung"
        text = f"{scan.path.name}: {got} found, {expected} with {MIN_LUNG_ML:g} ml of lung or more; check the body part"
        raise ScanError(text)
    start, stop = _bounds(mask, margin_mm, steps)
    box = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
    notes: tuple[str, ...] = ()
    if volume_ml < PARTIAL_LUNG_ML:
        notes = (f"the scan shows {volume_ml:.0f} ml of lung: a part of the lungs, or very small ones",)
    i, r, c = start
    return Lungs((i, r, c), near(mask[box], margin_mm, steps), volume_ml, notes)


@torch.inference_mode()
def segment(
    model: nn.Module,
    hu: npt.NDArray[np.int16],
    lungs: Lungs,
    progress: Callable[[int], object] | None = None,
) -> npt.NDArray[np.float16]:
    """Probability of each voxel of the lungs' box; 0 away from the lungs.

    Parameters
    ----------
    model : Module
        Takes HU, (n, `in_channels`, rows, columns) float32, the slices around each one asked about; gives logits,
        (n, 1, rows, columns). `reach` is how many pixels away it looks, `multiple` the grid it pools on: so many
        pixels around the lungs are shown to it, and the result is that of whole slices. `hu_window`, if it has one, is
        what HU are clipped to. On any device.
    hu : ndarray, (slices, rows, columns)
        The whole scan. Beyond its ends the last slice is repeated, as in the book.
    lungs : Lungs
    progress : callable, optional
        Called with slices done since the last call.

    Returns
    -------
    ndarray, float16, as large as the box

    Raises
    ------
    UsageError
        The model has learnt HU that the detector does not keep.
    """
    check_window(model)
    model.eval()
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    probability = np.zeros(lungs.near.shape, dtype=np.float16)
    done = 0
    grid = _Grid(int(model.reach), int(model.multiple))  # type: ignore[arg-type]
    for at, (rows, columns) in _batches(lungs, hu.shape, grid):
        start = lungs.start_irc
        slices = np.arange(at.start, at.stop) + start[0]
        batch = read_slabs(hu, slices, channels_of(model), rows, columns, window_of(model)).to(device)
        logits = model(batch)[:, 0]
        values = torch.sigmoid(logits.float()).to(torch.float16).cpu().numpy()
        r, c = _overlap(rows, start[1], lungs.near.shape[1]), _overlap(columns, start[2], lungs.near.shape[2])
        part = values[:, r.start + start[1] - rows.start : r.stop + start[1] - rows.start,
                      c.start + start[2] - columns.start : c.stop + start[2] - columns.start]  # fmt: skip
        inside = lungs.near[at, r, c]
        np.multiply(part, inside, out=probability[at, r, c])
        if progress:
            progress(at.stop - done)
        done = at.stop
    if progress and len(probability) > done:
        progress(len(probability) - done)
    return probability


def check_window(model: nn.Module, name: str = "the segmentation") -> None:
    """Refuse a network that has learnt HU which the detector does not keep.

    Raises
    ------
    UsageError
        It has.
    """
    (low, high), (lowest, highest) = window_of(model), HU_WINDOW
    if low < lowest or high > highest:
        message = (
            f"{name} was trained on HU {low:g} to {high:g}, the detector keeps {lowest} to {highest} only. "
            f"Train it on a store built with --hu {lowest} {highest}, or a narrower window"
        )
        raise UsageError(message)


def _bounds(mask: npt.NDArray[Any], margin_mm: float, steps: Triple) -> tuple[list[int], list[int]]:
    """First and last plus one voxel of a mask and its margin, along each axis, within the scan."""
    start, stop = [], []
    for axis, step in enumerate(steps):
        others = tuple(k for k in range(3) if k != axis)
        there = np.flatnonzero(mask.any(axis=others))
        grow = int(np.ceil(margin_mm / step - 1e-9))
        start.append(max(0, int(there[0]) - grow))
        stop.append(min(mask.shape[axis], int(there[-1]) + 1 + grow))
    return start, stop


def _batches(lungs: Lungs, shape: tuple[int, ...], grid: _Grid) -> Iterator[tuple[slice, tuple[slice, slice]]]:
    """Slices of the box that go together, and the rows and columns of the scan they are cut to."""
    rows_used, cols_used = np.asarray(lungs.near.any(axis=2)), np.asarray(lungs.near.any(axis=1))
    first = 0
    while first < len(rows_used):
        last = first + BATCH_SLICES
        while True:
            window = [
                _cut(used[first:last].any(axis=0), lungs.start_irc[axis], shape[axis], grid)
                for axis, used in ((1, rows_used), (2, cols_used))
            ]
            pixels = (window[0].stop - window[0].start) * (window[1].stop - window[1].start)
            number = min(last, len(rows_used)) - first
            if number * pixels <= BATCH_PIXELS or number == 1:
                break
            last = first + max(1, min(number - 1, BATCH_PIXELS // pixels))
        if pixels:
            yield slice(first, first + number), (window[0], window[1])
        first += number


def _cut(used: npt.NDArray[np.bool_] | np.bool_, start: int, size: int, grid: _Grid) -> slice:
    """The part of an axis that a batch needs, with a halo, aligned, within the scan; empty where nothing is used."""
    there = np.flatnonzero(used)
    if not there.size:
        return slice(0, 0)
    step = math.lcm(ALIGN_PX, grid.multiple)
    low = (start + int(there[0]) - grid.reach) // step * step
    high = -(-(start + int(there[-1]) + 1 + grid.reach) // step) * step
    return slice(max(0, low), min(size, high))


def _overlap(cut: slice, start: int, size: int) -> slice:
    """The part of the box that a cut of the scan covers, in the box's numbers."""
    return slice(max(0, cut.start - start), min(size, cut.stop - start))
