"""From the probability of each voxel to candidates: threshold, connected components, centres, sizes. Arrays only.

The order of the steps: voxels at or above the threshold and near the lungs; erosion or opening where asked for;
three-dimensional components; long ones split at higher thresholds; those too small or too large dropped; near ones
merged; the best of them kept. What is dropped is counted, never lost without a word.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from lunatrain.dense import HU_WINDOW
from lunatrain.errors import UsageError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int32]
Weight = Literal["probability", "intensity", "both", "none"]
Triple = tuple[float, float, float]

SPLIT_LEVELS, SPLIT_STEP = 5, 1.0
"""Thresholds at which components are taken apart, and how far apart they are, in logits."""

RANK_MM = 8.0

WEIGHTS = ("probability", "intensity", "both", "none")


@dataclass(frozen=True)
class GroupingOptions:
    """How voxels become candidates.

    Parameters
    ----------
    threshold : float
        Probability from which on a voxel counts.
    erosion, opening : int
        Steps (six neighbours) of a binary erosion or opening before the components; the book erodes once, which
        loses what is two voxels wide.
    min_diameter_mm, max_diameter_mm : float
        Of the sphere of a component's volume.
    merge_mm : float
        Components whose centres are nearer become one; so does one whose centre lies in another's sphere.
    limit : int
        Most candidates of a scan: those of the highest rank, see `Candidates`.
    split_below : float
        Components less compact are taken apart at higher thresholds: so a nodule comes off the vessel it sits on. 0
        splits nothing.
    weight : {"probability", "intensity", "both", "none"}
        What a voxel weighs in its component's centre. Intensity is HU clipped to ±1000, plus 1001: above 0 whatever
        the scanner writes outside its field of view.
    """

    threshold: float = 0.5
    erosion: int = 0
    opening: int = 0
    min_diameter_mm: float = 2.0
    max_diameter_mm: float = 60.0
    merge_mm: float = 3.0
    limit: int = 50
    split_below: float = 0.5
    weight: Weight = "probability"

    def __post_init__(self) -> None:
        _require(0 < self.threshold <= 1, "threshold", self.threshold, "above 0, at most 1")
        _require(self.erosion >= 0 and self.opening >= 0, "erosion or opening", (self.erosion, self.opening), "0 on")
        sizes = self.min_diameter_mm, self.max_diameter_mm
        _require(0 <= sizes[0] < sizes[1], "diameters", sizes, "0 <= smallest < largest, mm")
        _require(self.merge_mm >= 0, "merge_mm", self.merge_mm, "0 or more, mm")
        _require(self.limit >= 1, "limit", self.limit, "1 or more")
        _require(0 <= self.split_below <= 1, "split_below", self.split_below, "0 to 1")
        _require(self.weight in WEIGHTS, "weight", self.weight, f"one of {', '.join(WEIGHTS)}")


@dataclass(frozen=True)
class GroupCounts:
    """What became of the voxels and components; `split` are pieces on top of these, `kept` the candidates."""

    voxels: int
    components: int
    split: int
    too_small: int
    too_large: int
    merged: int
    beyond_limit: int
    kept: int


@dataclass(frozen=True, eq=False)
class Candidates:
    """Candidates of one scan, those of the highest rank first.

    Attributes
    ----------
    center_irc : ndarray, (n, 3)
        Weighted centres, continuous array index (slice, row, column) of the scan.
    num_voxels : ndarray, (n,)
    volume_mm3 : ndarray, (n,)
    score, mean_probability : ndarray, (n,)
        Highest and mean probability of the voxels.
    compactness : ndarray, (n,)
        Diameter of the sphere of the same volume over the longest side, at most 1: a ball has 1, a vessel 0.2 to 0.5.
    rank : ndarray, (n,)
        Score times compactness, and for those under `RANK_MM` times their share of it: specks are many.
    labels : ndarray, int32
        The box that was grouped: k + 1 where a voxel is candidate k's, else 0.
    start_irc : tuple of 3 int
        First voxel of `labels` in the scan.
    counts : GroupCounts
    """

    center_irc: Floats
    num_voxels: Ints
    volume_mm3: Floats
    score: Floats
    mean_probability: Floats
    compactness: Floats
    rank: Floats
    labels: Labels
    start_irc: tuple[int, int, int]
    counts: GroupCounts

    def __len__(self) -> int:
        return len(self.score)

    @property
    def diameter_mm(self) -> Floats:
        """Diameter of the sphere of the same volume, (n,): an estimate, as good as the mask."""
        return sphere_diameter(self.volume_mm3)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Per component: voxels, highest and summed probability, summed weight, weight times index and bounds, (n, 3)."""

    voxels: Ints
    highest: Floats
    probability: Floats
    weight: Floats
    moment: Floats
    first: Ints
    last: Ints

    @property
    def center(self) -> Floats:
        return np.asarray(self.moment / np.maximum(self.weight, 1e-30)[:, None])

    def of(self, rows: Any) -> "_Sums":
        return _Sums(*(value[rows] for value in self.__dict__.values()))


