"""Train on a lunaprep store, and evaluate as the LUNA16 challenge does."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lunatrain.dataset import CropDataset

__version__ = "0.1.0"

__all__ = ["CropDataset", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the data set when it is first asked for: ``import lunatrain`` alone does not import torch."""
    if name == "CropDataset":
        from lunatrain.dataset import CropDataset

        return CropDataset
    message = f"module 'lunatrain' has no attribute {name!r}"
    raise AttributeError(message)
