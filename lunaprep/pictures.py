"""Pictures of candidates, scans and stores as PNG files. The only module that imports matplotlib.

Figures are made of objects, never through pyplot, in matplotlib's default style: the same input gives the same
bytes. Axes are in mm from voxel (0, 0, 0). Planes are turned as radiologists read them: patient's right
(sagittal: front) on the left, front or head up. What several functions take: `title`, its first line large, the
others small; `out`, the PNG file to write; `spacing_irc`, mm per slice, row, column; `flip_irc`, which array axes
run against the patient's (feet to head, front to back, right to left), as in LUNA16's flipped scans (None, not
known, draws the array as it is and names no sides).
"""

import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from matplotlib.style import context as style_context

from lunaprep import info, worst
from lunaprep.errors import UsageError
from lunaprep.store.reader import crop_centers

if TYPE_CHECKING:
    from lunaprep.store.reader import Store

Triple = tuple[float, float, float]
Flips = tuple[bool, bool, bool]

WINDOW_LOW, WINDOW_HIGH = -1350.0, 150.0  # HU; the lung window: level -600, width 1500
LUNG = "#009e73"  # green
NODULE, NEGATIVE = "#ffb000", "#56b4e9"  # orange and sky blue: told apart with any colour vision, and from grey
BACKGROUND, TEXT, MUTED = "#101418", "#f0f0f0", "#a8b0b8"
DPI = 100
CROP_PX, WIDE_PX, GAP_PX, EDGE_PX = 1000, 1280, 50, 24
PLANES = {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}  # array axes drawn vertically, horizontally
SIDES = {1: ("A", "P"), 2: ("R", "L")}  # what lies left and right where an array axis is drawn horizontally
OUTLINE: dict[str, Any] = {"path_effects": [withStroke(linewidth=3.4, foreground=BACKGROUND)]}
DEFAULT_STYLE = style_context(["default", {"text.parse_math": False}])  # and $ is a plain sign
POINTS: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


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
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    out.write_bytes(buffer.getvalue())


def _axes(figure: Figure, name: str, place_px: tuple[float, float, float, float]) -> Axes:
    """Axes at (left, top, width, height), px from the upper left corner."""
    (left, top, width, height), (all_x, all_y) = place_px, figure.get_size_inches() * DPI
    place = (left / all_x, 1 - (top + height) / all_y, width / all_x, height / all_y)
    axes = figure.add_axes(place, label=name, facecolor=BACKGROUND, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _draw_plane(axes: Axes, image: npt.ArrayLike, plane: str, spacing_irc: Triple, flip_irc: Flips | None) -> None:
    """Draw one plane, (vertical, horizontal) HU, in mm and turned for the reader."""
    pixels, (v, h), flips = np.asarray(image, dtype=np.float32), PLANES[plane], flip_irc or (False, False, False)
    steps = ((spacing_irc[v], pixels.shape[0]), (spacing_irc[h], pixels.shape[1]))
    (y0, y1), (x0, x1) = ((-step / 2, (n - 0.5) * step) for step, n in steps)
    method = "bicubic" if max(pixels.shape) <= 128 else "antialiased"
    axes.imshow(pixels, "gray", interpolation=method, vmin=WINDOW_LOW, vmax=WINDOW_HIGH, extent=(x0, x1, y1, y0))
    axes.set_ylim((y0, y1) if (v == 0) != flips[v] else (y1, y0))
    axes.set_xlim((x1, x0) if flips[h] else (x0, x1))


def _draw_outline(axes: Axes, mask: npt.ArrayLike, plane: str, spacing_irc: Triple, colour: str) -> None:
    """Outline of a mask's plane (vertical, horizontal), over what `_draw_plane` drew."""
    inside, (v, h) = np.asarray(mask), PLANES[plane]
    if inside.any() and min(inside.shape) > 1:
        y, x = np.arange(inside.shape[0]) * spacing_irc[v], np.arange(inside.shape[1]) * spacing_irc[h]
        axes.contour(x, y, inside, [0.5], colors=[colour], linewidths=0.9)


def _draw_scale(axes: Axes) -> None:
    """Bar of a round number of millimetres in the lower left corner."""
    width = abs(float(np.diff(axes.get_xlim())[0]))
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= width / 3), default=1)
    axes.plot([0.04, 0.04 + length / width], [0.04, 0.04], transform=axes.transAxes, color=TEXT, lw=1.8, **OUTLINE)
    style: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 3), "color": TEXT, "size": 8.5}
    axes.annotate(f"{length} mm", (0.04, 0.04), **style, **OUTLINE, **POINTS)


