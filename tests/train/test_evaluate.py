"""Figures of a result against scikit-learn and by hand; CPM with and without annotations; what crops cannot give."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

import lunaprep
from lunatrain.errors import UsageError
from lunatrain.evaluate import (
    FROM_ANNOTATIONS,
    FROM_CANDIDATES,
    UPPER_BOUND,
    evaluate,
    learnt_notes,
    percent,
    predictions_csv,
    worst_rows,
)
from lunatrain.froc import evaluate_froc
from lunatrain.marks import read_annotations, read_marks, read_series_uids
from lunatrain.report import write_report

COLUMNS = ["series_uid", "x_mm", "is_nodule", "annotation_id", "diameter_mm", "probability"]


def manifest(records: list[tuple]) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows of a manifest, and probabilities, from rows of `COLUMNS`."""
    frame = pd.DataFrame(records, columns=COLUMNS)
    frame["candidate_id"] = np.arange(len(frame))
    frame["annotation_id"] = frame["annotation_id"].astype("Int64")
    frame = frame.assign(y_mm=0.0, z_mm=0.0, is_malignant=pd.array([pd.NA] * len(frame), dtype="boolean"))
    return frame.drop(columns="probability"), frame["probability"].to_numpy(dtype=np.float64, copy=True)


NONE = (None, np.nan)
SMALL = [
    ("s1", 0.0, True, 0, 10.0, 0.9),
    ("s1", 2.0, True, 0, 10.0, 0.4),
    ("s1", 90.0, False, *NONE, 0.7),
    ("s2", 0.0, True, 1, 4.0, 0.6),
    ("s2", 90.0, False, *NONE, 0.2),
    ("s2", 99.0, False, *NONE, 0.1),
]
NODULES = pd.DataFrame(
    [("s1", 1.0, 0.0, 0.0, 10.0), ("s2", 0.0, 0.0, 0.0, 4.0), ("s2", 50.0, 0.0, 0.0, 6.0), ("s9", 0.0, 0.0, 0.0, 6.0)],
    columns=["series_uid", "x_mm", "y_mm", "z_mm", "diameter_mm"],
)


def random_case(seed: int = 0, size: int = 400) -> tuple[pd.DataFrame, np.ndarray]:
    random = np.random.default_rng(seed)
    positive = random.random(size) < 0.1
    probability = np.clip(0.3 * positive + 0.7 * random.random(size), 0, 1)
    rows = zip(
        [f"s{k}" for k in random.integers(0, 9, size)],
        random.random(size) * 300,
        positive,
        [k if is_one else None for k, is_one in enumerate(positive)],
        np.where(positive, random.uniform(3, 30, size), np.nan),
        probability,
        strict=True,
    )
    return manifest(list(rows))


