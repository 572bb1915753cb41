"""A synthetic LUNA16: chest CTs, nodules and candidates made from a seed, in LUNA16's files.

Nothing in it is a real person's. What it shares with LUNA16 is what software trips over: header, names and
columns, flipped scans, awkward spacing and origins, -3024 outside the field of view, metal, nodules of
LUNA16's sizes, a patient with two scans, scans without a nodule, and candidates of a series that isn't there.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lunaprep.errors import UsageError
from lunaprep.geometry import Geometry
from lunaprep.sources.phantom_scan import UID_PREFIX, PhantomScan, Row, draw_series_uid, make_scan

DEFAULT_SIZE = (96, 160, 160)
"""Slices, rows, columns: 2 mm pixels and 2.2 to 2.5 mm slices, 5 MB a scan, half a second to make."""

MIN_SIZE = (16, 48, 48)
"""Below this the lungs are narrower than a few nodules."""

MAX_SUBSETS = 10

MARKER_FILE = "phantom.json"
"""Says that the folder is a phantom, and how it was made; written first."""

CSV_HEADERS = {
    "annotations.csv": "seriesuid,coordX,coordY,coordZ,diameter_mm",
    "annotations_excluded.csv": "seriesuid,coordX,coordY,coordZ,diameter_mm",
    "annotations_with_malignancy.csv": "seriesuid,coordX,coordY,coordZ,diameter_mm,mal_bool,patient_id",
    "candidates.csv": "seriesuid,coordX,coordY,coordZ,class",
    "patients.csv": "seriesuid,patient_id",
}
SERIES_FILE = "seriesuids.csv"

PARTIAL = ".partial"
"""Ends the name of a file that is being written."""

ABSENT_NUMBER = 2**32 - 1
"""Scan number of the series that has candidates and no scan."""

ABSENT_CANDIDATES = 3

SCAN_NAME = re.compile(re.escape(UID_PREFIX) + r"\d{30}\.(mhd|raw)(\.partial)?")


@dataclass(frozen=True)
class PhantomSummary:
    """What was written."""

    scans: int
    nodules: int
    """Rows of annotations.csv."""
    candidates: int
    """Rows of candidates.csv, those of the absent series too."""
    positives: int
    """Rows of candidates.csv of class 1."""
    bytes: int
    """Of all files together."""
    replaced: int = 0
    """Scans of an earlier phantom in the folder that are gone now, or made anew."""


@dataclass
class Tables:
    """The CSV files while they are gathered: file name -> series UID -> lines."""

    lines: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {name: {} for name in CSV_HEADERS})
    num_positives: int = 0

    def add(self, scan: PhantomScan) -> None:
        """Take over the rows of one scan."""
        uid = scan.series_uid
        self.num_positives += sum(row.value == 1 for row in scan.candidates)
        self.lines["candidates.csv"][uid] = [csv_line(uid, row) for row in scan.candidates]
        self.lines["annotations.csv"][uid] = [csv_line(uid, row) for row in scan.annotations]
        self.lines["annotations_excluded.csv"][uid] = [csv_line(uid, row) for row in scan.excluded]
        self.lines["annotations_with_malignancy.csv"][uid] = [
            f"{csv_line(uid, row)},{row.is_malignant},{scan.patient_id}" for row in scan.annotations
        ]
        self.lines["patients.csv"][uid] = [f"{uid},{scan.patient_id}"]

    def count(self, name: str) -> int:
        """Rows of one file."""
        return sum(len(lines) for lines in self.lines[name].values())

    def text(self, name: str) -> str:
        """One CSV file, grouped by series in the order of their UIDs."""
        return "\n".join(
            [CSV_HEADERS[name], *(line for _, lines in sorted(self.lines[name].items()) for line in lines), ""]
        )


def write_phantom(  # noqa: PLR0913 - each is an option of the command, all have defaults
    folder: Path,
    num_scans: int = 10,
    seed: int = 0,
    size: tuple[int, int, int] = DEFAULT_SIZE,
    hard: bool = False,
    num_subsets: int = MAX_SUBSETS,
    progress: Callable[[int, int], None] | None = None,
    num_candidates: int = 40,
) -> PhantomSummary:
    """Write a synthetic LUNA16 into a folder.

    Parameters
    ----------
    folder : Path
        New, empty, or an earlier phantom, which is replaced.
    num_scans : int
        Scans; they go to subset0, subset1, … in turn.
    seed : int
        Same seed, same bytes. A scan doesn't depend on how many there are.
    size : tuple of 3 int
        Slices, rows, columns of every scan. The thorax is fitted to the grid; nodules keep their millimetres,
        up to 0.16 of the field of view.
    hard : bool
        Nodules that no threshold finds: ground glass, on vessels and walls, among 16 look-alikes, more noise.
    num_subsets : int
        Folders to spread the scans over, 1 to 10.
    progress : callable, optional
        Called with scans done and scans in all, after each scan.
    num_candidates : int
        Negative candidates a scan; the positives come on top.

    Returns
    -------
    PhantomSummary

    Raises
    ------
    UsageError
        The folder holds something else, or a number is out of range. Nothing has been written then.
    """
    folder = Path(folder)
    check_numbers(num_scans, seed, size, num_subsets, num_candidates)
    check_folder(folder)
    replaced = sum(1 for _ in folder.glob("subset?/*.mhd"))
    uids = [draw_series_uid(seed, number) for number in range(num_scans)]
    marker = {"made_by": "lunaprep phantom", "num_scans": num_scans, "seed": seed, "size": list(size), "hard": hard}
    marker |= {"num_subsets": num_subsets, "num_candidates": num_candidates}
    num_bytes = write_file(folder / MARKER_FILE, (json.dumps(marker, sort_keys=True, indent=2) + "\n").encode())
    remove_earlier(folder, {f"subset{k % num_subsets}/{uid}" for k, uid in enumerate(uids)})
    tables = Tables()
    for number in range(num_scans):
        scan = make_scan(seed, number, size, hard, num_candidates)
        num_bytes += write_scan(folder / f"subset{number % num_subsets}", scan)
        tables.add(scan)
        if progress:
            progress(number + 1, num_scans)
    absent = draw_series_uid(seed, ABSENT_NUMBER)
    tables.lines["candidates.csv"][absent] = list(absent_lines(seed, absent))
    num_bytes += write_file(folder / SERIES_FILE, "".join(f"{uid}\n" for uid in sorted([*uids, absent])).encode())
    num_bytes += sum(write_file(folder / name, tables.text(name).encode()) for name in CSV_HEADERS)
    rows = tables.count("candidates.csv")
    nodules = tables.count("annotations.csv")
    return PhantomSummary(num_scans, nodules, rows, tables.num_positives, num_bytes, replaced)


def check_numbers(num_scans: int, seed: int, size: tuple[int, int, int], num_subsets: int, num_candidates: int) -> None:
    """Raise UsageError for a number that cannot work."""
    if num_scans < 1:
        msg = f"phantom: got {num_scans} scans, expected 1 or more; raise --scans."
        raise UsageError(msg)
    if seed < 0:
        msg = f"phantom: got seed {seed}, expected 0 or more; choose another --seed."
        raise UsageError(msg)
    if len(size) != 3 or any(got < least for got, least in zip(size, MIN_SIZE, strict=True)):
        got, least = " x ".join(map(str, size)), " x ".join(map(str, MIN_SIZE))
        msg = f"phantom: got size {got}, expected at least {least} (slices x rows x columns); raise --size."
        raise UsageError(msg)
    if not 1 <= num_subsets <= MAX_SUBSETS:
        msg = f"phantom: got {num_subsets} subsets, expected 1 to {MAX_SUBSETS}; choose a number of these."
        raise UsageError(msg)
    if num_candidates < 0:
        msg = f"phantom: got {num_candidates} candidates a scan, expected 0 or more; raise the number."
        raise UsageError(msg)


def check_folder(folder: Path) -> None:
    """Raise UsageError unless the folder is new, empty, or holds an earlier phantom and nothing else."""
    advice = "expected a new or empty folder or an earlier phantom; name another folder, or clear this one."
    if folder.is_symlink() and not folder.exists():
        msg = f"{folder}: is a link that leads nowhere, {advice}"
        raise UsageError(msg)
    if not folder.exists():
        return
    if not folder.is_dir():
        msg = f"{folder}: is a file, {advice}"
        raise UsageError(msg)
    names = sorted(path.name for path in folder.iterdir())
    if names and not {MARKER_FILE, MARKER_FILE + PARTIAL} & set(names):
        msg = f"{folder}: holds {names[0]!r} and no {MARKER_FILE}, {advice}"
        raise UsageError(msg)
    foreign = next(foreign_entries(folder), None)
    if foreign is not None:
        msg = f"{folder}: holds {foreign.relative_to(folder).as_posix()!r}, {advice}"
        raise UsageError(msg)


def foreign_entries(folder: Path) -> Iterator[Path]:
    """Everything in a phantom's folder that is none of its files, in the order of names."""
    own = {MARKER_FILE, SERIES_FILE, *CSV_HEADERS}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            yield path
        elif re.fullmatch(r"subset\d", path.name) and path.is_dir():
            inner = sorted(path.iterdir())
            yield from (p for p in inner if not (SCAN_NAME.fullmatch(p.name) and p.is_file() and not p.is_symlink()))
        elif not (path.name.removesuffix(PARTIAL) in own and path.is_file()):
            yield path


