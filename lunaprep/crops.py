"""Where a crop lies in its scan, and cutting it out of the slices at hand."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lunaprep.geometry import IntArray

Edge = Literal["shift", "pad"]
Shape = tuple[int, int, int]


def window_starts(center_irc: npt.ArrayLike, shape_irc: Shape, crop_shape: Shape, edge: Edge) -> IntArray:
    """First voxel (slice, row, column) of the crops around given centre voxels.

    Parameters
    ----------
    center_irc : array_like, (n, 3) int
        Centre voxels, array order.
    shape_irc : tuple of 3 int
        Slices, rows, columns of the scan.
    crop_shape : tuple of 3 int
        Slices, rows, columns of a crop.
    edge : {"shift", "pad"}
        ``shift`` moves a window that would stick out inwards, as the book does; along an axis on which the
        scan is shorter than the crop, the window is moved until it holds the whole scan. ``pad`` leaves it
        centred.

    Returns
    -------
    ndarray, (n, 3) int64
        Starts; negative where the crop begins before the scan.

    Examples
    --------
    >>> window_starts([[1, 5, 9]], (10, 10, 10), (4, 4, 4), "shift").tolist()
    [[0, 3, 6]]
    >>> window_starts([[1, 5, 9]], (10, 10, 10), (4, 4, 4), "pad").tolist()
    [[-1, 3, 7]]
    """
    size = np.array(crop_shape, dtype=np.int64)
    starts = np.asarray(center_irc, dtype=np.int64) - size // 2
    if edge == "pad":
        return starts
    room = np.array(shape_irc, dtype=np.int64) - size
    return np.asarray(np.clip(starts, np.minimum(0, room), np.maximum(0, room)))


def is_padded(starts: npt.ArrayLike, shape_irc: Shape, crop_shape: Shape) -> npt.NDArray[np.bool_]:
    """Whether part of each crop, (n,) bool, lies outside the scan."""
    first = np.asarray(starts)
    return np.asarray(((first < 0) | (first + np.array(crop_shape) > np.array(shape_irc))).any(axis=-1))


def cut_crop(
    slices: npt.NDArray[Any],
    first_slice: int,
    start_irc: tuple[int, int, int],
    out: npt.NDArray[Any],
    fill: float,
) -> None:
    """Copy one crop out of consecutive slices of a scan.

    Parameters
    ----------
    slices : ndarray, (k, rows, columns)
        Consecutive slices; all slices of the scan that the crop meets must be among them.
    first_slice : int
        Number of ``slices[0]`` in the scan.
    start_irc : tuple of 3 int
        First voxel of the crop in the scan; negative where it sticks out.
    out : ndarray, (slices, rows, columns) of the crop
        Where the crop goes, converted to its dtype.
    fill : float
        Value outside the scan, HU.
    """
    begin = (start_irc[0] - first_slice, start_irc[1], start_irc[2])
    source, target = [], []
    for at, size, limit in zip(begin, out.shape, slices.shape, strict=True):
        low, high = max(at, 0), min(at + size, limit)
        source.append(slice(low, high))
        target.append(slice(low - at, high - at))
    block = slices[tuple(source)]
    if block.shape != out.shape:
        out.fill(fill)
    out[tuple(target)] = block
