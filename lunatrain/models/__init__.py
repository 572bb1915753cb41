"""The networks, by name. Each takes float32 HU, (N, 1, slices, rows, columns), and returns logits, (N, num_classes)."""

from collections.abc import Callable

import torch
from torch import nn

from lunatrain.errors import UsageError
from lunatrain.models.book_state import load_book_state
from lunatrain.models.luna import LunaModel
from lunatrain.models.residual import ResidualModel

__all__ = [
    "MEMORY_FORMAT",
    "MODELS",
    "LunaModel",
    "ResidualModel",
    "build_model",
    "freeze_all_but",
    "load_book_state",
    "prepare_for",
]

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


def freeze_all_but(model: nn.Module, num_stages: int) -> tuple[nn.Module, ...]:
    """Let only the last stages of a model learn.

    Parameters
    ----------
    model : Module
        One of `MODELS`.
    num_stages : int
        Stages that learn, counted from the logits: 1 is the linear layer alone; 0 freezes nothing.

    Returns
    -------
    tuple of Module
        What is frozen. Keep it in evaluation mode while training, or its batch-norm statistics drift from its weights.

    Raises
    ------
    UsageError
        The model has not so many stages.
    """
    if num_stages == 0:
        return ()
    stages = model.stages()  # type: ignore[operator]
    if not 0 < num_stages <= len(stages):
        message = f"the model has {len(stages)} stages, got {num_stages} to fine-tune. Give 1 to {len(stages)}"
        raise UsageError(message)
    frozen = tuple(module for stage in stages[:-num_stages] for module in stage)
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def prepare_for(device: str | torch.device, model: nn.Module) -> nn.Module:
    """Move a model to a device, its weights in `MEMORY_FORMAT`: the same results to rounding, sooner."""
    return model.to(torch.device(device)).to(memory_format=MEMORY_FORMAT)  # type: ignore[call-overload,no-any-return]
