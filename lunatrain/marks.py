"""Marks of a detector, and the tables they are held against: reading, matching, and what can be wrong with them.

Each row counts for the score, so a row that cannot be read is an error of the file, not left out. Series ids are
text, whatever they look like. Numbers are read as Python reads them, exactly.
"""

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunatrain.errors import TableError, UsageError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MARK_COLUMNS = {"seriesuid": "series_uid", "coordX": "x_mm", "coordY": "y_mm", "coordZ": "z_mm"}
"""LUNA16's names of what every table has, and ours."""

XYZ = ("x_mm", "y_mm", "z_mm")

MAX_MARKS = 100
"""A scan's marks that count."""

UNKNOWN_DIAMETER_MM = 10.0
PAIRS_AT_ONCE = 1 << 19

FEW = 0.2
"""No greater share of nodules found makes the coordinates suspect."""

ONE_FOLD = 0.2
"""Marks in no greater share of the scans look like one fold of a cross-validation."""

MAX_ABS_MM = 1e5
"""A coordinate beyond 100 m is a fault of the file, not a place in a patient."""


def read_marks(path: Path) -> pd.DataFrame:
    """Read a submission; further columns than the challenge's are left out.

    Returns
    -------
    DataFrame
        `series_uid`, `x_mm`, `y_mm`, `z_mm` and `probability`, in file order; no rows where the file has only
        its header.

    Raises
    ------
    TableError
        Not such a table, or a row of it cannot be used.
    """
    return _read_table(path, "probability")


def read_annotations(path: Path) -> pd.DataFrame:
    """Read annotations.csv or annotations_excluded.csv; a negative diameter stands for an unknown one.

    Returns
    -------
    DataFrame
        `series_uid`, `x_mm`, `y_mm`, `z_mm` and `diameter_mm`, in file order.

    Raises
    ------
    TableError
        Not such a table, or a row of it cannot be used.
    """
    return _read_table(path, "diameter_mm")


def read_series_uids(path: Path) -> tuple[str, ...]:
    """Read seriesuids.csv: one series id a line, with or without a header.

    Raises
    ------
    TableError
        No ids, or an id that is listed twice.
    """
    lines: dict[str, int] = {}
    for line, row in _rows(path):
        uid = row[0].strip()
        if not lines and uid.lower() in ("seriesuid", "series_uid"):
            continue
        if uid in lines:
            message = f"{path}, line {line}: {uid} is on line {lines[uid]} already, expected each scan once. Remove one"
            raise TableError(message)
        lines[uid] = line
    if not lines:
        message = f"{path} lists no scans, expected one series id a line. Give the challenge's seriesuids.csv"
        raise TableError(message)
    return tuple(lines)


def check_series(marks: pd.DataFrame, annotations: pd.DataFrame, series_uids: Sequence[str]) -> list[str]:
    """Hold the series ids of marks and annotations against the scans to be evaluated.

    Returns
    -------
    list of str
        Warnings, a line each.

    Raises
    ------
    UsageError
        Ids that are no text, scans listed twice, or none of the ids is among the scans.
    """
    listed = set(series_uids)
    if len(listed) != len(series_uids) or not listed:
        message = f"{len(series_uids)} scans are listed, {len(listed)} different ones; expected each once, and some"
        raise UsageError(message)
    warnings = []
    for name, table in (("marks", marks), ("annotations", annotations)):
        uids = _ids(table["series_uid"], name)
        strangers = [uid for uid in uids if uid not in listed]
        if not strangers:
            continue
        sample = f"{strangers[0]!r}, listed is {series_uids[0]!r}{_how_ids_differ(strangers, listed)}"
        if len(strangers) == len(uids):
            message = f"none of the {name} is in a listed scan: a series id of theirs is {sample}. Mend the ids"
            raise UsageError(message)
        if name == "marks":
            rows = int(table["series_uid"].isin(strangers).sum())
            warnings.append(
                f"{rows} marks of {len(strangers)} scans that are not listed are left out, such as {sample}"
            )
    return warnings + _check_folds(len(listed.intersection(marks["series_uid"])), len(listed))


def check_columns(name: str, table: pd.DataFrame, value: str) -> None:
    """Raise `UsageError` where a table lacks a column, or has a place or value that is no finite number."""
    missing = [column for column in ("series_uid", *XYZ, value) if column not in table]
    if missing:
        message = f"{name} has no column {', '.join(missing)} (it has {', '.join(map(str, table))}). Rename or add it"
        raise UsageError(message)
    for column in (*XYZ, value):
        wrong = ~np.isfinite(table[column].to_numpy(dtype=np.float64))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            got = table[column].iloc[row]
            message = f"{name}: {column} is {got} in row {row} ({wrong.sum()} such rows), expected a finite number"
            raise UsageError(message)


