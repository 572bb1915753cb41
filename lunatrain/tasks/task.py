"""What the loop asks of a task and of its data; it knows nothing else of either."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lunatrain.log import RunLog
from lunatrain.sampling import Rows

LOSS = "loss"
"""The one score of which less is better."""

Amp = Callable[[], AbstractContextManager[Any]]
"""What a model runs under: `lunatrain.loop.amp_context`."""


class Batch(Protocol):
    """Some samples; a task knows what else its batches hold."""

    @property
    def rows(self) -> Rows:
        """Rows of the table the samples come from, (k,) int64."""
        ...


class Loader(Protocol):
    """Makes batches of rows."""

    @property
    def wait_share(self) -> float:
        """Share of the loop's time that went into waiting for data, 0 to 1."""
        ...

    def batches(self, rows: Iterable[Rows]) -> Iterator[Any]:
        """A batch for each array of rows, in their order."""
        ...


@dataclass(frozen=True, eq=False)
class Validation:
    """What a validation found: figures, and how to draw the rest into the run's log at a number of samples seen."""

    figures: Mapping[str, float]
    draw: Callable[[RunLog, int], None] = lambda log, samples: None


class Task(Protocol):
    """A loss to learn by and a validation to be judged by."""

    @property
    def score_name(self) -> str:
        """Figure of the validation by which the best checkpoint is chosen: the higher, the better, but for `LOSS`."""
        ...

    @property
    def shown(self) -> tuple[str, ...]:
        """Figures of the validation that are printed at the end."""
        ...

    def train_loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of a batch, and the model's outputs."""
        ...

    def count(self, batch: Any, outputs: torch.Tensor) -> dict[str, float]:
        """Sums over a batch that `summarize` divides once, at the end of the epoch."""
        ...

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Figures of an epoch of training from those sums, besides the loss."""
        ...

    def validate(self, model: nn.Module, device: torch.device, amp: Amp) -> Validation:
        """Judge a model on what it did not train on."""
        ...
