"""The lungs of a chest CT: found on a coarse grid that fills while the slices stream by, given back on the scan's own.

Classical steps: air by a threshold, without the air around the body, the one or two largest pieces that can be
lungs, closed so that what grows from the chest wall into the lung (a juxtapleural nodule) and the vessels lie inside.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Box = tuple[tuple[int, int, int], tuple[int, int, int]]
Span = tuple[slice, ...]

AIR_HU = -450
"""Lung lies about -850 HU, soft tissue about 0; half-way is the usual threshold (-400 to -500)."""

FLOOR_HU, CEILING_HU = -1024, 400
"""Padding of -2000 or -3024 counts as air, metal as bone: neither may weigh on the mean of a block."""

COARSE_MM = 3.0
"""Largest side of a block of the coarse grid, unless one voxel is larger."""

MIN_SECTION_MM2 = 1000.0
"""Least mean cross-section of a lung: a tenth of a small adult's, several times that of a trachea."""

FULL_DEPTH_MM = 120.0
"""A lung counts as this deep at least, where the scan is: bowel and stomach gas are smaller than such a body."""

MIN_PART = 0.1
"""Least volume of the second lung, as a share of the first."""

LUNG_HU = (-985.0, -500.0)
"""Where the median of a lung lies; gas in bowels, around the body or in a phantom's hole lies at -1000."""

AIRWAY_MM = 9.0
"""Radius of what the cut takes off: a trachea is at most 25 mm wide, and looks like a lung with too little around."""

TONGUE_MM = 3 * AIRWAY_MM
"""How far from where such a ball fits a lung may reach, on ways inside it: its edges do, a trachea is farther."""

MAX_HOLE_MM2 = 1500.0
"""Largest hole filled in one slice: a nodule or vessel of 44 mm, never the heart where both lungs meet around it."""

CLOSING_MM = 10.0
"""Radius of the closing: a dent of up to 20 mm in the wall is taken for a nodule's."""

MOST_BLOCK = 30
"""Voxels of a block along an axis: the sum of a column of them must fit into int16."""

WORK_BYTES = 24
"""A coarse voxel's sum, mean, two labels and a few masks."""

STEPS = 16
"""Weights of the interpolation are whole sixteenths, so that it runs in int16."""


@dataclass(frozen=True)
class Lungs:
    """The lungs on the coarse grid of blocks of `block_irc` voxels; `slices` gives them on the scan's grid."""

    coarse: Mask
    block_irc: tuple[int, int, int]
    shape_irc: tuple[int, int, int]

    def slices(self, first: int, stop: int) -> npt.NDArray[np.uint8]:
        """Slices `first` to `stop` of the mask, (k, rows, columns) uint8: linear between the blocks' centres."""
        out = np.zeros((stop - first, *self.shape_irc[1:]), dtype=np.uint8)
        (i, wi), (r, wr), (c, wc) = self._nodes
        rows, cols = self._extent
        for k in range(first, stop):
            near, far = self.coarse[i[k]], self.coarse[min(i[k] + 1, len(self.coarse) - 1)]
            if not (near.any() or far.any()):
                continue
            plane = near * np.int16(STEPS - wi[k]) + far * wi[k]
            for axis, at, share in ((1, c[cols], wc[cols]), (0, r[rows], wr[rows])):
                after = np.minimum(at + 1, plane.shape[axis] - 1)
                weight = share if axis else share[:, None]
                plane = plane.take(at, axis) * (STEPS - weight) + plane.take(after, axis) * weight
            np.greater(plane, STEPS**3 // 2, out=out[k - first, rows, cols].view(np.bool_))
        return out

    @cached_property
    def _nodes(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int16]]]:
        sides = zip(self.shape_irc, self.block_irc, self.coarse.shape, strict=True)
        return [_nodes(n, block, most) for n, block, most in sides]

    @cached_property
    def _extent(self) -> tuple[slice, slice]:
        """Rows and columns of the scan that hold all of the mask."""
        spans = []
        for axis in (1, 2):
            held = np.flatnonzero(self.coarse.any(axis=(0, 3 - axis)))
            low, high = (held[0] - 1, held[-1] + 2) if len(held) else (0, 0)
            spans.append(slice(max(0, int(low) * self.block_irc[axis]), int(high) * self.block_irc[axis]))
        return spans[0], spans[1]


