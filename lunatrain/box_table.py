"""A CSV file of lung boxes (Image, Xmin, Ymin, Xmax, Ymax) and the DICOM slices it names."""

import csv
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lunatrain.box_slices import BoxSlices, picture_of
from lunatrain.boxes import corners_of
from lunatrain.errors import TableError

IMAGE, SIDES = "Image", ("Xmin", "Ymin", "Xmax", "Ymax")
SUFFIX = ".dcm"
NUM_FOLDS = 5
"""Patients are dealt out in turn; the first part is held out."""


@dataclass(frozen=True)
class BoxRow:
    """A row: the line it stands on, the name as written, its file, and the box; None where no lung is seen."""

    line: int
    name: str
    path: Path
    box: tuple[float, float, float, float] | None


def read_box_table(path: Path, folder: Path) -> list[BoxRow]:
    """Read and check the table; no slice is opened.

    Parameters
    ----------
    path : Path
        CSV with the columns Image, Xmin, Ymin, Xmax, Ymax, in any order; others are left out. Fractions of the
        columns and rows; all four empty where the slice shows no lung.
    folder : Path
        Holds the files; ``Image`` is a file's name in it, with or without ``.dcm``.

    Raises
    ------
    TableError
        Not such a table, or a row that cannot be used.
    """
    rows: list[BoxRow] = []
    lines: dict[Path, int] = {}
    for line, values in _rows(path):
        where = f"{path}, line {line}"
        name = values[IMAGE].strip()
        file = _file_of(name, folder, where)
        if file in lines:
            message = f"{where}: {name} is on line {lines[file]} already, expected each slice once. Remove one"
            raise TableError(message)
        lines[file] = line
        rows.append(BoxRow(line, name, file, _box_of([values[side] for side in SIDES], where)))
    if not any(row.box for row in rows):
        message = f"{path} has no box in {len(rows)} rows, expected one at least. Give a table of slices with lungs"
        raise TableError(message)
    return rows


def read_csv_slices(path: Path, folder: Path, side: int) -> BoxSlices:
    """The slices that a table names, with their boxes.

    Parameters
    ----------
    path, folder : Path
        As for `read_box_table`.
    side : int
        Rows and columns of a picture.

    Returns
    -------
    BoxSlices
        Slices of a patient (else of a series) are all in one part.

    Raises
    ------
    TableError
        As `read_box_table`, or all slices are of one patient.
    ScanError
        A slice that cannot be read.
    """
    from lunaprep.scans.dicom_pixels import read_slice

    rows = read_box_table(path, folder)
    shown = [(row, row.box) for row in rows if row.box is not None]
    pictures = np.empty((len(shown), side, side), dtype=np.uint8)
    uids, owners = [], []
    for k, (row, _) in enumerate(shown):
        hu, header = read_slice(row.path, folder)
        pictures[k] = picture_of(hu[None], side)[0]
        uids.append(header.series_uid)
        owners.append(header.patient_id or header.series_uid)
    _, owner = np.unique(owners, return_inverse=True)
    fold = owner % NUM_FOLDS
    table = pd.DataFrame(
        {
            "name": [row.name for row, _ in shown],
            "series_uid": uids,
            "fold": fold,
            "split_series": np.where(fold == 0, "val", "train"),
        }
    )
    outlines = corners_of([box for _, box in shown]).astype(np.float32)
    digest = hashlib.sha256(path.read_bytes() + pictures.tobytes()).hexdigest()[:16]
    return BoxSlices(pictures, outlines, table, len(rows) - len(shown), f"boxes {digest}")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their line numbers."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        try:
            names = reader.fieldnames or ()
            missing = [name for name in (IMAGE, *SIDES) if name not in names]
            if missing:
                message = f"{path}: its header has no {missing[0]}, expected {IMAGE}, {', '.join(SIDES)}"
                raise TableError(message)
            for row in reader:
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            message = f"{path} cannot be read as CSV: {error}. Save it as UTF-8, with commas"
            raise TableError(message) from error


def _file_of(name: str, folder: Path, where: str) -> Path:
    for file in (folder / name, folder / f"{name}{SUFFIX}"):
        if name and file.is_file():
            if file.resolve().is_relative_to(folder.resolve()):
                return file
            message = f"{where}: {name} leads out of {folder}, expected a file in it. Copy it in"
            raise TableError(message)
    message = f"{where}: got Image {name!r}, expected the name of a DICOM file in {folder}. Name its folder: --slices"
    raise TableError(message)


def _box_of(texts: list[str], where: str) -> tuple[float, float, float, float] | None:
    if not any(text.strip() for text in texts):
        return None
    try:
        x0, y0, x1, y1 = values = tuple(float(text) for text in texts)
    except ValueError:
        x0, y0, x1, y1 = values = (math.nan,) * 4
    if not (all(0 <= value <= 1 for value in values) and x0 < x1 and y0 < y1):
        got = ", ".join(f"{side} {text!r}" for side, text in zip(SIDES, texts, strict=True))
        message = f"{where}: got {got}; expected fractions from 0 to 1, Xmin < Xmax and Ymin < Ymax"
        raise TableError(message)
    return x0, y0, x1, y1