def sphere_diameter(volume: npt.ArrayLike) -> Floats:
    """Diameter of a sphere of given volume.

    >>> float(sphere_diameter(4 / 3 * np.pi * 5**3).round(9))
    10.0
    """
    return np.asarray(np.cbrt(np.asarray(volume, dtype=np.float64) * 6 / np.pi))


def near(mask: npt.NDArray[Any], margin_mm: float, spacing_irc: Triple) -> npt.NDArray[np.bool_]:
    """A mask grown by a margin: a box of whole voxels about each of its voxels, rounded up.

    A nodule on the lung's wall is no lung to a lung mask, so what is near a lung counts as lung here. A box is three
    passes of a running maximum, each a small part of a distance transform.
    """
    grown = (np.asarray(mask) != 0).view(np.uint8)
    for axis, step in enumerate(spacing_irc):
        size = 2 * int(np.ceil(margin_mm / step - 1e-9)) + 1
        if size > 1:
            grown = ndimage.maximum_filter1d(grown, size, axis=axis, mode="constant", cval=0)
    return np.asarray(grown.astype(bool))


def group(
    probability: npt.NDArray[Any],
    spacing_irc: Triple,
    options: GroupingOptions | None = None,
    near_lungs: npt.NDArray[np.bool_] | None = None,
    hu: npt.NDArray[Any] | None = None,
    start_irc: tuple[int, int, int] = (0, 0, 0),
) -> Candidates:
    """Group the voxels of a box of a scan.

    Parameters
    ----------
    probability : ndarray, (slices, rows, columns), float
        0 to 1.
    spacing_irc : tuple of 3 float
        Millimetres along slice, row, column.
    options : GroupingOptions, optional
    near_lungs : ndarray of bool, the same shape, optional
        Where candidates may lie, see `near`; None is everywhere.
    hu : ndarray, the same shape, optional
        HU, needed where intensity weighs.
    start_irc : tuple of 3 int
        First voxel of the box in the scan.

    Raises
    ------
    UsageError
        Intensity is to weigh, and there are no HU.
    """
    options = options or GroupingOptions()
    if hu is None and options.weight in ("intensity", "both"):
        message = f"the centres are to be weighted by {options.weight}, and there are no HU. Give hu, or another weight"
        raise UsageError(message)
    mask = probability >= options.threshold
    if near_lungs is not None:
        mask &= near_lungs
    mask = _eaten(mask, options)
    labels: Labels
    labels, number = ndimage.label(mask, output=np.int32)
    num_voxels, num_components = int(np.count_nonzero(mask)), number
    if options.split_below:
        number = _split(labels, number, probability, np.array(spacing_irc), options)
    sums = _component_sums(labels, number, probability, hu, options.weight)
    voxel_mm3 = float(np.prod(spacing_irc))
    diameter = sphere_diameter(sums.voxels * voxel_mm3)
    small, large = diameter < options.min_diameter_mm, diameter > options.max_diameter_mm
    rows = np.flatnonzero(~small & ~large)
    merged_into = _merge(sums.of(rows), np.array(spacing_irc), voxel_mm3, options.merge_mm)
    sums, num_merged = _merged(sums.of(rows), merged_into), len(rows) - int(merged_into.max(initial=-1) + 1)
    compactness = _compactness(sums.voxels, sums.last - sums.first, np.array(spacing_irc))
    rank = sums.highest * compactness * np.minimum(sphere_diameter(sums.voxels * voxel_mm3) / RANK_MM, 1.0)
    order = np.lexsort([-sums.probability, -rank])
    kept = order[: options.limit]
    new_number = np.zeros(len(order), dtype=np.int32)
    new_number[kept] = np.arange(1, len(kept) + 1)
    lookup = np.zeros(number + 1, dtype=np.int32)
    lookup[rows + 1] = new_number[merged_into]
    chosen = sums.of(kept)
    counts = GroupCounts(
        num_voxels, num_components, number - num_components, int(small.sum()), int(large.sum()), num_merged,
        len(order) - len(kept), len(kept),
    )  # fmt: skip
    return Candidates(
        chosen.center + np.array(start_irc, dtype=np.float64),
        chosen.voxels,
        (chosen.voxels * voxel_mm3).astype(np.float64),
        chosen.highest,
        chosen.probability / np.maximum(chosen.voxels, 1),
        compactness[kept],
        rank[kept],
        lookup[labels],
        start_irc,
        counts,
    )


