"""What every source hands over: scans found on disk, and the tables that speak of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lunaprep.csv_rows import RowFault
from lunaprep.masks import DrawnMask
from lunaprep.scans.open import open_scan
from lunaprep.scans.scan import Scan
from lunaprep.store.files import hash_file


@dataclass(frozen=True)
class FoundScan:
    """A scan on disk that has not been opened. `twin` is the other file of the same series, if there is one."""

    series_uid: str
    subset: int
    path: Path
    twin: Path | None = None

    def open(self) -> Scan:
        """Check the scan's header.

        Raises
        ------
        ScanError
            It cannot be used.
        """
        # the subset's own folder is the limit: it may be a link to another disk
        return open_scan(self.path, self.path.parent)


@dataclass(frozen=True)
class InputFile:
    """A table that was read: its role in the build, its path, and what it held."""

    role: str
    path: Path
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return what store.json keeps: the file's name, not its folder."""
        return {"role": self.role, "file": self.path.name, "bytes": self.bytes, "sha256": self.sha256}


def input_file(role: str, path: Path) -> InputFile:
    """Describe a table that is read."""
    return InputFile(role, path, path.stat().st_size, hash_file(path))


@dataclass(frozen=True)
class SourceData:
    """Everything a build needs to know before a voxel is read.

    `candidates`, `annotations` and `malignancy` have the columns that `lunaprep.candidates` gives them; annotations
    may have a text column `subtype` too. `patients` and `studies` map series to patient and study where known.
    """

    root: Path
    subsets: tuple[int, ...]
    scans: tuple[FoundScan, ...]
    candidates: pd.DataFrame
    annotations: pd.DataFrame
    malignancy: pd.DataFrame | None
    patients: dict[str, str]
    files: tuple[InputFile, ...]
    faults: tuple[RowFault, ...]
    lungs: Path | None = None
    """Folder with masks of the lungs, each named as its scan."""
    masks: Mapping[int, DrawnMask] = field(default_factory=dict)
    """Nodules' masks that people drew, by annotation_id; the others' are found by threshold."""
    studies: Mapping[str, str] = field(default_factory=dict)
    excluded: pd.DataFrame | None = None
    """Findings that are neither nodule nor certainly none, columns as `annotations`; diameter NaN where unknown."""

    notes: tuple[str, ...] = ()
    """What a user should know of the data that is no fault of it, a line each."""