def test_figures_equal_scikit_learn() -> None:
    rows, probability = random_case()
    result, labels = evaluate(rows, probability, threshold=0.45), rows["is_nodule"].to_numpy()
    figures, called = result.to_json(), probability >= 0.45
    expected = {
        "auc": sk.roc_auc_score(labels, probability),
        "average_precision": sk.average_precision_score(labels, probability),
        "precision": sk.precision_score(labels, called),
        "recall": sk.recall_score(labels, called),
        "f1": sk.f1_score(labels, called),
        "accuracy": sk.accuracy_score(labels, called),
        "log_loss": sk.log_loss(labels, probability),
        "brier": sk.brier_score_loss(labels, probability),
        "correct_nodule": sk.recall_score(labels, called),
        "correct_other": sk.recall_score(~labels, ~called),
        "majority_accuracy": 1 - labels.mean(),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(labels, probability)
    np.testing.assert_allclose(result.roc.false_positive_rate, fpr)
    np.testing.assert_allclose(result.roc.true_positive_rate, tpr)
    assert sum(row["num_positive"] for row in figures["by_diameter"]) == labels.sum()
    assert sum(row["num_samples"] for row in figures["calibration"]) == len(labels)


def test_a_small_case_by_hand() -> None:
    result = evaluate(*manifest(SMALL))
    figures = result.to_json()
    assert (figures["correct_nodule"], figures["correct_other"], figures["accuracy"]) == (2 / 3, 2 / 3, 4 / 6)
    assert figures["auc"] == 7 / 9  # of 9 pairs two, 0.4 and 0.6 with 0.7, are the wrong way round
    assert figures["majority_class"] == "other"
    assert result.majority.sentence == "Calling every crop 'other' is 50.0 % correct and finds 0 of 3 nodule crops"
    sizes = {row.label: (row.num_found, row.num_positive) for row in result.by_diameter if row.num_positive}
    assert sizes == {"3-5 mm": (1, 1), "10-15 mm": (1, 2)}


def test_the_majority_may_be_the_positives() -> None:
    rows, probability = manifest([*SMALL[:2], SMALL[4]])
    result = evaluate(rows, probability)
    assert result.majority.called == "nodule"
    assert result.majority.positives_found == 2
    assert result.majority.sentence == "Calling every crop 'nodule' is 66.7 % correct and clears 0 of 1 other crops"


def test_cpm_without_annotations_is_an_upper_bound_and_says_so() -> None:
    result = evaluate(*manifest(SMALL))
    # found: 0.9 and 0.6; false positives: 0.7 between them, so 1/2 a scan before the second nodule
    assert result.froc.at_rates.tolist() == [0.5, 0.5, 1, 1, 1, 1, 1]
    assert result.to_json()["cpm"] == pytest.approx(6 / 7)
    assert result.froc.counts.marks_double == 1
    assert (result.froc_from, result.notes[0]) == (FROM_CANDIDATES, UPPER_BOUND)
    assert "upper bound" in result.text()


def test_cpm_with_annotations_counts_nodules_without_a_candidate() -> None:
    result = evaluate(*manifest(SMALL), annotations=NODULES)
    np.testing.assert_allclose(result.froc.at_rates, [1 / 3, 1 / 3, *[2 / 3] * 5])
    assert result.to_json()["cpm"] == pytest.approx(4 / 7)
    assert result.froc.counts.num_nodules == 3, "s9 isn't evaluated"
    assert result.froc_from == FROM_ANNOTATIONS
    assert "upper bound" not in result.text() + "".join(result.notes)


def test_excluded_findings_and_scans_without_candidates_count() -> None:
    excluded = NODULES.iloc[[0]].assign(x_mm=91.0, diameter_mm=-1.0)
    scans = ["s1", "s2", "s3", "s9"]
    result = evaluate(*manifest(SMALL), annotations=NODULES, excluded=excluded, series_uids=scans, num_bootstrap=20)
    counts = result.froc.counts
    assert (counts.num_scans, counts.num_nodules, counts.marks_on_excluded) == (4, 4, 1)
    np.testing.assert_allclose(result.froc.at_rates, 0.5)
    assert result.notes == ()
    assert result.to_json()["num_bootstrap"] == 20
    assert result.to_json()["cpm_low"] is not None


def test_cpm_is_that_of_the_challenges_rules_on_a_store(built_store: Path, phantom_root: Path) -> None:
    rows = lunaprep.open_store(built_store).manifest
    probability = np.random.default_rng(1).random(len(rows)) * 0.6 + 0.4 * rows["is_nodule"].to_numpy()
    nodules, excluded = (read_annotations(phantom_root / f"annotations{name}.csv") for name in ("", "_excluded"))
    scans = read_series_uids(phantom_root / "seriesuids.csv")
    result = evaluate(rows, probability, annotations=nodules, excluded=excluded, series_uids=scans)
    marks = rows[["series_uid", "x_mm", "y_mm", "z_mm"]].assign(probability=probability)
    assert result.froc.cpm == evaluate_froc(marks, nodules, excluded, scans).cpm
    bound = evaluate(rows, probability, excluded=excluded, series_uids=scans)
    assert bound.froc.cpm >= result.froc.cpm
    assert bound.froc.counts.num_nodules == rows["annotation_id"].nunique()
    assert bound.froc.counts.nodules_missed == 0


def test_a_candidate_far_off_the_mean_of_its_nodule_still_finds_it() -> None:
    records = [("s1", x, True, 0, 4.0, p) for x, p in [(0.0, 0.9), (3.9, 0.1), (3.9, 0.1), (3.9, 0.1)]]
    rows, probability = manifest([*records, ("s1", 50.0, False, *NONE, 0.5)])
    rows.index = [7, 7, 3, 3, 1]  # any index will do
    result = evaluate(rows, probability)
    assert (result.froc.counts.marks_hit, result.froc.counts.false_positives) == (1, 1)
    assert result.froc.cpm == 1


def test_nodule_crops_of_no_known_nodule_are_left_out_of_froc() -> None:
    result = evaluate(*manifest([*SMALL, ("s1", 70.0, True, None, np.nan, 0.95)]))
    assert result.froc.counts.marks_read == len(SMALL)
    assert any(note.startswith("1 nodule crops of no known nodule") for note in result.notes)
    assert result.by_diameter[-1].num_positive == 1


@pytest.mark.parametrize("is_nodule", [False, True])
def test_an_empty_class_gives_null_and_a_reason(is_nodule: bool) -> None:
    records = [record for record in SMALL if record[2] == is_nodule]
    for annotations in (None, NODULES):
        result = evaluate(*manifest(records), annotations=annotations)
        figures = result.to_json()
        assert figures["auc"] is None
        assert figures["majority_accuracy"] == 1
        assert any(f"there are no {'negatives' if is_nodule else 'positives'}" in note for note in result.notes)
        json.dumps(figures, allow_nan=False)
        assert "–" in result.text()
    no_nodules = evaluate(*manifest(records), annotations=NODULES.iloc[[3]]) if not is_nodule else None
    assert no_nodules is None or no_nodules.to_json()["cpm"] is None


def test_equal_scores() -> None:
    rows, _ = manifest(SMALL)
    result = evaluate(rows, np.full(len(rows), 0.5))
    assert (result.binary.auc, result.binary.average_precision, result.binary.recall) == (0.5, 0.5, 1)
    # all or nothing: 3 false positives in 2 scans with all nodules
    assert result.froc.at_rates[3:].tolist() == pytest.approx([2 / 3, 1, 1, 1])


def test_malignancy_is_held_against_the_diameter() -> None:
    random = np.random.default_rng(3)
    rows, probability = random_case()
    rows, probability = rows[rows["is_nodule"]], probability[rows["is_nodule"]]
    malignant = random.random(len(rows)) < rows["diameter_mm"] / 40
    rows = rows.assign(is_malignant=malignant.astype("boolean"))
    result = evaluate(rows, probability, label="is_malignant")
    figures = result.to_json()
    assert figures["diameter_auc"] == pytest.approx(sk.roc_auc_score(malignant, rows["diameter_mm"]))
    assert {"correct_malignant", "correct_benign"} < figures.keys()
    assert (figures["cpm"], figures["froc_from"], result.froc) == (None, None, None)
    assert "AUC of diameter alone" in result.text()
    assert "CPM" not in result.text()
    without = rows.assign(diameter_mm=rows["diameter_mm"].where(np.arange(len(rows)) > 2))
    result = evaluate(without, probability, label="is_malignant")
    assert result.diameter_auc == pytest.approx(sk.roc_auc_score(malignant[3:], rows["diameter_mm"][3:]))
    assert result.notes == (f"diameter alone is judged on the {len(rows) - 3} of {len(rows)} crops that have one",)


def test_json_is_flat_and_tables_are_lists() -> None:
    figures = evaluate(*random_case(), num_bootstrap=5).to_json()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    for name, value in figures.items():
        assert value is None or isinstance(value, (str, int, float, list)), name
    assert figures["by_diameter"][-2]["high_mm"] is None
    assert set(figures["by_threshold"][0]) > {"threshold", "precision", "recall"}


def test_text_fits_a_terminal_with_the_counts_of_luna16() -> None:
    size, num = 754_975, 1_557
    index = np.arange(size)
    positive = index < num
    rows = pd.DataFrame({"series_uid": [f"s{k % 888}" for k in index], "x_mm": index * 0.1, "y_mm": 0.0, "z_mm": 0.0})
    rows = rows.assign(is_nodule=positive, diameter_mm=np.where(positive, 5.0, np.nan), candidate_id=index)
    rows["annotation_id"] = pd.array(np.where(positive, index, -1), dtype="Int64")
    probability = np.where(positive, 0.9, 0.1)
    probability[[0, -1]] = 0.3, 0.7
    text = evaluate(rows, probability, num_bootstrap=2).text()
    assert max(map(len, text.splitlines())) <= 90, text
    assert "754,975 crops of 888 series: 1,557 nodule, 753,418 other" in text
    assert "Calling every crop 'other' is 99.8 % correct and finds 0 of 1,557 nodule crops" in text


def test_text_says_what_a_reader_must_know() -> None:
    rows, probability = manifest(SMALL)
    text = evaluate(rows, probability, series_uids=["s1", "s2"]).text()
    assert "\nnote: FROC and CPM are an upper bound" in text
    assert "marks on them count as false positives" in text.replace("\n      ", " ")
    assert max(map(len, text.splitlines())) <= 90
    assert "found at 0.5" in text  # by diameter: not the nodules that FROC finds at any threshold


def test_crops_that_are_not_all_of_their_scans_have_no_froc(tmp_path: Path) -> None:
    rows, probability = manifest(SMALL)
    result = evaluate(rows, probability, with_froc=False)
    assert (result.froc, result.froc_from, result.notes) == (None, None, ())
    assert result.to_json()["cpm"] is None
    assert "CPM" not in result.text()
    page = write_report(result, tmp_path, title="t", facts={}).read_text(encoding="utf-8")
    assert "CPM" not in page
    assert "Diameter alone" not in page


@pytest.mark.parametrize(
    ("trained", "split", "part", "is_said"),
    [
        ("series", "series", "val", False),
        ("fold:1", "fold:1", "val", False),
        ("series", "candidate", "val", True),
        ("series", "all", "val", True),
        ("series", "series", "all", True),
        ("all", "all", "val", True),
    ],
)
def test_crops_that_may_have_been_learnt_are_told(trained: str, split: str, part: str, is_said: bool) -> None:
    notes = learnt_notes(trained, split, part)
    assert bool(notes) == is_said
    assert all(f"trained on split {trained}:" in note for note in notes)


def test_predictions_are_a_submission(tmp_path: Path) -> None:
    rows, probability = random_case()
    table = predictions_csv(rows, probability.astype(np.float32))
    assert list(table) == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    table.to_csv(tmp_path / "predictions.csv", index=False)
    marks = read_marks(tmp_path / "predictions.csv")
    assert marks["series_uid"].tolist() == rows["series_uid"].tolist()
    assert marks["x_mm"].tolist() == rows["x_mm"].tolist()
    assert marks["probability"].tolist() == probability.astype(np.float32).tolist()


def test_worst_rows_come_worst_first_with_their_index() -> None:
    rows, probability = manifest(SMALL)
    probability[5] = probability[4]
    rows.index = [10, 11, 12, 13, 14, 15]
    negatives, positives = worst_rows(rows, probability, 2)
    assert (negatives.index.tolist(), positives.index.tolist()) == ([12, 14], [11, 13])
    assert negatives["probability"].tolist() == [0.7, 0.2]
    assert [len(table) for table in worst_rows(rows, probability, 9)] == [3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, p: (rows.iloc[:0], p[:0], "is_nodule"), "no crops"),
        (lambda rows, p: (rows, p, "is_malignant"), "6 of 6 crops have no is_malignant"),
        (lambda rows, p: (rows, p, "diameter_mm"), "expected is_nodule or is_malignant"),
        (lambda rows, p: (rows, p[:3], "is_nodule"), "shape"),
        (lambda rows, p: (rows, p * 8, "is_nodule"), "expected 0 to 1"),
        (lambda rows, p: (rows, np.where(p > 0.5, np.nan, p), "is_nodule"), "NaN"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(change, message: str) -> None:
    rows, probability, label = change(*manifest(SMALL))
    with pytest.raises(UsageError, match=message) as caught:
        evaluate(rows, probability, label=label)
    assert "\n" not in str(caught.value)


def test_annotations_of_other_scans_are_an_error() -> None:
    with pytest.raises(UsageError, match="none of the annotations is in a listed scan"):
        evaluate(*manifest(SMALL), annotations=NODULES.iloc[[3]])


def test_percent_is_100_only_where_all_is_right() -> None:
    shares = (0.9974, 0.99996, 1.0, 0.0, 0.00001, 1 - 1e-12, 1e-12, float("nan"))
    texts = ["99.7 %", "99.996 %", "100.0 %", "0.0 %", "0.001 %", ">99.99999 %", "<0.00001 %", "–"]
    assert [percent(share) for share in shares] == texts
