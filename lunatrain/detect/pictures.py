"""Pictures of a scan and its findings for a page: grey PNG pixels, and on them SVG lines that stay sharp.

Planes are turned as radiologists read them (patient's right, or front, on the left; front, or head, up); where a
scan's axes lie along other directions than LUNA16's, its arrays are drawn as they are and no side is named. Lengths in
a picture are millimetres.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lunaprep.geometry import Geometry
from lunatrain.detect.grouping import Labels
from lunatrain.detect.segmenting import Lungs
from lunatrain.overlays import LUNG_WINDOW
from lunatrain.page import data_url

PLANES = {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}
"""Array axes drawn downwards and to the right."""

LETTERS = {0: ("S", "I"), 1: ("A", "P"), 2: ("R", "L")}
"""Where an axis begins and ends once it is turned."""

MARK, TEXT = "#ffb000", "#f0f0f0"
NUM_TILES = 20
TILE_PX = 240
"""Most pixels of a montage's tile along a side."""

_Box = tuple[float, float, float, float]

TILE_ON_FINDINGS = 10
FINDING_MM = 45.0
FINDING_DIAMETERS = 2.2
"""Side of a finding's picture: so many mm, or so many of its diameters where that is more."""

BAR_MM = 10
LABEL = 0.062
"""Size of a finding's number over the width of a tile."""


@dataclass(frozen=True, eq=False)
class View:
    """A scan to be drawn: HU, mm along slice, row, column, and which axes are to be turned (None: not known)."""

    hu: npt.NDArray[np.int16]
    steps: tuple[float, float, float]
    flips: tuple[bool, bool, bool] | None

    @classmethod
    def of(cls, hu: npt.NDArray[np.int16], geometry: Geometry) -> "View":
        """View of a whole scan."""
        axes = geometry.direction_matrix
        is_usual = bool((np.abs(axes).argmax(axis=0) == np.arange(3)).all())
        # slices are drawn downwards from the head, so it is those that run with z (up) that are turned
        flips = (bool(axes[2, 2] > 0), bool(axes[1, 1] < 0), bool(axes[0, 0] < 0)) if is_usual else None
        return cls(hu, geometry.spacing_irc, flips)

    def turned(self, array: npt.NDArray[Any], plane: str) -> npt.NDArray[Any]:
        """A plane's array as it is drawn."""
        for k, axis in enumerate(PLANES[plane]):
            if self.flips is not None and self.flips[axis]:
                array = np.flip(array, k)
        return array