def remove_earlier(folder: Path, kept: Iterable[str]) -> None:
    """Remove an earlier phantom's tables and those scans that are not `kept` (subsetK/UID), and emptied subsets."""
    stems = set(kept)
    for name in (SERIES_FILE, *CSV_HEADERS):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.glob("subset?/*")):
        if f"{path.parent.name}/{path.name.removesuffix('.mhd').removesuffix('.raw')}" not in stems:
            path.unlink()
    for path in sorted(folder.glob("subset?")):
        if not any(path.iterdir()):
            path.rmdir()
    for path in sorted(folder.glob("*" + PARTIAL)):
        path.unlink()


def write_scan(folder: Path, scan: PhantomScan) -> int:
    """Write one scan's voxels, then its header; returns their bytes."""
    name = scan.series_uid
    num_bytes = write_file(folder / f"{name}.raw", scan.hu.data.cast("B"))
    return num_bytes + write_file(folder / f"{name}.mhd", header_text(scan.geometry, f"{name}.raw").encode())


def header_text(geometry: Geometry, data_file: str) -> str:
    """A MetaImage header with LUNA16's keys in LUNA16's order, floats in full precision."""
    slices, rows, cols = geometry.shape_irc
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(f"{v:g}" for v in geometry.direction),
        "Offset": " ".join(repr(v) for v in geometry.origin),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "LPI" if geometry.is_flipped else "RAI",
        "ElementSpacing": " ".join(repr(v) for v in geometry.spacing),
        "DimSize": f"{cols} {rows} {slices}",
        "ElementType": "MET_SHORT",
        "ElementDataFile": data_file,
    }
    return "".join(f"{key} = {value}\n" for key, value in lines.items())


def csv_line(uid: str, row: Row) -> str:
    """One line of a CSV file: series, world point, and the row's value."""
    return ",".join([uid, *(repr(float(v)) for v in row.xyz), repr(row.value)])


def absent_lines(seed: int, uid: str) -> Iterator[str]:
    """Candidates (class 0) of the series that isn't on disk."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, ABSENT_NUMBER, 1)))
    for xyz in rng.uniform(-90, 90, size=(ABSENT_CANDIDATES, 3)):
        yield csv_line(uid, Row(np.round(xyz, 9), 0))


def write_file(path: Path, data: bytes | memoryview) -> int:
    """Write a file whole or not at all, making its folder; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(data)
    partial.replace(path)
    return len(data)
