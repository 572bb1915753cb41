"""Which rows train and which validate."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd


def split_by_series(largest_mm: Mapping[str, float], patients: Mapping[str, str], val_stride: int) -> dict[str, str]:
    """Give each series to ``train`` or ``val``; the scans of one patient stay together.

    Patients are sorted by their largest nodule, descending (then by name), and every `val_stride`-th, the first
    among them, validates: both sides see nodules of all sizes.

    Parameters
    ----------
    largest_mm : mapping of str to float
        Diameter of the largest nodule of each series, mm; 0 where it has none.
    patients : mapping of str to str
        Patient of each series, where known; a series without one stands for itself.
    val_stride : int
        Every how many-th patient validates.

    Examples
    --------
    >>> split_by_series({"a": 9.0, "b": 3.0, "c": 5.0}, {"b": "p", "a": "p"}, 2)
    {'a': 'val', 'b': 'val', 'c': 'train'}
    """
    groups: dict[str, list[str]] = {}
    for series_uid in sorted(largest_mm):
        groups.setdefault(patients.get(series_uid, series_uid), []).append(series_uid)
    size = {name: max(largest_mm[uid] for uid in uids) for name, uids in groups.items()}
    ranked = sorted(groups, key=lambda name: (-size[name], name))
    validating = set(ranked[::val_stride])
    return {uid: "val" if name in validating else "train" for name, uids in groups.items() for uid in uids}


def split_by_name(series_uids: Sequence[str], val_stride: int) -> dict[str, str]:
    """Split as the book's chapters 13 and 14: every `val_stride`-th of the sorted series validates.

    Knows nothing of patients; kept for comparison with published figures.
    """
    return {uid: "train" if i % val_stride else "val" for i, uid in enumerate(sorted(set(series_uids)))}


def split_by_rank(size_rank: npt.NDArray[np.int64], val_stride: int) -> pd.Categorical:
    """Split as the book's chapters 11 and 12: every `val_stride`-th candidate of the size-sorted list validates.

    A scan, and even one nodule with two candidates, then lies on both sides: the score is too good.
    """
    codes = (size_rank % val_stride == 0).astype(np.int8)
    return pd.Categorical.from_codes(codes, pd.Index(["train", "val"], dtype="str"))


def largest_nodules(series_uids: Sequence[str], annotations: pd.DataFrame) -> dict[str, float]:
    """Diameter of the largest annotation of each series, mm; 0 where it has none."""
    largest = annotations.groupby("series_uid")["diameter_mm"].max()
    return {uid: float(largest.get(uid, 0.0)) for uid in series_uids}
