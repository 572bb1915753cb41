"""What a segmentation run is asked to do: `TrainConfig` with other defaults, and a few settings of its own."""

from dataclasses import dataclass

from lunatrain.config import TrainConfig
from lunatrain.errors import UsageError

SMALLEST_SIDE = 8


@dataclass(frozen=True)
class SegConfig(TrainConfig):
    """Settings of a segmentation run; see docs/segmentation.md for how the defaults were measured.

    Parameters
    ----------
    loss : {"dice-bce", "book"}
        See `lunatrain.losses`.
    side : int
        Rows and columns of the windows trained on.
    negatives : bool
        Whether slabs without a nodule are shown at all; the book shows none.
    prior : float
        Probability that a fresh network begins with everywhere: near the share of pixels in a nodule, so that the
        first steps need not teach it that most are none. 0 leaves it as drawn.
    val_slices : int
        Most whole slices to validate on; 0 for no limit.
    images : bool
        Whether a folder of images is learnt instead of a store.

    The others are those of `TrainConfig`; `ratio` is slabs without a nodule for each that shows one.
    """

    target: str = "is_positive"
    model: str = "unet"
    batch_size: int = 16
    augment: str = "flip,offset=0.03,scale,rotate,noise"
    lr: float = 4e-3
    label_smoothing: float = 0.0
    ema: float = 0.0
    loss: str = "dice-bce"
    side: int = 64
    negatives: bool = True
    prior: float = 0.02
    val_slices: int = 600
    images: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("side", SMALLEST_SIDE), ("val_slices", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                message = f"--{option}: got {getattr(self, name)}, expected {least} or more"
                raise UsageError(message)
        if not 0 <= self.prior < 1:
            message = f"--prior: got {self.prior}, expected 0 to below 1"
            raise UsageError(message)


IMAGES = SegConfig(images=True, augment="flip,scale,rotate", side=128, ratio=0, prior=0.0)
"""Defaults where a folder of images is learnt: no Hounsfield noise, no balancing."""

SEG_PRESETS = {
    "book-ch13": SegConfig(
        model="unet",
        epochs=1,
        samples=300_000,
        ratio=0,
        negatives=False,
        prior=0.0,
        lr=1e-3,
        weight_decay=0.0,
        schedule="constant",
        clip_grad=0.0,
        loss="book",
    )
}
"""The book's settings, chapter 13. (Its offset has no effect by a slip, and its batches share one transform.)"""
