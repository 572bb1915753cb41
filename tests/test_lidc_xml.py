"""LIDC-IDRI's readings: outlines become the voxels that LUNA16 counted, readers become nodules."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.errors import TableError
from lunaprep.geometry import IDENTITY, Geometry
from lunaprep.scans.dicom import describe, find_series
from lunaprep.sources.lidc_nodules import (
    check_reading,
    consensus_mask,
    find_findings,
    group_nodules,
    outline_mask,
    place_mask,
    reader_nodules,
)
from lunaprep.sources.lidc_xml import Reading, read_reading

GRID = Geometry((-20.0, -30.0, -50.0), (0.5, 0.5, 2.0), IDENTITY, (12, 80, 90))
SERIES = "1.2.3.4"


def z_of(index: float) -> float:
    return GRID.origin[2] + index * GRID.spacing[2]


def ring(column: float, row: float, radius: float) -> list[tuple[int, int]]:
    """Pixels around a disc: the outer border as a reader's tool would give it, first pixel again at the end."""
    angles = np.linspace(0, 2 * math.pi, 400)
    points = np.rint(np.stack([column + radius * np.cos(angles), row + radius * np.sin(angles)], axis=1)).astype(int)
    kept = [tuple(point.tolist()) for k, point in enumerate(points) if k == 0 or (point != points[k - 1]).any()]
    return [*kept, kept[0]] if kept[-1] != kept[0] else kept


def roi(index: float, points, inclusion="TRUE", sop="") -> str:
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
    return (
        f"<roi><imageZposition>{z_of(index)} </imageZposition><imageSOP_UID>{sop}</imageSOP_UID>"
        f"<inclusion>{inclusion}</inclusion>{edges}</roi>"
    )


def nodule(rois: str, malignancy: object = 3) -> str:
    traits = "" if malignancy is None else f"<characteristics><malignancy>{malignancy}</malignancy></characteristics>"
    return f"<unblindedReadNodule><noduleID>N</noduleID>{traits}{rois}</unblindedReadNodule>"


def ball(index: int, row: int, column: int, radius: float, malignancy: int = 3) -> str:
    """An outlined ball of `radius` pixels, one slice thick for every four pixels (the grid's slices are 2 mm)."""
    half = int(radius // 4)
    cuts = [(k, math.sqrt(radius**2 - (4 * k) ** 2)) for k in range(-half, half + 1)]
    return nodule("".join(roi(index + k, ring(column, row, cut)) for k, cut in cuts if cut > 1.5), malignancy)


def non_nodule(index: int, x: int, y: int) -> str:
    place = f"<locus><xCoord>{x}</xCoord><yCoord>{y}</yCoord></locus>"
    return f"<nonNodule><nonNoduleID>X</nonNoduleID><imageZposition>{z_of(index)}</imageZposition>{place}</nonNodule>"


def document(*sessions: str, series: str = SERIES, xmlns: str = "http://www.nih.gov") -> str:
    bodies = "".join(f"<readingSession>{session}</readingSession>\n" for session in sessions)
    header = f"<ResponseHeader><SeriesInstanceUid>{series}</SeriesInstanceUid></ResponseHeader>"
    return f'<?xml version="1.0"?>\n<LidcReadMessage xmlns="{xmlns}">{header}\n{bodies}</LidcReadMessage>'


def reading(tmp_path: Path, *sessions: str) -> Reading:
    path = tmp_path / "1.xml"
    path.write_text(document(*sessions))
    return read_reading(path)


# outlines


def flooded(free: np.ndarray) -> np.ndarray:
    """Free pixels that steps to one of four neighbours reach from the corner (0, 0); the oracle."""
    reached, to_do = np.zeros_like(free), [(0, 0)]
    while to_do:
        r, c = to_do.pop()
        if 0 <= r < free.shape[0] and 0 <= c < free.shape[1] and free[r, c] and not reached[r, c]:
            reached[r, c] = True
            to_do += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
    return reached


@settings(max_examples=30, deadline=None)
@given(st.floats(20, 60), st.floats(20, 60), st.floats(1.5, 18))
def test_an_outline_is_not_part_of_what_it_holds(column, row, radius):
    points = np.array(ring(column, row, radius))
    (top, left), inside, border = outline_mask(points)
    full = np.zeros((100, 100), bool)
    full[points[:, 1], points[:, 0]] = True
    got = np.zeros_like(full)
    got[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    np.testing.assert_array_equal(got, ~full & ~flooded(~full))
    assert border.sum() == full.sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12))
