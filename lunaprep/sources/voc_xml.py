"""Lung-PET-CT-Dx's boxes: one Pascal VOC file a slice, named by its SOP instance UID, with a subtype letter a box.

The files do not say which series a slice belongs to, and the boxes of one study lie in several of its series; so they
are looked up among the slices of all series. Boxes of one lesion in neighbouring slices are joined into one box in
three dimensions, in each series by itself.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lunaprep.errors import TableError
from lunaprep.geometry import Geometry
from lunaprep.safe_xml import Element, read_xml, xml_fault
from lunaprep.schema import SUBTYPE_NAMES

MAX_SLICES_BETWEEN = 1
"""Slices without a box that do not part a lesion in two."""

MAX_SIDE = 4096
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")

Span = tuple[int, int]
"""First voxel, and the one after the last."""


@dataclass(frozen=True)
class SliceBox:
    """One box in one slice; its pixels from xmin to xmax and ymin to ymax, both ends included."""

    sop_uid: str
    subtype: str
    rows: Span
    columns: Span


@dataclass(frozen=True)
class SliceBoxes:
    """One file: the slice it is about, its size (rows, columns) where given, and its boxes."""

    path: Path
    sop_uid: str
    size: tuple[int, int] | None
    boxes: tuple[SliceBox, ...]


@dataclass(frozen=True)
class LesionBox:
    """Boxes of one lesion in one series: the voxels they span, from `start_irc` to before `stop_irc`."""

    subtype: str
    start_irc: tuple[int, int, int]
    stop_irc: tuple[int, int, int]
    num_slices: int

    @property
    def centre_irc(self) -> tuple[float, float, float]:
        """Middle of the box, as a continuous index."""
        i, r, c = ((a + b - 1) / 2 for a, b in zip(self.start_irc, self.stop_irc, strict=True))
        return i, r, c

    def centre_xyz(self, geometry: Geometry) -> tuple[float, float, float]:
        """Middle of the box in the world, mm."""
        x, y, z = geometry.irc_to_xyz(self.centre_irc).tolist()
        return x, y, z

    def longest_mm(self, geometry: Geometry) -> float:
        """Longest side within the slices, mm, which stands for the lesion's diameter."""
        sides = [(b - a) * step for a, b, step in zip(self.start_irc, self.stop_irc, geometry.spacing_irc, strict=True)]
        return max(sides[1:])


@dataclass(frozen=True)
class IndexedBoxes:
    """Boxes by series and slice, and the files whose slice is in none of the series."""

    by_series: Mapping[str, Mapping[int, tuple[SliceBox, ...]]]
    unmatched: tuple[Path, ...]


def read_boxes(path: Path) -> SliceBoxes:
    """Read one VOC file; its name without ``.xml`` is the slice's SOP instance UID.

    Raises
    ------
    TableError
        No such file, damaged, dangerous, or with a box that is none; names the line.
    """
    sop_uid = path.name.removesuffix(".xml")
    if not _UID.fullmatch(sop_uid) or len(sop_uid) > 64:
        raise xml_fault(path, "its name is no SOP instance UID, so its slice is unknown")
    root = read_xml(path, "annotation")
    size = _size(path, root.first("size"))
    boxes = tuple(_box(path, sop_uid, item, size) for item in root.all("object"))
    return SliceBoxes(path, sop_uid, size, boxes)


def index_boxes(files: Sequence[SliceBoxes], slices: Mapping[str, Sequence[str]]) -> IndexedBoxes:
    """Find each file's slice among all series.

    Parameters
    ----------
    files : sequence of SliceBoxes
        Files of one or more studies.
    slices : mapping of str to sequence of str
        For each series, the SOP instance UIDs of its slices in the order of its grid.

    Raises
    ------
    TableError
        Not one file's slice is in the series: the boxes are of other scans.
    """
    place = {uid: (series, k) for series, uids in slices.items() for k, uid in enumerate(uids)}
    found: dict[str, dict[int, tuple[SliceBox, ...]]] = {}
    for item in files:
        if item.sop_uid in place:
            series, k = place[item.sop_uid]
            found.setdefault(series, {})[k] = found.get(series, {}).get(k, ()) + item.boxes
    if files and not found:
        message = (
            f"none of {len(files)} box files matches a slice of the {len(slices)} series; their names must be "
            "SOP instance UIDs of slices there: training on such data would mean nothing"
        )
        raise TableError(message)
    return IndexedBoxes(found, tuple(item.path for item in files if item.sop_uid not in place))


