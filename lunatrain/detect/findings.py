"""Candidates and findings of scans as tables and files: findings.csv, findings.json.

A *candidate* is what segmentation and grouping give; a *finding* is a candidate whose nodule probability reaches the
threshold. findings.csv has all candidates, so that it is a submission to LUNA16 (`lunatrain froc`), with the findings
marked; nothing is left out because it is improbable.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep.geometry import Geometry
from lunatrain.detect.grouping import Candidates, GroupCounts
from lunatrain.marks import MARK_COLUMNS, XYZ

FINDINGS_CSV, FINDINGS_JSON = "findings.csv", "findings.json"
COLUMNS = (
    "series_uid", *XYZ, "probability", "malignancy", "diameter_mm", "index", "row", "col", "is_finding", "number",
    "volume_mm3", "num_voxels", "segmentation_score", "classifier_probability",
)  # fmt: skip
DIAMETER_NOTE = (
    "diameters are estimates: those of spheres of the segmented volume; they are too large where a vessel or the wall "
    "was taken in, too small where the finding was taken off one"
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ScanResult:
    """What became of one scan.

    Attributes
    ----------
    series_uid, file : str
    reason : str or None
        Why the scan failed; None where it did not.
    table : DataFrame
        Candidates, the most probable first, with `COLUMNS`; `number` counts from 1.
    shape_irc, spacing : tuple
        Slices, rows, columns; millimetres per column, row, slice.
    lung_ml : float
    counts : GroupCounts or None
    stages_s : dict of str to float
        Seconds of each stage.
    notes : tuple of str
    patient_score : float
        See `patient_score`.
    searched_box : dict or None
        What the search was bounded to, where it was; see `lunatrain.detect.bounding`.
    """

    series_uid: str
    file: str
    reason: str | None = None
    table: pd.DataFrame = field(default_factory=lambda: empty_table())
    shape_irc: tuple[int, int, int] = (0, 0, 0)
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    lung_ml: float = math.nan
    counts: GroupCounts | None = None
    stages_s: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    patient_score: float = math.nan
    searched_box: Mapping[str, Any] | None = None

    @property
    def findings(self) -> pd.DataFrame:
        """Rows of the table that reach the threshold."""
        return self.table[self.table["is_finding"].astype(bool)]

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is unknown is None."""
        rows = [{name: _plain(value) for name, value in row.items()} for row in self.table.to_dict("records")]
        return {
            "series_uid": self.series_uid,
            "file": self.file,
            "status": "ok" if self.reason is None else "failed",
            "reason": self.reason,
            "patient_score": _plain(self.patient_score),
            "num_findings": sum(bool(row["is_finding"]) for row in rows),
            "num_candidates": len(rows),
            "shape_irc": list(self.shape_irc),
            "spacing": list(self.spacing),
            "lung_ml": _plain(self.lung_ml),
            "searched_box": dict(self.searched_box) if self.searched_box else None,
            "grouping": asdict(self.counts) if self.counts else None,
            "stages_s": {name: round(value, 4) for name, value in self.stages_s.items()},
            "notes": list(self.notes),
            "findings": [row for row in rows if row["is_finding"]],
            "other_candidates": [row for row in rows if not row["is_finding"]],
        }


def candidate_table(
    series_uid: str,
    candidates: Candidates,
    geometry: Geometry,
    probability: Floats,
    threshold: float,
    classified: Floats | None = None,
) -> pd.DataFrame:
    """Table of a scan's candidates, the most probable first; malignancy is not known yet (NaN).

    Parameters
    ----------
    series_uid : str
    candidates : Candidates
    geometry : Geometry
        Of the scan: gives the places in mm, LPS.
    probability : ndarray, (n,)
        Of being a nodule.
    threshold : float
        From which probability on a candidate is a finding.
    classified : ndarray, (n,), optional
        The classifier's share in it; default the same.
    """
    xyz = geometry.irc_to_xyz(candidates.center_irc).reshape(-1, 3)
    voxel = np.rint(candidates.center_irc).astype(np.int64)
    order = np.lexsort([-candidates.score, -probability])
    columns: dict[str, Any] = {
        "series_uid": pd.Series([series_uid] * len(candidates), dtype="str"),
        **dict(zip(XYZ, xyz.T, strict=True)),
        "probability": probability,
        "malignancy": np.full(len(candidates), np.nan),
        "diameter_mm": candidates.diameter_mm,
        **dict(zip(("index", "row", "col"), voxel.T, strict=True)),
        "is_finding": probability >= threshold,
        "number": np.arange(len(candidates)) + 1,
        "volume_mm3": candidates.volume_mm3,
        "num_voxels": candidates.num_voxels,
        "segmentation_score": candidates.score,
        "classifier_probability": probability if classified is None else classified,
    }
    table = pd.DataFrame(columns).iloc[order]  # the index stays the candidate's place in `candidates`
    return table.assign(number=np.arange(len(table)) + 1)


def empty_table() -> pd.DataFrame:
    """A table of no candidates."""
    texts, whole = ("series_uid",), ("index", "row", "col", "number", "num_voxels")
    kinds = {name: "str" if name in texts else "int64" if name in whole else "float64" for name in COLUMNS}
    return pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in (kinds | {"is_finding": "bool"}).items()})


def patient_score(table: pd.DataFrame, has_malignancy: bool) -> float:
    """The highest malignancy of a finding, where malignancy was asked for, else the highest nodule probability.

    Without a finding (or candidate) it is 0.
    """
    values = table.loc[table["is_finding"].astype(bool), "malignancy"] if has_malignancy else table["probability"]
    return float(values.max()) if len(values) else 0.0


def write_findings(results: Sequence[ScanResult], record: Mapping[str, Any], out: Path) -> None:
    """Write findings.csv and findings.json; `record` is the JSON object."""
    out.mkdir(parents=True, exist_ok=True)
    theirs = {ours: name for name, ours in MARK_COLUMNS.items()}
    whole = all_candidates(results)
    rounded = whole.round(dict.fromkeys((*XYZ, "diameter_mm", "volume_mm3"), 4))
    ready = rounded.assign(is_finding=whole["is_finding"].astype(bool).astype(int)).rename(columns=theirs)
    ready.to_csv(out / FINDINGS_CSV, index=False, lineterminator="\n")
    text = json.dumps(record, indent=2, allow_nan=False)
    (out / FINDINGS_JSON).write_text(text + "\n", encoding="utf-8")


def all_candidates(results: Sequence[ScanResult]) -> pd.DataFrame:
    """The tables of all scans as one, in the scans' order."""
    tables = [result.table for result in results if len(result.table)]
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)] if tables else empty_table()


def _plain(value: Any) -> Any:
    """A value for JSON: Python's own types, None for NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
