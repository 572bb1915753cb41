"""All figures of a classifier's result on crops of a store: one object, for JSON, the terminal and the report.

Shares are 0 to 1; what the crops cannot give (a class is empty) is NaN, and null in JSON. A crop counts as called
positive where its probability is at or above the threshold.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunatrain.errors import UsageError
from lunatrain.froc import FrocResult, evaluate_froc
from lunatrain.marks import MARK_COLUMNS, UNKNOWN_DIAMETER_MM, XYZ, radius_of, xyz_of
from lunatrain.metrics import (
    BinaryMetrics,
    CalibrationBin,
    DiameterRow,
    PrecisionRecallCurve,
    RocCurve,
    ThresholdRow,
    area_under_roc,
    binary_metrics,
    calibration_table,
    diameter_table,
    precision_recall_curve,
    rank_scores,
    roc_curve,
    threshold_table,
)
from lunatrain.sampling import WHOLE

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

CLASS_NAMES = {"is_nodule": ("nodule", "other"), "is_malignant": ("malignant", "benign")}
"""Of each label the positive class, and the negative one."""

FROM_ANNOTATIONS, FROM_CANDIDATES = "annotations", "candidates"
UPPER_BOUND = (
    "FROC and CPM are an upper bound: nodules without a candidate are unknown here, and are not counted as missed. "
    "Give the annotations for the challenge's score"
)
RATE_NAMES = ("1/8", "1/4", "1/2", "1", "2", "4", "8")
WIDTH = 90
"""Columns of a terminal."""


@dataclass(frozen=True)
class Majority:
    """What calling every crop the larger class gives: the mark that percent correct has to be held against.

    `called` is the larger class, the negative one where they are equal; `accuracy` the share that is right, with
    `positives_found` of the positives; `sentence` says it in words.
    """

    called: str
    accuracy: float
    positives_found: int
    sentence: str


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of a classifier.

    Attributes
    ----------
    label : str
        Column of the manifest that was to be predicted.
    rows : DataFrame
        Their manifest rows.
    probability : ndarray, (n,)
        Of the positive class.
    binary : BinaryMetrics
        Figures at the threshold, and those without one.
    by_diameter, by_threshold, calibration : tuple
        Tables; in the first, positives by the diameter of their nodule.
    roc, precision_recall : RocCurve, PrecisionRecallCurve
    diameter_auc : float
        AUC of the nodule's diameter alone as score, for `is_malignant`; else NaN.
    froc : FrocResult or None
        For `is_nodule`, where the crops are whole scans'.
    froc_from : str or None
        'annotations', or 'candidates': an upper bound.
    notes : tuple of str
        What a reader of the figures must know, a line each.
    """

    label: str
    rows: pd.DataFrame
    probability: Floats
    binary: BinaryMetrics
    majority: Majority
    by_diameter: tuple[DiameterRow, ...]
    by_threshold: tuple[ThresholdRow, ...]
    calibration: tuple[CalibrationBin, ...]
    roc: RocCurve
    precision_recall: PrecisionRecallCurve
    diameter_auc: float
    froc: FrocResult | None
    froc_from: str | None
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, str]:
        """Names of the positive and the negative class."""
        return CLASS_NAMES[self.label]

    @property
    def is_positive(self) -> Bools:
        """Label of each crop, (n,)."""
        return self.rows[self.label].to_numpy(dtype=np.bool_)

    def to_json(self) -> dict[str, Any]:
        """Flat object of figures, tables as lists; what is undefined or without bound is None."""
        positive, negative = self.classes
        binary = asdict(self.binary)
        binary.pop("undefined")
        froc = self.froc.to_json() if self.froc else {"cpm": None, "cpm_low": None, "cpm_high": None}
        froc.pop("warnings", None)
        if "false_positives" in froc:
            froc["froc_false_positives"] = froc.pop("false_positives")
        figures = {
            "label": self.label,
            "num_crops": len(self.rows),
            "num_series": int(self.rows["series_uid"].nunique()),
            **binary,
            f"correct_{positive}": self.binary.correct_positive,
            f"correct_{negative}": self.binary.correct_negative,
            "majority_class": self.majority.called,
            "majority_accuracy": self.majority.accuracy,
            "majority_positives_found": self.majority.positives_found,
            "diameter_auc": self.diameter_auc,
            **froc,
            "froc_from": self.froc_from,
            "by_diameter": [asdict(row) for row in self.by_diameter],
            "by_threshold": [asdict(row) for row in self.by_threshold],
            "calibration": [asdict(row) for row in self.calibration],
            "notes": list(self.notes),
        }
        return {name: _finite(value) for name, value in figures.items()}

    def text(self) -> str:
        """Summary for a terminal, at most 90 columns wide."""
        parts = _heading(self), _figure_lines(self), _froc_lines(self), _size_lines(self)
        return "\n".join(chain(*parts, note_lines(self.notes)))


