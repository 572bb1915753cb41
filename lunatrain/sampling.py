"""Which crops, and in which order: pure functions of the manifest and of (seed, epoch, step).

So a run that is resumed goes on exactly. (numpy keeps a generator's stream the same, but for rare announced changes.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep.schema import MANIFEST_COLUMNS
from lunatrain.config import SUBTYPE
from lunatrain.errors import UsageError

Rows = npt.NDArray[np.int64]
Part = Literal["train", "val", "all"]

PARTS = ("train", "val", "all")
SPLIT_COLUMNS = {"series": "split_series", "candidate": "split_candidate"}
FOLD_PREFIX = "fold:"
WHOLE = "all"
WINDOW_SHARDS = 4


def columns_of(split: str, *labels: str) -> tuple[str, ...]:
    """Columns of the manifest that `select_rows` and `row_labels` look at; what is unknown they will refuse."""
    name = "fold" if split.startswith(FOLD_PREFIX) else SPLIT_COLUMNS.get(split)
    return tuple(column.name for column in MANIFEST_COLUMNS if column.name in (name, *labels))


def select_rows(manifest: pd.DataFrame, split: str, part: str, label: str | None = None, unit: str = "crop") -> Rows:
    """Rows of one part of a split.

    Parameters
    ----------
    manifest : DataFrame
        crops.parquet, or of its columns those of `columns_of`.
    split : str
        'series' (a patient's scans stay together), 'candidate' (as the book; leaks), 'fold:K' (LUNA16's
        cross-validation: fold K is val, the others are train), or 'all' (every part is the whole: nothing is held out).
    part : {'train', 'val', 'all'}
        Part of the split.
    label : str, optional
        Column that must be known in each row: rows where it is null are left out.
    unit : str
        What a row is, for errors.

    Returns
    -------
    ndarray, (n,) int64
        Rows of the manifest, ascending; never empty.

    Raises
    ------
    UsageError
        Unknown split, part, fold or label, or no row is left.
    """
    if part not in PARTS:
        message = f"part must be one of {', '.join(PARTS)}, got {part!r}"
        raise UsageError(message)
    is_val = _is_val(manifest, split) if split != WHOLE else None
    chosen = np.ones(len(manifest), dtype=np.bool_)
    if is_val is not None and part != "all":
        chosen = is_val if part == "val" else ~is_val
    rows = np.flatnonzero(chosen).astype(np.int64)
    if not len(rows):
        message = (
            f"split {split} has no {part} {unit}s among the store's {len(manifest)}. Take another split, or more scans"
        )
        raise UsageError(message)
    if label is not None:
        rows = rows[_column(manifest, label).notna().to_numpy()[rows]]
    if not len(rows):
        message = f"no {part} {unit} of split {split} has {label}. Build the store with the file that says it"
        raise UsageError(message)
    return rows


def row_labels(manifest: pd.DataFrame, rows: Rows, label: str = "is_nodule") -> npt.NDArray[np.int64]:
    """Labels of rows: 0 or 1, (n,) int64.

    Raises
    ------
    UsageError
        No such column, or a row whose label is not known.
    """
    values = _column(manifest, label).iloc[rows]
    if values.isna().any():
        message = f"{int(values.isna().sum())} of {len(rows)} crops have no {label}. Select rows with label={label!r}"
        raise UsageError(message)
    return values.to_numpy(dtype=np.bool_).astype(np.int64)


class Sampler(Protocol):
    """An order of rows for each epoch, the same whenever it is asked."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def order(self, epoch: int) -> Rows:
        """All rows of an epoch, in their order."""
        ...


