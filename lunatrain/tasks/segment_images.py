"""Segmentation of 2-D images: a class for each pixel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lunatrain.augment import Augmentation
from lunatrain.augment_slabs import augment_slabs
from lunatrain.images import ImageBatch, ImagePair
from lunatrain.log import RunLog, read_metrics
from lunatrain.overlays import overlay
from lunatrain.segmentation_plots import curves_png
from lunatrain.tasks.segment import CURVES_FILE, Loss, draw_pictures
from lunatrain.tasks.task import Amp, Validation

MARGIN = 1.5
"""Sides of the patch a window is cut from, so that a turned window seldom leaves it."""
COLOURS = np.asarray(
    [
        [0, 0, 0],
        [230, 159, 0],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [0, 114, 178],
        [213, 94, 0],
        [204, 121, 167],
    ],
    dtype=np.uint8,
)
"""Of classes; told apart with any colour vision. They start again after eight."""


@dataclass(frozen=True, eq=False)
class SegmentImages:
    """Learn the masks of images.

    Parameters
    ----------
    num_classes : int
        Values of the masks.
    augmentation : Augmentation
        What is done to training images.
    side : int
        Rows and columns of the windows that are cut out of them; smaller images are continued by their borders.
    loss : callable
        Of logits (N, 1, R, C) where there are two classes, else of (N, classes, R, C).
    test : sequence of ImagePair
        What a model is judged on, whole.
    """

    num_classes: int
    augmentation: Augmentation
    side: int
    loss: Loss
    test: Sequence[ImagePair]

    score_name = "mean_iou"
    """What the best checkpoint is chosen by: accuracy says little where one class fills the image."""
    shown = ("pixel_accuracy", "mean_iou", "loss")

    def train_loss(
        self, model: nn.Module, batch: ImageBatch, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch, and how many pixels were called right of how many, (2,)."""
        device = generator.device
        patches = [self._patch(pair, generator) for pair in batch.pairs]
        images = torch.from_numpy(np.stack([image for image, _ in patches])).to(device)
        masks = torch.from_numpy(np.stack([mask for _, mask in patches])).to(device)
        images, masks = augment_slabs(images, masks, self.augmentation, self.side, generator, flips_channels=False)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        called = decide(logits.detach())
        counts = torch.stack([(called == masks).sum(), torch.tensor(masks.numel(), device=device)])
        return self.loss(logits, masks.long()), counts

    def count(self, batch: ImageBatch, outputs: torch.Tensor) -> dict[str, float]:
        """Pixels called right, and all pixels."""
        return dict(zip(("right", "pixels"), outputs.double().tolist(), strict=True))

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Share of the pixels of the training windows that were called right."""
        return {"pixel_accuracy": sums["right"] / sums["pixels"]}

    @torch.inference_mode()
    def validate(self, model: nn.Module, device: torch.device, amp: Amp) -> Validation:
        """Pixel accuracy, mean intersection over union and mean loss of the test images."""
        model.eval()
        confusion = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        losses, first = [], None
        for pair in self.test:
            image = torch.from_numpy(pair.image[None]).to(device)
            with amp():
                logits = model(image.contiguous(memory_format=torch.channels_last))
            mask = torch.from_numpy(pair.mask[None].astype(np.int64)).to(device)
            losses.append(float(self.loss(logits, mask)))
            called = decide(logits)[0].cpu().numpy()
            first = called if first is None else first
            pairs = pair.mask.reshape(-1).astype(np.int64) * self.num_classes + called.reshape(-1)
            confusion += np.bincount(pairs, minlength=confusion.size).reshape(confusion.shape)
        decided = np.zeros((1, 1), dtype=np.int64) if first is None else first

        def draw(log: RunLog, samples: int) -> None:
            _draw(log, samples, self.test[0], decided)

        return Validation({"loss": float(np.mean(losses)), **confusion_figures(confusion)}, draw)

    def _patch(
        self, pair: ImagePair, generator: torch.Generator
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Random part of an image that a window is cut from, all of one size."""
        side = int(self.side * MARGIN)
        image, mask = _at_least(pair, side)
        spare = torch.tensor([size - side + 1 for size in mask.shape], dtype=torch.float64)
        share = torch.rand(2, generator=generator, device=generator.device).double().cpu()
        row, col = (share * spare).long().minimum(spare.long() - 1).tolist()
        return image[:, row : row + side, col : col + side], mask[row : row + side, col : col + side]


def decide(logits: torch.Tensor) -> torch.Tensor:
    """Class of each pixel, (N, R, C) int64: of one logit 0 or 1, of several the greatest."""
    return (logits[:, 0] >= 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


def confusion_figures(confusion: npt.NDArray[np.int64]) -> dict[str, float]:
    """Figures from counts of pixels, true class in rows, called class in columns.

    Returns
    -------
    dict of float
        pixel_accuracy; mean_iou: mean over classes that are there of intersection over union.
    """
    right = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - right
    there = confusion.sum(1) > 0
    return {
        "pixel_accuracy": float(right.sum() / confusion.sum()),
        "mean_iou": float((right[there] / union[there]).mean()),
    }


def _at_least(pair: ImagePair, side: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    more = [(0, max(0, side - size)) for size in pair.mask.shape]
    if not any(after for _, after in more):
        return pair.image, pair.mask
    return np.pad(pair.image, [(0, 0), *more], mode="edge"), np.pad(pair.mask, more, mode="edge")


def _draw(log: RunLog, samples: int, pair: ImagePair, called: npt.NDArray[np.int64]) -> None:
    """Write one test image, its mask, and the hard decisions."""
    plain = np.ascontiguousarray(pair.image.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))
    image = np.repeat(plain, 3, axis=-1) if plain.shape[-1] == 1 else plain
    images = [image, COLOURS[pair.mask % len(COLOURS)], COLOURS[called % len(COLOURS)]]
    captions = [pair.name, "its mask", f"decided: {(called == pair.mask).mean():.1%} of the pixels right"]
    is_binary = int(max(pair.mask.max(), called.max())) <= 1
    if is_binary:
        images.append(overlay(image, pair.mask > 0, called > 0))
        captions.append("decided, over the image")
    draw_pictures(log, samples, images, captions, has_key=is_binary, columns=len(images))
    log.write_picture(CURVES_FILE, curves_png(read_metrics(log.run), of_images=True))
