"""LUNA16: subset0 to subset9 with one .mhd and .raw a series, and CSV tables beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lunaprep.candidates import read_annotations, read_candidates, read_malignancy, read_patients
from lunaprep.csv_rows import RowFault
from lunaprep.datasheet import load_sheet
from lunaprep.errors import UsageError
from lunaprep.scans.open import SUFFIXES
from lunaprep.sources.advice import SUBSET, passed_over, without_subsets
from lunaprep.sources.source import FoundScan, SourceData, input_file

CANDIDATES = ("candidates_V2.csv", "candidates.csv")
"""Names looked for, in this order: the organisers ask to use V2 in place of the first list."""

ANNOTATIONS = "annotations.csv"
MALIGNANCY = "annotations_with_malignancy.csv"
PATIENTS = ("patients.csv", "luna16_series_to_lidc_patient.csv")
LUNGS = "seg-lungs-LUNA16"
"""LUNA16's own masks of the lungs, a file a scan."""


@dataclass(frozen=True)
class TablePaths:
    """Tables, and the lung masks' folder, named by the user; None means the usual name in the data folder."""

    candidates: Path | None = None
    annotations: Path | None = None
    malignancy: Path | None = None
    patients: Path | None = None
    lungs: Path | None = None


@dataclass(frozen=True)
class Places:
    """Where everything of a copy lies: its scans, the tables and lung masks that are there, and what is odd in it."""

    subsets: tuple[int, ...]
    scans: tuple[FoundScan, ...]
    tables: TablePaths
    notes: tuple[str, ...]


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
    places = find_files(root, subsets, tables)
    named = places.tables
    assert named.candidates and named.annotations  # noqa: PT018 - find_files has found them
    candidates, annotations = read_candidates(named.candidates), read_annotations(named.annotations)
    files = [input_file("candidates", named.candidates), input_file("annotations", named.annotations)]
    faults = [*candidates.faults, *annotations.faults]
    malignancy = None
    if named.malignancy:
        table = read_malignancy(named.malignancy)
        malignancy = table.frame
        files.append(input_file("malignancy", named.malignancy))
        faults += table.faults
    patients = _known_patients(malignancy)
    if named.patients:
        mapping, more = read_patients(named.patients)
        patients |= mapping
        files.append(input_file("patients", named.patients))
        faults += more
    return SourceData(
        root=root,
        subsets=places.subsets,
        scans=places.scans,
        candidates=candidates.frame,
        annotations=annotations.frame,
        malignancy=malignancy,
        patients=patients,
        files=tuple(files),
        faults=_once(faults),
        lungs=named.lungs,
        notes=places.notes,
    )


def find_files(root: Path, subsets: Sequence[int] | None, tables: TablePaths) -> Places:
    """Find the scans and the tables, as `read_source`; no file is opened.

    Raises
    ------
    UsageError
        No such folder, subset or table, or no scan.
    """
    folders = _subset_folders(root, subsets)
    headers = _headers(folders)
    scans = _find_scans(headers)
    notes = [
        *_misnamed(root),
        *filter(None, map(passed_over, folders.values())),
        *(
            f"{str(path)!a}: passed over, its name is no text (UTF-8), so no series UID. Rename it"
            for _, path in headers
            if not _is_text(path.name)
        ),
    ]
    if not scans:
        names = ", ".join(folder.name for folder in folders.values())
        message = f"{root}: no scan ({', '.join(SUFFIXES)}) in {names}: {notes[-1]}"
        raise UsageError(message)
    lungs = tables.lungs or (root / LUNGS if (root / LUNGS).is_dir() else None)
    if lungs is not None and not lungs.is_dir():
        message = f"{lungs}: no such folder; give the folder that holds a UID.mhd for each scan, or leave --lungs out"
        raise UsageError(message)
    found = TablePaths(
        candidates=tables.candidates or _needed(root, CANDIDATES, "candidates"),
        annotations=tables.annotations or _needed(root, (ANNOTATIONS,), "annotations"),
        malignancy=tables.malignancy or _first_of(root, (MALIGNANCY,)),
        patients=tables.patients or _first_of(root, PATIENTS),
        lungs=lungs,
    )
    return Places(tuple(folders), scans, found, tuple(notes))


def _subset_folders(root: Path, subsets: Sequence[int] | None) -> dict[int, Path]:
    if not root.is_dir():
        message = f"{root}: no such folder; expected LUNA16's subset0 to subset9 in it. Give --data, or set LUNA16_ROOT"
        raise UsageError(message)
    there = {
        int(match[1]): path
        for path in sorted(root.iterdir())
        if (match := SUBSET.fullmatch(path.name)) and path.is_dir()
    }
    if not there:
        raise UsageError(without_subsets(root))
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


def _misnamed(root: Path) -> list[str]:
    """A line for each folder that is meant as a subset, going by its name, and is none."""
    return [
        f"{path.name!a} is passed over; subsets are named subset0, subset1, … Rename it, or move its scans into one"
        for path in sorted(root.glob("[sS][uU][bB][sS][eE][tT]*"))
        if path.is_dir() and not SUBSET.fullmatch(path.name)
    ]


def _needed(root: Path, names: Sequence[str], role: str) -> Path:
    if path := _first_of(root, names):
        return path
    folders = ", ".join(folder for folder in _table_folders() if folder)
    message = (
        f"{root} has no {' or '.join(names)}, nor have {folders} in it. Put it beside the subset folders, or give "
        f"--{role} FILE"
    )
    raise UsageError(message)


def _first_of(root: Path, names: Sequence[str]) -> Path | None:
    """A table by the first of its names that is there, beside the subset folders or where LUNA16's archives put it."""
    paths = (root / folder / name for name in names for folder in _table_folders())
    return next((path for path in paths if path.is_file()), None)


def _table_folders() -> list[str]:
    return list(load_sheet("luna16")["tables"]["csv_folders"])


def _known_patients(malignancy: pd.DataFrame | None) -> dict[str, str]:
    """Patients of the data sheet (LUNA16 has one with two scans), and of the malignancy table."""
    known = {uid: patient for patient, uids in load_sheet("luna16")["patients"].items() for uid in uids}
    if malignancy is not None and "patient_id" in malignancy:
        named = malignancy[malignancy["patient_id"].str.strip() != ""]
        known |= dict(zip(named["series_uid"], named["patient_id"], strict=True))
    return known


def _once(faults: list[RowFault]) -> tuple[RowFault, ...]:
    return tuple(dict.fromkeys(faults))
