"""An evaluation as one HTML file for people, that needs no other file and no network; beside it CSV and JSON.

All text that comes from data is escaped; the page's policy lets no script run but its own, which sorts tables.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunatrain import plots
from lunatrain.evaluate import (
    FROM_CANDIDATES,
    RATE_NAMES,
    Evaluation,
    figure_text,
    percent,
    predictions_csv,
    worst_rows,
)

REPORT_FILE, PREDICTIONS_FILE, METRICS_FILE = "report.html", "predictions.csv", "metrics.json"
NUM_WORST = 12
STARTS = ("start_index", "start_row", "start_col")
SERIES_TAIL = 10
"""Characters of a series id that are shown; the rest is in the cell's title."""

STYLE = """
:root { --page: #f3f5f8; --card: #ffffff; --text: #1f2328; --muted: #59636e; --line: #d8dee4; --accent: #0072b2;
  --soft: #dcebf5; --warn: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --muted: #9198a1;
  --line: #30363d; --accent: #56b4e9; --soft: #1d3446; --warn: #ffb000; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; } p { margin: 0 0 12px; } .muted { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; margin: 20px 0 12px; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.panel + .panel, .pair + .panel, details { margin-top: 12px; } .pair > .panel { margin-top: 0; }
.cards .panel { margin: 0; } .cards .panel:first-child { border-top: 3px solid var(--accent); padding-top: 12px; }
.name, .note { color: var(--muted); font-size: 13px; line-height: 1.4; }
.value { font-size: 27px; font-weight: 650; line-height: 1.35; font-variant-numeric: tabular-nums; }
.trap { display: grid; grid-template-columns: auto 1fr; gap: 4px 28px; align-items: center; }
.trap { border-left: 4px solid var(--warn); } .trap p { margin: 0; }
.notes { margin: 12px 0 0; padding-left: 20px; color: var(--muted); font-size: 13.5px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; align-items: start; }
figure { margin: 0; } img { display: block; width: 100%; height: auto; } .film { background: #161b22; padding: 4px; }
.scroll { overflow-x: auto; } .scroll + p { margin: 12px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; } tbody tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 600; }
th button { all: unset; cursor: pointer; } th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
.bar { display: inline-block; width: 90px; height: 9px; margin-left: 8px; border-radius: 3px; background: var(--soft); }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.facts td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--muted); width: 200px; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 900px) { .cards { grid-template-columns: repeat(3, 1fr); } .pair { grid-template-columns: 1fr; } }
@media (max-width: 520px) { .cards { grid-template-columns: 1fr 1fr; } .trap { grid-template-columns: 1fr; } }
@media print { body { background: none; } .panel, tr { break-inside: avoid; } }
"""

SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
  const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  const key = row => row.cells[column].dataset.v;
  const order = (a, b) => a === b ? 0 : a === "" ? 1 : b === "" ? -1
    : sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  [...body.rows].sort((a, b) => order(key(a), key(b))).forEach(row => body.append(row));
  head.parentElement.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}));
