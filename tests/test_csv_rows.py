"""Columns of text from a CSV stream, and orders: as Python's csv module and NumPy have them, whatever the blocks."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep import candidates as candidates_module
from lunaprep import csv_rows
from lunaprep.candidates import XYZ, order_by_groups, read_candidates, series_codes
from lunaprep.errors import TableError

from .bad_tables import HEADERS

UIDS = st.sampled_from(["1.2", " 1.10 ", "056", "NA", "é", "1.2\t"])
NUMBERS = st.one_of(
    st.floats(-9e4, 9e4).map(repr), st.sampled_from([" 1", "1e5 ", "nan", "-Infinity", "", "x", "1e6", "+.5", "0x1"])
)
LINES = st.one_of(
    st.tuples(UIDS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(["0", "1", "2", " 1"])).map(",".join),
    st.sampled_from(["", "a,1,2", "a,1,2,3,0,7"]),
)


def rows_by_csv(text: str) -> tuple[list[tuple], list[int]]:
    """Good rows with their ids, and the lines of the bad ones, line by line with the csv module."""
    good, bad = [], []
    for line, fields in enumerate(csv.reader(io.StringIO(text)), start=1):
        if line == 1 or not fields:
            continue
        try:
            uid, *xyz, label = fields
            places = [float(value) for value in xyz]
            assert len(places) == 3
            assert uid.strip()
            assert all(abs(value) <= 1e5 for value in places)
            good.append((line - 2, uid.strip(), *places, {"0": False, "1": True}[label]))
        except (ValueError, AssertionError, KeyError):
            bad.append(line)
    return good, bad


@pytest.mark.parametrize("block", [256, 1 << 24])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(lines=st.lists(LINES, max_size=30))
def test_candidates_are_those_of_the_csv_module(block, lines, tmp_path_factory):
    text = HEADERS["candidates"].decode() + "\n".join(lines)
    path = tmp_path_factory.getbasetemp() / "candidates.csv"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_rows, "BLOCK_BYTES", block)
        table = read_candidates(path)
    good, bad = rows_by_csv(text)
    assert [tuple(row) for row in table.frame.itertuples(index=False)] == good
    assert [fault.line for fault in table.faults] == bad
    assert table.frame["series_uid"].cat.categories.is_monotonic_increasing


def test_what_arrow_cannot_read_is_told_of_text_not_of_its_codes(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(HEADERS["candidates"] + b"\xff\xfe,1,2,3,0\n")
    with pytest.raises(TableError, match="error to string: invalid UTF8 data"):
        read_candidates(path)


@pytest.mark.parametrize("size", [1, 3, 1 << 13])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), max_size=40))
def test_order_by_groups_is_numpys_lexsort(size, rows):
    first, second, groups = np.array(rows, dtype=np.int32).reshape(-1, 3).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates_module, "SORT_ROWS", size)
        got = order_by_groups(groups, lambda at: [first[at], second[at]])
    assert got.tolist() == np.lexsort([first, second, groups]).tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.sampled_from(["b", "a", "10", "9", "é", "z"])),
    known=st.permutations(["z", "é", "9", "10", "a", "b"]),
)
def test_series_codes_count_the_names_in_ascending_order(texts, known):
    for column in (pd.Series(texts, dtype="str"), pd.Series(pd.Categorical(texts, categories=known))):
        codes, names = series_codes(column)
        assert names == sorted(names)
        assert [names[code] for code in codes] == texts


def test_many_rows_are_matched_as_few(monkeypatch):
    rng = np.random.default_rng(0)
    points = pd.DataFrame(
        {"series_uid": rng.choice(list("abc"), 200), **dict(zip(XYZ, rng.uniform(0, 9, (3, 200)), strict=True))}
    )
    nodules = points.iloc[::7].assign(diameter_mm=4.0)
    whole = candidates_module.match_annotations(points, nodules, "radius")
    monkeypatch.setattr(candidates_module, "MATCH_ROWS", 9)
    assert candidates_module.match_annotations(points, nodules, "radius").tolist() == whole.tolist()
