"""Losses of segmentation: how far a predicted mask is from the true one. Each returns a mean over samples."""

from collections.abc import Callable

import torch
from torch import nn

from lunatrain.errors import UsageError

EPSILON = 1.0
"""Added above and below in Dice, in pixels: the book's. An empty mask predicted empty has loss 0."""
MISSED_WEIGHT = 8.0
"""What a missed pixel weighs against a wrongly marked one in `book_loss`: the book's."""
ENTROPY_WEIGHT = 10.0
"""Of the cross-entropy in `dice_bce_loss`: a pixel's share in it is small, as most pixels are easy."""


def dice_loss(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One minus Dice's overlap of each sample, (N,): ``1 - (2 Σ p t + 1) / (Σ p + Σ t + 1)``.

    Parameters
    ----------
    probability : Tensor, (N, ...), float
        0 to 1.
    target : Tensor, (N, ...)
        0 or 1, of the same shape.

    >>> dice_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([0.2500])
    """
    probability, target = probability.flatten(1), target.flatten(1).to(probability.dtype)
    overlap = (probability * target).sum(1)
    return 1 - (2 * overlap + EPSILON) / (probability.sum(1) + target.sum(1) + EPSILON)


def book_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The book's loss: Dice, and eight times the Dice that is left where only the mask's own pixels count.

    Parameters
    ----------
    logits : Tensor, (N, 1, R, C)
        Before the sigmoid.
    target : Tensor, (N, R, C)
        0 or 1.
    """
    probability, wanted = torch.sigmoid(logits[:, 0].float()), target.to(torch.float32)
    missed = dice_loss(probability * wanted, wanted)
    return (dice_loss(probability, wanted) + MISSED_WEIGHT * missed).mean()


def dice_bce_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice, the Dice of missed pixels once more, and ten times the mean binary cross-entropy.

    Dice alone, and more so with missed pixels weighted 8-fold, is content for a long time to mark every vessel: the
    cross-entropy says at each pixel where no mask is. Takes what `book_loss` takes.
    """
    probability, wanted = torch.sigmoid(logits[:, 0].float()), target.to(torch.float32)
    overlap = dice_loss(probability, wanted) + dice_loss(probability * wanted, wanted)
    entropy = nn.functional.binary_cross_entropy_with_logits(logits[:, 0].float(), wanted)
    return overlap.mean() + ENTROPY_WEIGHT * entropy


def class_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of classes, and the mean Dice loss over them.

    Parameters
    ----------
    logits : Tensor, (N, classes, R, C)
        Before the softmax.
    target : Tensor, (N, R, C), int64
        Class of each pixel.
    """
    probability = torch.softmax(logits.float(), dim=1)
    wanted = nn.functional.one_hot(target, logits.shape[1]).movedim(-1, 1)
    overlap = dice_loss(probability.flatten(0, 1), wanted.flatten(0, 1)).mean()
    return nn.functional.cross_entropy(logits.float(), target) + overlap


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"book": book_loss, "dice-bce": dice_bce_loss}


def pick_loss(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A loss of one class by its name.

    Raises
    ------
    UsageError
        No such loss.
    """
    if name not in LOSSES:
        message = f"--loss: got {name!r}, expected one of {', '.join(LOSSES)}"
        raise UsageError(message)
    return LOSSES[name]
