"""DICOM folders as sources: plain ones with LUNA16's tables, LIDC-IDRI with its readings, Lung-PET-CT-Dx with boxes.

All three hand over what every source does. A series is checked here, for its headers have been read anyway; the plan
takes the checked scan, or the reason why there is none, without opening a file again.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lunaprep.candidates import read_annotations, read_candidates, votes_text
from lunaprep.csv_rows import RowFault
from lunaprep.errors import ScanError, TableError, UsageError
from lunaprep.masks import DrawnMask
from lunaprep.scans.dicom import MODALITY, DicomScan, DicomSeries, describe, find_series
from lunaprep.scans.dicom_notes import HeaderNotes
from lunaprep.sources.lidc_nodules import Finding, check_reading, consensus_mask, find_findings
from lunaprep.sources.lidc_xml import Reading, is_xray_reading, read_reading, same_marks
from lunaprep.sources.source import FoundScan, InputFile, SourceData, input_file
from lunaprep.sources.voc_xml import LesionBox, SliceBoxes, index_boxes, join_boxes, read_boxes

NUM_SUBSETS = 10
"""Folds that patients are dealt into, as many as LUNA16 has."""

SAME_MARK_MM = 3.0
"""Readers' points closer than this are one: they are set by hand on something of about that size."""

ANNOTATION_COLUMNS = {
    "annotation_id": "int64",
    "series_uid": "object",
    "x_mm": "float64",
    "y_mm": "float64",
    "z_mm": "float64",
    "diameter_mm": "float64",
}
CANDIDATE_COLUMNS = {
    "candidate_id": "int64",
    "series_uid": "object",
    "x_mm": "float64",
    "y_mm": "float64",
    "z_mm": "float64",
    "is_nodule": "bool",
}

Xyz = tuple[float, float, float]


@dataclass(frozen=True)
class FoundSeries(FoundScan):
    """A series whose headers were read: its checked scan, or why there is none. `path` is its folder."""

    scan: DicomScan | None = None
    reason: str | None = None
    patient_id: str | None = None

    def open(self) -> DicomScan:
        """Hand out the scan that was checked when it was found."""
        if self.scan is None:
            raise ScanError(self.reason or "not a scan")
        return self.scan


@dataclass(frozen=True)
class FoundFolder:
    """Series of CT in a folder, and what else it holds."""

    found: tuple[FoundSeries, ...]
    left_out: tuple[str, ...]
    num_other: int
    faults: tuple[str, ...] = ()
    """A line for each damaged file, also where it is no series' fault."""

    @property
    def scans(self) -> dict[str, DicomScan]:
        """Usable scans by series."""
        return {item.series_uid: item.scan for item in self.found if item.scan is not None}

    @property
    def sop_uids(self) -> dict[str, list[str]]:
        """SOP instance UIDs of the slices, in the order of the grid, by series."""
        return {uid: [item.sop_uid for item in scan.slices] for uid, scan in self.scans.items()}


def fold_of(person: str) -> int:
    """Subset of a patient, 0 to 9: of the name alone, so that it does not depend on who else is there.

    >>> fold_of("LIDC-IDRI-0001"), fold_of("LIDC-IDRI-0002")
    (6, 8)
    """
    return int.from_bytes(hashlib.sha256(person.encode()).digest()[:8], "big") % NUM_SUBSETS


def find_scans(root: Path, notes: HeaderNotes | None = None) -> FoundFolder:
    """Find and check the CT series below a folder; PET, pictures and scouts are left out, each with a line.

    With notes, headers that are known from an earlier time aren't read again.

    Raises
    ------
    UsageError
        No such folder, or no CT series in it.
    """
    check_root(root)
    folder = find_series(root, notes)
    found: list[FoundSeries] = []
    left_out = []
    for series in folder.series:
        if series.modality not in (None, MODALITY) or all(item.is_localizer for item in series.slices):
            left_out.append(f"series …{series.series_uid[-12:]}: {series.modality}, {len(series.slices)} images")
        else:
            found.append(_checked(series))
    if not found:
        what = f"{folder.num_other} other files, {len(left_out)} other series"
        advice = (
            "leave --source out" if any(root.glob("subset[0-9]")) else "give the folder of the CT scans with --data"
        )
        message = f"{root} holds no CT series ({what}); {advice}"
        raise UsageError(message)
    return FoundFolder(tuple(found), tuple(left_out), folder.num_other, folder.faults)


