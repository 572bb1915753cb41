"""With a ground truth: which nodules were found, at which step the others were lost, and the challenge's score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep.geometry import Geometry
from lunatrain.detect.findings import ScanResult, all_candidates
from lunatrain.detect.segmenting import Lungs
from lunatrain.froc import FrocResult, evaluate_froc
from lunatrain.marks import pairs_within_radius, radius_of, xyz_of
from lunatrain.metrics import without_nan

FOUND, REJECTED, GROUPED_AWAY, NOT_SEGMENTED = "found", "rejected", "grouped_away", "not_segmented"
OUTSIDE_LUNGS, OUTSIDE_SCAN, SCAN_FAILED = "outside_lungs", "outside_scan", "scan_failed"
FATES = {
    FOUND: "found: a finding hits it",
    REJECTED: "rejected: a candidate hits it, its probability is below the threshold",
    GROUPED_AWAY: "grouped away: voxels of it were segmented, no candidate hits it (size, merging, limit)",
    NOT_SEGMENTED: "not segmented: no voxel of it reached the segmentation's threshold",
    OUTSIDE_LUNGS: "outside the lungs: the lung mask and its margin do not reach it",
    OUTSIDE_SCAN: "outside the scan: its centre is no voxel of the scan",
    SCAN_FAILED: "its scan failed",
}
"""Where a nodule can get lost, in the order of the reverse pipeline, in words."""

TARGET_MM = 5.0
"""Nodules from this diameter on are also counted alone."""


@dataclass(frozen=True, eq=False)
class Truth:
    """Findings held against annotations.

    Attributes
    ----------
    nodules : DataFrame
        Annotations of the scans searched, with `fate`, and `probability` of the best candidate that hits (NaN).
    froc : FrocResult
        Over the scans that did not fail, all candidates as marks.
    warnings : tuple of str
    """

    nodules: pd.DataFrame
    froc: FrocResult
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Flat object of figures."""
        fates, searched = self.nodules["fate"], self.nodules["fate"] != SCAN_FAILED
        is_hit = fates.isin([FOUND, REJECTED])
        large = self.nodules["diameter_mm"] >= TARGET_MM
        scans = self.froc.counts.num_scans
        per_scan = self.froc.marks.groupby("series_uid").size()
        figures = {
            **self.froc.to_json(),
            "warnings": list(self.warnings),
            **{f"fate_{name}": int((fates == name).sum()) for name in FATES},
            "num_nodules_5mm": int((searched & large).sum()),
            "sensitivity_candidates": _ratio(is_hit.sum(), searched.sum()),
            "sensitivity_candidates_5mm": _ratio((is_hit & large).sum(), (searched & large).sum()),
            "sensitivity_findings": _ratio((fates == FOUND).sum(), searched.sum()),
            "candidates_per_scan": _ratio(len(self.froc.marks), scans),
            "candidates_per_scan_most": int(per_scan.max()) if len(per_scan) else 0,
        }
        return without_nan(figures)


def nodule_fates(
    nodules: pd.DataFrame,
    geometry: Geometry,
    lungs: Lungs,
    is_segmented: npt.NDArray[np.bool_],
    table: pd.DataFrame,
) -> pd.DataFrame:
    """What became of each nodule of one scan.

    Parameters
    ----------
    nodules : DataFrame
        `x_mm`, `y_mm`, `z_mm`, `diameter_mm`.
    geometry : Geometry
        Of the scan.
    lungs : Lungs
    is_segmented : ndarray of bool, as large as the lungs' box
        Whether a voxel reached the segmentation's threshold.
    table : DataFrame
        The scan's candidates, see `lunatrain.detect.findings`.

    Returns
    -------
    DataFrame
        The nodules with `fate` and `probability`.
    """
    xyz, radius = xyz_of(nodules), radius_of(nodules)
    same = np.zeros(len(table), dtype=np.int64), np.zeros(len(nodules), dtype=np.int64)
    mark, nodule = pairs_within_radius(xyz_of(table), same[0], xyz, same[1], radius)
    probability = np.full(len(nodules), np.nan)
    np.fmax.at(probability, nodule, table["probability"].to_numpy(dtype=np.float64)[mark])
    is_called = np.zeros(len(nodules), dtype=bool)
    np.logical_or.at(is_called, nodule, table["is_finding"].to_numpy(dtype=bool)[mark])
    fates = []
    for k in range(len(nodules)):
        if is_called[k]:
            fates.append(FOUND)
        elif not np.isnan(probability[k]):
            fates.append(REJECTED)
        else:
            fates.append(_how_lost(xyz[k], float(radius[k]), geometry, lungs, is_segmented))
    return nodules.assign(fate=fates, probability=probability)


def hold_against(
    results: Sequence[ScanResult],
    fates: Sequence[pd.DataFrame],
    annotations: pd.DataFrame,
    excluded: pd.DataFrame | None,
) -> Truth:
    """Score all scans together.

    Parameters
    ----------
    results : sequence of ScanResult
        At least one that did not fail.
    fates : sequence of DataFrame
        `nodule_fates` of each scan that did not fail.
    annotations, excluded : DataFrame
        As `lunatrain.marks.read_annotations` gives them, of any scans.
    """
    done = [result.series_uid for result in results if result.reason is None]
    failed = [result.series_uid for result in results if result.reason is not None]
    warnings = []
    ours = annotations[annotations["series_uid"].isin(done)]
    lost = annotations[annotations["series_uid"].isin(failed)]
    if not annotations["series_uid"].isin([*done, *failed]).any() and len(annotations):
        other = annotations["series_uid"].iloc[0]
        warnings.append(
            f"the annotations name none of the scans: theirs is such as {other!r}, searched was {done[0]!r}"
        )
    if len(failed):
        warnings.append(f"{len(failed)} failed scans with {len(lost)} nodules are not part of FROC and CPM")
    marks = all_candidates(results)
    froc = evaluate_froc(marks, ours, excluded, done)
    nodules = pd.concat([*fates, lost.assign(fate=SCAN_FAILED, probability=np.nan)], ignore_index=True)
    return Truth(nodules, froc, (*warnings, *froc.warnings))


def _how_lost(
    xyz: npt.NDArray[np.float64],
    radius_mm: float,
    geometry: Geometry,
    lungs: Lungs,
    is_segmented: npt.NDArray[np.bool_],
) -> str:
    """Why no candidate hits a nodule."""
    center = geometry.xyz_to_irc(xyz)
    if not geometry.contains_irc(np.rint(center)):
        return OUTSIDE_SCAN
    first = np.array(lungs.start_irc)
    reach = radius_mm / np.array(geometry.spacing_irc)
    low = np.maximum(np.minimum(np.ceil(center - reach), np.rint(center)).astype(np.int64) - first, 0)
    high = np.maximum(np.floor(center + reach), np.rint(center)).astype(np.int64) + 1 - first
    window = tuple(slice(a, max(a, b)) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    near = lungs.near[window]
    index = np.stack(np.meshgrid(*(np.arange(n) for n in near.shape), indexing="ij"), axis=-1) + low + first
    off = (index - center) * np.array(geometry.spacing_irc)
    inside = ((off**2).sum(axis=-1) < radius_mm**2) | (index == np.rint(center)).all(axis=-1)
    if not (near & inside).any():
        return OUTSIDE_LUNGS
    return GROUPED_AWAY if (is_segmented[window] & inside).any() else NOT_SEGMENTED


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")
