"""Lung boxes: their geometry against masks that are drawn, pictures, networks, and runs on a store."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.store.reader import open_store
from lunatrain.augment_boxes import DEFAULTS, BoxAugmentation, augment_boxes, move
from lunatrain.box_slices import _with_split, chosen_slices, picture_of, read_store_slices
from lunatrain.boxes import around, corners_of, iou, iou_figures, outline_of
from lunatrain.checkpoint import load_checkpoint, save_checkpoint
from lunatrain.config import config_from_json
from lunatrain.errors import CheckpointError, UsageError
from lunatrain.localisation import find_boxes, load_localiser, open_training, resume_training
from lunatrain.localisation_config import LocConfig
from lunatrain.log import RunLog, read_metrics
from lunatrain.loop import PLATEAU_EPOCHS, PLATEAU_FACTOR, Trainer, train
from lunatrain.models.boxnet import BOX_MODELS, build_boxnet
from lunatrain.overlays import frame
from lunatrain.segmentation import load_segmenter
from lunatrain.training import TrainOptions, load_model

QUICK = LocConfig(epochs=3, batch_size=8, side=32, slice_mm=4.0, lr=3e-4, keep_best=2, seed=3, split="all")


def run_training(trainer: Trainer) -> Path:
    with RunLog(trainer.run.path) as log:
        train(trainer, log)
    return trainer.run.path


@pytest.fixture(scope="module")
def trained(loc_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs."""
    run = tmp_path_factory.mktemp("runs") / "loc"
    return run_training(open_training(TrainOptions(loc_store, run, "cpu"), QUICK))


# --- boxes


def test_iou_by_hand():
    whole, left, middle = [0, 0, 1, 1], [0, 0, 0.5, 1], [0.25, 0.25, 0.75, 0.75]
    pairs = [(whole, whole, 1), (whole, left, 1 / 2), (left, middle, 0.125 / 0.625), (left, [0.6, 0, 1, 1], 0)]
    for a, b, expected in [*pairs, ([0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 0.3], 0)]:
        assert iou([a], [b])[0] == pytest.approx(expected)
    figures = iou_figures([whole, whole, left], [whole, left, left])
    assert figures == {
        "iou": pytest.approx(2.5 / 3),
        "iou_p5": pytest.approx(0.55),
        "share_iou_90": pytest.approx(2 / 3),
    }


box_px = st.tuples(*[st.integers(0, 18)] * 2, *[st.integers(1, 12)] * 2)


@settings(max_examples=50, deadline=None)
@given(box_px, box_px)
def test_iou_is_that_of_counted_pixels(one, other):
    masks, boxes = [], []
    for x, y, width, height in (one, other):
        mask = np.zeros((30, 30), dtype=bool)
        mask[y : y + height, x : x + width] = True
        masks.append(mask)
        boxes.append([[x / 30, y / 30, (x + width) / 30, (y + height) / 30]])
    expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert iou(*boxes)[0] == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_an_outline_holds_all_pixels_of_its_mask(seed, count):
    rng = np.random.default_rng(seed)
    mask = np.zeros((24, 36), dtype=bool)
    mask[rng.integers(0, 24, count), rng.integers(0, 36, count)] = True
    rows, cols = np.nonzero(mask)
    expected = [cols.min() / 36, rows.min() / 24, (cols.max() + 1) / 36, (rows.max() + 1) / 24]
    np.testing.assert_allclose(around(outline_of(mask)[None])[0], expected)


def drawn(kind: str, rng: np.random.Generator, side: int = 160) -> np.ndarray:
    """A rectangle, or two ellipses side by side, filled."""
    r, c = np.indices((side, side)) + 0.5
    if kind == "rectangle":
        top, left = rng.integers(45, 60, 2)
        return (r > top) & (r < top + rng.integers(30, 50)) & (c > left) & (c < left + rng.integers(30, 50))
    lungs = [((r - 80 - rng.normal()) / 28) ** 2 + ((c - at) / rng.uniform(14, 20)) ** 2 < 1 for at in (58, 102)]
    return lungs[0] | lungs[1]


