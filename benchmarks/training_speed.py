"""Samples/s of an epoch of the book's model, trained by lunatrain and in the plain way, with the same losses.

    python benchmarks/training_speed.py STORE [--samples 256] [--rounds 3] [--amp off,bf16]

The plain way is what one writes first, and what the book's chapter 11 does: a Dataset that opens a crop for each
`__getitem__`, a DataLoader with two workers, float32 tensors of channels first, a loss for each sample kept in a table
of metrics. Both train LunaModel from the same weights on the same rows in the same order, batches of 32, SGD 0.001 with
momentum 0.99; rounds alternate. Losses are compared step by step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lunaprep.store.reader import Store, open_store
from lunatrain.config import BOOK
from lunatrain.loop import Trainer
from lunatrain.models import build_model
from lunatrain.sampling import Rows
from lunatrain.training import TrainOptions, open_training

BATCH_SIZE = 32
SEED = 1


class PlainDataset(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """A crop for each index, read when asked for."""

    def __init__(self, store: Store, rows: Rows) -> None:
        self.store, self.rows = store, rows
        self.is_nodule = store.manifest["is_nodule"].to_numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Crop (1, slices, rows, columns), its two classes as 0 and 1, its row."""
        row = int(self.rows[index])
        crop = torch.from_numpy(self.store.crops([row])[0]).unsqueeze(0)
        truth = bool(self.is_nodule[row])
        return crop, torch.tensor([not truth, truth], dtype=torch.long), row


class PlainModel(nn.Module):
    """The model with the probabilities the book returns beside the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities."""
        logits = self.model(crops)
        return logits, torch.softmax(logits, dim=1)


def plain_epoch(store: Store, rows: Rows, weights: dict[str, Any]) -> tuple[float, list[float]]:
    """Seconds of an epoch and the loss of each step, in the plain way."""
    inner = build_model("luna", 2, store.crop_shape)
    inner.load_state_dict(weights)
    model = PlainModel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=BOOK.lr, momentum=BOOK.momentum)
    loss_function = nn.CrossEntropyLoss(reduction="none")
    table = torch.zeros(3, len(rows))
    losses = []
    started = time.perf_counter()
    loader = DataLoader(PlainDataset(store, rows), batch_size=BATCH_SIZE, num_workers=2)
    model.train()
    for number, (crops, truths, _) in enumerate(loader):
        optimizer.zero_grad()
        logits, probability = model(crops)
        each = loss_function(logits, truths[:, 1])
        place = slice(number * BATCH_SIZE, number * BATCH_SIZE + len(crops))
        table[0, place] = truths[:, 1].float()
        table[1, place] = probability[:, 1].detach()
        table[2, place] = each.detach()
        loss = each.mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return time.perf_counter() - started, losses


def our_epoch(trainer: Trainer, weights: dict[str, Any]) -> tuple[float, list[float], float]:
    """Seconds of an epoch, the loss of each step, and the share of waiting for data, by lunatrain's loop."""
    fresh = Trainer(trainer.run)
    fresh.model.load_state_dict(weights)
    losses, before = [], 0.0
    started = time.perf_counter()
    for batch in fresh.run.loader.batches(fresh.run.plan.batches(0)):
        fresh.step(batch)
        total = fresh.progress.sums["loss"]
        losses.append((total - before) / len(batch.rows))
        before = total
    return time.perf_counter() - started, losses, fresh.run.loader.wait_share


def show(name: str, count: int, seconds: list[float], plain: list[float]) -> None:
    """Print a row of the table."""
    rate, base = count / statistics.median(seconds), count / statistics.median(plain)
    print(f"{name:34s} {rate:8.1f} {max(count / s for s in seconds):8.1f} {rate / base:7.2f}", flush=True)


def compare(given: argparse.Namespace, run: Path) -> None:
    """Alternate the arms and print the table."""
    store = open_store(given.store)
    base = replace(BOOK, samples=given.samples, split="series", seed=SEED)
    trainers = {
        amp: open_training(TrainOptions(given.store, run, device="cpu"), replace(base, amp=amp))
        for amp in given.amp.split(",")
    }
    first = next(iter(trainers.values()))
    weights = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    rows = np.concatenate(list(_batches(first)))
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *trainers)}
    for _ in range(given.rounds):
        spent, plain_losses = plain_epoch(store, rows, weights)
        seconds["plain"].append(spent)
        for amp, trainer in trainers.items():
            spent, losses, waiting = our_epoch(trainer, weights)
            seconds[amp].append(spent)
            apart = max(abs(a - b) / abs(b) for a, b in zip(losses, plain_losses, strict=True))
            print(f"amp {amp}: largest difference of a step's loss {apart:.1e}, waiting for data {waiting:.2%}")
    print(f"{'':34s} {'median/s':>8s} {'best/s':>8s} {'ratio':>7s}")
    show("plain way, float32", len(rows), seconds["plain"], seconds["plain"])
    for amp in trainers:
        show(f"lunatrain, amp {amp}", len(rows), seconds[amp], seconds["plain"])


def _batches(trainer: Trainer) -> Iterator[Rows]:
    return trainer.run.plan.batches(0)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--amp", default="off", help="off, bf16, or both with a comma")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(given, Path(folder) / "run")


if __name__ == "__main__":
    main()