def test_an_outline_with_gaps_is_closed_before_it_is_filled(points):
    (top, left), inside, border = outline_mask(np.array(points))
    np.testing.assert_array_equal(inside, ~border & ~flooded(~border))
    for x, y in points:
        assert border[y - top, x - left]


def test_a_hole_is_taken_out_with_its_border(tmp_path):
    square = [(10, 10), (30, 10), (30, 30), (10, 30), (10, 10)]
    hole = [(18, 18), (22, 18), (22, 22), (18, 22), (18, 18)]
    plain = reading(tmp_path, nodule(roi(5, square)))
    pierced = reading(tmp_path, nodule(roi(5, hole, "FALSE") + roi(5, square)))
    (one,), _ = reader_nodules(plain, GRID)
    (other,), _ = reader_nodules(pierced, GRID)
    assert one.num_voxels == 19 * 19
    assert other.num_voxels == 19 * 19 - 5 * 5
    assert other.diameter_mm == pytest.approx((6 * other.num_voxels * 0.5 / math.pi) ** (1 / 3))
    np.testing.assert_allclose(one.xyz, GRID.irc_to_xyz([5, 20, 20]))


# readers


def test_nodules_that_three_readers_saw(tmp_path):
    got = reading(
        tmp_path,
        ball(5, 40, 40, 9, 5) + ball(5, 15, 70, 6),
        ball(5, 41, 40, 9, 4) + nodule(roi(3, [(12, 70)]), None),
        ball(5, 40, 42, 10, 1) + non_nodule(8, 60, 30),
        ball(6, 15, 71, 6, 5),
    )
    findings = find_findings(got, GRID)
    assert [item.kind for item in findings] == ["nodule", "few_readers", "small_nodule", "non_nodule"]
    sure = findings[0].nodule
    assert sure.num_readers == 3
    assert sure.ratings == (5, 4, 1)
    assert sum(sure.ratings) / len(sure.ratings) == pytest.approx(10 / 3)
    assert sure.is_malignant
    assert findings[1].nodule.is_malignant is False
    np.testing.assert_allclose(GRID.xyz_to_irc(findings[0].xyz), [5, 40 + 1 / 3, 40 + 2 / 3], atol=0.05)
    np.testing.assert_allclose(GRID.xyz_to_irc(findings[2].xyz), [3, 70, 12])
    np.testing.assert_allclose(GRID.xyz_to_irc(findings[3].xyz), [8, 30, 60])
    assert math.isnan(findings[3].diameter_mm)
    corner, mask = consensus_mask(sure, GRID)
    half = [place_mask(member, GRID) for member in sure.members]
    count = np.zeros(GRID.shape_irc, int)
    for (i, r, c), one in half:
        count[i : i + one.shape[0], r : r + one.shape[1], c : c + one.shape[2]] += one
    full = np.zeros(GRID.shape_irc, bool)
    full[tuple(slice(a, a + n) for a, n in zip(corner, mask.shape, strict=True))] = mask
    np.testing.assert_array_equal(full, count >= 2)


def test_readers_are_joined_only_where_closer_than_their_radii(tmp_path):
    apart = reading(tmp_path, ball(5, 20, 20, 8), ball(5, 20, 37, 8))
    nodules, _ = reader_nodules(apart, GRID)
    assert len(group_nodules(nodules)) == 2
    linked = reading(tmp_path, ball(5, 20, 20, 8), ball(5, 20, 33, 8), ball(5, 20, 46, 8))
    nodules, _ = reader_nodules(linked, GRID)
    (group,) = group_nodules(nodules)
    assert group.num_readers == 3


def test_two_nodules_of_one_reader_count_as_one_reader(tmp_path):
    got = reading(tmp_path, ball(5, 20, 20, 8) + ball(5, 22, 20, 8), ball(5, 20, 22, 8))
    assert [item.kind for item in find_findings(got, GRID)] == ["few_readers"]


