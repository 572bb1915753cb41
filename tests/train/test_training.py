"""A run learns, stops and goes on bit for bit, says what is wrong, and loses nothing."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import lunatrain.loop as loop
import lunatrain.tasks.classify as classify
from lunaprep.build import BuildOptions, build
from lunaprep.errors import LunaprepError
from lunaprep.parameters import Parameters
from lunaprep.store.reader import open_store
from lunatrain.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from lunatrain.config import MALIGNANCY, PRESETS, TrainConfig
from lunatrain.errors import CheckpointError, TrainingError, UsageError
from lunatrain.log import RunLog, read_metrics
from lunatrain.loop import train
from lunatrain.sampling import ShardShuffled
from lunatrain.training import TrainOptions, load_model, open_training, resume_training

QUICK = TrainConfig(model="luna", epochs=2, samples=40, batch_size=8, lr=1e-3, ema=0.9, save_steps=3)


def fit(options, config):
    trainer = open_training(options, config)
    with RunLog(options.run) as log:
        train(trainer, log)
    return trainer


def go_on(options):
    trainer, loaded = resume_training(options)
    with RunLog(options.run) as log:
        log.forget_after(trainer.progress.samples)
        train(trainer, log)
    return trainer, loaded


def weights(run, name=LAST):
    return load_checkpoint(run / name).state["model"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_leaves_checkpoints_metrics_and_events(small_store, tmp_path):
    trainer = fit(TrainOptions(small_store, tmp_path / "r"), QUICK)
    assert trainer.progress.samples == 80
    assert {LAST, BEST, "metrics.jsonl"} <= {path.name for path in (tmp_path / "r").iterdir()}
    assert list((tmp_path / "r").glob("events.out.tfevents*"))
    lines = read_metrics(tmp_path / "r")
    assert [(line["part"], line["samples"]) for line in lines] == [
        ("train", 40),
        ("val", 40),
        ("train", 80),
        ("val", 80),
    ]
    for name in ("correct", "correct_positive", "correct_negative", "loss"):
        assert name in lines[0]
    for name in ("precision", "recall", "f1", "auc", "average_precision", "correct_positive", "correct_negative"):
        assert name in lines[1]


def test_training_lowers_the_loss(small_store, tmp_path):
    config = replace(QUICK, epochs=6, samples=96, lr=3e-3, augment="", ema=0.0, optimizer="adamw")
    fit(TrainOptions(small_store, tmp_path / "r"), config)
    losses = [line["loss"] for line in read_metrics(tmp_path / "r") if line["part"] == "train"]
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(small_store, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(TrainOptions(small_store, tmp_path / name), replace(QUICK, epochs=1, seed=seed))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("stop_at", [1, 4, 5, 6, 9])
def test_stopped_and_resumed_is_not_stopped_bit_for_bit(small_store, tmp_path, monkeypatch, stop_at):
    fit(TrainOptions(small_store, tmp_path / "whole"), QUICK)
    steps = 0

    @contextmanager
    def stop():
        def is_stopping():
            nonlocal steps
            steps += 1
            return steps == stop_at

        yield is_stopping

    options = TrainOptions(small_store, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(options, QUICK)
    trainer, loaded = go_on(options)
    assert loaded.path.name == LAST
    assert trainer.progress.samples == 80
    for name in (LAST, BEST):
        one, two = (load_checkpoint(tmp_path / run / name).state for run in ("whole", "cut"))
        assert same(one["model"], two["model"])
        assert one["progress"] == two["progress"]
    whole, cut = (read_metrics(tmp_path / run) for run in ("whole", "cut"))
    for line in (*whole, *cut):
        line.pop("data_wait_share", None)
    assert whole == cut


def test_a_killed_run_goes_on_from_its_last_checkpoint(small_store, tmp_path):
    options = TrainOptions(small_store, tmp_path / "r")
    fit(options, replace(QUICK, epochs=1))
    state = load_checkpoint(tmp_path / "r" / LAST).state
    save_checkpoint(tmp_path / "r" / LAST, {**state, "config": {**state["config"], "epochs": 2}})
    (tmp_path / "r" / LAST).write_bytes((tmp_path / "r" / LAST).read_bytes()[:-9])
    trainer, loaded = resume_training(options)
    assert loaded.path.name == BEST
    assert trainer.progress.epoch == 1


def test_a_loss_that_is_no_number_stops_and_leaves_the_rows(small_store, tmp_path, monkeypatch):
    trainer = open_training(TrainOptions(small_store, tmp_path / "r"), QUICK)
    inner = trainer.run.task.train_loss
    calls = 0

    def spoiled(self, model, batch, generator):
        nonlocal calls
        calls += 1
        loss, logits = inner(model, batch, generator)
        return (loss * float("nan") if calls == 3 else loss), logits

    monkeypatch.setattr(type(trainer.run.task), "train_loss", spoiled)
    with RunLog(tmp_path / "r") as log, pytest.raises(TrainingError, match=r"epoch 0, step 2.*nan_batch\.json"):
        train(trainer, log)
    noted = json.loads((tmp_path / "r/nan_batch.json").read_text())
    assert noted["rows"] == [int(row) for row in list(trainer.run.plan.batches(0))[2]]


def test_patience_ends_a_run_that_does_not_get_better(small_store, tmp_path, monkeypatch):
    monkeypatch.setattr(
        classify, "predict", lambda model, batches, device, amp: np.array([0.5 for b in batches for _ in b.rows])
    )
    trainer = fit(TrainOptions(small_store, tmp_path / "r"), replace(QUICK, epochs=9, patience=2))
    assert trainer.progress.epoch == 3


def test_what_the_store_lacks_is_one_line(small_store, tmp_path):
    options = TrainOptions(small_store, tmp_path / "r")
    for config, words in [
        (replace(QUICK, split="fold:9"), "fold"),
        (replace(QUICK, split="sideways"), "split"),
        (replace(QUICK, target="is_purple"), "is_purple"),
        (replace(QUICK, model="resnet9000"), "luna"),
        (replace(QUICK, augment="flip,teleport"), "teleport"),
    ]:
        with pytest.raises(UsageError) as info:
            open_training(options, config)
        assert words in str(info.value)
        assert "\n" not in str(info.value)


def test_an_empty_class_is_refused(data, tmp_path):
    table = data / "candidates.csv"
    table.write_text(table.read_text().replace(",1\n", ",0\n"))
    parameters = Parameters(crop_shape=(16, 24, 24), val_stride=3)
    build(BuildOptions(data, tmp_path / "s", workers=1, volumes=False), parameters)
    with pytest.raises(UsageError, match="no train crop of split series has is_nodule true"):
        open_training(TrainOptions(tmp_path / "s", tmp_path / "r"), QUICK)


def test_a_missing_store_and_a_missing_run_are_one_line(small_store, tmp_path):
    with pytest.raises(LunaprepError, match="is no store"):
        open_training(TrainOptions(tmp_path / "nowhere", tmp_path / "r"), QUICK)
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        resume_training(TrainOptions(small_store, tmp_path / "r"))


def test_weights_of_another_model_or_store_are_refused(small_store, built_store, tmp_path):
    fit(TrainOptions(small_store, tmp_path / "r"), replace(QUICK, epochs=1))
    with pytest.raises(CheckpointError, match="holds a model 'luna', not 'residual'"):
        open_training(
            TrainOptions(small_store, tmp_path / "q", init=tmp_path / "r" / LAST), replace(QUICK, model="residual")
        )
    with pytest.raises(CheckpointError, match="does not fit"):
        open_training(TrainOptions(built_store, tmp_path / "q", init=tmp_path / "r" / LAST), QUICK)
    with pytest.raises(CheckpointError, match="was trained on store"):
        resume_training(TrainOptions(built_store, tmp_path / "r"))
    with pytest.raises(CheckpointError, match="was trained on crops"):
        load_model(tmp_path / "r" / LAST, (32, 48, 48))


def test_init_takes_the_weights_over(small_store, tmp_path):
    fit(TrainOptions(small_store, tmp_path / "r"), replace(QUICK, epochs=1, ema=0.0))
    trainer = open_training(TrainOptions(small_store, tmp_path / "q", init=tmp_path / "r" / LAST), QUICK)
    assert same(dict(trainer.model.state_dict()), weights(tmp_path / "r"))


def test_the_presets_are_the_books_settings():
    ch11, ch12 = PRESETS["book-ch11"], PRESETS["book-ch12"]
    assert (ch11.model, ch11.optimizer, ch11.lr, ch11.momentum, ch11.batch_size) == ("luna", "sgd", 0.001, 0.99, 32)
    assert (ch11.schedule, ch11.ratio, ch11.augment, ch11.split, ch11.epochs) == ("constant", 0, "", "candidate", 1)
    assert (ch12.ratio, ch12.samples, ch12.lr, ch12.momentum) == (1, 200_000, 0.001, 0.99)
    assert set(ch12.augment.split(",")) == {"flip", "offset", "scale", "rotate", "noise"}


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"lr": 0}, {"batch_size": 0}, {"amp": "int4"}, {"ema": 1.0}, {"ratio": -1}]
)
def test_a_wrong_setting_is_named(bad):
    with pytest.raises(UsageError, match=f"--{next(iter(bad)).replace('_', '-')}"):
        TrainConfig(**bad)


@pytest.mark.parametrize(("model", "stages"), [("luna", 6), ("residual", 4)])
def test_what_is_frozen_stands_still_with_its_statistics(small_store, tmp_path, model, stages):
    config = replace(QUICK, model=model, finetune=2, epochs=1, samples=16, ema=0.0)
    trainer = open_training(TrainOptions(small_store, tmp_path / "r"), config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with RunLog(tmp_path / "r") as log:
        train(trainer, log)
    parts = trainer.model.stages()
    assert len(parts) == stages
    learning = {id(p) for stage in parts[-2:] for module in stage for p in module.state_dict(keep_vars=True).values()}
    for name, tensor in trainer.model.state_dict(keep_vars=True).items():
        if id(tensor) not in learning:
            assert torch.equal(tensor, before[name]), name
        elif name.endswith("weight"):
            assert not torch.equal(tensor, before[name]), name


def test_more_stages_than_there_are_is_refused(small_store, tmp_path):
    with pytest.raises(UsageError, match="6 stages, got 7"):
        open_training(TrainOptions(small_store, tmp_path / "r"), replace(QUICK, finetune=7))


def test_malignancy_mixes_in_what_is_no_nodule(small_store, tmp_path):
    store = open_store(small_store)
    config = replace(MALIGNANCY, model="luna", finetune=1, samples=40, batch_size=8, split="candidate")
    trainer = open_training(TrainOptions(small_store, tmp_path / "r"), config)
    rows = np.concatenate(list(trainer.run.plan.batches(0)))
    drawn = store.manifest.iloc[rows]
    assert (drawn["is_malignant"].fillna(False).sum(), drawn["is_nodule"].sum()) == (20, 30)
    assert set(trainer.run.task.labels[rows[~drawn["is_nodule"]]]) == {0}
    judged = store.manifest.iloc[trainer.run.task.val_rows]
    assert judged["is_malignant"].notna().all()  # on nodules alone


def test_shards_in_turn_for_a_store_larger_than_memory(small_store, tmp_path):
    config = replace(QUICK, ratio=0, samples=0, shuffle="shards")
    trainer = open_training(TrainOptions(small_store, tmp_path / "r", io="pread"), config)
    assert isinstance(trainer.run.plan.sampler, ShardShuffled)
    rows = np.concatenate(list(trainer.run.plan.batches(0)))
    assert len(np.unique(rows)) == len(rows)
    with pytest.raises(UsageError, match="no-balanced"):
        replace(QUICK, shuffle="shards")


def test_averaged_weights_forget_those_a_run_began_with():
    weight = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    torch.nn.init.zeros_(weight.weight)
    averaged = AveragedModel(weight, multi_avg_fn=partial(loop._average, 0.99))
    averaged.update_parameters(weight)
    torch.nn.init.ones_(weight.weight)
    for _ in range(50):
        averaged.update_parameters(weight)
    assert float(averaged.module.weight) > 0.99
    torch.nn.init.zeros_(weight.weight)
    for _ in range(2000):
        averaged.update_parameters(weight)
    before = float(averaged.module.weight)
    torch.nn.init.ones_(weight.weight)
    averaged.update_parameters(weight)
    assert float(averaged.module.weight) - before == pytest.approx(0.01, rel=1e-3)
