"""Targets of one scan: the masks of its nodules and of its lungs, made while its slices stream by."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep import schema
from lunaprep.errors import PassingScanError, ScanError
from lunaprep.geometry import Geometry
from lunaprep.lungs import LungFinder, finder_bytes
from lunaprep.masks import Mask, Nodule, NoduleRegion
from lunaprep.scans.open import iter_slabs
from lunaprep.scans.scan import Scan
from lunaprep.store.receipt import LungRecord

LUNG_LABELS = (3, 4)
"""Values of LUNA16's seg-lungs masks that are lung, left and right; 5 is the trachea."""

LAYER = schema.VOLUME_CHUNK_IRC[0]


@dataclass(frozen=True)
class LungBits:
    """A lung mask, a bit a voxel: (slices, rows, columns / 8)."""

    bits: npt.NDArray[np.uint8]
    num_cols: int

    def slices(self, first: int, stop: int) -> npt.NDArray[np.uint8]:
        """Slices `first` to `stop` of the mask, (k, rows, columns) uint8."""
        return np.unpackbits(self.bits[first:stop], axis=2, count=self.num_cols)

    def box(self) -> tuple[int, ...] | None:
        """First voxel of the lungs and the one behind the last, slice row column; None without lungs."""
        flat = np.bitwise_or.reduce(self.bits, axis=0)
        across = np.unpackbits(np.bitwise_or.reduce(flat, axis=0), count=self.num_cols)
        spans = [np.flatnonzero(held) for held in (self.bits.any(axis=(1, 2)), flat.any(axis=1), across)]
        if not len(spans[0]):
            return None
        return (*(int(span[0]) for span in spans), *(int(span[-1]) + 1 for span in spans))


@dataclass(frozen=True)
class Targets:
    """The masks of one scan, on its grid, handed out slice by slice."""

    shape_irc: tuple[int, int, int]
    nodules: Sequence[tuple[tuple[int, ...], Mask]]
    """First voxel and mask of each nodule's box."""

    lungs: LungBits
    given_xxh3: str | None = None
    note: str | None = None

    def cut_nodules(self, start_irc: Sequence[int], shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
        """The nodule mask of a box of the scan, which may stick out: nothing there is a nodule."""
        out = np.zeros(shape, dtype=np.uint8)
        for first, mask in self.nodules:
            low = np.maximum(first, start_irc)
            high = np.minimum(np.add(first, mask.shape), np.add(start_irc, shape))
            if (low < high).all():
                target = tuple(slice(a, b) for a, b in zip(low - start_irc, high - start_irc, strict=True))
                source = tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))
                out[target] |= mask[source]
        return out

    def layers(self) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        """Both masks of the whole scan, a layer of slices at a time: dataset and (k, rows, columns) uint8."""
        depth, rows, cols = self.shape_irc
        for first in range(0, depth, LAYER):
            stop = min(first + LAYER, depth)
            yield schema.NODULE_MASK_DATASET, self.cut_nodules((first, 0, 0), (stop - first, rows, cols))
        for first in range(0, depth, LAYER):
            yield schema.LUNG_MASK_DATASET, self.lungs.slices(first, min(first + LAYER, depth))

    def lung_record(self) -> LungRecord:
        """Where the lungs lie, for the receipt."""
        return LungRecord(self.lungs.box(), self.given_xxh3, self.note)


class TargetMaker:
    """Sees a scan's slices in order, HU before clipping, and then gives its targets.

    Parameters
    ----------
    geometry : Geometry
        Grid of the scan.
    nodules : iterable of Nodule
        Annotated nodules whose centre voxels lie in the scan.
    given : Scan, optional
        A mask of the lungs as LUNA16 has them; one that cannot be read is passed over, and noted.
    """

    def __init__(self, geometry: Geometry, nodules: Iterable[Nodule], given: Scan | None = None) -> None:
        self._shape = geometry.shape_irc
        self._regions = [NoduleRegion(nodule, geometry) for nodule in nodules]
        self._next = 0
        self._lungs: LungBits | LungFinder | None = None
        self._given_xxh3: str | None = None
        self._note: str | None = None
        if given is not None:
            hasher = xxhash.xxh3_128()
            try:
                self._lungs = _read_lungs(given, geometry, hasher)
                self._given_xxh3 = hasher.hexdigest()
            except PassingScanError:  # next time it may be there, and the store another
                raise
            except ScanError as error:
                self._note = f"{error}; its lungs were computed"
        if self._lungs is None:
            self._lungs = LungFinder(geometry.shape_irc, geometry.spacing)

    def take(self, slab: npt.NDArray[Any]) -> None:
        """Look at the next (k, rows, columns) slices."""
        for region in self._regions:
            region.take(slab, self._next)
        if isinstance(self._lungs, LungFinder):
            self._lungs.take(slab)
        self._next += len(slab)

    def finish(self) -> Targets:
        """The targets, once all slices were seen."""
        lungs = self._lungs
        assert lungs is not None
        if isinstance(lungs, LungFinder):
            found, depth = lungs.find(), self._shape[0]
            lungs = _pack(found.slices(k, min(k + LAYER, depth)) for k in range(0, depth, LAYER))
        nodules = [(region.start, region.mask()) for region in self._regions]
        return Targets(self._shape, nodules, lungs, self._given_xxh3, self._note)


def _pack(layers: Iterable[npt.NDArray[Any]]) -> LungBits:
    """A mask of the whole scan, from layers of slices, (k, rows, columns)."""
    num_cols, bits = 0, []
    for layer in layers:
        num_cols = layer.shape[2]
        bits.append(np.packbits(layer, axis=2))
    return LungBits(np.concatenate(bits), num_cols)


def _read_lungs(given: Scan, geometry: Geometry, hasher: xxhash.xxh3_128) -> LungBits:
    """Read a given mask.

    Raises
    ------
    ScanError
        It is damaged, or of another scan.
    """
    if given.geometry.shape_irc != geometry.shape_irc:
        message = f"{given.path.name} is a mask of {given.geometry.shape_irc} voxels, the scan has {geometry.shape_irc}"
        raise ScanError(message)
    left, right = LUNG_LABELS
    return _pack((slab == left) | (slab == right) for slab in iter_slabs(given, LAYER, hasher))


def target_bytes(geometry: Geometry, nodules: Iterable[Nodule], given: Scan | None) -> int:
    """Memory that the masks of one scan need at most, bytes: its lungs and the boxes around its nodules."""
    voxels = int(np.prod(geometry.shape_irc))
    # the mask is kept as bits, twice while they are joined; a given one is first decoded whole by SimpleITK
    lungs = voxels // 4
    lungs += voxels * given.dtype.itemsize if given else finder_bytes(geometry.shape_irc, geometry.spacing)
    boxes = sum(int(np.prod(np.minimum(2 * n.radii_irc(geometry.spacing) + 2, geometry.shape_irc))) for n in nodules)
    return lungs + 2 * boxes