@pytest.mark.parametrize("kind", ["rectangle", "ellipses"])
def test_the_box_moves_with_the_picture(kind):
    rng, side, count = np.random.default_rng(0), 160, 24
    masks = np.stack([drawn(kind, rng) for _ in range(count)])
    outlines = np.stack([outline_of(mask) for mask in masks])
    if kind == "rectangle":
        outlines = corners_of(around(outlines))
    settings_ = BoxAugmentation(flip=1, offset=0.15, scale=0.3, rotate=30)
    pictures, boxes = augment_boxes(
        torch.from_numpy(masks.astype(np.float32))[:, None],
        torch.from_numpy(outlines.astype(np.float32)),
        settings_,
        torch.Generator().manual_seed(1),
    )
    for picture, box in zip(pictures[:, 0].numpy() > 0.5, boxes.numpy(), strict=True):
        rows, cols = np.nonzero(picture)
        expected = np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
        assert np.abs(box * side - expected).max() < 1.6  # a corner's tip covers less than half of its pixel
    moved = np.abs(boxes.numpy() - around(outlines)).max(axis=1)
    assert (moved > 0.01).all()


def test_a_shift_and_a_mirror_to_the_pixel():
    picture = torch.zeros(1, 1, 8, 8)
    picture[0, 0, 2:4, 1:6] = 1
    outline = torch.from_numpy(corners_of([[1 / 8, 2 / 8, 6 / 8, 4 / 8]]).astype(np.float32))
    shift = torch.tensor([[[1.0, 0, -2 / 8], [0, 1, -4 / 8]]])  # a pixel to the right, two down
    moved, points = move(picture, outline, shift)
    assert moved[0, 0, 4:6, 2:7].min() == 1
    assert moved.sum() == 10
    np.testing.assert_allclose(around(points.numpy()), [[2 / 8, 4 / 8, 7 / 8, 6 / 8]], atol=1e-6)
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    moved, points = move(picture, outline, mirror)
    assert torch.equal(moved, picture.flip(3))
    np.testing.assert_allclose(around(points.numpy()), [[2 / 8, 2 / 8, 7 / 8, 4 / 8]], atol=1e-6)


def test_what_leaves_the_picture_is_cut_off():
    picture, outline = torch.zeros(1, 1, 8, 8), torch.from_numpy(corners_of([[0, 0.5, 1, 1]]).astype(np.float32))
    _, points = move(picture, outline, torch.tensor([[[1.0, 0, 0.5], [0, 1, -0.5]]]))
    np.testing.assert_allclose(around(points.numpy()), [[0, 0.75, 0.75, 1]], atol=1e-6)