def check_repeats(marks: pd.DataFrame) -> list[str]:
    """Warn of marks that are there twice: one that hits is ignored, one that misses is one more false positive."""
    repeats = int(marks.duplicated().sum())
    if not repeats:
        return []
    return [f"{repeats} marks are there twice or more, at the same place with the same probability; each counts"]


def check_places(
    marks: pd.DataFrame, nodules: pd.DataFrame, scan_of_mark: Ints, scan_of_nodule: Ints, num_found: int
) -> list[str]:
    """Warn where few nodules are found, and the same places read another way would find more."""
    num_nodules = int(np.isin(scan_of_nodule, scan_of_mark).sum())
    if num_found > FEW * num_nodules or not num_nodules:
        return []
    xyz = xyz_of(marks)
    readings = {
        "with z, y, x in the columns x, y, z": xyz[:, ::-1],
        "with the other sign of x and y (RAS, expected LPS)": xyz * (-1.0, -1.0, 1.0),
    }
    for how, others in readings.items():
        _, hit = pairs_within_radius(others, scan_of_mark, xyz_of(nodules), scan_of_nodule, radius_of(nodules))
        number = np.unique(hit).size
        if number > max(2 * num_found, FEW * num_nodules):
            return [f"{num_found} nodules are hit, but {number} would be {how}; check the coordinates"]
    if len(xyz) > 1 and not num_found and (xyz >= 0).all() and (xyz == np.floor(xyz)).all():
        return ["no nodule is hit, and all coordinates are whole numbers from 0 up: voxel indices? Expected mm, LPS"]
    return []


def within_limit(scan: Ints, scores: Floats) -> Bools:
    """Which marks are of a listed scan and among its 100; of a crowded scan those above the 101st highest.

    Parameters
    ----------
    scan : ndarray, (n,)
        Number of each mark's scan; below 0 is none.
    scores : ndarray, (n,)
        Probabilities.
    """
    order = np.lexsort([-scores, scan])
    sorted_scan = scan[order]
    starts = np.searchsorted(sorted_scan, sorted_scan)
    crowded = np.searchsorted(sorted_scan, sorted_scan, side="right") - starts > MAX_MARKS
    limit = scores[order][np.minimum(starts + MAX_MARKS, max(len(order) - 1, 0))]
    kept = np.empty(len(scan), dtype=bool)
    kept[order] = (sorted_scan >= 0) & (~crowded | (scores[order] > limit))
    return kept


def xyz_of(table: pd.DataFrame) -> Floats:
    """Centres, (n, 3) mm."""
    return table[list(XYZ)].to_numpy(dtype=np.float64)


def radius_of(table: pd.DataFrame) -> Floats:
    """Radii in mm; of an unknown (negative) diameter half of `UNKNOWN_DIAMETER_MM`."""
    diameter = table["diameter_mm"].to_numpy(dtype=np.float64)
    return np.where(diameter < 0, UNKNOWN_DIAMETER_MM, diameter) / 2


def pairs_within_radius(
    mark_xyz: Floats, scan_of_mark: Ints, finding_xyz: Floats, scan_of_finding: Ints, radius: Floats
) -> tuple[Ints, Ints]:
    """Pairs of mark and finding in one scan that are less than the finding's radius apart.

    Parameters
    ----------
    mark_xyz, finding_xyz : ndarray, (n, 3), (m, 3)
        Centres in mm.
    scan_of_mark, scan_of_finding : ndarray, (n,), (m,)
        Numbers of the scans; below 0 is none.
    radius : ndarray, (m,)
        Of the findings, mm.

    Returns
    -------
    mark, finding : ndarray, (k,)
        Rows.
    """
    order = np.argsort(scan_of_mark, kind="stable")
    sorted_scan = scan_of_mark[order]
    starts = np.searchsorted(sorted_scan, scan_of_finding)
    lengths = np.searchsorted(sorted_scan, scan_of_finding, side="right") - starts
    lengths[scan_of_finding < 0] = 0
    hits: list[tuple[Ints, Ints]] = []
    blocks = np.cumsum(lengths) // PAIRS_AT_ONCE
    for block in np.unique(blocks):
        findings = np.flatnonzero((blocks == block) & (lengths > 0))
        length = lengths[findings]
        finding = np.repeat(findings, length)
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        mark = order[np.repeat(starts[findings], length) + within]
        offset = mark_xyz[mark] - finding_xyz[finding]
        squared = offset[:, 0] ** 2 + offset[:, 1] ** 2 + offset[:, 2] ** 2
        near = squared < radius[finding] ** 2
        hits.append((mark[near], finding[near]))
    none = np.empty(0, dtype=np.int64)
    return (
        np.concatenate([none, *(mark for mark, _ in hits)]),
        np.concatenate([none, *(finding for _, finding in hits)]),
    )


