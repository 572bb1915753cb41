"""What every source hands over: scans found on disk, and the tables that speak of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lunaprep.candidates import RowFault
from lunaprep.store.files import hash_file


@dataclass(frozen=True)
class FoundScan:
    """A scan on disk that has not been opened. `twin` is the other file of the same series, if there is one."""

    series_uid: str
    subset: int
    path: Path
    twin: Path | None = None


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

    `candidates`, `annotations` and `malignancy` have the columns that `lunaprep.candidates` gives them;
    `patients` maps series to patient where known.
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
