"""Figures for the probabilities of several classes against labels, by counting in numpy.

A sample is called the class of its highest probability, the first of equal ones. "Macro" is the mean over the classes
that have the figure, so that a rare class counts as much as a common one. What the samples cannot give is NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lunatrain.errors import UsageError
from lunatrain.metrics import area_under_roc, rank_scores

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MACRO = ("macro_auc", "balanced_accuracy", "accuracy", "macro_f1", "log_loss")
OF_CLASS = ("auc", "recall", "precision", "f1")
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, eq=False)
class ClassMetrics:
    """Figures of a result with several classes.

    Attributes
    ----------
    confusion : ndarray, (num_classes, num_classes) int64
        Samples by label (rows) and by what they were called (columns).
    accuracy, balanced_accuracy : float
        Share called right, of all; and as the mean of `recall`, for which guessing gives 1 / num_classes.
    macro_f1, macro_auc : float
        Means of `f1` and `auc`.
    log_loss : float
        Mean of minus the logarithm of the probability given to the label.
    precision, recall, f1, auc : ndarray, (num_classes,)
        Of each class against all others. Precision is NaN where nothing was called the class, recall and AUC where
        nothing is of it, F1 where neither; AUC also where there is nothing else.
    """

    confusion: Ints
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    macro_auc: float
    log_loss: float
    precision: Floats
    recall: Floats
    f1: Floats
    auc: Floats

    def figures(self, classes: Sequence[str]) -> dict[str, float]:
        """Flat: the means, then the figures of each class by its name."""
        flat = {name: float(getattr(self, name)) for name in MACRO}
        for what in OF_CLASS:
            flat |= {f"{what}_{name}": float(value) for name, value in zip(classes, getattr(self, what), strict=True)}
        return flat


@dataclass(frozen=True)
class Intervals:
    """95 % intervals, low and high, over draws of patients."""

    macro_auc: tuple[float, float]
    balanced_accuracy: tuple[float, float]


def class_metrics(labels: npt.ArrayLike, probability: npt.ArrayLike) -> ClassMetrics:
    """All figures of a result with several classes.

    Parameters
    ----------
    labels : array_like, (n,)
        Class numbers from 0.
    probability : array_like, (n, num_classes)
        Of each class; rows that do not add up to 1 are ranked and counted alike, but give no log loss that means much.

    Raises
    ------
    UsageError
        A label that is no class, a NaN, or lengths that differ.
    """
    truth, scores = _checked(labels, probability)
    num_classes = scores.shape[1]
    called = scores.argmax(axis=1)
    confusion = np.bincount(truth * num_classes + called, minlength=num_classes**2).reshape(num_classes, num_classes)
    right, of_class, called_it = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    auc = np.array([area_under_roc(rank_scores(truth == k, scores[:, k])) for k in range(num_classes)])
    recall, f1 = _shares(right, of_class), _shares(2 * right, of_class + called_it)
    given = scores[np.arange(len(truth)), truth]
    step = np.finfo(np.float64).eps
    return ClassMetrics(
        confusion,
        right.sum() / len(truth) if len(truth) else float("nan"),
        mean_known(recall),
        mean_known(f1),
        mean_known(auc),
        mean_known(-np.log(np.clip(given, step, 1 - step))),
        _shares(right, called_it),
        recall,
        f1,
        auc,
    )


def bootstrap_intervals(
    labels: npt.ArrayLike, probability: npt.ArrayLike, groups: npt.ArrayLike, num_draws: int, seed: int = 0
) -> Intervals:
    """95 % intervals by drawing groups (patients) with replacement, all samples of a group together.

    Parameters
    ----------
    labels, probability : array_like
        As of `class_metrics`.
    groups : array_like, (n,)
        What is drawn: samples of one group say the same thing twice.
    num_draws : int
        Draws. A class that a draw leaves out is left out of its means.
    """
    truth, scores = _checked(labels, probability)
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(numbers == k) for k in range(numbers.max() + 1)]
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(num_draws):
        rows = np.concatenate([members[k] for k in random.integers(len(members), size=len(members))])
        metrics = class_metrics(truth[rows], scores[rows])
        drawn.append((metrics.macro_auc, metrics.balanced_accuracy))
    (auc_low, balanced_low), (auc_high, balanced_high) = np.nanpercentile(np.array(drawn), INTERVAL, axis=0).tolist()
    return Intervals((auc_low, auc_high), (balanced_low, balanced_high))


def mean_known(values: npt.ArrayLike) -> float:
    """Mean of what is not NaN; NaN where all is."""
    numbers = np.asarray(values, dtype=np.float64)
    known = numbers[~np.isnan(numbers)]
    return float(known.mean()) if known.size else float("nan")


def _checked(labels: npt.ArrayLike, probability: npt.ArrayLike) -> tuple[Ints, Floats]:
    truth, scores = np.asarray(labels), np.asarray(probability, dtype=np.float64)
    if truth.ndim != 1 or scores.ndim != 2 or len(truth) != len(scores):
        message = (
            f"labels of shape {truth.shape}, probabilities of shape {scores.shape}, expected (n,) and (n, classes)"
        )
        raise UsageError(message)
    wrong = (truth < 0) | (truth >= scores.shape[1]) | (truth != np.floor(truth))
    if wrong.any():
        message = f"label {truth[wrong][0]} at {np.flatnonzero(wrong)[0]}, expected a class 0 to {scores.shape[1] - 1}"
        raise UsageError(message)
    if np.isnan(scores).any():
        first = int(np.flatnonzero(np.isnan(scores).any(axis=1))[0])
        message = f"probabilities of sample {first} are NaN, expected numbers. Was the network trained to the end?"
        raise UsageError(message)
    return truth.astype(np.int64), scores


def _shares(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(part / whole.astype(np.float64))
