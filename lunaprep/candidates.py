"""Candidates and annotations: reading the CSV tables, and finding each candidate's nodule.

A bad row costs itself alone: it is reported with its line number and left out. A table that cannot be read
as a whole is a `TableError`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep.csv_rows import CsvRows, RowFault, read_rows

XYZ = ("x_mm", "y_mm", "z_mm")
MAX_ABS_MM = 1e5
"""A coordinate beyond 100 m is a fault of the file, not a place in a patient."""

MAX_DIAMETER_MM = 500.0

MATCH_ROWS = 1 << 18
SORT_ROWS = 1 << 13
"""Rows matched, or sorted, at a time, to stay in the cache."""

_RATINGS = r"(\[[1-5](, ?[1-5])*\])?"
_LUNA16_XYZ = {"coordX": "x_mm", "coordY": "y_mm", "coordZ": "z_mm"}


@dataclass(frozen=True)
class Table:
    """A table as read: its good rows (a ``line`` column says where from) and the faults of the others."""

    frame: pd.DataFrame
    faults: tuple[RowFault, ...]


def read_candidates(path: Path) -> Table:
    """Read candidates.csv or candidates_V2.csv.

    Returns
    -------
    Table
        Columns `candidate_id` (row in the file, from 0), `series_uid` (categories in ascending order), `x_mm`, `y_mm`,
        `z_mm`, `is_nodule`.

    Raises
    ------
    TableError
        Not such a table.
    """
    raw = read_rows(path, ("seriesuid", *_LUNA16_XYZ, "class"), coded=("seriesuid", "class"))
    columns, checks = _places(raw)
    label = raw.codes("class")
    checks.append((~label.isin(["0", "1"]), "class", "0 or 1"))
    return _good_rows(raw, {**columns, "is_nodule": label == "1"}, checks, "candidate_id")


def read_annotations(path: Path) -> Table:
    """Read annotations.csv.

    Returns
    -------
    Table
        Columns `annotation_id` (row in the file, from 0), `series_uid`, `x_mm`, `y_mm`, `z_mm`,
        `diameter_mm`; and, where the file has it, `subtype`, None where its field is empty.

    Raises
    ------
    TableError
        Not such a table.
    """
    required = ("seriesuid", *_LUNA16_XYZ, "diameter_mm")
    raw = read_rows(path, required, optional=("subtype",), coded=("seriesuid",))
    columns, checks = _nodules(raw)
    if "subtype" in raw.fields:
        subtype = raw.text("subtype").str.strip()
        columns["subtype"] = subtype.astype(object).where(subtype != "", None)
    return _good_rows(raw, columns, checks, "annotation_id")


def read_malignancy(path: Path) -> Table:
    """Read annotations_with_malignancy.csv.

    Returns
    -------
    Table
        As `read_annotations`, with `is_malignant` and, where the file has them, `patient_id`, and `malignancy_votes`
        (readers' ratings, ascending: ``2,2,4,4``; None where `mal_details` is empty).

    Raises
    ------
    TableError
        Not such a table.
    """
    required = ("seriesuid", *_LUNA16_XYZ, "diameter_mm", "mal_bool")
    raw = read_rows(path, required, optional=("patient_id", "mal_details"), coded=("seriesuid",))
    columns, checks = _nodules(raw)
    flag = raw.text("mal_bool").str.lower()
    checks.append((~flag.isin(["true", "false", "0", "1"]), "mal_bool", "True or False"))
    columns["is_malignant"] = flag.isin(["true", "1"])
    if "patient_id" in raw.fields:
        columns["patient_id"] = raw.text("patient_id")
    if "mal_details" in raw.fields:
        details = raw.text("mal_details").str.strip()
        checks.append((~details.str.fullmatch(_RATINGS), "mal_details", "ratings of 1 to 5 as [4, 2, 4]"))
        votes = [votes_text(int(k) for k in re.findall("[1-5]", text)) for text in details]
        columns["malignancy_votes"] = pd.Series(votes, dtype=object)
    return _good_rows(raw, columns, checks, "annotation_id")


def votes_text(ratings: Iterable[int]) -> str | None:
    """Readers' ratings in ascending order, as the store keeps them; None without one.

    >>> votes_text([4, 2, 4, 2])
    '2,2,4,4'
    """
    return ",".join(map(str, sorted(ratings))) or None


def read_patients(path: Path) -> tuple[dict[str, str], tuple[RowFault, ...]]:
    """Read a table with the columns seriesuid and patient_id.

    Raises
    ------
    TableError
        Not such a table.
    """
    raw = read_rows(path, ("seriesuid", "patient_id"))
    text = pd.DataFrame({name: raw.text(name).str.strip() for name in raw.fields})
    named = text[text["patient_id"] != ""]
    first = text["seriesuid"].map(named.groupby("seriesuid")["patient_id"].first())
    checks: list[Check] = [
        (text["seriesuid"] == "", "seriesuid", "a series UID"),
        (text["patient_id"] == "", "patient_id", "a name"),
        (text["patient_id"] != first, "patient_id", "the patient named before for this series"),
    ]
    table = _good_rows(raw, {str(name): column for name, column in text.items()}, checks, "row")
    return dict(zip(table.frame["seriesuid"], table.frame["patient_id"], strict=True)), table.faults


def match_annotations(points: pd.DataFrame, annotations: pd.DataFrame, rule: str) -> npt.NDArray[np.int64]:
    """Each point's nodule among the annotations of its series.

    Parameters
    ----------
    points : DataFrame
        Columns `series_uid`, `x_mm`, `y_mm`, `z_mm`.
    annotations : DataFrame
        The same, and `diameter_mm`, in file order.
    rule : {"radius", "book"}
        ``radius``: the nearest annotation whose centre lies less than its radius away, as the
        LUNA16 challenge counts a hit.
        ``book``: the first annotation within a quarter of its diameter on each axis.

    Returns
    -------
    ndarray, (n,) int64
        Position in `annotations`; -1 where there is none.
    """
    best = np.full(len(points), -1, dtype=np.int64)
    for first in range(0, len(points), MATCH_ROWS):  # piece by piece: what it takes on the way is ten times the rows
        piece = points.iloc[first : first + MATCH_ROWS]
        best[first : first + MATCH_ROWS] = _match(piece, annotations, rule)
    return best


def _match(points: pd.DataFrame, annotations: pd.DataFrame, rule: str) -> npt.NDArray[np.int64]:
    order, starts, counts = _group_by_series(annotations["series_uid"])
    codes, names = series_codes(points["series_uid"])
    group = np.array([starts.get(name, -1) for name in names], dtype=np.int64)[codes]
    number = np.array([counts.get(name, 0) for name in names], dtype=np.int64)[codes]
    xyz = points[list(XYZ)].to_numpy(dtype=np.float64)
    centers = annotations[list(XYZ)].to_numpy(dtype=np.float64)
    diameters = annotations["diameter_mm"].to_numpy(dtype=np.float64)
    best = np.full(len(points), -1, dtype=np.int64)
    nearest = np.full(len(points), np.inf)
    for k in range(int(number.max(initial=0))):
        rows = np.flatnonzero(number > k)
        ids = order[group[rows] + k]
        offset = np.abs(xyz[rows] - centers[ids])
        if rule == "book":
            hit = (offset <= diameters[ids, None] / 4).all(axis=1) & (best[rows] < 0)
            distance = np.zeros(len(rows))
        else:
            distance = np.sqrt((offset**2).sum(axis=1))
            hit = (distance < diameters[ids] / 2) & (distance < nearest[rows])
        best[rows[hit]] = ids[hit]
        nearest[rows[hit]] = distance[hit]
    return best


def series_codes(uids: "pd.Series[Any]") -> tuple[npt.NDArray[np.int32], list[str]]:
    """Number of each row's series among the names that the column knows, and these names in ascending order."""
    column = uids.astype("category").cat
    names = column.categories.tolist()
    order = sorted(range(len(names)), key=names.__getitem__)
    place = np.empty(len(names), dtype=np.int32)
    place[order] = np.arange(len(names), dtype=np.int32)
    return place[column.codes.to_numpy()], [names[number] for number in order]


def order_by_groups(
    groups: npt.NDArray[np.integer[Any]], keys: Callable[[npt.NDArray[np.int64]], Sequence[npt.NDArray[Any]]]
) -> npt.NDArray[np.int64]:
    """As `np.lexsort` by keys within groups: some groups at a time, so that it stays linear and needs little memory.

    Parameters
    ----------
    groups : ndarray, (n,) int
        Group of each row; the last key.
    keys : callable
        The other keys of the rows it is given, the first of them last, as `np.lexsort` has them.

    Returns
    -------
    ndarray, (n,) int64
        Rows in order.
    """
    order = np.argsort(groups, kind="stable").astype(np.int64, copy=False)
    ends = np.append(np.flatnonzero(np.diff(groups[order])) + 1, len(order))  # of each group
    first = 0
    while first < len(order):
        last = int(ends[np.searchsorted(ends, min(first + SORT_ROWS, len(order)))])
        rows = order[first:last]
        order[first:last] = rows[np.lexsort([*keys(rows), groups[rows]])]
        first = last
    return order


def size_order(frame: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Rows of a manifest from the largest nodule down: (is_nodule, diameter, series, centre) descending.

    Nodules and candidates without a diameter come after those with one, as if it were 0.
    """
    series, _ = series_codes(frame["series_uid"])
    number, xyz = frame["candidate_id"].to_numpy(), [frame[axis].to_numpy() for axis in reversed(XYZ)]
    is_nodule, diameter = frame["is_nodule"].to_numpy(dtype=bool), frame["diameter_mm"].to_numpy(dtype=np.float64)
    has_size = diameter > 0

    def keys(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        # candidate_id settles exact ties, so that the order is the same whatever order the rows came in
        return [number[rows], *(-axis[rows] for axis in xyz)]

    head, tail = np.flatnonzero(is_nodule | has_size), np.flatnonzero(~(is_nodule | has_size))
    largest = [-np.where(has_size, diameter, 0.0)[head], ~is_nodule[head]]
    head = head[np.lexsort([*keys(head), -series[head], *largest])]
    return np.concatenate([head, tail[order_by_groups(-series[tail], lambda rows: keys(tail[rows]))]])


def _group_by_series(uids: "pd.Series[str]") -> tuple[npt.NDArray[np.int64], dict[str, int], dict[str, int]]:
    codes, names = pd.factorize(uids)
    order = np.argsort(codes, kind="stable").astype(np.int64)
    counts = np.bincount(codes, minlength=len(names))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(names) else counts
    return order, dict(zip(names, starts, strict=True)), dict(zip(names, counts, strict=True))


Check = tuple[Any, str, str]
"""Which rows are bad, by which column, and what was expected there."""


Columns = dict[str, Any]
"""Columns of a table, by name."""


def _places(raw: CsvRows) -> tuple[Columns, list[Check]]:
    """`series_uid` and the centre of each row in mm, with the checks of both."""
    uids = raw.codes("seriesuid", strip=True)
    columns: Columns = {"series_uid": uids}
    checks: list[Check] = [(uids == "", "seriesuid", "a series UID")]
    for theirs, ours in _LUNA16_XYZ.items():
        columns[ours] = raw.numbers(theirs)
        checks.append((~(np.abs(columns[ours]) <= MAX_ABS_MM), theirs, "a number of mm"))
    return columns, checks


def _nodules(raw: CsvRows) -> tuple[Columns, list[Check]]:
    """As `_places`, with `diameter_mm`."""
    columns, checks = _places(raw)
    diameter = raw.numbers("diameter_mm")
    checks.append((~((diameter > 0) & (diameter <= MAX_DIAMETER_MM)), "diameter_mm", "mm above 0"))
    uids = columns["series_uid"].astype("str")
    return {**columns, "series_uid": uids, "diameter_mm": diameter}, checks


def _good_rows(raw: CsvRows, columns: Columns, checks: list[Check], id_name: str) -> Table:
    """Drop the rows that fail a check, name the faults, number the rest by their place in the file."""
    bad = np.zeros(len(raw.lines), dtype=bool)
    faults = list(raw.faults)
    for mask, column, expected in checks:
        new = np.asarray(mask, dtype=bool) & ~bad
        for position in np.flatnonzero(new):
            got = str(raw.fields[column][position].as_py())[:40]
            reason = f"{column} is {got!r}, expected {expected}"
            faults.append(RowFault(raw.file, int(raw.lines[position]), reason))
        bad |= new
    frame = pd.DataFrame({id_name: raw.lines - 2, **columns}, copy=False)
    if bad.any():
        frame = frame[~bad].reset_index(drop=True)
    return Table(frame, tuple(sorted(faults, key=lambda fault: fault.line)))
