"""The networks, by name. Each takes float32 HU, (N, 1, slices, rows, columns), and returns logits, (N, num_classes)."""

from collections.abc import Callable

import torch
from torch import nn

from lunatrain.errors import UsageError
from lunatrain.models.luna import LunaModel, load_book_state
from lunatrain.models.residual import ResidualModel

__all__ = ["MEMORY_FORMAT", "MODELS", "LunaModel", "ResidualModel", "build_model", "load_book_state", "prepare_for"]

MODELS: dict[str, Callable[[int, tuple[int, int, int]], nn.Module]] = {"luna": LunaModel, "residual": ResidualModel}

MEMORY_FORMAT = torch.channels_last_3d


def build_model(name: str, num_classes: int = 2, crop_shape: tuple[int, int, int] = (32, 48, 48)) -> nn.Module:
    """Make a network with fresh weights, drawn from torch's own generator.

    Parameters
    ----------
    name : str
        One of `MODELS`.
    num_classes : int
        Number of logits.
    crop_shape : tuple of int
        Slices, rows, columns of a crop.

    Raises
    ------
    UsageError
        Unknown name, fewer than one class, or crops too small for the network.
    """
    if name not in MODELS:
        message = f"model must be one of {', '.join(MODELS)}, got {name!r}"
        raise UsageError(message)
    if num_classes < 1:
        message = f"a model needs 1 class or more, got {num_classes}"
        raise UsageError(message)
    return MODELS[name](num_classes, crop_shape)


def prepare_for(device: str | torch.device, model: nn.Module) -> nn.Module:
    """Move a model to a device, its weights in `MEMORY_FORMAT`: the same results to rounding, sooner."""
    return model.to(torch.device(device)).to(memory_format=MEMORY_FORMAT)  # type: ignore[call-overload,no-any-return]
