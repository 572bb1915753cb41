"""Several classes: figures as scikit-learn's, runs that learn what is there and nothing else, refusals, reports."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import lunatrain.loop as loop
from lunaprep.store.reader import open_store
from lunatrain.checkpoint import BEST, LAST, load_checkpoint
from lunatrain.class_metrics import bootstrap_intervals, class_metrics
from lunatrain.cli import cli
from lunatrain.config import TrainConfig
from lunatrain.detect.classifying import load_classifier
from lunatrain.errors import UsageError
from lunatrain.evaluate_classes import class_predictions, evaluate_classes, most_wrong
from lunatrain.evaluation import EvalOptions, run_evaluation
from lunatrain.log import RunLog, read_metrics
from lunatrain.loop import train
from lunatrain.report_classes import write_class_report
from lunatrain.training import TrainOptions, open_training, resume_training

from .subtype_scans import build_store, write_scans

KINDS = "ABG" * 30
QUICK = TrainConfig(target="subtype", epochs=2, samples=36, batch_size=12, save_steps=2)
LEARNS = TrainConfig(target="subtype", epochs=6, samples=84, batch_size=12)


@pytest.fixture(scope="module")
def subtype_store(tmp_path_factory):
    return build_store(write_scans(tmp_path_factory.mktemp("subtypes"), KINDS))


@pytest.fixture(scope="module")
def learnt(subtype_store, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "r"
    fit(TrainOptions(subtype_store, run), LEARNS)
    return run


@pytest.fixture
def relabelled(tmp_path):
    """A function: a store of lesions that are told to be of some kinds, whatever they look like."""
    return lambda kinds, told, name="told", stride=3: build_store(write_scans(tmp_path / name, kinds, told), stride)


def fit(options, config):
    trainer = open_training(options, config)
    with RunLog(options.run) as log:
        train(trainer, log)
    return trainer


def last_auc(run):
    return [line for line in read_metrics(run) if line["part"] == "val"][-1]["macro_auc"]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_figures_are_those_of_scikit_learn(num_classes, num, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, max(num, num_classes))
    labels[:num_classes] = range(num_classes)  # scikit-learn has no mean of what is not there
    scores = random.integers(1, 6, (len(labels), num_classes)).astype(float)  # with ties
    probability = scores / scores.sum(axis=1, keepdims=True)
    got, called = class_metrics(labels, probability), probability.argmax(axis=1)
    np.testing.assert_array_equal(got.confusion, sk.confusion_matrix(labels, called, labels=range(num_classes)))
    assert got.accuracy == pytest.approx(sk.accuracy_score(labels, called))
    assert got.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(labels, called))
    assert got.macro_f1 == pytest.approx(sk.f1_score(labels, called, average="macro", zero_division=0))
    assert got.log_loss == pytest.approx(sk.log_loss(labels, probability, labels=range(num_classes)))
    np.testing.assert_allclose(got.recall, sk.recall_score(labels, called, average=None))
    precision = sk.precision_score(labels, called, average=None, zero_division=np.nan, labels=range(num_classes))
    np.testing.assert_allclose(got.precision, precision)
    one_against_rest = [sk.roc_auc_score(labels == k, probability[:, k]) for k in range(num_classes)]
    np.testing.assert_allclose(got.auc, one_against_rest)
    assert got.macro_auc == pytest.approx(np.mean(one_against_rest))
    if num_classes > 2:
        assert got.macro_auc == pytest.approx(sk.roc_auc_score(labels, probability, multi_class="ovr"))


def test_a_class_that_is_not_there_is_left_out_of_the_means():
    got = class_metrics([0, 0, 1], [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1]])
    assert np.isnan([got.recall[2], got.auc[2], got.precision[2], got.f1[2]]).all()
    assert (got.balanced_accuracy, got.macro_auc) == (0.75, 1.0)


@pytest.mark.parametrize(
    ("labels", "probability", "words"),
    [
        ([0, 3], np.full((2, 3), 1 / 3), "label 3 at 1, expected a class 0 to 2"),
        ([0, 1], np.full((3, 3), 1 / 3), r"expected \(n,\) and \(n, classes\)"),
        ([0, 1], np.array([[0.5, 0.5], [np.nan, 1]]), "sample 1 are NaN"),
    ],
)
def test_what_has_no_figures_is_refused(labels, probability, words):
    with pytest.raises(UsageError, match=words):
        class_metrics(labels, probability)


def test_intervals_draw_patients_and_not_crops():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    probability = random.dirichlet([1, 1, 1], 60) + 0.5 * np.eye(3)[labels]
    apart = bootstrap_intervals(labels, probability, np.arange(60), 300)
    twice = [np.concatenate([each, each]) for each in (labels, probability, np.arange(60))]
    assert bootstrap_intervals(*twice, 300).macro_auc == pytest.approx(
        apart.macro_auc
    )  # copies of a patient say nothing
    low, high = apart.macro_auc
    assert low < class_metrics(labels, probability).macro_auc < high


def test_a_run_learns_what_can_be_seen(learnt):
    lines = [line for line in read_metrics(learnt) if line["part"] == "val"]
    assert lines[-1]["macro_auc"] > 0.9
    state = load_checkpoint(learnt / BEST).state
    assert tuple(state["config"]["classes"]) == ("A", "B", "G")
    assert state["model_args"]["num_classes"] == 3


def test_a_run_learns_nothing_where_labels_are_drawn(relabelled, tmp_path):
    told = "".join(np.random.default_rng(5).permutation(list(KINDS)))
    fit(TrainOptions(relabelled(KINDS, told), tmp_path / "r"), LEARNS)
    assert 0.25 < last_auc(tmp_path / "r") < 0.75  # 30 crops: two standard errors are 0.2


def test_each_class_is_drawn_alike_and_only_crops_with_a_subtype(relabelled, tmp_path):
    store = relabelled("A" * 20 + "B" * 8 + "G" * 4, None)
    trainer = open_training(TrainOptions(store, tmp_path / "r"), replace(QUICK, samples=60))
    drawn = open_store(store).manifest.iloc[np.concatenate(list(trainer.run.plan.batches(0)))]
    assert drawn["subtype"].value_counts().to_dict() == {"A": 20, "B": 20, "G": 20}
    assert (drawn["split_series"] == "train").all()
    whole = open_training(TrainOptions(store, tmp_path / "r"), replace(QUICK, samples=0, ratio=0))
    rows = np.concatenate(list(whole.run.plan.batches(0)))
    assert len(set(rows)) == len(rows) == len(whole.run.plan.sampler)


@pytest.mark.parametrize("stop_at", [2, 4])
def test_stopped_and_resumed_is_not_stopped_bit_for_bit(subtype_store, tmp_path, monkeypatch, stop_at):
    from contextlib import contextmanager

    fit(TrainOptions(subtype_store, tmp_path / "whole"), QUICK)
    steps = iter(range(1, 100))

    @contextmanager
    def stop():
        yield lambda: next(steps) == stop_at

    options = TrainOptions(subtype_store, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(options, QUICK)
    trainer, _ = resume_training(options)
    with RunLog(options.run) as log:
        train(trainer, log)
    one, two = (load_checkpoint(tmp_path / run / LAST).state for run in ("whole", "cut"))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    assert json.dumps(one["progress"]) == json.dumps(two["progress"])  # NaN is not itself


@pytest.mark.soak
def test_two_processes_train_as_one(subtype_store, tmp_path):
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        command = [sys.executable, *launcher, "-m", "lunatrain", "cls", "--target", "subtype", "--model", "luna",
                   "--augment", "", "--epochs", "1", "--samples", "24", "--batch-size", "8", "--lr", "0.001",
                   "--store", str(subtype_store), "--out", str(tmp_path / name), "--device", "cpu"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    for figure in ("macro_auc", "accuracy", "log_loss"):
        assert two[1][figure] == pytest.approx(one[1][figure], rel=1e-4)


def test_a_nodule_classifier_gives_all_but_its_last_layer(subtype_store, tmp_path):
    binary = replace(QUICK, target="is_nodule", epochs=1)
    fit(TrainOptions(subtype_store, tmp_path / "n"), binary)
    nodules = load_checkpoint(tmp_path / "n" / LAST).weights
    start = open_training(
        TrainOptions(subtype_store, tmp_path / "r", init=tmp_path / "n" / LAST), replace(QUICK, finetune=2)
    )
    own = start.model.state_dict()
    assert own["head_linear.weight"].shape[0] == 3
    assert all(torch.equal(own[name], nodules[name]) for name in own if not name.startswith("head_linear"))
    fit(TrainOptions(subtype_store, tmp_path / "s"), replace(QUICK, epochs=1))
    subtypes = load_checkpoint(tmp_path / "s" / LAST).weights
    again = open_training(TrainOptions(subtype_store, tmp_path / "q", init=tmp_path / "s" / LAST), QUICK)
    assert torch.equal(again.model.state_dict()["head_linear.weight"], subtypes["head_linear.weight"])
    back = open_training(TrainOptions(subtype_store, tmp_path / "b", init=tmp_path / "s" / LAST), binary)
    assert back.model.state_dict()["head_linear.weight"].shape[0] == 2


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (["A"] * 12, "all train crops with a subtype are 'A': such runs reach 100 % accuracy and mean nothing"),
        (["A\x1b[2J", "B"] * 6, r"the store has 'A\\x1b\[2J', expected at most 64 kinds with short names"),
    ],
)
def test_labels_that_are_all_the_same_or_no_names_are_refused(relabelled, tmp_path, told, words):
    with pytest.raises(UsageError, match=words):
        open_training(TrainOptions(relabelled("A" * 12, told), tmp_path / "r"), QUICK)


def validating(store):
    """Numbers of the scans that validate, as the store says."""
    manifest = open_store(store).manifest
    return {int(uid.rsplit(".", 1)[1]) - 1 for uid in manifest["series_uid"][manifest["split_series"] == "val"]}


def test_one_kind_alone_to_be_judged_is_refused(relabelled, tmp_path):
    val = validating(relabelled("A" * 12, "AB" * 6))
    told = ["B" if number in val else "AB"[number % 2] for number in range(12)]
    store = relabelled("A" * 12, told, name="again")
    with pytest.raises(UsageError, match="all val crops of split series with a subtype are 'B', so nothing can be"):
        open_training(TrainOptions(store, tmp_path / "r"), QUICK)


def test_a_kind_on_one_side_of_the_split_alone_is_said(relabelled, tmp_path):
    val = validating(relabelled("A" * 24, "AB" * 12))
    names = list("AB" * 12)
    names[min(val)], names[min(set(range(24)) - val)] = "E", "G"  # E validates alone, G trains alone
    store = relabelled("A" * 24, names, name="again")
    trainer = open_training(TrainOptions(store, tmp_path / "r"), QUICK)
    assert trainer.run.config.classes == ("A", "B", "G")
    assert [note.split(":")[0] for note in trainer.run.notes] == [
        "1 val crops of subtype 'E' are left out",
        "no val crop is 'G'",
    ]
    assert trainer.run.model_args["num_classes"] == 3


def test_a_store_without_subtypes_says_who_has_them(small_store, tmp_path):
    with pytest.raises(UsageError, match=r"the store has no subtype.*lung-pet-ct-dx gives it"):
        open_training(TrainOptions(small_store, tmp_path / "r"), QUICK)
    done = CliRunner().invoke(
        cli, ["cls", "--store", str(small_store), "--target", "subtype", "--out", str(tmp_path / "c")]
    )
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith("lunatrain: the store has no subtype")
    with pytest.raises(UsageError, match="--ratio: got 2, expected 1: of several classes each is drawn alike"):
        replace(QUICK, ratio=2)


def test_eval_writes_tables_pictures_and_a_page(learnt, subtype_store):
    done = run_evaluation(EvalOptions(run=learnt, store=subtype_store, bootstrap=20))
    figures = json.loads((done.out / "metrics.json").read_text())
    assert figures == done.result.to_json()
    assert all(not isinstance(value, dict) for value in figures.values())
    table = pd.read_csv(done.out / "predictions.csv", dtype={"seriesuid": str})
    names = [f"probability_{name}" for name in "ABG"]
    assert list(table)[:5] == ["candidate_id", "seriesuid", "coordX", "coordY", "coordZ"]
    np.testing.assert_allclose(table[names].sum(axis=1), 1)
    called = table[names].to_numpy().argmax(axis=1)
    assert (np.array(list("ABG"))[called] == table["called"]).all()
    assert figures["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(table["subtype"], table["called"]))
    truth = [list("ABG").index(name) for name in table["subtype"]]
    assert figures["macro_auc"] == pytest.approx(sk.roc_auc_score(truth, table[names], multi_class="ovr"))
    assert figures["confusion"] == sk.confusion_matrix(table["subtype"], table["called"]).tolist()
    page = (done.out / "report.html").read_text(encoding="utf-8")
    for words in ("Balanced accuracy", "A, adenocarcinoma", "confusion matrix", "ROC curve of each class", "Training"):
        assert words in page
    assert "FROC" not in page
    assert all(len(line) <= 90 for line in done.result.text().splitlines())
    assert "G, squamous cell carcinoma" in done.result.text()


def test_eval_refuses_what_the_run_has_not_learnt(learnt, subtype_store, tmp_path):
    with pytest.raises(UsageError, match=r"--target nodule: .* has learnt subtype"):
        run_evaluation(EvalOptions(run=learnt, store=subtype_store, target="nodule", out=tmp_path))
    with pytest.raises(UsageError, match="--annotations is for the challenge's score"):
        run_evaluation(EvalOptions(run=learnt, store=subtype_store, annotations=tmp_path, out=tmp_path))
    fit(TrainOptions(subtype_store, tmp_path / "n"), replace(QUICK, target="is_nodule", epochs=1))
    with pytest.raises(UsageError, match=r"--target subtype: .* has learnt is_nodule"):
        run_evaluation(EvalOptions(run=tmp_path / "n", store=subtype_store, target="subtype"))


def test_the_detector_refuses_a_network_of_subtypes(learnt):
    with pytest.raises(UsageError, match="tells A, B, G apart, and no nodule from anything else"):
        load_classifier(learnt, torch.device("cpu"))


def test_a_store_of_fewer_classes_is_judged_by_the_runs_own(learnt, relabelled):
    done = run_evaluation(EvalOptions(run=learnt, store=relabelled("AB" * 6, None), part="all"))
    assert done.result.classes == ("A", "B", "G")
    assert done.result.to_json()["recall_G"] is None
    assert any(note.startswith("no crop is 'G'") for note in done.result.notes)
    assert done.result.metrics.macro_auc > 0.9


def rows_of(kinds):
    num = len(kinds)
    table = {"candidate_id": range(num), "series_uid": [f"1.{k}" for k in range(num)], "patient_id": None,
             "x_mm": 1.0, "y_mm": 2.0, "z_mm": 3.0, "diameter_mm": 5.0, "subtype": list(kinds)}  # fmt: skip
    return pd.DataFrame(table, index=np.arange(num) + 100)


def test_the_most_wrong_come_first_and_the_right_not_at_all():
    probability = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.95, 0.05]])
    result = evaluate_classes(rows_of("ABBB"), probability, ("A", "B"))
    wrong = most_wrong(result, 5)
    assert wrong.index.tolist() == [103, 101]
    assert wrong["called"].tolist() == ["A", "A"]
    assert class_predictions(result)["called"].tolist() == ["A", "A", "B", "A"]
    assert result.majority == ("B", 0.75)


def test_text_from_data_is_escaped_and_many_classes_make_a_page(tmp_path):
    names = tuple(f"<i>{k}</i>" for k in range(9))
    probability = np.random.default_rng(0).dirichlet(np.ones(9), 18)
    result = evaluate_classes(rows_of(names * 2), probability, names)
    pages = [write_class_report(result, tmp_path / name, title="<b>t", facts={}).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]
    assert b"<i>" not in pages[0].replace(b'<i style="width', b"")
    assert b"<b>" not in pages[0]
    with pytest.raises(UsageError, match="expected A, B"):
        evaluate_classes(rows_of("AC"), np.full((2, 2), 0.5), ("A", "B"))
