"""Which classifier learns most in the same time, the book's with the book's recipe or "residual".

    python benchmarks/model_choice.py STORE [--test STORE] [--seconds 120] [--arms luna,residual] [--set lr=0.001]

Each arm trains for so many seconds of one thread's own CPU time, so that neighbours on the machine count little, on the
held-in series of a store: one nodule for one negative, augmented alike. Then come the figures of the held-out series,
also on the way, and with `--test` those of all crops of another store. Make the stores as

    lunaprep phantom fine --scans 90 --size 64 192 192 --hard --seed 31
    lunaprep build --data fine --out store --no-volumes

The first lines give samples/s of a training step: channels first, channels last, and channels last in bfloat16.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lunaprep.store.reader import open_store
from lunatrain.augment import BOOK, Augmentation, augment
from lunatrain.data import CropLoader
from lunatrain.mapping import open_crops
from lunatrain.metrics import BinaryMetrics, binary_metrics
from lunatrain.models import build_model, prepare_for
from lunatrain.sampling import EpochPlan, InOrder, Rows, balanced, row_labels, select_rows

EPOCH = 2048
BATCH_SIZE = 32
WARM_UP = 0.2
ROUNDS = 4
SHOWS = 4


@dataclass(frozen=True)
class Recipe:
    """How an arm trains."""

    model: str
    optimizer: str
    lr: float
    weight_decay: float = 0.0
    one_cycle: bool = False
    smoothing: float = 0.0
    augmentation: Augmentation = BOOK


ARMS = {
    "luna": Recipe("luna", "sgd", 0.001),
    "luna-adamw": Recipe("luna", "adamw", 0.001, 0.05, one_cycle=True, smoothing=0.05),
    "residual": Recipe("residual", "adamw", 0.002, 0.05, one_cycle=True, smoothing=0.05),
}


class Crops:
    """The crops of a store with their labels."""

    def __init__(self, path: Path) -> None:
        store = open_store(path)
        self.manifest = store.manifest
        self.shape = store.crop_shape
        self.labels = row_labels(self.manifest, np.arange(len(self.manifest)))
        self._map = open_crops(store)

    def batches(self, plans: Iterator[tuple[EpochPlan, int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Crops and labels, through a loader of their own."""
        loader = CropLoader(self._map, BATCH_SIZE, deliver="float32")
        for plan, epoch in plans:
            for batch in loader.batches(plan.batches(epoch)):
                yield batch.crops, torch.from_numpy(self.labels[batch.rows])

    def endless(self, rows: Rows, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Balanced batches without end."""
        positive = self.labels[rows] == 1
        plan = EpochPlan(balanced(rows[positive], rows[~positive], seed, EPOCH), BATCH_SIZE)
        return self.batches((plan, epoch) for epoch in range(2**31))


def figures(model: nn.Module, crops: Crops, rows: Rows) -> BinaryMetrics:
    """The figures of some rows."""
    model.eval()
    with torch.inference_mode():
        batches = crops.batches(iter([(EpochPlan(InOrder(rows), BATCH_SIZE), 0)]))
        scored = [(model(batch).softmax(1)[:, 1], truth) for batch, truth in batches]
    model.train()
    scores, labels = (torch.cat(parts).numpy() for parts in zip(*scored, strict=True))
    return binary_metrics(labels, scores)


def one_cycle(progress: float) -> float:
    """Share of the highest learning rate at a share of the run: up on a line, down on a cosine."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.04)
    return max(0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)), 0.002)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer; weights alone decay."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), recipe.lr, momentum=0.99)
    weights: dict[str, Any] = {"params": [p for p in model.parameters() if p.ndim > 1]}
    others: dict[str, Any] = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([weights, others], recipe.lr, weight_decay=recipe.weight_decay)


