"""Pictures of candidates, scans and stores as PNG files. The only module that imports matplotlib.

Figures are built from objects, never through pyplot, in matplotlib's default style, so the same input gives the
same bytes whatever the user's settings. Axes are in mm from voxel (0, 0, 0). Planes are turned as radiologists
read them: patient's right (sagittal: front) on the left, front or head up. `flip_irc` says which array axes run
against the patient's (feet to head, front to back, right to left), as in LUNA16's flipped scans.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.style import context as style_context

from lunaprep.errors import UsageError
from lunaprep.info import PictureStore, candidate_text, find_candidate, find_series, series_text, short_uid

Triple = tuple[float, float, float]
Flips = tuple[bool, bool, bool]

WINDOW_LEVEL, WINDOW_WIDTH = -600.0, 1500.0
"""Lung window, HU."""

NODULE, NEGATIVE = "#ffb000", "#56b4e9"
"""Orange and sky blue: told apart with any colour vision, and from grey."""

BACKGROUND, TEXT, MUTED = "#101418", "#f0f0f0", "#a8b0b8"
DPI = 100
CROP_PX, WIDE_PX, GAP_PX, EDGE_PX = 1000, 1280, 50, 24
MAX_SLICES = 12
MAX_CROPS = 48
INDEX = ["index", "row", "col"]
PLANES = {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}
"""Array axes drawn vertically and horizontally."""

SIDES = {1: ("A", "P"), 2: ("R", "L")}
"""What lies on the left and on the right where an array axis is drawn horizontally."""

POINTS: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


def _style() -> AbstractContextManager[None]:
    """Matplotlib's default style while a figure is made and saved; ``$`` is a plain sign."""
    return style_context(["default", {"text.parse_math": False}])


def _plain(text: str) -> str:
    """Text without characters the font may lack; lines are kept."""
    return "".join(c if c in "\n−…" or (c.isprintable() and ord(c) < 256) else "?" for c in text)


def _figure(width_px: float, height_px: float, title: str) -> Figure:
    """Empty dark figure; the title's first line is large, the others small."""
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor=BACKGROUND)
    for k, line in enumerate(_plain(title).splitlines()):
        size, colour, weight = (9.5, MUTED, "normal") if k else (12.5, TEXT, "bold")
        y = 1 - (12 + 8 * (k > 0) + 18 * k) / height_px
        figure.text(EDGE_PX / width_px, y, line, size=size, color=colour, weight=weight, va="top")
    return figure


def _title_px(title: str) -> float:
    """Height of the title and the gap below it, px."""
    return 32.0 + 18.0 * len(title.splitlines())


def _save(figure: Figure, out: Path) -> None:
    """Write a PNG that tells nothing of the time or the library."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    out.write_bytes(buffer.getvalue())


def _axes(figure: Figure, name: str, place_px: tuple[float, float, float, float]) -> Axes:
    """Axes at (left, top, width, height), px from the upper left corner."""
    (left, top, width, height), (all_x, all_y) = place_px, figure.get_size_inches() * DPI
    place = (left / all_x, 1 - (top + height) / all_y, width / all_x, height / all_y)
    axes = figure.add_axes(place, label=name, facecolor=BACKGROUND, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _draw_plane(
    axes: Axes, image: npt.ArrayLike, plane: str, spacing_irc: Triple, flip_irc: Flips | None
) -> None:
    """Draw one plane, (vertical, horizontal) HU, in mm and turned for the reader."""
    pixels, (v, h), flips = (
        np.asarray(image, dtype=np.float32),
        PLANES[plane],
        flip_irc or (False, False, False),
    )
    (y0, y1), (x0, x1) = (
        (-s / 2, (n - 0.5) * s) for n, s in zip(pixels.shape, (spacing_irc[v], spacing_irc[h]), strict=True)
    )
    low, high = WINDOW_LEVEL - WINDOW_WIDTH / 2, WINDOW_LEVEL + WINDOW_WIDTH / 2
    axes.imshow(
        pixels,
        "gray",
        aspect="equal",
        interpolation="antialiased",
        vmin=low,
        vmax=high,
        extent=(x0, x1, y1, y0),
    )
    axes.set_ylim((y0, y1) if (v == 0) != flips[v] else (y1, y0))
    axes.set_xlim((x1, x0) if flips[h] else (x0, x1))


def _draw_scale(axes: Axes) -> None:
    """Bar of a round number of millimetres in the lower left corner."""
    width, height = (abs(b - a) for a, b in (axes.get_xlim(), axes.get_ylim()))
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= width / 3), default=1)
    axes.plot([0.04, 0.04 + length / width], [0.04, 0.04], transform=axes.transAxes, color=TEXT, lw=2.5)
    axes.annotate(
        f"{length} mm", (0.04, 0.04), xycoords="axes fraction", xytext=(0, 3), color=TEXT, size=8.5, **POINTS
    )


def _draw_sides(axes: Axes, plane: str) -> None:
    """Letters of the patient's sides to the left and right of the axes."""
    for x, letter in zip((0, 1), SIDES[PLANES[plane][1]], strict=True):
        style: dict[str, Any] = {"size": 9.5, "color": MUTED, "ha": "center", "va": "center"}
        axes.annotate(letter, (x, 0.5), xycoords="axes fraction", xytext=(16 * x - 8, 0), **style, **POINTS)


