"""An evaluation as one HTML file for people, that needs no other file and no network; beside it CSV and JSON.

All text that comes from data is escaped; the page's policy lets no script run but its own, which sorts tables.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep.store.reader import crop_centers
from lunatrain import plots
from lunatrain.evaluate import (
    FROM_CANDIDATES,
    Evaluation,
    figure_text,
    found_at,
    percent,
    predictions_csv,
    worst_rows,
)
from lunatrain.page import (
    bar_td,
    card,
    data_url,
    facts_panel,
    froc_body,
    html_table,
    notes_list,
    page,
    percent_correct,
    section,
    share_td,
    short_uid,
    td,
    themed_plot,
)

REPORT_FILE, PREDICTIONS_FILE, METRICS_FILE = "report.html", "predictions.csv", "metrics.json"
NUM_WORST = 12


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
    table = predictions_csv(evaluation.rows, evaluation.probability)
    page_text = report_html(evaluation, title, facts, pictures or {}, curves or ())
    return write_files(out, table, evaluation.to_json(), page_text)


def write_files(out: Path, predictions: pd.DataFrame, figures: Mapping[str, Any], page_text: str) -> Path:
    """Write predictions.csv, metrics.json and report.html into a folder; return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    predictions.to_csv(out / PREDICTIONS_FILE, index=False, lineterminator="\n")
    text = json.dumps(figures, indent=2, allow_nan=False)
    (out / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    path = out / REPORT_FILE
    path.write_text(page_text, encoding="utf-8")
    return path


def report_html(
    evaluation: Evaluation,
    title: str,
    facts: Mapping[str, str],
    pictures: Mapping[str, bytes],
    curves: Sequence[Mapping[str, Any]],
) -> str:
    """The whole page; parameters as in `write_report`."""
    sections = (_froc_section, _curves_section, _diameter_section, _threshold_section, _calibration_section)
    parts = [_heading(evaluation, title), _cards(evaluation), _trap(evaluation), notes_list(evaluation.notes)]
    parts += [make(evaluation) for make in sections]
    film = "Axial slice through the candidate, lung window (−600 / 1500 HU). Below: candidate, p, series, diameter."
    parts += [*(picture_section(name, png, film) for name, png in pictures.items()), _worst_section(evaluation)]
    parts += training_section(curves)
    parts.append(_facts_section(facts))
    return page(title, parts)


def training_section(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """The curves of the run, where there are any."""
    if not curves:
        return []
    plot = themed_plot(partial(plots.training_png, curves), "training curves")
    return [section("Training", "Figures of each epoch, against the samples seen.", plot)]


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
            crops = read_crops(table.index.to_numpy(dtype=np.int64))
            labels = list(table[evaluation.label].astype(bool))
            pictures[heading] = plots.montage_png(crops, captions, labels, crop_centers(table))
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
    return f"{record['candidate_id']}: p {record['probability']:.3g}\n{short_uid(record['series_uid'])}{size}"


def _heading(evaluation: Evaluation, title: str) -> str:
    binary, (positive, negative) = evaluation.binary, evaluation.classes
    counts = (
        f"{len(evaluation.rows):,} crops of {evaluation.rows['series_uid'].nunique():,} series: "
        f"{binary.num_positive:,} {positive}, {binary.num_negative:,} {negative}. "
        f"Called {positive} from probability {binary.threshold:g} on."
    )
    return f'<header><h1>{escape(title)}</h1><p class="muted">{escape(counts)}</p></header>'


def _card(name: str, value: float, note: str) -> str:
    return card(name, figure_text(value), note)


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
    if evaluation.label == "is_malignant":
        cards.insert(1, _card("Diameter alone", evaluation.diameter_auc, "AUC of the diameter as score: to be beaten"))
    if froc is not None:
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
    return percent_correct(binary.accuracy, evaluation.majority.sentence, right)


def _froc_section(evaluation: Evaluation) -> str:
    froc = evaluation.froc
    if froc is None:
        return ""
    body = froc_body(froc)
    bound = ", on the nodules that have candidates: an upper bound" * (evaluation.froc_from == FROM_CANDIDATES)
    text = f"Scored by the rules of the LUNA16 challenge{bound}."
    return section("Nodules found per false positive (FROC)", text, body)


def _curves_section(evaluation: Evaluation) -> str:
    binary, share = evaluation.binary, evaluation.is_positive.mean()
    point, at = (1 - binary.correct_negative, binary.recall), (binary.recall, binary.precision)
    given = evaluation.precision_recall, binary.average_precision, share, at
    roc = themed_plot(partial(plots.roc_png, evaluation.roc, binary.auc, point), "ROC curve")
    recall = themed_plot(partial(plots.precision_recall_png, *given), "precision over recall")
    text = "ROC says how well the classes are ranked; precision and recall also feel how rare the positives are."
    return section("Ranking of the crops", text, f'<div class="pair">{roc}{recall}</div>')


def _diameter_section(evaluation: Evaluation) -> str:
    rows = [
        [td(k, row.label), td(row.num_positive), td(row.num_found), bar_td(row.recall)]
        for k, row in enumerate(evaluation.by_diameter)
        if row.num_positive or row.low_mm == row.low_mm
    ]
    table = html_table(["diameter", "crops", found_at(evaluation.binary.threshold), "recall"], rows)
    text = f"Crops of the class '{evaluation.classes[0]}' that reach the threshold, by the diameter of their nodule."
    return section("By diameter", text, f'<div class="panel">{table}</div>')


def _threshold_section(evaluation: Evaluation) -> str:
    rows = [
        [share_td(row.threshold, 2), td(row.true_positives), td(row.false_positives), share_td(row.recall),
         share_td(row.precision), share_td(row.specificity, 4), share_td(row.f1)]
        for row in evaluation.by_threshold
    ]  # fmt: skip
    head = ["threshold", "found", "false positives", "recall", "precision", "specificity", "F1"]
    return section(
        "By threshold", "What another threshold gives.", f'<div class="panel">{html_table(head, rows)}</div>'
    )


def _calibration_section(evaluation: Evaluation) -> str:
    binary = evaluation.binary
    bins = themed_plot(partial(plots.calibration_png, evaluation.calibration), "calibration curve")
    given = evaluation.is_positive, evaluation.probability, evaluation.classes, binary.threshold
    scores = themed_plot(partial(plots.scores_png, *given), "histogram of the probabilities of each class")
    rows = [
        [td(row.low, f"{row.low:.1f} to {row.high:.1f}"), td(row.num_samples), share_td(row.mean_probability),
         bar_td(row.share_positive)]
        for row in evaluation.calibration
    ]  # fmt: skip
    table = html_table(["probability", "crops", "mean probability", f"share of {evaluation.classes[0]}"], rows)
    text = (
        "Whether a probability means what it says, and how the classes come apart. "
        f"Log loss {figure_text(binary.log_loss, 4)}, Brier score {figure_text(binary.brier, 4)}."
    )
    return section("Calibration", text, f'<div class="pair">{bins}{scores}</div><div class="panel">{table}</div>')


def picture_section(heading: str, png: bytes, text: str) -> str:
    """A picture on dark under its heading."""
    image = f'<img alt="{escape(heading)}" src="{data_url(png)}">'
    return section(heading, text, f'<figure class="panel film">{image}</figure>')


def _worst_section(evaluation: Evaluation) -> str:
    head = ["candidate", "series", "probability", "diameter, mm", "x, mm", "y, mm", "z, mm"]
    blocks = []
    for heading, table in _worst(evaluation, NUM_WORST).items():
        body = html_table(head, [_worst_row(record) for record in table.to_dict("records")])
        blocks.append(f'<details class="panel"><summary>Table: {escape(heading)}</summary>{body}</details>')
    return f"<section>{''.join(blocks)}</section>"


def _worst_row(record: Mapping[Any, Any]) -> list[str]:
    uid, numbers = str(record["series_uid"]), [float(record[name]) for name in ("diameter_mm", "x_mm", "y_mm", "z_mm")]
    series = f'<td data-v="{escape(uid)}" title="{escape(uid)}">{escape(short_uid(uid))}</td>'
    probability = float(record["probability"])
    places = [td(value, figure_text(value, 1)) for value in numbers]
    return [td(int(record["candidate_id"])), series, td(probability, f"{probability:.3g}"), *places]


def _facts_section(facts: Mapping[str, str]) -> str:
    files = f"Beside this file: {PREDICTIONS_FILE} (LUNA16's submission format) and {METRICS_FILE}."
    return section("Where this comes from", files, facts_panel(facts))
