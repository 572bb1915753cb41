"""Grouping against a naive labelling, scipy's centres, and SimpleITK's millimetres."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from lunaprep.geometry import Geometry
from lunatrain.detect.findings import candidate_table
from lunatrain.detect.grouping import GroupingOptions, group, near, sphere_diameter
from lunatrain.errors import UsageError

STEPS = (2.0, 0.7, 0.5)
PLAIN = GroupingOptions(min_diameter_mm=0, max_diameter_mm=1e6, merge_mm=0, limit=10_000, split_below=0, weight="none")


def naive_components(mask):
    """Sets of voxels joined by faces, by flooding from each voxel."""
    left, found = {tuple(map(int, v)) for v in np.argwhere(mask)}, []
    while left:
        stack, members = [left.pop()], set()
        while stack:
            voxel = stack.pop()
            members.add(voxel)
            for axis in range(3):
                for step in (-1, 1):
                    other = tuple(v + step * (k == axis) for k, v in enumerate(voxel))
                    if other in left:
                        left.remove(other)
                        stack.append(other)
        found.append(frozenset(members))
    return found


def spots(shape, *places, value=0.9):
    volume = np.zeros(shape, dtype=np.float32)
    for place in places:
        volume[place] = value
    return volume


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, st.tuples(*[st.integers(1, 6)] * 3), elements=st.floats(0, 1, width=16)))
def test_components_are_those_of_a_naive_labelling(probability):
    # components whose centres lie within each other's spheres merge even at merge_mm 0: thin voxels forbid that here
    found = group(probability, (1e-3, 1e-3, 1e-3), GroupingOptions(**{**vars(PLAIN), "merge_mm": 1e-9}))
    naive = naive_components(probability >= 0.5)
    assert found.counts.components == len(naive)
    assert found.counts.voxels == sum(map(len, naive))
    assert found.num_voxels.sum() == found.counts.voxels
    merged = [frozenset(map(tuple, np.argwhere(found.labels == k + 1).tolist())) for k in range(len(found))]
    assert all(any(part <= whole for whole in merged) for part in naive)
    assert sorted(map(len, merged)) == sorted(found.num_voxels.tolist())
    for k, members in enumerate(merged):
        values = [probability[voxel] for voxel in members]
        assert found.score[k] == max(values)
        assert found.mean_probability[k] == pytest.approx(np.mean(values), rel=1e-6)


@pytest.mark.parametrize("weight", ["probability", "intensity", "both", "none"])
def test_centres_are_those_of_scipy(weight):
    rng = np.random.default_rng(3)
    probability = ndimage.gaussian_filter(rng.random((20, 30, 30)), 1.5)
    probability = ((probability - probability.min()) / np.ptp(probability)).astype(np.float32)
    hu = rng.integers(-3024, 3000, probability.shape).astype(np.int16)
    options = GroupingOptions(0.7, min_diameter_mm=0, max_diameter_mm=1e6, merge_mm=0, limit=999, weight=weight)
    found = group(probability, (1, 1, 1), options, hu=hu, start_irc=(5, 6, 7))
    assert len(found) > 5
    weights = {"none": 1.0, "probability": probability, "intensity": hu.clip(-1000, 1000) + 1001.0}
    weights["both"] = weights["probability"] * weights["intensity"]
    masses = np.broadcast_to(np.asarray(weights[weight], dtype=np.float64), hu.shape)
    expected = np.array(ndimage.center_of_mass(masses, found.labels, np.arange(len(found)) + 1))
    np.testing.assert_allclose(found.center_irc - (5, 6, 7), expected, atol=1e-9)
    assert (np.diff(found.rank) <= 0).all()


def test_what_lies_outside_the_field_of_view_does_not_throw_the_centre_out():
    probability = spots((3, 9, 9), np.s_[1, 4, 2:7])
    hu = np.full(probability.shape, -3024, dtype=np.int16)  # HU + 1001 is negative here, and sums to nonsense
    hu[1, 4, 2] = 100
    options = GroupingOptions(min_diameter_mm=0, weight="intensity")
    found = group(probability, (1, 1, 1), options, hu=hu)
    assert found.center_irc[0] == pytest.approx((1, 4, 2), abs=0.05)


@pytest.mark.parametrize(
    "direction",
    [
        (1, 0, 0, 0, 1, 0, 0, 0, 1),
        (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        (0, 1, 0, 1, 0, 0, 0, 0, -1),
        tuple(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0].ravel().tolist()),
    ],
)
def test_millimetres_are_simpleitks(direction):
    image = sitk.Image([32, 24, 16], sitk.sitkUInt8)
    image.SetOrigin((-120.5, 33.25, -410.0))
    image.SetSpacing((0.7, 0.6, 2.5))
    image.SetDirection(direction)
    geometry = Geometry(image.GetOrigin(), image.GetSpacing(), image.GetDirection(), (16, 24, 32))
    rng = np.random.default_rng(1)
    probability = np.zeros((16, 24, 32), dtype=np.float32)
    for i, r, c in ((3, 4, 5), (10, 15, 20), (12, 4, 28)):
        probability[i : i + 3, r : r + 4, c : c + 3] = rng.uniform(0.5, 1, (3, 4, 3))
    found = group(probability, geometry.spacing_irc, GroupingOptions(min_diameter_mm=0))
    table = candidate_table("1.2", found, geometry, np.linspace(0.9, 0.1, len(found)), 0.5)
    assert len(table) == 3
    for (_, row), center in zip(table.iterrows(), found.center_irc, strict=True):
        expected = image.TransformContinuousIndexToPhysicalPoint(center[::-1].tolist())
        assert (row["x_mm"], row["y_mm"], row["z_mm"]) == pytest.approx(expected, abs=1e-9)
        assert (row["index"], row["row"], row["col"]) == tuple(np.rint(center))


def test_sizes_are_millimetres_and_every_component_is_accounted_for():
    probability = spots((12, 40, 40), np.s_[1, 1, 1], np.s_[3:9, 5:15, 5:20], np.s_[5:7, 30:33, 30:34])
    found = group(probability, STEPS, GroupingOptions(min_diameter_mm=2, max_diameter_mm=8))
    assert found.num_voxels.tolist() == [2 * 3 * 4]
    assert found.volume_mm3[0] == pytest.approx(24 * np.prod(STEPS))
    assert found.diameter_mm[0] == pytest.approx(sphere_diameter(24 * np.prod(STEPS)))
    counts = found.counts
    assert (counts.components, counts.too_small, counts.too_large, counts.kept) == (3, 1, 1, 1)
    assert (found.labels > 0).sum() == 24


def test_near_components_become_one_and_far_ones_do_not():
    probability = spots((9, 40, 40), np.s_[4, 10, 10], np.s_[4, 10, 12], np.s_[4, 30, 30])
    probability[4, 10, 12] = 0.6
    found = group(probability, (1, 1, 1), GroupingOptions(min_diameter_mm=0, merge_mm=2.5))
    assert found.counts.merged == 1
    assert sorted(found.num_voxels.tolist()) == [1, 2]
    assert found.center_irc[np.argmax(found.num_voxels)] == pytest.approx((4, 10, (10 * 0.9 + 12 * 0.6) / 1.5))
    assert len(group(probability, (1, 1, 1), GroupingOptions(min_diameter_mm=0, merge_mm=1.5))) == 3
    # a speck within a hollow nodule is the nodule's
    hollow = spots((15, 15, 15), np.s_[3:12, 3:12, 3:12])
    hollow[4:11, 4:11, 4:11] = 0
    hollow[7, 7, 7] = 0.8
    assert len(group(hollow, (1, 1, 1), GroupingOptions(min_diameter_mm=0, merge_mm=0))) == 1


def test_a_nodule_comes_off_the_vessel_it_sits_on():
    probability = spots((15, 40, 60), np.s_[7, 20, 5:55], value=0.55)
    i, r, c = np.indices(probability.shape)
    ball = (i - 7) ** 2 + (r - 23) ** 2 + (c - 12) ** 2 <= 9
    probability[ball] = 0.95
    whole = group(probability, (1, 1, 1), GroupingOptions(split_below=0))
    assert np.linalg.norm(whole.center_irc[0] - (7, 23, 12)) > 3, "the vessel draws the centre out of the nodule"
    found = group(probability, (1, 1, 1))
    assert np.linalg.norm(found.center_irc[0] - (7, 23, 12)) < 0.5
    assert found.num_voxels[0] == ball.sum()
    assert (found.counts.components, found.counts.split, found.counts.kept) == (1, 0, 1)
    # two of them on one vessel are two
    probability[(i - 7) ** 2 + (r - 18) ** 2 + (c - 45) ** 2 <= 9] = 0.9
    found = group(probability, (1, 1, 1))
    assert sorted(found.center_irc[:, 2].round().tolist()) == [12, 45]
    assert (found.counts.components, found.counts.split) == (1, 1)
    # what has no core of its own stays as it is
    thread = group(spots((15, 40, 60), np.s_[7, 20, 5:55], value=0.55), (1, 1, 1))
    assert thread.num_voxels.tolist() == [50]


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (5, 7, 8), elements=st.floats(0, 1, width=16)), st.floats(0.05, 0.9))
def test_splitting_loses_no_component_and_joins_none(probability, threshold):
    options = replace(PLAIN, threshold=threshold, split_below=1, merge_mm=1e-9)
    steps = (1e-3, 1e-3, 1e-3)
    found = group(probability, steps, options)
    labels, number = ndimage.label(probability >= threshold)
    assert found.counts.components == number
    assert found.counts.components + found.counts.split == found.counts.merged + found.counts.kept
    assert set(np.unique(labels[found.labels > 0])) == set(range(1, number + 1))
    assert not found.labels[labels == 0].any()


def test_the_limit_keeps_the_highest_ranks():
    probability = np.zeros((1, 1, 40), dtype=np.float32)
    probability[0, 0, ::4] = np.linspace(0.5, 0.95, 10)
    found = group(probability, (1, 1, 1), GroupingOptions(min_diameter_mm=0, merge_mm=0, limit=3))
    assert found.score == pytest.approx([0.95, 0.9, 0.85], abs=1e-6)
    assert found.counts.beyond_limit == 7
    assert sorted(np.unique(found.labels)) == [0, 1, 2, 3]


def test_a_nodule_on_the_wall_is_kept_by_the_margin():
    lung = np.zeros((9, 30, 30), dtype=np.uint8)
    lung[:, :, :15] = 1
    probability = spots(lung.shape, np.s_[3:6, 10:14, 16:20], np.s_[3:6, 10:14, 26:29])
    assert len(group(probability, (1, 1, 1), near_lungs=near(lung, 0, (1, 1, 1)))) == 0
    found = group(probability, (1, 1, 1), near_lungs=near(lung, 6, (1, 1, 1)))
    assert found.center_irc.tolist() == [[4, 11.5, 17.5]]


@settings(max_examples=30, deadline=None)
@given(arrays(np.bool_, (5, 6, 7)), st.floats(0, 4), st.tuples(*[st.floats(0.4, 3)] * 3))
def test_near_is_a_box_of_whole_voxels(mask, margin, steps):
    grown = near(mask, margin, steps)
    expected = np.zeros_like(mask)
    reach = [int(np.ceil(margin / step - 1e-9)) for step in steps]
    for place in np.argwhere(mask):
        expected[tuple(slice(max(0, p - n), p + n + 1) for p, n in zip(place, reach, strict=True))] = True
    assert (grown == expected).all()


def test_erosion_and_opening_part_what_a_thread_joins():
    probability = spots((7, 20, 40), np.s_[1:6, 5:12, 5:12], np.s_[3, 8, 12:25], np.s_[1:6, 5:12, 25:32])
    assert len(group(probability, (1, 1, 1))) == 1
    assert len(group(probability, (1, 1, 1), GroupingOptions(opening=1))) == 2
    eroded = group(probability, (1, 1, 1), GroupingOptions(erosion=1))
    assert eroded.num_voxels.tolist() == [3 * 5 * 5 + 1] * 2, "and the voxel that the thread covers"


def test_nothing_is_a_result():
    found = group(np.zeros((4, 5, 6), dtype=np.float16), (1, 1, 1))
    assert len(found) == 0
    assert found.center_irc.shape == (0, 3)
    assert not found.labels.any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0}, {"threshold": 1.5}, {"erosion": -1}, {"min_diameter_mm": 5, "max_diameter_mm": 5},
        {"merge_mm": -1}, {"limit": 0}, {"weight": "mass"},
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(wrong):
    with pytest.raises(UsageError, match="expected"):
        GroupingOptions(**wrong)


def test_intensity_needs_hu():
    with pytest.raises(UsageError, match="no HU"):
        group(np.zeros((2, 2, 2)), (1, 1, 1), GroupingOptions(weight="both"))