def test_an_outline_with_nothing_inside_is_no_nodule(tmp_path):
    got = reading(tmp_path, nodule(roi(5, [(10, 10), (11, 10), (10, 10)])))
    (finding,) = find_findings(got, GRID)
    assert finding.kind == "thin"


def test_a_scan_of_which_only_some_slices_are_there(tmp_path):
    got = reading(tmp_path, ball(1, 11, 40, 10))
    (one,), _ = reader_nodules(got, GRID)
    corner, mask = place_mask(one, GRID)
    assert corner == (0, 0, 29)
    assert mask.sum() < one.num_voxels
    far = reading(tmp_path, ball(40, 40, 40, 5))
    (one,), _ = reader_nodules(far, GRID)
    assert place_mask(one, GRID) is None
    assert find_findings(far, GRID)


def test_another_scan_is_noticed(tmp_path):
    got = reading(tmp_path, nodule(roi(5, ring(20, 20, 5), sop="9.5")))
    uids = [f"9.{k}" for k in range(12)]
    check_reading(got, SERIES, GRID, uids)
    with pytest.raises(TableError, match=r"expected …9\.9"):
        check_reading(got, "9.9", GRID, uids)
    with pytest.raises(TableError, match=r"is in slice 5\.00, but names slice 4"):
        check_reading(got, SERIES, GRID, uids[1:])
    between = reading(tmp_path, nodule(roi(5.5, ring(20, 20, 5))))
    (one,), _ = reader_nodules(between, GRID)
    with pytest.raises(TableError, match="between two slices"):
        place_mask(one, GRID)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1, 1, 1), (-1, -1, 1), (1, -1, -1)]),
    st.tuples(*[st.floats(0.4, 1.2)] * 2, st.floats(0.6, 3)),
    st.tuples(*[st.floats(-200, 200)] * 3),
)
def test_flipped_scans_and_any_grid(tmp_path_factory, signs, spacing, origin):
    direction = tuple(np.diag(signs).astype(float).ravel().tolist())
    grid = Geometry(origin, spacing, direction, (12, 80, 90))
    z = grid.irc_to_xyz([5, 0, 0])[2]
    points = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in ring(30, 50, 7))
    text = nodule(f"<roi><imageZposition>{z}</imageZposition><inclusion>TRUE</inclusion>{points}</roi>")
    (one,), _ = reader_nodules(reading(tmp_path_factory.mktemp("x"), text), grid)
    np.testing.assert_allclose(one.xyz, grid.irc_to_xyz([5, 50, 30]), atol=0.2)
    corner, mask = place_mask(one, grid)
    assert corner[0] == 5
    assert mask.sum() == one.num_voxels


# bad files