def test_gamma_changes_values_alone_and_each_sample_has_its_own():
    picture = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8).repeat(5, 1, 1, 1)
    outline = torch.from_numpy(corners_of([[0.1, 0.2, 0.6, 0.9]] * 5).astype(np.float32))
    found, boxes = augment_boxes(picture, outline, BoxAugmentation(gamma=2.0), torch.Generator().manual_seed(0))
    powers = found[:, 0, 4, 0].log() / picture[:, 0, 4, 0].log()
    assert len(set(powers.tolist())) == 5
    assert 0.5 <= float(powers.min()) < float(powers.max()) <= 2
    for k in range(5):
        torch.testing.assert_close(found[k], picture[k] ** powers[k])
    torch.testing.assert_close(boxes, torch.tensor([[0.1, 0.2, 0.6, 0.9]]).repeat(5, 1))
    again, _ = augment_boxes(picture, outline, BoxAugmentation(gamma=2.0), torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_augmentations_are_read_and_wrong_ones_named():
    assert BoxAugmentation.parse("all") == BoxAugmentation(**DEFAULTS)
    assert BoxAugmentation.parse("") == BoxAugmentation.parse("none") == BoxAugmentation()
    for text, words in (("noise", "got 'noise'"), ("gamma=0.5", "from 1 on"), ("rotate=x", "expected a number")):
        with pytest.raises(UsageError, match=words):
            BoxAugmentation.parse(text)


# --- pictures


def test_the_window_has_centre_minus_600_and_width_1500():
    hu = np.array([[-3024, -1350, -1000, -600], [-225, 0, 150, 3000]], dtype=np.int16)
    square = np.concatenate([hu, hu])
    expected = np.clip((np.maximum(hu.astype(float), -1000) + 1350) / 1500, 0, 1) * 255
    assert np.abs(picture_of(square[None], 4)[0][:2] - expected).max() <= 0.5
    assert picture_of(square[None], 4)[0, 0, 3] in (127, 128)


def test_pictures_are_averages_and_keep_fractions():
    hu = np.full((1, 60, 90), -1000, dtype=np.float32)
    hu[0, 15:45, 30:60] = 200
    small = picture_of(hu, 30)[0] > 150
    rows, cols = np.nonzero(small)
    assert (rows.min(), rows.max() + 1) == (pytest.approx(30 / 4, abs=1), pytest.approx(90 / 4, abs=1))
    assert (cols.min(), cols.max() + 1) == (10, 20)
    noise = np.random.default_rng(0).normal(-500, 100, (1, 64, 64))
    assert picture_of(noise, 8).mean() == pytest.approx((850 / 1500) * 255, abs=1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.floats(0.3, 10), st.floats(0.5, 20))
def test_chosen_slices_lie_evenly_within_the_scan(count, gap, wanted):
    chosen = chosen_slices(count, gap, wanted)
    step = max(1, round(wanted / gap))
    assert 0 <= chosen[0] < max(1, step)
    assert chosen[-1] < count <= chosen[-1] + step + chosen[0] + 1
    assert (np.diff(chosen) == step).all()


def test_boxes_of_a_store_are_those_of_its_masks(loc_store):
    store = open_store(loc_store)
    slices = read_store_slices(store, 32, 3.0)
    uid = slices.table["series_uid"].iloc[0]
    scan = store.scans.set_index("series_uid").loc[uid]
    _, lungs = store.masks(uid)
    wanted = range(round(3.0 / scan["spacing"][2]) // 2, len(lungs), round(3.0 / scan["spacing"][2]))
    shows = [k for k in wanted if lungs[k].sum() * scan["spacing"][0] * scan["spacing"][1] >= 100]
    own = slices.table.index[slices.table["series_uid"] == uid]
    assert slices.table["index"].iloc[own].tolist() == shows
    for row, index in zip(own, shows, strict=True):
        rows, cols = np.nonzero(lungs[index])
        sides = np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]) / 64
        np.testing.assert_allclose(slices.boxes[row], sides, atol=1e-6)
        assert np.array_equal(slices.pictures[row], picture_of(store.volume(uid)[index][None], 32)[0])
    per_scan = [len(chosen_slices(row["num_slices"], row["spacing"][2], 3.0)) for _, row in store.scans.iterrows()]
    assert slices.num_without == sum(per_scan) - len(slices)
    held_out = set(store.manifest.query("split_series == 'val'")["series_uid"])
    assert set(slices.table.query("split_series == 'val'")["series_uid"]) == held_out


def test_a_scan_without_candidates_has_the_part_of_its_patient():
    scans = pd.DataFrame({"series_uid": list("abcde"), "patient_id": ["p", "p", None, "q", None], "subset": range(5)})
    known = pd.DataFrame({"series_uid": list("aec"), "split_series": ["val", "val", "train"], "fold": [0, 4, 2]})
    store = SimpleNamespace(scans=scans, columns=lambda *names: known)
    table = _with_split(pd.DataFrame({"series_uid": list("abcde")}), store)
    assert table["split_series"].tolist() == ["val", "val", "train", "train", "val"]
    assert table["fold"].tolist() == [0, 1, 2, 3, 4]


