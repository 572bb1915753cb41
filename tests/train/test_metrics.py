"""Figures against scikit-learn on random sets, and what happens where a class is empty."""

import json
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from lunatrain.errors import UsageError
from lunatrain.metrics import (
    area_under_roc,
    average_precision,
    binary_metrics,
    calibration_table,
    diameter_table,
    precision_recall_curve,
    rank_scores,
    roc_curve,
    threshold_table,
)

from ..conftest import Figure

NUM_SETS = 100


def random_sets(number: int = NUM_SETS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Labels and probabilities: of any size and balance, without ties, with some, with nothing else."""
    for seed in range(number):
        random = np.random.default_rng(seed)
        size = int(random.integers(1, 400))
        labels = random.random(size) < random.choice([0.0, 0.02, 0.5, 0.9, 1.0], p=[0.05, 0.3, 0.4, 0.2, 0.05])
        scores = np.clip(0.3 * labels + random.random(size) * 0.7, 0, 1)
        levels = random.choice([0, 1, 3, 20])
        if levels:
            scores = np.round(scores * levels) / levels
        if seed % 50 == 7:
            scores = np.full(size, 0.5)
        yield labels, scores


@pytest.mark.filterwarnings("ignore")
def test_figures_equal_scikit_learn_on_random_sets(figure: Figure) -> None:
    for labels, scores in random_sets(figure(NUM_SETS, 5_000)):
        got = binary_metrics(labels, scores)
        called = scores >= 0.5
        expected = {
            "accuracy": sk.accuracy_score(labels, called),
            "log_loss": sk.log_loss(labels, scores, labels=[False, True]),
            "brier": np.mean((scores - labels) ** 2),
        }
        if labels.any():
            expected["recall"] = expected["correct_positive"] = sk.recall_score(labels, called)
            expected["average_precision"] = sk.average_precision_score(labels, scores)
        if called.any():
            expected["precision"] = sk.precision_score(labels, called)
        if labels.any() or called.any():
            expected["f1"] = sk.f1_score(labels, called)
        if not labels.all():
            expected["correct_negative"] = sk.recall_score(~labels, ~called)
        if labels.any() and not labels.all():
            expected["auc"] = sk.roc_auc_score(labels, scores)
        for name in ("accuracy", "log_loss", "brier", "recall", "correct_positive", "average_precision", "precision",
                     "f1", "correct_negative", "auc"):  # fmt: skip
            value = getattr(got, name)
            assert (name in expected) != (name in got.undefined), name
            assert np.isnan(value) if name in got.undefined else abs(value - expected[name]) <= 1e-9, name
        counts = (got.true_negatives, got.false_positives, got.false_negatives, got.true_positives)
        assert counts == tuple(sk.confusion_matrix(labels, called, labels=[False, True]).ravel())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("drop_intermediate", [True, False])
def test_curves_equal_scikit_learn_point_by_point(drop_intermediate: bool) -> None:
    for labels, scores in random_sets():
        ranking = rank_scores(labels, scores)
        ours = roc_curve(ranking, drop_intermediate)
        theirs = sk.roc_curve(labels, scores, drop_intermediate=drop_intermediate)
        for got, expected in zip(
            (ours.false_positive_rate, ours.true_positive_rate, ours.thresholds), theirs, strict=True
        ):
            np.testing.assert_array_equal(got, expected)
        if labels.any():
            pr = precision_recall_curve(ranking)
            theirs_pr = sk.precision_recall_curve(labels, scores)
            for got, expected in zip((pr.precision, pr.recall, pr.thresholds), theirs_pr, strict=True):
                np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_the_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    for labels, scores in random_sets():
        if labels.any() and not labels.all():
            above = scores[labels][:, None] - scores[~labels][None]
            assert area_under_roc(rank_scores(labels, scores)) == pytest.approx(
                ((above > 0) + (above == 0) / 2).mean(), abs=1e-12
            )


def test_the_best_f1_is_that_of_the_highest_threshold_that_reaches_it() -> None:
    for labels, scores in random_sets():
        if labels.any():
            f1 = {value: binary_metrics(labels, scores, value).f1 for value in np.unique(scores)}
            got = binary_metrics(labels, scores)
            assert got.best_f1 == max(f1.values())
            assert got.best_f1_threshold == max(value for value, f in f1.items() if f == got.best_f1)


def test_tables_agree_with_the_figures_they_tabulate() -> None:
    for labels, scores in random_sets():
        table = calibration_table(labels, scores)
        filled = [row for row in table if row.num_samples]
        assert (len(table), sum(row.num_samples for row in table)) == (10, len(labels))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            share, mean = calibration_curve(labels, scores, n_bins=10) if len(set(labels)) > 1 else (None, None)
        if share is not None:
            np.testing.assert_allclose([row.share_positive for row in filled], share, atol=1e-12)
            np.testing.assert_allclose([row.mean_probability for row in filled], mean, atol=1e-12)
        for row in threshold_table(rank_scores(labels, scores)):
            whole = binary_metrics(labels, scores, row.threshold)
            np.testing.assert_array_equal(
                [row.precision, row.recall, row.f1, row.specificity],
                [whole.precision, whole.recall, whole.f1, whole.correct_negative],
            )


def test_recall_by_diameter_counts_every_positive_once() -> None:
    diameters = [3.0, 4.99, 5.0, 30.0, 31.0, np.nan, np.nan, 9.0, 12.0]
    labels = [1, 1, 1, 1, 1, 1, 0, 0, 1]
    scores = [0.5, 0.4, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.49]
    rows = {row.label: (row.num_positive, row.num_found) for row in diameter_table(labels, scores, diameters)}
    assert rows == {
        "3-5 mm": (2, 1), "5-8 mm": (1, 1), "8-10 mm": (0, 0), "10-15 mm": (1, 0), "15-20 mm": (0, 0),
        "20-30 mm": (0, 0), ">= 30 mm": (2, 1), "unknown": (1, 1),
    }  # fmt: skip
    empty = next(row for row in diameter_table(labels, scores, diameters) if not row.num_positive)
    assert np.isnan(empty.recall)
    assert diameter_table([1], [0.9], [2.0])[0].label == "0-3 mm"


@pytest.mark.parametrize(
    ("labels", "scores", "reasons"),
    [
        ([], [], {"auc": "no samples", "accuracy": "no samples", "log_loss": "no samples", "best_f1": "no samples"}),
        ([0, 0], [0.1, 0.9], {"auc": "no positives", "recall": "no positives", "average_precision": "no positives"}),
        ([1, 1], [0.1, 0.9], {"auc": "no negatives", "correct_negative": "no negatives"}),
        ([0, 1], [0.1, 0.2], {"precision": "nothing reaches the threshold 0.5"}),
        ([0, 1], [-3.0, 7.0], {"log_loss": "no probabilities", "brier": "no probabilities"}),
    ],
)
def test_an_empty_class_gives_nan_and_the_reason(labels: list[int], scores: list[float], reasons: dict) -> None:
    got = binary_metrics(labels, scores)
    for name, words in reasons.items():
        assert np.isnan(getattr(got, name))
        assert words in got.undefined[name]
        assert got.to_json()[name] is None
    assert {name for name in got.undefined if name not in reasons} <= {
        "precision", "f1", "best_f1", "best_f1_threshold", "recall", "correct_positive", "correct_negative", "brier",
        "average_precision",
    }  # fmt: skip
    json.dumps(got.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("labels", "scores", "words"),
    [
        ([0, 2], [0.1, 0.2], "label 2, expected 0 or 1"),
        ([0, 1], [0.1, np.nan], "1 of 2 scores are NaN (the first at 1)"),
        ([0, 1, 1], [0.1, 0.2], "a score for each label"),
        ([[0, 1]], [[0.1, 0.2]], "a score for each label"),
    ],
)
def test_what_cannot_be_scored_is_one_line(labels: list, scores: list, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        binary_metrics(labels, scores)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_logits_have_no_calibration() -> None:
    with pytest.raises(UsageError, match="expected 0 to 1"):
        calibration_table([0, 1], [-2.0, 3.0])


def test_single_precision_is_clipped_as_scikit_learn_clips_it() -> None:
    labels, scores = np.array([1, 0]), np.array([0, 1], dtype=np.float32)
    assert binary_metrics(labels, scores).log_loss == pytest.approx(sk.log_loss(labels, scores), abs=1e-6)


def test_infinite_scores_are_ranked() -> None:
    assert area_under_roc(rank_scores([0, 1, 1], [-np.inf, np.inf, np.inf])) == 1


def test_as_many_scores_as_luna16_has_candidates_are_counted_exactly() -> None:
    random = np.random.default_rng(0)
    labels, scores = random.random(754_975) < 0.002, random.random(754_975)
    got = binary_metrics(labels, scores)
    assert got.auc == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-9)
    assert average_precision(rank_scores(labels, scores)) == pytest.approx(
        sk.average_precision_score(labels, scores), abs=1e-9
    )
