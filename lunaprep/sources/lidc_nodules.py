"""LIDC-IDRI's nodules: the readers' outlines as masks, and the nodules that most of them saw.

The rules were checked against LUNA16's tables, which were made from the same files: the six outlined nodules of
LIDC-IDRI-0001 and 0002 get exactly the voxels (4613 to 12595) that LUNA16's diameters come from, if an outline's
border is left out, a hole is taken out with its border, and a pixel is inside where no path of neighbours, four to a
pixel, leads out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from lunaprep.errors import TableError
from lunaprep.geometry import FloatArray, Geometry
from lunaprep.safe_xml import xml_fault
from lunaprep.sources.lidc_xml import Contour, ReaderMark, Reading

MIN_READERS = 3
"""LUNA16's nodules are those that at least 3 of the 4 readers outlined."""

MALIGNANT_RATING, MALIGNANT_VOTES = 4, 2
"""Malignant: at least 2 readers gave 4 (moderately suspicious) or 5 (highly suspicious)."""

SLICE_TOLERANCE = 0.1
"""Gaps that an outline may be off its slice; z is written with fewer digits than in DICOM."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ReaderNodule:
    """One reader's nodule in space: area centroid (world, mm), diameter of the sphere of equal volume, its voxels."""

    mark: ReaderMark
    xyz: tuple[float, float, float]
    diameter_mm: float
    num_voxels: int
    masks: tuple[tuple[float, tuple[int, int], Mask], ...]
    """For each slice: its continuous slice index, the first row and column, and the mask (rows, columns)."""


@dataclass(frozen=True)
class ConsensusNodule:
    """Readers' nodules that are the same one: means of their centroids and diameters, and their ratings."""

    members: tuple[ReaderNodule, ...]
    xyz: tuple[float, float, float]
    diameter_mm: float

    @property
    def num_readers(self) -> int:
        """Readers that outlined it."""
        return len({member.mark.reader for member in self.members})

    @property
    def ratings(self) -> tuple[int, ...]:
        """Malignancy ratings (1 to 5) given."""
        return tuple(member.mark.malignancy for member in self.members if member.mark.malignancy is not None)

    @property
    def malignant_votes(self) -> int:
        """Ratings of 4 or 5."""
        return sum(rating >= MALIGNANT_RATING for rating in self.ratings)

    @property
    def is_malignant(self) -> bool | None:
        """Whether at least two readers said so; None where nobody rated it."""
        return self.malignant_votes >= MALIGNANT_VOTES if self.ratings else None


def outline_mask(points: npt.NDArray[np.int64]) -> tuple[tuple[int, int], Mask, Mask]:
    """Inside and border of one closed outline.

    Parameters
    ----------
    points : ndarray, (n, 2) int64
        Border pixels in order, column and row; a gap between two is bridged by a straight line.

    Returns
    -------
    corner : tuple of 2 int
        Row and column of the masks' first pixel.
    inside, border : ndarray, (rows, columns) bool
        Pixels that no path of neighbours (4 to a pixel) leads out of, without the border; and the border.
    """
    low = points.min(axis=0) - 1
    columns, rows = (points.max(axis=0) - low + 2).tolist()
    border = np.zeros((rows, columns), dtype=bool)
    closed = np.concatenate([points, points[:1]]) - low
    for a, b in pairwise(closed):
        steps = max(1, int(np.abs(b - a).max()))
        line = np.rint(a + (b - a) * (np.arange(steps + 1) / steps)[:, None]).astype(np.int64)
        border[line[:, 1], line[:, 0]] = True
    from scipy import ndimage

    return (int(low[1]), int(low[0])), ndimage.binary_fill_holes(border) & ~border, border


def reader_nodule(mark: ReaderMark, geometry: Geometry) -> ReaderNodule | None:
    """Place one reader's outlined nodule in space.

    Parameters
    ----------
    mark : ReaderMark
        With ``kind == "nodule"``.
    geometry : Geometry
        The scan's grid; the nodule may reach beyond it (a scan of which only some slices are there).

    Returns
    -------
    ReaderNodule or None
        None where the outlines are so thin that nothing lies inside.
    """
    masks = []
    for z_mm in sorted({contour.z_mm for contour in mark.contours}):
        index = _slice_index(z_mm, geometry)
        corner, mask = _slice_mask([contour for contour in mark.contours if contour.z_mm == z_mm])
        if mask.any():
            masks.append((index, corner, mask))
    if not masks:
        return None
    irc = np.concatenate([_voxels(*item) for item in masks])
    volume = len(irc) * math.prod(geometry.spacing)
    x, y, z = geometry.irc_to_xyz(irc.mean(axis=0)).tolist()
    return ReaderNodule(mark, (x, y, z), (6 * volume / math.pi) ** (1 / 3), len(irc), tuple(masks))