def evaluate(  # noqa: PLR0913
    manifest_rows: pd.DataFrame,
    probability: npt.ArrayLike,
    *,
    label: str = "is_nodule",
    threshold: float = 0.5,
    annotations: pd.DataFrame | None = None,
    excluded: pd.DataFrame | None = None,
    series_uids: Sequence[str] | None = None,
    num_bootstrap: int = 0,
    with_froc: bool = True,
) -> Evaluation:
    """All figures of a result.

    Parameters
    ----------
    manifest_rows : DataFrame
        Rows of crops.parquet: the crops that were judged.
    probability : array_like, (n,)
        Of the positive class, 0 to 1.
    label : {'is_nodule', 'is_malignant'}
        What was to be predicted; known in each row.
    threshold : float
        From which probability on a crop counts as called positive.
    annotations : DataFrame, optional
        The nodules, as `marks.read_annotations` gives them, for FROC by the challenge's rules. Without them the
        nodules are those that have candidates, so that CPM is an upper bound.
    excluded : DataFrame, optional
        Findings that count neither way; without them marks on these are false positives.
    series_uids : sequence of str, optional
        The scans that were searched, also those without a candidate; default those of the rows.
    num_bootstrap : int
        Draws of scans for the interval of FROC and CPM; 0 for none.
    with_froc : bool
        False where the crops are not all of their scans': then false positives a scan mean nothing.

    Raises
    ------
    UsageError
        No rows, an unknown label, a row whose label is not known, probabilities that are not n numbers from 0 to 1.
    """
    positive = _labels(manifest_rows, label)
    values = np.asarray(probability, dtype=np.float64)
    diameters = manifest_rows["diameter_mm"].to_numpy(dtype=np.float64)
    ranking = rank_scores(positive, values)
    binary = binary_metrics(positive, probability, threshold)
    notes = [
        f"{reason}, so there is no {', '.join(name for name, why in binary.undefined.items() if why == reason)}"
        for reason in dict.fromkeys(binary.undefined.values())
    ]
    froc = source = None
    if label == "is_nodule" and with_froc:
        source = FROM_CANDIDATES if annotations is None else FROM_ANNOTATIONS
        froc, more = _froc(manifest_rows, values, (annotations, excluded), series_uids, num_bootstrap)
        notes += more
    known = np.isfinite(diameters)
    is_sized = label == "is_malignant" and bool(known.any())
    if is_sized and not known.all():
        notes.append(f"diameter alone is judged on the {known.sum():,} of {len(known):,} crops that have one")
    return Evaluation(
        label,
        manifest_rows,
        values,
        binary,
        _majority(binary, *CLASS_NAMES[label]),
        diameter_table(positive, values, diameters, threshold),
        threshold_table(ranking),
        calibration_table(positive, values),
        roc_curve(ranking),
        precision_recall_curve(ranking),
        area_under_roc(rank_scores(positive[known], diameters[known])) if is_sized else math.nan,
        froc,
        source,
        tuple(notes),
    )


def predictions_csv(rows: pd.DataFrame, probability: npt.ArrayLike) -> pd.DataFrame:
    """A submission to LUNA16: `seriesuid`, `coordX`, `coordY`, `coordZ` (mm, LPS) and `probability`, in row order."""
    ours = {column: name for name, column in MARK_COLUMNS.items()}
    table = rows[list(ours)].rename(columns=ours).reset_index(drop=True)
    return table.assign(probability=np.asarray(probability, dtype=np.float64))


