"""Pictures of a localisation run: slices with their true box and the one found, and curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lunatrain.box_slices import BoxSlices
from lunatrain.boxes import Floats, iou
from lunatrain.overlays import Image, frame
from lunatrain.plots import training_png
from lunatrain.sampling import Rows
from lunatrain.segmentation_plots import predictions_png

TRUE, FOUND = (255, 176, 0), (86, 180, 233)
"""Told apart with any colour vision, and from the greys of a slice."""
KEY = (("true box", TRUE), ("found", FOUND))
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)
"""Of the slices' IoU: which are drawn, the worst first."""
DRAWN_SIDE = 384
NAME_END = 24
"""Characters of a slice's name that are shown."""

BOX_PANELS = {
    "loss": ("loss",),
    "IoU, mean": ("iou",),
    "IoU, 5th percentile": ("iou_p5",),
}


def drawn_slices(slices: BoxSlices, rows: Rows, found: Floats, true: Floats) -> tuple[list[Image], list[str]]:
    """Slices with both boxes, from the worst to the best, and what to write over each.

    Parameters
    ----------
    slices : BoxSlices
    rows : ndarray, (n,) int64
        Slices that were judged.
    found, true : ndarray, (n, 4)
        Their boxes.
    """
    values = iou(found, true)
    order = np.argsort(values, kind="stable")
    places = dict.fromkeys(order[np.rint(np.asarray(QUANTILES) * (len(order) - 1)).astype(int)].tolist())
    images, captions = [], []
    for place in places:
        row = int(rows[place])
        images.append(_enlarged(slices.pictures[row]))
        for box, colour in ((true[place], TRUE), (found[place], FOUND)):
            images[-1] = frame(images[-1], box.tolist(), colour)
        captions.append(f"…{slices.table['name'].iloc[row][-NAME_END:]}, IoU {values[place]:.3f}")
    return images, captions


def boxes_png(images: Sequence[Image], captions: Sequence[str]) -> bytes:
    """Draw them side by side, what the colours mean below."""
    return predictions_png(images, captions, key=KEY)


def box_curves_png(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw a run's metrics.jsonl."""
    return training_png(lines, panels=BOX_PANELS)


def _enlarged(picture: npt.NDArray[np.uint8]) -> Image:
    times = max(1, round(DRAWN_SIDE / len(picture)))
    return np.repeat(picture.repeat(times, axis=0).repeat(times, axis=1)[..., None], 3, axis=-1)
