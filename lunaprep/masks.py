"""The mask of an annotated nodule: what is brighter than lung and hangs together around its centre.

The threshold of -700 HU and the growing from the centre are chapter 13's of *Deep Learning with PyTorch*. Here the
voxels must also be connected, and lie in the annotated sphere or, if they are more tissue than air, in a small margin
around it, so that nothing runs along the pleura or a vessel; and the box around the nodule ends where the scan does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lunaprep.geometry import Geometry

Mask = npt.NDArray[np.bool_]

THRESHOLD_HU = -700
"""Above: nodule (ground glass too), vessel or wall; below: lung."""

TISSUE_HU = -400
"""Above: more tissue (0) than lung (-850), wherever the two share a voxel; asked for in the margin only."""

MARGIN_MM = 1.0
"""How far beyond the annotated radius a mask may reach: annotations are drawn by hand, in whole voxels."""


@dataclass(frozen=True)
class DrawnMask:
    """A mask that people drew: its first voxel (slice, row, column), its shape, and its voxels, eight to a byte."""

    start: tuple[int, int, int]
    shape: tuple[int, int, int]
    bits: bytes

    @classmethod
    def of(cls, start: tuple[int, int, int], mask: Mask) -> "DrawnMask":
        """Pack a mask (slices, rows, columns) whose first voxel is `start`."""
        slices, rows, columns = mask.shape
        return cls(start, (slices, rows, columns), np.packbits(mask).tobytes())

    @property
    def mask(self) -> Mask:
        """The voxels, (slices, rows, columns) bool."""
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=int(np.prod(self.shape)))
        return bits.reshape(self.shape).astype(bool)


@dataclass(frozen=True)
class Nodule:
    """An annotated nodule on a scan's grid: centre voxel (slice, row, column; with fractions), size, mask if drawn."""

    center_irc: tuple[float, float, float]
    diameter_mm: float
    drawn: DrawnMask | None = None

    def radii_irc(self, spacing: Sequence[float]) -> npt.NDArray[np.float64]:
        """Reach of its mask along slice, row, column, voxels: radius and margin, or half a voxel's more if larger."""
        mm = np.array(spacing[::-1], dtype=np.float64)
        return np.asarray((self.diameter_mm / 2 + np.maximum(MARGIN_MM, mm / 2)) / mm)


class NoduleRegion:
    """The box of a scan around one nodule, which fills while the slices stream by; then holds its mask.

    Parameters
    ----------
    nodule : Nodule
        Its centre voxel must lie inside the scan.
    geometry : Geometry
        Grid of the scan.
    """

    def __init__(self, nodule: Nodule, geometry: Geometry) -> None:
        self._nodule = nodule
        self._spacing = geometry.spacing
        reach, center = nodule.radii_irc(geometry.spacing), np.array(nodule.center_irc)
        nearest = np.rint(center)  # in the box even where the nodule is smaller than a voxel
        low = np.maximum(np.minimum(np.ceil(center - reach), nearest), 0).astype(np.int64)
        high = np.maximum(np.floor(center + reach), nearest).astype(np.int64) + 1
        self.start: tuple[int, ...] = tuple(low.tolist())
        self.stop: tuple[int, ...] = tuple(np.minimum(high, geometry.shape_irc).tolist())
        if nodule.drawn:
            self.start = nodule.drawn.start
            self.stop = tuple(a + n for a, n in zip(self.start, nodule.drawn.shape, strict=True))
        self._level = np.zeros([b - a for a, b in zip(self.start, self.stop, strict=True)], dtype=np.uint8)

    def take(self, slab: npt.NDArray[Any], first: int) -> None:
        """Look at the slices from number `first` on, (k, rows, columns), HU."""
        low, high = max(self.start[0], first), min(self.stop[0], first + len(slab))
        if low < high:
            part = slab[low - first : high - first, self.start[1] : self.stop[1], self.start[2] : self.stop[2]]
            level = self._level[low - self.start[0] : high - self.start[0]]
            np.add(part > THRESHOLD_HU, part > TISSUE_HU, out=level, dtype=np.uint8)

    def mask(self) -> Mask:
        """The nodule's voxels in the box, at least one."""
        if self._nodule.drawn:
            return self._nodule.drawn.mask
        index = np.ogrid[tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))]
        offset = [at - c for at, c in zip(index, self._nodule.center_irc, strict=True)]
        mm = self._spacing[::-1]
        far = np.sqrt(sum((d * s) ** 2 for d, s in zip(offset, mm, strict=True)))
        reach = self._nodule.radii_irc(self._spacing)
        margin = sum((d / r) ** 2 for d, r in zip(offset, reach, strict=True)) <= 1
        sphere = far <= self._nodule.diameter_mm / 2
        bright = (self._level > 0) & sphere | (self._level > 1) & margin
        return _grow(np.asarray(bright), np.asarray(sphere), np.asarray(far))


def _grow(bright: Mask, sphere: Mask, far: npt.NDArray[np.float64]) -> Mask:
    """The piece of `bright` with the voxel of it in the sphere nearest to the centre, filled; else the sphere."""
    seeds = np.where(bright & sphere, far, np.inf)
    seed = np.unravel_index(int(np.argmin(seeds)), far.shape)
    if np.isinf(seeds[seed]):
        if not sphere.any():  # smaller than a voxel
            sphere = far == far.min()
        return sphere
    labels, _ = ndimage.label(bright)
    return np.asarray(ndimage.binary_fill_holes(labels == labels[seed]))


def nodule_mask(
    hu: npt.NDArray[Any], spacing: tuple[float, float, float], nodules: Iterable[Nodule]
) -> npt.NDArray[np.uint8]:
    """Mask of the annotated nodules of a whole scan.

    Parameters
    ----------
    hu : ndarray, (slices, rows, columns)
        HU.
    spacing : tuple of 3 float
        Millimetres per column, row, slice, as SimpleITK gives them.
    nodules : iterable of Nodule
        Annotated nodules whose centre voxels lie in the scan.

    Returns
    -------
    ndarray, (slices, rows, columns) uint8
        1 in a nodule.
    """
    out = np.zeros(hu.shape, dtype=np.uint8)
    grid = Geometry((0.0, 0.0, 0.0), spacing, (), hu.shape)
    for nodule in nodules:
        region = NoduleRegion(nodule, grid)
        region.take(hu, 0)
        out[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))] |= region.mask()
    return out
