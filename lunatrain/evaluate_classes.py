"""All figures of a result with several classes: one object, for JSON, the terminal and the report.

Beside `lunatrain.evaluate`, which is for true-or-false labels. A crop is called the class of its highest probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep.schema import SUBTYPE_NAMES
from lunatrain.class_metrics import OF_CLASS, ClassMetrics, Intervals, bootstrap_intervals, class_metrics
from lunatrain.errors import UsageError
from lunatrain.evaluate import WIDTH, figure_text, note_lines, percent
from lunatrain.labelled import class_labels
from lunatrain.marks import MARK_COLUMNS
from lunatrain.metrics import RocCurve, rank_scores, roc_curve, without_nan

FEW = 10
"""Crops of a class below which its figures are said to be guesses."""


@dataclass(frozen=True, eq=False)
class ClassEvaluation:
    """Result of a classifier of several classes.

    Attributes
    ----------
    label : str
        Column of the manifest that was to be predicted.
    classes : tuple of str
        Its values, in the order of the columns of `probability`.
    rows : DataFrame
        The crops' manifest rows.
    probability : ndarray, (n, classes)
    metrics : ClassMetrics
    rocs : tuple of RocCurve
        Of each class against all others.
    intervals : Intervals or None
        Where they were asked for.
    notes : tuple of str
        What a reader of the figures must know, a line each.
    """

    label: str
    classes: tuple[str, ...]
    rows: pd.DataFrame
    probability: npt.NDArray[np.float64]
    metrics: ClassMetrics
    rocs: tuple[RocCurve, ...]
    intervals: Intervals | None
    notes: tuple[str, ...]

    @property
    def called(self) -> npt.NDArray[np.int64]:
        """Class each crop is called, (n,)."""
        return np.asarray(self.probability.argmax(axis=1), dtype=np.int64)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class each crop is of, (n,)."""
        return class_labels(self.rows[self.label], self.classes)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Crops of each class, (classes,)."""
        return np.asarray(self.metrics.confusion.sum(axis=1))

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """Intervals by the name of their figure, where they were asked for."""
        return vars(self.intervals) if self.intervals is not None else {}

    @property
    def majority(self) -> tuple[str, float]:
        """The commonest class, and the accuracy of calling every crop so."""
        most = int(self.counts.argmax())
        return self.classes[most], float(self.counts[most] / self.counts.sum())

    @property
    def majority_sentence(self) -> str:
        """The mark that percent correct has to be held against, in words."""
        name, share = self.majority
        present = int((self.counts > 0).sum())
        return f"Calling every crop '{name}' is {percent(share)} correct, and balanced {percent(1 / present)}"

    def to_json(self) -> dict[str, Any]:
        """Flat object of figures; what is undefined is None."""
        figures = self.metrics.figures(self.classes)
        for name, (low, high) in self.spans.items():
            figures |= {f"{name}_low": low, f"{name}_high": high}
        name, share = self.majority
        return without_nan(
            {
                "label": self.label,
                "classes": list(self.classes),
                "num_crops": len(self.rows),
                "num_series": int(self.rows["series_uid"].nunique()),
                "num_patients": int(patients_of(self.rows).nunique()),
                **figures,
                **{f"num_{name}": int(count) for name, count in zip(self.classes, self.counts, strict=True)},
                "majority_class": name,
                "majority_accuracy": share,
                "confusion": self.metrics.confusion.tolist(),
                "notes": list(self.notes),
            }
        )

    def text(self) -> str:
        """Summary for a terminal, at most 90 columns wide for classes with short names."""
        return "\n".join(chain(_heading(self), _table(self), _confusion(self), note_lines(self.notes)))


def evaluate_classes(
    manifest_rows: pd.DataFrame,
    probability: npt.ArrayLike,
    classes: Sequence[str],
    *,
    label: str = "subtype",
    num_bootstrap: int = 0,
    notes: Sequence[str] = (),
) -> ClassEvaluation:
    """All figures of a result.

    Parameters
    ----------
    manifest_rows : DataFrame
        Rows of crops.parquet: the crops that were judged, each of one of the classes.
    probability : array_like, (n, classes)
        Of each class.
    classes : sequence of str
        Values of the label.
    label : str
        What was to be predicted.
    num_bootstrap : int
        Draws of patients for the intervals; 0 for none.
    notes : sequence of str
        What is known of the rows already.

    Raises
    ------
    UsageError
        No rows, a row that is of none of the classes, or probabilities that are not n times `classes` numbers.
    """
    if manifest_rows.empty:
        message = "there are no crops to evaluate. Take another part or split of the store"
        raise UsageError(message)
    labels = class_labels(manifest_rows[label], classes)
    values = np.asarray(probability, dtype=np.float64)
    metrics = class_metrics(labels, values)
    counts = metrics.confusion.sum(axis=1)
    said = [f"no crop is {name!r}: its figures are unknown, and the means are over the others"
            for name, count in zip(classes, counts, strict=True) if not count]  # fmt: skip
    few = [f"{count} {name!r}" for name, count in zip(classes, counts, strict=True) if 0 < count < FEW]
    if few:
        said.append(f"only {', '.join(few)}: figures of so few crops are guesses")
    groups = patients_of(manifest_rows)
    return ClassEvaluation(
        label,
        tuple(classes),
        manifest_rows,
        values,
        metrics,
        tuple(roc_curve(rank_scores(labels == k, values[:, k])) for k in range(len(classes))),
        bootstrap_intervals(labels, values, groups.to_numpy(), num_bootstrap) if num_bootstrap else None,
        (*notes, *said),
    )


def class_title(name: str) -> str:
    """A class with what its letter stands for.

    >>> class_title("A"), class_title("other")
    ('A, adenocarcinoma', 'other')
    """
    return f"{name}, {SUBTYPE_NAMES[name]}" if name in SUBTYPE_NAMES else name


def patients_of(rows: pd.DataFrame) -> "pd.Series[str]":
    """Patient of each row; where unknown its series stands for one."""
    return rows["patient_id"].fillna(rows["series_uid"]).astype(str)


def class_predictions(result: ClassEvaluation) -> pd.DataFrame:
    """Each crop's place (world, mm, LPS), its label, what it is called, and a probability for each class."""
    ours = {column: name for name, column in MARK_COLUMNS.items()}
    table = result.rows[["candidate_id", *ours]].rename(columns=ours).reset_index(drop=True)
    names = np.asarray(result.classes, dtype=object)
    table = table.assign(**{result.label: names[result.labels], "called": names[result.called]})
    columns = {f"probability_{name}": result.probability[:, k] for k, name in enumerate(result.classes)}
    return table.assign(**columns)


