"""Segmentation of nodules: which pixels of a slice belong to one, seen with the slices around it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lunatrain.augment import Augmentation
from lunatrain.augment_slabs import augment_slabs
from lunatrain.log import RunLog, progress_bar, read_metrics
from lunatrain.overlays import grey, overlay, tile
from lunatrain.segmentation_plots import COLUMNS, curves_png, predictions_png
from lunatrain.slabs import SlabBatch, TrueSlice, ValSlices
from lunatrain.tasks.task import Amp, Validation
from lunatrain.voxel_scores import VoxelScores

NUM_SHOWN = 6
ROUNDING = 1e-3
"""Of a logit: what was at the threshold stays there."""
CURVES_FILE = "curves.png"
PICTURES = "predictions"

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Segment:
    """Learn the masks of slabs.

    Parameters
    ----------
    augmentation : Augmentation
        What is done to training slabs.
    side : int
        Rows and columns of the windows that are cut out of them.
    loss : callable
        See `lunatrain.losses`.
    val : ValSlices
        What a model is judged on.
    show_progress : bool
        Whether to draw a bar while it is.
    """

    augmentation: Augmentation
    side: int
    loss: Loss
    val: ValSlices
    show_progress: bool = False

    score_name = "mean_recall"
    """What the best checkpoint is chosen by. The book takes recall alone, which marking everything makes 1."""
    shown = ("mean_recall", "threshold", "recall_tuned", "nodules_touched", "precision", "recall", "f1")

    def train_loss(
        self, model: nn.Module, batch: SlabBatch, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch, and its right, wrongly marked and missed pixels, (3,)."""
        slabs, masks = augment_slabs(batch.slabs.float(), batch.masks, self.augmentation, self.side, generator)
        logits = model(slabs.contiguous(memory_format=torch.channels_last))
        called, true = logits.detach()[:, 0] >= 0, masks > 0
        counts = torch.stack([(called & true).sum(), (called & ~true).sum(), (~called & true).sum()])
        return self.loss(logits, masks), counts

    def count(self, batch: SlabBatch, outputs: torch.Tensor) -> dict[str, float]:
        """Right, wrongly marked and missed pixels."""
        return dict(zip(("right", "wrong", "missed"), outputs.double().tolist(), strict=True))

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Precision, recall and F1 of pixels at 0.5, in training windows."""
        right, wrong, missed = sums["right"], sums["wrong"], sums["missed"]
        return {
            "precision": _ratio(right, right + wrong),
            "recall": _ratio(right, right + missed),
            "f1": _ratio(2 * right, 2 * right + wrong + missed),
        }

    @torch.inference_mode()
    def validate(self, model: nn.Module, device: torch.device, amp: Amp) -> Validation:
        """Figures of whole slices (`VoxelScores.figures`) and the mean loss over them."""
        model.eval()
        scores, pictures = VoxelScores(self.val.num_nodules), _Pictures()
        losses: list[float] = []
        with progress_bar(len(self.val), "validation", "slice", show=self.show_progress) as bar:
            for slabs, truths in self.val.batches():
                with amp():
                    logits = model(slabs.to(device).contiguous(memory_format=torch.channels_last))
                masks = torch.from_numpy(np.stack([_mask(truth, slabs.shape[2:]) for truth in truths])).to(device)
                losses += [float(self.loss(logits[k : k + 1], masks[k : k + 1])) for k in range(len(truths))]
                middle = slabs[:, slabs.shape[1] // 2].cpu().numpy()
                for hu, truth, found in zip(middle, truths, logits[:, 0].float().cpu().numpy(), strict=True):
                    scores.add(found, truth.places, truth.nodules, truth.searched(found.shape))
                    pictures.offer(hu, truth, found)
                bar.update(len(truths))
        figures = {"loss": float(np.mean(losses)) if losses else float("nan"), **scores.figures()}
        return Validation(figures, partial(pictures.draw, figures["threshold"]))


class _Pictures:
    """Keeps the middle slice of some nodules, and draws them."""

    def __init__(self) -> None:
        self._best: dict[int, tuple[int, npt.NDArray[np.float32], TrueSlice, npt.NDArray[np.float32]]] = {}

    def offer(self, hu: npt.NDArray[np.float32], truth: TrueSlice, logits: npt.NDArray[np.float32]) -> None:
        """Keep a slice where it is the largest so far of one of the first nodules."""
        if not len(truth.nodules):
            return
        nodule = int(truth.nodules[0])
        size = len(truth.places)
        if nodule in self._best and self._best[nodule][0] >= size:
            return
        if nodule in self._best or len(self._best) < NUM_SHOWN:
            self._best[nodule] = (size, hu.copy(), truth, logits.copy())

    def draw(self, threshold: float, log: RunLog, samples: int) -> None:
        """Write pictures of what a probability marks, and curves, into the run's log."""
        images, captions = [], []
        at = math.log(threshold / (1 - threshold)) - ROUNDING
        for _, hu, truth, logits in self._best.values():
            called = logits >= at
            true = _mask(truth, hu.shape).astype(bool)
            images.append(overlay(grey(hu), true, called))
            captions.append(f"{truth.caption}: {int((called & true).sum())} of {len(truth.places)} at {threshold:.2g}")
        draw_pictures(log, samples, images, captions)
        log.write_picture(CURVES_FILE, curves_png(read_metrics(log.run), of_images=False))


def draw_pictures(
    log: RunLog,
    samples: int,
    images: Sequence[npt.NDArray[np.uint8]],
    captions: Sequence[str],
    *,
    has_key: bool = True,
    columns: int = COLUMNS,
) -> None:
    """Write images with captions as one picture, and as one TensorBoard image."""
    if images:
        png = predictions_png(images, captions, has_key=has_key, columns=columns)
        log.draw_picture(PICTURES, samples, tile(images, columns), png)


def _mask(truth: TrueSlice, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    mask = np.zeros(int(np.prod(shape)), dtype=np.uint8)
    mask[truth.places] = 1
    return mask.reshape(tuple(shape))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
