"""Splits: a patient's scans stay together, every k-th validates, both sides see all sizes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.candidates import read_annotations, read_patients
from lunaprep.sources.luna16 import TablePaths, read_source
from lunaprep.splits import largest_nodules, split_by_name, split_by_rank, split_by_series

CSV = Path(__file__).parents[2] / "shared" / "data" / "luna16_csv"
shared = pytest.mark.skipif(not CSV.is_dir(), reason="no shared data")

series = st.dictionaries(
    st.integers(0, 10**6).map(lambda n: f"1.2.{n}"), st.sampled_from([0.0, 3.0, 4.5, 4.5, 9.0, 30.0]), max_size=40
)
stride = st.integers(2, 12)


@st.composite
def cohort(draw):
    """Series with their largest nodules, and the patients of some of them."""
    largest = draw(series)
    patients = {uid: f"P{draw(st.integers(0, 8))}" for uid in largest if draw(st.booleans())}
    return largest, patients


def naive_split(largest: dict[str, float], patients: dict[str, str], val_stride: int) -> dict[str, str]:
    sizes: dict[str, float] = {}
    for uid, size in largest.items():
        name = patients.get(uid, uid)
        sizes[name] = max(size, sizes.get(name, 0.0))
    by_size = sorted(sorted(sizes), key=lambda name: sizes[name], reverse=True)  # stable: names ascend within a size
    part = {name: "val" if i % val_stride == 0 else "train" for i, name in enumerate(by_size)}
    return {uid: part[patients.get(uid, uid)] for uid in largest}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cohort=cohort(), val_stride=stride)
def test_series_split_equals_a_plain_loop(cohort, val_stride):
    largest, patients = cohort
    assert split_by_series(largest, patients, val_stride) == naive_split(largest, patients, val_stride)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cohort=cohort(), val_stride=stride)
def test_a_patients_series_lie_on_one_side(cohort, val_stride):
    largest, patients = cohort
    split = split_by_series(largest, patients, val_stride)
    assert set(split) == set(largest)
    for patient in set(patients.values()):
        assert len({split[uid] for uid in patients if patients[uid] == patient}) == 1


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cohort=cohort(), val_stride=stride, random=st.randoms(use_true_random=False))
def test_split_does_not_depend_on_the_order_of_its_inputs(cohort, val_stride, random):
    largest, patients = cohort
    uids, known = list(largest), list(patients)
    random.shuffle(uids)
    random.shuffle(known)
    again = split_by_series({uid: largest[uid] for uid in uids}, {uid: patients[uid] for uid in known}, val_stride)
    assert again == split_by_series(largest, patients, val_stride)
    assert split_by_name(uids, val_stride) == split_by_name(sorted(uids), val_stride)


@pytest.mark.parametrize(("count", "val_stride", "expected"), [(100, 10, 10), (101, 10, 11), (1, 10, 1), (9, 2, 5)])
def test_every_kth_validates_and_the_first_is_among_them(count, val_stride, expected):
    largest = {f"s{i:03d}": float(i) for i in range(count)}
    split = split_by_series(largest, {}, val_stride)
    validating = sorted((uid for uid in split if split[uid] == "val"), reverse=True)
    assert len(validating) == expected
    assert validating == sorted(largest, reverse=True)[::val_stride]


def test_both_sides_see_nodules_of_all_sizes():
    rng = np.random.default_rng(1)
    largest = {f"s{i}": float(size) for i, size in enumerate(rng.lognormal(2, 0.6, 400))}
    split = split_by_series(largest, {}, 10)
    bins = np.quantile(list(largest.values()), [0, 0.25, 0.5, 0.75, 1])
    for side in ("train", "val"):
        sizes = [largest[uid] for uid in largest if split[uid] == side]
        share = np.histogram(sizes, bins)[0] / len(sizes)
        assert np.abs(share - 0.25).max() < 0.03, (side, share)


def test_a_patients_largest_scan_places_all_of_its_scans():
    split = split_by_series({"a": 1.0, "b": 20.0, "c": 10.0, "d": 5.0}, {"a": "P", "b": "P"}, 2)
    assert split == {"a": "val", "b": "val", "c": "train", "d": "val"}


def test_a_series_named_like_a_patient_is_no_crash():
    assert set(split_by_series({"a": 1.0, "b": 2.0}, {"a": "b"}, 2)) == {"a", "b"}


def test_no_series_is_an_empty_split():
    assert split_by_series({}, {"a": "P"}, 10) == split_by_name([], 10) == {}


def test_split_by_name_takes_every_kth_of_the_sorted_names_once_each():
    uids = ["d", "b", "a", "c", "b", "e", "a"]
    assert split_by_name(uids, 2) == {"a": "val", "b": "train", "c": "val", "d": "train", "e": "val"}


@given(count=st.integers(0, 60), val_stride=stride, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_split_by_rank_takes_every_kth_rank_wherever_it_stands(count, val_stride, seed):
    rank = np.random.default_rng(seed).permutation(count).astype(np.int64)
    got = split_by_rank(rank, val_stride)
    assert got.tolist() == ["val" if n % val_stride == 0 else "train" for n in rank.tolist()]
    assert got.categories.tolist() == ["train", "val"]


def test_largest_nodule_is_the_largest_and_0_where_there_is_none():
    annotations = pd.DataFrame({"series_uid": ["a", "b", "a"], "diameter_mm": [3.0, 7.0, 5.5]})
    assert largest_nodules(["a", "c"], annotations) == {"a": 5.5, "c": 0.0}
    assert largest_nodules(["a"], annotations.iloc[:0]) == {"a": 0.0}


def test_series_without_a_patient_in_the_malignancy_table_are_not_one_patient(tmp_path):
    (tmp_path / "subset0").mkdir()
    (tmp_path / "subset0" / "a.mhd").touch()
    head = "seriesuid,coordX,coordY,coordZ,"
    (tmp_path / "candidates.csv").write_text(head + "class\n")
    (tmp_path / "annotations.csv").write_text(head + "diameter_mm\n")
    (tmp_path / "annotations_with_malignancy.csv").write_text(
        head + "diameter_mm,mal_bool,patient_id\na,1,2,3,4,True,\nb,1,2,3,4,True,\nc,1,2,3,4,True,P1\n"
    )
    patients = read_source(tmp_path, None, TablePaths()).patients
    known = {uid: patients[uid] for uid in "abc" if patients.get(uid)}
    assert known == {"c": "P1"}
    split = split_by_series(dict.fromkeys("abc", 4.0), {uid: p for uid, p in patients.items() if uid in "abc"}, 3)
    assert sorted(split.values()) == ["train", "train", "val"]


@pytest.mark.shared_data
@shared
def test_luna16s_patient_with_two_scans_lies_on_one_side_for_every_stride():
    uids = (CSV / "seriesuids.csv").read_text().split()
    patients, _ = read_patients(CSV / "luna16_series_to_lidc_patient.csv")
    annotations = read_annotations(CSV / "annotations.csv").frame
    by_patient: dict[str, list[str]] = {}
    for uid in uids:
        by_patient.setdefault(patients[uid], []).append(uid)
    twins = [mine for mine in by_patient.values() if len(mine) > 1]
    assert [len(mine) for mine in twins] == [2]
    apart = 0
    for val_stride in range(2, 40):
        split = split_by_series(largest_nodules(uids, annotations), patients, val_stride)
        assert len({split[uid] for uid in twins[0]}) == 1
        assert sum(part == "val" for part in split.values()) in (-(-887 // val_stride), -(-887 // val_stride) + 1)
        alone = split_by_series(largest_nodules(uids, annotations), {}, val_stride)
        apart += len({alone[uid] for uid in twins[0]}) == 2
    assert apart  # without the patients they do fall apart