def _nodes(length: int, block: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int16]]:
    """For each voxel along an axis: the block centre before it, and the weight of the one behind, in `STEPS`."""
    at = np.clip((np.arange(length) + 0.5) / block - 0.5, 0, count - 1)
    node = np.floor(at).astype(np.int64)
    return node, np.rint((at - node) * STEPS).astype(np.int16)


def _block_of(shape_irc: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[int, int, int]:
    """Voxels of a block of the coarse grid along slice, row, column."""
    i, r, c = (max(1, min(int(COARSE_MM / mm), MOST_BLOCK, n)) for mm, n in zip(spacing[::-1], shape_irc, strict=True))
    return i, r, c


def finder_bytes(shape_irc: tuple[int, int, int], spacing: tuple[float, float, float]) -> int:
    """Memory that finding the lungs of a scan takes at most, bytes."""
    return WORK_BYTES * int(
        np.prod([-(-n // b) for n, b in zip(shape_irc, _block_of(shape_irc, spacing), strict=True)])
    )


class LungFinder:
    """Takes a scan's slices in order, any number at a time, and then finds the lungs.

    Parameters
    ----------
    shape_irc : tuple of 3 int
        Slices, rows, columns of the scan.
    spacing : tuple of 3 float
        Millimetres per column, row, slice, as SimpleITK gives them.
    """

    def __init__(self, shape_irc: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
        self._shape = shape_irc
        self._block = _block_of(shape_irc, spacing)
        self._mm = tuple(float(mm * block) for mm, block in zip(spacing[::-1], self._block, strict=True))
        self._starts = [np.arange(0, n, block) for n, block in zip(shape_irc, self._block, strict=True)]
        self._sums = np.zeros(tuple(len(starts) for starts in self._starts), dtype=np.float32)
        self._next = 0

    def take(self, slab: npt.NDArray[Any]) -> None:
        """Add the next (k, rows, columns) slices, HU of any number type."""
        for plane in slab:
            values = np.clip(plane, FLOOR_HU, CEILING_HU).astype(np.int16, copy=False)
            _, height, width = self._block
            rows = values[::height].copy()  # sums of whole rows at a stride: ten times faster than np.add.reduceat
            for k in range(1, height):
                rows[: len(values[k::height])] += values[k::height]
            sums = self._sums[self._next // self._block[0]]
            for k in range(width):
                sums[:, : len(rows[0, k::width])] += rows[:, k::width]
            self._next += 1

    def find(self) -> Lungs:
        """The lungs, once all slices were taken; an empty mask where there are none."""
        deep, high, wide = (
            np.diff([*starts, n]).astype(np.float32) for starts, n in zip(self._starts, self._shape, strict=True)
        )
        hu = self._sums / (deep[:, None, None] * high[:, None] * wide)
        return Lungs(_lungs_of(hu, self._mm), self._block, self._shape)


def lung_mask(hu: npt.NDArray[Any], spacing: tuple[float, float, float]) -> npt.NDArray[np.uint8]:
    """Mask of the lungs of a whole scan.

    Parameters
    ----------
    hu : ndarray, (slices, rows, columns)
        HU, clipped or not; padding below -1000 is air.
    spacing : tuple of 3 float
        Millimetres per column, row, slice, as SimpleITK gives them.

    Returns
    -------
    ndarray, (slices, rows, columns) uint8
        1 in a lung, vessels and wall nodules included; all 0 where no lung was found.
    """
    finder = LungFinder(hu.shape, spacing)
    finder.take(hu)
    return finder.find().slices(0, len(hu))


def lung_box(mask: npt.NDArray[Any]) -> Box | None:
    """Bounding box (start, stop) of a mask, array order; None where it is empty.

    Examples
    --------
    >>> lung_box(np.pad(np.ones((1, 2, 3)), 1))
    ((1, 1, 1), (2, 3, 4))
    """
    spans = []
    for axis in range(3):
        held = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        if not len(held):
            return None
        spans.append((int(held[0]), int(held[-1]) + 1))
    (i, r, c) = spans
    return (i[0], r[0], c[0]), (i[1], r[1], c[1])


def _lungs_of(hu: npt.NDArray[np.float32], mm: tuple[float, ...]) -> Mask:
    """The lungs on a grid of mean HU with voxels of `mm` (slice, row, column)."""
    labels, _ = ndimage.label(hu < AIR_HU)
    boxes: list[Span] = ndimage.find_objects(labels)
    lungs = np.zeros(hu.shape, dtype=np.bool_)
    for label in _largest(labels, boxes, hu, mm):
        box = tuple(  # with room for the closing, and a voxel that stays outside
            slice(max(0, span.start - int(CLOSING_MM / side) - 2), span.stop + int(CLOSING_MM / side) + 2)
            for span, side in zip(boxes[label - 1], mm, strict=True)
        )
        whole = _cut_airway(labels[box] == label, mm)
        lungs[box] |= _close(_fill_slices(whole, mm), mm)
    return lungs


def _largest(
    labels: npt.NDArray[np.int32], boxes: Sequence[Span], hu: npt.NDArray[np.float32], mm: tuple[float, ...]
) -> list[int]:
    """Labels of the one or two largest pieces of air that can be lungs.

    What reaches the sides of the field is the air around the body; the first and last slice may cut a lung.
    """
    volumes = np.bincount(labels.ravel()) * float(np.prod(mm))
    for side in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        volumes[side.ravel()] = 0.0
    volumes[0] = 0.0
    least = MIN_SECTION_MM2 * min(len(labels) * mm[0], FULL_DEPTH_MM)
    found: list[int] = []
    for label in np.argsort(-volumes, kind="stable")[:6].tolist():
        if volumes[label] < max(least, MIN_PART * volumes.max()) or len(found) == 2:
            break
        box = boxes[label - 1]
        if LUNG_HU[0] < np.median(hu[box][labels[box] == label]) < LUNG_HU[1]:
            found.append(label)
    return found


def _cut_airway(piece: Mask, mm: tuple[float, ...]) -> Mask:
    """A lung, or both, without the trachea above: what is too narrow for a ball, and a long way from what is not."""
    core = _shrink(piece, AIRWAY_MM, mm)
    labels, count = ndimage.label(core)
    if not count:
        return piece
    volumes = np.bincount(labels.ravel())
    volumes[0] = 0
    kept = np.isin(labels, np.flatnonzero(volumes >= 0.02 * volumes.max()))
    return _grow(kept, TONGUE_MM, mm, within=piece)


def _fill_slices(mask: Mask, mm: tuple[float, ...]) -> Mask:
    """Fill the small holes of each slice: vessels, and nodules that touch no wall there."""
    flat = np.zeros((3, 3, 3), dtype=np.bool_)
    flat[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(~mask, flat)
    sizes = np.bincount(labels.ravel()) * (mm[1] * mm[2])
    is_hole = sizes <= MAX_HOLE_MM2
    for side in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        is_hole[np.unique(side)] = False
    is_hole[0] = True
    return np.asarray(is_hole[labels])


def _close(mask: Mask, mm: tuple[float, ...]) -> Mask:
    """Closing by about a ball; outside the scan the lung may go on."""
    return _shrink(_grow(mask, CLOSING_MM, mm), CLOSING_MM, mm)


def _shrink(mask: Mask, radius: float, mm: tuple[float, ...]) -> Mask:
    return np.asarray(~_grow(~mask, radius, mm))


def _grow(mask: Mask, radius: float, mm: tuple[float, ...], within: Mask | None = None) -> Mask:
    """Dilation by about a ball of `radius` mm: each step goes one voxel along the axes that have room for one.

    Every third step goes along one axis after the other (a box), the others along each from where it began (an
    octahedron); together they are near a ball, and whole-array shifts are far faster than a footprint.
    """
    finest = min(mm)
    grown = mask.copy()
    for step in range(1, round(radius / finest) + 1):
        axes = [axis for axis in range(3) if int(step * finest / mm[axis]) > int((step - 1) * finest / mm[axis])]
        source = grown if step % 3 == 0 else grown.copy()
        for axis, before in itertools.product(axes, (True, False)):
            low, high = [slice(None)] * 3, [slice(None)] * 3
            low[axis], high[axis] = slice(None, -1), slice(1, None)
            to, by = (low, high) if before else (high, low)
            grown[tuple(to)] |= source[tuple(by)]
        if within is not None:
            grown &= within
    return grown
