"""Nodule masks: against a flood fill by hand, inside the sphere, never empty, near the phantom's truth."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.masks import Nodule, nodule_mask
from lunaprep.sources.phantom_scan import make_scan


def naive_mask(hu: np.ndarray, spacing: tuple[float, ...], center: tuple[float, ...], diameter: float) -> np.ndarray:
    """Voxel by voxel, as docs/format.md says; holes are not filled."""
    mm, radius = np.array(spacing[::-1]), diameter / 2
    offset = (np.moveaxis(np.indices(hu.shape), 0, -1) - np.array(center)) * mm
    far = np.sqrt((offset**2).sum(-1))
    reach = radius + np.maximum(1.0, mm / 2)
    bright = (hu > -700) & (far <= radius) | (hu > -400) & (((offset / reach) ** 2).sum(-1) <= 1)
    seeds = np.argwhere(bright & (far <= radius))
    if not len(seeds):
        return far <= radius if (far <= radius).any() else far == far.min()
    out = np.zeros(hu.shape, dtype=bool)
    queue = deque([tuple(min(seeds, key=lambda at: far[tuple(at)]))])
    while queue:
        at = queue.popleft()
        if all(0 <= k < n for k, n in zip(at, hu.shape, strict=True)) and bright[at] and not out[at]:
            out[at] = True
            for axis in range(3):
                for step in (-1, 1):
                    queue.append(tuple(k + step * (a == axis) for a, k in enumerate(at)))
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    shape=st.tuples(st.integers(1, 8), st.integers(2, 12), st.integers(2, 12)),
    spacing=st.tuples(st.floats(0.4, 2), st.floats(0.4, 2), st.floats(0.5, 5)),
    diameter=st.floats(0.2, 14),
    where=st.tuples(*[st.floats(0, 1)] * 3),
)
def test_the_mask_is_a_flood_fill_from_the_centre(seed, shape, spacing, diameter, where):
    rng = np.random.default_rng(seed)
    hu = rng.choice([-900, -600, -100], shape, p=rng.dirichlet([1, 1, 1])).astype(np.int16)
    center = tuple(w * (n - 1) for w, n in zip(where, shape, strict=True))
    got = nodule_mask(hu, spacing, [Nodule(center, diameter)]).astype(bool)
    naive = naive_mask(hu, spacing, center, diameter)
    assert got.any()
    assert (got >= naive).all()
    holes = got & ~naive
    for at in np.argwhere(holes):  # filled: nothing there reaches a border without crossing the mask
        assert all(0 < k < n - 1 for k, n in zip(at, shape, strict=True))
    reach = diameter / 2 + np.maximum(1.0, np.array(spacing[::-1]) / 2)
    offset = (np.argwhere(got) - np.array(center)) * np.array(spacing[::-1]) / reach
    nearest = (np.abs(np.argwhere(got) - np.array(center)) <= 0.5).all(axis=1)
    assert (((offset**2).sum(axis=1) <= 1 + 1e-9) | nearest).all()


def wall(thick: int = 10) -> np.ndarray:
    hu = np.full((30, 40, 40), -850, dtype=np.int16)
    hu[:, :, :thick] = 50
    return hu


def test_a_wall_nodule_does_not_run_along_the_pleura():
    hu = wall()
    i, r, c = np.ogrid[:30, :40, :40]
    far = np.sqrt((i - 15.0) ** 2 + (r - 20.0) ** 2 + (c - 11.0) ** 2)
    hu[far <= 5] = 0
    mask = nodule_mask(hu, (1.0, 1.0, 1.0), [Nodule((15.0, 20.0, 11.0), 10.0)])
    assert (mask[far <= 5] == 1).all()
    assert not mask[far > 6].any()


@pytest.mark.parametrize("corner", [(0, 0, 0), (29, 39, 39), (0, 39, 0)])
def test_a_nodule_at_the_border_does_not_come_in_on_the_other_side(corner):
    hu = np.full((30, 40, 40), 0, dtype=np.int16)
    mask = nodule_mask(hu, (1.0, 1.0, 1.0), [Nodule(tuple(map(float, corner)), 8.0)])
    far = np.linalg.norm(np.argwhere(mask) - np.array(corner), axis=1)
    assert far.max() <= 5
    assert mask.sum() > 30


def test_a_dark_centre_takes_the_nearest_bright_voxel_and_its_cave_is_filled():
    hu = np.full((21, 21, 21), -850, dtype=np.int16)
    far = np.linalg.norm(np.indices(hu.shape).reshape(3, -1).T - 10, axis=1).reshape(hu.shape)
    hu[(far > 2) & (far <= 5)] = 0
    mask = nodule_mask(hu, (1.0, 1.0, 1.0), [Nodule((10.0, 10.0, 10.0), 10.0)])
    assert (mask == (far <= 5)).all()


def test_nothing_bright_is_the_whole_sphere_and_a_speck_is_one_voxel():
    hu = np.full((9, 9, 9), -900, dtype=np.float32)
    sphere = nodule_mask(hu, (1.0, 1.0, 1.0), [Nodule((4.0, 4.0, 4.0), 4.0)])
    assert sphere.sum() == 33  # lattice points within 2
    assert nodule_mask(hu, (1.0, 1.0, 5.0), [Nodule((4.2, 4.3, 4.4), 0.1)])[4, 4, 4] == 1


def true_mask(scan, nodule) -> np.ndarray:
    """Voxels whose centres lie inside the surface that `phantom_findings.paint_nodule` paints."""
    offset = scan.geometry.irc_to_xyz(np.moveaxis(np.indices(scan.hu.shape), 0, -1)) - nodule.center_xyz
    r = np.sqrt((offset**2).sum(-1)) + 1e-3
    shape = np.full(r.shape, 0.98)
    for k, q in enumerate(nodule.lobes):
        shape += (0.035 + 0.02 * k) * (np.clip(offset @ q / r, 0, 1) ** 3 - 0.125)
    for q in nodule.spikes:
        shape += 0.6 * np.clip((offset @ q / r - 0.95) * 20, 0, 1) ** 2
    return r <= nodule.diameter_mm / 2 * shape


def test_masks_of_phantoms_are_near_the_truth():
    found = []
    for hard, number in ((False, 0), (False, 1), (True, 2)):
        scan = make_scan(3, number, (48, 128, 128), hard, 0)
        for nodule, row in zip(scan.nodules, scan.annotations, strict=True):
            spot = Nodule(tuple(scan.geometry.xyz_to_irc(row.xyz)), row.value)
            mask = nodule_mask(scan.hu, scan.geometry.spacing, [spot]).astype(bool)
            both = true_mask(scan, nodule)
            found.append(2 * (mask & both).sum() / (mask.sum() + both.sum()))
    assert len(found) >= 4
    assert np.mean(found) > 0.8
    assert min(found) > 0.6
