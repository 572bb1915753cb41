"""Lung-PET-CT-Dx's boxes: found by SOP instance UID in every series of the study, joined in three dimensions."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunaprep.errors import TableError
from lunaprep.geometry import IDENTITY, Geometry
from lunaprep.scans.dicom import describe, find_series
from lunaprep.sources.voc_xml import SliceBox, index_boxes, join_boxes, read_boxes


def document(x=(10, 20), y=(30, 50), name="A", size=(64, 100)) -> str:
    corners = "".join(
        f"<{a}{end}>{v}</{a}{end}>"
        for a, two in (("x", x), ("y", y))
        for end, v in zip(("min", "max"), two, strict=True)
    )
    return (
        f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>\n"
        f"<object><name>{name}</name>\n<bndbox>{corners}</bndbox></object></annotation>"
    )


def write(folder: Path, sop_uid: str, text: str) -> Path:
    path = folder / f"{sop_uid}.xml"
    path.write_text(text)
    return path


def box(rows=(30, 51), columns=(10, 21), subtype="A", sop_uid="1.2") -> SliceBox:
    return SliceBox(sop_uid, subtype, rows, columns)


def test_a_box(tmp_path):
    got = read_boxes(write(tmp_path, "1.2.3", document()))
    assert got.size == (64, 100)
    assert got.boxes == (SliceBox("1.2.3", "A", (30, 51), (10, 21)),)


def test_boxes_are_found_in_both_series_of_a_study(tmp_path):
    files = [read_boxes(write(tmp_path, uid, document())) for uid in ("1.1", "1.2", "2.2", "9.9")]
    found = index_boxes(files, {"s1": ["1.0", "1.1", "1.2"], "s2": ["2.0", "2.1", "2.2"]})
    assert {series: sorted(boxes) for series, boxes in found.by_series.items()} == {"s1": [1, 2], "s2": [2]}
    assert [path.name for path in found.unmatched] == ["9.9.xml"]


def test_boxes_that_match_no_slice_stop_with_that_sentence(tmp_path):
    files = [read_boxes(write(tmp_path, uid, document())) for uid in ("8.1", "8.2")]
    with pytest.raises(TableError, match="none of 2 box files matches a slice of the 1 series"):
        index_boxes(files, {"s1": ["1.0", "1.1"]})


def test_boxes_become_one_lesion():
    (lesion,) = join_boxes({4: [box()], 5: [box((32, 60), (15, 30))], 7: [box((40, 70), (12, 25))]})
    assert (lesion.start_irc, lesion.stop_irc, lesion.num_slices) == ((4, 30, 10), (8, 70, 30), 3)
    grid = Geometry((-10.0, -20.0, 5.0), (0.5, 0.75, 2.0), IDENTITY, (20, 100, 100))
    assert lesion.centre_irc == (5.5, 49.5, 19.5)
    assert lesion.centre_xyz(grid) == (-10 + 19.5 * 0.5, -20 + 49.5 * 0.75, 5 + 5.5 * 2)
    assert lesion.longest_mm(grid) == 40 * 0.75


@pytest.mark.parametrize(
    "other",
    [{5: [box((60, 70))]}, {5: [box(subtype="G")]}, {7: [box()]}, {4: [box((60, 70))]}],
    ids=["beside it", "another subtype", "two slices away", "in the same slice"],
)
def test_what_is_not_the_same_lesion(other):
    both = {4: [box()], **{k: v for k, v in other.items() if k != 4}}
    both[4] = [box(), *other.get(4, [])]
    assert len(join_boxes(both)) == 2


@given(st.permutations([(k, 30 + k) for k in range(6)]))
def test_joining_does_not_depend_on_the_order(order):
    boxes = {k: [box((row, row + 5))] for k, row in order}
    (lesion,) = join_boxes(boxes)
    assert (lesion.start_irc, lesion.stop_irc) == ((0, 30, 10), (6, 40, 21))


BAD = {
    "min is max": (document(x=(20, 20)), "the box is x 20 to 20"),
    "turned round": (document(y=(50, 30)), "y 50 to 30"),
    "outside": (document(x=(10, 101)), "within 100 x 64"),
    "text": (document(x=("ten", 20)), "xmin is 'ten'"),
    "NaN": (document(y=(30, "nan")), "ymax is 'nan'"),
    "negative": (document(x=(-1, 20)), "xmin is '-1'"),
    "unknown subtype": (document(name="Z"), "subtype is 'Z'"),
    "no subtype": (document(name=""), "subtype is ''"),
    "no box": (document().replace("bndbox", "other"), "bndbox is missing"),
    "no corner": (document().replace("xmin", "other"), "xmin is missing"),
    "another kind": ("<LidcReadMessage/>", "expected 'annotation'"),
    "cut": (document()[:-20], "no well-formed XML"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_boxes(tmp_path, name):
    text, words = BAD[name]
    with pytest.raises(TableError) as caught:
        read_boxes(write(tmp_path, "1.2.3", text))
    message = str(caught.value)
    assert words in message
    assert message.isprintable()
    assert len(message) <= 200


def test_a_name_that_is_no_uid(tmp_path):
    with pytest.raises(TableError, match="no SOP instance UID"):
        read_boxes(write(tmp_path, "slice 7", document()))


@pytest.mark.shared_data
def test_real_boxes_of_two_series(shared_data):
    place = shared_data / "dicom" / "lung-pet-ct-dx"
    scans = [describe(series) for series in find_series(place / "Lung-PET-CT-Dx").series]
    files = [read_boxes(path) for path in sorted((place / "Annotation" / "A0001").glob("*.xml"))]
    assert len(files) == 20
    found = index_boxes(files, {scan.series_uid: [item.sop_uid for item in scan.slices] for scan in scans})
    assert found.unmatched == ()
    lesions = {scan.series_uid[-5:]: join_boxes(found.by_series[scan.series_uid]) for scan in scans}
    (one,), (other,) = lesions["40805"], lesions["41315"]
    assert (one.num_slices, other.num_slices) == (11, 9)
    assert one.subtype == other.subtype == "A"
    centres = [lesion.centre_xyz(scans[0].geometry) for lesion in (one, other)]
    assert max(abs(a - b) for a, b in zip(*centres, strict=True)) < 6  # one tumour, scanned twice, 5 mm slices
