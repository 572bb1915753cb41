"""New scans: finding them, reading them through lunaprep's gate, and refusing what is no chest CT in HU.

A scan that cannot be right is refused with what was got and what was expected; it never becomes a list of findings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lunaprep.errors import ScanError
from lunaprep.scans.open import SUFFIXES, iter_slabs, open_scan
from lunaprep.scans.scan import Scan
from lunatrain.dense import HU_WINDOW
from lunatrain.errors import UsageError

if TYPE_CHECKING:
    from lunaprep.scans.dicom import DicomScan, DicomSeries

MAX_VOXELS = 2**29
"""The detector holds some 12 bytes for each voxel; LUNA16's largest scan has 2.0e8."""

SLAB = 16
AIR_HU, TISSUE_HU = (-1100.0, -500.0), (-200.0, 300.0)
MIN_AIR, MIN_TISSUE = 0.005, 0.002
"""Least shares of a chest CT's voxels within these HU. A chest is a third air, half tissue; a small piece of lung has
less of either, but some."""

THICK_MM = 3.5
"""Slices further apart are told: LUNA16 has none beyond 2.5 mm, and nodules slip through between them."""

Hu = npt.NDArray[np.int16]
AnyScan: TypeAlias = "Scan | DicomScan"


@dataclass(frozen=True)
class Input:
    """A scan to search: its header file, or the folder of a DICOM series; nothing may lead out of `root`."""

    path: Path
    root: Path
    series: "DicomSeries | None" = None

    @property
    def name(self) -> str:
        """What the scan is called where its series id is not known yet."""
        return self.series.series_uid if self.series else self.path.name


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in memory: `hu` (slices, rows, columns), clipped and whole; `notes` on what is unusual about it."""

    scan: "AnyScan"
    hu: Hu
    hu_min: float
    hu_max: float
    notes: tuple[str, ...]


@dataclass
class _Seen:
    """What the voxels were before clipping."""

    low: float = np.inf
    high: float = -np.inf
    air: int = 0
    tissue: int = 0
    is_whole: bool = True

    def add(self, slab: npt.NDArray[Any]) -> None:
        self.low, self.high = min(self.low, float(slab.min())), max(self.high, float(slab.max()))
        self.air += _number_within(slab, AIR_HU)
        self.tissue += _number_within(slab, TISSUE_HU)
        if slab.dtype.kind == "f" and self.is_whole:
            self.is_whole = bool((slab == np.rint(slab)).all())


def find_inputs(places: Sequence[Path]) -> tuple[Input, ...]:
    """Scans that files and folders stand for, each once, in the order given; a folder's sorted by path.

    Raises
    ------
    UsageError
        A place that is not there, or a folder without a scan.
    """
    found: dict[tuple[Path, str], Input] = {}
    for place in places:
        if place.is_dir():
            inputs = list(_scans_below(place))
            if not inputs:
                ends = ", ".join(SUFFIXES)
                message = f"{place} has no scan: no file in it ends in {ends}, and it is no DICOM series. Name a scan"
                raise UsageError(message)
        elif place.exists() or place.is_symlink():
            inputs = [Input(place, place.parent)]
        else:
            message = f"{place}: no such file or folder. Name a scan, or a folder of scans"
            raise UsageError(message)
        for item in inputs:
            found.setdefault((item.path.absolute(), item.name), item)
    return tuple(found.values())


def open_input(item: Input) -> AnyScan:
    """Check a scan's header and what can be known without its voxels.

    Raises
    ------
    ScanError
        Whatever is wrong, on one line.
    """
    scan = _open_dicom(item.series) if item.series else open_scan(item.path, item.root)
    slices, rows, columns = scan.geometry.shape_irc
    if slices * rows * columns > MAX_VOXELS:
        raise _fault(
            scan, f"{columns} x {rows} x {slices} voxels, expected at most {MAX_VOXELS:,}; cut it to the chest"
        )
    if scan.dtype.itemsize == 1:
        raise _fault(scan, f"its voxels are {scan.dtype}, {_EXPECTED_HU}")
    return scan


def read_volume(scan: AnyScan, min_slices: int) -> Volume:
    """Read a scan, clipped to `HU_WINDOW`, slab by slab into one int16 array.

    Parameters
    ----------
    scan : Scan
        As `open_input` gives it.
    min_slices : int
        Slices the segmentation looks at together.

    Raises
    ------
    ScanError
        Thinner than that, not readable, or values that are not those of a CT.
    """
    num_slices = scan.geometry.shape_irc[0]
    if num_slices < min_slices:
        raise _fault(
            scan, f"{num_slices} slices, expected at least {min_slices}, which the segmentation looks at together"
        )
    hu = np.empty(scan.geometry.shape_irc, dtype=np.int16)
    seen, start = _Seen(), 0
    for slab in _slabs(scan):
        seen.add(slab)
        part = hu[start : start + len(slab)]
        np.copyto(part, _clipped(slab), casting="unsafe")
        start += len(slab)
    _check_values(scan, seen, hu.size)
    return Volume(scan, hu, seen.low, seen.high, tuple(_notes(scan, seen)))


_EXPECTED_HU = "expected HU, from about -1000 (air) over 0 (water) to 1000 and more (bone); export the CT with its HU"


def _check_values(scan: AnyScan, seen: _Seen, size: int) -> None:
    got = f"{seen.low:g} to {seen.high:g}"
    if seen.low == seen.high:
        raise _fault(scan, f"all voxels are {seen.low:g}, {_EXPECTED_HU}")
    for (low, high), number, least, what in (
        (AIR_HU, seen.air, MIN_AIR, "air or lung"),
        (TISSUE_HU, seen.tissue, MIN_TISSUE, "soft tissue"),
    ):
        if number < least * size:
            share = 100 * number / size
            raise _fault(
                scan,
                f"its values, {got}, are not those of a chest CT: {share:.2g} % of the voxels lie from {low:.0f} to "
                f"{high:.0f} ({what}), expected {100 * least:g} % or more; {_EXPECTED_HU}",
            )


def _clipped(slab: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values within `HU_WINDOW`, fractions rounded; numpy refuses limits that the type cannot hold."""
    low, high = HU_WINDOW
    if slab.dtype.kind == "f":
        return np.asarray(np.rint(np.clip(slab, low, high)))
    return np.asarray(np.clip(slab, max(low, int(np.iinfo(slab.dtype).min)), high))


