"""Lung masks: the phantom's lungs found, wall nodules kept, whatever is no chest left alone."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lunaprep.lungs import LungFinder, Lungs, lung_box, lung_mask
from lunaprep.sources.phantom_scan import make_scan

SIZE = (48, 128, 128)


def chest(shape=(40, 120, 160), wall_nodule=False) -> np.ndarray:
    """A body with two lungs, heart between them, spine behind, table below; 3 mm voxels."""
    i, r, c = np.ogrid[tuple(map(slice, shape))]
    hu = np.full(shape, -1000, dtype=np.int16)
    hu[np.broadcast_to(((r - 60) / 50) ** 2 + ((c - 80) / 70) ** 2 < 1, shape)] = 40
    for side in (45, 115):
        hu[((i - 18) / 24) ** 2 + ((r - 60) / 34) ** 2 + ((c - side) / 24) ** 2 < 1] = -850
    hu[:, 116:118, 30:130] = 100
    if wall_nodule:
        hu[((i - 18) ** 2 + (r - 60) ** 2 + (c - 24) ** 2) < 9] = 30  # 18 mm, half of it in the left lung's wall
    return hu


def air_in_lungs(shape=(40, 120, 160)) -> np.ndarray:
    """Where `chest` has its lungs."""
    i, r, c = np.ogrid[tuple(map(slice, shape))]
    return sum(((i - 18) / 24) ** 2 + ((r - 60) / 34) ** 2 + ((c - side) / 24) ** 2 < 1 for side in (45, 115)) > 0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (1.4, 1.4, 2.0), (2.0, 2.5, 5.0)])
def test_lungs_are_where_they_are(spacing):
    rng = np.random.default_rng(0)
    hu = chest() + rng.normal(0, 50, (40, 120, 160))
    assert dice(lung_mask(hu, spacing) > 0, air_in_lungs()) > 0.95


def test_a_turned_scan_has_its_lungs_turned():
    scan = make_scan(5, 0, SIZE, False, 0)
    there = lung_mask(scan.hu, scan.geometry.spacing)
    for axes in ((1,), (2,), (1, 2), (0, 1, 2)):
        turned = lung_mask(np.flip(scan.hu, axes), scan.geometry.spacing)
        assert dice(np.flip(turned, axes) > 0, there > 0) > 0.99


def test_every_nodule_of_phantoms_lies_in_the_lungs():
    for number in range(3):
        scan = make_scan(5, number, SIZE, True, 0)
        mask = lung_mask(scan.hu, scan.geometry.spacing)
        for nodule in scan.nodules:
            assert mask[tuple(np.rint(scan.geometry.xyz_to_irc(nodule.center_xyz)).astype(int))], nodule.kind


def test_a_nodule_on_the_wall_is_kept_and_the_wall_is_not():
    hu = chest(wall_nodule=True)
    mask = lung_mask(hu, (3.0, 3.0, 3.0))
    assert mask[18, 60, 23:27].all()
    assert mask[chest() < -800].mean() < 0.7  # air around the body is no lung
    assert not mask[18, 60, 10]
    assert not mask[:, 60, 80].any()  # the heart
    assert abs(int(mask.sum()) - int(lung_mask(chest(), (3.0, 3.0, 3.0)).sum())) < 0.02 * mask.sum()


@pytest.mark.parametrize("padding", [-1000, -1024, -2000, -3024])
def test_padding_outside_the_field_of_view_changes_nothing(padding):
    hu = chest()
    far = (np.arange(120)[:, None] - 60) ** 2 + (np.arange(160)[None] - 80) ** 2 > 75**2
    padded = np.where(far, padding, hu).astype(np.int16)
    assert (lung_mask(padded, (3.0, 3.0, 3.0)) == lung_mask(np.where(far, -1000, hu), (3.0, 3.0, 3.0))).all()


def test_clipped_floats_give_what_integers_give():
    hu = chest()
    clipped = np.clip(hu, -1000, 1000).astype(np.float32)
    assert (lung_mask(clipped, (3.0, 3.0, 3.0)) == lung_mask(hu, (3.0, 3.0, 3.0))).all()


def test_a_thin_slab_of_a_chest_has_lungs():
    for depth in (1, 3, 12):
        mask = lung_mask(chest()[18 : 18 + depth], (3.0, 3.0, 3.0))
        assert mask.any(axis=(1, 2)).all()
        assert lung_box(mask) is not None


@pytest.mark.parametrize("value", [-3024, -1000, 0, 3000])
def test_no_lungs_is_an_empty_mask(value):
    hu = np.full((20, 60, 60), value, dtype=np.int16)
    assert not lung_mask(hu, (1.0, 1.0, 2.0)).any()
    hu[5:10, 20:26, 20:26] = -1000  # gas in a bowel: dark and small
    assert not lung_mask(hu, (1.0, 1.0, 2.0)).any()


def test_a_large_hole_of_pure_air_is_no_lung():
    hu = np.full((40, 80, 80), 40, dtype=np.int16)
    hu[:, 20:60, 20:60] = -1000
    assert not lung_mask(hu, (3.0, 3.0, 3.0)).any()


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6).map(sorted))
def test_slabs_of_any_size_give_the_same_lungs(cuts):
    hu = chest()
    finder = LungFinder(hu.shape, (3.0, 3.0, 3.0))
    for slab in np.split(hu, cuts):
        finder.take(slab)
    assert (finder.find().slices(0, 40) == lung_mask(hu, (3.0, 3.0, 3.0))).all()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 11)),
    block=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_the_full_grid_is_a_linear_interpolation_of_the_coarse_one(shape, block, seed):
    counts = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    coarse = np.random.default_rng(seed).random(counts) < 0.5
    got = Lungs(coarse, block, shape).slices(0, shape[0])
    index = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    at = [np.clip((k + 0.5) / b - 0.5, 0, m - 1) for k, b, m in zip(index, block, counts, strict=True)]
    value = ndimage.map_coordinates(coarse.astype(float), at, order=1, mode="nearest")
    sure = np.abs(value - 0.5) > 0.1  # the weights are sixteenths
    assert (got[sure] == (value[sure] > 0.5)).all()


@pytest.mark.shared_data
def test_real_lungs_are_of_a_lung_s_size(shared_data):
    litres = {}
    for path in sorted((shared_data / "real_ct").glob("subset*/*.mhd")):
        image = sitk.ReadImage(str(path))
        mask = lung_mask(sitk.GetArrayFromImage(image), image.GetSpacing())
        litres[len(mask)] = float(mask.sum() * np.prod(image.GetSpacing()) / 1e6)
        middle = mask[len(mask) // 2]
        assert middle[:, : middle.shape[1] // 2].any()
        assert middle[:, middle.shape[1] // 2 :].any()
    assert 3.0 < litres[99] < 5.5
    assert 0.1 < litres[12] < 0.6
