"""Candidates and annotations: reading the CSV tables, and finding each candidate's nodule.

A bad row costs itself alone: it is reported with its line number and left out. A table that cannot be read
as a whole is a `TableError`.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lunaprep.errors import TableError

XYZ = ("x_mm", "y_mm", "z_mm")
MAX_ABS_MM = 1e5
"""A coordinate beyond 100 m is a fault of the file, not a place in a patient."""

MAX_DIAMETER_MM = 500.0

_RATINGS = r"(\[[1-5](, ?[1-5])*\])?"
_LUNA16_XYZ = {"coordX": "x_mm", "coordY": "y_mm", "coordZ": "z_mm"}


@dataclass(frozen=True)
class RowFault:
    """One row of a table that was left out."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}; the row is left out"


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
        Columns `candidate_id` (row in the file, from 0), `series_uid`, `x_mm`, `y_mm`, `z_mm`, `is_nodule`.

    Raises
    ------
    TableError
        Not such a table.
    """
    raw = _read_rows(path, ("seriesuid", *_LUNA16_XYZ, "class"))
    places, checks = _places(raw)
    label = raw.text["class"]
    checks.append((~label.isin(["0", "1"]), "class", "0 or 1"))
    return _good_rows(raw, places.assign(is_nodule=label == "1"), checks, "candidate_id")


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
    raw = _read_rows(path, ("seriesuid", *_LUNA16_XYZ, "diameter_mm"), ("subtype",))
    places, checks = _places(raw)
    frame = _with_diameter(raw, places, checks)
    if "subtype" in raw.text:
        subtype = raw.text["subtype"].str.strip()
        frame = frame.assign(subtype=subtype.astype(object).where(subtype != "", None))
    return _good_rows(raw, frame, checks, "annotation_id")


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
    raw = _read_rows(path, ("seriesuid", *_LUNA16_XYZ, "diameter_mm", "mal_bool"), ("patient_id", "mal_details"))
    places, checks = _places(raw)
    frame = _with_diameter(raw, places, checks)
    flag = raw.text["mal_bool"].str.lower()
    checks.append((~flag.isin(["true", "false", "0", "1"]), "mal_bool", "True or False"))
    frame = frame.assign(is_malignant=flag.isin(["true", "1"]))
    if "patient_id" in raw.text:
        frame = frame.assign(patient_id=raw.text["patient_id"])
    if "mal_details" in raw.text:
        details = raw.text["mal_details"].str.strip()
        checks.append((~details.str.fullmatch(_RATINGS), "mal_details", "ratings of 1 to 5 as [4, 2, 4]"))
        votes = [votes_text(int(k) for k in re.findall("[1-5]", text)) for text in details]
        frame["malignancy_votes"] = pd.Series(votes, dtype=object)
    return _good_rows(raw, frame, checks, "annotation_id")


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
    raw = _read_rows(path, ("seriesuid", "patient_id"))
    text = raw.text.apply(lambda column: column.str.strip())
    named = text[text["patient_id"] != ""]
    first = text["seriesuid"].map(named.groupby("seriesuid")["patient_id"].first())
    checks: list[Check] = [
        (text["seriesuid"] == "", "seriesuid", "a series UID"),
        (text["patient_id"] == "", "patient_id", "a name"),
        (text["patient_id"] != first, "patient_id", "the patient named before for this series"),
    ]
    table = _good_rows(raw, text, checks, "row")
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
    order, starts, counts = _group_by_series(annotations["series_uid"])
    group = points["series_uid"].map(starts).fillna(-1).to_numpy(dtype=np.int64)
    number = points["series_uid"].map(counts).fillna(0).to_numpy(dtype=np.int64)
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


def size_order(frame: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Rows of a manifest from the largest nodule down: (is_nodule, diameter, series, centre) descending.

    Nodules and candidates without a diameter come after those with one, as if it were 0.
    """
    series = pd.factorize(frame["series_uid"], sort=True)[0]
    keys = [-frame[axis].to_numpy() for axis in reversed(XYZ)]
    keys += [-series, -frame["diameter_mm"].fillna(0.0).to_numpy(), ~frame["is_nodule"].to_numpy(dtype=bool)]
    # candidate_id settles exact ties, so that the order is the same whatever order the rows came in
    return np.asarray(np.lexsort([frame["candidate_id"].to_numpy(), *keys]), dtype=np.int64)


def _group_by_series(uids: "pd.Series[str]") -> tuple[npt.NDArray[np.int64], dict[str, int], dict[str, int]]:
    codes, names = pd.factorize(uids)
    order = np.argsort(codes, kind="stable").astype(np.int64)
    counts = np.bincount(codes, minlength=len(names))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(names) else counts
    return order, dict(zip(names, starts, strict=True)), dict(zip(names, counts, strict=True))


Check = tuple["pd.Series[bool]", str, str]
"""Which rows are bad, by which column, and what was expected there."""


@dataclass(frozen=True)
class _Rows:
    """All fields of a file as text, the line each row stands on, and the rows of another length."""

    file: str
    text: pd.DataFrame
    lines: npt.NDArray[np.int64]
    faults: list[RowFault]


