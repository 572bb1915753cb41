"""Augmentation: each change against one made sample by sample with numpy and scipy, and what all of them promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from lunatrain.augment import BOOK, NONE, Augmentation, augment, draw_transforms, resample
from lunatrain.errors import UsageError

SHAPE = (6, 10, 14)
ONLY = {
    "flip": Augmentation(flip=True),
    "offset": Augmentation(offset=0.3),
    "scale": Augmentation(scale=0.3),
    "rotate": Augmentation(rotate=True),
    "all but noise": Augmentation(flip=True, offset=0.2, scale=0.2, rotate=True),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_crops(num: int = 5, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(num, 1, *shape, generator=seeded(1)) * 2000 - 1000


def one_bright(shape: tuple[int, int, int], place: tuple[int, int, int]) -> torch.Tensor:
    crop = torch.full((1, 1, *shape), -1000.0)
    crop[0, 0][place] = 1000.0
    return crop


def naive(crop: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """One sample, by scipy, whose coordinates count from the first voxel."""
    center = (np.array(crop.shape) - 1) / 2
    linear, shift = matrix[:, :3], matrix[:, 3]
    return affine_transform(crop, linear, center + shift - linear @ center, order=1, mode="nearest")


@pytest.mark.parametrize("settings", ONLY.values(), ids=ONLY.keys())
def test_equals_scipy_sample_by_sample(settings: Augmentation) -> None:
    crops = some_crops()
    changed = augment(crops, settings, seeded(3))
    matrices = draw_transforms(len(crops), SHAPE, settings, seeded(3)).double().numpy()
    for crop, result, matrix in zip(crops.numpy(), changed.numpy(), matrices, strict=True):
        np.testing.assert_allclose(result[0], naive(crop[0], matrix), atol=0.05)


def test_flips_are_exact_and_of_each_axis() -> None:
    crops = some_crops(64)
    changed = augment(crops, Augmentation(flip=True), seeded(4))
    matrices = draw_transforms(64, SHAPE, Augmentation(flip=True), seeded(4))
    seen = set()
    for crop, result, matrix in zip(crops.numpy(), changed.numpy(), matrices, strict=True):
        axes = tuple(axis for axis in range(3) if matrix[axis, axis] < 0)
        seen.add(axes)
        np.testing.assert_array_equal(result[0], np.flip(crop[0], axes))
    assert len(seen) == 8


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_offset_moves_a_voxel_by_so_many_voxels(axis: int) -> None:
    place = (3, 5, 7)
    matrix = torch.eye(3, 4)[None]
    matrix[0, axis, 3] = -2
    changed = resample(one_bright(SHAPE, place), matrix)
    moved = list(place)
    moved[axis] += 2
    torch.testing.assert_close(changed, one_bright(SHAPE, (moved[0], moved[1], moved[2])), atol=0.01, rtol=0)


def test_offsets_fill_their_range_of_the_half_side() -> None:
    shift = draw_transforms(4000, (32, 48, 96), Augmentation(offset=0.1), seeded())[:, :, 3]
    largest = torch.tensor([1.6, 2.4, 4.8])
    assert (shift.abs() <= largest).all()
    torch.testing.assert_close(shift.abs().amax(0), largest, rtol=0.01, atol=0)
    torch.testing.assert_close(shift.mean(0) / largest, torch.zeros(3), atol=0.05, rtol=0)


def test_scales_are_drawn_for_each_axis() -> None:
    matrices = draw_transforms(4000, SHAPE, Augmentation(scale=0.2), seeded())
    factors = matrices[:, :, :3].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(factors.amin(0), torch.full((3,), 0.8), atol=0.005, rtol=0)
    torch.testing.assert_close(factors.amax(0), torch.full((3,), 1.2), atol=0.005, rtol=0)
    assert np.abs(np.corrcoef(factors.numpy().T) - np.eye(3)).max() < 0.05


def test_a_turn_is_rigid_about_the_slice_axis() -> None:
    linear = draw_transforms(4000, SHAPE, Augmentation(rotate=True), seeded())[:, :, :3]
    torch.testing.assert_close(linear @ linear.mT, torch.eye(3).expand(4000, 3, 3))
    torch.testing.assert_close(linear.det(), torch.ones(4000))
    torch.testing.assert_close(linear[:, 0], torch.tensor([1.0, 0, 0]).expand(4000, 3))
    angle = torch.atan2(linear[:, 2, 1], linear[:, 1, 1])
    assert torch.histc(angle, 8, -math.pi, math.pi).min() > 400


@pytest.mark.parametrize("shape", [(4, 21, 41), (4, 41, 21)])
def test_a_quarter_turn_of_an_oblong_crop_keeps_distances(shape: tuple[int, int, int]) -> None:
    quarter = torch.tensor([[[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0]]])
    center = (shape[1] // 2, shape[2] // 2)
    changed = resample(one_bright(shape, (2, center[0] + 8, center[1])), quarter)
    torch.testing.assert_close(changed, one_bright(shape, (2, center[0], center[1] - 8)), atol=0.01, rtol=0)


def test_an_oblong_disc_stays_round_at_any_angle() -> None:
    row, col = torch.meshgrid(torch.arange(40) - 19.5, torch.arange(80) - 39.5, indexing="ij")
    disc = (-(row**2 + col**2) / 32).exp().expand(6, 1, 3, 40, 80) * 1000
    changed = augment(disc.contiguous(), Augmentation(rotate=True), seeded(2))
    assert (changed - disc).abs().max() < 15  # HU of interpolation; a shear would move the edge by hundreds


def test_samples_of_a_batch_differ() -> None:
    same = some_crops(1).repeat(8, 1, 1, 1, 1)
    for settings in (Augmentation(offset=0.1), Augmentation(scale=0.2), Augmentation(rotate=True), BOOK):
        changed = augment(same, settings, seeded())
        distinct = {crop.numpy().tobytes() for crop in changed}
        assert len(distinct) == 8


def test_noise_has_its_deviation_and_nothing_else() -> None:
    crops = some_crops(32, (8, 16, 16))
    noise = (augment(crops, Augmentation(noise_hu=25.0), seeded()) - crops).double()
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 * 25 / math.sqrt(count)
    assert float(noise.std()) == pytest.approx(25, rel=0.02)
    flat = noise.flatten()
    assert abs(float((flat[1:] * flat[:-1]).mean())) / 625 < 5 / math.sqrt(count)
    assert float((noise.abs() < 25).double().mean()) == pytest.approx(0.683, abs=0.01)


def test_a_generator_decides_all() -> None:
    crops = some_crops()
    first, again = (augment(crops, BOOK, seeded(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(crops, BOOK, seeded(6)))
    generator = seeded(5)
    assert torch.equal(augment(crops, BOOK, generator), first)
    assert not torch.equal(augment(crops, BOOK, generator), first)
    torch.manual_seed(5)
    assert torch.equal(augment(crops, BOOK), first)


def test_nothing_to_do_gives_the_same_tensor() -> None:
    crops = some_crops()
    assert augment(crops, NONE) is crops
    assert augment(crops[:0], BOOK).shape == (0, 1, *SHAPE)


@pytest.mark.parametrize("settings", [BOOK, *ONLY.values(), Augmentation(noise_hu=5)], ids=str)
def test_the_crops_given_are_not_changed(settings: Augmentation) -> None:
    crops = some_crops()
    before = crops.clone()
    augment(crops, settings, seeded())
    assert torch.equal(crops, before)


def test_computes_in_float32_whatever_is_around() -> None:
    crops = some_crops()
    plain = augment(crops, BOOK, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(crops, BOOK, seeded()), plain)
    stored = crops.round().to(torch.int16)
    assert torch.equal(augment(stored, BOOK, seeded()), augment(stored.float(), BOOK, seeded()))
    assert augment(crops.bfloat16(), BOOK, seeded()).dtype == torch.float32


def test_beyond_the_border_lies_the_border() -> None:
    crops = torch.full((8, 1, *SHAPE), -321.0)
    changed = augment(crops, Augmentation(offset=0.9, scale=0.9, rotate=True), seeded())
    torch.testing.assert_close(changed, crops)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flip,offset,scale,rotate,noise", BOOK),
        ("all", BOOK),
        ("none", NONE),
        ("", NONE),
        (" flip , noise=10 ", Augmentation(flip=True, noise_hu=10.0)),
        ("all,noise=0", Augmentation(flip=True, offset=0.1, scale=0.2, rotate=True)),
    ],
)
def test_parse(text: str, expected: Augmentation) -> None:
    assert Augmentation.parse(text) == expected


@given(st.builds(Augmentation, st.booleans(), st.floats(0, 0.99), st.floats(0, 0.99), st.booleans(), st.floats(0, 1e4)))
def test_a_list_is_read_back_as_it_was_written(settings: Augmentation) -> None:
    assert Augmentation.parse(str(settings)) == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("blur", "must be a list of flip, rotate, offset, scale, noise, or all or none, got 'blur'"),
        ("noise=much", "noise_hu got 'much', expected a number"),
        ("flip=1", "flip got '1', expected no strength"),
        ("scale=1", "scale must be 0 or more and below 1, got 1"),
        ("noise=-1", "noise_hu must be 0 or more"),
        ("offset=nan", "offset must be 0 or more and below 1, got nan"),
        ("noise=inf", "below inf, got inf"),
    ],
)
def test_a_wrong_list_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")) as caught:
        Augmentation.parse(text)
    assert "\n" not in str(caught.value)