def _draw_center(axes: Axes, y: float, x: float) -> None:
    """Ticks at the four borders that point at a place; the middle stays free."""
    for start, stop in ((0.0, 0.06), (0.94, 1.0)):
        axes.axvline(x, start, stop, color=TEXT, lw=1.2)
        axes.axhline(y, start, stop, color=TEXT, lw=1.2)


def _draw_section(axes: Axes, y: float, x: float, diameter_mm: float, off_mm: float = 0.0) -> bool:
    """Circle in which a plane `off_mm` from its centre cuts a sphere; False, and nothing drawn, where it does not."""
    square = (diameter_mm / 2) ** 2 - off_mm**2
    if not square > 0:
        return False
    axes.add_patch(Circle((x, y), square**0.5, fill=False, color=NODULE, lw=1.3))
    return True


def _note(axes: Axes, text: str, colour: str = TEXT) -> None:
    """Small text in the upper left corner of the axes."""
    box = {"facecolor": BACKGROUND, "alpha": 0.6, "pad": 1.5, "linewidth": 0}
    axes.text(0.025, 0.975, text, size=8.5, color=colour, va="top", transform=axes.transAxes, bbox=box)


@dataclass(frozen=True)
class _CropView:
    """A crop (slices, rows, columns; HU), the voxel looked at, and what is known of its grid and nodule."""

    crop: npt.NDArray[Any]
    center: tuple[int, ...]
    spacing_irc: Triple | None
    flip_irc: Flips | None
    diameter_mm: float

    @property
    def spacing(self) -> Triple:
        """Millimetres per voxel, or 1 where unknown."""
        return self.spacing_irc or (1.0, 1.0, 1.0)

    def ratio(self, plane: str) -> float:
        """Width of the plane's axes over their height, kept within reason."""
        (v, h), mm = PLANES[plane], np.multiply(self.crop.shape, self.spacing)
        return float(np.clip(mm[h] / mm[v], 0.25, 1.6))

    def draw(self, axes: Axes, plane: str, index: int) -> tuple[float, float]:
        """Draw the plane at `index` of the axis across it, and the nodule's section; its (y, x) in mm."""
        (v, h), spacing = PLANES[plane], self.spacing
        across = 3 - v - h
        y, x = self.center[v] * spacing[v], self.center[h] * spacing[h]
        _draw_plane(axes, self.crop.take(index, axis=across), plane, spacing, self.flip_irc)
        _draw_section(axes, y, x, self.diameter_mm, (index - self.center[across]) * spacing[across])
        return y, x

    def draw_planes(self, figure: Figure, top: float, height: float) -> None:
        """Draw the three planes through the centre in one row, all of one height, in the middle of the figure."""
        left = (CROP_PX - height * sum(map(self.ratio, PLANES)) - 2 * GAP_PX) / 2
        for plane, (v, h) in PLANES.items():
            width = self.ratio(plane) * height
            axes = _axes(figure, plane, (left, top, width, height))
            axes.set_title(plane, size=9.5, color=MUTED, pad=5)
            _draw_center(axes, *self.draw(axes, plane, self.center[3 - v - h]))
            if self.spacing_irc:
                _draw_scale(axes)
            if self.flip_irc:
                _draw_sides(axes, plane)
            left += width + GAP_PX

    def figure(self, title: str) -> Figure:
        """The three planes, and a strip of at most 16 axial slices that has the centre's."""
        height = min(400.0, (CROP_PX - 80 - 2 * GAP_PX) / sum(map(self.ratio, PLANES)))
        width = (CROP_PX - 2 * EDGE_PX) / 8
        cell, top = width / self.ratio("axial"), _title_px(title) + 20
        step = -(-self.crop.shape[0] // 16)
        shown = range(self.center[0] % step, self.crop.shape[0], step)
        figure = _figure(CROP_PX, top + height + 30 + -(-len(shown) // 8) * cell + 16, title)
        self.draw_planes(figure, top, height)
        for k, index in enumerate(shown):
            place = (EDGE_PX + k % 8 * width, top + height + 30 + k // 8 * cell, width - 4, cell - 4)
            axes, off = _axes(figure, f"slice {index}", place), index - self.center[0]
            self.draw(axes, "axial", index)
            _note(axes, f"{off:+d}".replace("-", "−") if off else "centre", TEXT if off else NODULE)
        return figure


def draw_crop(
    crop: npt.NDArray[Any],
    title: str,
    spacing_irc: Triple | None,
    out: Path,
    diameter_mm: float | None = None,
    center_irc: Sequence[int] | None = None,
    flip_irc: Flips | None = None,
) -> None:
    """Draw a candidate's crop: three orthogonal planes through its centre, below them its axial slices.

    Parameters
    ----------
    crop : ndarray, (slices, rows, columns)
        HU.
    title : str
        First line large, the others small.
    spacing_irc : tuple of 3 float, optional
        mm per slice, row, column. None: drawn as if isotropic, without scale bar and circle.
    out : Path
        PNG file to write.
    diameter_mm : float, optional
        Diameter of the nodule: a circle where its sphere cuts a plane. None or NaN: no circle.
    center_irc : sequence of 3 int, optional
        Voxel of the crop to look at; its middle by default.
    flip_irc : tuple of 3 bool, optional
        Axes to turn (see the module). None: not known, so no letters name the sides.
    """
    middle = np.array(crop.shape) // 2 if center_irc is None else np.asarray(center_irc)
    center = tuple(int(c) for c in np.clip(middle, 0, np.array(crop.shape) - 1))
    diameter = float("nan") if spacing_irc is None or diameter_mm is None else float(diameter_mm)
    with _style():
        _save(_CropView(crop, center, spacing_irc, flip_irc, diameter).figure(title), out)


def _nodules(candidates: pd.DataFrame) -> pd.DataFrame:
    """Rows that are nodules, largest first, those without a diameter last."""
    return candidates[candidates["is_nodule"]].sort_values("diameter_mm", ascending=False, kind="stable")


def _chosen_slices(num_slices: int, candidates: pd.DataFrame) -> list[int]:
    """At most `MAX_SLICES` slices: those of the largest nodules, filled up evenly."""
    if num_slices <= MAX_SLICES:
        return list(range(num_slices))
    chosen = list(dict.fromkeys(int(i) for i in _nodules(candidates)["index"]))[:MAX_SLICES]
    free = MAX_SLICES - len(chosen)
    return sorted({*chosen, *(int((k + 0.5) * num_slices / free) for k in range(free))})


@dataclass(frozen=True)
class _SeriesView:
    """A scan (slices, rows, columns; HU), its grid and candidates, and the axial slices shown."""

    volume: Any
    spacing: Triple
    flip_irc: Flips | None
    candidates: pd.DataFrame
    chosen: list[int]

    def draw_slice(self, axes: Axes, index: int) -> None:
        """Draw an axial slice and the candidates it is nearest to; faint where they lie off it."""
        _draw_plane(axes, self.volume[index], "axial", self.spacing, self.flip_irc)
        away = np.abs(np.subtract.outer(self.candidates["index"].to_numpy(), self.chosen))
        here = self.candidates[np.array(self.chosen)[away.argmin(axis=1)] == index]
        others, places = here[~here["is_nodule"]], here[[*INDEX, "diameter_mm"]].to_numpy(dtype=np.float64)
        for is_on, alpha in ((True, 1.0), (False, 0.5)):
            part = others[(others["index"] == index) == is_on]
            x, y = part["col"] * self.spacing[2], part["row"] * self.spacing[1]
            axes.plot(x, y, ls="", marker="x", ms=4.5, mew=1.0, color=NEGATIVE, alpha=alpha)
        for values in places[here["is_nodule"].to_numpy()]:
            self._draw_nodule(axes, values[:3] * self.spacing, values[3], index * self.spacing[0])
        _note(axes, f"slice {index}")

    def _draw_nodule(
        self, axes: Axes, mm: npt.NDArray[np.float64], diameter_mm: float, plane_mm: float
    ) -> None:
        """Draw a nodule's section and its diameter, or a square where it has none here."""
        if not _draw_section(axes, mm[1], mm[2], diameter_mm, mm[0] - plane_mm):
            axes.plot([mm[2]], [mm[1]], marker="s", ms=9, mfc="none", color=NODULE)
            return
        bottom, top = axes.get_ylim()
        place = (mm[2], mm[1] + np.sign(top - bottom) * diameter_mm / 2)
        style: dict[str, Any] = {
            "color": NODULE,
            "size": 9,
            "weight": "bold",
            "ha": "center",
            "xytext": (0, 2),
        }
        axes.annotate(f"{diameter_mm:.1f} mm", place, **style, **POINTS)

    def draw_long_plane(self, axes: Axes, plane: str, index: int) -> None:
        """Draw the coronal or sagittal plane at `index`, nodules' sections, and ticks at the slices shown."""
        (v, h), spacing = PLANES[plane], self.spacing
        across = 3 - v - h
        image = self.volume[:, index, :] if across == 1 else self.volume[:, :, index]
        _draw_plane(axes, image, plane, spacing, self.flip_irc)
        for values in _nodules(self.candidates)[[*INDEX, "diameter_mm"]].to_numpy(dtype=np.float64):
            mm = values[:3] * spacing
            _draw_section(axes, mm[v], mm[h], values[3], mm[across] - index * spacing[across])
        for k in self.chosen:
            axes.axhline(k * spacing[0], 0, 0.015, color=TEXT, lw=1)
            axes.axhline(k * spacing[0], 0.985, 1, color=TEXT, lw=1)
        _note(axes, f"{plane}, {INDEX[across]} {index}")

    def figure(self, title: str) -> Figure:
        """The axial slices four in a row, below them the coronal and the sagittal plane at one scale."""
        slices_mm, rows_mm, cols_mm = (
            float(n * s) for n, s in zip(self.volume.shape, self.spacing, strict=True)
        )
        width, top = (WIDE_PX - 2 * EDGE_PX + 6) / 4, _title_px(title)
        height = width * float(np.clip(rows_mm / cols_mm, 0.5, 2.0))
        below = top + -(-len(self.chosen) // 4) * height + 8
        scale = min((WIDE_PX - 2 * EDGE_PX - 6) / (rows_mm + cols_mm), 480 / slices_mm)
        figure = _figure(WIDE_PX, below + slices_mm * scale + 44, title)
        for k, index in enumerate(self.chosen):
            place = (EDGE_PX + k % 4 * width, top + k // 4 * height, width - 6, height - 6)
            self.draw_slice(axes := _axes(figure, f"slice {index}", place), index)
            if k == 0:
                _draw_scale(axes)
        largest, left = _nodules(self.candidates).head(1), (WIDE_PX - (rows_mm + cols_mm) * scale - 6) / 2
        for plane, k, mm in (("coronal", 1, cols_mm), ("sagittal", 2, rows_mm)):
            axes = _axes(figure, plane, (left, below, mm * scale, slices_mm * scale))
            index = int(largest[INDEX[k]].iloc[0]) if len(largest) else self.volume.shape[k] // (1 + k)
            self.draw_long_plane(axes, plane, index)
            left += mm * scale + 6
        _draw_legend(figure)
        return figure


def _draw_legend(figure: Figure) -> None:
    """Key of the marks, in a line at the bottom."""
    texts = {
        "o": "nodule, diameter",
        "s": "nodule off this slice or of unknown diameter",
        "x": "other candidate (faint: off this slice)",
    }
    lines = [
        Line2D([], [], ls="", marker=m, color=NEGATIVE if m == "x" else NODULE, mfc="none", ms=7, label=text)
        for m, text in texts.items()
    ]
    figure.legend(handles=lines, loc="lower center", ncols=3, frameon=False, fontsize=9, labelcolor=MUTED)


def draw_series(
    volume: Any,
    spacing_irc: Triple,
    candidates: pd.DataFrame,
    title: str,
    out: Path,
    flip_irc: Flips | None = None,
) -> None:
    """Draw a scan: up to 12 axial slices with its candidates, and a coronal and a sagittal plane.

    Parameters
    ----------
    volume : array or h5py dataset, (slices, rows, columns)
        HU; only the planes drawn are read.
    spacing_irc : tuple of 3 float
        mm per slice, row, column.
    candidates : DataFrame
        Rows of this scan, columns as in `schema.MANIFEST_COLUMNS`; each is drawn once, on the nearest slice shown.
    title : str
        First line large, the others small.
    out : Path
        PNG file to write.
    flip_irc : tuple of 3 bool, optional
        Axes to turn (see the module).
    """
    chosen = _chosen_slices(volume.shape[0], candidates)
    with _style():
        _save(_SeriesView(volume, spacing_irc, flip_irc, candidates, chosen).figure(title), out)


def draw_montage(
    crops: Sequence[npt.NDArray[Any]],
    captions: Sequence[str],
    title: str,
    out: Path,
    is_nodule: Sequence[bool] | None = None,
    center_irc: Sequence[Sequence[int]] | None = None,
) -> None:
    """Draw a grid of crops, each by the axial slice through its centre.

    Parameters
    ----------
    crops : sequence of ndarray, (slices, rows, columns)
        HU.
    captions : sequence of str
        Up to two lines for below each crop.
    title : str
        First line large, the others small.
    out : Path
        PNG file to write.
    is_nodule : sequence of bool, optional
        Class of each, for the colour of its frame.
    center_irc : sequence of 3 int each, optional
        Voxel of each crop to look at, pointed at by ticks; without it the middle slice is shown.
    """
    cell, top = (WIDE_PX - 2 * EDGE_PX) / 6, _title_px(title)
    with _style():
        figure = _figure(WIDE_PX, top + -(-len(crops) // 6) * (cell + 38) + 6, title)
        for k, (crop, caption) in enumerate(zip(crops, captions, strict=True)):
            place = (EDGE_PX + 4 + k % 6 * cell, top + k // 6 * (cell + 38), cell - 8, cell - 8)
            axes, middle = _axes(figure, f"crop {k}", place), np.array(crop.shape) // 2
            center = np.clip(center_irc[k] if center_irc else middle, 0, np.array(crop.shape) - 1)
            _draw_plane(axes, crop[center[0]], "axial", (1.0, 1.0, 1.0), None)
            if center_irc:
                _draw_center(axes, center[1], center[2])
            colour = MUTED if is_nodule is None else NODULE if is_nodule[k] else NEGATIVE
            axes.spines[:].set(visible=True, color=colour, linewidth=1.6)
            axes.text(0, -0.03, _plain(caption), size=9, color=TEXT, va="top", transform=axes.transAxes)
        _save(figure, out)


def _grid(scan: Mapping[Any, Any]) -> tuple[Triple, Flips]:
    """Spacing in array order, mm, and the axes to turn, of a row of scans.parquet."""
    (x, y, z), signs = scan["spacing"], np.array(scan["direction"], dtype=np.float64)[[8, 4, 0]] < 0
    return (float(z), float(y), float(x)), (bool(signs[0]), bool(signs[1]), bool(signs[2]))


def _centers(rows: pd.DataFrame) -> list[list[int]]:
    """Centre of each row's crop, in voxels of the crop (slice, row, column)."""
    starts = rows[[f"start_{name}" for name in INDEX]].to_numpy()
    return [[int(c) for c in center] for center in rows[INDEX].to_numpy() - starts]


def _check_out(out: Path) -> None:
    """Refuse a file that cannot be a picture before anything is read."""
    if out.suffix.lower() != ".png":
        msg = f"{out}: pictures are PNG files; give --out a name that ends in .png"
        raise UsageError(msg)
    if not out.parent.is_dir():
        msg = f"{out}: the folder {out.parent} does not exist; make it first or choose another --out"
        raise UsageError(msg)


def candidate_picture(store: PictureStore, candidate_id: int, out: Path) -> None:
    """Draw the crop of one candidate of a store, by its id, into the PNG file `out`."""
    _check_out(out)
    row = find_candidate(store, candidate_id)
    record = store.manifest.iloc[[row]]
    spacing, flips = _grid(find_series(store, record["series_uid"].iloc[0]))
    diameter, text = float(record["diameter_mm"].iloc[0]), candidate_text(record.iloc[0])
    draw_crop(store.crops(np.array([row]))[0], text, spacing, out, diameter, _centers(record)[0], flips)


def _draw_rows(store: PictureStore, rows: npt.NDArray[np.int64], title: str, out: Path) -> None:
    """Montage of manifest rows."""
    table = store.manifest.iloc[rows]
    sizes = [f"{d:.1f} mm" if d == d else "" for d in table["diameter_mm"]]
    captions = [
        f"{i} · {'nodule ' * is_nodule + size if is_nodule else 'negative'}\n{short_uid(uid, 22)}"
        for i, is_nodule, size, uid in zip(
            table["candidate_id"], table["is_nodule"], sizes, table["series_uid"], strict=True
        )
    ]
    draw_montage(list(store.crops(rows)), captions, title, out, list(table["is_nodule"]), _centers(table))


def series_picture(store: PictureStore, series_uid: str, out: Path) -> None:
    """Draw one scan of a store, by its UID or a unique end of it, into `out`; without a volume, its crops."""
    _check_out(out)
    scan = find_series(store, series_uid)
    uid = scan["series_uid"]
    rows = np.flatnonzero(store.manifest["series_uid"] == uid)
    candidates, text = store.manifest.iloc[rows], series_text(scan, store.manifest.iloc[rows])
    if not pd.isna(scan["volume_file"]):
        spacing, flips = _grid(scan)
        with store.open_volume(uid) as volume:
            draw_series(volume, spacing, candidates, text, out, flips)
        return
    if not len(rows):
        msg = (
            f"{uid}: nothing to draw: the store has neither its volume nor crops of it; build with --volumes"
        )
        raise UsageError(msg)
    order = np.argsort(~candidates["is_nodule"].to_numpy(), kind="stable")[:MAX_CROPS]
    shown = f"The store has no volume of this scan (built with --no-volumes): {len(order)} of its {len(rows)} crops"
    _draw_rows(store, rows[order], f"{text}\n{shown}", out)


def overview_picture(store: PictureStore, out: Path, num: int = 24) -> None:
    """Draw `num` crops of a store into `out`: half nodules, evenly over the sizes, half other candidates."""
    _check_out(out)
    table = store.manifest.reset_index(drop=True)
    nodules = _nodules(table).index.to_numpy(dtype=np.int64)
    others = np.flatnonzero(~table["is_nodule"].to_numpy())
    count = min(len(nodules), max(num // 2, num - len(others)))
    parts = [(nodules, count), (others, min(len(others), num - count))]
    rows = np.concatenate(
        [p[np.linspace(0, len(p) - 1, k).round().astype(np.int64)] if k else p[:0] for p, k in parts]
    )
    if not len(rows):
        msg = "the store has no crop: nothing to draw"
        raise UsageError(msg)
    title = f"Nodules and other candidates\n{count} of {len(nodules):,} nodules (orange), largest first; "
    title += f"{len(rows) - count} of {len(others):,} other candidates (blue)"
    _draw_rows(store, rows, title, out)