def _read_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> _Rows:
    data = _read_bytes(path)
    names = _header(path, data)
    missing = [name for name in columns if name not in names]
    if missing or len(set(names)) != len(names):
        what = f"has no column {', '.join(missing)}" if missing else "names a column twice"
        got, expected = ",".join(names)[:80], ",".join(columns)
        message = f"{path.name} {what}: got {got!r}, expected {expected}. Check that it is LUNA16's"
        raise TableError(message)
    misfits: list[tuple[int, int]] = []

    def skip(row: Any) -> str:
        misfits.append((row.number, row.actual_columns))
        return "skip"

    wanted = [*columns, *(name for name in optional if name in names)]
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data + b"\n"),
            # one thread: only then does Arrow number the rows it refuses
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=1 << 24, column_names=names, skip_rows=1
            ),
            parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=skip),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), include_columns=wanted, strings_can_be_null=False
            ),
        )
    except pa.ArrowException as error:
        reason = ascii(str(error).splitlines()[0][:120])[1:-1]
        message = f"{path.name} cannot be read as CSV: {reason}. Fetch it again"
        raise TableError(message) from error
    text = pd.DataFrame({name: table[name].to_pandas() for name in wanted})
    good, bad = _line_numbers(path, data, len(text), [number for number, _ in misfits])
    faults = [
        RowFault(path.name, line, f"{count} fields, expected {len(names)}")
        for line, (_, count) in zip(bad, misfits, strict=True)
    ]
    return _Rows(path.name, text, good, faults)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        message = f"{path.name}: {error.strerror}. Name the file, or put it beside the subset folders"
        raise TableError(message) from error


def _header(path: Path, data: bytes) -> list[str]:
    raw = data[: 1 << 16].split(b"\n", 1)[0]
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        message = f"{path.name} is not text (byte {error.start} of its first line). Fetch it again"
        raise TableError(message) from error
    if not text:
        message = f"{path.name} is empty; expected a header line and rows. Fetch it again"
        raise TableError(message)
    try:
        return [name.strip() for name in next(csv.reader([text], skipinitialspace=True))]
    except csv.Error:
        return [text]


def _line_numbers(
    path: Path, data: bytes, num_good: int, misfits: list[int]
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Lines (from 1, the header's) of the rows read, and of the misfits, whose numbers skip blank lines."""
    if b"\n\n" in data or b"\n\r\n" in data:
        filled = [n for n, line in enumerate(data.split(b"\n"), start=1) if line.strip(b"\r")]
        lines = np.array(filled, dtype=np.int64)
    else:
        lines = np.arange(1, data.count(b"\n") + 2, dtype=np.int64)
    if len(lines) != 1 + num_good + len(misfits):
        message = (
            f"{path.name}: {len(lines) - 1} lines give {num_good + len(misfits)} rows, so a quoted field or a lone "
            "carriage return reaches across line ends. Mend the file"
        )
        raise TableError(message)
    bad = lines[np.array(misfits, dtype=np.int64) - 1]
    return np.setdiff1d(lines[1:], bad), bad.tolist()


def _numbers(text: "pd.Series[str]") -> npt.NDArray[np.float64]:
    """Parse a column; NaN where a field is not one."""
    try:
        return np.asarray(pc.cast(pa.array(text), pa.float64()).to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid:
        return np.asarray(pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64))


def _places(raw: _Rows) -> tuple[pd.DataFrame, list[Check]]:
    """`series_uid` and the centre of each row in mm, with the checks of both."""
    uids = raw.text["seriesuid"].str.strip()
    frame = pd.DataFrame({"series_uid": uids})
    checks: list[Check] = [(uids == "", "seriesuid", "a series UID")]
    for theirs, ours in _LUNA16_XYZ.items():
        frame[ours] = _numbers(raw.text[theirs])
        checks.append((~(frame[ours].abs() <= MAX_ABS_MM), theirs, "a number of mm"))
    return frame, checks


def _with_diameter(raw: _Rows, frame: pd.DataFrame, checks: list[Check]) -> pd.DataFrame:
    diameter = pd.Series(_numbers(raw.text["diameter_mm"]))
    checks.append((~((diameter > 0) & (diameter <= MAX_DIAMETER_MM)), "diameter_mm", "mm above 0"))
    return frame.assign(diameter_mm=diameter)


def _good_rows(raw: _Rows, frame: pd.DataFrame, checks: list[Check], id_name: str) -> Table:
    """Drop the rows that fail a check, name the faults, number the rest by their place in the file."""
    bad = np.zeros(len(frame), dtype=bool)
    faults = list(raw.faults)
    for mask, column, expected in checks:
        new = mask.to_numpy(dtype=bool) & ~bad
        for position in np.flatnonzero(new):
            got = str(raw.text[column].iloc[position])[:40]
            reason = f"{column} is {got!r}, expected {expected}"
            faults.append(RowFault(raw.file, int(raw.lines[position]), reason))
        bad |= new
    frame = frame.assign(**{id_name: raw.lines - 2})
    ordered = frame[[id_name, *(name for name in frame if name != id_name)]]
    return Table(ordered[~bad].reset_index(drop=True), tuple(sorted(faults, key=lambda fault: fault.line)))
