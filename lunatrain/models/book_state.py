"""Weights that "Deep Learning with PyTorch" (Stevens, Antiga, Viehmann 2020) published, read and never run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lunatrain.errors import UsageError

COUNTER = "num_batches_tracked"
"""Name of a batch norm's counter: old state files may lack it, and nothing here uses it."""
KINDS = {
    "unet.": "segmentation state (the book's U-Net)",
    "head_linear.": "classification state (the book's LunaModel)",
}
"""What weights of these names are; a model that has such names of its own is of that kind."""
CLASSIFIER_NAME = "head_linear."


def load_book_state(path: Path, model: nn.Module) -> None:
    """Load weights the book published (`data/part2/models/*.state` of its repository) into a model, on its device.

    Parameters
    ----------
    path : Path
        A dictionary saved by torch.save whose `model_state` holds the weights. Only tensors and plain values are
        unpickled: nothing in the file is run.
    model : Module
        With the book's names and shapes, as `LunaModel` or `UNet`. Unchanged where an error is raised.

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
    kind = next((kind for prefix, kind in KINDS.items() if any(name.startswith(prefix) for name in unexpected)), None)
    if kind is not None and not set(given) & set(own):
        is_classifier = any(name.startswith(CLASSIFIER_NAME) for name in own)
        wanted = "a classifier. Use a cls_ file" if is_classifier else "for segmentation. Use a seg_ file"
        message = f"{path} is a {kind}, this model is {wanted}"
        raise UsageError(message)
    parts = [f"lacks {_some(missing)}" if missing else "", f"has {_some(unexpected)} too much" if unexpected else ""]
    message = f"{path} {' and '.join(part for part in parts if part)}: the weights of another model"
    raise UsageError(message)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
