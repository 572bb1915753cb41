"""Figures for scores against labels, by counting in numpy.

One sort serves everything that depends on the order of the scores (`rank_scores`). A sample counts as called
positive where its score is at or above the threshold, everywhere: in the counts, the curves and the tables.
A figure that the samples cannot give (a class is empty) is NaN, and `BinaryMetrics.undefined` says why.
All functions that take labels raise `UsageError` for labels that are not bool or 0 and 1, for a NaN among the
scores, and for lengths that differ.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lunatrain.errors import UsageError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

DIAMETER_EDGES_MM = (3.0, 5.0, 8.0, 10.0, 15.0, 20.0, 30.0)
"""Lower ends of the size classes of `diameter_table`; the last has no upper end."""

THRESHOLDS = tuple((np.arange(1, 20) / 20).tolist())


@dataclass(frozen=True, eq=False)
class Ranking:
    """Samples at or above each distinct score, from the highest score down.

    Attributes
    ----------
    thresholds : ndarray, (p,)
        The distinct scores, descending.
    true_positives, false_positives : ndarray, (p,) int64
        Positives and negatives with a score at or above the threshold.
    num_positive, num_negative : int
        All there are.
    """

    thresholds: Floats
    true_positives: Ints
    false_positives: Ints
    num_positive: int
    num_negative: int

    def called_at(self, threshold: float) -> tuple[int, int]:
        """True and false positives at any threshold."""
        reached = int(np.searchsorted(-self.thresholds, -threshold, side="right"))
        return (int(self.true_positives[reached - 1]), int(self.false_positives[reached - 1])) if reached else (0, 0)


@dataclass(frozen=True, eq=False)
class RocCurve:
    """Corners of a ROC curve, from (0, 0) at threshold infinity; NaN rates where a class is empty."""

    false_positive_rate: Floats
    true_positive_rate: Floats
    thresholds: Floats


@dataclass(frozen=True, eq=False)
class PrecisionRecallCurve:
    """Precision and recall at rising thresholds, then (1, 0), which has no threshold."""

    precision: Floats
    recall: Floats
    thresholds: Floats


@dataclass(frozen=True)
class BinaryMetrics:
    """Figures of a two-class result; shares from 0 to 1, NaN where `undefined` says why.

    `correct_positive` and `correct_negative` are the shares of each class called right; `best_f1_threshold` is
    the highest threshold that reaches `best_f1`.
    """

    num_positive: int
    num_negative: int
    threshold: float
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    correct_positive: float
    correct_negative: float
    accuracy: float
    precision: float
    recall: float
    f1: float
    auc: float
    average_precision: float
    log_loss: float
    brier: float
    best_f1: float
    best_f1_threshold: float
    undefined: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Flat object of figures; what is undefined is None."""
        return without_nan(asdict(self))


@dataclass(frozen=True)
class CalibrationBin:
    """Samples with ``low < probability <= high`` (the first bin takes 0 too)."""

    low: float
    high: float
    num_samples: int
    mean_probability: float
    share_positive: float


@dataclass(frozen=True)
class ThresholdRow:
    """Figures at one threshold."""

    threshold: float
    true_positives: int
    false_positives: int
    precision: float
    recall: float
    specificity: float
    f1: float


@dataclass(frozen=True)
class DiameterRow:
    """Positives of one size class, ``low_mm <= diameter < high_mm`` (both NaN: no diameter known)."""

    label: str
    low_mm: float
    high_mm: float
    num_positive: int
    num_found: int
    recall: float


def rank_scores(is_positive: npt.ArrayLike, scores: npt.ArrayLike) -> Ranking:
    """Sort once, count from the top. Scores, (n,), may be any numbers."""
    positive, values = _checked(is_positive, scores)
    return _rank(positive, values)


def _rank(positive: Bools, values: Floats) -> Ranking:
    order = np.argsort(-values)
    values = values[order]
    # the last sample of each run of equal scores
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]), values.size - 1) if values.size else np.arange(0)
    true_positives = np.cumsum(positive[order], dtype=np.int64)[ends]
    total = int(positive.sum())
    return Ranking(values[ends], true_positives, ends + 1 - true_positives, total, positive.size - total)


def roc_curve(ranking: Ranking, drop_intermediate: bool = True) -> RocCurve:
    """Corners of the ROC curve, as scikit-learn 1.3 and later define them.

    `drop_intermediate` leaves out points midway between their neighbours; the curve stays the same.
    """
    fp, tp, thresholds = ranking.false_positives, ranking.true_positives, ranking.thresholds
    if drop_intermediate and thresholds.size > 2:
        bends = (np.diff(fp, 2) != 0) | (np.diff(tp, 2) != 0)
        kept = np.flatnonzero(np.concatenate([[True], bends, [True]]))
        fp, tp, thresholds = fp[kept], tp[kept], thresholds[kept]
    return RocCurve(
        _shares(np.append(0, fp), ranking.num_negative),
        _shares(np.append(0, tp), ranking.num_positive),
        np.append(np.inf, thresholds),
    )