def _draw_center(axes: Axes, y: float, x: float) -> None:
    """Ticks at the four borders that point at a place; the middle stays free."""
    for start, stop in ((0.0, 0.06), (0.94, 1.0)):
        axes.axvline(x, start, stop, color=TEXT, lw=1.2, **OUTLINE)
        axes.axhline(y, start, stop, color=TEXT, lw=1.2, **OUTLINE)


def _draw_section(axes: Axes, y: float, x: float, diameter_mm: float, off_mm: float = 0.0) -> bool:
    """Circle in which a plane `off_mm` from its centre cuts a sphere; False, and nothing drawn, where it does not."""
    square = (diameter_mm / 2) ** 2 - off_mm**2
    if not square > 0:
        return False
    axes.add_patch(Circle((x, y), square**0.5, fill=False, color=NODULE, lw=1.3))
    return True


def _note(axes: Axes, text: str, colour: str = TEXT) -> None:
    """Small text in the upper left corner of the axes."""
    axes.text(0.025, 0.975, text, size=8.5, color=colour, va="top", transform=axes.transAxes, **OUTLINE)


@dataclass(frozen=True)
class _CropView:
    """A crop (slices, rows, columns; HU), the voxel looked at, and what is known of its grid and nodule."""

    crop: npt.NDArray[Any]
    center: tuple[int, ...]
    spacing: Triple
    flip_irc: Flips | None
    diameter_mm: float | None  # None: there is no scale

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
        _draw_section(axes, y, x, self.diameter_mm or 0.0, (index - self.center[across]) * spacing[across])
        return y, x

    def draw_planes(self, figure: Figure, top: float, height: float) -> None:
        """Draw the three planes through the centre in one row, all of one height, in the middle of the figure."""
        left = (CROP_PX - height * sum(map(self.ratio, PLANES)) - 2 * GAP_PX) / 2
        for plane, (v, h) in PLANES.items():
            width = self.ratio(plane) * height
            axes = _axes(figure, plane, (left, top, width, height))
            axes.set_title(plane, size=9.5, color=MUTED, pad=5)
            _draw_center(axes, *self.draw(axes, plane, self.center[3 - v - h]))
            if self.diameter_mm is not None:
                _draw_scale(axes)
            for x, letter in zip((0, 1), SIDES[h] if self.flip_irc else "", strict=False):
                place: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (16 * x - 8, 0)}
                axes.annotate(letter, (x, 0.5), **place, size=9.5, color=MUTED, ha="center", va="center", **POINTS)
            left += width + GAP_PX

    def figure(self, title: str) -> Figure:
        """The three planes, and a strip of at most 16 axial slices that has the centre's."""
        height = min(400.0, (CROP_PX - 80 - 2 * GAP_PX) / sum(map(self.ratio, PLANES)))
        width = (CROP_PX - 2 * EDGE_PX) / 8
        cell, top = width / self.ratio("axial"), _title_px(title) + 20
        step = -(-self.crop.shape[0] // 16)
        shown = range(self.center[0] % step, self.crop.shape[0], step)
        strip = top + height + 44
        figure = _figure(CROP_PX, all_px := strip + -(-len(shown) // 8) * cell + 16, title)
        self.draw_planes(figure, top, height)
        y = 1 - (strip - 6) / all_px
        figure.text(EDGE_PX / CROP_PX, y, "axial, slices from the centre", size=9.5, color=MUTED, va="bottom")
        for k, index in enumerate(shown):
            place = (EDGE_PX + k % 8 * width, strip + k // 8 * cell, width - 4, cell - 4)
            axes, off = _axes(figure, f"slice {index}", place), index - self.center[0]
            self.draw(axes, "axial", index)
            _note(axes, f"{off:+d}".replace("-", "−") if off else "centre", TEXT if off else NODULE)
        return figure


@DEFAULT_STYLE
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
    title, spacing_irc, out, flip_irc
        See the module. Without spacing it is drawn as if isotropic, without scale bar and circle.
    diameter_mm : float, optional
        Diameter of the nodule: a circle where its sphere cuts a plane. None or NaN: no circle.
    center_irc : sequence of 3 int, optional
        Voxel of the crop to look at; its middle by default.
    """
    middle = np.array(crop.shape) // 2 if center_irc is None else np.asarray(center_irc)
    center = tuple(int(c) for c in np.clip(middle, 0, np.array(crop.shape) - 1))
    diameter = None if spacing_irc is None else diameter_mm or 0.0
    _save(_CropView(crop, center, spacing_irc or (1.0, 1.0, 1.0), flip_irc, diameter).figure(title), out)


@dataclass(frozen=True)
class _SeriesView:
    """A scan (slices, rows, columns; HU), its grid and candidates, the axial slices shown, and its masks by colour."""

    volume: Any
    spacing: Triple
    flip_irc: Flips | None
    candidates: pd.DataFrame
    chosen: list[int]
    masks: dict[str, Any]

    def draw_slice(self, axes: Axes, index: int) -> None:
        """Draw an axial slice and the candidates it is nearest to; faint where they lie off it."""
        _draw_plane(axes, self.volume[index], "axial", self.spacing, self.flip_irc)
        for colour, mask in self.masks.items():
            _draw_outline(axes, mask[index], "axial", self.spacing, colour)
        away = np.abs(np.subtract.outer(self.candidates["index"].to_numpy(), self.chosen))
        here = self.candidates[np.array(self.chosen)[away.argmin(axis=1)] == index]
        here = here.iloc[np.argsort(np.abs(here["index"] - index), kind="stable")]
        others, places = here[~here["is_nodule"]], here[[*info.INDEX, "diameter_mm"]].to_numpy(dtype=np.float64)
        for is_on, alpha in ((True, 1.0), (False, 0.5)):
            part = others[(others["index"] == index) == is_on]
            x, y = part["col"] * self.spacing[2], part["row"] * self.spacing[1]
            axes.plot(x, y, ls="", marker="x", ms=4.5, mew=1.0, color=NEGATIVE, alpha=alpha)
        is_again = here["annotation_id"].notna() & here.duplicated("annotation_id")  # one label a nodule
        for k in np.flatnonzero(here["is_nodule"]):
            self._draw_nodule(axes, places[k], index, has_label=not is_again.iloc[k])
        _note(axes, f"slice {index}")

    def _draw_nodule(self, axes: Axes, values: npt.NDArray[np.float64], index: int, *, has_label: bool) -> None:
        """Draw a nodule's section and its diameter, or a square where it has none here; `values` are place and mm."""
        mm, diameter_mm = values[:3] * self.spacing, values[3]
        if not _draw_section(axes, mm[1], mm[2], diameter_mm, mm[0] - index * self.spacing[0]):
            axes.plot([mm[2]], [mm[1]], marker="s", ms=9, mfc="none", color=NODULE)
        elif has_label:
            place = (mm[2], mm[1] + np.sign(np.diff(axes.get_ylim())[0]) * diameter_mm / 2)
            style: dict[str, Any] = {"color": NODULE, "size": 9, "weight": "bold", "ha": "center", "xytext": (0, 2)}
            axes.annotate(f"{diameter_mm:.1f} mm", place, **style, **OUTLINE, **POINTS)

    def draw_long_plane(self, axes: Axes, plane: str, index: int) -> None:
        """Draw the coronal or sagittal plane at `index`, nodules' sections, and ticks at the slices shown."""
        (v, h), spacing = PLANES[plane], self.spacing
        across = 3 - v - h
        where = (slice(None), index) if across == 1 else (slice(None), slice(None), index)
        _draw_plane(axes, self.volume[where], plane, spacing, self.flip_irc)
        for colour, mask in self.masks.items():
            _draw_outline(axes, mask[where], plane, spacing, colour)
        for values in info.nodules_by_size(self.candidates)[[*info.INDEX, "diameter_mm"]].to_numpy(dtype=np.float64):
            mm = values[:3] * spacing
            _draw_section(axes, mm[v], mm[h], values[3], mm[across] - index * spacing[across])
        for k, start in product(self.chosen, (0.0, 0.985)):
            axes.axhline(k * spacing[0], start, start + 0.015, color=TEXT, lw=1, **OUTLINE)
        _note(axes, f"{plane}, {info.INDEX[across]} {index}")

    def figure(self, title: str) -> Figure:
        """The axial slices four in a row, below them the coronal and the sagittal plane at one scale."""
        slices_mm, rows_mm, cols_mm = (float(n * s) for n, s in zip(self.volume.shape, self.spacing, strict=True))
        width, top = (WIDE_PX - 2 * EDGE_PX + 6) / 4, _title_px(title)
        height = width * float(np.clip(rows_mm / cols_mm, 0.5, 2.0))
        below = top + -(-len(self.chosen) // 4) * height + 8
        scale = min((WIDE_PX - 2 * EDGE_PX - 6) / (rows_mm + cols_mm), 480 / slices_mm)
        figure = _figure(WIDE_PX, below + slices_mm * scale + 62, title)
        for k, index in enumerate(self.chosen):
            place = (EDGE_PX + k % 4 * width, top + k // 4 * height, width - 6, height - 6)
            self.draw_slice(axes := _axes(figure, f"slice {index}", place), index)
            if k == 0:
                _draw_scale(axes)
        largest, left = info.nodules_by_size(self.candidates).head(1), (WIDE_PX - (rows_mm + cols_mm) * scale - 6) / 2
        for plane, k, mm in (("coronal", 1, cols_mm), ("sagittal", 2, rows_mm)):
            axes = _axes(figure, plane, (left, below, mm * scale, slices_mm * scale))
            index = int(largest[info.INDEX[k]].iloc[0]) if len(largest) else self.volume.shape[k] // (1 + k)
            self.draw_long_plane(axes, plane, index)
            left += mm * scale + 6
        _draw_legend(figure, bool(self.masks))
        return figure


def _draw_legend(figure: Figure, has_masks: bool) -> None:
    """Key of the marks, at the bottom."""
    on = "nodule: the annotation's diameter around the candidate's centre"
    off, other = "nodule off this slice, or of unknown diameter", "other candidate (faint: off this slice)"
    marks = (("o", NODULE, on), ("s", NODULE, off), ("x", NEGATIVE, other), ("_", TEXT, "at the sides: slices shown"))
    lines = [Line2D([], [], ls="", marker=m, color=c, mfc="none", ms=7, label=text) for m, c, text in marks]
    outlines = ((LUNG, "lung"), (NODULE, "nodule mask")) if has_masks else ()
    lines += [Line2D([], [], color=c, lw=1.5, label=text) for c, text in outlines]
    figure.legend(handles=lines, loc="lower center", ncols=3, frameon=False, fontsize=9, labelcolor=MUTED)


@DEFAULT_STYLE
def draw_series(
    volume: Any,
    spacing_irc: Triple,
    candidates: pd.DataFrame,
    title: str,
    out: Path,
    flip_irc: Flips | None = None,
    masks: tuple[Any, Any] | None = None,
) -> None:
    """Draw a scan: up to 12 axial slices with its candidates, and a coronal and a sagittal plane.

    Parameters
    ----------
    volume : array or h5py dataset, (slices, rows, columns)
        HU; only the planes drawn are read.
    candidates : DataFrame
        Rows of this scan, columns as in `schema.MANIFEST_COLUMNS`; each is drawn once, on the nearest slice shown.
    spacing_irc, title, out, flip_irc
        See the module.
    masks : tuple of 2 arrays or h5py datasets, optional
        The volume's nodule mask and lung mask, drawn as outlines.
    """
    chosen = info.chosen_slices(volume.shape[0], candidates)
    outlined = dict(zip((NODULE, LUNG), masks or (), strict=False))
    _save(_SeriesView(volume, spacing_irc, flip_irc, candidates, chosen, outlined).figure(title), out)


@DEFAULT_STYLE
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
        A few lines for below each crop.
    title, out
        See the module.
    is_nodule : sequence of bool, optional
        Class of each, for the colour of its frame.
    center_irc : sequence of 3 int each, optional
        Voxel of each crop to look at, pointed at by ticks; without it the middle slice is shown.
    """
    cell, top = (WIDE_PX - 2 * EDGE_PX) / 6, _title_px(title)
    high = cell + 10 + 14 * max((len(caption.splitlines()) for caption in captions), default=0)
    figure = _figure(WIDE_PX, top + -(-len(crops) // 6) * high + 6, title)
    for k, (crop, caption) in enumerate(zip(crops, captions, strict=True)):
        place = (EDGE_PX + 4 + k % 6 * cell, top + k // 6 * high, cell - 8, cell - 8)
        axes, middle = _axes(figure, f"crop {k}", place), np.array(crop.shape) // 2
        center = np.clip(center_irc[k] if center_irc else middle, 0, np.array(crop.shape) - 1)
        _draw_plane(axes, crop[center[0]], "axial", (1.0, 1.0, 1.0), None)
        if center_irc:
            _draw_center(axes, center[1], center[2])
        colour = MUTED if is_nodule is None else NODULE if is_nodule[k] else NEGATIVE
        axes.spines[:].set(visible=True, color=colour, linewidth=1.6)
        axes.text(0, -0.03, _plain(caption), size=9, color=TEXT, va="top", transform=axes.transAxes)
    _save(figure, out)


def _check_out(out: Path) -> None:
    """Refuse a file that cannot be a picture before anything is read."""
    if out.suffix.lower() != ".png":
        msg = f"{out}: pictures are PNG files; give --out a name that ends in .png"
        raise UsageError(msg)
    if not out.parent.is_dir():
        msg = f"{out}: the folder {out.parent} does not exist; make it first or choose another --out"
        raise UsageError(msg)


def candidate_picture(store: "Store", candidate_id: int, out: Path) -> None:
    """Draw the crop of one candidate of a store, by its id, into the PNG file `out`."""
    _check_out(out)
    row = info.find_candidate(store, candidate_id)
    record = store.manifest.iloc[[row]]
    spacing, flips = info.grid_of(info.find_series(store, record["series_uid"].iloc[0]))
    diameter, text = float(record["diameter_mm"].iloc[0]), info.candidate_text(record.iloc[0])
    crop, center = store.crops(np.array([row]))[0], crop_centers(record)[0].tolist()
    draw_crop(crop, text, store.crop_spacing or spacing, out, diameter, center, flips)


def _draw_rows(store: "Store", rows: npt.NDArray[np.int64], title: str, out: Path, notes: Sequence[str] = ()) -> None:
    """Montage of manifest rows, with a note each over their captions."""
    if not len(rows):
        msg = f"{title.splitlines()[0]}: nothing to draw; the store has neither crops nor, for a series, a volume"
        raise UsageError(msg)
    table = store.manifest.iloc[rows]
    heads = [f"{note}\n" for note in notes] or [""] * len(rows)
    records = [record for _, record in table.iterrows()]
    captions = [head + info.candidate_caption(record) for head, record in zip(heads, records, strict=True)]
    crops = store.crops(rows)
    title += f"\nAxial slice, {crops.shape[2]} × {crops.shape[3]} pixels, lung window; the ticks point at the candidate"
    draw_montage(list(crops), captions, title, out, list(table["is_nodule"]), crop_centers(table).tolist())


def series_picture(store: "Store", series_uid: str, out: Path) -> None:
    """Draw one scan of a store, by its UID or a unique end of it, into `out`; without a volume, its crops."""
    _check_out(out)
    scan = info.find_series(store, series_uid)
    uid = scan["series_uid"]
    rows = np.flatnonzero(store.manifest["series_uid"] == uid)
    candidates, text = store.manifest.iloc[rows], info.series_text(scan, store.manifest.iloc[rows])
    if not pd.isna(scan["volume_file"]):
        spacing, flips = info.grid_of(scan)
        with store.open_volume(uid) as volume, ExitStack() as stack:
            masks = stack.enter_context(store.open_masks(uid)) if store.has_masks(uid) else None
            draw_series(volume, spacing, candidates, text, out, flips, masks)
        return
    order = np.argsort(~candidates["is_nodule"].to_numpy(), kind="stable")[:48]
    shown = f"No volume of this scan in the store (built with --no-volumes): its crops, {len(order)} of {len(rows)}"
    _draw_rows(store, rows[order], f"{text}\n{shown}", out)


def overview_picture(store: "Store", out: Path, num: int = 24) -> None:
    """Draw `num` crops of a store into `out`: half nodules, evenly over the sizes, half other candidates."""
    _check_out(out)
    rows, title = info.overview_rows(store.manifest, num)
    _draw_rows(store, rows, title, out)


def worst_picture(store: "Store", run: Path, out: Path, num: int = 24) -> None:
    """Draw the crops a run was most wrong about into `out`: nodules it called unlikely, others it believed."""
    _check_out(out)
    path = worst.newest_predictions(run)
    predicted = worst.predicted_rows(store.manifest, path)
    rows, probability = worst.worst_rows(predicted, num)
    title = f"What {run} was most wrong about\nOrange: nodules missed most; blue: others taken for nodules; "
    title += f"p: probability ({len(predicted):,} crops judged)"
    _draw_rows(store, rows, title, out, [f"p {value:.3f}" for value in probability])