def check_root(root: Path) -> None:
    """Refuse a folder that is not there, or that holds no file at all; none is opened.

    Raises
    ------
    UsageError
        So it is.
    """
    if not root.is_dir():
        message = f"{root}: no such folder; give the one that holds the DICOM files with --data"
        raise UsageError(message)
    if not any(path.is_file() for path in root.rglob("*")):
        message = f"{root} holds no CT series (it has no file at all); give the folder of the CT scans with --data"
        raise UsageError(message)


def _checked(series: DicomSeries) -> FoundSeries:
    uid, patient = series.series_uid, series.patient_id
    found = FoundSeries(uid, fold_of(patient or uid), series.folder, patient_id=patient)
    try:
        return replace(found, scan=describe(series))
    except ScanError as error:
        return replace(found, reason=str(error))


def read_dicom(
    root: Path, candidates: Path | None = None, annotations: Path | None = None, notes: HeaderNotes | None = None
) -> SourceData:
    """A plain DICOM folder, with tables as LUNA16's where they are given; without them only volumes can be built.

    Raises
    ------
    UsageError, TableError
        No CT series, or a table that cannot be used as a whole.
    """
    folder = find_scans(root, notes)
    tables = [_annotation_frame([]), _candidate_frame([])]
    files: list[InputFile] = []
    faults: list[RowFault] = []
    readers = ((annotations, "annotations", read_annotations), (candidates, "candidates", read_candidates))
    for k, (path, role, read) in enumerate(readers):
        if path is not None:
            table = read(path)
            tables[k] = table.frame
            faults += table.faults
            files.append(input_file(role, path))
    return _source(root, folder, tables, None, files, faults)


def read_lidc(root: Path, notes: HeaderNotes | None = None) -> SourceData:
    """LIDC-IDRI: DICOM series and the readers' XML files, anywhere below a folder.

    Nodules of at least three readers are annotations and positive candidates; the readers' non-nodules are negative
    ones, unless they lie in a nodule. What fewer readers outlined, and nodules under 3 mm, are neither. All that is no
    annotation is an excluded finding, as in LUNA16.
    """
    folder = find_scans(root, notes)
    annotations: list[dict[str, Any]] = []
    candidates: list[dict[str, Any]] = []
    excluded: list[dict[str, Any]] = []
    masks: dict[int, DrawnMask] = {}
    readings, faults = find_readings(root, folder.scans)
    for uid, scan in sorted(folder.scans.items()):
        reading = readings.get(uid)
        if reading is None:
            continue
        try:
            check_reading(reading, uid, scan.geometry, [item.sop_uid for item in scan.slices])
            findings = find_findings(reading, scan.geometry)
        except TableError as error:
            faults.append(RowFault(reading.path.name, 1, str(error)))
            continue
        sure = [item for item in findings if item.kind == "nodule"]
        for number, item in enumerate(sure, len(annotations)):
            placed = consensus_mask(item.nodule, scan.geometry) if item.nodule else None
            if placed and placed[1].any():
                masks[number] = DrawnMask.of(*placed)
        annotations += [_annotation(uid, item.xyz, item.diameter_mm) | _opinion(item) for item in sure]
        candidates += [_candidate(uid, item.xyz, True) for item in sure]
        excluded += [_annotation(uid, item.xyz, item.diameter_mm) for item in findings if item.kind != "nodule"]
        candidates += [_candidate(uid, xyz, False) for xyz in negatives(findings)]
    rated = [row for row in annotations if row["malignancy_votes"]]
    malignancy = _annotation_frame(rated, {"is_malignant": "bool", "malignancy_votes": "object"})
    tables = [_annotation_frame(annotations), _candidate_frame(candidates)]
    inputs = _inputs("readings", root, [reading.path for reading in readings.values()])
    data = _source(root, folder, tables, malignancy, [inputs], faults)
    return replace(data, masks=masks, excluded=_annotation_frame(excluded))