def _eaten(mask: npt.NDArray[np.bool_], options: GroupingOptions) -> npt.NDArray[np.bool_]:
    if options.erosion:
        mask = ndimage.binary_erosion(mask, iterations=options.erosion)
    if options.opening:
        mask = ndimage.binary_opening(mask, iterations=options.opening)
    return mask


def _component_sums(
    labels: Labels, number: int, probability: npt.NDArray[Any], hu: npt.NDArray[Any] | None, weight: Weight
) -> _Sums:
    """Sums over the voxels of each component; only voxels of components are looked at."""
    flat = np.flatnonzero(labels)
    component = labels.ravel()[flat].astype(np.int64) - 1
    values = probability.ravel()[flat].astype(np.float64)
    weights = np.ones_like(values) if weight in ("none", "intensity") else values
    if hu is not None and weight in ("intensity", "both"):
        low, high = HU_WINDOW
        weights = weights * (np.clip(hu.ravel()[flat].astype(np.float64), low, high) - low + 1.0)
    index = np.unravel_index(flat, labels.shape)
    highest = np.zeros(number)
    np.maximum.at(highest, component, values)
    moment = [np.bincount(component, weights * axis, number) for axis in index]
    return _Sums(
        np.bincount(component, minlength=number).astype(np.int64),
        highest,
        _totals(component, values, number),
        _totals(component, weights, number),
        np.stack(moment, axis=1) if number else np.empty((0, 3)),
        *_bounds(labels),
    )


def _bounds(labels: Labels) -> tuple[Ints, Ints]:
    """First and last voxel of each component along each axis, (n, 3)."""
    boxes = ndimage.find_objects(labels)
    first = np.array([[side.start for side in box] for box in boxes], dtype=np.int64).reshape(-1, 3)
    last = np.array([[side.stop - 1 for side in box] for box in boxes], dtype=np.int64).reshape(-1, 3)
    return first, last


def _compactness(voxels: npt.ArrayLike, span: Ints, spacing: Floats) -> Floats:
    """See `Candidates`; `span` is the last less the first voxel along each axis, (n, 3)."""
    voxel_mm3 = float(np.prod(spacing))
    longest = (span * spacing).max(axis=-1, initial=0.0) + np.cbrt(voxel_mm3)
    return np.asarray(np.minimum(sphere_diameter(np.asarray(voxels) * voxel_mm3) / longest, 1.0))


