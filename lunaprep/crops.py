"""Where a crop lies in its scan, and cutting it out of the slices at hand: voxel by voxel, or resampled.

A resampled crop has a spacing of its own along the scan's axes. A *step* is what one of its voxels measures in voxels
of the scan; places are continuous array indices of the scan (slice, row, column).
"""

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lunaprep.geometry import FloatArray, IntArray

Edge = Literal["shift", "pad"]
Shape = tuple[int, int, int]
Triple = tuple[float, float, float]

PLACE_GRAIN = 2.0**-20
"""Voxels; places of resampled crops are rounded to it, so that they don't hang on the last bit of a matrix inverse."""


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


def step_of(resample_mm: Triple, spacing_irc: Triple) -> Triple:
    """Voxels of the scan to one of a resampled crop, along slice, row, column.

    >>> step_of((1.0, 1.0, 1.0), (2.5, 0.5, 0.5))
    (0.4, 2.0, 2.0)
    """
    i, r, c = (mm / spacing for mm, spacing in zip(resample_mm, spacing_irc, strict=True))
    return i, r, c


def sample_starts(
    center_irc: npt.ArrayLike, shape_irc: Shape, crop_shape: Shape, step_irc: Triple, edge: Edge
) -> FloatArray:
    """Place of the first voxel of the resampled crops around given centres.

    Parameters
    ----------
    center_irc : array_like, (n, 3) float
        Centres, as `lunaprep.geometry.Geometry.xyz_to_irc` gives them; not rounded.
    shape_irc, crop_shape : tuple of 3 int
        Slices, rows, columns of the scan and of a crop.
    step_irc : tuple of 3 float
        See `step_of`.
    edge : {"shift", "pad"}
        As in `window_starts`; what must not stick out are whole voxels, the crop's out of the scan's.

    Returns
    -------
    ndarray, (n, 3) float64
        Multiples of `PLACE_GRAIN`. The centre is voxel ``side // 2`` of a crop that was not moved.

    Examples
    --------
    >>> sample_starts([[1.0, 5.5, 9.0]], (10, 10, 10), (4, 4, 4), (1.0, 1.0, 0.5), "shift").tolist()
    [[0.0, 3.5, 7.75]]
    """
    sides, step, length = (np.array(values, dtype=np.float64) for values in (crop_shape, step_irc, shape_irc))
    starts = np.asarray(center_irc, dtype=np.float64) - (sides // 2) * step
    if edge == "shift":
        first, last = (step - 1) / 2, length - (sides - 0.5) * step - 0.5
        starts = np.clip(starts, np.minimum(first, last), np.maximum(first, last))
    return np.asarray(np.rint(starts / PLACE_GRAIN) * PLACE_GRAIN)


def samples_inside(start: float, step: float, side: int, length: int) -> tuple[int, int]:
    """First sample of a row that lies in a scan of `length` voxels, and the one behind the last.

    A voxel reaches half its width beyond its middle, so inside is from -0.5 to length - 0.5.

    >>> samples_inside(-1.0, 0.5, 8, 10), samples_inside(8.0, 0.5, 8, 10)
    ((1, 8), (0, 4))
    """
    first, stop = math.ceil((-0.5 - start) / step), math.floor((length - 0.5 - start) / step) + 1
    return min(max(first, 0), side), min(max(stop, 0), side)


def is_sample_padded(starts: FloatArray, shape_irc: Shape, crop_shape: Shape, step_irc: Triple) -> Any:
    """Whether some voxels of each resampled crop, (n,) bool, lie outside the scan."""
    axes = [
        [samples_inside(float(start), step, side, length) != (0, side) for start in starts[:, axis]]
        for axis, (length, side, step) in enumerate(zip(shape_irc, crop_shape, step_irc, strict=True))
    ]
    return np.array(axes, dtype=bool).reshape(3, len(starts)).any(axis=0)


def needed_voxels(start: float, step: float, side: int, length: int) -> tuple[int, int]:
    """First voxel of a scan, along one axis, that a row of samples is made from, and the one behind the last."""
    first, last = math.floor(start), math.floor(start + (side - 1) * step) + 1
    return min(max(first, 0), length - 1), min(max(last, 0), length - 1) + 1


def resample_crop(
    slices: npt.NDArray[Any],
    first_slice: int,
    num_slices: int,
    start_irc: Triple,
    step_irc: Triple,
    out: npt.NDArray[np.float32],
    fill: float,
) -> None:
    """Sample one crop from consecutive slices of a scan, trilinearly.

    Parameters
    ----------
    slices : ndarray, (k, rows, columns)
        Consecutive slices; all slices of the scan that `needed_voxels` names must be among them.
    first_slice, num_slices : int
        Number of ``slices[0]`` in the scan, and slices of the whole scan.
    start_irc, step_irc : tuple of 3 float
        Place of the crop's first voxel, as `sample_starts` gives it; see `step_of`.
    out : ndarray, (slices, rows, columns) of the crop, float32
        Where the crop goes.
    fill : float
        Value outside the scan, HU. In the outer half of its border voxels the scan goes on as they are.
    """
    from scipy import ndimage

    lengths = (num_slices, *slices.shape[1:])
    source, target, offset = [], [], []
    for axis, (start, step, side, length) in enumerate(zip(start_irc, step_irc, out.shape, lengths, strict=True)):
        first, stop = samples_inside(start, step, side, length)
        low, high = needed_voxels(start, step, side, length)
        target.append(slice(first, stop))
        source.append(slice(low, high) if axis else slice(low - first_slice, high - first_slice))
        offset.append(start + first * step - low)
    inside = out[tuple(target)]
    if inside.shape != out.shape:
        out.fill(fill)
    if inside.size:
        inside[...] = ndimage.affine_transform(
            slices[tuple(source)],
            np.array(step_irc),
            offset=offset,
            output_shape=inside.shape,
            output=np.float32,
            order=1,
            mode="nearest",
            prefilter=False,
        )