def read_lung_pet_ct_dx(root: Path, notes: HeaderNotes | None = None) -> SourceData:
    """Lung-PET-CT-Dx: DICOM series and VOC files, anywhere below a folder.

    Each lesion's middle is a positive candidate, its longest side the diameter, its letter the annotation's
    `subtype`. For each there is a negative one where its mirror image lies, in the other lung.

    Raises
    ------
    TableError
        No box matches a slice.
    UsageError
        All candidates are of one class.
    """
    folder = find_scans(root, notes)
    boxes, faults = find_boxes(root)
    if not boxes:
        message = f"{root} holds no box file that can be used; expected Annotation/…/SOP_INSTANCE_UID.xml below it"
        raise TableError(message)
    indexed = index_boxes(boxes, folder.sop_uids)
    faults += [RowFault(path.name, 1, "its slice is in no usable series here") for path in indexed.unmatched]
    annotations: list[dict[str, Any]] = []
    candidates: list[dict[str, Any]] = []
    for uid, scan in sorted(folder.scans.items()):
        lesions = join_boxes(indexed.by_series.get(uid, {}))
        for lesion in lesions:
            centre = lesion.centre_xyz(scan.geometry)
            longest = lesion.longest_mm(scan.geometry)
            annotations.append(_annotation(uid, centre, longest) | {"subtype": lesion.subtype})
            candidates.append(_candidate(uid, centre, True))
        candidates += [_candidate(uid, xyz, False) for xyz in mirrored(lesions, scan)]
    check_labels(("nodule" if item["is_nodule"] else "none" for item in candidates), "candidates")
    kinds = sorted({item["subtype"] for item in annotations})
    remarks = () if len(kinds) > 1 else (f"all subtypes are {kinds[0]!r}: training on them would mean nothing",)
    tables = [_annotation_frame(annotations, {"subtype": "object"}), _candidate_frame(candidates)]
    data = _source(root, folder, tables, None, [_inputs("boxes", root, [item.path for item in boxes])], faults)
    return replace(data, notes=(*data.notes, *remarks))


def find_boxes(root: Path) -> tuple[list[SliceBoxes], list[RowFault]]:
    """Pascal VOC files below a folder; one that cannot be used is a fault."""
    boxes: list[SliceBoxes] = []
    faults: list[RowFault] = []
    for path in sorted(root.rglob("*.xml")):
        try:
            boxes.append(read_boxes(path))
        except TableError as error:
            faults.append(RowFault(path.name, 1, str(error)))
    return boxes, faults


def negatives(findings: Sequence[Finding]) -> list[Xyz]:
    """Places that readers called no nodule, each once, less those inside what any reader outlined."""
    outlined = [item for item in findings if item.nodule is not None]
    kept: list[Xyz] = []
    for item in findings:
        if item.kind != "non_nodule":
            continue
        inside = any(math.dist(item.xyz, other.xyz) < other.diameter_mm / 2 for other in outlined)
        if not inside and all(math.dist(item.xyz, xyz) >= SAME_MARK_MM for xyz in kept):
            kept.append(item.xyz)
    return kept


def mirrored(lesions: Sequence[LesionBox], scan: DicomScan) -> list[Xyz]:
    """Middles of the lesions turned over at the scan's middle column, less those that fall into a lesion."""
    grid = scan.geometry
    places = []
    for lesion in lesions:
        i, r, c = lesion.centre_irc
        place = (i, r, grid.shape_irc[2] - 1 - c)
        hits = (
            all(a <= at < b for a, at, b in zip(other.start_irc, place, other.stop_irc, strict=True))
            for other in lesions
        )
        if not any(hits):
            x, y, z = grid.irc_to_xyz(place).tolist()
            places.append((x, y, z))
    return places


