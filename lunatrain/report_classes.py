"""The report of a result with several classes: an HTML file that needs no other, CSV and JSON beside it.

Beside `lunatrain.report`, which is for true-or-false labels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lunaprep.store.reader import crop_centers
from lunatrain import plots
from lunatrain.class_metrics import OF_CLASS, mean_known
from lunatrain.evaluate import figure_text, percent
from lunatrain.evaluate_classes import ClassEvaluation, class_predictions, class_title, most_wrong, patients_of
from lunatrain.page import (
    bar_td,
    card,
    facts_panel,
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
from lunatrain.report import (
    METRICS_FILE,
    NUM_WORST,
    PREDICTIONS_FILE,
    picture_section,
    training_section,
    write_files,
)

WRONG = "Crops called wrong, the surest first"


def write_class_report(
    evaluation: ClassEvaluation,
    out: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    pictures: Mapping[str, bytes] | None = None,
    curves: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write report.html, predictions.csv and metrics.json; return the report's path.

    Parameters are those of `lunatrain.report.write_report`; predictions.csv has a column for each class.
    """
    page_text = class_report_html(evaluation, title, facts, pictures or {}, curves or ())
    return write_files(out, class_predictions(evaluation), evaluation.to_json(), page_text)


def class_report_html(
    evaluation: ClassEvaluation,
    title: str,
    facts: Mapping[str, str],
    pictures: Mapping[str, bytes],
    curves: Sequence[Mapping[str, Any]],
) -> str:
    """The whole page; parameters as in `write_class_report`."""
    text = (
        "Axial slice, lung window (−600 / 1500 HU). Below: candidate, its class > what it is called, p; series; size."
    )
    parts = [_heading(evaluation, title), _cards(evaluation), _trap(evaluation), notes_list(evaluation.notes)]
    parts += [_confusion_section(evaluation), _class_section(evaluation)]
    parts += [picture_section(name, png, text) for name, png in pictures.items()]
    parts.append(_wrong_section(evaluation))
    parts += training_section(curves)
    files = f"Beside this file: {PREDICTIONS_FILE} (a probability for each class) and {METRICS_FILE}."
    parts.append(section("Where this comes from", files, facts_panel(facts)))
    return page(title, parts)


def wrong_pictures(
    evaluation: ClassEvaluation, read_crops: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]], num: int = NUM_WORST
) -> dict[str, bytes]:
    """A montage of the crops called wrong, by its heading; parameters as of `lunatrain.report.worst_pictures`."""
    table = most_wrong(evaluation, num)
    if table.empty:
        return {}
    captions = [_caption(record, evaluation.label) for record in table.to_dict("records")]
    crops = read_crops(table.index.to_numpy(dtype=np.int64))
    return {WRONG: plots.montage_png(crops, captions, None, crop_centers(table))}


def _caption(record: Mapping[Any, Any], label: str) -> str:
    diameter = record["diameter_mm"]
    size = f"\n{diameter:.1f} mm" if diameter == diameter else ""
    kinds = f"{record[label]:.8} > {record['called']:.8}"
    return f"{record['candidate_id']}: {kinds} p {record['probability']:.2f}\n{short_uid(record['series_uid'])}{size}"


def _heading(evaluation: ClassEvaluation, title: str) -> str:
    parts = (f"{n:,} {class_title(name)}" for name, n in zip(evaluation.classes, evaluation.counts, strict=True))
    counts = (
        f"{len(evaluation.rows):,} crops of {patients_of(evaluation.rows).nunique():,} patients: {'; '.join(parts)}. "
        "Called what is the most probable."
    )
    return f'<header><h1>{escape(title)}</h1><p class="muted">{escape(counts)}</p></header>'


