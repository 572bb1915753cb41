"""What a localisation run is asked to do: `TrainConfig` with other defaults, and a few settings of its own."""

from dataclasses import dataclass
from typing import Literal

from lunatrain.config import TrainConfig
from lunatrain.errors import UsageError

SMALLEST_SIDE = 32


@dataclass(frozen=True)
class LocConfig(TrainConfig):
    """Settings of a run that learns lung boxes; see docs/localisation.md.

    Parameters
    ----------
    side : int
        Rows and columns of the pictures.
    slice_mm : float
        How far apart the slices of a scan are that are learnt and judged.

    The others are those of `TrainConfig`.
    """

    target: str = "lung_box"
    model: str = "resnet"
    epochs: int = 20
    batch_size: int = 32
    ratio: int = 0
    augment: str = "all"
    optimizer: Literal["adamw", "adam", "sgd"] = "adam"
    lr: float = 1e-4
    ema: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["one-cycle", "plateau", "constant"] = "plateau"
    label_smoothing: float = 0.0
    keep_best: int = 3
    side: int = 96
    slice_mm: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side < SMALLEST_SIDE or self.slice_mm <= 0:
            message = (
                f"--side and --slice-mm: got {self.side} and {self.slice_mm:g}, expected {SMALLEST_SIDE} or more and "
                "above 0"
            )
            raise UsageError(message)
        if self.split == "candidate":
            message = "--split: got candidate, expected series, fold:K or all: slices of a scan stay together"
            raise UsageError(message)
