"""Geometry against SimpleITK, and what it must do for any grid."""

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from lunaprep.geometry import IDENTITY, Geometry

AXES = [tuple(order) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))]
ANGLES = st.floats(-np.pi, np.pi).map(lambda angle: round(angle, 6))
"""Rounded, because SimpleITK's inverse is NaN where an element of the direction is subnormal (2e-309)."""


@st.composite
def directions(draw):
    """Axes permuted and flipped in all 48 ways, and turned about each axis."""
    matrix = np.eye(3)[list(draw(st.sampled_from(AXES)))] * draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    for first, second in ((0, 1), (1, 2), (0, 2)):
        angle = draw(ANGLES)
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return tuple(float(value) for value in matrix.ravel())


@st.composite
def geometries(draw):
    return Geometry(
        origin=draw(st.tuples(*[st.floats(-1000, 1000)] * 3)),
        spacing=draw(st.tuples(*[st.floats(0.1, 10)] * 3)),
        direction=draw(directions()),
        shape_irc=draw(st.tuples(*[st.integers(1, 9)] * 3)),
    )


def image_of(grid: Geometry) -> SimpleITK.Image:
    image = SimpleITK.Image(list(grid.shape_irc[::-1]), SimpleITK.sitkInt8)
    image.SetOrigin(grid.origin)
    image.SetSpacing(grid.spacing)
    image.SetDirection(grid.direction)
    return image


POINTS = st.lists(st.tuples(*[st.floats(-1000, 1000)] * 3), min_size=1, max_size=5)


@given(grid=geometries(), indices=POINTS)
@settings(max_examples=200, deadline=None)
def test_world_of_an_index_is_simpleitks(grid, indices):
    image = image_of(grid)
    expected = [image.TransformContinuousIndexToPhysicalPoint(index[::-1]) for index in indices]
    assert_allclose(grid.irc_to_xyz(indices), expected, rtol=0, atol=1e-6)


@given(grid=geometries(), points=POINTS)
@settings(max_examples=200, deadline=None)
def test_index_of_a_point_is_simpleitks(grid, points):
    image = image_of(grid)
    expected = [image.TransformPhysicalPointToContinuousIndex(point)[::-1] for point in points]
    assert_allclose(grid.xyz_to_irc(points), expected, rtol=0, atol=1e-6)


@given(grid=geometries(), indices=POINTS)
@settings(max_examples=100, deadline=None)
def test_there_and_back(grid, indices):
    assert_allclose(grid.xyz_to_irc(grid.irc_to_xyz(indices)), indices, rtol=0, atol=1e-6)
    assert grid.xyz_to_irc(grid.origin) == pytest.approx([0, 0, 0], abs=1e-9)


@given(grid=geometries())
@settings(max_examples=50, deadline=None)
def test_every_voxel_is_found_again(grid):
    irc = np.argwhere(np.ones(grid.shape_irc))
    np.testing.assert_array_equal(grid.nearest_irc(grid.irc_to_xyz(irc)), irc)
    assert grid.contains_irc(irc).all()
    image = image_of(grid)
    last = tuple(side - 1 for side in grid.shape_irc)
    assert grid.irc_to_xyz(last) == pytest.approx(
        image.TransformIndexToPhysicalPoint([int(i) for i in last[::-1]]), abs=1e-6
    )


@given(grid=geometries(), index=st.tuples(*[st.integers(-12, 12)] * 3))
@settings(max_examples=100, deadline=None)
def test_contains(grid, index):
    expected = all(0 <= i < side for i, side in zip(index, grid.shape_irc, strict=True))
    assert grid.contains_irc(index) == expected


def test_shapes_are_kept():
    grid = Geometry((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), IDENTITY, (4, 4, 4))
    assert grid.xyz_to_irc([0, 0, 0]).shape == (3,)
    assert grid.xyz_to_irc(np.zeros((2, 5, 3))).shape == (2, 5, 3)
    assert grid.xyz_to_irc(np.zeros((0, 3))).shape == (0, 3)
    assert grid.irc_to_xyz(np.zeros((0, 3))).shape == (0, 3)
    assert grid.nearest_irc([1.5, 2.5, 0.5]).tolist() == [0, 2, 2]
    assert grid.contains_irc(np.zeros((2, 5, 3))).shape == (2, 5)
    assert grid.spacing_irc == (1.0, 1.0, 1.0)


def test_far_points_are_outside():
    grid = Geometry((0.0, 0.0, 0.0), (1e-3, 1.0, 1.0), IDENTITY, (4, 4, 4))
    far = grid.nearest_irc([[1e300, 0, 0], [-1e300, 0, 0]])
    assert not grid.contains_irc(far).any()


@pytest.mark.parametrize(
    ("diagonal", "flipped"), [((1, 1, 1), False), ((-1, -1, 1), True), ((1, 1, -1), True), ((-1, -1, -1), True)]
)
def test_is_flipped(diagonal, flipped):
    direction = tuple(float(value) for value in np.diag(diagonal).ravel())
    assert Geometry((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), direction, (1, 1, 1)).is_flipped is flipped
