"""A probability for each voxel of a volume, from a network that sees a slice with its neighbours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lunatrain.errors import UsageError

HU_WINDOW = (-1000, 1000)
"""HU that volumes are clipped to, as the book's, and a store's by default."""
BATCH = 4

Window = tuple[float, float]
Box = tuple[Sequence[int], Sequence[int]]
"""First and past-the-last slice, row and column."""


def context_slices(indices: npt.ArrayLike, num_slices: int, context: int) -> npt.NDArray[np.int64]:
    """Slices around each of the given ones, (k, context): beyond an end lies the last slice.

    >>> context_slices([0, 5], num_slices=6, context=3).tolist()
    [[0, 0, 1], [4, 5, 5]]
    """
    around = np.arange(context) - context // 2
    wanted = np.asarray(indices, dtype=np.int64)[:, None] + around
    return wanted.clip(0, num_slices - 1)


def read_slabs(
    hu: Any, indices: npt.ArrayLike, context: int, rows: slice, cols: slice, window: Window = HU_WINDOW
) -> torch.Tensor:
    """Slices with their neighbours, (k, context, rows, columns) float32, HU, clipped; channels last.

    Parameters
    ----------
    hu : ndarray or h5py dataset, (I, R, C)
        HU. Each slice is read once.
    indices : array_like of int, (k,)
        Middle slices.
    window : tuple of 2 float
        HU they are clipped to.
    """
    wanted = context_slices(indices, hu.shape[0], context)
    needed, position = np.unique(wanted, return_inverse=True)
    planes = np.stack([hu[index, rows, cols] for index in needed.tolist()])
    block = torch.from_numpy(planes).float().clamp_(*window)
    return block[torch.from_numpy(position.reshape(wanted.shape))].contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def predict_volume(
    model: nn.Module,
    hu_volume: Any,
    device: str | torch.device,
    *,
    slices: npt.ArrayLike | None = None,
    box: Box | None = None,
    batch: int = BATCH,
    amp: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> npt.NDArray[np.float32]:
    """Probability of each voxel to belong to a nodule.

    Parameters
    ----------
    model : Module
        One class, slices of context as channels: `lunatrain.segmentation.load_segmenter`. Put into evaluation mode.
    hu_volume : ndarray or h5py dataset, (I, R, C), any number type
        HU; clipped here to the window of the model. Only the slices of a batch are held as float32.
    device : str or device
        Where the model is.
    slices : array_like of int, optional
        Slices wanted; default those of the box, or all.
    box : (start_irc, stop_irc), optional
        Part wanted, as `lung_box` gives it. Rows and columns of it are widened by what the network sees around a
        pixel, so that inside it the result is that of whole slices.
    batch : int
        Slices at a time: the memory needed on top of the result is some 250 MB a slice of 512×512.

    Returns
    -------
    ndarray, (I, R, C) float32
        0 where nothing was asked for.

    Raises
    ------
    UsageError
        No volume, or slices outside of it.
    """
    shape = tuple(hu_volume.shape)
    if len(shape) != 3 or min(shape) < 1:
        message = f"a volume has slices, rows and columns, got an array of shape {shape}"
        raise UsageError(message)
    wanted = _wanted_slices(slices, box, shape[0])
    inner, outer = _windows(model, box, shape)
    model.eval()
    context, window, (rows, cols) = channels_of(model), window_of(model), outer
    probability = np.zeros(shape, dtype=np.float32)
    (row, col), (num_rows, num_cols) = (inner[k].start - outer[k].start for k in (0, 1)), (_length(s) for s in inner)
    for chosen in _in_batches(wanted, batch):
        slabs = read_slabs(hu_volume, chosen, context, rows, cols, window).to(device)
        with amp():
            logits = model(slabs)
        found = torch.sigmoid(logits[:, 0, row : row + num_rows, col : col + num_cols].float()).cpu().numpy()
        probability[chosen, inner[0], inner[1]] = found
    return probability


def channels_of(model: nn.Module) -> int:
    """Slices of context a network takes."""
    return int(model.in_channels)  # type: ignore[arg-type]


def window_of(model: nn.Module) -> Window:
    """HU that a network has learnt to be clipped to: its `hu_window`, if it says."""
    low, high = getattr(model, "hu_window", HU_WINDOW)
    return float(low), float(high)


def _wanted_slices(slices: npt.ArrayLike | None, box: Box | None, num_slices: int) -> npt.NDArray[np.int64]:
    if slices is None:
        first, stop = (int(box[0][0]), int(box[1][0])) if box is not None else (0, num_slices)
        return np.arange(max(first, 0), min(stop, num_slices), dtype=np.int64)
    wanted = np.unique(np.asarray(slices, dtype=np.int64))
    if len(wanted) and (wanted[0] < 0 or wanted[-1] >= num_slices):
        message = f"slices must lie in 0 to {num_slices - 1}, got {wanted[0]} to {wanted[-1]}"
        raise UsageError(message)
    return wanted


def _windows(model: nn.Module, box: Box | None, shape: tuple[int, ...]) -> tuple[list[slice], list[slice]]:
    """Rows and columns that are wanted, and those the network is given: on its own grid, with what it sees around."""
    reach, multiple = int(model.reach), int(model.multiple)  # type: ignore[arg-type]
    inner, outer = [], []
    for axis in (1, 2):
        first, stop = (int(box[0][axis]), int(box[1][axis])) if box is not None else (0, shape[axis])
        first, stop = max(first, 0), min(stop, shape[axis])
        if stop <= first:
            message = (
                f"the box's axis {axis} goes from {first} to {stop}, the volume's to {shape[axis]}: nothing is left"
            )
            raise UsageError(message)
        inner.append(slice(first, stop))
        start = max(first - reach, 0)
        outer.append(slice(start - start % multiple, min(stop + reach, shape[axis])))
    return inner, outer


def _in_batches(indices: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _length(part: slice) -> int:
    return int(part.stop - part.start)
