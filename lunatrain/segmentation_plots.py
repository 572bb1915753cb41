"""Pictures of a segmentation run: predictions over their images with captions, and curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lunatrain.overlays import MISSED, RIGHT, WRONG
from lunatrain.plots import DARK, DPI, PLAIN_STYLE, png_of, training_png

COLUMNS, CELL_INCHES = 3, 3.4
KEY = (("right", RIGHT), ("wrongly marked", WRONG), ("missed", MISSED))

SLICE_PANELS = {
    "loss": ("loss",),
    "mean recall at few false voxels": ("mean_recall",),
    "recall at 0.5": ("recall",),
    "precision at 0.5": ("precision",),
    "F1 at 0.5": ("f1",),
    "nodules touched": ("nodules_touched",),
}
IMAGE_PANELS = {
    "loss": ("loss",),
    "pixel accuracy": ("pixel_accuracy",),
    "mean intersection over union": ("mean_iou",),
}


@PLAIN_STYLE
def predictions_png(
    images: Sequence[npt.NDArray[np.uint8]],
    captions: Sequence[str],
    *,
    has_key: bool = True,
    columns: int = COLUMNS,
    key: Sequence[tuple[str, tuple[int, int, int]]] = KEY,
) -> bytes:
    """Draw overlays (R, C, 3) side by side, a caption above each, what the colours mean below."""
    columns = min(columns, len(images))
    num_rows = -(-len(images) // columns)
    size = (CELL_INCHES * columns, (CELL_INCHES + 0.3) * num_rows + 0.4)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=DARK.background)
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(num_rows, columns, k + 1, xticks=[], yticks=[])
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, size=9, color=DARK.text)
        axes.spines[:].set_color(DARK.grid)
    if has_key:
        patches = [Patch(color="#{:02x}{:02x}{:02x}".format(*colour), label=name) for name, colour in key]
        style: dict[str, Any] = {"facecolor": DARK.background, "edgecolor": DARK.grid, "labelcolor": DARK.text}
        figure.legend(handles=patches, loc="outside lower center", ncols=len(key), fontsize=9, **style)
    return png_of(figure)


def curves_png(lines: Sequence[Mapping[str, Any]], *, of_images: bool) -> bytes:
    """Draw a run's metrics.jsonl: loss, accuracy and what else is followed."""
    return training_png(lines, panels=IMAGE_PANELS if of_images else SLICE_PANELS)