def most_wrong(result: ClassEvaluation, num: int) -> pd.DataFrame:
    """Crops called wrong, those whose own class got the least probability first.

    Returns
    -------
    DataFrame
        Rows of the manifest with their index, and `called`, `probability` (of what they are called) and
        `own_probability`.
    """
    labels, called = result.labels, result.called
    at = np.arange(len(labels))
    names = np.asarray(result.classes, dtype=object)
    table = result.rows.assign(
        called=names[called],
        probability=result.probability[at, called],
        own_probability=result.probability[at, labels],
    )
    table = table.sort_values(["own_probability", "candidate_id"], kind="stable")
    wrong: pd.DataFrame = table[table["called"] != table[result.label]].head(num)
    return wrong


def _span(result: ClassEvaluation, name: str) -> str:
    return " ({} to {})".format(*map(figure_text, result.spans[name])) if name in result.spans else ""


def _heading(result: ClassEvaluation) -> list[str]:
    metrics = result.metrics
    patients = patients_of(result.rows).nunique()
    right = int(metrics.confusion.diagonal().sum())
    return [
        f"{len(result.rows):,} crops of {patients:,} patients, {len(result.classes)} classes of {result.label}",
        "",
        f"{'macro AUC':<20}{figure_text(metrics.macro_auc, 4):>8}{_span(result, 'macro_auc')}",
        f"{'balanced accuracy':<20}{figure_text(metrics.balanced_accuracy, 4):>8}{_span(result, 'balanced_accuracy')}",
        f"{'macro F1':<20}{figure_text(metrics.macro_f1, 4):>8}",
        f"{'log loss':<20}{figure_text(metrics.log_loss, 4):>8}",
        f"{'correct':<20}{percent(metrics.accuracy):>8}: {right:,} of {len(result.rows):,}",
        f"{'':<20}{result.majority_sentence}",
        "",
    ]


def _table(result: ClassEvaluation) -> list[str]:
    titles = [class_title(name) for name in result.classes]
    wide = max(len(title) for title in titles) + 2
    lines = [f"{'class':<{wide}}{'crops':>8}{'AUC':>11}{'recall':>11}{'precision':>11}{'F1':>11}"]
    for k, title in enumerate(titles):
        values = "".join(f"{figure_text(float(getattr(result.metrics, what)[k])):>11}" for what in OF_CLASS)
        lines.append(f"{title:<{wide}}{result.counts[k]:>8,}{values}")
    return lines


def _confusion(result: ClassEvaluation) -> list[str]:
    names = result.classes
    wide = max(8, *(len(name) + 2 for name in names))
    lines = ["", "is \\ called".ljust(wide + 4) + "".join(f"{name:>{wide}}" for name in names)]
    if len(lines[1]) > WIDTH:
        return []
    for name, row in zip(names, result.metrics.confusion, strict=True):
        lines.append(name.ljust(wide + 4) + "".join(f"{count:>{wide},}" for count in row))
    return lines