def _slice_mask(contours: Sequence[Contour]) -> tuple[tuple[int, int], Mask]:
    """Mask of one slice: all that is inside an outline, less the holes with their borders."""
    parts = [(contour.is_inclusion, *outline_mask(contour.points)) for contour in contours]
    low = np.min([corner for _, corner, _, _ in parts], axis=0)
    high = np.max([np.add(corner, border.shape) for _, corner, _, border in parts], axis=0)
    mask = np.zeros(high - low, dtype=bool)
    for is_inclusion, corner, inside, border in sorted(parts, key=lambda part: not part[0]):
        row, column = np.subtract(corner, low)
        place = mask[row : row + border.shape[0], column : column + border.shape[1]]
        if is_inclusion:
            place |= inside
        else:
            place &= ~(inside | border)
    return (int(low[0]), int(low[1])), mask


def _slice_index(z_mm: float, geometry: Geometry) -> float:
    """Continuous slice index of a world z; the slices must lie across the z axis."""
    matrix = geometry.direction_matrix
    if abs(abs(matrix[2, 2]) - 1) > 1e-3:
        msg = "the scan's slices are oblique, and a reader's mark has only its z"
        raise TableError(msg)
    return float((z_mm - geometry.origin[2]) / (matrix[2, 2] * geometry.spacing[2]))


def _voxels(index: float, corner: tuple[int, int], mask: Mask) -> FloatArray:
    """Array indices (n, 3) of a slice's voxels; the slice index may be between slices."""
    rows, columns = np.nonzero(mask)
    return np.stack([np.full(len(rows), index), rows + corner[0], columns + corner[1]], axis=1).astype(np.float64)


def mark_xyz(mark: ReaderMark, geometry: Geometry) -> tuple[float, float, float]:
    """World place (mm) of a mark that is a point; of an outline, the middle of its border."""
    index = np.mean([_slice_index(contour.z_mm, geometry) for contour in mark.contours])
    column, row = np.concatenate([contour.points for contour in mark.contours]).mean(axis=0)
    x, y, z = geometry.irc_to_xyz([index, row, column]).tolist()
    return x, y, z


def group_nodules(nodules: Sequence[ReaderNodule]) -> tuple[ConsensusNodule, ...]:
    """Join the readers' nodules that are one: those whose centroids are closer than the sum of their radii.

    Joined to the end: two nodules that a third links are one. Each group's centre and diameter are the plain means of
    its members. (LUNA16 joined by twos, so that a nodule of four readers weighs them 1/2, 1/4, 1/8, 1/8: its diameters
    differ from these by about a hundredth.)
    """
    group = list(range(len(nodules)))
    for a, one in enumerate(nodules):
        for b in range(a):
            other = nodules[b]
            if math.dist(one.xyz, other.xyz) < (one.diameter_mm + other.diameter_mm) / 2:
                old, new = max(group[a], group[b]), min(group[a], group[b])
                group = [new if number == old else number for number in group]
    members = ([nodules[k] for k in range(len(nodules)) if group[k] == number] for number in sorted(set(group)))
    return tuple(_joined(tuple(some)) for some in members)


def _joined(members: tuple[ReaderNodule, ...]) -> ConsensusNodule:
    x, y, z = np.mean([member.xyz for member in members], axis=0).tolist()
    return ConsensusNodule(members, (x, y, z), float(np.mean([member.diameter_mm for member in members])))


def place_mask(nodule: ReaderNodule, geometry: Geometry) -> tuple[tuple[int, int, int], Mask] | None:
    """A reader's nodule as voxels of the scan.

    Returns
    -------
    tuple or None
        First voxel (slice, row, column) and mask of the box around it, cut at the scan's ends; None where it lies
        outside altogether.

    Raises
    ------
    TableError
        An outline that lies between two slices: the XML is of another scan.
    """
    rows = [[*corner, *np.add(corner, mask.shape)] for _, corner, mask in nodule.masks]
    low, high = np.min(rows, axis=0)[:2], np.max(rows, axis=0)[2:]
    low, high = np.maximum(low, 0), np.minimum(high, geometry.shape_irc[1:])
    slices: dict[int, tuple[tuple[int, int], Mask]] = {}
    for index, corner, mask in nodule.masks:
        if abs(index - round(index)) > SLICE_TOLERANCE:
            text = f"an outline of {nodule.mark.name or 'a nodule'} lies between two slices (index {index:.2f})"
            msg = f"{text}; is it another scan's?"
            raise TableError(msg)
        if 0 <= round(index) < geometry.shape_irc[0]:
            slices[round(index)] = (corner, mask)
    if not slices or (high <= low).any():
        return None
    first = min(slices)
    box = np.zeros((max(slices) - first + 1, *(high - low)), dtype=bool)
    for k, (corner, mask) in slices.items():
        begin, end = np.maximum(corner, low), np.minimum(np.add(corner, mask.shape), high)
        inner = tuple(slice(a, b) for a, b in zip(begin - corner, end - corner, strict=True))
        outer = tuple(slice(a, b) for a, b in zip(begin - low, end - low, strict=True))
        box[k - first][outer] = mask[inner]
    return (first, int(low[0]), int(low[1])), box