def _notes(scan: AnyScan, seen: _Seen) -> Iterable[str]:
    depth_mm = scan.geometry.spacing_irc[0]
    if depth_mm > THICK_MM:
        yield f"the slices are {depth_mm:g} mm apart, the networks have learnt from 2.5 mm and less: expect misses"
    if not seen.is_whole:
        yield "HU were rounded to whole numbers"


def _scans_below(folder: Path) -> Iterable[Input]:
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and not path.is_dir())
    if paths:
        return [Input(path, folder) for path in paths]
    from lunaprep.scans.dicom import find_series

    return [Input(series.folder, folder, series) for series in find_series(folder).series]


def _open_dicom(series: "DicomSeries") -> "DicomScan":
    from lunaprep.scans.dicom import describe

    return describe(series)


def _slabs(scan: AnyScan) -> Iterable[npt.NDArray[Any]]:
    if isinstance(scan, Scan):
        return iter_slabs(scan, SLAB)
    from lunaprep.scans import dicom_pixels

    return dicom_pixels.iter_slabs(scan, SLAB)


def _number_within(slab: npt.NDArray[Any], limits: tuple[float, float]) -> int:
    low, high = limits
    return int(np.count_nonzero((slab >= low) & (slab <= high)))


def _fault(scan: AnyScan, text: str) -> ScanError:
    return ScanError(f"{scan.path.name}: {text}")
