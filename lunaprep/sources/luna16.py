"""LUNA16: subset0 to subset9 with one .mhd and .raw a series, and CSV tables beside them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lunaprep.candidates import read_annotations, read_candidates, read_malignancy, read_patients
from lunaprep.csv_rows import RowFault
from lunaprep.datasheet import load_sheet
from lunaprep.errors import UsageError
from lunaprep.scans.open import SUFFIXES
from lunaprep.sources.source import FoundScan, SourceData, input_file

CANDIDATES = ("candidates_V2.csv", "candidates.csv")
"""Names looked for, in this order: the organisers ask to use V2 in place of the first list."""

ANNOTATIONS = "annotations.csv"
MALIGNANCY = "annotations_with_malignancy.csv"
PATIENTS = ("patients.csv", "luna16_series_to_lidc_patient.csv")
LUNGS = "seg-lungs-LUNA16"
"""LUNA16's own masks of the lungs, a file a scan."""

_SUBSET = re.compile(r"subset([0-9]{1,4})")


@dataclass(frozen=True)
class TablePaths:
    """Tables, and the lung masks' folder, named by the user; None means the usual name in the data folder."""

    candidates: Path | None = None
    annotations: Path | None = None
    malignancy: Path | None = None
    patients: Path | None = None
    lungs: Path | None = None


def read_source(root: Path, subsets: Sequence[int] | None, tables: TablePaths) -> SourceData:
    """Find the scans of the given subsets and read the tables; no scan is opened.

    Parameters
    ----------
    root : Path
        Folder with the subset folders.
    subsets : sequence of int, or None
        Subsets to take; None takes all there are.
    tables : TablePaths
        Tables elsewhere than in `root`.

    Raises
    ------
    UsageError
        No such folder, subset or table.
    TableError
        A table that cannot be used as a whole.
    """
    folders = _subset_folders(root, subsets)
    candidates_path = tables.candidates or _first_of(root, CANDIDATES, "candidates")
    annotations_path = tables.annotations or _first_of(root, (ANNOTATIONS,), "annotations")
    candidates = read_candidates(candidates_path)
    annotations = read_annotations(annotations_path)
    files = [input_file("candidates", candidates_path), input_file("annotations", annotations_path)]
    faults = [*candidates.faults, *annotations.faults]
    malignancy_path = tables.malignancy or _if_there(root / MALIGNANCY)
    malignancy = None
    if malignancy_path:
        table = read_malignancy(malignancy_path)
        malignancy = table.frame
        files.append(input_file("malignancy", malignancy_path))
        faults += table.faults
    patients_path = tables.patients or next(filter(None, (_if_there(root / name) for name in PATIENTS)), None)
    patients = _known_patients(malignancy)
    if patients_path:
        mapping, more = read_patients(patients_path)
        patients |= mapping
        files.append(input_file("patients", patients_path))
        faults += more
    lungs = tables.lungs or (root / LUNGS if (root / LUNGS).is_dir() else None)
    if lungs is not None and not lungs.is_dir():
        message = f"{lungs}: no such folder; give the folder that holds a UID.mhd for each scan, or leave --lungs out"
        raise UsageError(message)
    headers = _headers(folders)
    return SourceData(
        root=root,
        subsets=tuple(folders),
        scans=_find_scans(headers),
        candidates=candidates.frame,
        annotations=annotations.frame,
        malignancy=malignancy,
        patients=patients,
        files=tuple(files),
        faults=_once(faults),
        lungs=lungs,
        notes=tuple(
            f"{str(path)!a}: passed over, its name is no text (UTF-8), so no series UID. Rename it"
            for _, path in headers
            if not _is_text(path.name)
        ),
    )


def _subset_folders(root: Path, subsets: Sequence[int] | None) -> dict[int, Path]:
    if not root.is_dir():
        message = f"{root}: no such folder; expected LUNA16's subset0 to subset9 in it. Give --data, or set LUNA16_ROOT"
        raise UsageError(message)
    there = {
        int(match[1]): path
        for path in sorted(root.iterdir())
        if (match := _SUBSET.fullmatch(path.name)) and path.is_dir()
    }
    if not there:
        message = f"{root} holds no subset folder; expected subset0 to subset9. Unpack LUNA16's archives into it"
        raise UsageError(message)
    wanted = sorted(there) if subsets is None else sorted(set(subsets))
    missing = [number for number in wanted if number not in there]
    if missing:
        have = ", ".join(map(str, sorted(there)))
        message = f"{root} has no subset{missing[0]} (it has {have}). Unpack it, or choose with --subsets"
        raise UsageError(message)
    return {number: there[number] for number in wanted}


def _headers(folders: dict[int, Path]) -> list[tuple[int, Path]]:
    """Subset and path of every file that is named like a scan."""
    return [
        (subset, path)
        for subset, folder in folders.items()
        for path in sorted(folder.iterdir())
        if path.name.endswith(SUFFIXES)
    ]


def _find_scans(headers: list[tuple[int, Path]]) -> tuple[FoundScan, ...]:
    found: dict[str, FoundScan] = {}
    for subset, path in headers:
        if not _is_text(path.name):
            continue
        suffix = next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))
        series_uid = path.name.removesuffix(suffix) or path.name
        first = found.get(series_uid)
        if first is None:
            found[series_uid] = FoundScan(series_uid, subset, path)
        else:
            found[series_uid] = FoundScan(series_uid, first.subset, first.path, twin=path)
    return tuple(found[uid] for uid in sorted(found))


def _is_text(name: str) -> bool:
    """Whether a file's name is text; other bytes are no series UID, and no table could hold them."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_of(root: Path, names: Sequence[str], role: str) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    message = f"{root} has no {' or '.join(names)}. Put it beside the subset folders, or give --{role} FILE"
    raise UsageError(message)


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _known_patients(malignancy: pd.DataFrame | None) -> dict[str, str]:
    """Patients of the data sheet (LUNA16 has one with two scans), and of the malignancy table."""
    known = {uid: patient for patient, uids in load_sheet("luna16")["patients"].items() for uid in uids}
    if malignancy is not None and "patient_id" in malignancy:
        named = malignancy[malignancy["patient_id"].str.strip() != ""]
        known |= dict(zip(named["series_uid"], named["patient_id"], strict=True))
    return known


def _once(faults: list[RowFault]) -> tuple[RowFault, ...]:
    return tuple(dict.fromkeys(faults))