def precision_recall_curve(ranking: Ranking) -> PrecisionRecallCurve:
    """Precision and recall at every distinct score, as scikit-learn defines them."""
    tp = ranking.true_positives
    precision, recall = tp / (tp + ranking.false_positives), _shares(tp, ranking.num_positive)
    return PrecisionRecallCurve(np.append(precision[::-1], 1.0), np.append(recall[::-1], 0.0), ranking.thresholds[::-1])


def area_under_roc(ranking: Ranking) -> float:
    """Chance that a positive scores above a negative, ties half; exact in integers; NaN where a class is empty."""
    fp, tp = np.append(0, ranking.false_positives), np.append(0, ranking.true_positives)
    doubled = int((np.diff(fp) * (tp[1:] + tp[:-1])).sum())
    return _ratio(doubled, 2 * ranking.num_positive * ranking.num_negative)


def average_precision(ranking: Ranking) -> float:
    """Mean of the precision over the recall it adds, without interpolation; NaN without a positive."""
    tp = ranking.true_positives
    precision = tp / (tp + ranking.false_positives)
    return _ratio(float((np.diff(tp, prepend=0) * precision).sum()), ranking.num_positive)


def binary_metrics(is_positive: npt.ArrayLike, probability: npt.ArrayLike, threshold: float = 0.5) -> BinaryMetrics:
    """All figures of a two-class result.

    Parameters
    ----------
    is_positive : array_like, (n,)
        bool, or 0 and 1.
    probability : array_like, (n,)
        Of being positive. Scores outside 0 to 1 are ranked and counted, but give no log loss and no Brier score.
    threshold : float
        For the counts and what is made of them.
    """
    positive, values = _checked(is_positive, probability)
    ranking = _rank(positive, values)
    tp, fp = ranking.called_at(threshold)
    num_positive, num_negative = ranking.num_positive, ranking.num_negative
    best_f1, best_threshold = _best_f1(ranking)
    log_loss, brier = _probability_losses(positive, values, _smallest_step(probability))
    figures: dict[str, Any] = {
        "correct_positive": _ratio(tp, num_positive),
        "correct_negative": _ratio(num_negative - fp, num_negative),
        "accuracy": _ratio(tp + num_negative - fp, num_positive + num_negative),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, num_positive),
        "f1": _ratio(2 * tp, tp + fp + num_positive),
        "auc": area_under_roc(ranking),
        "average_precision": average_precision(ranking),
        "log_loss": log_loss,
        "brier": brier,
        "best_f1": best_f1,
        "best_f1_threshold": best_threshold,
    }
    reasons = {name: _reason(name, ranking, threshold) for name, value in figures.items() if np.isnan(value)}
    counts = (num_positive, num_negative, float(threshold), tp, fp, num_negative - fp, num_positive - tp)
    return BinaryMetrics(*counts, **figures, undefined=reasons)


def calibration_table(
    is_positive: npt.ArrayLike, probability: npt.ArrayLike, num_bins: int = 10
) -> tuple[CalibrationBin, ...]:
    """How often samples of about the same probability, which must be 0 to 1, are positive; equal bins."""
    positive, values = _checked(is_positive, probability)
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        message = f"probabilities run from {values.min():.6g} to {values.max():.6g}, expected 0 to 1. Give no logits"
        raise UsageError(message)
    edges = np.linspace(0, 1, num_bins + 1).tolist()
    place = np.searchsorted(edges[1:-1], values)
    number = np.bincount(place, minlength=num_bins)
    total = np.bincount(place, weights=values, minlength=num_bins)
    hits = np.bincount(place, weights=positive, minlength=num_bins)
    spans = pairwise(edges)
    return tuple(
        CalibrationBin(*span, int(n), _ratio(sum_, n), _ratio(share, n))
        for span, n, sum_, share in zip(spans, number, total, hits, strict=True)
    )


def threshold_table(ranking: Ranking, thresholds: Sequence[float] = THRESHOLDS) -> tuple[ThresholdRow, ...]:
    """Figures at each of some thresholds."""
    num_positive, num_negative = ranking.num_positive, ranking.num_negative
    rows = []
    for threshold in thresholds:
        tp, fp = ranking.called_at(threshold)
        precision, recall, f1 = _ratio(tp, tp + fp), _ratio(tp, num_positive), _ratio(2 * tp, tp + fp + num_positive)
        specificity = _ratio(num_negative - fp, num_negative)
        rows.append(ThresholdRow(float(threshold), tp, fp, precision, recall, specificity, f1))
    return tuple(rows)