def worst_rows(
    rows: pd.DataFrame, probability: npt.ArrayLike, num: int, label: str = "is_nodule"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The negatives with the highest probability, and the positives with the lowest: at most `num` each, worst first.

    Returns
    -------
    negatives, positives : DataFrame
        Rows of the manifest with their index, and `probability`.
    """
    table = rows.assign(probability=np.asarray(probability, dtype=np.float64))
    positive = _labels(rows, label)
    by = ["probability", "candidate_id"]
    negatives = table[~positive].sort_values(by, ascending=[False, True], kind="stable")
    return negatives.head(num), table[positive].sort_values(by, kind="stable").head(num)


def percent(share: float) -> str:
    """Percentage that is 100 or 0 only where the share is.

    >>> percent(0.9974), percent(0.99996), percent(1.0)
    ('99.7 %', '99.996 %', '100.0 %')
    """
    if math.isnan(share):
        return "–"
    for digits in (1, 2, 3, 4, 5):
        text = f"{100 * share:.{digits}f}"
        if (float(text) in (0.0, 100.0)) == (share in (0.0, 1.0)):
            return f"{text} %"
    return ">99.99999 %" if share > 0.5 else "<0.00001 %"


def figure_text(value: float, digits: int = 3) -> str:
    """A share with some digits; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def note_lines(notes: Iterable[str]) -> list[str]:
    """Notes for a terminal below an empty line; nothing where there are none."""
    style: dict[str, Any] = {"subsequent_indent": " " * 6, "break_long_words": False, "break_on_hyphens": False}
    lines = [line for note in notes for line in textwrap.wrap(f"note: {note}", WIDTH, **style)]
    return ["", *lines] if lines else []


def found_at(threshold: float) -> str:
    """Head of a column that counts the positives from a threshold on.

    >>> found_at(0.5)
    'found at 0.5'
    """
    return f"found at {threshold:g}"


def learnt_notes(trained: str, split: str, part: str) -> tuple[str, ...]:
    """What to say where crops that are judged may have been learnt: a note, or none.

    Parameters
    ----------
    trained, split : str
        What the run was trained on, and what it is judged on, see `lunatrain.sampling.select_rows`.
    part : str
        Of `split`, what is judged.

    >>> learnt_notes("series", "series", "val")
    ()
    """
    is_held_out = split == trained != WHOLE and part == "val"
    note = f"the run was trained on split {trained}: crops judged here may be among those it learnt"
    return () if is_held_out else (note,)


def _labels(rows: pd.DataFrame, label: str) -> Bools:
    if label not in CLASS_NAMES:
        message = f"label is {label!r}, expected {' or '.join(CLASS_NAMES)}"
        raise UsageError(message)
    if rows.empty:
        message = "there are no crops to evaluate. Take another part or split of the store"
        raise UsageError(message)
    unknown = int(rows[label].isna().sum())
    if unknown:
        message = f"{unknown} of {len(rows)} crops have no {label}. Select rows where it is known"
        raise UsageError(message)
    return rows[label].to_numpy(dtype=np.bool_)


def _majority(binary: BinaryMetrics, positive: str, negative: str) -> Majority:
    num_positive, num_negative = binary.num_positive, binary.num_negative
    is_negative = num_negative >= num_positive
    called = negative if is_negative else positive
    accuracy = max(num_positive, num_negative) / (num_positive + num_negative)
    what = f"finds 0 of {num_positive:,} {positive}" if is_negative else f"clears 0 of {num_negative:,} {negative}"
    sentence = f"Calling every crop '{called}' is {percent(accuracy)} correct and {what} crops"
    return Majority(called, accuracy, 0 if is_negative else num_positive, sentence)


def _froc(
    rows: pd.DataFrame,
    probability: Floats,
    findings: tuple[pd.DataFrame | None, pd.DataFrame | None],
    series_uids: Sequence[str] | None,
    num_bootstrap: int,
) -> tuple[FrocResult, list[str]]:
    """FROC by the challenge's rules, and what there is to say about it."""
    annotations, excluded = findings
    notes: list[str] = []
    marks = rows[["series_uid", *XYZ]].assign(probability=probability).reset_index(drop=True)
    scans = tuple(sorted(rows["series_uid"].unique()) if series_uids is None else series_uids)
    if annotations is None:
        annotations, marks, notes = _nodules_of_candidates(rows, marks)
    if excluded is None:
        notes.append("no excluded findings were given: marks on them count as false positives")
    if series_uids is None:
        notes.append("the scans are those that have crops here; a scan without a candidate is not counted")
    nodules = annotations[annotations["series_uid"].isin(scans)]
    if nodules.empty and rows["is_nodule"].any():
        nodules = annotations  # ids that match nothing: evaluate_froc says how they differ
    result = evaluate_froc(marks, nodules, excluded, scans, num_bootstrap)
    return result, [*notes, *result.warnings]


def _nodules_of_candidates(rows: pd.DataFrame, marks: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The nodules that have candidates, each at the mean of these; the marks; notes.

    A candidate of a nodule is a hit by what it is: one that lies too far off the mean is moved there.
    """
    positive, is_known = rows["is_nodule"].to_numpy(dtype=np.bool_), rows["annotation_id"].notna().to_numpy()
    at = np.flatnonzero(positive & is_known)
    keys = ["series_uid", "annotation_id"]
    groups = rows.iloc[at].groupby(keys)
    nodules = groups.agg(**{name: (name, "mean") for name in XYZ}, diameter_mm=("diameter_mm", "first")).reset_index()
    nodules["diameter_mm"] = nodules["diameter_mm"].astype(np.float64).fillna(-UNKNOWN_DIAMETER_MM)
    own = rows.iloc[at][keys].merge(nodules, on=keys, how="left")
    xyz = xyz_of(marks).copy()
    is_off = np.linalg.norm(xyz[at] - xyz_of(own), axis=1) >= radius_of(own)
    xyz[at[is_off]] = xyz_of(own)[is_off]
    homeless = positive & ~is_known
    left_out = [f"{homeless.sum():,} nodule crops of no known nodule are left out of FROC"] if homeless.any() else []
    return nodules, marks.assign(**dict(zip(XYZ, xyz.T, strict=True)))[~homeless], [UPPER_BOUND, *left_out]


def _finite(value: Any) -> Any:
    """The same with None for what JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _heading(result: Evaluation) -> list[str]:
    binary, (positive, negative) = result.binary, result.classes
    total = binary.num_positive + binary.num_negative
    return [
        f"{total:,} crops of {result.rows['series_uid'].nunique():,} series: {binary.num_positive:,} {positive}, "
        f"{binary.num_negative:,} {negative}; threshold {binary.threshold:g}",
        "",
    ]


def _figure_lines(result: Evaluation) -> list[str]:
    binary, (positive, negative) = result.binary, result.classes
    cells = [
        ("AUC", binary.auc), ("average precision", binary.average_precision),
        ("precision", binary.precision), ("recall", binary.recall),
        ("F1", binary.f1), (f"best F1 (at {figure_text(binary.best_f1_threshold)})", binary.best_f1),
        ("log loss", binary.log_loss), ("Brier score", binary.brier),
    ]  # fmt: skip
    texts = [f"{name:<24}{figure_text(value, 4):>8}" for name, value in cells]
    if result.label == "is_malignant":
        texts.append(f"{'AUC of diameter alone':<24}{figure_text(result.diameter_auc, 4):>8}")
    lines = ["     ".join(texts[k : k + 2]) for k in range(0, len(texts), 2)]
    found, cleared = binary.true_positives, binary.true_negatives
    return [
        *lines,
        "",
        f"correct  {percent(binary.accuracy)}: {found:,} of {binary.num_positive:,} {positive} "
        f"({percent(binary.correct_positive)}), {cleared:,} of {binary.num_negative:,} {negative} "
        f"({percent(binary.correct_negative)})",
        f"         {result.majority.sentence}",
    ]


def _froc_lines(result: Evaluation) -> list[str]:
    if result.froc is None:
        return []
    froc, ci = result.froc, result.froc.ci
    bound = ", upper bound" if result.froc_from == FROM_CANDIDATES else ""
    span = f" ({figure_text(ci.cpm_low)} to {figure_text(ci.cpm_high)})" if ci else ""
    return [
        "",
        f"CPM {figure_text(froc.cpm, 4)}{span}{bound}: {froc.counts.num_scans:,} scans, "
        f"{froc.counts.num_nodules:,} nodules, {froc.counts.nodules_missed:,} never marked",
        f"{'FP per scan':<12}" + "".join(f"{name:>8}" for name in RATE_NAMES),
        f"{'sensitivity':<12}" + "".join(f"{figure_text(float(value)):>8}" for value in froc.at_rates),
    ]


def _size_lines(result: Evaluation) -> list[str]:
    rows = [row for row in result.by_diameter if row.num_positive]
    if not rows:
        return []
    lines = [f"{row.label:<12}{row.num_found:>8,} of {row.num_positive:>6,}{percent(row.recall):>10}" for row in rows]
    return ["", f"{'diameter':<12}{found_at(result.binary.threshold):>18}{'recall':>10}", *lines]