"""


def write_report(
    evaluation: Evaluation,
    out: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    pictures: Mapping[str, bytes] | None = None,
    curves: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write report.html, predictions.csv (LUNA16's submission format) and metrics.json; return the report's path.

    Parameters
    ----------
    evaluation : Evaluation
        What to report.
    out : Path
        Folder; made where it is not there. The same result gives the same bytes.
    title : str
        Heading of the report.
    facts : mapping of str to str
        Where the result comes from: run, checkpoint, store, split, part and so on.
    pictures : mapping of str to bytes, optional
        PNG files by their headings, as `worst_pictures` gives them.
    curves : sequence of mapping, optional
        The lines of the run's metrics.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = predictions_csv(evaluation.rows, evaluation.probability)
    table.to_csv(out / PREDICTIONS_FILE, index=False, lineterminator="\n")
    figures = json.dumps(evaluation.to_json(), indent=2, allow_nan=False)
    (out / METRICS_FILE).write_text(figures + "\n", encoding="utf-8")
    path = out / REPORT_FILE
    path.write_text(report_html(evaluation, title, facts, pictures or {}, curves or ()), encoding="utf-8")
    return path


def report_html(
    evaluation: Evaluation,
    title: str,
    facts: Mapping[str, str],
    pictures: Mapping[str, bytes],
    curves: Sequence[Mapping[str, Any]],
) -> str:
    """The whole page; parameters as in `write_report`."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = (_cards, _trap, _notes, _froc_section, _curves_section, _diameter_section, _threshold_section)
    parts = [_heading(evaluation, title), *(make(evaluation) for make in sections), _calibration_section(evaluation)]
    parts += [*(_picture_section(name, png) for name, png in pictures.items()), _worst_section(evaluation)]
    if curves:
        plot = _plot(partial(plots.training_png, curves), "training curves")
        parts.append(_section("Training", "Figures of each epoch, against the samples seen.", plot))
    parts.append(_facts_section(facts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def worst_pictures(
    evaluation: Evaluation, read_crops: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]], num: int = NUM_WORST
) -> dict[str, bytes]:
    """Montages of the negatives with the highest probability and the positives with the lowest, by heading.

    `read_crops` takes rows of the manifest, as `lunaprep.store.reader.Store.crops` does; the evaluation's rows must
    have the manifest's index.
    """
    pictures = {}
    for heading, table in _worst(evaluation, num).items():
        if len(table):
            captions = [_caption(record) for record in table.to_dict("records")]
            centers = table[["index", "row", "col"]].to_numpy() - table[list(STARTS)].to_numpy()
            crops = read_crops(table.index.to_numpy(dtype=np.int64))
            pictures[heading] = plots.montage_png(crops, captions, list(table[evaluation.label].astype(bool)), centers)
    return pictures


def _worst(evaluation: Evaluation, num: int) -> dict[str, pd.DataFrame]:
    positive, negative = evaluation.classes
    negatives, positives = worst_rows(evaluation.rows, evaluation.probability, num, evaluation.label)
    heading = "Crops of class '{}' with the {} probability"
    return {heading.format(negative, "highest"): negatives, heading.format(positive, "lowest"): positives}


def _caption(record: Mapping[Any, Any]) -> str:
    """Candidate and its probability; series; diameter, where there is one."""
    diameter = record["diameter_mm"]
    size = f"\n{diameter:.1f} mm" if diameter == diameter else ""
    return f"{record['candidate_id']}: p {record['probability']:.3g}\n{_short(record['series_uid'])}{size}"


def _short(series_uid: str) -> str:
    return series_uid if len(series_uid) <= SERIES_TAIL + 1 else f"…{series_uid[-SERIES_TAIL:]}"


def _heading(evaluation: Evaluation, title: str) -> str:
    binary, (positive, negative) = evaluation.binary, evaluation.classes
    counts = (
        f"{len(evaluation.rows):,} crops of {evaluation.rows['series_uid'].nunique():,} series: "
        f"{binary.num_positive:,} {positive}, {binary.num_negative:,} {negative}. "
        f"Called {positive} from probability {binary.threshold:g} on."
    )
    return f'<header><h1>{escape(title)}</h1><p class="muted">{escape(counts)}</p></header>'