@dataclass(frozen=True, eq=False)
class InOrder:
    """The rows as they stand, each epoch."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int) -> Rows:
        """All rows, as they stand."""
        return self.rows


@dataclass(frozen=True, eq=False)
class Shuffled:
    """All rows in random order; after the last comes the first of the next shuffle.

    Attributes
    ----------
    rows : ndarray, (n,) int64
        Rows to draw from.
    seed : int
        Same seed, same orders.
    num_samples : int, optional
        Samples of an epoch; default n. Every row comes once before any comes again, also across epochs.
    """

    rows: Rows
    seed: int
    num_samples: int | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.num_samples is None else self.num_samples

    def order(self, epoch: int) -> Rows:
        """An epoch's stretch of the endless order."""
        first = epoch * len(self)
        laps = range(first // len(self.rows), -(-(first + len(self)) // len(self.rows)))
        start = first - laps.start * len(self.rows)
        return np.concatenate([self._lap(lap) for lap in laps])[start : start + len(self)]

    def _lap(self, lap: int) -> Rows:
        return _random(self.seed, lap).permutation(self.rows)


@dataclass(frozen=True, eq=False)
class ShardShuffled(Shuffled):
    """Shards in random order, their rows mixed within a window of some shards.

    For stores larger than memory: the pages of few shards are wanted at a time, so each is read once an epoch.

    Attributes
    ----------
    shard_rows : tuple of int
        Rows of each shard, in manifest order.
    window : int
        Shards whose rows are mixed with each other.
    """

    shard_rows: tuple[int, ...] = ()
    window: int = WINDOW_SHARDS

    def __post_init__(self) -> None:
        if len(self.rows) and self.rows.max() >= sum(self.shard_rows):
            message = f"row {self.rows.max()} lies in none of the shards, which have {sum(self.shard_rows)} rows"
            raise UsageError(message)

    def _lap(self, lap: int) -> Rows:
        random = _random(self.seed, lap)
        owner = np.searchsorted(np.cumsum(self.shard_rows), self.rows, side="right")
        window = random.permutation(len(self.shard_rows))[owner] // self.window
        return self.rows[np.lexsort((random.random(len(self.rows)), window))]


@dataclass(frozen=True, eq=False)
class Mixed:
    """Groups of rows taken in turns, by a pattern that repeats.

    Each group is shuffled for each epoch and starts again where it ends.

    Attributes
    ----------
    groups : tuple of ndarray, int64
        Rows of each group.
    pattern : tuple of int
        Group of each sample of a turn.
    seed : int
        Same seed, same orders.
    num_samples : int
        Samples of an epoch.
    """

    groups: tuple[Rows, ...]
    pattern: tuple[int, ...]
    seed: int
    num_samples: int

    def __len__(self) -> int:
        return self.num_samples

    def order(self, epoch: int) -> Rows:
        """Sample by sample as the pattern says."""
        random = _random(self.seed, epoch)
        shuffled = [random.permutation(rows) for rows in self.groups]
        group = np.resize(np.asarray(self.pattern), self.num_samples)
        order = np.empty(self.num_samples, dtype=np.int64)
        for number, rows in enumerate(shuffled):
            places = np.flatnonzero(group == number)
            order[places] = np.resize(rows, len(places))
        return order


def balanced(positives: Rows, negatives: Rows, seed: int, num_samples: int, ratio: int = 1) -> Mixed:
    """One positive, then `ratio` negatives, and so on: the book's order (chapter 12).

    Raises
    ------
    UsageError
        No rows of a class, or a ratio below 1.
    """
    for name, rows in (("positive", positives), ("negative", negatives)):
        if not len(rows):
            message = f"balanced sampling needs {name} crops, there are none. Use --no-balanced, or more scans"
            raise UsageError(message)
    if ratio < 1:
        message = f"the ratio of negatives to positives must be 1 or more, got {ratio}"
        raise UsageError(message)
    return Mixed((positives, negatives), (0, *[1] * ratio), seed, num_samples)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """Cuts a sampler's orders into batches, and a batch into the shares of the processes.

    The batches of all ranks together are those of one process; so a run may go on with another number of processes. A
    place in training is three integers: seed, epoch, step.

    Each rank has as many samples of a step as the others: only then is the mean of the ranks' gradients that of the
    batch. So a short last batch that cannot be shared out is filled up with the first samples of the epoch.

    Attributes
    ----------
    sampler : Sampler
        The order of each epoch.
    batch_size : int
        Samples of a step, over all processes; a multiple of `world_size`.
    rank, world_size : int
        This process, and how many there are.
    """

    sampler: Sampler
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if len(self.sampler) < 1 or self.batch_size < 1:
            message = f"an epoch and a batch need at least 1 sample, got {len(self.sampler)} and {self.batch_size}"
            raise UsageError(message)
        if not 0 <= self.rank < self.world_size or self.batch_size % self.world_size:
            message = (
                f"batch size {self.batch_size} must be a multiple of {self.world_size} processes (rank {self.rank})"
            )
            raise UsageError(message)

    def __len__(self) -> int:
        """Steps of an epoch, the same for each rank and for any number of them."""
        return -(-len(self.sampler) // self.batch_size)

    @property
    def rank_batch_size(self) -> int:
        """Most samples of a step for one process."""
        return self.batch_size // self.world_size

    def batches(self, epoch: int, step: int = 0) -> Iterator[Rows]:
        """Rows of each step of an epoch, from `step` on: this rank's."""
        order = self.sampler.order(epoch)
        order = np.resize(order, -(-len(order) // self.world_size) * self.world_size)
        for start in range(step * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield np.ascontiguousarray(order[start : start + self.batch_size][self.rank :: self.world_size])


def _is_val(manifest: pd.DataFrame, split: str) -> npt.NDArray[np.bool_]:
    if split in SPLIT_COLUMNS:
        return (manifest[SPLIT_COLUMNS[split]] == "val").to_numpy(dtype=np.bool_)
    number = split.removeprefix(FOLD_PREFIX)
    if number == split or not number.isdecimal():
        message = f"split must be series, candidate, fold:K or all, got {split!r}"
        raise UsageError(message)
    is_val = (manifest["fold"] == int(number)).to_numpy(dtype=np.bool_)
    if not is_val.any():
        folds = ", ".join(str(fold) for fold in sorted(manifest["fold"].unique()))
        message = f"the store has no fold {number}, only {folds or 'no crops'}"
        raise UsageError(message)
    return is_val


def _column(manifest: pd.DataFrame, label: str) -> "pd.Series[bool]":
    if label not in manifest or not (label.startswith("is_") or label == SUBTYPE):
        names = (column.name for column in MANIFEST_COLUMNS)
        known = ", ".join(name for name in names if name.startswith("is_") or name == SUBTYPE)
        message = f"the store has no label {label!r}, only {known}"
        raise UsageError(message)
    return manifest[label]


def _random(seed: int, lap: int) -> np.random.Generator:
    return np.random.default_rng([seed, lap])
