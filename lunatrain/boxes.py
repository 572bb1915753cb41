"""Boxes in pictures: (x0, y0, x1, y1) fractions of columns and rows, from edge to edge; and how well they fit."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NUM_DIRECTIONS = 64
"""Directions in which an outline is known: between two of them a round lung's edge is off by 0.03 % of its width."""
GOOD_IOU = 0.9

Floats = npt.NDArray[np.float64]


def iou(boxes: npt.ArrayLike, others: npt.ArrayLike) -> Floats:
    """Intersection over union of pairs of boxes.

    Parameters
    ----------
    boxes, others : array_like, (n, 4)
        x0, y0, x1, y1.

    Returns
    -------
    ndarray, (n,) float64
        1 for equal boxes, 0 for such that share nothing.

    >>> iou([[0, 0, 0.5, 1]], [[0.25, 0, 1, 1]]).tolist()
    [0.25]
    """
    a, b = np.asarray(boxes, dtype=np.float64), np.asarray(others, dtype=np.float64)
    shared = _area(np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:]))
    whole = _area(a[:, :2], a[:, 2:]) + _area(b[:, :2], b[:, 2:]) - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def iou_figures(found: npt.ArrayLike, true: npt.ArrayLike) -> dict[str, float]:
    """How well boxes fit: mean and 5th percentile of the IoU, the share of `GOOD_IOU` or more."""
    values = iou(found, true)
    return {
        "iou": float(values.mean()),
        "iou_p5": float(np.quantile(values, 0.05)),
        "share_iou_90": float((values >= GOOD_IOU).mean()),
    }


def outline_of(mask: npt.NDArray[np.bool_]) -> Floats:
    """Points of a mask that are its farthest, one in each of `NUM_DIRECTIONS` directions.

    A box around them is the mask's box; and an affine map moves them as it moves the mask, so that the box around the
    moved points is the one around the moved mask (that of a moved box would be too large where the map turns).

    Parameters
    ----------
    mask : ndarray, (R, C) bool
        Not empty.

    Returns
    -------
    ndarray, (NUM_DIRECTIONS, 2)
        x and y, fractions of columns and rows; corners of pixels.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    held = mask[rows]
    first, last = held.argmax(axis=1), mask.shape[1] - held[:, ::-1].argmax(axis=1)
    x = np.concatenate([first, first, last, last]) / mask.shape[1]
    y = np.concatenate([rows, rows + 1, rows, rows + 1]) / mask.shape[0]
    corners = np.stack([x, y], axis=1)
    angles = 2 * np.pi * np.arange(NUM_DIRECTIONS) / NUM_DIRECTIONS
    farthest = (corners @ np.stack([np.cos(angles), np.sin(angles)])).argmax(axis=0)
    return np.asarray(corners[farthest])


def corners_of(boxes: npt.ArrayLike) -> Floats:
    """Outlines of boxes (n, 4) of which nothing else is known: their corners, (n, 4, 2)."""
    return np.asarray(boxes, dtype=np.float64)[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]


def around(outlines: npt.NDArray[np.floating]) -> Floats:
    """Boxes around outlines (n, k, 2), as far as they lie in the picture, (n, 4)."""
    return np.concatenate([outlines.min(axis=1), outlines.max(axis=1)], axis=1).clip(0, 1).astype(np.float64)


def mean_of(boxes: Sequence[npt.ArrayLike]) -> Floats:
    """Mean of several networks' boxes (n, 4) of the same pictures: their opinion as an ensemble."""
    return np.asarray(np.mean([np.asarray(item, dtype=np.float64) for item in boxes], axis=0))


def _area(low: Floats, high: Floats) -> Floats:
    return np.asarray((high - low).clip(min=0).prod(axis=1))