def check_labels(labels: Iterable[object], what: str) -> None:
    """Refuse labels that are all the same.

    Raises
    ------
    UsageError
        One label, or none: a network would be right every time, and have learned nothing.
    """
    kinds = sorted({str(label) for label in labels})
    if len(kinds) < 2:
        got = f"all {what} are {kinds[0]!r}" if kinds else f"there are no {what}"
        message = f"{got}: such runs reach 100 % accuracy and mean nothing; add scans of another kind"
        raise UsageError(message)


def find_readings(root: Path, scans: Mapping[str, DicomScan]) -> tuple[dict[str, Reading], list[RowFault]]:
    """Readings of the scans by series; of two for one series the first by path counts, another that differs is a fault.

    Readings of X-ray pictures are passed over.
    """
    readings: dict[str, Reading] = {}
    faults = []
    for path in sorted(root.rglob("*.xml")):
        try:
            reading = read_reading(path)
        except TableError as error:
            if not is_xray_reading(path):
                faults.append(RowFault(path.name, 1, str(error)))
            continue
        if reading.series_uid in readings:
            first = readings[reading.series_uid]
            if not same_marks(first, reading):
                text = f"another reading of series …{reading.series_uid[-12:]} than {first.path.name}, which is taken"
                faults.append(RowFault(path.name, 1, text))
        elif reading.series_uid in scans:
            readings[reading.series_uid] = reading
    return readings, faults


def _inputs(role: str, root: Path, paths: Iterable[Path]) -> InputFile:
    """All annotation files of a source as one input: there may be thousands."""
    hasher = hashlib.sha256()
    size = 0
    for path in sorted(paths):
        content = path.read_bytes()
        hasher.update(hashlib.sha256(content).digest() + path.relative_to(root).as_posix().encode() + b"\0")
        size += len(content)
    return InputFile(role, root / "*.xml", size, hasher.hexdigest())


def _opinion(item: Finding) -> dict[str, Any]:
    ratings = item.nodule.ratings if item.nodule else ()
    return {"is_malignant": bool(item.nodule and item.nodule.is_malignant), "malignancy_votes": votes_text(ratings)}


def _annotation(uid: str, xyz: Xyz, diameter_mm: float) -> dict[str, Any]:
    return {"series_uid": uid, "x_mm": xyz[0], "y_mm": xyz[1], "z_mm": xyz[2], "diameter_mm": diameter_mm}


def _candidate(uid: str, xyz: Xyz, is_nodule: bool) -> dict[str, Any]:
    return {"series_uid": uid, "x_mm": xyz[0], "y_mm": xyz[1], "z_mm": xyz[2], "is_nodule": is_nodule}


def _annotation_frame(rows: Sequence[Mapping[str, Any]], more: Mapping[str, str] | None = None) -> pd.DataFrame:
    return _frame(rows, {**ANNOTATION_COLUMNS, **(more or {})})


def _candidate_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return _frame(rows, CANDIDATE_COLUMNS)


def _frame(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> pd.DataFrame:
    """Rows as a table with exactly these columns; the first is their number."""
    number, *others = columns
    data = {name: pd.Series([row[name] for row in rows], dtype=columns[name]) for name in others}
    return pd.DataFrame({number: pd.Series(range(len(rows)), dtype=columns[number]), **data})


def _source(
    root: Path,
    folder: FoundFolder,
    tables: Sequence[pd.DataFrame],
    malignancy: pd.DataFrame | None,
    files: Sequence[InputFile],
    faults: Sequence[RowFault],
) -> SourceData:
    patients = {uid: scan.patient_id for uid, scan in folder.scans.items()}
    annotations, candidates = tables
    return SourceData(
        root=root,
        subsets=tuple(sorted({item.subset for item in folder.found})),
        scans=folder.found,
        candidates=candidates,
        annotations=annotations,
        malignancy=malignancy,
        patients={uid: patient for uid, patient in patients.items() if patient},
        files=tuple(files),
        faults=tuple(faults),
        studies={uid: scan.study_uid for uid, scan in folder.scans.items() if scan.study_uid},
        notes=tuple(f"left out {line}" for line in folder.left_out),
    )
