"""Figures of results as PNG files. The only module of lunatrain that imports matplotlib.

Figures are made of objects, never through pyplot: the same result gives the same bytes.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.style import context as style_context

from lunatrain.froc import RATES, FrocResult
from lunatrain.metrics import CalibrationBin, PrecisionRecallCurve, RocCurve
from lunatrain.overlays import LUNG_WINDOW

POINTS_PER_OCTAVE = 128
PLAIN_STYLE = style_context(["default", {"text.parse_math": False, "font.size": 10.5}])  # and $ is a plain sign
LEGEND_RATE, LEGEND_HEIGHT = 0.75, 0.18
"""Where the legend of a FROC curve begins in the lower right corner, and how high it reaches."""

DPI, MONTAGE_COLUMNS = 130, 6
NUM_SCORE_BINS = 40
SHARES_WRITTEN = 8
"""Classes up to which a confusion matrix has room for shares."""
FRAMES = ("#ffb000", "#56b4e9")  # positive, negative; as in lunaprep's pictures

PANELS = {
    "loss": ("loss", "log_loss"),
    "area under the ROC curve": ("auc",),
    "average precision": ("average_precision",),
    "F1": ("f1",),
    "correct, positive class": ("correct_positive",),
    "correct, negative class": ("correct_negative",),
}
"""Of training curves: what stands together in a panel. Figures of other tasks get a panel each, up to as many."""

NOT_DRAWN = ("part", "epoch", "samples", "score", "threshold", "data_wait_share")


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; `first` and `second` are told apart with any colour vision, and in grey."""

    background: str
    text: str
    muted: str
    grid: str
    first: str
    second: str


LIGHT = Theme("#ffffff", "#1f2328", "#656d76", "#d8dee4", "#0072b2", "#d55e00")
DARK = Theme("#161b22", "#e6edf3", "#9198a1", "#30363d", "#56b4e9", "#ffb000")


LINES = {
    LIGHT: ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9"),
    DARK: ("#56b4e9", "#ffb000", "#2bd4a8", "#f0a3d0", "#f0e442", "#ff7f50"),
}
"""Of curves beside each other; told apart with any colour vision, and by their dashes."""
DASHES = ("-", "--", "-.", ":")


def froc_picture(result: FrocResult, out: Path) -> None:
    """Write `froc_png` to a file."""
    out.write_bytes(froc_png(result))


def _cpm(result: FrocResult) -> str:
    ci = result.ci
    return f"{result.cpm:.3f}" + (f" ({ci.cpm_low:.3f} to {ci.cpm_high:.3f})" if ci else "")


@PLAIN_STYLE
def roc_png(curve: RocCurve, auc: float, at: tuple[float, float], theme: Theme = LIGHT) -> bytes:
    """Draw a ROC curve; `at` is the false and true positive rate at the threshold."""
    figure, axes = _figure(theme)
    axes.plot([0, 1], [0, 1], color=theme.muted, lw=1, ls=":", label="chance")
    axes.plot(curve.false_positive_rate, curve.true_positive_rate, color=theme.first, lw=2, label=f"AUC {auc:.4f}")
    _draw_threshold(axes, at, theme)
    axes.set(xlabel="false positive rate", ylabel="recall")
    _finish_unit_square(axes, theme, "lower right", np.isnan(auc))
    return png_of(figure)


@PLAIN_STYLE
def precision_recall_png(
    curve: PrecisionRecallCurve, average: float, share_positive: float, at: tuple[float, float], theme: Theme = LIGHT
) -> bytes:
    """Draw precision over recall; `at` is the recall and precision at the threshold."""
    figure, axes = _figure(theme)
    label = f"chance: {share_positive:.2g} of the crops"
    axes.plot([0, 1], [share_positive, share_positive], color=theme.muted, lw=1, ls=":", label=label)
    name = f"average precision {average:.4f}"
    if not np.isnan(average):
        axes.plot(curve.recall, curve.precision, color=theme.first, lw=2, drawstyle="steps-post", label=name)
    _draw_threshold(axes, at, theme)
    axes.set(xlabel="recall", ylabel="precision")
    _finish_unit_square(axes, theme, "lower left", np.isnan(average))
    return png_of(figure)


