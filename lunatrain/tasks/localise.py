"""Localisation of the lungs: a box around them in each slice, by regression."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.functional import smooth_l1_loss

from lunatrain.augment_boxes import BoxAugmentation, augment_boxes
from lunatrain.box_pictures import box_curves_png, boxes_png, drawn_slices
from lunatrain.box_slices import BoxBatch, BoxSlices, predict_boxes
from lunatrain.boxes import Floats, iou, iou_figures
from lunatrain.log import RunLog, read_metrics
from lunatrain.overlays import tile
from lunatrain.sampling import Rows
from lunatrain.tasks.task import LOSS, Amp, Validation

LOSS_BETA = 0.05
"""Differences (fractions of the picture) from which on the loss grows as they do, below that with their square."""
PICTURES, CURVES_FILE = "predictions", "curves.png"


@dataclass(frozen=True, eq=False)
class Localise:
    """Learn the boxes of slices.

    Parameters
    ----------
    slices : BoxSlices
        All of them.
    augmentation : BoxAugmentation
        What is done to training slices.
    val_rows : ndarray, (k,) int64
        Slices that a model is judged on.
    mean_box : ndarray, (4,)
        Mean box of the training slices: what a network has to beat that looks at nothing.
    """

    slices: BoxSlices
    augmentation: BoxAugmentation
    val_rows: Rows
    mean_box: Floats

    score_name = LOSS
    shown = ("iou", "iou_p5", "share_iou_90", "iou_mean_box", "loss")

    def train_loss(
        self, model: nn.Module, batch: BoxBatch, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Smooth L1 loss of a batch, and its boxes, found and true, (k, 8)."""
        pictures, boxes = augment_boxes(batch.pictures, batch.outlines, self.augmentation, generator)
        found = model(pictures.contiguous(memory_format=torch.channels_last))
        return smooth_l1_loss(found, boxes, beta=LOSS_BETA), torch.cat([found.detach(), boxes], dim=1)

    def count(self, batch: BoxBatch, outputs: torch.Tensor) -> dict[str, float]:
        """Sum of the IoU."""
        boxes = outputs.double().cpu().numpy()
        return {"iou": float(iou(boxes[:, :4], boxes[:, 4:]).sum())}

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean IoU of training slices, changed as they were."""
        return {"iou": sums["iou"] / max(1.0, sums["samples"])}

    def validate(self, model: nn.Module, device: torch.device, amp: Amp) -> Validation:
        """Loss and IoU of whole slices (`lunatrain.boxes.iou_figures`), and the IoU of the mean training box."""
        found = predict_boxes(model, self.slices.pictures[self.val_rows], device, amp)
        true = self.slices.boxes[self.val_rows]
        loss = smooth_l1_loss(torch.from_numpy(found), torch.from_numpy(true), beta=LOSS_BETA)
        baseline = float(iou(np.tile(self.mean_box, (len(true), 1)), true).mean())
        figures = {"loss": float(loss), **iou_figures(found, true), "iou_mean_box": baseline}
        return Validation(figures, partial(self._draw, found, true))

    def _draw(self, found: Floats, true: Floats, log: RunLog, samples: int) -> None:
        images, captions = drawn_slices(self.slices, self.val_rows, found, true)
        log.draw_picture(PICTURES, samples, tile(images), boxes_png(images, captions))
        log.write_picture(CURVES_FILE, box_curves_png(read_metrics(log.run)))
