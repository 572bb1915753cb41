"""How well logits fit masks: counted once, asked for at any threshold."""

import math

import numpy as np
import numpy.typing as npt

STEP, LIMIT = 0.1, 12.0
"""Thresholds are multiples of `STEP` between ± `LIMIT`, on the logits: so they are fine also near probability 1."""
NUM_BINS = round(2 * LIMIT / STEP) + 1
HALF = NUM_BINS // 2
"""Bin of probability 0.5."""
BOOK_THRESHOLD = 0.5
FP_LIMITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Falsely marked voxels for each true one, at which `mean_recall` looks."""
FP_TUNED = 2.0
"""The one that the threshold is chosen for."""

Indices = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]


class VoxelScores:
    """Sums over slices.

    Parameters
    ----------
    num_nodules : int
        Nodules that slices may show; they are numbered from 0.
    """

    def __init__(self, num_nodules: int) -> None:
        self._true = np.zeros(NUM_BINS, dtype=np.int64)
        self._false = np.zeros(NUM_BINS, dtype=np.int64)
        self._best = np.full(num_nodules, -1, dtype=np.int64)
        self._dice: list[float] = []

    def add(
        self,
        logits: npt.NDArray[np.float32],
        places: Indices,
        nodules: Indices,
        searched: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Count a slice.

        Parameters
        ----------
        logits : ndarray, (R, C) float32
            Before the sigmoid.
        places : ndarray, (v,) int64
            Pixels of the mask, as indices into the flattened slice.
        nodules : ndarray, (v,) int64
            Number of the nodule that each belongs to.
        searched : ndarray, (R, C) bool, optional
            Where marks count: the lungs. Pixels of the mask count anyway. Default everywhere.
        """
        bins = ((logits.reshape(-1) + LIMIT) / STEP + 1e-3).clip(0, NUM_BINS - 1).astype(np.int64)
        inside = bins[places]
        true = np.bincount(inside, minlength=NUM_BINS)
        counts_here = np.ones(len(bins), dtype=np.bool_) if searched is None else searched.reshape(-1).copy()
        counts_here[places] = False
        false = np.bincount(bins[counts_here], minlength=NUM_BINS)
        self._true += true
        self._false += false
        np.maximum.at(self._best, nodules, inside)
        if len(places):
            hit = int(true[HALF:].sum())
            self._dice.append(2 * hit / (hit + int(false[HALF:].sum()) + len(places)))

    def figures(self) -> dict[str, float]:
        """Figures at the book's threshold, and at the tuned one.

        Returns
        -------
        dict of float
            precision, recall, f1 of voxels, fp_ratio (falsely marked voxels for each true one) and dice (mean over
            slices that show a nodule), at 0.5. mean_recall: mean of the greatest recalls with an fp_ratio of at most
            each of `FP_LIMITS`. threshold: the highest probability with the greatest recall whose fp_ratio is at most
            `FP_TUNED` (0.5 where that is no voxel); recall_tuned and nodules_touched (share of nodules with a voxel
            marked) belong to it. NaN where there is nothing to count.
        """
        true, false = (np.cumsum(counts[::-1])[::-1] for counts in (self._true, self._false))
        num_true = int(true[0])
        hit, wrong = int(true[HALF]), int(false[HALF])
        at = _best_within(true, false, FP_TUNED)
        tuned = HALF if at is None else at
        found = [_best_within(true, false, limit) for limit in FP_LIMITS]
        recalls = [_ratio(0 if k is None else int(true[k]), num_true) for k in found]
        return {
            "precision": _ratio(hit, hit + wrong),
            "recall": _ratio(hit, num_true),
            "f1": _ratio(2 * hit, hit + wrong + num_true),
            "fp_ratio": _ratio(wrong, num_true),
            "dice": float(np.mean(self._dice)) if self._dice else float("nan"),
            "mean_recall": float(np.mean(recalls)),
            "threshold": 1 / (1 + math.exp(LIMIT - tuned * STEP)),
            "recall_tuned": _ratio(int(true[tuned]), num_true),
            "nodules_touched": _ratio(int((self._best >= tuned).sum()), len(self._best)),
        }


def _best_within(true: Counts, false: Counts, limit: float) -> int | None:
    """The highest bin with the greatest recall whose falsely marked voxels are within the limit."""
    allowed = np.flatnonzero(false <= limit * true[0])
    if not len(allowed) or not true[allowed[0]]:
        return None
    return int(allowed[true[allowed] == true[allowed[0]]].max())


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