@PLAIN_STYLE
def class_roc_png(
    curves: Sequence[RocCurve], aucs: npt.NDArray[np.float64], classes: Sequence[str], theme: Theme = LIGHT
) -> bytes:
    """Draw the ROC curve of each class against all others; those without one are left out."""
    figure, axes = _figure(theme)
    axes.plot([0, 1], [0, 1], color=theme.muted, lw=1, ls=":", label="chance")
    colours = LINES[theme]
    for k, (curve, auc, name) in enumerate(zip(curves, aucs, classes, strict=True)):
        if not np.isnan(auc):
            style: dict[str, Any] = {"color": colours[k % len(colours)], "ls": DASHES[k % len(DASHES)], "lw": 2}
            label = _plain(f"{name[:16]}: AUC {auc:.3f}")
            axes.plot(curve.false_positive_rate, curve.true_positive_rate, label=label, **style)
    axes.set(xlabel="false positive rate", ylabel="recall")
    _finish_unit_square(axes, theme, "lower right", bool(np.isnan(aucs).all()))
    return png_of(figure)


@PLAIN_STYLE
def confusion_png(confusion: npt.NDArray[np.int64], classes: Sequence[str], theme: Theme = LIGHT) -> bytes:
    """Draw how many of each class (rows) were called what (columns); the darker, the larger share of the row."""
    figure, axes = _figure(theme)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    shades = LinearSegmentedColormap.from_list("shares", [theme.background, theme.first])
    axes.imshow(shares, cmap=shades, vmin=0, vmax=1)
    size = 11 if len(classes) <= SHARES_WRITTEN else 8
    for (row, column), share in np.ndenumerate(shares):
        written = f"\n{100 * share:.0f} %" if totals[row, 0] and len(classes) <= SHARES_WRITTEN else ""
        colour = theme.background if share > 0.5 else theme.text
        text = f"{confusion[row, column]:,}{written}"
        axes.text(column, row, text, ha="center", va="center", color=colour, size=size, linespacing=1.5)
    names = [_plain(name[:16]) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) <= 4 else 45)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="called", ylabel="is")
    _finish(axes, theme, None)
    axes.grid(visible=False)
    return png_of(figure)


@PLAIN_STYLE
def froc_png(result: FrocResult, theme: Theme = LIGHT) -> bytes:
    """Draw the FROC curve from 1/8 to 8 false positives a scan, with the 95 % interval where there is one."""
    figure, axes = _figure(theme)
    octaves = np.log2(RATES[-1] / RATES[0])
    rates = RATES[0] * 2.0 ** np.linspace(0, octaves, int(octaves * POINTS_PER_OCTAVE) + 1)
    if (ci := result.ci) is not None:
        band: dict[str, Any] = {"color": theme.first, "alpha": 0.22, "lw": 0, "label": "95 % interval"}
        axes.fill_between(ci.fp_per_scan, ci.low, ci.high, **band)
    curve = np.interp(rates, result.fp_per_scan, result.sensitivity)
    axes.plot(rates, curve, color=theme.first, lw=2, label=f"CPM {_cpm(result)}")
    axes.plot(RATES, result.at_rates, "o", color=theme.first, ms=5, clip_on=False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set(xlim=(RATES[0], RATES[-1]), ylim=(0, 1.02), xlabel="false positives per scan", ylabel="sensitivity")
    lowest = curve if ci is None else np.interp(rates, ci.fp_per_scan, ci.low)
    is_free = bool(np.interp(LEGEND_RATE, rates, lowest) > LEGEND_HEIGHT)  # beneath the curve, else it is above
    _finish(axes, theme, "lower right" if is_free else "upper left", bool(np.isnan(result.cpm)))
    return png_of(figure)


@PLAIN_STYLE
def calibration_png(bins: Sequence[CalibrationBin], theme: Theme = LIGHT) -> bytes:
    """Draw the share of positives over the mean probability of each bin; larger dots hold more crops."""
    figure, axes = _figure(theme)
    axes.plot([0, 1], [0, 1], color=theme.muted, lw=1, ls=":", label="perfectly calibrated")
    filled = [row for row in bins if row.num_samples]
    x, y = [row.mean_probability for row in filled], [row.share_positive for row in filled]
    sizes = [18 + 22 * np.log10(row.num_samples) for row in filled]
    axes.plot(x, y, color=theme.first, lw=1.4)
    axes.scatter(x, y, s=sizes, color=theme.first, zorder=3, clip_on=False, label="crops in ten bins")
    axes.set(xlabel="mean probability", ylabel="share of positives")
    _finish_unit_square(axes, theme, "upper left", not filled)
    return png_of(figure)


@PLAIN_STYLE
def scores_png(
    is_positive: npt.NDArray[np.bool_],
    probability: npt.NDArray[np.float64],
    classes: tuple[str, str],
    threshold: float,
    theme: Theme = LIGHT,
) -> bytes:
    """Draw how many crops of each class have which probability, on a logarithmic scale."""
    figure, axes = _figure(theme)
    edges = np.linspace(0, 1, NUM_SCORE_BINS + 1)
    colours, hatches = (theme.first, theme.second), ("", "////")
    for name, of_class, colour, hatch in zip(classes[::-1], (False, True), colours, hatches, strict=True):
        values = probability[is_positive == of_class]
        counts, _ = np.histogram(values, edges)
        label = f"{name}, {len(values):,} crops"
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.25, hatch=hatch)
        axes.stairs(counts, edges, color=colour, lw=1.8, label=label)
    axes.axvline(threshold, color=theme.text, lw=1, ls="--", label=f"threshold {threshold:g}")
    axes.set_yscale("log")
    axes.set(xlim=(0, 1), ylim=(0.7, None), xlabel="probability", ylabel="crops")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _finish(axes, theme, "upper center")
    return png_of(figure)