def diameter_table(
    is_positive: npt.ArrayLike, probability: npt.ArrayLike, diameter_mm: npt.ArrayLike, threshold: float = 0.5
) -> tuple[DiameterRow, ...]:
    """Recall by size of the nodule.

    `diameter_mm`, (n,), is NaN where unknown. The classes are those of `DIAMETER_EDGES_MM` and one for unknown
    diameters; before them comes one for smaller nodules, where there are such.
    """
    positive, values = _checked(is_positive, probability)
    diameters = np.asarray(diameter_mm, dtype=np.float64)[positive]
    found = values[positive] >= threshold
    edges = (0.0, *DIAMETER_EDGES_MM, np.inf)
    rows = []
    for low, high in pairwise(edges):
        mask = (diameters >= low) & (diameters < high)
        if low > 0 or mask.any():
            label = f"{low:g}-{high:g} mm" if np.isfinite(high) else f">= {low:g} mm"
            rows.append(_diameter_row(label, low, high, found[mask]))
    unknown = ~(diameters >= 0)
    return (*rows, _diameter_row("unknown", np.nan, np.nan, found[unknown]))


def without_nan(figures: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN by None, which JSON has; in lists too."""

    def clean(value: Any) -> Any:
        return [clean(item) for item in value] if isinstance(value, list) else None if value != value else value

    return {name: clean(value) for name, value in figures.items()}


def _check_lengths(labels: npt.NDArray[Any], scores: npt.NDArray[Any]) -> None:
    if labels.ndim != 1 or labels.shape != scores.shape:
        message = f"labels of shape {labels.shape}, scores of shape {scores.shape}, expected a score for each label"
        raise UsageError(message)


def _checked(is_positive: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Bools, Floats]:
    labels, values = np.asarray(is_positive), np.asarray(scores, dtype=np.float64)
    _check_lengths(labels, values)
    positive = labels.astype(bool)
    if labels.dtype != bool and not np.array_equal(labels, positive):
        wrong = labels[labels != positive][0]
        message = f"label {wrong}, expected 0 or 1. Make the labels bool (label == the positive class)"
        raise UsageError(message)
    if np.isnan(values).any():
        first = int(np.flatnonzero(np.isnan(values))[0])
        message = f"{np.isnan(values).sum()} of {values.size} scores are NaN (the first at {first}), expected numbers"
        raise UsageError(message)
    return positive, values


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _shares(part: npt.NDArray[Any], whole: Any) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(part / np.asarray(whole, dtype=np.float64))


def _smallest_step(scores: npt.ArrayLike) -> float:
    """Spacing at 1 of the type the scores came in; a probability of 0 is taken as so much in the log loss."""
    kind = np.asarray(scores).dtype
    return float(np.finfo(kind if np.issubdtype(kind, np.floating) else np.float64).eps)


def _probability_losses(positive: Bools, values: Floats, step: float) -> tuple[float, float]:
    """Log loss and Brier score; NaN where there is no sample, or scores are no probabilities."""
    if not values.size or not (values.min() >= 0 and values.max() <= 1):
        return float("nan"), float("nan")
    of_truth = np.where(positive, values, 1 - values)
    log_loss = -np.log(np.clip(of_truth, step, 1 - step)).mean()
    return float(log_loss), float(np.square(1 - of_truth).mean())


def _best_f1(ranking: Ranking) -> tuple[float, float]:
    if not ranking.num_positive:
        return float("nan"), float("nan")
    tp = ranking.true_positives
    f1 = 2 * tp / (tp + ranking.false_positives + ranking.num_positive)
    best = int(np.argmax(f1))
    return float(f1[best]), float(ranking.thresholds[best])


def _reason(name: str, ranking: Ranking, threshold: float) -> str:
    """Why a figure is NaN."""
    if not ranking.num_positive + ranking.num_negative:
        return "there are no samples"
    if name in ("log_loss", "brier"):
        return "scores outside 0 to 1 are no probabilities"
    if name == "precision":
        return f"nothing reaches the threshold {threshold:g}"
    if name == "correct_negative" or (name == "auc" and ranking.num_positive):
        return "there are no negatives"
    return "there are no positives"


def _diameter_row(label: str, low: float, high: float, found: Bools) -> DiameterRow:
    return DiameterRow(label, low, high, found.size, int(found.sum()), _ratio(int(found.sum()), found.size))
