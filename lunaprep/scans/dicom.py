"""DICOM folders: files told apart into series, and each series checked into one grid of slices.

Only headers are read. Whatever would make the grid wrong (a gap, a slice twice, a tilted gantry, a damaged file)
refuses the series by name; a slice is never left out to make the rest fit.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep.errors import ScanError
from lunaprep.geometry import FloatArray, Geometry
from lunaprep.scans import gate
from lunaprep.scans.dicom_header import HeaderError, SliceHeader, read_headers
from lunaprep.scans.dicom_notes import HeaderNotes
from lunaprep.scans.gate import fault, shown
from lunaprep.scans.scan import Scan

GAP_MM, GAP_SHARE, GAP_LIMIT = 0.1, 0.05, 0.25
"""A slice may be off by 0.1 mm + 5 % of the gap (what dicom2nifti lets pass: positions are often rounded to
0.1 mm), but never by more than a quarter of the gap: a missing slice is off by a whole one."""

SAME_PLACE_MM = 1e-3
ORIENTATION_TOLERANCE = 1e-4
"""Direction cosines are written with six digits or so; 1e-4 turns the end of a 500 mm slice by 0.05 mm."""

TILT_TOLERANCE = 1e-2
"""Millimetres a slice may slip sideways for each millimetre of the stack (0.6 degrees) besides `GAP_MM`."""

MIN_SLICES = 3
"""Of two slices nobody can say whether there was one between them."""

MODALITY = "CT"
INTEGER_TYPES = (np.int16, np.int32)


@dataclass(frozen=True)
class DicomSeries:
    """The files of one series, in the order of their paths; nothing is checked yet.

    `localizers` are its scout pictures, which are no slices. `broken` says what is wrong with files that are
    slices of it, or that may be (damaged files in the same folder).
    """

    series_uid: str
    folder: Path
    slices: tuple[SliceHeader, ...]
    localizers: tuple[SliceHeader, ...] = ()
    broken: tuple[str, ...] = ()

    @property
    def modality(self) -> str | None:
        """CT, PT, …; None where no file says."""
        return next((item.modality for item in self.slices if item.modality), None)

    @property
    def study_uid(self) -> str | None:
        """Study of the series, where known."""
        return next((item.study_uid for item in self.slices if item.study_uid), None)

    @property
    def patient_id(self) -> str | None:
        """Patient of the series, where known."""
        return next((item.patient_id for item in self.slices if item.patient_id), None)


@dataclass(frozen=True)
class DicomFolder:
    """What a folder holds: its series by UID, the number of files that are no DICOM image, and damaged files."""

    series: tuple[DicomSeries, ...]
    num_other: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class DicomScan(Scan):
    """A checked series: one grid, its slices in the order of the grid; no pixel has been read.

    `path` is the series' folder; ``dtype`` holds every HU the bits can hold.
    `data_bytes` is the sum over all files; their hash is of all bytes of all files in the order of the slices.
    """

    slices: tuple[SliceHeader, ...]
    study_uid: str | None
    patient_id: str | None

    @property
    def data_paths(self) -> tuple[Path, ...]:
        """Files that hold the voxels, in the order of the grid."""
        return tuple(item.real_path for item in self.slices)


def find_series(folder: Path, notes: HeaderNotes | None = None) -> DicomFolder:
    """Read the headers of all files below a folder and tell their series apart.

    Parameters
    ----------
    folder : Path
        Searched to the bottom; linked folders are not entered, linked files must lead to files inside.
    notes : HeaderNotes, optional
        Headers known from an earlier time.

    Returns
    -------
    DicomFolder
        Series in the order of their UIDs. A damaged file whose series is unknown counts against every series that
        has slices in the same folder, for it may be a slice of any of them.
    """
    headers: dict[str, list[SliceHeader]] = {}
    known: dict[str, list[str]] = {}
    stray: dict[Path, list[str]] = {}
    num_other = 0
    paths = _files(folder)
    for path, header in zip(paths, notes.read(paths, folder) if notes else read_headers(paths, folder), strict=True):
        if isinstance(header, HeaderError):
            if header.series_uid:
                known.setdefault(header.series_uid, []).append(str(header))
            else:
                stray.setdefault(path.parent, []).append(str(header))
            continue
        if header is not None:
            headers.setdefault(header.series_uid, []).append(header)
        elif path.suffix.lower() == ".dcm" and _is_meant_as_slice(path):
            text = fault(path, f"no DICOM file, in spite of its name ('DICM' is not at byte 128); {gate.FETCH}")
            stray.setdefault(path.parent, []).append(str(text))
        else:
            num_other += 1
    series = tuple(_series(uid, headers.get(uid, []), known, stray) for uid in sorted({*headers, *known}))
    faults = [text for texts in (*known.values(), *stray.values()) for text in texts]
    return DicomFolder(series, num_other, tuple(faults))


def describe(series: DicomSeries) -> DicomScan:
    """Check a series and lay its slices into one grid.

    Parameters
    ----------
    series : DicomSeries
        As `find_series` gives it.

    Returns
    -------
    DicomScan
        Its geometry is the one SimpleITK's series reader gives for the same files.

    Raises
    ------
    ScanError
        A damaged file, another modality, mixed sizes or orientations, a tilted gantry, a gap, a slice twice.
    """
    if series.broken:
        more = f" (and {len(series.broken) - 1} more)" if len(series.broken) > 1 else ""
        raise ScanError(series.broken[0] + more)
    slices = series.slices
    if len(slices) < MIN_SLICES:
        what = f"{len(slices)} slices" + (f" and {len(series.localizers)} localizers" if series.localizers else "")
        raise fault(series.folder, f"series …{series.series_uid[-12:]} has {what}, expected {MIN_SLICES} or more")
    if series.modality not in (None, MODALITY):
        raise fault(series.folder, f"modality is {shown(series.modality)}, expected {MODALITY}")
    for name, fact in _FACTS.items():
        _check_alike(slices, name, fact)
    if len(slices) * slices[0].rows * slices[0].columns > gate.MAX_VOXELS:
        raise fault(series.folder, f"{len(slices)} slices are more than {gate.MAX_VOXELS} voxels")
    slices, geometry = _grid(slices)
    sums = xxhash.xxh3_128()
    for item in slices:
        sums.update(bytes.fromhex(item.header_xxh3))
    return DicomScan(
        series_uid=series.series_uid,
        path=series.folder,
        geometry=gate.checked_grid(series.folder, geometry),
        dtype=_dtype(slices),
        data_path=slices[0].real_path,
        data_bytes=sum(item.num_bytes for item in slices),
        header_xxh3=sums.hexdigest(),
        reader="dicom",
        slices=slices,
        study_uid=series.study_uid,
        patient_id=series.patient_id,
    )


def open_series(folder: Path, series_uid: str | None = None) -> DicomScan:
    """Check the one CT series of a folder, or the one named; for a program that is given a folder as a scan.

    Raises
    ------
    ScanError
        None there, more than one and none named, or one that cannot be used.
    """
    found = find_series(folder)
    wanted = [
        item
        for item in found.series
        if item.series_uid == series_uid or (series_uid is None and item.modality in (None, MODALITY))
    ]
    if len(wanted) != 1:
        there = ", ".join(f"…{item.series_uid[-12:]} ({len(item.slices)} slices)" for item in wanted[:3])
        got = f"{len(wanted)} CT series: {there}" if wanted else f"no such CT series ({found.num_other} other files)"
        raise fault(folder, f"it holds {got}; expected one. Name the folder of one series")
    return describe(wanted[0])


def _files(folder: Path) -> list[Path]:
    return sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _is_meant_as_slice(path: Path) -> bool:
    """Whether a file without DICM is one that a scanner's archive wrote: not a Mac's shadow, not a report."""
    return not path.name.startswith(".") and path.is_file() and _has_no_dicm(path)


def _has_no_dicm(path: Path) -> bool:
    return gate.read_start(path.resolve(), path, 132)[0][128:] != b"DICM"


def _series(
    uid: str, headers: list[SliceHeader], known: dict[str, list[str]], stray: dict[Path, list[str]]
) -> DicomSeries:
    folders = sorted({item.path.parent for item in headers})
    is_mixed = any(not item.is_localizer for item in headers)
    return DicomSeries(
        series_uid=uid,
        folder=folders[0] if folders else Path(uid),
        slices=tuple(item for item in headers if not (item.is_localizer and is_mixed)),
        localizers=tuple(item for item in headers if item.is_localizer and is_mixed),
        broken=(*known.get(uid, []), *(text for folder in folders for text in stray.get(folder, []))),
    )


_FACTS: dict[str, Callable[[SliceHeader], Hashable]] = {
    "StudyInstanceUID": lambda item: item.study_uid,
    "PatientID": lambda item: item.patient_id,
    "Modality": lambda item: item.modality,
    "size (columns x rows)": lambda item: f"{item.columns} x {item.rows}",
    "PixelSpacing": lambda item: item.pixel_spacing,
    "ImageOrientationPatient": lambda item: (
        item.orientation and tuple(round(value / ORIENTATION_TOLERANCE) for value in item.orientation)
    ),
    "PhotometricInterpretation": lambda item: "MONOCHROME1" if item.pixels.is_monochrome1 else "MONOCHROME2",
}
"""What all slices of a series must share."""

_NEEDED = ("PixelSpacing", "ImageOrientationPatient")
_MAY_LACK = ("StudyInstanceUID", "PatientID", "Modality")


def _check_alike(slices: Sequence[SliceHeader], name: str, fact: Callable[[SliceHeader], Any]) -> None:
    """Refuse a series unless all its slices agree on one fact; most of them are taken to be right."""
    if name in _MAY_LACK:
        slices = [item for item in slices if fact(item) is not None] or slices
    counts = Counter(fact(item) for item in slices)
    usual = counts.most_common(1)[0][0]
    odd = next((item for item in slices if not _agrees(fact(item), usual)), None)
    if odd is not None:
        got, expected = shown(_worded(odd, name, fact)), shown(_worded(_first(slices, fact, usual), name, fact))
        text = f"{name} is {got}, expected {expected} as in most slices of its series; sort the files apart"
        raise fault(odd.path, text)
    if name in _NEEDED and usual is None:
        raise fault(slices[0].path, f"{name} is missing in this and the other slices; its grid is unknown")


def _agrees(got: Any, usual: Any) -> bool:
    """Whether two facts are equal; rounded cosines may differ by one step."""
    if isinstance(got, tuple) and isinstance(usual, tuple) and isinstance(got[0], int):
        return all(abs(a - b) <= 1 for a, b in zip(got, usual, strict=True))
    return bool(got == usual)


def _first(slices: Sequence[SliceHeader], fact: Callable[[SliceHeader], Any], value: Any) -> SliceHeader:
    return next(item for item in slices if fact(item) == value)


def _worded(item: SliceHeader, name: str, fact: Callable[[SliceHeader], Any]) -> object:
    value = item.orientation if name == "ImageOrientationPatient" else fact(item)
    if isinstance(value, tuple):
        return " ".join(f"{number:.5g}" for number in value)
    return "missing" if value is None else value


def _grid(slices: Sequence[SliceHeader]) -> tuple[tuple[SliceHeader, ...], Geometry]:
    """Slices sorted by their place along the normal, and the grid they lie in."""
    missing = next((item for item in slices if item.position is None), None)
    if missing is not None:
        raise fault(missing.path, f"ImagePositionPatient is missing; its place in the stack is unknown; {gate.FETCH}")
    positions = np.array([item.position for item in slices], dtype=np.float64)
    if np.abs(positions).max() > gate.MAX_ORIGIN_MM:
        raise fault(slices[0].path, f"ImagePositionPatient is beyond ±{gate.MAX_ORIGIN_MM:.0f} mm")
    direction = _direction(slices[0])
    order = np.argsort(positions @ direction[:, 2], kind="stable")
    ordered = tuple(slices[k] for k in order)
    positions = positions[order]
    _check_places(ordered, positions, direction[:, 2])
    first, last = positions[0], positions[-1]
    between_rows, between_columns = ordered[0].pixel_spacing or (0.0, 0.0)
    spacing = float(np.sqrt(((last - first) ** 2).sum())) / (len(ordered) - 1)
    x, y, z = first.tolist()
    grid = Geometry(
        origin=(x, y, z),
        spacing=(between_columns, between_rows, spacing),
        direction=tuple((_direction(ordered[0]) + 0.0).ravel().tolist()),
        shape_irc=(len(ordered), ordered[0].rows, ordered[0].columns),
    )
    return ordered, grid


def _direction(item: SliceHeader) -> FloatArray:
    """3x3 matrix of the axes column, row, slice; made orthonormal as ITK's GDCM reader does it.

    The second axis is kept, the third is the normal of both, the first is set at right angles to these.
    """
    row, column = np.array(item.orientation, dtype=np.float64).reshape(2, 3)
    lengths = [float(np.linalg.norm(axis)) for axis in (row, column)]
    if any(abs(length - 1) > gate.ORTHONORMAL_TOLERANCE for length in lengths) or (
        abs(row @ column) > gate.ORTHONORMAL_TOLERANCE
    ):
        text = "ImageOrientationPatient is not two unit vectors at right angles"
        raise fault(item.path, f"{text}: {shown(' '.join(f'{value:.4g}' for value in (*row, *column)), 60)}")
    normal: npt.NDArray[Any] = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    column = column / np.linalg.norm(column)
    return np.stack([np.cross(column, normal), column, normal], axis=1)


def _check_places(slices: Sequence[SliceHeader], positions: FloatArray, normal: FloatArray) -> None:
    """Refuse slices that share a place, slip sideways, or do not lie at equal gaps."""
    along = positions @ normal
    gaps = np.diff(along)
    twins = np.flatnonzero(gaps <= SAME_PLACE_MM)
    if len(twins):
        a, b = slices[twins[0]], slices[twins[0] + 1]
        text = f"the same position as {shown(b.path.name)} ({len(twins)} such in the series); keep one of them"
        raise fault(a.path, text)
    _check_tilt(slices, positions, along, normal)
    usual = float(np.median(gaps))
    allowed = min(GAP_MM + GAP_SHARE * usual, GAP_LIMIT * usual)
    odd = np.flatnonzero(np.abs(gaps - usual) > allowed)
    if len(odd):
        a, gap = slices[odd[0]], float(gaps[odd[0]])
        lost = round(gap / usual) - 1
        guess = f"{lost} missing there" if lost > 0 else "not equally spaced"
        following = shown(slices[odd[0] + 1].path.name)
        text = f"{gap:.4g} mm to the next slice {following}, expected {usual:.4g}: {guess}; {gate.FETCH}"
        raise fault(a.path, text)
    ideal = np.linspace(along[0], along[-1], len(along))
    worst = int(np.argmax(np.abs(along - ideal)))
    if abs(along[worst] - ideal[worst]) > allowed:
        off = f"{abs(along[worst] - ideal[worst]):.3g} mm off its place in an even stack"
        raise fault(slices[worst].path, f"{off}, expected at most {allowed:.3g}: the gaps change along the series")


def _check_tilt(slices: Sequence[SliceHeader], positions: FloatArray, along: FloatArray, normal: FloatArray) -> None:
    """Refuse a stack that leans: its voxels lie on no right-angled grid."""
    steps = positions - positions[0]
    sideways = np.linalg.norm(steps - np.outer(along - along[0], normal), axis=1)
    worst = int(np.argmax(sideways - TILT_TOLERANCE * (along - along[0])))
    if sideways[worst] > GAP_MM + TILT_TOLERANCE * (along[worst] - along[0]):
        angle = math.degrees(math.atan2(sideways[worst], along[worst] - along[0]))
        text = f"{sideways[worst]:.3g} mm sideways of the first slice: gantry tilt of {angle:.3g} degrees or a"
        raise fault(slices[worst].path, f"{text} mix of series; expected a straight stack; untilt it: dcm2niix")


def _dtype(slices: Sequence[SliceHeader]) -> "np.dtype[Any]":
    """Smallest of int16 and int32 that holds every HU the stored bits could mean; float32 where HU are not whole."""
    if not all(item.pixels.is_whole for item in slices):
        return np.dtype(np.float32)
    ends = [end * p.slope + p.intercept for p in {item.pixels for item in slices} for end in p.stored_range]
    for kind in INTEGER_TYPES:
        if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.float32)