@PLAIN_STYLE
def training_png(
    curves: Sequence[Mapping[str, Any]], theme: Theme = LIGHT, panels: Mapping[str, tuple[str, ...]] | None = None
) -> bytes:
    """Draw the lines of metrics.jsonl (see `lunatrain.log`) against samples seen; `panels` as `PANELS`."""
    panels = _panels(curves) if panels is None else panels
    is_point = len({record.get("samples") for record in curves}) == 1
    num_rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(11.4, 3.1 * num_rows), dpi=DPI, layout="constrained", facecolor=theme.background)
    for k, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(num_rows, 3, k + 1)
        seen: list[float] = []
        for part, colour, style in (("train", theme.first, "-"), ("val", theme.second, "--")):
            x, y = _points(curves, part, names)
            if x:
                axes.plot(x, y, color=colour, ls=style, lw=1.8, marker="o", ms=3, label=part)
                seen += y
        if "loss" not in names:
            _limit_scores(axes, seen, is_point=is_point)
        if is_point:
            axes.set_xlim(left=0)
        axes.set_title(title, size=11, color=theme.text)
        axes.set_xlabel("samples seen")
        axes.xaxis.set_major_formatter(_short_number)
        axes.locator_params(axis="x", nbins=5)
        _finish(axes, theme, "best")
    return png_of(figure)


