"""LIDC-IDRI's readings: what up to four readers marked in a scan, from the XML file they wrote.

A nodule of 3 mm or more is outlined slice by slice; the outline is the *outer border*, its pixels are not part of the
nodule (LIDC's documentation of its XML). An outline with ``inclusion`` FALSE is a hole. A nodule under 3 mm and a
non-nodule are one point each. `lunaprep.sources.lidc_nodules` makes masks and nodules of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from lunaprep.safe_xml import Element, read_xml, xml_fault

ROOT, NAMESPACE = "LidcReadMessage", "http://www.nih.gov"
XRAY_ROOT = b"<IdriReadMessage"
MAX_READERS = 4
MAX_PIXEL = 4096
MAX_ABS_MM = 1e5


@dataclass(frozen=True)
class Contour:
    """One outline in one slice: world z, SOP instance UID, and the border's pixels (n, 2) as column, row."""

    z_mm: float
    sop_uid: str
    is_inclusion: bool
    points: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReaderMark:
    """What one reader marked: a nodule with outlines, or a point (`small_nodule`, under 3 mm, or `non_nodule`)."""

    reader: int
    name: str
    kind: Literal["nodule", "small_nodule", "non_nodule"]
    contours: tuple[Contour, ...]
    malignancy: int | None = None


@dataclass(frozen=True)
class Reading:
    """One XML file: the series it is about, the number of readers, and all they marked."""

    path: Path
    series_uid: str
    study_uid: str | None
    num_readers: int
    marks: tuple[ReaderMark, ...]


def read_reading(path: Path) -> Reading:
    """Read one LIDC-IDRI XML file.

    Raises
    ------
    TableError
        No such file, damaged, dangerous, or with a number that is none; names the line.
    """
    root = read_xml(path, ROOT, NAMESPACE)
    series_uid = root.value("ResponseHeader", "SeriesInstanceUid")
    if series_uid is None:
        raise xml_fault(path, "SeriesInstanceUid is missing in its ResponseHeader; its scan is unknown")
    sessions = root.all("readingSession")
    if not 1 <= len(sessions) <= MAX_READERS:
        raise xml_fault(path, f"it has {len(sessions)} reading sessions, expected 1 to {MAX_READERS}")
    marks = tuple(mark for reader, session in enumerate(sessions) for mark in _marks(path, reader, session))
    return Reading(path, series_uid, root.value("ResponseHeader", "StudyInstanceUID"), len(sessions), marks)


def is_xray_reading(path: Path) -> bool:
    """Whether a file is the collection's reading of an X-ray picture: no fault, but of no use here."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return XRAY_ROOT in file.read(4096)


def same_marks(one: Reading, other: Reading) -> bool:
    """Whether two files say the same of a scan, as copies in the collection do under other headers."""
    sessions = (path.read_bytes().partition(b"<readingSession")[2] for path in (one.path, other.path))
    first, second = (b"".join(text.split()) for text in sessions)
    return first == second


def _marks(path: Path, reader: int, session: Element) -> Iterator[ReaderMark]:
    for nodule in session.all("unblindedReadNodule"):
        contours = tuple(_contour(path, roi) for roi in nodule.all("roi"))
        if not contours:
            raise xml_fault(path, f"line {nodule.line}: a nodule without a roi; fetch the file again")
        is_point = len(contours) == 1 and len(contours[0].points) == 1
        name = nodule.value("noduleID") or ""
        yield ReaderMark(reader, name, "small_nodule" if is_point else "nodule", contours, _rating(path, nodule))
    for mark in session.all("nonNodule"):
        yield ReaderMark(reader, mark.value("nonNoduleID") or "", "non_nodule", (_contour(path, mark, "locus"),))


def _contour(path: Path, roi: Element, point_name: str = "edgeMap") -> Contour:
    points = roi.all(point_name)
    if not points:
        raise xml_fault(path, f"line {roi.line}: {roi.name} without {point_name}; fetch the file again")
    inclusion = (roi.value("inclusion") or "TRUE").upper()
    if inclusion not in ("TRUE", "FALSE"):
        raise xml_fault(path, f"line {roi.line}: inclusion is {ascii(inclusion)[:20]}, expected TRUE or FALSE")
    pixels = [(_pixel(path, point, "xCoord"), _pixel(path, point, "yCoord")) for point in points]
    z_mm = _number(path, roi, "imageZposition")
    if not abs(z_mm) <= MAX_ABS_MM:
        raise xml_fault(path, f"line {roi.line}: imageZposition is {z_mm}, expected a finite number of mm")
    sop_uid = roi.value("imageSOP_UID") or ""
    return Contour(z_mm, sop_uid, inclusion == "TRUE", np.array(pixels, dtype=np.int64))


def _number(path: Path, element: Element, name: str) -> float:
    text = element.value(name)
    if text is None:
        raise xml_fault(path, f"line {element.line}: {name} is missing in {element.name}; fetch the file again")
    try:
        return float(text)
    except ValueError:
        got = ascii(text)[:40]
        raise xml_fault(
            path, f"line {element.line}: {name} is {got}, expected a number; fetch the file again"
        ) from None


def _pixel(path: Path, point: Element, name: str) -> int:
    value = _number(path, point, name)
    if not (0 <= value < MAX_PIXEL and value == int(value)):
        raise xml_fault(path, f"line {point.line}: {name} is {value}, expected a pixel from 0 to {MAX_PIXEL - 1}")
    return int(value)


def _rating(path: Path, nodule: Element) -> int | None:
    traits = nodule.first("characteristics")
    if traits is None or traits.value("malignancy") is None:
        return None
    value = _number(path, traits, "malignancy")
    if value not in (0, 1, 2, 3, 4, 5):
        raise xml_fault(path, f"line {traits.line}: malignancy is {value:g}, expected 1 to 5")
    return int(value) or None  # a few of the first cases write 0 for "not rated"
