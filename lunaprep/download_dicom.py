"""A DICOM download held against its data sheet: which series and patients are there, what cannot be read.

Headers are read, no pixel. A plain DICOM folder has no sheet: then it is only said what was found.
"""

import os
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaprep.datasheet import load_sheet
from lunaprep.errors import TableError
from lunaprep.machine import default_workers
from lunaprep.parallel import spread
from lunaprep.scans import gate
from lunaprep.scans.dicom_notes import HeaderNotes
from lunaprep.sources.dicom_folders import FoundFolder, find_boxes, find_readings, find_scans
from lunaprep.sources.voc_xml import index_boxes

if TYPE_CHECKING:
    from lunaprep.verify.findings import Finding, Findings

SHEETS = {"lidc": "lidc-idri", "lung-pet-ct-dx": "lung-pet-ct-dx"}
"""Data sheet of a source; a plain DICOM folder has none."""


@dataclass(frozen=True)
class DicomReport:
    """What a DICOM folder has of what its sheet says it should.

    Parameters
    ----------
    source : str
        As `build --source` takes it.
    title : str
        What the data set is called.
    found, expected : dict of str to int
        CT ``series``, ``patients`` and ``slices``: on disk, and in a complete copy as far as that is known.
    unreadable : int
        Series among those found that a build would refuse.
    notes : tuple of str
        Worth knowing, no fault.
    findings : tuple of Finding
        Errors and warnings.
    """

    source: str
    title: str
    found: dict[str, int]
    expected: dict[str, int]
    unreadable: int
    notes: tuple[str, ...]
    findings: "tuple[Finding, ...]"

    @property
    def ok(self) -> bool:
        """Whether no error was found. What isn't there is no error: many work with a part."""
        return not any(finding.severity == "error" for finding in self.findings)

    def account(self) -> str:
        """Return the one-line account, such as ``2 of 1,018 series, 2 of 1,010 patients, 28 of 243,945 slices``."""
        parts = []
        for name, number in self.found.items():
            of = f" of {self.expected[name]:,}" if name in self.expected else ""
            word = name if of or number != 1 or name == "series" else name.removesuffix("s")
            parts.append(f"{number:,}{of} {word}")
        bad = f"; {self.unreadable} cannot be used" if self.unreadable else ""
        return ", ".join(parts) + bad

    def text(self) -> str:
        """Return the account for people, several lines."""
        return "\n".join([self.title, self.account(), *self.notes, *(finding.line() for finding in self.findings)])

    def to_json(self) -> dict[str, Any]:
        """Return the report under the one key ``data``, so that it can stand beside a store's report."""
        value = {k: v for k, v in asdict(self).items() if k not in ("findings", "found", "expected")}
        value |= {"found": self.found["series"], "expected": self.expected.get("series")}
        value |= {"found_all": self.found, "expected_all": self.expected}
        value["findings"] = [{k: v for k, v in asdict(f).items() if v is not None} for f in self.findings]
        return {"data": {"ok": self.ok, "account": self.account(), **value}}


def check_dicom(data: Path, source: str, progress: bool = False) -> DicomReport:
    """Hold a DICOM folder against its source's data sheet.

    Parameters
    ----------
    data : Path
        The folder.
    source : {"dicom", "lidc", "lung-pet-ct-dx"}
        What it is a copy of.
    progress : bool
        Whether to show a bar on stderr while the headers of many files are read.

    Raises
    ------
    UsageError
        No such folder, or no CT series in it.
    """
    from lunaprep.verify.findings import Findings

    read_many = partial(spread, workers=default_workers(), what="headers", progress=progress)
    folder = find_scans(data, HeaderNotes(Path(os.devnull), read_many))  # none are known, and none are kept
    known = load_sheet(SHEETS[source]) if source in SHEETS else {}
    found = Findings()
    _check_series(data, folder, known, found)
    notes = [f"left out {line}" for line in folder.left_out]
    notes += _patient_notes(folder, known)
    if source == "lidc":
        notes.append(_check_readings(data, folder, found))
    if source == "lung-pet-ct-dx":
        notes.append(_check_boxes(data, folder, found))
    counts = known.get("counts", {})
    numbers = {
        "series": len(folder.found),
        "patients": len({item.patient_id for item in folder.found} - {None}),
        "slices": sum(len(scan.slices) for scan in folder.scans.values()),
    }
    return DicomReport(
        source=source,
        title=known["dataset"]["title"] if known else "A DICOM folder, of which there is no data sheet",
        found=numbers,
        expected={name: counts[name] for name in numbers if name in counts},
        unreadable=sum(item.scan is None for item in folder.found),
        notes=tuple(notes),
        findings=found.as_tuple(),
    )


def _check_series(data: Path, folder: FoundFolder, known: dict[str, Any], found: "Findings") -> None:
    refused = known.get("refused", {}).get("patients", [])
    told = " ".join(item.reason or "" for item in folder.found)
    for item in folder.found:
        if item.scan is None:
            tell = found.warning if item.patient_id in refused else found.error
            tell("scan-unreadable", _place(item.path, data), str(item.reason), series_uid=item.series_uid)
    for line in folder.faults:
        if line not in told:
            found.error("file-unreadable", data.name, line)
    pattern = known.get("layout", {}).get("patient_id")
    for item in folder.found if pattern else ():
        if item.patient_id is not None and not re.fullmatch(pattern, item.patient_id):
            message = f"patient {gate.shown(item.patient_id)}, expected {pattern}; is it of another data set?"
            found.warning("series-unknown", _place(item.path, data), message, series_uid=item.series_uid)


def _patient_notes(folder: FoundFolder, known: dict[str, Any]) -> list[str]:
    """Patients of the sheet with several series, of which more than one is here."""
    here = {item.series_uid for item in folder.found}
    several = {patient: here & set(uids) for patient, uids in known.get("patients", {}).items()}
    return [f"patient {patient} has {len(uids)} scans here" for patient, uids in several.items() if len(uids) > 1]


def _check_readings(data: Path, folder: FoundFolder, found: "Findings") -> str:
    readings, faults = find_readings(data, folder.scans)
    for fault in faults:
        found.error("reading-unreadable", fault.file, fault.reason.removeprefix(f"{fault.file}: "))
    for uid, scan in sorted(folder.scans.items()):
        if uid not in readings:
            message = "no file of readings speaks of it; fetch the annotations of LIDC-IDRI too"
            found.warning("reading-missing", _place(scan.path, data), message, series_uid=uid)
    return f"{len(readings):,} of {len(folder.scans):,} usable series have readings"


def _check_boxes(data: Path, folder: FoundFolder, found: "Findings") -> str:
    boxes, faults = find_boxes(data)
    for fault in faults:
        found.error("boxes-unreadable", fault.file, fault.reason.removeprefix(f"{fault.file}: "))
    if not boxes:
        found.error("boxes-missing", data.name, "no box file; fetch the annotations of Lung-PET-CT-Dx too")
        return "no box file"
    try:
        indexed = index_boxes(boxes, folder.sop_uids)
    except TableError as error:
        found.error("boxes-unknown", data.name, str(error))
        return f"{len(boxes):,} box files"
    marked = sum(bool(slices) for slices in indexed.by_series.values())
    rest = f"; {len(indexed.unmatched):,} match no slice that is here" if indexed.unmatched else ""
    return f"{len(boxes):,} box files, on slices of {marked} of {len(folder.scans):,} usable series{rest}"


def _place(path: Path, data: Path) -> str:
    return path.relative_to(data).as_posix() if path.is_relative_to(data) else path.name
