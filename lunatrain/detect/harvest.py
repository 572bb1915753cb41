"""Hard negatives: the detector's own false positives as a candidates file, for the next training of the classifier."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lunatrain.detect.truth import Truth
from lunatrain.errors import TableError
from lunatrain.froc import FALSE_POSITIVE
from lunatrain.marks import pairs_within_radius, radius_of, xyz_of

HEADER = "seriesuid,coordX,coordY,coordZ,class"
SAME_MM = 1.0
"""A false positive nearer than this to a candidate already in the file is that candidate."""

CLEAR_RADII, CLEAR_MM = 2.0, 5.0
"""A false positive within so many radii, or mm, of a nodule's centre is left out: a crop there shows the nodule, and
calling it none would teach nonsense."""


@dataclass(frozen=True)
class Harvest:
    """What was written: rows taken over, false positives added, and those left out (known already, by a nodule)."""

    kept: int
    added: int
    known: int
    beside_nodule: int


def write_harvest(truth: Truth, path: Path, candidates: Path | None = None) -> Harvest:
    """Write the false positives of a run as LUNA16's candidates.csv, class 0.

    Parameters
    ----------
    truth : Truth
        All candidates count, however improbable: so a classifier meets in training what it will meet.
    path : Path
        File to write.
    candidates : Path, optional
        A candidates file whose lines go in front as they are; without it the file has negatives only.

    Raises
    ------
    TableError
        `candidates` is no such file.
    """
    lines, known = (
        (_read(candidates)) if candidates else ([], pd.DataFrame(columns=["series_uid", "x_mm", "y_mm", "z_mm"]))
    )
    marks = truth.froc.marks
    wrong = marks[marks["verdict"] == FALSE_POSITIVE]
    nodules = truth.nodules
    is_beside = _within(wrong, nodules, np.maximum(radius_of(nodules) * CLEAR_RADII, CLEAR_MM))
    is_known = _within(wrong, known, np.full(len(known), SAME_MM))
    fresh = wrong[~is_beside & ~is_known]
    for uid, x, y, z in zip(fresh["series_uid"], *xyz_of(fresh).T.round(4).tolist(), strict=True):
        lines.append(f"{uid},{x!r},{y!r},{z!r},0")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join([HEADER, *lines, ""]), encoding="utf-8")
    partial.replace(path)
    return Harvest(len(lines) - len(fresh), len(fresh), int((is_known & ~is_beside).sum()), int(is_beside.sum()))


def _read(path: Path) -> tuple[list[str], pd.DataFrame]:
    """Rows of a candidates file as text, and their places."""
    try:
        rows = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read: {error}. Give a candidates file of LUNA16"
        raise TableError(message) from error
    if not rows or rows[0].replace(" ", "") != HEADER:
        got = rows[0][:80] if rows else ""
        message = f"{path}: its first line is {got!r}, expected {HEADER}. Give a candidates file of LUNA16"
        raise TableError(message)
    fields = [line.split(",") for line in rows[1:]]
    try:
        places = [[float(value) for value in row[1:4]] for row in fields]
        if any(len(row) != 5 for row in fields):
            raise ValueError
    except ValueError as error:
        message = f"{path}: a row is no series id, three numbers and a class. Mend it"
        raise TableError(message) from error
    table = pd.DataFrame(places, columns=["x_mm", "y_mm", "z_mm"], dtype="float64")
    return rows[1:], table.assign(series_uid=[row[0].strip() for row in fields])


def _within(marks: pd.DataFrame, places: pd.DataFrame, radius_mm: np.ndarray) -> np.ndarray:
    """Whether each mark lies within the radius of any place of its scan, (n,) bool."""
    found = np.zeros(len(marks), dtype=bool)
    if len(marks) and len(places):
        uids = pd.Index(marks["series_uid"].unique())
        numbers = [uids.get_indexer(pd.Index(table["series_uid"])).astype(np.int64) for table in (marks, places)]
        mark, _ = pairs_within_radius(xyz_of(marks), numbers[0], xyz_of(places), numbers[1], radius_mm)
        found[mark] = True
    return found
