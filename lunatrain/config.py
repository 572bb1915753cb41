"""What a training run is asked to do: checked once, kept in every checkpoint."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar

from lunatrain.errors import UsageError


def _require(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        message = f"--{name.replace('_', '-')}: got {got}, expected {expected}"
        raise UsageError(message)


TARGETS = {"nodule": "is_nodule", "malignant": "is_malignant", "subtype": "subtype"}
"""Columns of the manifest that can be learnt, by what --target calls them."""
SUBTYPE = TARGETS["subtype"]
"""The one that is of several classes; the others are true or false."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. How the defaults were chosen: docs/training.md.

    Parameters
    ----------
    target : str
        Column of the manifest to learn, one of `TARGETS`.
    classes : tuple of str
        Of a target of several classes: what each output of the network stands for. Found in the training part of the
        store, and kept from then on; empty where the target is true or false.
    split : str
        ``series``, ``candidate``, ``fold:K``, or ``all``: nothing is held out.
    model : str
        See `lunatrain.models`.
    epochs, samples : int
        Epochs, and samples of each; 0 samples takes every training crop once.
    batch_size : int
        Samples a step.
    ratio : int
        Negatives for each positive; 0 does not balance. Of several classes 1 draws each alike.
    shuffle : {"all", "shards"}
        Order of an unbalanced epoch: all crops mixed, or those of some shards at a time, for a store larger than RAM.
    with_others : bool
        Whether crops that are no nodules, and so have no label, are half of the negatives (the book, chapter 14).
    finetune : int
        Last stages of the model that learn, the linear layer being one; 0 trains all.
    augment : str
        Comma-separated transforms, see `lunatrain.augment`; empty for none.
    optimizer : {"adamw", "adam", "sgd"}
        With `weight_decay`, and for SGD `momentum`.
    lr : float
        Learning rate, the highest one where `schedule` is one-cycle.
    schedule : {"one-cycle", "plateau", "constant"}
        How the learning rate goes; plateau lowers it where the validation's score stands still (`lunatrain.loop`).
    label_smoothing : float
        Share of the target that is spread over all classes.
    ema : float
        Decay of the averaged weights that are validated and kept; 0 for none.
    clip_grad : float
        Greatest norm of the gradient; 0 for no limit.
    patience : int
        Epochs without a better score after which training stops; 0 never stops.
    keep_best : int
        Best epochs whose weights are kept; more than one in files of their own, beside best.pt.
    amp : {"auto", "bf16", "fp16", "off"}
        Mixed precision; auto is bf16 or fp16 on CUDA, off on a CPU.
    compile : bool
        Whether to `torch.compile` the model.
    save_steps : int
        Steps between two checkpoints within an epoch.
    seed : int
        Fixes initial weights, orders, augmentation and dropout.
    """

    target: str = "is_nodule"
    classes: tuple[str, ...] = ()
    split: str = "series"
    model: str = "residual"
    epochs: int = 10
    samples: int = 0
    batch_size: int = 32
    ratio: int = 1
    shuffle: Literal["all", "shards"] = "all"
    with_others: bool = False
    finetune: int = 0
    augment: str = "flip,rotate"
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 0.05
    schedule: Literal["one-cycle", "plateau", "constant"] = "one-cycle"
    label_smoothing: float = 0.05
    ema: float = 0.99
    clip_grad: float = 1.0
    patience: int = 0
    keep_best: int = 1
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    compile: bool = False
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        _require(self.samples >= 0, "samples", self.samples, "0 or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _require(self.ratio >= 0, "ratio", self.ratio, "0 or more")
        _require(
            self.ratio <= 1 or self.target != SUBTYPE, "ratio", self.ratio, "1: of several classes each is drawn alike"
        )
        _require(self.shuffle in ("all", "shards"), "shuffle", self.shuffle, "all or shards")
        _require(
            self.shuffle == "all" or not self.ratio,
            "shuffle",
            self.shuffle,
            "all, or --no-balanced: balanced sampling draws from all shards",
        )
        _require(self.finetune >= 0, "finetune", self.finetune, "0 or more")
        _require(self.optimizer in ("adamw", "adam", "sgd"), "optimizer", self.optimizer, "adamw, adam or sgd")
        schedules = ("one-cycle", "plateau", "constant")
        _require(self.schedule in schedules, "schedule", self.schedule, "one-cycle, plateau or constant")
        _require(self.keep_best >= 1, "keep_best", self.keep_best, "1 or more")
        _require(0 < self.lr <= 100, "lr", self.lr, "above 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "0 to below 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "0 to below 1")
        _require(0 <= self.ema < 1, "ema", self.ema, "0 to below 1")
        _require(self.amp in ("auto", "bf16", "fp16", "off"), "amp", self.amp, "auto, bf16, fp16 or off")
        _require(self.patience >= 0, "patience", self.patience, "0 or more")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.save_steps >= 1, "save_steps", self.save_steps, "1 or more")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)


BOOK = TrainConfig(
    model="luna",
    epochs=1,
    batch_size=32,
    ratio=0,
    augment="",
    optimizer="sgd",
    lr=0.001,
    momentum=0.99,
    weight_decay=0.0,
    label_smoothing=0.0,
    schedule="constant",
    ema=0.0,
    clip_grad=0.0,
    split="candidate",
)

PRESETS = {
    "book-ch11": BOOK,
    "book-ch12": replace(BOOK, ratio=1, samples=200_000, augment="flip,offset,scale,rotate,noise"),
}
"""The book's settings: chapter 11 as it trains first, chapter 12 balanced and augmented."""

MALIGNANCY = TrainConfig(target="is_malignant", with_others=True, finetune=2, ema=0.0)
"""What `lunatrain mal` starts from."""


Config = TypeVar("Config", bound=TrainConfig)


def config_from_json(value: dict[str, Any], kind: type[Config]) -> Config:
    """Return the settings that `to_json` of this kind gave.

    Raises
    ------
    UsageError
        A setting this version does not know.
    """
    strange = sorted(set(value) - {item.name for item in fields(kind)})
    if strange:
        message = (
            f"the run has a setting {strange[0]!r} that this lunatrain does not know; use the version that made it"
        )
        raise UsageError(message)
    return kind(**value | {"classes": tuple(value.get("classes", ()))})  # a list in JSON