def _card(name: str, value: float, note: str) -> str:
    return (
        f'<div class="panel"><div class="name">{escape(name)}</div>'
        f'<div class="value">{figure_text(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def _cards(evaluation: Evaluation) -> str:
    binary, (positive, _), froc = evaluation.binary, evaluation.classes, evaluation.froc
    found, called = binary.true_positives, binary.true_positives + binary.false_positives
    best = f"best {figure_text(binary.best_f1)} at {figure_text(binary.best_f1_threshold)}"
    cards = [
        _card("AUC", binary.auc, "area under the ROC curve; chance 0.5"),
        _card("Average precision", binary.average_precision, f"chance {evaluation.is_positive.mean():.2g}"),
        _card("Recall", binary.recall, f"{found:,} of {binary.num_positive:,} {positive} crops"),
        _card("Precision", binary.precision, f"{found:,} of {called:,} called {positive}"),
        _card("F1", binary.f1, best),
    ]
    if froc is None:
        cards.insert(1, _card("Diameter alone", evaluation.diameter_auc, "AUC of the diameter as score: to be beaten"))
    else:
        bound = "upper bound; " if evaluation.froc_from == FROM_CANDIDATES else ""
        mean = "mean sensitivity at 1/8 to 8 false positives a scan"
        cards.insert(
            0,
            _card(
                "CPM",
                froc.cpm,
                bound
                + (f"{figure_text(froc.ci.cpm_low)} to {figure_text(froc.ci.cpm_high)} (95 %)" if froc.ci else mean),
            ),
        )
    return f'<section class="cards" aria-label="Headline figures">{"".join(cards)}</section>'


def _trap(evaluation: Evaluation) -> str:
    """Percent correct, and beside it why not to judge by it."""
    binary, (positive, negative) = evaluation.binary, evaluation.classes
    right = (
        f"Here {binary.true_positives:,} of {binary.num_positive:,} {positive} crops "
        f"({percent(binary.correct_positive)}) and {binary.true_negatives:,} of {binary.num_negative:,} {negative} "
        f"crops ({percent(binary.correct_negative)}) are called right."
    )
    return (
        '<section class="panel trap"><div><div class="name">Percent correct</div>'
        f'<div class="value">{percent(binary.accuracy)}</div></div>'
        f"<div><p><strong>{escape(evaluation.majority.sentence)}.</strong> Percent correct alone says little.</p>"
        f'<p class="muted">{escape(right)}</p></div></section>'
    )


def _notes(evaluation: Evaluation) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in evaluation.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _section(heading: str, text: str, body: str) -> str:
    return f'<section><h2>{escape(heading)}</h2><p class="muted">{escape(text)}</p>{body}</section>'


def _plot(draw: Callable[[plots.Theme], bytes], alt: str) -> str:
    """A picture in a light and a dark edition; the reader's setting chooses."""
    light, dark = (_data_url(draw(theme)) for theme in (plots.LIGHT, plots.DARK))
    return (
        f'<figure class="panel"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(alt)}" src="{light}"></picture></figure>'
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table of cells made by `_td`; a click on a heading sorts."""
    names = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _td(value: str | float, text: str | None = None, more: str = "") -> str:
    """Cell with the value it is sorted by; `more` is HTML."""
    shown = text if text is not None else f"{value:,}" if isinstance(value, int) else str(value)
    key = "" if value != value else value
    return f'<td data-v="{escape(str(key))}">{escape(shown)}{more}</td>'


def _share(value: float, digits: int = 3) -> str:
    return _td(value, figure_text(value, digits))


def _bar(value: float) -> str:
    """Percentage with a bar."""
    width = 0.0 if value != value else 100 * value
    return _td(value, percent(value), f'<span class="bar"><i style="width:{width:.1f}%"></i></span>')


def _froc_section(evaluation: Evaluation) -> str:
    froc = evaluation.froc
    if froc is None:
        return ""
    n, ci, values = froc.counts, froc.ci, [*froc.at_rates, froc.cpm]
    rows = [[_td(k, name), _share(values[k])] for k, name in enumerate([*RATE_NAMES, "CPM (their mean)"])]
    if ci is not None:
        lows, highs = [*ci.at_rates_low, ci.cpm_low], [*ci.at_rates_high, ci.cpm_high]
        for row, low, high in zip(rows, lows, highs, strict=True):
            row.append(_td(low, f"{figure_text(low)} to {figure_text(high)}"))
    found = (
        f"{n.num_scans:,} scans, {n.num_nodules:,} nodules: {n.nodules_found:,} have a mark, {n.nodules_missed:,} have "
        f"none at any threshold. {n.marks_read:,} marks, of them {n.false_positives:,} false positives, "
        f"{n.marks_on_excluded:,} on excluded findings, {n.marks_beyond_limit:,} beyond the 100 a scan that count."
    )
    table = _table(["FP per scan", "sensitivity", *(["95 % interval"] if ci else [])], rows)
    plot = _plot(partial(plots.froc_png, froc), "FROC curve")
    body = f'<div class="pair">{plot}<div class="panel">{table}<p class="muted">{escape(found)}</p></div></div>'
    bound = ", on the nodules that have candidates: an upper bound" * (evaluation.froc_from == FROM_CANDIDATES)
    text = f"Scored by the rules of the LUNA16 challenge{bound}."
    return _section("Nodules found per false positive (FROC)", text, body)


def _curves_section(evaluation: Evaluation) -> str:
    binary, share = evaluation.binary, evaluation.is_positive.mean()
    point, at = (1 - binary.correct_negative, binary.recall), (binary.recall, binary.precision)
    given = evaluation.precision_recall, binary.average_precision, share, at
    roc = _plot(partial(plots.roc_png, evaluation.roc, binary.auc, point), "ROC curve")
    recall = _plot(partial(plots.precision_recall_png, *given), "precision over recall")
    text = "ROC says how well the classes are ranked; precision and recall also feel how rare the positives are."
    return _section("Ranking of the crops", text, f'<div class="pair">{roc}{recall}</div>')


def _diameter_section(evaluation: Evaluation) -> str:
    rows = [
        [_td(k, row.label), _td(row.num_positive), _td(row.num_found), _bar(row.recall)]
        for k, row in enumerate(evaluation.by_diameter)
        if row.num_positive or row.low_mm == row.low_mm
    ]
    table = _table(["diameter", "crops", "found", "recall"], rows)
    text = f"Crops of the class '{evaluation.classes[0]}' that reach the threshold, by the diameter of their nodule."
    return _section("By diameter", text, f'<div class="panel">{table}</div>')


def _threshold_section(evaluation: Evaluation) -> str:
    rows = [
        [_share(row.threshold, 2), _td(row.true_positives), _td(row.false_positives), _share(row.recall),
         _share(row.precision), _share(row.specificity, 4), _share(row.f1)]
        for row in evaluation.by_threshold
    ]  # fmt: skip
    head = ["threshold", "found", "false positives", "recall", "precision", "specificity", "F1"]
    return _section("By threshold", "What another threshold gives.", f'<div class="panel">{_table(head, rows)}</div>')


def _calibration_section(evaluation: Evaluation) -> str:
    binary = evaluation.binary
    bins = _plot(partial(plots.calibration_png, evaluation.calibration), "calibration curve")
    given = evaluation.is_positive, evaluation.probability, evaluation.classes, binary.threshold
    scores = _plot(partial(plots.scores_png, *given), "histogram of the probabilities of each class")
    rows = [
        [_td(row.low, f"{row.low:.1f} to {row.high:.1f}"), _td(row.num_samples), _share(row.mean_probability),
         _bar(row.share_positive)]
        for row in evaluation.calibration
    ]  # fmt: skip
    table = _table(["probability", "crops", "mean probability", f"share of {evaluation.classes[0]}"], rows)
    text = (
        "Whether a probability means what it says, and how the classes come apart. "
        f"Log loss {figure_text(binary.log_loss, 4)}, Brier score {figure_text(binary.brier, 4)}."
    )
    return _section("Calibration", text, f'<div class="pair">{bins}{scores}</div><div class="panel">{table}</div>')


def _picture_section(heading: str, png: bytes) -> str:
    image = f'<img alt="{escape(heading)}" src="{_data_url(png)}">'
    text = "Axial slice through the candidate, lung window (−600 / 1500 HU). Below: candidate, p, series, diameter."
    return _section(heading, text, f'<figure class="panel film">{image}</figure>')


def _worst_section(evaluation: Evaluation) -> str:
    head = ["candidate", "series", "probability", "diameter, mm", "x, mm", "y, mm", "z, mm"]
    blocks = []
    for heading, table in _worst(evaluation, NUM_WORST).items():
        body = _table(head, [_worst_row(record) for record in table.to_dict("records")])
        blocks.append(f'<details class="panel"><summary>Table: {escape(heading)}</summary>{body}</details>')
    return f"<section>{''.join(blocks)}</section>"


def _worst_row(record: Mapping[Any, Any]) -> list[str]:
    uid, numbers = str(record["series_uid"]), [float(record[name]) for name in ("diameter_mm", "x_mm", "y_mm", "z_mm")]
    series = f'<td data-v="{escape(uid)}" title="{escape(uid)}">{escape(_short(uid))}</td>'
    probability = float(record["probability"])
    places = [_td(value, figure_text(value, 1)) for value in numbers]
    return [_td(int(record["candidate_id"])), series, _td(probability, f"{probability:.3g}"), *places]


def _facts_section(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(value)}</td></tr>" for k, value in facts.items())
    body = f'<div class="panel"><table class="facts"><tbody>{rows}</tbody></table></div>'
    files = f"Beside this file: {PREDICTIONS_FILE} (LUNA16's submission format) and {METRICS_FILE}."
    return _section("Where this comes from", files, body)
