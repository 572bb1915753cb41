"""Classification of crops into several classes: which subtype a lesion is of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from lunatrain.class_metrics import class_metrics, mean_known
from lunatrain.data import Batch
from lunatrain.log import RunLog
from lunatrain.tasks.classify import Classify, in_batches, predict_classes
from lunatrain.tasks.task import Amp, Validation


@dataclass(frozen=True, eq=False)
class ClassifyMany(Classify):
    """Learn a column of the manifest that has several values.

    Parameters
    ----------
    classes : tuple of str
        Names of the labels 0, 1, and so on. The others are as of `Classify`.
    """

    classes: tuple[str, ...] = ()

    score_name: ClassVar[str] = "score"
    """What the best checkpoint is chosen by: the mean of macro AUC and balanced accuracy.

    Both ask for each class alike. AUC says whether the classes are told apart, and may be 1 while all crops are called
    one class; the other feels that, and is coarse.
    """

    shown: ClassVar[tuple[str, ...]] = ("macro_auc", "balanced_accuracy", "accuracy", "macro_f1")

    def count(self, batch: Batch, outputs: torch.Tensor) -> dict[str, float]:
        """How many of each class there were, and how many were called right."""
        labels = self.labels[batch.rows]
        is_right = outputs.detach().float().argmax(dim=1).cpu().numpy() == labels
        counts = {}
        for number, name in enumerate(self.classes):
            counts[f"num_{name}"] = float((labels == number).sum())
            counts[f"right_{name}"] = float((is_right & (labels == number)).sum())
        return counts

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Share called right, of all and as the mean over the classes."""
        num, right = ([sums[f"{what}_{name}"] for name in self.classes] for what in ("num", "right"))
        shares = [part / whole for part, whole in zip(right, num, strict=True) if whole]
        return {"accuracy": sum(right) / sum(num), "balanced_accuracy": mean_known(shares)}

    def validate(self, model: nn.Module, device: torch.device, amp: Amp) -> Validation:
        """Figures of the validation rows: those of `lunatrain.class_metrics.ClassMetrics`."""
        own = self.processes.share(self.val_rows)
        batches = self.val_loader.batches(in_batches(own, self.val_loader.batch_size))
        shares = predict_classes(model, batches, device, amp).reshape(-1, len(self.classes))
        probability = np.stack([self.processes.join(column, len(self.val_rows)) for column in shares.T], axis=1)
        labels = self.labels[self.val_rows]
        metrics = class_metrics(labels, probability)
        score = mean_known([metrics.macro_auc, metrics.balanced_accuracy])
        figures = {"score": score, **metrics.figures(self.classes)}

        def draw(log: RunLog, samples: int) -> None:
            log.draw_class_scores(samples, labels, probability, self.classes)

        return Validation(figures, draw)