def test_a_store_without_volumes_is_named(small_store):
    with pytest.raises(UsageError, match="no volume that shows a lung"):
        read_store_slices(open_store(small_store), 32, 5.0)


def test_a_frame_is_drawn_along_the_box():
    image = np.zeros((10, 20, 3), dtype=np.uint8)
    out = frame(image, (0.25, 0.2, 0.75, 0.8), (1, 2, 3), width=1)
    edge = np.zeros((10, 20), dtype=bool)
    edge[2:8, 5:15] = True
    edge[3:7, 6:14] = False
    assert np.array_equal((out == (1, 2, 3)).all(axis=-1), edge)
    assert not image.any()


# --- networks


@pytest.mark.parametrize("name", BOX_MODELS)
def test_boxes_are_ordered_and_within_the_picture(name):
    torch.manual_seed(0)
    model = build_boxnet(name).eval()
    with torch.no_grad():
        boxes = model(torch.rand(8, 1, 45, 64))
        model.head.linear.weight.mul_(300)  # to the ends of the sigmoid
        boxes = torch.cat([boxes, model(torch.rand(8, 1, 45, 64))])
    assert boxes.shape == (16, 4)
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    assert len(torch.unique(boxes[:8], dim=0)) == 8
    model.head.begin_with([0.1, 0.2, 0.9, 0.7])
    torch.testing.assert_close(model(torch.rand(1, 1, 32, 32))[0], torch.tensor([0.1, 0.2, 0.9, 0.7]))


def test_networks_differ_and_are_known_by_name():
    sizes = {name: sum(p.numel() for p in build_boxnet(name).parameters()) for name in BOX_MODELS}
    assert sizes == {"resnet": 2_812_132, "depthwise": 2_206_996}
    with pytest.raises(UsageError, match="resnet, depthwise"):
        build_boxnet("vgg")


# --- runs


def test_it_learns_more_than_the_mean_box(trained):
    best = max((line for line in read_metrics(trained) if line["part"] == "val"), key=lambda line: line["iou"])
    assert best["iou"] > best["iou_mean_box"] + 0.02
    assert 0 <= best["iou_p5"] <= best["iou"] <= 1


def test_the_baseline_is_the_mean_training_box(trained, loc_store, tmp_path):
    slices = read_store_slices(open_store(loc_store), 32, 4.0)
    is_val = (slices.table["split_series"] == "val").to_numpy()
    held_out = open_training(TrainOptions(loc_store, tmp_path / "x", "cpu"), replace(QUICK, split="series")).run.task
    np.testing.assert_allclose(held_out.mean_box, slices.boxes[~is_val].mean(axis=0))
    assert held_out.val_rows.tolist() == np.flatnonzero(is_val).tolist()
    mean = slices.boxes.mean(axis=0)  # of the run on all of them
    expected = np.mean([iou([mean], [box])[0] for box in slices.boxes])
    assert read_metrics(trained)[1]["iou_mean_box"] == pytest.approx(expected)


def test_the_best_epochs_by_loss_are_kept(trained):
    losses = {line["epoch"]: line["loss"] for line in read_metrics(trained) if line["part"] == "val"}
    best = sorted(losses, key=losses.get)
    assert {path.name for path in trained.glob("epoch-*.pt")} == {f"epoch-{k + 1:03d}.pt" for k in best[:2]}
    state = load_checkpoint(trained / "best.pt").state
    assert state["progress"]["best_epoch"] == best[0]
    top = load_checkpoint(trained / f"epoch-{best[0] + 1:03d}.pt").state["model"]
    assert all(torch.equal(tensor, top[name]) for name, tensor in state["model"].items())
    for name in ("predictions", "curves.png", "metrics.jsonl"):
        assert (trained / name).exists()


