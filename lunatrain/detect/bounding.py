"""A box around the lungs from trained networks, to bound the search: slices' boxes joined into one of rows and columns.

A box that leaves lung out would lose nodules in silence. So one wild slice does not count, a wide margin is added, and
the lung mask, which is found without the networks, is the judge: where it disagrees, the scan is searched unbounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lunaprep.geometry import Geometry
from lunatrain.box_slices import chosen_slices, picture_of
from lunatrain.boxes import Floats
from lunatrain.detect.segmenting import Lungs
from lunatrain.localisation import Localiser, find_boxes, load_localiser

SLICE_MM = 5.0
MARGIN_MM = 25.0
"""With it no network, not even one that had seen phantoms alone, left lung of a real scan out: docs/localisation.md."""
MAX_LEFT_OUT = 0.001
"""Share of what is near a lung that a box may leave out; beyond it the box is not believed."""
NEIGHBOURS = 3


@dataclass(frozen=True)
class Bounds:
    """Where a scan was searched.

    Attributes
    ----------
    rows, cols : tuple of int
        First, and past the last.
    share_of_scan : float
        Of the scan's voxels that lie inside.
    left_out : float
        Share of what is near a lung that lies outside.
    is_used : bool
        Whether the search was bounded; not where too much would have been left out.
    margin_mm : float
        What was added on each side.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    share_of_scan: float
    left_out: float
    is_used: bool
    margin_mm: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rows": list(self.rows),
            "cols": list(self.cols),
            "share_of_scan": round(self.share_of_scan, 4),
            "left_out": round(self.left_out, 6),
            "is_used": self.is_used,
            "margin_mm": self.margin_mm,
        }

    @property
    def note(self) -> str:
        """What a reader of the findings must know."""
        if self.is_used:
            return f"searched inside the box of --loc, {100 * self.share_of_scan:.0f} % of the scan; nothing beyond it"
        left_out = f"{100 * self.left_out:.2g} %"
        return f"the box of --loc would leave out {left_out} of the lungs; it was not used, the whole scan was searched"


@dataclass(frozen=True, eq=False)
class Bounding:
    """The networks, and the margin around their box."""

    localisers: tuple[Localiser, ...]
    device: torch.device
    margin_mm: float = MARGIN_MM

    def __str__(self) -> str:
        """Where the networks come from, for the report."""
        names = ", ".join(str(item.path) for item in self.localisers)
        return f"{names}, {self.margin_mm:g} mm around"

    def bound(self, hu: npt.NDArray[Any], geometry: Geometry, lungs: Lungs) -> tuple[Lungs, Bounds]:
        """Restrict what is searched to the box.

        Parameters
        ----------
        hu : ndarray, (slices, rows, columns)
        geometry : Geometry
            Of the scan.
        lungs : Lungs
            What would be searched without.

        Returns
        -------
        lungs : Lungs
            What is to be searched.
        bounds : Bounds
        """
        planes = hu[chosen_slices(len(hu), geometry.spacing_irc[0], SLICE_MM)]
        boxes = find_boxes(self.localisers, lambda side: picture_of(planes, side), self.device)
        x0, y0, x1, y1 = union_of(boxes)
        _, num_rows, num_cols = hu.shape
        rows = _span(y0, y1, num_rows, self.margin_mm / geometry.spacing_irc[1])
        cols = _span(x0, x1, num_cols, self.margin_mm / geometry.spacing_irc[2])
        share = (rows[1] - rows[0]) * (cols[1] - cols[0]) / (num_rows * num_cols)
        inside = _cut(lungs, rows, cols)
        left_out = 1 - int(np.count_nonzero(inside)) / int(np.count_nonzero(lungs.near))
        bounds = Bounds(rows, cols, share, left_out, left_out <= MAX_LEFT_OUT, self.margin_mm)
        return (replace(lungs, near=inside) if bounds.is_used else lungs), bounds


def load_bounding(runs: Sequence[Path], margin_mm: float, device: torch.device) -> Bounding | None:
    """Load the networks of some runs of 'loc'; None where there are none.

    Raises
    ------
    UsageError, CheckpointError
        As `lunatrain.localisation.load_localiser`.
    """
    if not runs:
        return None
    return Bounding(tuple(load_localiser(run, device) for run in runs), device, margin_mm)


def union_of(boxes: Floats) -> Sequence[float]:
    """Box around the boxes of consecutive slices (n, 4), a single slice's whim left out.

    Each side is the outermost of the medians of three neighbours: lungs are as wide in the slices beside, a mistake
    is not.
    """
    if len(boxes) >= NEIGHBOURS:
        boxes = np.median(np.stack([boxes[:-2], boxes[1:-1], boxes[2:]]), axis=0)
    return [*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()]


def _span(low: float, high: float, size: int, margin: float) -> tuple[int, int]:
    """Pixels from `low` to `high` (fractions) and a margin."""
    return max(0, int(np.floor(low * size - margin))), min(size, int(np.ceil(high * size + margin)))


def _cut(lungs: Lungs, rows: tuple[int, int], cols: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """What is near a lung and inside."""
    _, first_row, first_col = lungs.start_irc
    inside = np.zeros_like(lungs.near)
    r = slice(max(0, rows[0] - first_row), max(0, rows[1] - first_row))
    c = slice(max(0, cols[0] - first_col), max(0, cols[1] - first_col))
    inside[:, r, c] = lungs.near[:, r, c]
    return inside
