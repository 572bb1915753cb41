"""Tables: each bad row costs itself alone, each bad table is one clean line. Matching and size order."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.candidates import (
    Table,
    match_annotations,
    read_annotations,
    read_candidates,
    read_malignancy,
    read_patients,
    size_order,
)
from lunaprep.errors import TableError
from lunaprep.manifest import opinions
from lunaprep.splits import split_by_name

from .bad_tables import CASES, GOOD, HEADERS, UID, OddTable

READERS: dict[str, Callable] = {
    "candidates": read_candidates,
    "annotations": read_annotations,
    "malignancy": read_malignancy,
    "patients": read_patients,
}
CSV = Path(__file__).parents[2] / "shared" / "data" / "luna16_csv"
C, GOOD_C = HEADERS["candidates"], GOOD["candidates"]


def of_kind(kind: str) -> pytest.MarkDecorator:
    cases = [case for case in CASES if case.kind == kind]
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def read(case: OddTable, folder: Path) -> tuple[int, tuple]:
    """Rows read and faults."""
    result = READERS[case.reader](case.write(folder / f"{case.reader}.csv"))
    if case.reader == "patients":
        return len(result[0]), result[1]
    return len(result.frame), result.faults


def put(folder: Path, content: bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def check_line(error: TableError, path: Path, words: str = "") -> None:
    message = str(error)
    assert words in message
    assert path.name in message
    assert message.isprintable(), repr(message)
    assert len(message) < 400


def attempt(path: Path, words: str = "") -> Table | None:
    """The candidates, or None where the table was refused cleanly."""
    try:
        return read_candidates(path)
    except TableError as error:
        check_line(error, path, words)
        return None


# Reading


def test_case_names_are_unique_and_there_are_enough():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len(names) >= 35


@of_kind("table")
def test_bad_table_is_one_clean_line_that_names_the_file(case, tmp_path):
    with pytest.raises(TableError) as info:
        read(case, tmp_path)
    check_line(info.value, tmp_path / f"{case.reader}.csv", case.words)


@of_kind("row")
def test_bad_row_is_left_out_with_its_line_and_the_rest_is_read(case, tmp_path):
    count, faults = read(case, tmp_path)
    assert [fault.line for fault in faults] == list(case.lines)
    assert case.words in str(faults[0])
    for fault in faults:
        assert str(fault).startswith(f"{case.reader}.csv, line {fault.line}: ")
        assert str(fault).isprintable(), repr(str(fault))
        assert len(str(fault)) < 200
    if case.name == "two-patients":
        assert count == 2  # as a mapping
    else:
        assert count == case.kept


@of_kind("legal")
def test_odd_but_legal_table_is_read_without_fault(case, tmp_path):
    count, faults = read(case, tmp_path)
    assert faults == ()
    assert count == (1 if case.name == "patient-named-twice-alike" else case.kept)


def test_good_rows_around_a_bad_one_keep_their_values_and_ids(tmp_path):
    path = put(tmp_path, C + b"a,1,2,3,0\nb,x,5,6,1\n\nc,7,8,9,1\nd,1,2\ne,-1.5,1e1,0,0\n")
    frame = read_candidates(path).frame
    assert frame.columns.tolist() == ["candidate_id", "series_uid", "x_mm", "y_mm", "z_mm", "is_nodule"]
    assert frame.to_numpy().tolist() == [
        [0, "a", 1, 2, 3, False],
        [3, "c", 7, 8, 9, True],
        [5, "e", -1.5, 10, 0, False],
    ]


def test_uids_stay_text(tmp_path):
    path = put(tmp_path, C + b"056,1,2,3,0\n56,1,2,3,0\n1e2,1,2,3,0\nNA,1,2,3,0\n,1,2,3,0\n")
    assert read_candidates(path).frame["series_uid"].tolist() == ["056", "56", "1e2", "NA"]


def test_columns_are_found_by_name_not_by_place(tmp_path):
    path = put(tmp_path, b"diameter_mm,note,coordZ,coordY,coordX,seriesuid\n4.5,x,3,2,1,u\n")
    row = read_annotations(path).frame.iloc[0]
    assert row.tolist() == [0, "u", 1, 2, 3, 4.5]


def test_malignancy_is_read_in_all_spellings(tmp_path):
    head = b"seriesuid,coordX,coordY,coordZ,diameter_mm,mal_bool\n"
    flags = [b"True", b"False", b"TRUE", b"false", b"1", b"0"]
    path = put(tmp_path, head + b"".join(b"u,1,2,3,4," + flag + b"\n" for flag in flags))
    frame = read_malignancy(path).frame
    assert frame["is_malignant"].tolist() == [True, False] * 3
    assert "patient_id" not in frame


def test_patients_are_read_with_leading_zeros(tmp_path):
    assert read_patients(put(tmp_path, b"seriesuid,patient_id\n1.20,007\n1.2,NA\n"))[0] == {"1.20": "007", "1.2": "NA"}


def test_first_patient_of_a_series_stays_however_often_another_is_named(tmp_path):
    path = put(tmp_path, b"seriesuid,patient_id\na,P1\na,P2\na,P2\n")
    patients, faults = read_patients(path)
    assert patients == {"a": "P1"}
    assert [fault.line for fault in faults] == [3, 4]


def test_spaces_around_a_series_uid_do_not_count_in_any_table(tmp_path):
    candidates = read_candidates(put(tmp_path, C + b" a ,1,2,3,0\n")).frame
    patients, _ = read_patients(put(tmp_path, b"seriesuid,patient_id\n a ,P1\n"))
    assert candidates["series_uid"].map(patients).tolist() == ["P1"]


def test_spaces_in_the_header_are_no_crash(tmp_path):
    got = attempt(put(tmp_path, C.replace(b",", b", ") + GOOD_C))
    assert got is None or got.frame["series_uid"].tolist() == [UID]


def test_open_quote_is_not_taken_for_one_bad_row(tmp_path):
    """Arrow swallows all that follows, so that one row fault would stand for a thousand lost rows."""
    got = attempt(put(tmp_path, C + b'"u,1,2,3,0\n' + GOOD_C * 1000))
    assert got is None or len(got.frame) == 1000


@pytest.mark.parametrize("content", [b'"u\nv",1,2,3,0\nw,x,2,3,0\n', b'u,"1\n",2,3,0\nw,x,2,3,0\n'])
def test_line_end_within_quotes_does_not_shift_line_numbers(tmp_path, content):
    got = attempt(put(tmp_path, C + content))
    assert got is None or got.faults[-1].line == 4
    assert got is None or not any("\n" in uid for uid in got.frame["series_uid"])


@pytest.mark.parametrize("content", [b"\nu,1,2,3,0\rv,1,2,3,0\n", b"\nu,1,2\rv,1,2\rw,1\n" + GOOD_C])
def test_lone_carriage_return_is_no_crash(tmp_path, content):
    got = attempt(put(tmp_path, C + GOOD_C + content))
    assert got is None or got.frame["series_uid"].tolist()[0] == UID


def test_uid_of_another_encoding_is_named(tmp_path):
    path = put(tmp_path, C + GOOD_C + b"\xff\xfe,1,2,3,0\n")
    got = attempt(path, words="UTF8")
    assert got is None or [fault.line for fault in got.faults] == [3]


def test_line_longer_than_a_block_is_one_clean_line(tmp_path):
    got = attempt(put(tmp_path, C + GOOD_C + b"u" * (34 << 20) + b",1,2,3,0\n"))
    assert got is None or len(got.frame) == 2


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_spoilt_bytes_give_a_table_or_one_clean_line(data, tmp_path_factory):
    content = bytearray(C + GOOD_C + b'"v",1,2,3,1\n' + GOOD_C)
    pieces = st.sampled_from([b"", b"\r", b"\n", b"\n\n", b'"', b",", b"\0", b" ", b"\xff", b"\\", b"'", b"1", b"\r\n"])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(pieces)
    got = attempt(put(tmp_path_factory.getbasetemp(), bytes(content), "spoilt.csv"))
    if got is not None:
        num_lines = len(re.split(rb"\r\n|\r|\n", bytes(content)))
        assert all(1 < fault.line <= num_lines for fault in got.faults)
        assert got.frame["candidate_id"].is_unique
        assert np.isfinite(got.frame[["x_mm", "y_mm", "z_mm"]].to_numpy()).all()


# Matching


def frame_of(rows: list[tuple], columns: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=columns)
    kinds = {"series_uid": "str", "is_nodule": "bool"}
    return frame.astype({name: kinds.get(name, "float64") for name in columns})


PLACE = ["series_uid", "x_mm", "y_mm", "z_mm"]
# a coarse grid, so that ties and points exactly on a radius do come up
coordinate = st.integers(-12, 12).map(lambda n: n / 2)
place = st.tuples(st.sampled_from("abc"), coordinate, coordinate, coordinate)
nodule = st.tuples(st.sampled_from("abd"), coordinate, coordinate, coordinate, st.integers(1, 24).map(float))


def naive_match(points: list[tuple], nodules: list[tuple], rule: str) -> list[int]:
    found = []
    for uid, *xyz in points:
        best, nearest = -1, float("inf")
        for k, (other, *center, diameter) in enumerate(nodules):
            if other != uid:
                continue
            offsets = [abs(a - b) for a, b in zip(xyz, center, strict=True)]
            if rule == "book":
                if all(offset <= diameter / 4 for offset in offsets):
                    best = k
                    break
            else:
                distance = sum(offset**2 for offset in offsets) ** 0.5
                if distance < diameter / 2 and distance < nearest:
                    best, nearest = k, distance
        found.append(best)
    return found


@pytest.mark.parametrize("rule", ["radius", "book"])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(points=st.lists(place, max_size=12), nodules=st.lists(nodule, max_size=12))
def test_match_equals_a_double_loop(rule, points, nodules):
    got = match_annotations(frame_of(points, PLACE), frame_of(nodules, [*PLACE, "diameter_mm"]), rule)
    assert got.tolist() == naive_match(points, nodules, rule)


def match_one(point: tuple, nodules: list[tuple], rule: str) -> int:
    rows = [("a", *nodule) for nodule in nodules]
    found = match_annotations(frame_of([("a", *point)], PLACE), frame_of(rows, [*PLACE, "diameter_mm"]), rule)
    return int(found[0])


def test_point_exactly_at_the_radius_is_no_hit():
    assert match_one((3, 4, 0), [(0, 0, 0, 10)], "radius") == -1
    assert match_one((3, 3.999, 0), [(0, 0, 0, 10)], "radius") == 0


def test_point_exactly_at_a_quarter_diameter_is_a_hit_of_the_book():
    assert match_one((2.5, -2.5, 2.5), [(0, 0, 0, 10)], "book") == 0
    assert match_one((2.5, -2.5, 2.5001), [(0, 0, 0, 10)], "book") == -1


def test_radius_takes_the_nearest_and_the_book_the_first():
    nodules = [(4, 0, 0, 30), (1, 0, 0, 30)]
    assert match_one((0, 0, 0), nodules, "radius") == 1
    assert match_one((0, 0, 0), nodules, "book") == 0
    assert match_one((0, 0, 0), nodules[::-1], "book") == 0


def test_tie_goes_to_the_earlier_annotation():
    assert match_one((0, 0, 0), [(9, 9, 9, 4), (1, 0, 0, 8), (-1, 0, 0, 8)], "radius") == 1


def test_nodule_of_another_series_is_no_match():
    points = frame_of([("a", 0, 0, 0), ("z", 0, 0, 0)], PLACE)
    nodules = frame_of([("b", 0, 0, 0, 9)], [*PLACE, "diameter_mm"])
    assert match_annotations(points, nodules, "radius").tolist() == [-1, -1]


# Order by size

candidate = st.tuples(
    st.booleans(), st.sampled_from([float("nan"), 3.0, 3.5, 20.0]), st.sampled_from(["a", "b", "10", "9"]),
    coordinate, coordinate, coordinate,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=st.lists(candidate, max_size=30, unique_by=lambda r: (r[0], str(r[1]), *r[2:])))
def test_size_order_is_the_books_sorted_tuples(rows):
    frame = frame_of(rows, ["is_nodule", "diameter_mm", "series_uid", "x_mm", "y_mm", "z_mm"])
    frame = frame.assign(candidate_id=range(len(frame)))
    tuples = [(flag, 0.0 if size != size else size, uid, (x, y, z)) for flag, size, uid, x, y, z in rows]
    assert [tuples[i] for i in size_order(frame)] == sorted(tuples, reverse=True)


def test_size_order_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    rows = [(True, 4.0, "a", 0.0, 0.0, 0.0)] * 5 + [(False, float("nan"), "b", 1.0, 0.0, 0.0)] * 5
    frame = frame_of(rows, ["is_nodule", "diameter_mm", "series_uid", "x_mm", "y_mm", "z_mm"])
    frame = frame.assign(candidate_id=range(10))
    shuffled = frame.iloc[rng.permutation(10)].reset_index(drop=True)
    first, second = (f["candidate_id"].to_numpy()[size_order(f)] for f in (frame, shuffled))
    assert first.tolist() == second.tolist()


# Malignancy


def test_annotation_without_a_labelled_nodule_has_no_malignancy():
    columns = [*PLACE, "diameter_mm"]
    annotations = frame_of([("a", 0, 0, 0, 8), ("a", 50, 0, 0, 8), ("b", 0, 0, 0, 8)], columns)
    labelled = frame_of([("a", 0.1, 0, 0, 8), ("b", 0, 0, 0, 8)], columns).assign(is_malignant=[True, False])
    got = opinions(annotations, labelled)["is_malignant"].array
    assert [None if pd.isna(v) else bool(v) for v in got] == [True, None, False]
    assert opinions(annotations, None).isna().all().all()


# LUNA16 itself

shared = pytest.mark.skipif(not CSV.is_dir(), reason="no shared data")


@pytest.mark.shared_data
@shared
def test_luna16s_own_tables_are_read_without_fault():
    annotations = read_annotations(CSV / "annotations.csv")
    malignancy = read_malignancy(CSV / "annotations_with_malignancy.csv")
    patients, faults = read_patients(CSV / "luna16_series_to_lidc_patient.csv")
    assert (len(annotations.frame), len(malignancy.frame), len(patients)) == (1186, 1182, 888)
    assert annotations.faults == malignancy.faults == faults == ()


@pytest.mark.shared_data
@shared
def test_luna16s_book_split_has_the_published_counts():
    uids = (CSV / "seriesuids.csv").read_text().split()
    split = split_by_name(uids, 10)
    validating = [uid for uid in split if split[uid] == "val"]
    annotations = read_annotations(CSV / "annotations.csv").frame
    malignancy = read_malignancy(CSV / "annotations_with_malignancy.csv").frame
    mine = annotations["series_uid"].isin(validating)
    flags = opinions(annotations, malignancy)["is_malignant"].array
    assert len(uids) == 888
    assert (len(validating), int(mine.sum())) == (89, 154)
    assert int((flags.fillna(False) & mine.to_numpy()).sum()) == 52
    assert int((malignancy["series_uid"].isin(validating) & malignancy["is_malignant"]).sum()) == 52
