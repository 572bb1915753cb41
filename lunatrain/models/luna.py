"""The classifier of "Deep Learning with PyTorch" (Stevens, Antiga, Viehmann 2020), chapter 11, and its weights.

Names and shapes of the parameters are the book's, so that its state files load as they are.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lunatrain.errors import UsageError

CHANNELS = (8, 16, 32, 64)
SMALLEST_SIDE = 2 ** len(CHANNELS)
COUNTER = "num_batches_tracked"
"""Name of a batch norm's counter: old state files may lack it, and nothing here uses it."""
SEGMENTATION_PREFIX = "unet."


class LunaBlock(nn.Module):
    """Two convolutions 3×3×3 with ReLU, then the largest of each 2×2×2: half the sides, `out_channels` channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, I, R, C) to (N, out_channels, I // 2, R // 2, C // 2)."""
        features = self.conv1(features).relu_()
        features = self.conv2(features).relu_()
        return nn.functional.max_pool3d(features, 2)


class LunaModel(nn.Module):
    """The book's classifier: batch norm of the HU, four blocks of 8, 16, 32 and 64 channels, one linear layer.

    Parameters
    ----------
    num_classes : int
        Number of logits.
    crop_shape : tuple of int
        Slices, rows, columns of a crop, each 16 or more.

    Raises
    ------
    UsageError
        A crop too small to be halved four times.

    Notes
    -----
    222,220 parameters for two classes and crops of 32×48×48. The book returns logits and probabilities; this one
    returns logits.
    """

    def __init__(self, num_classes: int = 2, crop_shape: tuple[int, int, int] = (32, 48, 48)) -> None:
        super().__init__()
        if min(crop_shape) < SMALLEST_SIDE:
            shape = "×".join(map(str, crop_shape))
            message = f"luna halves a crop four times, so each side must be {SMALLEST_SIDE} or more, got {shape}"
            raise UsageError(message)
        self.tail_batchnorm = nn.BatchNorm3d(1)
        self.block1 = LunaBlock(1, CHANNELS[0])
        self.block2 = LunaBlock(CHANNELS[0], CHANNELS[1])
        self.block3 = LunaBlock(CHANNELS[1], CHANNELS[2])
        self.block4 = LunaBlock(CHANNELS[2], CHANNELS[3])
        places = math.prod(side // SMALLEST_SIDE for side in crop_shape)
        self.head_linear = nn.Linear(CHANNELS[3] * places, num_classes)
        self._init_weights()

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """HU, (N, 1, I, R, C), to logits, (N, num_classes)."""
        features = self.tail_batchnorm(crops)
        for block in (self.block1, self.block2, self.block3, self.block4):
            features = block(features)
        logits: torch.Tensor = self.head_linear(features.flatten(1))
        return logits

    def _init_weights(self) -> None:
        """Draw weights as the book does, with its slip in the biases.

        A bias is normal with mean -1 / sqrt(fan_out) and that deviation, where a uniform one was likely meant: most
        biases start negative. Kept, so that the preset trains from the book's start.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                bound = 1 / math.sqrt(layer.weight.shape[0] * layer.weight[0, 0].numel())
                if layer.bias is not None:
                    nn.init.normal_(layer.bias, mean=-bound, std=bound)


def load_book_state(path: Path, model: nn.Module) -> None:
    """Load weights the book published (`data/part2/models/*.state` of its repository) into a model, on its device.

    Parameters
    ----------
    path : Path
        A dictionary saved by torch.save whose `model_state` holds the weights. Only tensors and plain values are
        unpickled: nothing in the file is run.
    model : Module
        With the book's names and shapes, as `LunaModel`. Unchanged where an error is raised.

    Raises
    ------
    UsageError
        No such file, not a file of weights only, or weights of another model.
    """
    weights = _read_model_state(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(COUNTER)}
    _check_names(path, weights.keys(), own.keys())
    for name, tensor in own.items():
        given = weights[name]
        if given.shape != tensor.shape:
            message = (
                f"{path}: {name} is {tuple(given.shape)}, this model's is {tuple(tensor.shape)}. Build the model for "
                "the crop shape and classes of the file"
            )
            raise UsageError(message)
        if not given.is_floating_point() or not bool(given.isfinite().all()):
            message = f"{path}: {name} holds {given.dtype} values that are not all finite numbers. Fetch the file again"
            raise UsageError(message)
    model.load_state_dict(weights, strict=False)  # only the counters are not there


def _read_model_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror or error}"
        raise UsageError(message) from error
    except Exception as error:  # a damaged pickle can fail in any way
        message = f"{path} is not a file of weights only, so it was not loaded ({_first_line(error)})"
        raise UsageError(message) from error
    state = saved.get("model_state") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping):
        holds = ", ".join(str(key) for key in saved) if isinstance(saved, Mapping) else type(saved).__name__
        message = f"{path} holds no model_state ({holds or 'nothing'}). Give a state file of the book"
        raise UsageError(message)
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        message = f"{path}: model_state is not a table of names and tensors. Give a state file of the book"
        raise UsageError(message)
    return dict(state)


def _check_names(path: Path, given: Any, own: Any) -> None:
    missing, unexpected = sorted(own - given), sorted(given - own)
    if not missing and not unexpected:
        return
    if any(name.startswith(SEGMENTATION_PREFIX) for name in unexpected):
        message = f"{path} is a segmentation state (the book's U-Net), this model is a classifier. Use a cls_ file"
        raise UsageError(message)
    parts = [f"lacks {_some(missing)}" if missing else "", f"has {_some(unexpected)} too much" if unexpected else ""]
    message = f"{path} {' and '.join(part for part in parts if part)}: the weights of another model"
    raise UsageError(message)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