def _check_folds(num_marked: int, num_scans: int) -> list[str]:
    """Warn where most scans have no mark."""
    if not 0 < num_marked < num_scans / 2:
        return []
    guess = "one fold" if num_marked <= ONE_FOLD * num_scans else "a part of the folds"
    return [
        f"marks in {num_marked} of {num_scans} scans: looks like {guess}; evaluate with the seriesuids of what was "
        "predicted, or concatenate the submissions of all ten folds"
    ]


def _ids(column: "pd.Series[str]", name: str) -> list[str]:
    uids = list(column.unique())
    for uid in uids:
        if not isinstance(uid, str):
            message = f"{name}: series_uid is {uid} ({type(uid).__name__}), expected text. Read the ids with dtype=str"
            raise UsageError(message)
    return uids


def _how_ids_differ(strangers: Sequence[str], listed: set[str]) -> str:
    """What may have happened to the ids, as a clause; empty where nothing is known."""
    bare = {uid.lstrip("0") for uid in listed}
    for uid in strangers:
        if uid not in bare and re.fullmatch(r"[0-9]\.?[0-9]*[eE]\+?[0-9]+", uid):
            return " (the ids were read as numbers somewhere: keep them as text)"
        if re.sub(r"\.0*$", "", uid).lstrip("0") in bare:
            return " (leading zeros or '.0' differ: the ids were read as numbers somewhere, keep them as text)"
        if re.sub(r"\.(mhd|mha|raw|nii|gz|npy|npz)\b", "", uid.replace("\\", "/").split("/")[-1]) in listed:
            return " (these are file names: leave folder and ending away)"
    return ""


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Lines of a CSV file with their numbers, from 1, without the blank ones."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            return [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text (byte {error.start}), expected a CSV file. Save it as CSV in UTF-8"
        raise TableError(message) from error
    except csv.Error as error:
        message = f"{path} cannot be read as CSV: {error}. Write it again"
        raise TableError(message) from error


def _read_table(path: Path, value: str) -> pd.DataFrame:
    """Read series ids, places in mm, and one column more."""
    rows = _rows(path)
    expected = [*MARK_COLUMNS, value]
    if not rows:
        message = f"{path} is empty, expected at least the header {','.join(expected)}"
        raise TableError(message)
    header = [name.strip() for name in rows[0][1]]
    _check_header(path, header, expected)
    for line, row in rows[1:]:
        if len(row) != len(header):
            message = f"{path}, line {line}: {len(row)} fields, expected {len(header)} as in the header. Mend the line"
            raise TableError(message)
    lines = [line for line, _ in rows[1:]]
    places = [header.index(name) for name in expected]
    uids, *columns = ([row[place] for _, row in rows[1:]] for place in places)
    frame: dict[str, Any] = {"series_uid": pd.Series([uid.strip() for uid in uids], dtype="str")}
    _check_values(path, lines, "seriesuid", uids, [not uid for uid in frame["series_uid"]], "a series id")
    for name, texts in zip(expected[1:], columns, strict=True):
        limit = MAX_ABS_MM if name in MARK_COLUMNS else math.inf
        numbers = _numbers(texts)
        wrong = (~(np.isfinite(numbers) & (np.abs(numbers) <= limit))).tolist()
        _check_values(path, lines, name, texts, wrong, "a number of mm" if limit < math.inf else "a finite number")
        frame[MARK_COLUMNS.get(name, name)] = pd.Series(numbers, dtype="float64")
    return pd.DataFrame(frame)


def _check_header(path: Path, header: list[str], expected: list[str]) -> None:
    missing = [name for name in expected if name not in header]
    repeated = [name for name in expected if header.count(name) > 1]
    if not missing and not repeated:
        return
    got, wanted = ",".join(header)[:100], ",".join(expected)
    if len(header) == 1 and re.search(r"[;\t]", header[0]):
        what = "is not separated by commas"
    elif any(math.isfinite(_number(name)) for name in header[1:]):
        what = "has no header line"
    else:
        what = f"has no column {', '.join(missing)}" if missing else f"has the column {repeated[0]} twice"
    message = f"{path} {what}: its first line is {got!r}, expected {wanted}. Write it so"
    raise TableError(message)


def _number(text: str) -> float:
    """NaN where the text is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _numbers(texts: list[str]) -> Floats:
    try:
        return np.array(list(map(float, texts)), dtype=np.float64)
    except ValueError:
        return np.array([_number(text) for text in texts], dtype=np.float64)


def _check_values(path: Path, lines: list[int], name: str, texts: list[str], wrong: list[bool], expected: str) -> None:
    """Raise for the first of the wrong values, with how many there are."""
    if not any(wrong):
        return
    first = wrong.index(True)
    others = f" ({sum(wrong) - 1} more such lines)" if sum(wrong) > 1 else ""
    got = texts[first][:40]
    message = (
        f"{path}, line {lines[first]}: {name} is {got!r}, expected {expected}{others}. Mend or remove what is wrong"
    )
    raise TableError(message)