GOOD_ROI = roi(5, ring(20, 20, 5))
BAD = {
    "no series": (document(ball(5, 20, 20, 8), series=""), "SeriesInstanceUid is missing"),
    "wrong namespace": (document(ball(5, 20, 20, 8), xmlns="http://example.org"), "expected 'LidcReadMessage'"),
    "no sessions": (document(), "0 reading sessions"),
    "five sessions": (document(*[ball(5, 20, 20, 8)] * 5), "5 reading sessions"),
    "missing z": (document(nodule(GOOD_ROI.replace("imageZposition", "other"))), "line 3: imageZposition is missing"),
    "NaN z": (document(nodule(GOOD_ROI.replace("-40.0", "nan"))), "imageZposition is nan"),
    "infinite z": (document(nodule(GOOD_ROI.replace("-40.0", "1e999"))), "imageZposition is inf"),
    "text": (document(nodule(GOOD_ROI.replace("<xCoord>25", "<xCoord>a"))), "xCoord is 'a'"),
    "NaN pixel": (document(nodule(roi(5, [("nan", 3), (4, 4)]))), "xCoord is nan"),
    "half a pixel": (document(nodule(roi(5, [(1.5, 3), (4, 4)]))), "xCoord is 1.5"),
    "negative": (document(nodule(roi(5, [(1, -3), (4, 4)]))), "yCoord is -3.0"),
    "huge": (document(nodule(roi(5, [(1, 3), (4, 10**9)]))), "yCoord is 1000000000.0"),
    "no points": (document(nodule(roi(5, []))), "without edgeMap"),
    "no roi": (document(nodule("")), "a nodule without a roi"),
    "inclusion": (document(nodule(roi(5, ring(20, 20, 5), "MAYBE"))), "inclusion is 'MAYBE'"),
    "rating": (document(nodule(GOOD_ROI, 7)), "malignancy is 7"),
    "cut": (document(ball(5, 20, 20, 8))[:-30], "no well-formed XML"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_reading(tmp_path, name):
    text, words = BAD[name]
    path = tmp_path / "1.xml"
    path.write_text(text)
    with pytest.raises(TableError) as caught:
        read_reading(path)
    message = str(caught.value)
    assert words in message
    assert message.startswith("1.xml: ")
    assert message.isprintable()
    assert len(message) <= 200


def test_oblique_slices_are_refused(tmp_path):
    turned = (1.0, 0.0, 0.0, 0.0, 0.8, -0.6, 0.0, 0.6, 0.8)
    with pytest.raises(TableError, match="oblique"):
        find_findings(reading(tmp_path, ball(5, 20, 20, 8)), Geometry((0, 0, 0), (1, 1, 1), turned, (9, 9, 9)))


# the real data


def luna16_rows(path: Path, series_uid: str) -> np.ndarray:
    """x, y, z and diameter of a series' rows."""
    with path.open() as file:
        rows = [row for row in csv.reader(file) if row[0] == series_uid]
    return np.array([[float(text) for text in row[1:5]] for row in rows]).reshape(-1, 4)


@pytest.mark.shared_data
def test_rows_agree_with_luna16(shared_data):
    num_nodules = num_points = 0
    for series in find_series(shared_data / "dicom" / "lidc").series:
        scan = describe(series)
        (path,) = series.folder.glob("*.xml")
        got = read_reading(path)
        check_reading(got, scan.series_uid, scan.geometry, [item.sop_uid for item in scan.slices])
        findings = find_findings(got, scan.geometry)
        annotations = luna16_rows(shared_data / "luna16_csv" / "annotations.csv", scan.series_uid)
        excluded = luna16_rows(shared_data / "luna16_csv" / "annotations_excluded.csv", scan.series_uid)
        sure = [item for item in findings if item.kind == "nodule"]
        assert len(sure) == len(annotations)
        for item, row in zip(sure, annotations, strict=True):
            assert math.dist(item.xyz, row[:3]) < 1
            assert item.diameter_mm == pytest.approx(row[3], rel=0.05)
            num_nodules += 1
        points = np.array([item.xyz for item in findings if item.kind in ("small_nodule", "non_nodule")])
        theirs = excluded[excluded[:, 3] < 0, :3]
        distance = np.abs(points[:, None] - theirs[None]).max(axis=2)
        assert len(points) == len(theirs)
        assert max(distance.min(axis=0).max(), distance.min(axis=1).max()) < 0.01
        num_points += len(points)
    assert (num_nodules, num_points) == (1, 73)


@pytest.mark.shared_data
def test_each_readers_voxels_are_those_luna16_counted(shared_data):
    """LUNA16 averaged readers by twos and left the steps in its excluded list: they give back each one's diameter."""
    sizes = {}
    for series in find_series(shared_data / "dicom" / "lidc").series:
        geometry = describe(series).geometry
        (path,) = series.folder.glob("*.xml")
        nodules, thin = reader_nodules(read_reading(path), geometry)
        assert not thin
        sizes[series.patient_id] = [item.diameter_mm for item in nodules]
    a, b, c, d = sizes["LIDC-IDRI-0001"]
    steps = [d, (c + d) / 2, (b + (c + d) / 2) / 2, (a + (b + (c + d) / 2) / 2) / 2]
    np.testing.assert_allclose(steps, [23.50013735, 23.09982957, 22.63230177, 23.35064438], rtol=1e-8)
    a, b = sizes["LIDC-IDRI-0002"]
    np.testing.assert_allclose([b, (a + b) / 2], [24.08464915, 23.32221915], rtol=1e-8)