def test_a_resumed_run_is_the_run_that_was_not_stopped(trained, loc_store, tmp_path):
    options = TrainOptions(loc_store, tmp_path / "run", "cpu")
    trainer = open_training(options, QUICK)
    step = trainer.step

    def stop_in_the_second_epoch(batch):
        step(batch)
        if trainer.progress.epoch == 1 and trainer.progress.step == 2:
            save_checkpoint(options.run / "last.pt", trainer.state())
            raise KeyboardInterrupt

    trainer.step = stop_in_the_second_epoch
    with pytest.raises(KeyboardInterrupt):
        train(trainer, None)
    resumed, loaded = resume_training(options)
    assert (loaded.state["progress"]["epoch"], loaded.state["progress"]["step"]) == (1, 2)
    run_training(resumed)
    expected, found = (load_checkpoint(run / "last.pt").state for run in (trained, options.run))
    assert all(torch.equal(tensor, found["model"][name]) for name, tensor in expected["model"].items())
    for key in ("progress", "schedule"):
        assert expected[key] == found[key]
    assert sorted(path.name for path in trained.glob("*.pt")) == sorted(path.name for path in options.run.glob("*.pt"))


def test_the_plateau_lowers_the_learning_rate(loc_store, tmp_path, monkeypatch):
    monkeypatch.setattr("lunatrain.loop.save_checkpoint", lambda path, state: None)
    still = replace(QUICK, epochs=PLATEAU_EPOCHS + 2, samples=2, batch_size=2, lr=1e-12, slice_mm=30.0, augment="none")
    trainer = open_training(TrainOptions(loc_store, tmp_path / "run", "cpu"), still)
    train(trainer, None)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-12 * PLATEAU_FACTOR)


def test_a_network_is_found_again_and_several_are_their_mean(trained, loc_store, tmp_path):
    other = open_training(TrainOptions(loc_store, tmp_path / "b", "cpu"), replace(QUICK, model="depthwise", side=48))
    with torch.no_grad():
        other.model.head.linear.weight.normal_()
    save_checkpoint(tmp_path / "b" / "last.pt", other.state())
    device = torch.device("cpu")
    localisers = [load_localiser(path, device) for path in (trained, tmp_path / "b")]
    assert [item.side for item in localisers] == [32, 48]
    hu = np.random.default_rng(0).integers(-1000, 200, (5, 64, 64))
    alone = [find_boxes([item], lambda side: picture_of(hu, side), device) for item in localisers]
    together = find_boxes(localisers, lambda side: picture_of(hu, side), device)
    np.testing.assert_allclose(together, (alone[0] + alone[1]) / 2)
    assert np.abs(alone[0] - alone[1]).max() > 0.01


def test_wrong_checkpoints_and_settings_are_named(trained, loc_store, tmp_path):
    save_checkpoint(tmp_path / "cls.pt", {"model_args": {"name": "luna", "crop_shape": [32, 48, 48]}, "model": {}})
    with pytest.raises(CheckpointError, match="gives no lung boxes"):
        load_localiser(tmp_path / "cls.pt", torch.device("cpu"))
    with pytest.raises(CheckpointError, match="no segmentation"):
        load_segmenter(trained)
    with pytest.raises(CheckpointError, match="it gives lung boxes"):
        load_model(trained / "best.pt", (32, 48, 48))
    for changes, words in (
        ({"side": 8}, "got 8"), ({"slice_mm": 0.0}, "--slice-mm"), ({"split": "candidate"}, "--split"),
        ({"keep_best": 0}, "--keep-best"), ({"schedule": "cosine"}, "--schedule"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            replace(QUICK, **changes)
    with pytest.raises(UsageError, match="a setting 'colour'"):
        config_from_json({**QUICK.to_json(), "colour": 1}, LocConfig)
    options = TrainOptions(loc_store, tmp_path / "x", "cpu", trained / "best.pt")
    with pytest.raises(CheckpointError, match="--model resnet"):
        open_training(options, replace(QUICK, model="depthwise"))
    assert math.isclose(LocConfig().lr, 1e-4)
    assert (LocConfig().optimizer, LocConfig().schedule) == ("adam", "plateau")