def join_boxes(boxes: Mapping[int, Sequence[SliceBox]]) -> tuple[LesionBox, ...]:
    """Join one series' boxes into lesions.

    Two boxes are of one lesion if their subtype is the same, they overlap when laid on each other, and at most
    `MAX_SLICES_BETWEEN` slices lie between them.

    Parameters
    ----------
    boxes : mapping of int to sequence of SliceBox
        Boxes by slice index.
    """
    flat = [(k, box) for k in sorted(boxes) for box in boxes[k]]
    group = list(range(len(flat)))
    for a, (k, one) in enumerate(flat):
        for b in range(a):
            if 0 < k - flat[b][0] <= MAX_SLICES_BETWEEN + 1 and _overlap(one, flat[b][1]):
                old, new = max(group[a], group[b]), min(group[a], group[b])
                group = [new if number == old else number for number in group]
    return tuple(
        _lesion([item for item, mine in zip(flat, group, strict=True) if mine == number])
        for number in sorted(set(group))
    )


def _lesion(members: Sequence[tuple[int, SliceBox]]) -> LesionBox:
    rows = [box.rows for _, box in members]
    columns = [box.columns for _, box in members]
    indices = [k for k, _ in members]
    return LesionBox(
        subtype=members[0][1].subtype,
        start_irc=(min(indices), min(a for a, _ in rows), min(a for a, _ in columns)),
        stop_irc=(max(indices) + 1, max(b for _, b in rows), max(b for _, b in columns)),
        num_slices=len(set(indices)),
    )


def _overlap(one: SliceBox, other: SliceBox) -> bool:
    pairs = ((one.rows, other.rows), (one.columns, other.columns))
    return one.subtype == other.subtype and all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in pairs)


def _size(path: Path, element: Element | None) -> tuple[int, int] | None:
    if element is None:
        return None
    return _whole(path, element, "height"), _whole(path, element, "width")


def _box(path: Path, sop_uid: str, item: Element, size: tuple[int, int] | None) -> SliceBox:
    subtype = (item.value("name") or "").upper()
    if subtype not in SUBTYPE_NAMES:
        text = f"line {item.line}: subtype is {ascii(subtype)[:20]}, expected one of {', '.join(SUBTYPE_NAMES)}"
        raise xml_fault(path, text)
    corners = item.first("bndbox")
    if corners is None:
        raise xml_fault(path, f"line {item.line}: bndbox is missing in an object")
    x, y = ((_whole(path, corners, f"{axis}min"), _whole(path, corners, f"{axis}max")) for axis in "xy")
    rows, columns = size or (MAX_SIDE, MAX_SIDE)
    if not (0 <= x[0] < x[1] <= columns and 0 <= y[0] < y[1] <= rows):
        got = f"x {x[0]} to {x[1]}, y {y[0]} to {y[1]}"
        raise xml_fault(path, f"line {corners.line}: the box is {got}, expected min < max within {columns} x {rows}")
    return SliceBox(sop_uid, subtype, (y[0], min(y[1] + 1, rows)), (x[0], min(x[1] + 1, columns)))


def _whole(path: Path, element: Element, name: str) -> int:
    text = element.value(name)
    if text is None or not re.fullmatch(r"[0-9]{1,6}", text):
        got = "missing" if text is None else ascii(text)[:20]
        raise xml_fault(path, f"line {element.line}: {name} is {got}, expected a whole number of pixels")
    return int(text)
