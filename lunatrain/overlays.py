"""Predictions drawn over their images: green right, red wrongly marked, orange missed."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RIGHT, WRONG, MISSED = (60, 190, 80), (220, 40, 50), (255, 150, 0)
STRENGTH = 0.6
"""Share of the colour over the image."""
LUNG_WINDOW = (-1350.0, 150.0)
"""HU shown black and white: level -600, width 1500."""

Image = npt.NDArray[np.uint8]


def grey(hu: npt.NDArray[np.floating]) -> Image:
    """A slice in the lung window, (R, C, 3) uint8."""
    low, high = LUNG_WINDOW
    level = ((hu - low) / (high - low)).clip(0, 1) * 255
    return np.repeat(level.round().astype(np.uint8)[..., None], 3, axis=-1)


def overlay(image: Image, true: npt.NDArray[np.bool_], called: npt.NDArray[np.bool_]) -> Image:
    """Colour the pixels of a mask and of its prediction.

    Parameters
    ----------
    image : ndarray, (R, C, 3) uint8
        Not changed.
    true, called : ndarray, (R, C) bool
        The mask, and what was marked.
    """
    out = image.astype(np.float32)
    for where, colour in ((true & called, RIGHT), (~true & called, WRONG), (true & ~called, MISSED)):
        out[where] = (1 - STRENGTH) * out[where] + STRENGTH * np.asarray(colour, dtype=np.float32)
    return out.round().astype(np.uint8)


def frame(image: Image, box: Sequence[float], colour: tuple[int, int, int], width: int = 2) -> Image:
    """Draw a box (x0, y0, x1, y1, fractions of the columns and rows) on an image (R, C, 3) uint8, not changed."""
    out = image.copy()
    rows, cols = image.shape[:2]
    x0, y0, x1, y1 = (round(share * side) for share, side in zip(box, (cols, rows, cols, rows), strict=True))
    out[max(0, y0) : y1, max(0, x0) : x1] = colour
    inner = (slice(max(0, y0) + width, max(0, y1 - width)), slice(max(0, x0) + width, max(0, x1 - width)))
    out[inner] = image[inner]
    return out


def tile(images: Sequence[Image], columns: int = 3, gap: int = 4) -> Image:
    """Put images in rows, on black; smaller ones in the corner of their place."""
    height, width = (max(image.shape[k] for image in images) + gap for k in (0, 1))
    num_rows, columns = -(-len(images) // columns), min(columns, len(images))
    out = np.zeros((num_rows * height - gap, columns * width - gap, 3), dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * height, k % columns * width
        out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out