def _cards(evaluation: ClassEvaluation) -> str:
    metrics = evaluation.metrics
    worst = int(np.nanargmin(metrics.recall))
    guessing = 1 / int((evaluation.counts > 0).sum())
    cards = [
        ("Macro AUC", metrics.macro_auc, _span(evaluation, "macro_auc", "mean over the classes; chance 0.5")),
        ("Balanced accuracy", metrics.balanced_accuracy,
         _span(evaluation, "balanced_accuracy", f"mean of the recalls; guessing: {guessing:.2f}")),
        ("Macro F1", metrics.macro_f1, "mean over the classes"),
        ("Least recall", float(metrics.recall[worst]), f"of {class_title(evaluation.classes[worst])}"),
        ("Log loss", metrics.log_loss, f"guessing: {np.log(len(evaluation.classes)):.2f}"),
    ]  # fmt: skip
    body = "".join(card(name, figure_text(value), text) for name, value, text in cards)
    return f'<section class="cards" aria-label="Headline figures">{body}</section>'


def _span(evaluation: ClassEvaluation, name: str, otherwise: str) -> str:
    if name not in evaluation.spans:
        return otherwise
    return "{} to {} (95 %)".format(*map(figure_text, evaluation.spans[name]))


def _trap(evaluation: ClassEvaluation) -> str:
    """Percent correct, and beside it why not to judge by it."""
    right = int(evaluation.metrics.confusion.diagonal().sum())
    text = (
        f"Here {right:,} of {len(evaluation.rows):,} crops are called right, balanced "
        f"{percent(evaluation.metrics.balanced_accuracy)}."
    )
    return percent_correct(evaluation.metrics.accuracy, evaluation.majority_sentence, text)


def _confusion_section(evaluation: ClassEvaluation) -> str:
    metrics = evaluation.metrics
    matrix = themed_plot(partial(plots.confusion_png, metrics.confusion, evaluation.classes), "confusion matrix")
    given = evaluation.rocs, metrics.auc, evaluation.classes
    roc = themed_plot(partial(plots.class_roc_png, *given), "ROC curve of each class against the others")
    text = (
        "Left: what crops of each class (rows) are called (columns), and the share of the row. Right: how each ranks."
    )
    return section("Which are taken for which", text, f'<div class="pair">{matrix}{roc}</div>')


def _class_section(evaluation: ClassEvaluation) -> str:
    metrics = evaluation.metrics
    rows = []
    for k, name in enumerate(evaluation.classes):
        shares = [share_td(float(getattr(metrics, what)[k])) for what in OF_CLASS if what != "recall"]
        recall = bar_td(float(metrics.recall[k]))
        rows.append([td(class_title(name)), td(int(evaluation.counts[k])), recall, *shares])
    means = [share_td(value) for value in (metrics.macro_auc, mean_known(metrics.precision), metrics.macro_f1)]
    rows.append([td("~", "mean"), td(len(evaluation.rows)), bar_td(metrics.balanced_accuracy), *means])
    table = html_table(["class", "crops", "recall", "AUC", "precision", "F1"], rows)
    text = "Each class against all others. A class of few crops counts as much in the mean as one of many."
    return section("By class", text, f'<div class="panel">{table}</div>')


def _wrong_section(evaluation: ClassEvaluation) -> str:
    table = most_wrong(evaluation, NUM_WORST)
    if table.empty:
        return ""
    rows = []
    for record in table.to_dict("records"):
        uid, diameter = str(record["series_uid"]), float(record["diameter_mm"])
        series = f'<td data-v="{escape(uid)}" title="{escape(uid)}">{escape(short_uid(uid))}</td>'
        own, called = float(record["own_probability"]), float(record["probability"])
        rows.append(
            [td(int(record["candidate_id"])), series, td(str(record[evaluation.label])), td(str(record["called"])),
             td(called, f"{called:.3g}"), td(own, f"{own:.3g}"), td(diameter, figure_text(diameter, 1))]
        )  # fmt: skip
    head = ["candidate", "series", "is", "called", "probability", "of its own class", "diameter, mm"]
    body = html_table(head, rows)
    return f'<section><details class="panel"><summary>Table: {escape(WRONG)}</summary>{body}</details></section>'