def _split(
    labels: Labels, number: int, probability: npt.NDArray[Any], spacing: Floats, options: GroupingOptions
) -> int:
    """Take components that are not compact apart, in place, at ever higher thresholds; returns the new number.

    What is no piece of its own at a higher threshold is left out of the pieces. A component of which no piece is large
    enough stays as it is.
    """
    lowest = np.log(options.threshold / max(1 - options.threshold, 1e-6))
    levels = 1 / (1 + np.exp(-(lowest + np.arange(1, SPLIT_LEVELS + 1) * SPLIT_STEP)))
    voxel_mm3 = float(np.prod(spacing))
    todo = [(k + 1, box, 0) for k, box in enumerate(ndimage.find_objects(labels))]
    while todo:
        label, box, level = todo.pop()
        part = labels[box]
        inside = part == label
        span = np.array(inside.shape) - 1
        is_compact = _compactness(np.count_nonzero(inside), span, spacing) >= options.split_below
        if is_compact or level == SPLIT_LEVELS:
            continue
        pieces, count = ndimage.label(inside & (probability[box] >= levels[level]))
        sizes = sphere_diameter(np.bincount(pieces.ravel(), minlength=count + 1)[1:] * voxel_mm3)
        large = np.flatnonzero(sizes >= max(options.min_diameter_mm, 1e-9))
        if not large.size:
            continue
        part[inside] = 0
        boxes = ndimage.find_objects(pieces)
        for k in large:
            own = label if k == large[0] else number + 1
            number = max(number, own)
            part[pieces == k + 1] = own
            inner = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(box, boxes[k], strict=True))
            todo.append((own, inner, level + 1))
    return number


def _merge(sums: _Sums, spacing: Floats, voxel_mm3: float, merge_mm: float) -> Ints:
    """Number of the candidate each component goes to, (n,), counted from 0 in the order of their first components."""
    number = len(sums.voxels)
    if number < 2:
        return np.zeros(number, dtype=np.int64)
    places = sums.center * spacing
    tree = cKDTree(places)
    pairs = [tree.query_pairs(merge_mm, output_type="ndarray")] if merge_mm > 0 else []
    radius = sphere_diameter(sums.voxels * voxel_mm3) / 2
    for k in np.flatnonzero(radius > merge_mm):
        others = np.array(tree.query_ball_point(places[k], radius[k]), dtype=np.int64)
        pairs.append(np.stack([np.full_like(others, k), others], axis=1))
    one, other = np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs]).T
    graph = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(number, number))
    _, into = connected_components(graph, directed=False)
    _, first = np.unique(into, return_index=True)
    return np.asarray(np.argsort(np.argsort(first))[into], dtype=np.int64)


def _totals(group: Ints, values: Floats, number: int) -> Floats:
    return np.bincount(group, values, number).astype(np.float64)


def _merged(sums: _Sums, into: Ints) -> _Sums:
    number = int(into.max(initial=-1)) + 1
    highest = np.zeros(number)
    np.maximum.at(highest, into, sums.highest)
    moment = [np.bincount(into, sums.moment[:, axis], number) for axis in range(3)]
    first, last = np.full((number, 3), np.iinfo(np.int64).max), np.zeros((number, 3), dtype=np.int64)
    np.minimum.at(first, into, sums.first)
    np.maximum.at(last, into, sums.last)
    return _Sums(
        np.bincount(into, sums.voxels, number).astype(np.int64),
        highest,
        _totals(into, sums.probability, number),
        _totals(into, sums.weight, number),
        np.stack(moment, axis=1) if number else np.empty((0, 3)),
        first,
        last,
    )


def _require(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        message = f"grouping: {name} is {got}, expected {expected}"
        raise UsageError(message)