def consensus_mask(nodule: ConsensusNodule, geometry: Geometry) -> tuple[tuple[int, int, int], Mask] | None:
    """Voxels that at least half of the nodule's readers have inside their outlines, as `place_mask` gives one's."""
    placed = [place_mask(member, geometry) for member in nodule.members]
    readers = [member.mark.reader for member in nodule.members]
    there = [(reader, *item) for reader, item in zip(readers, placed, strict=True) if item is not None]
    if not there:
        return None
    low = np.min([corner for _, corner, _ in there], axis=0)
    high = np.max([np.add(corner, mask.shape) for _, corner, mask in there], axis=0)
    votes = {reader: np.zeros(high - low, dtype=bool) for reader in readers}
    for reader, corner, mask in there:
        box = tuple(slice(a, b) for a, b in zip(corner - low, np.add(corner, mask.shape) - low, strict=True))
        votes[reader][box] |= mask
    count = np.sum([vote.astype(np.uint8) for vote in votes.values()], axis=0)
    return (int(low[0]), int(low[1]), int(low[2])), np.asarray(2 * count >= len(votes))


def reader_nodules(reading: Reading, geometry: Geometry) -> tuple[tuple[ReaderNodule, ...], tuple[ReaderMark, ...]]:
    """All outlined nodules of a reading placed in space, and the marks whose outline holds nothing."""
    marks = [mark for mark in reading.marks if mark.kind == "nodule"]
    placed = [reader_nodule(mark, geometry) for mark in marks]
    thin = tuple(mark for mark, nodule in zip(marks, placed, strict=True) if nodule is None)
    return tuple(nodule for nodule in placed if nodule is not None), thin


@dataclass(frozen=True)
class Finding:
    """One place in a scan, and what the readers made of it.

    `kind`: ``nodule``, outlined by at least 3 readers; ``few_readers``, by fewer; ``thin``, outlined with nothing
    inside; ``small_nodule`` (under 3 mm) and ``non_nodule``, one reader's point. `nodule` is None for the last three.
    """

    kind: Literal["nodule", "few_readers", "thin", "small_nodule", "non_nodule"]
    xyz: tuple[float, float, float]
    nodule: ConsensusNodule | None = None

    @property
    def diameter_mm(self) -> float:
        """Diameter of the sphere of equal volume; NaN for a point."""
        return self.nodule.diameter_mm if self.nodule else math.nan


def find_findings(reading: Reading, geometry: Geometry, min_readers: int = MIN_READERS) -> tuple[Finding, ...]:
    """All that a reading says of a scan: nodules first, then what is neither nodule nor certainly none, then points.

    Parameters
    ----------
    reading : Reading
        As `lunaprep.sources.lidc_xml.read_reading` gives it.
    geometry : Geometry
        The scan's grid.
    min_readers : int
        Readers that must have outlined a nodule.
    """
    nodules, thin = reader_nodules(reading, geometry)
    groups = group_nodules(nodules)
    sure = [Finding("nodule", group.xyz, group) for group in groups if group.num_readers >= min_readers]
    few = [Finding("few_readers", group.xyz, group) for group in groups if group.num_readers < min_readers]
    points = [Finding(mark.kind, mark_xyz(mark, geometry)) for mark in reading.marks if mark.kind != "nodule"]
    return (*sure, *few, *(Finding("thin", mark_xyz(mark, geometry)) for mark in thin), *points)


def check_reading(reading: Reading, series_uid: str, geometry: Geometry, sop_uids: Sequence[str]) -> None:
    """Refuse a reading of another scan: other series, or a slice whose SOP instance UID is at another z.

    Parameters
    ----------
    reading : Reading
        The readers' marks.
    series_uid : str
        Series of the scan.
    geometry : Geometry
        Its grid.
    sop_uids : sequence of str
        SOP instance UIDs of its slices, in the order of the grid. Outlines of slices that are not there are let be.
    """
    if reading.series_uid != series_uid:
        text = f"it is about series …{reading.series_uid[-12:]}, expected …{series_uid[-12:]}"
        raise xml_fault(reading.path, text)
    index_of = {uid: k for k, uid in enumerate(sop_uids)}
    for mark in reading.marks:
        for contour in mark.contours:
            expected = index_of.get(contour.sop_uid)
            if expected is None:
                continue
            got = _slice_index(contour.z_mm, geometry)
            if abs(got - expected) > SLICE_TOLERANCE:
                text = f"an outline at z {contour.z_mm:g} mm is in slice {got:.2f}, but names slice {expected}"
                raise xml_fault(reading.path, f"{text} by its imageSOP_UID; it was made for other positions")
