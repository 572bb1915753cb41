"""The challenge's rules: against a slow reading of them of its own, by hand, and on its own tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from lunatrain.errors import UsageError
from lunatrain.froc import RATES, evaluate_froc
from lunatrain.marks import read_annotations, read_series_uids

from ..conftest import Figure

MARK = ["series_uid", "x_mm", "y_mm", "z_mm", "probability"]
FINDING = ["series_uid", "x_mm", "y_mm", "z_mm", "diameter_mm"]
TOLERANCE = 1e-12


def frame(rows: list[tuple], columns: list[str]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({"series_uid": "str", **dict.fromkeys(columns[1:], "float64")})


# ---- a reading of the rules with dictionaries and loops, which shares no code with lunatrain


def hits(marks: dict[int, tuple], finding: tuple) -> list[int]:
    radius = 5.0 if finding[3] < 0 else finding[3] / 2
    apart = {n: [a - b for a, b in zip(mark[:3], finding[:3], strict=True)] for n, mark in marks.items()}
    return [n for n, (x, y, z) in apart.items() if x * x + y * y + z * z < radius * radius]


def judge_scan(marks: dict[int, tuple], nodules: dict[int, tuple], excluded: list[tuple]) -> dict[str, Any]:
    """One scan: verdict of each mark, best probability of each nodule."""
    verdicts = {}
    considered = dict(marks)
    if len(marks) > 100:
        limit = sorted((mark[3] for mark in marks.values()), reverse=True)[100]
        considered = {number: mark for number, mark in marks.items() if mark[3] > limit}
        verdicts = dict.fromkeys(marks.keys() - considered.keys(), "beyond_limit")

    pool = set(considered)
    best: dict[int, float | None] = {}
    nodules_hit: dict[int, list[int]] = {}
    winners = set()
    for name, nodule in nodules.items():
        found = hits(considered, nodule)
        pool -= set(found)
        best[name] = max((considered[n][3] for n in found), default=None)
        if found:
            winners.add(next(n for n in sorted(found) if considered[n][3] == best[name]))
        for n in found:
            nodules_hit.setdefault(n, []).append(name)
    for finding in excluded:
        gone = pool & set(hits(considered, finding))
        pool -= gone
        verdicts |= dict.fromkeys(gone, "on_excluded")
    for n in considered:
        if n in nodules_hit:
            verdicts[n] = "hit" if n in winners else "double"
        elif n in pool:
            verdicts[n] = "false_positive"
    return {"verdicts": verdicts, "best": best, "hit": nodules_hit, "wrong": [considered[n][3] for n in pool]}


def naive_curve(scans: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """FROC of judged scans; a scan may be there more than once."""
    found = [p for scan in scans for p in scan["best"].values() if p is not None]
    wrong = [p for scan in scans for p in scan["wrong"]]
    number = sum(len(scan["best"]) for scan in scans)
    if not number:
        return np.zeros(1), np.full(1, np.nan)
    if not found and not wrong:
        return np.zeros(1), np.zeros(1)
    if not found or not wrong:
        scores = np.array(sorted(set(found + wrong), reverse=True))
        above = [sum(p >= score for p in found + wrong) for score in scores]
        counts = np.array([0, *above], dtype=float)
        none = np.zeros(len(counts))
        # the same order of rounding as with both
        return (
            (none, counts / len(found) * len(found) / number)
            if found
            else (counts / len(wrong) * len(wrong) / len(scans), none)
        )
    fpr, tpr, _ = roc_curve([1] * len(found) + [0] * len(wrong), found + wrong)
    return fpr * len(wrong) / len(scans), tpr * len(found) / number


def naive(marks: pd.DataFrame, annotations: pd.DataFrame, excluded: pd.DataFrame, uids: list[str]) -> dict[str, Any]:
    def of(table: pd.DataFrame, uid: str) -> dict[int, tuple]:
        return {n: tuple(row[1:]) for n, row in enumerate(table.itertuples(index=False)) if row[0] == uid}

    scans = [judge_scan(of(marks, uid), of(annotations, uid), list(of(excluded, uid).values())) for uid in uids]
    verdicts = {n: verdict for scan in scans for n, verdict in scan["verdicts"].items()}
    fps, sensitivity = naive_curve(scans)
    return {
        "scans": scans,
        "verdicts": [verdicts.get(n, "scan_not_listed") for n in range(len(marks))],
        "at": [float(np.interp(rate, fps, sensitivity)) for rate in RATES],
        "fps": fps,
        "sensitivity": sensitivity,
        "missed": sum(best is None for scan in scans for best in scan["best"].values()),
        "twice": sum(len(nodules) > 1 for scan in scans for nodules in scan["hit"].values()),
        "annotation": [
            min((scan["hit"][n] for scan in scans if n in scan["hit"]), default=[-1])[0] for n in range(len(marks))
        ],
    }


def random_case(seed: int, num_scans: int, crowd: int, levels: int) -> tuple[pd.DataFrame, ...]:
    """Everything on a small grid, so that distances are often exactly a radius and findings overlap."""
    random = np.random.default_rng(seed)
    uids = [f"{k:03d}" for k in range(num_scans)]
    size = 14 if crowd else 7

    def places(number: int, names: list[str]) -> list[list]:
        return [[str(random.choice(names)), *random.integers(0, size, 3).astype(float)] for _ in range(number)]

    also = [*uids, "elsewhere"]
    nodules = [[*p, random.choice([2.0, 4.0, 5.5, 6.0, 10.0])] for p in places(random.integers(0, 8), also)]
    nodules += [[*nodule[:4], 6.0] for nodule in nodules[:1]]  # a nodule annotated twice
    others = [[*p, random.choice([-1.0, -1.0, 3.0, 6.0])] for p in places(random.integers(0, 6), also)]
    number = random.integers(0, 25) + crowd
    marks = [[*p, random.integers(0, levels) / levels] for p in places(number, [*uids, "000"] if crowd else also)]
    for finding in [*nodules, *others]:  # more hits than chance would give, some at the radius exactly
        offset = random.integers(-3, 4, 3) * random.integers(0, 2, 3)
        marks.append([finding[0], *(finding[1:4] + offset), random.integers(levels // 2, levels) / levels])
    if marks:
        marks.append(["000", *marks[0][1:]])
    if nodules:
        nodules.append(["000", *nodules[0][1:]])
    return frame(marks, MARK), frame(nodules, FINDING), frame(others, FINDING), uids


CASES = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([0, 0, 150, 400]), st.sampled_from([2, 5, 40, 10**6])
)


@settings(max_examples=80, deadline=None)  # and thousands in the soak below
@given(CASES)
def test_any_submission_is_scored_as_the_slow_reading_scores_it(case: tuple[int, int, int, int]) -> None:
    marks, annotations, excluded, uids = random_case(*case)
    expected = naive(marks, annotations, excluded, uids)
    got = evaluate_froc(marks, annotations, excluded, uids)
    assert got.marks["verdict"].tolist() == expected["verdicts"]
    assert got.marks["annotation"].tolist() == expected["annotation"]
    np.testing.assert_allclose(got.at_rates, expected["at"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got.cpm, np.mean(expected["at"]), rtol=0, atol=TOLERANCE)
    assert (got.counts.nodules_missed, got.counts.marks_on_two_nodules) == (expected["missed"], expected["twice"])
    counts = got.counts
    assert counts.marks_read == len(marks) == (
        counts.marks_not_listed + counts.marks_beyond_limit + counts.marks_hit + counts.marks_double
        + counts.marks_on_excluded + counts.false_positives
    )  # fmt: skip
    if len(expected["fps"]) == len(got.fp_per_scan):
        np.testing.assert_allclose(got.fp_per_scan, expected["fps"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(got.sensitivity, expected["sensitivity"], rtol=0, atol=TOLERANCE)
    else:  # only where one of the two is missing altogether does scikit-learn give no curve
        assert not counts.nodules_found or not counts.false_positives


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_submissions_are_scored_as_the_slow_reading_scores_them(figure: Figure) -> None:
    draw = np.random.default_rng(77)
    for seed in range(figure(1, 5_000)):
        case = seed, int(draw.integers(1, 13)), int(draw.choice([0, 0, 0, 150])), int(draw.choice([2, 5, 40, 10**6]))
        marks, annotations, excluded, uids = random_case(*case)
        expected, got = naive(marks, annotations, excluded, uids), evaluate_froc(marks, annotations, excluded, uids)
        assert got.marks["verdict"].tolist() == expected["verdicts"], case
        np.testing.assert_allclose(got.at_rates, expected["at"], rtol=0, atol=TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(CASES)
def test_the_interval_is_that_of_scans_drawn_and_scored_one_by_one(case: tuple[int, int, int, int]) -> None:
    marks, annotations, excluded, uids = random_case(*case)
    scans = naive(marks, annotations, excluded, uids)["scans"]
    got = evaluate_froc(marks, annotations, excluded, uids, num_bootstrap=20, seed=case[0] % 1000).ci
    random = np.random.default_rng(case[0] % 1000)
    curves = []
    for _ in range(20):
        fps, sensitivity = naive_curve([scans[k] for k in random.integers(len(uids), size=len(uids))])
        if not np.isnan(sensitivity).any():
            curves.append([np.interp(rate, fps, sensitivity) for rate in RATES])
    curves = np.array(curves or [[np.nan] * 7])
    low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    np.testing.assert_allclose(got.at_rates_low, low, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got.at_rates_high, high, rtol=0, atol=TOLERANCE)
    cpm = curves.mean(axis=1)
    expected = [cpm.mean(), *np.percentile(cpm, [2.5, 97.5])]
    np.testing.assert_allclose([got.cpm_mean, got.cpm_low, got.cpm_high], expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got.mean[:: len(got.mean) // 6], curves.mean(axis=0), rtol=0, atol=TOLERANCE)


def test_a_tiny_submission_by_hand() -> None:
    annotations = frame([("a", 0, 0, 0, 10), ("a", 50, 0, 0, 10), ("b", 0, 0, 0, 4)], FINDING)
    excluded = frame([("b", 80, 0, 0, -1), ("b", 0, 80, 0, 4)], FINDING)
    marks = [
        ("a", 4.9, 0, 0, 0.7),  # hits the first nodule
        ("a", 0, 1, 0, 0.9),  # hits it too, and better: the nodule is found at 0.9
        ("a", 55, 0, 0, 0.95),  # exactly the radius away from the second: a false positive
        ("b", 84, 0, 0, 0.99),  # 4 mm from a finding that is taken as 10 mm wide: counts for nothing
        ("b", 0, 82, 0, 0.5),  # exactly the radius away from an excluded finding: a false positive
        ("b", 0, 0, 1, 0.4),  # hits the nodule of b
    ]
    got = evaluate_froc(frame(marks, MARK), annotations, excluded, ["a", "b", "c", "d"])
    assert got.marks["verdict"].tolist() == ["double", "hit", "false_positive", "on_excluded", "false_positive", "hit"]
    assert got.marks["annotation"].tolist() == [0, 0, -1, -1, -1, 2]
    # four scans, three nodules; from the top: FP 0.95, TP 0.9, FP 0.5, TP 0.4
    np.testing.assert_allclose(got.fp_per_scan, [0, 0.25, 0.25, 0.5, 0.5])
    np.testing.assert_allclose(got.sensitivity, [0, 0, 1 / 3, 1 / 3, 2 / 3])
    # 1/8 lies between (0, 0) and (1/4, 0); at 1/4 and 1/2 the upper end of the step counts; then level
    np.testing.assert_allclose(got.at_rates, [0, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert got.cpm == pytest.approx((1 / 3 + 5 * 2 / 3) / 7)
    assert got.nodules["found"].tolist() == [True, False, True]
    assert got.nodules["probability"].fillna(-1).tolist() == [0.9, -1, 0.4]
    assert got.counts.nodules_missed == 1


def test_below_the_first_false_positive_rate_the_curve_rises_from_nothing() -> None:
    """The lowest point of the curve is joined to (0, 0) by a line."""
    annotations = frame([("a", 0, 0, 0, 10), ("b", 0, 0, 0, 10)], FINDING)
    marks = frame([("a", 0, 0, 0, 0.9), ("a", 50, 0, 0, 0.9), ("b", 0, 0, 0, 0.1)], MARK)
    got = evaluate_froc(marks, annotations, None, ["a", "b"])
    np.testing.assert_allclose(got.at_rates[:4], [0.125, 0.25, 1.0, 1.0])  # (0, 0) to (1/2, 1/2), then a step


def test_a_mark_may_find_two_nodules_and_is_no_false_positive_beside_an_excluded_one() -> None:
    annotations = frame([("a", 0, 0, 0, 10), ("a", 2, 0, 0, 10)], FINDING)
    marks = frame([("a", 1, 0, 0, 0.5)], MARK)
    got = evaluate_froc(marks, annotations, annotations, ["a"])
    assert (got.counts.nodules_found, got.counts.marks_hit, got.counts.marks_on_two_nodules) == (2, 1, 1)
    assert got.cpm == 1
    assert "1 marks hit more than one" in got.text()


@pytest.mark.parametrize(
    ("number", "ties", "kept"), [(100, 0, 100), (101, 0, 100), (101, 1, 99), (150, 60, 90), (101, 100, 0)]
)
def test_of_more_than_100_marks_those_above_the_101st_highest_count(number: int, ties: int, kept: int) -> None:
    scores = np.linspace(1, 0.5, number)
    if ties:  # so many before the 101st are equal to it
        scores[100 - ties : 101] = scores[100]
    marks = frame([("a", 100.0 + k, 0, 0, score) for k, score in enumerate(scores)], MARK)
    got = evaluate_froc(marks, frame([("a", 0, 0, 0, 5)], FINDING), None, ["a"])
    assert got.counts.false_positives == (number if number <= 100 else min(kept, 100 - ties))
    assert got.counts.marks_beyond_limit == number - got.counts.false_positives


def test_without_the_excluded_findings_the_score_is_lower() -> None:
    annotations, excluded = frame([("a", 0, 0, 0, 5)], FINDING), frame([("a", 50, 0, 0, -1)], FINDING)
    marks = frame([("a", 50, 0, 0, 0.9), ("a", 0, 0, 0, 0.8)], MARK)
    assert evaluate_froc(marks, annotations, excluded, ["a"]).cpm == 1
    assert evaluate_froc(marks, annotations, None, ["a"]).cpm < 1


def test_no_marks_is_a_sensitivity_of_0_and_no_nodules_is_none() -> None:
    annotations = frame([("a", 0, 0, 0, 5)], FINDING)
    empty = evaluate_froc(frame([], MARK), annotations, None, ["a"], num_bootstrap=3)
    assert (empty.cpm, empty.ci.cpm_high, empty.counts.nodules_missed) == (0, 0, 1)
    assert "there are no marks" in empty.warnings[0]
    marks = frame([("a", 0, 0, 0, 0.9)], MARK)
    none = evaluate_froc(marks, frame([], FINDING), frame([], FINDING), ["a"], num_bootstrap=3)
    assert np.isnan([none.cpm, none.ci.cpm_low]).all()
    assert none.to_json()["cpm"] is None
    assert "no nodules" in none.warnings[0]


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    marks, annotations, excluded, uids = random_case(3, 12, 0, 40)
    one, same, other = (evaluate_froc(marks, annotations, excluded, uids, 50, seed).ci for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.low, same.low)
    assert not np.array_equal(one.mean, other.mean)


def test_the_order_of_marks_and_scans_does_not_matter() -> None:
    marks, annotations, excluded, uids = random_case(11, 4, 150, 10**6)
    one = evaluate_froc(marks, annotations, excluded, uids)
    other = evaluate_froc(marks.sample(frac=1, random_state=1), annotations[::-1], excluded[::-1], uids[::-1])
    np.testing.assert_array_equal(one.fp_per_scan, other.fp_per_scan)
    np.testing.assert_array_equal(one.sensitivity, other.sensitivity)
    assert one.counts == other.counts


ONE = frame([("a", 0, 0, 0, 5)], FINDING)


@pytest.mark.parametrize(
    ("marks", "annotations", "uids", "words"),
    [
        (frame([("x", 0, 0, 0, 1)], MARK), ONE, ["a"], "none of the marks is in a listed scan"),
        (frame([("a", 0, 0, 0, 1)], MARK), frame([("x", 0, 0, 0, 5)], FINDING), ["a"], "none of the annotations"),
        (frame([("a", 0, 0, 0, np.nan)], MARK), ONE, ["a"], "marks: probability is nan in row 0 (1 such rows)"),
        (frame([("a", 0, np.inf, 0, 1)], MARK), ONE, ["a"], "marks: y_mm is inf"),
        (frame([("a", 0, 0, 0, 1)], MARK), frame([("a", 0, 0, 0, np.nan)], FINDING), ["a"], "diameter_mm is nan"),
        (frame([("a", 0, 0, 0, 1)], MARK), ONE, ["a", "a"], "2 scans are listed, 1 different"),
        (frame([("a", 0, 0, 0, 1)], MARK), ONE, [], "0 scans are listed"),
        (pd.DataFrame({"series_uid": ["a"]}), ONE, ["a"], "marks has no column x_mm"),
        (pd.DataFrame([[56, 0, 0, 0, 1]], columns=MARK), ONE, ["056"], "series_uid is 56 (int64), expected text"),
    ],
)
def test_what_cannot_be_scored_is_one_line(marks: Any, annotations: Any, uids: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate_froc(marks, annotations, None, uids)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (lambda xyz: xyz[:, ::-1], "z, y, x"),
        (lambda xyz: xyz * (-1, -1, 1), "RAS"),
        (lambda xyz: np.abs(np.round(xyz)) + 200, "voxel"),
        (lambda xyz: xyz, None),
    ],
)
def test_places_of_another_convention_are_noticed(turn: Any, words: str | None) -> None:
    random = np.random.default_rng(0)
    places = random.uniform(-150, 150, (20, 3))
    annotations = frame([(f"{k}", *place, 6) for k, place in enumerate(places)], FINDING)
    marks = frame([(f"{k}", *place, 0.5) for k, place in enumerate(turn(places))], MARK)
    warnings = evaluate_froc(marks, annotations, None, [f"{k}" for k in range(20)]).warnings
    assert len(warnings) == (words is not None)
    assert all(words in line for line in warnings)


# ---- the challenge's own tables


@pytest.fixture(scope="module")
def luna16(shared_data: Path) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, ...]]:
    folder = shared_data / "luna16_csv"
    return (
        read_annotations(folder / "annotations.csv"),
        read_annotations(folder / "annotations_excluded.csv"),
        read_series_uids(folder / "seriesuids.csv"),
    )


@pytest.mark.shared_data
def test_a_mark_on_each_nodule_of_luna16_scores_1(luna16: tuple) -> None:
    annotations, excluded, uids = luna16
    marks = annotations.drop(columns="diameter_mm").assign(probability=np.linspace(0.5, 1, len(annotations)))
    got = evaluate_froc(marks, annotations, excluded, uids, num_bootstrap=20)
    assert (got.cpm, got.ci.cpm_low, got.ci.cpm_high, got.counts.false_positives) == (1, 1, 1, 0)
    assert (got.counts.num_scans, got.counts.num_nodules, got.counts.num_excluded) == (888, 1186, 35192)
    assert got.counts.marks_double + got.counts.marks_hit == 1186


@pytest.mark.shared_data
def test_noise_on_luna16_scores_next_to_nothing_as_the_slow_reading_says(luna16: tuple) -> None:
    annotations, excluded, uids = luna16
    random = np.random.default_rng(0)
    marks = pd.DataFrame(random.uniform(-150, 150, (55_000, 3)), columns=MARK[1:4])
    marks.insert(0, "series_uid", random.choice(uids, 55_000))
    marks["probability"] = random.random(55_000)
    marks.loc[::500, ["series_uid", *MARK[1:4]]] = annotations[["series_uid", *MARK[1:4]]].iloc[:110].to_numpy()
    got = evaluate_froc(marks, annotations, excluded, uids, num_bootstrap=100)
    assert got.warnings == ()
    assert 0 < got.cpm < 0.1
    assert got.ci.cpm_low <= got.cpm <= got.ci.cpm_high
    some = sorted(set(marks["series_uid"][::500]))[:12]
    parts = [table[table["series_uid"].isin(some)].reset_index(drop=True) for table in (marks, annotations, excluded)]
    expected = naive(*parts, some)
    part = evaluate_froc(*parts, some)
    np.testing.assert_allclose(part.at_rates, expected["at"], rtol=0, atol=TOLERANCE)
    assert part.marks["verdict"].tolist() == expected["verdicts"]
