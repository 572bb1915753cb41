"""Classification of crops: nodule or not, malignant or not."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lunatrain.augment import Augmentation, augment
from lunatrain.data import Batch
from lunatrain.metrics import binary_metrics


@dataclass(frozen=True, eq=False)
class Classify:
    """Learn one true-or-false column of the manifest.

    Parameters
    ----------
    labels : ndarray, (n,) int64
        0 or 1 for each row of the manifest that is used; other rows may hold anything.
    augmentation : Augmentation
        What is done to training crops.
    label_smoothing : float
        Share of the target given to the other class, in training.
    """

    labels: npt.NDArray[np.int64]
    augmentation: Augmentation
    label_smoothing: float = 0.0

    score_name = "average_precision"
    """What the best checkpoint is chosen by: it moves where nodules are rare and accuracy stands still."""

    def train_loss(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch, and the logits (k, 2)."""
        crops = augment(batch.crops.float(), self.augmentation, generator)
        logits = model(crops)
        target = self._target(batch, logits.device)
        smoothing = self.label_smoothing
        return nn.functional.cross_entropy(logits.float(), target, label_smoothing=smoothing), logits

    def count(self, batch: Batch, loss: float, logits: torch.Tensor) -> dict[str, float]:
        """Sums that `summarize` divides once, at the end of the epoch."""
        labels = self.labels[batch.rows]
        called = logits.detach().float().argmax(dim=1).cpu().numpy()
        return {
            "loss": loss * len(labels),
            "num_negative": float((labels == 0).sum()),
            "num_positive": float((labels == 1).sum()),
            "right_negative": float(((labels == 0) & (called == 0)).sum()),
            "right_positive": float(((labels == 1) & (called == 1)).sum()),
        }

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of an epoch of training from the sums of its batches."""
        negative, positive = sums["num_negative"], sums["num_positive"]
        right = sums["right_negative"] + sums["right_positive"]
        return {
            "loss": _ratio(sums["loss"], negative + positive),
            "correct": _ratio(right, negative + positive),
            "correct_negative": _ratio(sums["right_negative"], negative),
            "correct_positive": _ratio(sums["right_positive"], positive),
        }

    def scores(self, rows: npt.NDArray[np.int64], probability: npt.NDArray[np.float64]) -> dict[str, float]:
        """Figures of a validation: those of `lunatrain.metrics.BinaryMetrics` that are single numbers."""
        figures = binary_metrics(self.labels[rows] == 1, probability).to_json()
        return {
            name: float("nan") if value is None else float(value)
            for name, value in figures.items()
            if _is_number(value)
        }

    def _target(self, batch: Batch, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(self.labels[batch.rows]).to(device)


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[Batch], device: torch.device, amp: Any) -> npt.NDArray[np.float64]:
    """Probability of class 1 for each crop, in the order of the batches, (n,) float64."""
    model.eval()
    parts = []
    for batch in batches:
        with amp():
            logits = model(batch.crops.to(device).float())
        parts.append(torch.softmax(logits.float(), dim=1)[:, 1].double().cpu().numpy())
    return np.concatenate(parts) if parts else np.empty(0)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
