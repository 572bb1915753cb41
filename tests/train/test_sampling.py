"""Orders of rows: laws that hold for every seed, epoch, step and number of processes."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunatrain.errors import UsageError
from lunatrain.sampling import (
    EpochPlan,
    InOrder,
    Rows,
    Sampler,
    ShardShuffled,
    Shuffled,
    balanced,
    row_labels,
    select_rows,
)

SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 30)
COUNTS = st.integers(1, 60)


def manifest() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "split_series": ["train"] * 6 + ["val"] * 2,
            "split_candidate": ["val", *["train"] * 7],
            "fold": np.array([0, 0, 1, 1, 1, 3, 3, 3], dtype=np.int16),
            "is_nodule": [True, False, False, True, False, False, True, False],
            "is_malignant": pd.array([True, None, None, False, None, None, None, None], dtype="boolean"),
        }
    )


@pytest.mark.parametrize(
    ("split", "part", "label", "expected"),
    [
        ("series", "train", None, [0, 1, 2, 3, 4, 5]),
        ("series", "val", None, [6, 7]),
        ("series", "all", None, list(range(8))),
        ("all", "train", None, list(range(8))),
        ("all", "val", "is_malignant", [0, 3]),
        ("candidate", "val", None, [0]),
        ("fold:1", "val", None, [2, 3, 4]),
        ("fold:1", "train", None, [0, 1, 5, 6, 7]),
        ("series", "train", "is_malignant", [0, 3]),
        ("fold:3", "val", "is_nodule", [5, 6, 7]),
    ],
)
def test_select_rows(split: str, part: str, label: str | None, expected: list[int]):
    rows = select_rows(manifest(), split, part, label)
    assert rows.dtype == np.int64
    assert rows.tolist() == expected


@pytest.mark.parametrize(
    ("split", "part", "label", "text"),
    [
        ("fold:2", "val", None, "no fold 2, only 0, 1, 3"),
        ("fold:x", "val", None, "split must be series, candidate, fold:K or all, got 'fold:x'"),
        ("random", "val", None, "split must be"),
        ("series", "test", None, "part must be one of train, val, all"),
        ("series", "val", "is_malignant", "no val crop of split series has is_malignant"),
        ("series", "val", "is_round", "no label 'is_round', only is_padded, is_nodule, is_malignant"),
        ("series", "val", "fold", "no label 'fold'"),
    ],
)
def test_select_rows_refuses(split: str, part: str, label: str | None, text: str):
    with pytest.raises(UsageError, match=text) as error:
        select_rows(manifest(), split, part, label)
    assert "\n" not in str(error.value)


def test_empty_part():
    with pytest.raises(UsageError, match="split series has no val crops among the store's 6"):
        select_rows(manifest().iloc[:6], "series", "val")


def test_row_labels():
    assert row_labels(manifest(), np.array([6, 0, 1, 6])).tolist() == [1, 1, 0, 1]
    assert row_labels(manifest(), np.array([0, 3]), "is_malignant").tolist() == [1, 0]
    with pytest.raises(UsageError, match="1 of 2 crops have no is_malignant"):
        row_labels(manifest(), np.array([0, 1]), "is_malignant")


def rows_of(count: int) -> Rows:
    return np.arange(count, dtype=np.int64) * 3 + 1


@given(SEEDS, EPOCHS, COUNTS)
def test_shuffled_is_a_permutation_of_its_own_each_epoch(seed: int, epoch: int, count: int):
    sampler = Shuffled(rows_of(count), seed)
    order = sampler.order(epoch)
    assert sorted(order) == rows_of(count).tolist()
    np.testing.assert_array_equal(order, Shuffled(rows_of(count), seed).order(epoch))
    if count > 20:
        assert (order != sampler.order(epoch + 1)).any()
        assert (order != Shuffled(rows_of(count), seed + 1).order(epoch)).any()


@given(SEEDS, COUNTS, st.integers(1, 150))
def test_no_row_comes_twice_before_all_came(seed: int, count: int, num_samples: int):
    sampler = Shuffled(rows_of(count), seed, num_samples)
    orders = [sampler.order(epoch) for epoch in range(5)]
    assert {len(order) for order in orders} == {num_samples} == {len(sampler)}
    stream = np.concatenate(orders)
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == rows_of(count).tolist()


@given(SEEDS, EPOCHS, st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_shards_come_window_by_window(seed: int, epoch: int, shard_rows: list[int], window: int, data: st.DataObject):
    total = sum(shard_rows)
    chosen = data.draw(st.sets(st.integers(0, total - 1), min_size=1)) if total else set()
    rows = np.array(sorted(chosen), dtype=np.int64)
    sampler = ShardShuffled(rows, seed, shard_rows=tuple(shard_rows), window=window)
    if not len(rows):
        return
    order = sampler.order(epoch)
    assert sorted(order) == rows.tolist()
    owner = np.searchsorted(np.cumsum(shard_rows), order, side="right")
    for at, shard in enumerate(owner):  # between two rows of a shard come only rows of its window
        last = np.flatnonzero(owner == shard)[-1]
        assert len(set(owner[at : last + 1])) <= window


@given(SEEDS, EPOCHS)
def test_rows_within_a_window_are_mixed(seed: int, epoch: int):
    order = ShardShuffled(rows_of(40), seed, shard_rows=(60, 60)).order(epoch)
    assert sorted(order) == rows_of(40).tolist()
    assert (order != rows_of(40)).any()
    assert 0 < np.count_nonzero(np.diff(order[:20]) < 0) < 19


def test_shards_that_do_not_hold_the_rows():
    with pytest.raises(UsageError, match="row 5 lies in none of the shards, which have 5 rows"):
        ShardShuffled(np.array([5]), 0, shard_rows=(2, 3))


@given(SEEDS, EPOCHS, COUNTS, COUNTS, st.integers(1, 5), st.integers(1, 200))
def test_balanced_is_exact(seed: int, epoch: int, positives: int, negatives: int, ratio: int, num_samples: int):
    positive_rows, negative_rows = rows_of(positives), rows_of(negatives) + 1
    order = balanced(positive_rows, negative_rows, seed, num_samples, ratio).order(epoch)
    assert len(order) == num_samples
    is_positive = np.isin(order, positive_rows)
    np.testing.assert_array_equal(is_positive, np.arange(num_samples) % (ratio + 1) == 0)
    for rows, got in ((positive_rows, order[is_positive]), (negative_rows, order[~is_positive])):
        counts = np.unique_counts(got).counts
        assert len(counts) == min(len(rows), len(got))  # none comes again before all came
        assert not len(counts) or counts.max() - (counts.min() if len(counts) == len(rows) else 1) <= 1


def test_balanced_takes_the_books_places():
    lists = balanced(rows_of(3), rows_of(4) + 1, 5, 100)
    positives, negatives = lists.order(2)[0:6:2], lists.order(2)[1:8:2]
    for ratio in (1, 2, 3):
        order = balanced(rows_of(3), rows_of(4) + 1, 5, 50, ratio).order(2)
        for index, row in enumerate(order):  # the book's arithmetic, chapter 12
            place = index // (ratio + 1)
            taken = negatives[(index - 1 - place) % 4] if index % (ratio + 1) else positives[place % 3]
            assert row == taken


@pytest.mark.parametrize(
    ("positives", "negatives", "ratio", "text"),
    [(0, 3, 1, "needs positive crops"), (3, 0, 1, "needs negative crops"), (3, 3, 0, "must be 1 or more, got 0")],
)
def test_balanced_refuses(positives: int, negatives: int, ratio: int, text: str):
    with pytest.raises(UsageError, match=text):
        balanced(rows_of(positives), rows_of(negatives), 0, 10, ratio)


def samplers(seed: int, count: int) -> list[Sampler]:
    rows = np.arange(count, dtype=np.int64)
    shuffled = [
        Shuffled(rows, seed),
        Shuffled(rows, seed, 2 * count + 3),
        ShardShuffled(rows, seed, shard_rows=(count,)),
    ]
    return [InOrder(rows), *shuffled, balanced(rows, rows + count, seed, 77, 2)]


@given(SEEDS, EPOCHS, COUNTS, st.integers(1, 20), st.data())
def test_resumed_goes_on_as_it_would_have(seed: int, epoch: int, count: int, size: int, data: st.DataObject):
    for number in range(len(samplers(seed, count))):
        plan = EpochPlan(samplers(seed, count)[number], size)
        through = [rows.tolist() for rows in plan.batches(epoch)]
        assert len(through) == len(plan)
        step = data.draw(st.integers(0, len(plan)))
        again = EpochPlan(samplers(seed, count)[number], size)
        assert [rows.tolist() for rows in again.batches(epoch, step)] == through[step:]


@given(SEEDS, EPOCHS, COUNTS, st.integers(1, 4), st.integers(1, 5))
def test_all_ranks_together_are_one_process(seed: int, epoch: int, count: int, world: int, each: int):
    for sampler in samplers(seed, count):
        alone = list(EpochPlan(sampler, world * each).batches(epoch))
        plans = [EpochPlan(sampler, world * each, rank, world) for rank in range(world)]
        assert {plan.rank_batch_size for plan in plans} == {each}
        assert {len(plan) for plan in plans} == {len(alone)}  # a run may go on with another number of processes
        for batch, parts in zip(alone, zip(*(plan.batches(epoch) for plan in plans), strict=True), strict=True):
            assert len(set(map(len, parts))) == 1  # equal shares, or gradients are not the batch's
            together = sorted(np.concatenate(parts))
            more = np.resize(sampler.order(epoch), -len(batch) % world)
            assert together == sorted([*batch, *(more if batch is alone[-1] else [])])


def test_a_short_last_batch_is_kept():
    plan = EpochPlan(InOrder(np.arange(10)), 4)
    assert [rows.tolist() for rows in plan.batches(0)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    plans = [EpochPlan(InOrder(np.arange(9)), 4, rank, 2) for rank in (0, 1)]
    assert [list(plan.batches(0))[-1].tolist() for plan in plans] == [[8], [0]]  # filled up from the beginning


@pytest.mark.parametrize(
    ("count", "size", "rank", "world", "text"),
    [
        (0, 4, 0, 1, "at least 1 sample"),
        (4, 0, 0, 1, "at least 1 sample"),
        (9, 4, 0, 3, "batch size 4 must be a multiple of 3 processes"),
        (9, 4, 2, 2, "rank 2"),
    ],
)
def test_plan_refuses(count: int, size: int, rank: int, world: int, text: str):
    with pytest.raises(UsageError, match=text):
        EpochPlan(InOrder(np.arange(count)), size, rank, world)
