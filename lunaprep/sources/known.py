"""The data sets that can be built from, by name."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lunaprep.errors import UsageError
from lunaprep.sources.luna16 import TablePaths, find_files, read_source
from lunaprep.sources.source import SourceData

if TYPE_CHECKING:
    from lunaprep.scans.dicom_notes import HeaderNotes

SOURCES = ("luna16", "dicom", "lidc", "lung-pet-ct-dx")


def read_data(
    name: str, root: Path, subsets: Collection[int] | None, tables: TablePaths, notes: "HeaderNotes | None" = None
) -> SourceData:
    """Find the scans of a data set and read its tables; no voxel is read.

    Parameters
    ----------
    name : str
        One of `SOURCES`.
    root : Path
        Folder of the data.
    subsets : collection of int, or None
        Subsets to take; None takes all there are.
    tables : TablePaths
        Tables named by the user; only ``luna16`` and ``dicom`` take any.
    notes : HeaderNotes, optional
        DICOM headers known from an earlier time.

    Raises
    ------
    UsageError, TableError
        As the source's own function.
    """
    if name == "luna16":
        return read_source(root, _in_order(subsets), tables)
    from lunaprep.sources import dicom_folders

    _refuse_foreign(name, tables)
    if name == "dicom":
        data = dicom_folders.read_dicom(root, tables.candidates, tables.annotations, notes)
    else:
        read = dicom_folders.read_lidc if name == "lidc" else dicom_folders.read_lung_pet_ct_dx
        data = read(root, notes)
    if subsets is None:
        return data
    scans = tuple(scan for scan in data.scans if scan.subset in subsets)
    if not scans:
        wanted, have = (", ".join(map(str, sorted(numbers))) for numbers in (subsets, data.subsets))
        message = (
            f"{root}: no scan of subset {wanted}; its patients are of subset {have}, which a hash of their ids says. "
            "Choose of these with --subsets, or leave it out"
        )
        raise UsageError(message)
    return replace(data, subsets=tuple(sorted(subsets)), scans=scans)


def check_data(name: str, root: Path, subsets: Collection[int] | None, tables: TablePaths) -> None:
    """Refuse a folder, or a choice of it, that `read_data` would refuse too; no file is opened, so it takes no time.

    Parameters
    ----------
    name, root, subsets, tables
        As of `read_data`.

    Raises
    ------
    UsageError
        No such folder, subset or table, or no scan.
    """
    if name == "luna16":
        find_files(root, _in_order(subsets), tables)
        return
    from lunaprep.sources.dicom_folders import check_root

    _refuse_foreign(name, tables)
    check_root(root)


def _in_order(subsets: Collection[int] | None) -> list[int] | None:
    return None if subsets is None else sorted(subsets)


def _refuse_foreign(name: str, tables: TablePaths) -> None:
    given = [role for role, path in vars(tables).items() if path is not None]
    allowed = ("candidates", "annotations") if name == "dicom" else ()
    if foreign := [role for role in given if role not in allowed]:
        message = f"--{foreign[0]} is no option of --source {name}; leave it out"
        raise UsageError(message)