def train(
    recipe: Recipe, crops: Crops, seconds: float, seed: int, show: Callable[[float, int, nn.Module], None]
) -> nn.Module:
    """Train one arm, and show it on the way."""
    torch.manual_seed(seed)
    model = prepare_for("cpu", build_model(recipe.model, 2, crops.shape))
    optimizer = make_optimizer(recipe, model)
    random = torch.Generator().manual_seed(seed)
    spent, shown, samples = 0.0, 0, 0
    for batch, labels in crops.endless(select_rows(crops.manifest, "series", "train"), seed):
        started = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (one_cycle(spent / seconds) if recipe.one_cycle else 1.0)
        logits = model(augment(batch, recipe.augmentation, random))
        optimizer.zero_grad()
        cross_entropy(logits, labels, label_smoothing=recipe.smoothing).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        samples += len(labels)
        spent += time.process_time() - started
        if spent >= seconds * (shown + 1) / SHOWS:
            shown += 1
            show(spent, samples, model)
        if spent >= seconds:
            break
    return model


def speed(name: str, channels_last: bool, bfloat16: bool) -> float:
    """Samples/s of a training step of `BATCH_SIZE`, best of some."""
    model = build_model(name)
    model = prepare_for("cpu", model) if channels_last else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    crops, labels = torch.randn(BATCH_SIZE, 1, 32, 48, 48) * 500, torch.arange(BATCH_SIZE) % 2
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(crops)
        cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - started)
    return BATCH_SIZE / min(times)


def show_speeds(names: list[str]) -> None:
    """Print parameters and samples/s of each model."""
    print(f"{'model':12s} {'parameters':>10s} {'first/s':>8s} {'last/s':>8s} {'bf16/s':>8s}")
    for name in names:
        count = sum(parameter.numel() for parameter in build_model(name).parameters())
        rates = [speed(name, *kind) for kind in ((False, False), (True, False), (True, True))]
        print(f"{name:12s} {count:10,d} " + " ".join(f"{rate:8.1f}" for rate in rates), flush=True)


def changed(recipe: Recipe, changes: list[str]) -> Recipe:
    """Set fields of a recipe from NAME=VALUE."""
    for change in changes:
        name, _, value = change.partition("=")
        new: Any = Augmentation.parse(value) if name == "augmentation" else json.loads(value)
        recipe = replace(recipe, **{name: new})
    return recipe


def print_line(name: str, spent: float, samples: int, found: BinaryMetrics) -> None:
    """Print a row of the table."""
    shares = " ".join(f"{x:7.4f}" for x in (found.auc, found.average_precision, found.f1, found.best_f1))
    print(f"{name:16s} {spent:7.0f} {samples:8,d} {shares}", flush=True)


def compare(arms: dict[str, Recipe], given: argparse.Namespace) -> None:
    """Train each arm and print the table."""
    crops = Crops(given.store)
    held_out = select_rows(crops.manifest, "series", "val")
    print(f"{'arm':16s} {'seconds':>7s} {'samples':>8s} {'AUC':>7s} {'AP':>7s} {'F1':>7s} {'best F1':>7s}")
    for name, recipe in arms.items():
        last = (0.0, 0)

        def show(spent: float, samples: int, model: nn.Module, name: str = name) -> None:
            nonlocal last
            last = (spent, samples)
            print_line(name, spent, samples, figures(model, crops, held_out))

        model = train(recipe, crops, given.seconds, given.seed, show)
        if given.test:
            test = Crops(given.test)
            print_line(f"{name} test", *last, figures(model, test, np.arange(len(test.manifest))))


def main() -> None:
    """Compare the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--test", type=Path, help="another store, all of whose crops are scored at the end")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--arms", default="luna,residual", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="a field of all recipes, as lr=0.001")
    parser.add_argument("--no-speed", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    arms = {name: changed(ARMS[name], given.set) for name in given.arms.split(",")}
    if not given.no_speed:
        show_speeds(sorted({recipe.model for recipe in arms.values()}))
    compare(arms, given)


if __name__ == "__main__":
    main()