def png(grey: npt.NDArray[np.uint8]) -> bytes:
    """PNG file of 8-bit grey pixels, (rows, columns): header, one stream of lines each less the one above, end."""
    above = np.vstack([np.zeros_like(grey[:1]), grey[:-1]])
    lines = np.hstack([np.full((len(grey), 1), 2, dtype=np.uint8), grey - above])
    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def grey_of(hu: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """HU as grey values in the lung window."""
    low, high = LUNG_WINDOW
    return np.asarray(np.clip((hu.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8))


def outline(mask: npt.NDArray[np.bool_], steps: tuple[float, float], origin: tuple[float, float]) -> str:
    """SVG path along the borders of a mask's pixels.

    Parameters
    ----------
    mask : ndarray of bool, (rows, columns)
    steps : tuple of float
        Height and width of a pixel, mm.
    origin : tuple of float
        Upper and left edge of the mask, mm.
    """
    padded = np.pad(mask, 1)
    (dy, dx), (top, left) = steps, origin
    parts = []
    for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        parts.append(f"M{left + x * dx:.2f} {top + y * dy:.2f}h{dx:.2f}")
    for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        parts.append(f"M{left + x * dx:.2f} {top + y * dy:.2f}v{dy:.2f}")
    return "".join(parts)


def finding_pictures(
    view: View, labels: Labels, start_irc: tuple[int, int, int], label: int, record: Mapping[str, Any]
) -> list[str]:
    """SVG of the three planes through a finding, with the outline of its mask.

    Parameters
    ----------
    view : View
    labels : ndarray
        See `lunatrain.detect.grouping.Candidates`.
    start_irc : tuple of 3 int
        First voxel of `labels`.
    label : int
        The finding's value in `labels`.
    record : mapping
        `index`, `row`, `col` and `diameter_mm`.
    """
    center = np.array([record["index"], record["row"], record["col"]])
    side = max(FINDING_MM, FINDING_DIAMETERS * float(record["diameter_mm"]))
    low = np.maximum(np.floor(center - side / 2 / np.array(view.steps)), 0).astype(int)
    high = np.minimum(np.ceil(center + side / 2 / np.array(view.steps)) + 1, view.hu.shape).astype(int)
    return [
        _finding_plane(
            view, plane, (center, low, high), side, _mask_plane(labels, start_irc, label, plane, (center, low, high))
        )
        for plane in PLANES
    ]


def montage(view: View, lungs: Lungs, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """SVG of axial slices of the lungs, from head to feet, with the findings circled and numbered where there is room.

    Slices of the first findings are among them, the others lie evenly between.

    Parameters
    ----------
    view : View
    lungs : Lungs
    table : sequence of mapping
        Findings: `number`, `index`, `row`, `col`, `diameter_mm`.
    """
    first, count = lungs.start_irc[0], lungs.near.shape[0]
    own = [int(record["index"]) for record in table[:TILE_ON_FINDINGS]]
    even = np.linspace(first, first + count - 1, NUM_TILES + 2)[1:-1].round().astype(int).tolist()
    chosen = set(own)
    for index in even:
        if len(chosen) < NUM_TILES and all(abs(index - other) > 1 or count < NUM_TILES for other in own):
            chosen.add(index)
    is_up = view.flips is None or view.flips[0]
    return [_tile(view, lungs, index, table) for index in sorted(chosen, reverse=is_up)]


def _finding_plane(view: View, plane: str, window: tuple[Any, Any, Any], side: float, mask: Any) -> str:
    center, low, high = window
    v, h = PLANES[plane]
    cut: list[Any] = [slice(a, b) for a, b in zip(low, high, strict=True)]
    (through,) = {0, 1, 2} - {v, h}
    cut[through] = int(np.clip(center[through], 0, view.hu.shape[through] - 1))
    pixels = view.turned(view.hu[tuple(cut)], plane)
    at = [center[axis] - low[axis] for axis in (v, h)]
    for k, axis in enumerate((v, h)):
        if view.flips is not None and view.flips[axis]:
            at[k] = high[axis] - 1 - center[axis]
    steps = view.steps[v], view.steps[h]
    y, x = ((place + 0.5) * step for place, step in zip(at, steps, strict=True))
    body = _image(pixels, steps)
    path = outline(view.turned(mask, plane), steps, (0.0, 0.0))
    body += f'<path d="{path}" class="outline"/>' if path else ""
    box = x - side / 2, y - side / 2, side, side
    return _svg(box, body + _ticks(x, y, side) + _scale(box) + _letters(view, plane, box), f"{plane} plane")


def _mask_plane(
    labels: Labels, start_irc: tuple[int, int, int], label: int, plane: str, window: tuple[Any, Any, Any]
) -> npt.NDArray[np.bool_]:
    """The finding's mask in the window of one plane; where the box of labels ends there is none."""
    center, low, high = window
    v, h = PLANES[plane]
    (through,) = {0, 1, 2} - {v, h}
    mask = np.zeros((high[v] - low[v], high[h] - low[h]), dtype=bool)
    at = int(center[through]) - start_irc[through]
    if not 0 <= at < labels.shape[through]:
        return mask
    flat: npt.NDArray[Any] = np.asarray(labels.take(at, axis=through))
    source, target = [], []
    for k, axis in enumerate((v, h)):
        first = max(0, int(low[axis]) - start_irc[axis])
        stop = min(flat.shape[k], int(high[axis]) - start_irc[axis])
        source.append(slice(first, max(first, stop)))
        begin = first + start_irc[axis] - int(low[axis])
        target.append(slice(begin, begin + max(0, stop - first)))
    mask[tuple(target)] = flat[tuple(source)] == label
    return mask


def _tile(view: View, lungs: Lungs, index: int, table: Sequence[Mapping[str, Any]]) -> str:
    _, rows, columns = lungs.box
    pixels = view.hu[index, rows, columns]
    factor = max(1, -(-max(pixels.shape) // TILE_PX))
    height, width = pixels.shape[0] * view.steps[1], pixels.shape[1] * view.steps[2]
    trimmed = pixels[: pixels.shape[0] // factor * factor, : pixels.shape[1] // factor * factor]
    blocks = trimmed.reshape(trimmed.shape[0] // factor, factor, -1, factor).mean(axis=(1, 3))
    turned = view.turned(blocks, "axial")
    steps = height / turned.shape[0], width / turned.shape[1]
    body = _image(turned, steps)
    rings = _rings(view, lungs, index, table)
    squares = ((x, y, 0.7 * radius) for x, y, radius in rings.values())  # within the rings
    taken = [(x - half, y - half, x + half, y + half) for x, y, half in squares]
    size = LABEL * width
    for number, (x, y, radius) in rings.items():
        body += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="ring"/>'
        text = str(number)
        box = _label_box((x, y, radius), (0.62 * size * len(text), 0.75 * size), (width, height), taken)
        if box is not None:
            taken.append(box)
            body += f'<text x="{box[0]:.1f}" y="{box[3]:.1f}" font-size="{size:.1f}" class="mark">{text}</text>'
    body += f'<text x="{0.02 * width:.1f}" y="{0.985 * height:.1f}" font-size="{0.05 * width:.1f}">{index}</text>'
    return _svg((0, 0, width, height), body, f"slice {index}")


def _rings(
    view: View, lungs: Lungs, index: int, table: Sequence[Mapping[str, Any]]
) -> dict[int, tuple[float, float, float]]:
    """By its number the middle (x, y) and radius, mm in the tile of a slice, of each finding that reaches the slice."""
    _, rows, columns = lungs.box
    height, width = (rows.stop - rows.start) * view.steps[1], (columns.stop - columns.start) * view.steps[2]
    flips = view.flips or (False, False, False)
    rings = {}
    for record in table:
        radius = float(record["diameter_mm"]) / 2
        if abs(int(record["index"]) - index) * view.steps[0] > radius and int(record["index"]) != index:
            continue
        y = (int(record["row"]) - rows.start + 0.5) * view.steps[1]
        x = (int(record["col"]) - columns.start + 0.5) * view.steps[2]
        y, x = height - y if flips[1] else y, width - x if flips[2] else x
        rings[int(record["number"])] = x, y, max(1.35 * radius, 0.03 * width)
    return rings


def _label_box(
    ring: tuple[float, float, float], size: tuple[float, float], tile: tuple[float, float], taken: Sequence[_Box]
) -> _Box | None:
    """Room for a number beside a ring (x, y, radius): right, left, above or below it; None where others have it.

    Parameters
    ----------
    ring : tuple of float
        Middle, and radius.
    size, tile : tuple of float
        Width and height, of the number and of the picture.
    taken : sequence of tuple of float
        Boxes (left, top, right, bottom) of the numbers that are there.
    """
    (x, y, radius), (width, height) = ring, size
    away = radius + 1
    for left, top in (
        (x + away, y - height / 2),
        (x - away - width, y - height / 2),
        (x - width / 2, y - away - height),
        (x - width / 2, y + away),
    ):
        right, bottom = left + width, top + height
        is_inside = left >= 0 and top >= 0 and right <= tile[0] and bottom <= tile[1]
        if is_inside and not any(left < r and right > a and top < d and bottom > b for a, b, r, d in taken):
            return left, top, right, bottom
    return None


def _image(pixels: npt.NDArray[Any], steps: tuple[float, float]) -> str:
    """Pixels as they are drawn, their upper left corner at (0, 0)."""
    height, width = pixels.shape[0] * steps[0], pixels.shape[1] * steps[1]
    url = data_url(png(np.ascontiguousarray(grey_of(pixels))))
    return f'<image href="{url}" width="{width:.3f}" height="{height:.3f}" preserveAspectRatio="none"/>'


def _ticks(x: float, y: float, side: float) -> str:
    """Four lines at the borders that point at the middle, which stays free."""
    long, reach = 0.07 * side, side / 2
    lines = (f"M{x - reach:.2f} {y:.2f}h{long:.2f}", f"M{x + reach:.2f} {y:.2f}h{-long:.2f}",
             f"M{x:.2f} {y - reach:.2f}v{long:.2f}", f"M{x:.2f} {y + reach:.2f}v{-long:.2f}")  # fmt: skip
    return f'<path d="{"".join(lines)}" class="tick"/>'


def _scale(box: tuple[float, float, float, float]) -> str:
    left, top, width, height = box
    x, y = left + 0.04 * width, top + 0.955 * height
    text = f'<text x="{x:.2f}" y="{y - 0.02 * height:.2f}" font-size="{0.055 * height:.2f}">{BAR_MM} mm</text>'
    return f'<path d="M{x:.2f} {y:.2f}h{BAR_MM}" class="tick"/>' + text


def _letters(view: View, plane: str, box: tuple[float, float, float, float]) -> str:
    """Name the left and the upper side of a picture, where they are known."""
    if view.flips is None:
        return ""
    left, top, width, height = box
    v, h = PLANES[plane]
    size = 0.065 * height
    places = ((LETTERS[h][0], 0.02, 0.47, "start"), (LETTERS[v][0], 0.525, 0.075, "start"))
    return "".join(
        f'<text x="{left + x * width:.2f}" y="{top + y * height:.2f}" font-size="{size:.2f}" '
        f'text-anchor="{anchor}">{letter}</text>'
        for letter, x, y, anchor in places
    )


def _svg(box: tuple[float, float, float, float], body: str, name: str) -> str:
    view_box = " ".join(f"{value:.3f}" for value in box)
    return f'<svg viewBox="{view_box}" role="img" aria-label="{name}">{body}</svg>'
