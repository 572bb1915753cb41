"""Classification of crops: nodule or not, malignant or not."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lunatrain.augment import Augmentation, augment
from lunatrain.data import Batch, CropLoader
from lunatrain.distributed import Processes
from lunatrain.log import RunLog
from lunatrain.metrics import binary_metrics
from lunatrain.sampling import Rows
from lunatrain.tasks.task import Amp, Validation


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
        Share of the target that is spread over all classes, in training.
    val_rows : ndarray, (k,) int64
        Rows that a model is judged on.
    val_loader : CropLoader
        Delivers them.
    processes : Processes
        Who shares the work of validating.
    """

    labels: npt.NDArray[np.int64]
    augmentation: Augmentation
    label_smoothing: float
    val_rows: Rows
    val_loader: CropLoader
    processes: Processes = field(default_factory=Processes)

    score_name: ClassVar[str] = "average_precision"
    """What the best checkpoint is chosen by: it moves where nodules are rare and accuracy stands still."""

    shown: ClassVar[tuple[str, ...]] = ("auc", "average_precision", "precision", "recall", "f1")

    def train_loss(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch, and the logits (k, 2)."""
        crops = augment(batch.crops.float(), self.augmentation, generator)
        logits = model(crops)
        target = torch.from_numpy(self.labels[batch.rows]).to(logits.device)
        smoothing = self.label_smoothing
        return nn.functional.cross_entropy(logits.float(), target, label_smoothing=smoothing), logits

    def count(self, batch: Batch, outputs: torch.Tensor) -> dict[str, float]:
        """How many of each class there were, and how many were called right."""
        labels = self.labels[batch.rows]
        called = outputs.detach().float().argmax(dim=1).cpu().numpy()
        return {
            "num_negative": float((labels == 0).sum()),
            "num_positive": float((labels == 1).sum()),
            "right_negative": float(((labels == 0) & (called == 0)).sum()),
            "right_positive": float(((labels == 1) & (called == 1)).sum()),
        }

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Share called right, of all and of each class."""
        negative, positive = sums["num_negative"], sums["num_positive"]
        right = sums["right_negative"] + sums["right_positive"]
        return {
            "correct": _ratio(right, negative + positive),
            "correct_negative": _ratio(sums["right_negative"], negative),
            "correct_positive": _ratio(sums["right_positive"], positive),
        }

    def validate(self, model: nn.Module, device: torch.device, amp: Amp) -> Validation:
        """Figures of the validation rows: those of `lunatrain.metrics.BinaryMetrics` that are single numbers."""
        own = self.processes.share(self.val_rows)
        batches = self.val_loader.batches(in_batches(own, self.val_loader.batch_size))
        probability = self.processes.join(predict(model, batches, device, amp), len(self.val_rows))
        labels = self.labels[self.val_rows]
        figures = {
            name: float("nan") if value is None else float(value)
            for name, value in binary_metrics(labels == 1, probability).to_json().items()
            if _is_number(value)
        }

        def draw(log: RunLog, samples: int) -> None:
            log.draw_scores(samples, labels, probability)

        return Validation(figures, draw)


@torch.inference_mode()
def predict_classes(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, amp: Amp
) -> npt.NDArray[np.float64]:
    """Probability of each class for each crop, in the order of the batches, (n, classes) float64; (0, 0) of none."""
    model.eval()
    parts = []
    for batch in batches:
        with amp():
            logits = model(batch.crops.to(device).float())
        parts.append(torch.softmax(logits.float(), dim=1).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.empty((0, 0))


def predict(model: nn.Module, batches: Iterable[Batch], device: torch.device, amp: Amp) -> npt.NDArray[np.float64]:
    """Probability of class 1 for each crop, in the order of the batches, (n,) float64."""
    return predict_classes(model, batches, device, amp).reshape(-1, 2)[:, 1].copy()


def in_batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Cut rows into batches, in their order."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