@PLAIN_STYLE
def montage_png(
    crops: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
    captions: Sequence[str],
    is_positive: Sequence[bool] | None = None,
    center_irc: npt.ArrayLike | None = None,
) -> bytes:
    """Draw an axial slice of each crop in the lung window, six in a row, always on dark.

    Parameters
    ----------
    crops : sequence of ndarray, (slices, rows, columns)
        HU.
    captions : sequence of str
        Up to three lines for below each.
    is_positive : sequence of bool, optional
        Class of each, for the colour of its frame.
    center_irc : array_like, (n, 3), optional
        Voxel of each crop to look at, pointed at by ticks; without it the middle slice is shown.
    """
    num_rows, cell, below, edge = max(1, -(-len(crops) // MONTAGE_COLUMNS)), 190, 58, 12
    width, height, side = MONTAGE_COLUMNS * cell + edge, num_rows * (cell + below) + edge, cell - edge
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=DARK.background)
    for k, (crop, text) in enumerate(zip(crops, captions, strict=True)):
        left, top = edge + k % MONTAGE_COLUMNS * cell, edge + k // MONTAGE_COLUMNS * (cell + below)
        place = (left / width, 1 - (top + side) / height, side / width, side / height)
        axes = figure.add_axes(place, label=f"crop {k}", xticks=[], yticks=[])
        middle = np.asarray(crop.shape) // 2 if center_irc is None else np.asarray(center_irc)[k]
        index, row, column = np.clip(middle, 0, np.asarray(crop.shape) - 1).tolist()
        image, (low, high) = np.asarray(crop[index], dtype=np.float32), LUNG_WINDOW
        axes.imshow(image, "gray", vmin=low, vmax=high, interpolation="bicubic", aspect="auto")
        colour = DARK.muted if is_positive is None else FRAMES[0 if is_positive[k] else 1]
        for start, stop in ((0.0, 0.07), (0.93, 1.0)) if center_irc is not None else ():
            axes.axvline(column, start, stop, color=colour, lw=1.6)
            axes.axhline(row, start, stop, color=colour, lw=1.6)
        axes.spines[:].set(color=colour, linewidth=1.6)
        style: dict[str, Any] = {"size": 7, "color": DARK.text, "va": "top", "linespacing": 1.25}
        axes.text(0, -0.035, _plain(text), transform=axes.transAxes, **style)
    return png_of(figure)


def _figure(theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 4.1), dpi=DPI, layout="constrained", facecolor=theme.background)
    return figure, figure.add_subplot()


def _finish(axes: Axes, theme: Theme, legend: Any, is_undefined: bool = False) -> None:
    """Set colours, grid and legend; say so where there is no curve."""
    axes.set_facecolor(theme.background)
    axes.grid(color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    axes.tick_params(which="both", color=theme.muted, labelcolor=theme.text)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.text)
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": theme.muted, "size": 13}
    if is_undefined:
        axes.text(0.5, 0.5, "no curve: a class is empty", transform=axes.transAxes, **style)
        return
    style = {"facecolor": theme.background, "edgecolor": theme.grid, "labelcolor": theme.text}
    if legend is not None:
        axes.legend(**style, loc=legend)


def _finish_unit_square(axes: Axes, theme: Theme, legend: str, is_undefined: bool) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    _finish(axes, theme, legend, bool(is_undefined))


def _draw_threshold(axes: Axes, at: tuple[float, float], theme: Theme) -> None:
    style: dict[str, Any] = {"ls": "", "marker": "D", "ms": 7, "zorder": 4, "clip_on": False}
    axes.plot(at[0], at[1], color=theme.second, mec=theme.background, label="at the threshold", **style)


def _panels(curves: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Title of each panel and what is drawn in it: the known figures, then others as they come."""
    there = [name for record in curves for name, value in record.items() if isinstance(value, (int, float))]
    panels = {title: names for title, names in PANELS.items() if any(name in there for name in names)}
    if len(panels) <= 1:  # another task's figures
        known = {name for names in panels.values() for name in names}
        panels |= {name.replace("_", " "): (name,) for name in there if name not in known and name not in NOT_DRAWN}
    return dict(list(panels.items())[: len(PANELS)])


def _points(curves: Sequence[Mapping[str, Any]], part: str, names: Sequence[str]) -> tuple[list[float], list[float]]:
    """Samples seen and the first of the named figures that is there; where it is null the line breaks."""
    x, y = [], []
    for record in curves:
        name = next((name for name in names if name in record), None)
        if record.get("part") == part and name is not None:
            x.append(float(record["samples"]))
            y.append(np.nan if record[name] is None else float(record[name]))
    return x, y


def _limit_scores(axes: Axes, values: Sequence[float], *, is_point: bool) -> None:
    """Let axes of shares end at 0 and 1; of a single epoch show all between: a dot says nothing on axes of its own."""
    if not all(np.isnan(value) or 0 <= value <= 1 for value in values):
        return
    low, high = (-np.inf, np.inf) if is_point else axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))


def _short_number(value: float, _: float) -> str:
    """``1.5M`` for 1,500,000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _plain(text: str) -> str:
    """Text without characters the font may lack; lines are kept."""
    return "".join(c if c in "\n−–…" or (c.isprintable() and ord(c) < 256) else "?" for c in text)


def png_of(figure: Figure) -> bytes:
    """PNG that tells nothing of the time or the library."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()
