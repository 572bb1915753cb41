"""Where crops lie, and what is in them, against naive rules."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.crops import cut_crop, is_padded, window_starts

side = st.integers(1, 12)
shape = st.tuples(side, side, side)
EDGES = ["shift", "pad"]


def naive_start(center: int, length: int, size: int, edge: str) -> int:
    """One axis, step by step."""
    start = center - size // 2
    if edge == "pad":
        return start
    if size >= length:  # no room: move until the whole scan is in
        while start > 0:
            start -= 1
        while start + size < length:
            start += 1
        return start
    while start < 0:
        start += 1
    while start + size > length:
        start -= 1
    return start


@st.composite
def centers_in(draw):
    scan = draw(shape)
    points = draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in scan)), max_size=8))
    return scan, points


@pytest.mark.parametrize("edge", EDGES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=centers_in(), crop=shape)
def test_starts_equal_the_rule_axis_by_axis(edge, case, crop):
    scan, centers = case
    got = window_starts(np.array(centers, dtype=np.int64).reshape(-1, 3), scan, crop, edge)
    expected = [
        [naive_start(c, n, size, edge) for c, n, size in zip(center, scan, crop, strict=True)] for center in centers
    ]
    assert got.tolist() == expected
    assert got.dtype == np.int64


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=centers_in(), crop=shape, edge=st.sampled_from(EDGES))
def test_every_crop_holds_its_centre_voxel(case, crop, edge):
    scan, centers = case
    for center, start in zip(centers, window_starts(centers, scan, crop, edge) if centers else [], strict=True):
        for at, first, size in zip(center, start, crop, strict=True):
            assert first <= at < first + size


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=centers_in(), crop=shape, edge=st.sampled_from(EDGES))
def test_is_padded_says_whether_a_voxel_lies_outside(case, crop, edge):
    scan, centers = case
    starts = window_starts(np.array(centers, dtype=np.int64).reshape(-1, 3), scan, crop, edge)
    expected = [
        any(not 0 <= first + k < n for first, n, size in zip(start, scan, crop, strict=True) for k in range(size))
        for start in starts.tolist()
    ]
    assert is_padded(starts, scan, crop).tolist() == expected


SIDES = [way for way in itertools.product((-1, 0, 1), repeat=3) if any(way)]


@pytest.mark.parametrize("way", SIDES, ids=str)
def test_crop_at_border_is_shifted_not_padded(way):
    scan, crop = (20, 30, 40), (4, 6, 8)
    center = [0 if w < 0 else n - 1 if w > 0 else n // 2 for w, n in zip(way, scan, strict=True)]
    start = window_starts([center], scan, crop, "shift")
    for first, w, n, size in zip(start[0], way, scan, crop, strict=True):
        assert first == (0 if w < 0 else n - size if w > 0 else n // 2 - size // 2)
    assert not is_padded(start, scan, crop)[0]


@pytest.mark.parametrize("way", SIDES, ids=str)
def test_padded_crop_at_border_keeps_its_centre_in_the_middle(way):
    scan, crop = (20, 30, 40), (4, 6, 8)
    center = [0 if w < 0 else n - 1 if w > 0 else n // 2 for w, n in zip(way, scan, strict=True)]
    start = window_starts([center], scan, crop, "pad")
    assert (start[0] + np.array(crop) // 2).tolist() == center
    assert is_padded(start, scan, crop)[0]
    voxels = np.arange(np.prod(scan), dtype=np.float32).reshape(scan)
    out = np.empty(crop, dtype=np.float32)
    cut_crop(voxels, 0, tuple(start[0].tolist()), out, -5.0)
    assert out[2, 3, 4] == voxels[tuple(center)]
    for axis, w in enumerate(way):
        if w < 0:
            assert (np.take(out, 0, axis) == -5.0).all()
        if w > 0:
            assert (np.take(out, -1, axis) == -5.0).all()


@pytest.mark.parametrize("index", range(5))
def test_thin_scan_is_whole_in_every_shifted_crop(index):
    scan, crop = (5, 30, 30), (32, 8, 8)
    start = window_starts([[index, 15, 15]], scan, crop, "shift")
    assert start[0][0] == index - 16  # centred as it stands: the whole scan is in
    assert is_padded(start, scan, crop)[0]
    voxels = np.arange(np.prod(scan), dtype=np.int16).reshape(scan)
    out = np.empty(crop, dtype=np.int16)
    cut_crop(voxels, 0, tuple(start[0].tolist()), out, -1000)
    column = out[:, 4, 4]
    assert column[column != -1000].tolist() == voxels[:, 15, 15].tolist()


def test_scan_exactly_as_large_as_the_crop_is_not_padded():
    starts = window_starts([[0, 0, 0], [3, 4, 5]], (4, 5, 6), (4, 5, 6), "shift")
    assert starts.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert not is_padded(starts, (4, 5, 6), (4, 5, 6)).any()


def naive_crop(voxels: np.ndarray, start: tuple[int, ...], crop: tuple[int, ...], fill: float) -> np.ndarray:
    """Pad generously, then slice."""
    margin = max(*crop, *voxels.shape) + 1
    wide = np.pad(voxels.astype(np.float64), margin, constant_values=fill)
    return wide[tuple(slice(margin + s, margin + s + n) for s, n in zip(start, crop, strict=True))]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    case=centers_in(),
    crop=shape,
    edge=st.sampled_from(EDGES),
    dtypes=st.sampled_from(
        [("<i2", "<i2"), ("<i2", "<f4"), ("u1", "<i2"), ("<f4", "<f4"), ("<f8", "<f4"), (">i2", "<f4")]
    ),
    data=st.data(),
)
def test_cut_crop_equals_padding_and_slicing_from_any_slab_that_holds_it(case, crop, edge, dtypes, data):
    scan, centers = case
    rng = np.random.default_rng(7)
    voxels = rng.integers(0, 200, scan).astype(dtypes[0])
    for start in window_starts(np.array(centers, dtype=np.int64).reshape(-1, 3), scan, crop, edge).tolist():
        first = data.draw(st.integers(0, max(0, start[0])))
        stop = data.draw(st.integers(min(start[0] + crop[0], scan[0]), scan[0]))
        out = np.full(crop, 77, dtype=dtypes[1])
        cut_crop(voxels[first:stop], first, tuple(start), out, -1000)
        assert (out == naive_crop(voxels, tuple(start), crop, -1000)).all()


def test_cut_crop_leaves_the_scan_alone_and_fills_a_used_buffer_anew():
    voxels = np.arange(27, dtype=np.int16).reshape(3, 3, 3)
    before = voxels.copy()
    out = np.full((2, 2, 2), 99, dtype=np.int16)
    cut_crop(voxels, 0, (-1, -1, -1), out, -1000)
    assert out.ravel().tolist() == [-1000] * 7 + [0]
    cut_crop(voxels, 0, (1, 1, 1), out, -1000)
    assert (out == voxels[1:, 1:, 1:]).all()
    assert (voxels == before).all()
    assert not np.shares_memory(out, voxels)


def test_cut_crop_writes_into_one_row_of_a_batch_only():
    voxels = np.ones((4, 4, 4), dtype=np.int16)
    batch = np.zeros((3, 2, 2, 2), dtype=np.float32)
    cut_crop(voxels, 0, (1, 1, 1), batch[1], -1000)
    assert batch.sum(axis=(1, 2, 3)).tolist() == [0, 8, 0]


def test_fraction_survives_in_a_float_crop():
    voxels = np.full((2, 2, 2), 0.5, dtype=np.float64)
    out = np.empty((2, 2, 2), dtype=np.float32)
    cut_crop(voxels, 0, (0, 0, 0), out, -1000)
    assert (out == 0.5).all()
