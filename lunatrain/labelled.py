"""Which crops a classifier learns from and is judged on, their labels, and the order they come in."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep.store.reader import Store
from lunatrain.config import SUBTYPE, TrainConfig
from lunatrain.errors import UsageError
from lunatrain.sampling import (
    Mixed,
    Rows,
    Sampler,
    ShardShuffled,
    Shuffled,
    balanced,
    columns_of,
    row_labels,
    select_rows,
)

Labels = npt.NDArray[np.int64]

UNKNOWN, OTHER = -1, -2
MEANS_NOTHING = "such runs reach 100 % accuracy and mean nothing"
MAX_CLASSES, MAX_NAME = 64, 40
"""Kinds of a label, and characters of a name: more is no list of kinds."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Crops with labels.

    Attributes
    ----------
    rows, val_rows : ndarray, int64
        Rows of the manifest to train on, and to be judged on.
    labels : ndarray, int64
        For each row of the manifest its class, from 0; `UNKNOWN` and `OTHER` for those without one.
    classes : tuple of str
        Names of the classes; none where the label is true or false.
    notes : tuple of str
        What a user should know of them, a line each.
    """

    rows: Rows
    val_rows: Rows
    labels: Labels
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_examples(store: Store, config: TrainConfig) -> Examples:
    """Crops of a store to learn a run's target from.

    Raises
    ------
    UsageError
        The store does not have the target, or its labels are all the same.
    """
    manifest = store.columns(*columns_of(config.split, config.target, "is_nodule"))
    return _kinds(manifest, config) if config.target == SUBTYPE else _true_or_false(manifest, config)


def order_of(store: Store, examples: Examples, config: TrainConfig) -> Sampler:
    """The order of the training rows; turns the label of others into that of a negative."""
    rows, labels = examples.rows, examples.labels
    count = config.samples or len(rows)
    if config.ratio and examples.classes:
        groups = tuple(rows[labels[rows] == value] for value in range(len(examples.classes)))
        return Mixed(groups, tuple(range(len(groups))), config.seed, count)
    groups = tuple(rows[labels[rows] == value] for value in (1, 0, OTHER))
    labels[labels == OTHER] = 0
    if config.ratio and len(groups[2]):
        negatives = [1, 2] * config.ratio  # of two turns
        pattern = (0, *negatives[: config.ratio], 0, *negatives[config.ratio :])
        return Mixed(groups, pattern, config.seed, count)
    if config.ratio:
        return balanced(groups[0], groups[1], config.seed, count, config.ratio)
    if config.shuffle == "shards":
        shards = tuple(shard.rows for shard in store.shards)
        return ShardShuffled(rows, config.seed, config.samples or None, shards)
    return Shuffled(rows, config.seed, config.samples or None)


def rows_of_classes(
    manifest: pd.DataFrame, split: str, part: str, classes: Sequence[str], label: str = SUBTYPE
) -> tuple[Rows, tuple[str, ...]]:
    """Rows of a part that are of the given classes, and a line for those of others, which a network cannot name.

    Raises
    ------
    UsageError
        No such column or rows.
    """
    rows = select_known(manifest, split, part, label)
    kinds = manifest[label].iloc[rows].astype(str).to_numpy()
    strange = ~np.isin(kinds, classes)
    if not strange.any():
        return rows, ()
    names = ", ".join(sorted(map(repr, set(kinds[strange]))))
    if strange.all():
        message = (
            f"all {part} crops of split {split} are of {label} {names:.80}, the run knows {', '.join(classes)}. "
            "Take another split, or more scans"
        )
        raise UsageError(message)
    line = f"{strange.sum():,} {part} crops of {label} {names:.80} are left out: there are none to learn from"
    return rows[~strange], (line,)


def class_labels(kinds: "pd.Series[str]", classes: Sequence[str]) -> Labels:
    """Place of each row's kind among the classes, (n,) int64.

    Raises
    ------
    UsageError
        A kind that is none of them.
    """
    place = {name: number for number, name in enumerate(classes)}
    strange = kinds[~kinds.isin(list(classes))]
    if len(strange):
        message = f"{len(strange)} of {len(kinds)} crops are {strange.iloc[0]!r:.60}, expected {', '.join(classes)}"
        raise UsageError(message)
    return np.array([place[kind] for kind in kinds], dtype=np.int64)


def select_known(manifest: pd.DataFrame, split: str, part: str, label: str) -> Rows:
    """As `select_rows`; of a store without the label it says where labels come from."""
    if not manifest[label].notna().any():
        message = (
            f"the store has no {label}. lunaprep build --source lung-pet-ct-dx gives it, and a column {label} of "
            "annotations.csv"
        )
        raise UsageError(message)
    return select_rows(manifest, split, part, label)


def _kinds(manifest: pd.DataFrame, config: TrainConfig) -> Examples:
    rows = select_known(manifest, config.split, "train", config.target)
    found = tuple(sorted(set(manifest[config.target].iloc[rows].astype(str))))
    _check_names(found, config.target)
    if len(found) < 2:
        message = (
            f"all train crops with a {config.target} are {found[0]!r}: {MEANS_NOTHING}. "
            "Add scans of another kind, or take another split"
        )
        raise UsageError(message)
    classes = config.classes or found
    rows, _ = rows_of_classes(manifest, config.split, "train", classes, config.target)
    val_rows, notes = rows_of_classes(manifest, config.split, "val", classes, config.target)
    labels = np.full(len(manifest), UNKNOWN, dtype=np.int64)
    for known in (rows, val_rows):
        labels[known] = class_labels(manifest[config.target].iloc[known], classes)
    counts = np.bincount(labels[val_rows], minlength=len(classes))
    if (counts > 0).sum() < 2:
        name = classes[int(counts.argmax())]
        message = (
            f"all val crops of split {config.split} with a {config.target} are {name!r}, so nothing can be judged. "
            "Take another split (fold:K, candidate), or more scans"
        )
        raise UsageError(message)
    absent = [f"{name!r}" for name, count in zip(classes, counts, strict=True) if not count]
    if absent:
        notes = (*notes, f"no val crop is {' or '.join(absent)}: how well it is told, the figures do not say")
    return Examples(rows, val_rows, labels, classes, notes)


def _check_names(names: Sequence[str], label: str) -> None:
    wrong = [name for name in names if not name.isprintable() or not 0 < len(name.strip()) <= MAX_NAME]
    if wrong or len(names) > MAX_CLASSES:
        got = ascii(wrong[0])[:60] if wrong else f"{len(names)} kinds"
        message = f"column {label} of the store has {got}, expected at most {MAX_CLASSES} kinds with short names"
        raise UsageError(message)


def _true_or_false(manifest: pd.DataFrame, config: TrainConfig) -> Examples:
    rows = select_rows(manifest, config.split, "train", config.target)
    val_rows = select_rows(manifest, config.split, "val", config.target)
    labels = np.full(len(manifest), UNKNOWN, dtype=np.int64)
    for known in (rows, val_rows):
        labels[known] = row_labels(manifest, known, config.target)
    _check_both(labels, rows, val_rows, config)
    if config.with_others:
        train = select_rows(manifest, config.split, "train")
        others = train[(labels[train] == UNKNOWN) & ~manifest["is_nodule"].to_numpy(dtype=np.bool_)[train]]
        labels[others] = OTHER
        rows = np.sort(np.concatenate([rows, others]))
    return Examples(rows, val_rows, labels)


def _check_both(labels: Labels, rows: Rows, val_rows: Rows, config: TrainConfig) -> None:
    for part, members in (("train", rows), ("val", val_rows)):
        for value, word in ((1, "true"), (0, "false")):
            if not (labels[members] == value).any():
                why = MEANS_NOTHING if part == "train" else "nothing can be judged by them"
                message = (
                    f"no {part} crop of split {config.split} has {config.target} {word}, all are alike: {why}. "
                    "Take another split, or more scans"
                )
                raise UsageError(message)
