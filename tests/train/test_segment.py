"""Segmentation: windows and masks move together, losses and scores against plain formulas, runs on a store's slabs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import f1_score, precision_score, recall_score

from lunaprep.store.reader import open_store
from lunatrain.augment import Augmentation
from lunatrain.augment_slabs import augment_slabs, resample_slabs
from lunatrain.checkpoint import load_checkpoint, save_checkpoint
from lunatrain.config import config_from_json
from lunatrain.dense import context_slices, predict_volume, read_slabs
from lunatrain.errors import CheckpointError, UsageError
from lunatrain.log import RunLog, read_metrics
from lunatrain.loop import train
from lunatrain.losses import LOSSES, MISSED_WEIGHT, book_loss, class_loss, dice_loss, pick_loss
from lunatrain.models.unet import UNet
from lunatrain.overlays import MISSED, RIGHT, WRONG, grey, overlay, tile
from lunatrain.segmentation import load_segmenter, open_training, resume_training
from lunatrain.segmentation_config import SEG_PRESETS, SegConfig
from lunatrain.slabs import HeldOutSlabs, HeldOutVolumes, SlabLoader, held_out_slabs, held_out_volumes, open_slabs
from lunatrain.training import TrainOptions, load_model
from lunatrain.voxel_scores import FP_LIMITS, FP_TUNED, VoxelScores

QUICK = SegConfig(epochs=1, samples=16, batch_size=8, side=32, seed=3, val_slices=12)


@pytest.fixture(scope="module")
def seg_store(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's store with volumes and targets, every third patient for validation."""
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters

    out = tmp_path_factory.mktemp("seg") / "store"
    build(BuildOptions(phantom_root, out, workers=1), Parameters(val_stride=3))
    return out


@pytest.fixture(scope="module")
def trained(seg_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    run = tmp_path_factory.mktemp("runs") / "seg"
    return run_training(open_training(TrainOptions(seg_store, run, "cpu"), QUICK))


def run_training(trainer) -> Path:
    with RunLog(trainer.run.path) as log:
        train(trainer, log)
    return trainer.run.path


def some_slabs(count=3, shape=(20, 28), seed=0):
    generator = torch.Generator().manual_seed(seed)
    slabs = torch.rand(count, 5, *shape, generator=generator) * 2000 - 1000
    return slabs, (torch.rand(count, *shape, generator=generator) < 0.3).to(torch.uint8)


# --- windows and changes


def test_the_mask_moves_with_the_image_as_in_scipy():
    slabs, masks = some_slabs()
    masks = ndimage.gaussian_filter(np.random.default_rng(0).random((3, 20, 28)), (0, 2, 2)) > 0.5
    masks = torch.from_numpy(masks.astype(np.uint8))
    angles, window = [0.0, 0.7, 2.5], (12, 10)
    starts = torch.tensor([[3.0, 5.0], [4.5, 8.25], [8.0, 0.0]])
    transforms = torch.zeros(3, 2, 3)
    for k, angle in enumerate(angles):
        cos, sin = math.cos(angle), math.sin(angle)
        transforms[k] = torch.tensor([[1.1 * cos, -1.1 * sin, 0.4], [0.8 * sin, 0.8 * cos, -1.3]])
    moved_slabs, moved_masks = resample_slabs(slabs, masks, transforms, starts, window)
    target_center = (np.asarray(window) - 1) / 2
    for k in range(3):
        matrix, shift = transforms[k, :, :2].numpy(), transforms[k, :, 2].numpy()
        offset = starts[k].numpy() + target_center + shift - matrix @ target_center
        for channel in range(5):
            image = slabs[k, channel].numpy()
            expected = ndimage.affine_transform(image, matrix, offset, window, order=1, mode="nearest")
            np.testing.assert_allclose(moved_slabs[k, channel].numpy(), expected, atol=0.5)
        expected = ndimage.affine_transform(masks[k].numpy(), matrix, offset, window, order=0, mode="nearest")
        assert (moved_masks[k].numpy() != expected).mean() < 0.03  # halfway between two pixels either is right


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_windows_and_flips_copy_pixels_and_keep_pairs_together(seed, flip):
    slabs, _ = some_slabs(4)
    masks = (slabs[:, 2] > 0).to(torch.uint8)  # so the mask says where the middle channel is
    found, moved = augment_slabs(slabs, masks, Augmentation(flip=flip), 12, torch.Generator().manual_seed(seed))
    assert found.shape == (4, 5, 12, 12)
    sure = found[:, 2].abs() > 1
    assert torch.equal(((found[:, 2] > 0).to(torch.uint8))[sure], moved[sure])
    for k in range(4):
        source = slabs[k].flatten(1).T
        pixel = found[k, :, 0, 0]
        distance = torch.minimum((source - pixel).abs().amax(1), (source.flip(1) - pixel).abs().amax(1))
        assert float(distance.min()) < 0.1


def test_each_sample_has_its_own_transform_and_the_same_seed_gives_the_same():
    slabs, masks = some_slabs(1)
    slabs, masks = slabs.repeat(6, 1, 1, 1), masks.repeat(6, 1, 1)
    everything = Augmentation.parse("flip,offset=0.03,scale,rotate,noise")
    one = augment_slabs(slabs, masks, everything, 12, torch.Generator().manual_seed(1))
    again = augment_slabs(slabs, masks, everything, 12, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert len(torch.unique(one[0].flatten(1), dim=0)) == 6
    assert set(one[1].unique().tolist()) <= {0, 1}


def test_small_images_are_taken_whole_and_colours_are_not_mirrored():
    slabs, masks = some_slabs(2, (6, 9))
    found, moved = augment_slabs(slabs, masks, Augmentation(), 64)
    torch.testing.assert_close(found, slabs, atol=0.2, rtol=0)
    assert torch.equal(moved, masks)
    levels = torch.arange(5.0)[None, :, None, None].expand(8, 5, 6, 6)
    for mirrored in (True, False):
        found, _ = augment_slabs(levels, torch.zeros(8, 6, 6), Augmentation(flip=True), 6, flips_channels=mirrored)
        assert bool((found[:, 0] > 3).any()) == mirrored


def test_the_mean_area_of_a_single_pixel_is_kept():
    masks = torch.zeros(600, 31, 31, dtype=torch.uint8)
    masks[:, 15, 15] = 1
    _, moved = augment_slabs(
        torch.zeros(600, 1, 31, 31), masks, Augmentation(rotate=True), 31, torch.Generator().manual_seed(0)
    )
    assert abs(float(moved.sum()) / 600 - 1) < 0.1


# --- losses


def test_losses_are_the_plain_formulas():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(3, 1, 5, 6)))
    target = torch.from_numpy((rng.random((3, 5, 6)) < 0.4).astype(np.uint8))
    p, t = 1 / (1 + np.exp(-logits[:, 0].float().numpy())), target.numpy()

    def dice(a, b):
        return np.mean([1 - (2 * (x * y).sum() + 1) / (x.sum() + y.sum() + 1) for x, y in zip(a, b, strict=True)])

    assert float(book_loss(logits, target)) == pytest.approx(dice(p, t) + 8 * dice(p * t, t), abs=1e-5)
    assert MISSED_WEIGHT == 8
    entropy = -np.mean(t * np.log(p) + (1 - t) * np.log(1 - p))
    expected = dice(p, t) + dice(p * t, t) + 10 * entropy
    assert float(pick_loss("dice-bce")(logits, target)) == pytest.approx(expected, abs=1e-5)


def test_class_loss_is_cross_entropy_and_dice():
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 4, 4)))
    target = torch.from_numpy(rng.integers(0, 3, (2, 4, 4)))
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    entropy = -np.mean([np.log(p[n, target[n, r, c], r, c]) for n in range(2) for r in range(4) for c in range(4)])
    overlap = []
    for n in range(2):
        for k in range(3):
            t = target[n].numpy() == k
            overlap.append(1 - (2 * p[n, k][t].sum() + 1) / (p[n, k].sum() + t.sum() + 1))
    assert float(class_loss(logits, target)) == pytest.approx(entropy + np.mean(overlap), abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_right_mask_costs_little_and_an_empty_one_is_no_trouble(name):
    target = torch.zeros(2, 8, 8, dtype=torch.uint8)
    target[0, 2:5, 2:5] = 1
    right = (target.float()[:, None] * 2 - 1) * 20
    assert float(pick_loss(name)(right, target)) < 1e-3
    assert float(pick_loss(name)(-right, target)) > 1
    assert float(dice_loss(torch.zeros(1, 4), torch.zeros(1, 4))) == 0
    with pytest.raises(UsageError, match="--loss"):
        pick_loss("l2")


# --- scores


def test_scores_are_sklearns():
    rng = np.random.default_rng(2)
    true = rng.random((4, 20, 20)) < 0.1
    logits = (rng.normal(size=true.shape) + 2 * true).astype(np.float32)
    logits[np.abs(logits) < 1e-3] = 0.5
    scores = VoxelScores(4)
    for k in range(4):
        places = np.flatnonzero(true[k])
        scores.add(logits[k], places, np.full(len(places), k))
    figures = scores.figures()
    called = (logits >= 0).ravel()
    assert figures["precision"] == pytest.approx(precision_score(true.ravel(), called))
    assert figures["recall"] == pytest.approx(recall_score(true.ravel(), called))
    assert figures["f1"] == pytest.approx(f1_score(true.ravel(), called))
    assert figures["fp_ratio"] == pytest.approx((called & ~true.ravel()).sum() / true.sum())
    assert figures["nodules_touched"] == 1
    tuned = 1 / (1 + np.exp(-logits.astype(float))) >= figures["threshold"] - 1e-9
    assert (tuned & ~true).sum() <= FP_TUNED * true.sum()
    assert figures["recall_tuned"] == pytest.approx((tuned & true).sum() / true.sum())
    recalls = []
    for limit in FP_LIMITS:
        allowed = [t for t in np.arange(-12, 12.05, 0.1) if ((logits >= t - 1e-6) & ~true).sum() <= limit * true.sum()]
        recalls.append((true & (logits >= min(allowed) - 1e-6)).sum() / true.sum())
    assert figures["mean_recall"] == pytest.approx(np.mean(recalls), abs=0.01)


def test_marks_outside_the_lungs_count_only_on_nodules():
    logits = np.full((4, 4), 5.0, dtype=np.float32)
    scores = VoxelScores(1)
    lungs = np.zeros((4, 4), dtype=bool)
    lungs[0, :3] = True
    scores.add(logits, np.array([0, 15]), np.array([0, 0]), lungs)
    figures = scores.figures()
    assert figures["recall"] == 1
    assert figures["precision"] == 0.5


def test_nothing_found_and_nothing_there():
    scores = VoxelScores(1)
    scores.add(np.where(np.arange(100).reshape(10, 10) == 7, -9, 9).astype(np.float32), np.array([7]), np.array([0]))
    figures = scores.figures()
    assert (figures["mean_recall"], figures["threshold"], figures["nodules_touched"]) == (0, 0.5, 0)
    assert math.isnan(VoxelScores(0).figures()["mean_recall"])


# --- dense prediction


def test_context_ends_at_the_ends():
    assert context_slices([0, 1, 9], 10, 5).tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [7, 8, 9, 9, 9]]
    volume = np.arange(10)[:, None, None] * np.ones((1, 2, 3)) * 300
    slabs = read_slabs(volume, [0, 9], 3, slice(0, 1), slice(1, 3))
    assert slabs[:, :, 0, 0].tolist() == [[0, 0, 300], [1000, 1000, 1000]]  # clipped


def test_a_volume_is_predicted_slice_by_slice():
    torch.manual_seed(0)
    model = UNet().eval()
    volume = np.random.default_rng(0).integers(-1500, 2000, (9, 70, 61)).astype(np.int16)
    whole = predict_volume(model, volume, "cpu", batch=4)
    clipped = torch.from_numpy(volume.astype(np.float32)).clamp(-1000, 1000)
    for index in (0, 4, 8):
        around = [min(max(index + k, 0), 8) for k in range(-3, 4)]
        with torch.no_grad():
            expected = torch.sigmoid(model(clipped[around][None]))[0, 0].numpy()
        np.testing.assert_allclose(whole[index], expected, atol=2e-3)  # an untrained network has steep logits
    box = ((2, 33, 11), (7, 41, 40))
    part = predict_volume(model, volume.astype(np.float32), "cpu", box=box, batch=2)
    inside = np.s_[2:7, 33:41, 11:40]
    np.testing.assert_allclose(part[inside], whole[inside], atol=2e-3)
    part[inside] = 0
    assert not part.any()
    some = predict_volume(model, volume, "cpu", slices=[7, 1])
    np.testing.assert_allclose(some[[1, 7]], whole[[1, 7]], atol=2e-3)
    assert not some[[0, 2, 3, 4, 5, 6, 8]].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slices": [9]}, "slices must lie in 0 to 3"),
        ({"box": ((0, 50, 0), (4, 60, 8))}, "nothing is left"),
        ({"hu_volume": np.zeros((4, 8))}, "slices, rows and columns"),
    ],
)
def test_what_cannot_be_predicted_is_named(change, words):
    given = {"hu_volume": np.zeros((4, 8, 8), dtype=np.int16), **change}
    with pytest.raises(UsageError, match=words):
        predict_volume(UNet(), given.pop("hu_volume"), "cpu", **given)


# --- overlays


def test_colours_say_what_is_right_wrong_and_missed():
    image = grey(np.full((2, 2), -600.0))
    true, called = np.array([[1, 1], [0, 0]], bool), np.array([[1, 0], [1, 0]], bool)
    out = overlay(image, true, called).astype(int)
    assert (out[1, 1] == image[1, 1]).all()
    for place, colour in (((0, 0), RIGHT), ((0, 1), MISSED), ((1, 0), WRONG)):
        assert np.abs(out[place] - (0.4 * image[place] + 0.6 * np.asarray(colour))).max() <= 1
    assert tile([image, image[:1], image, image], columns=3).shape == (2 + 4 + 2, 2 * 3 + 8, 3)


# --- runs


def test_a_batch_holds_the_slabs_and_middle_masks_of_its_rows(seg_store):
    store = open_store(seg_store)
    slabs, masks = open_slabs(store)
    rows = np.array([len(store.slabs) - 1, 0, 3])
    (batch,) = [(b.slabs.clone(), b.masks.clone(), b.rows) for b in SlabLoader(slabs, masks, 4).batches([rows])]
    for k, row in enumerate(rows.tolist()):
        line = store.slabs.iloc[row]
        assert int(batch[1][k].sum()) == line["num_mask_voxels"]
        hu, nodules = store.volume(line["series_uid"]), store.masks(line["series_uid"])[0]
        index, top, left = line["start_index"] + 3, line["start_row"], line["start_col"]
        seen = hu[max(index, 0), max(top, 0) : top + 96, max(left, 0) : left + 96]
        found = batch[0][k, 3, max(-top, 0) :, max(-left, 0) :][: seen.shape[0], : seen.shape[1]]
        np.testing.assert_allclose(found.float().numpy(), seen, atol=0.5)
        mask = nodules[index, max(top, 0) : top + 96, max(left, 0) : left + 96]
        assert np.array_equal(batch[1][k, max(-top, 0) :, max(-left, 0) :][: mask.shape[0], : mask.shape[1]], mask)


def test_whole_slices_are_held_out_and_numbered(seg_store):
    store = open_store(seg_store)
    series = sorted(set(store.slabs["series_uid"][store.slabs["split_series"] == "val"]))
    val = held_out_volumes(store, series, 7, 4)
    seen, nodules = 0, set()
    for slabs, truths in val.batches():
        assert slabs.shape[1] == 7
        seen += len(truths)
        for truth in truths:
            nodules |= set(truth.nodules.tolist())
            assert truth.searched(slabs.shape[2:]).shape == slabs.shape[2:]
    assert seen == len(val)
    assert nodules == set(range(val.num_nodules))
    expected = sum(ndimage.label(store.masks(uid)[0], np.ones((3, 3, 3)))[1] for uid in series)
    assert val.num_nodules == expected
    thinned = held_out_volumes(store, series, 7, 4, max_slices=8)
    assert len(thinned) <= 8
    shown = {int(n) for _, truths in thinned.batches() for truth in truths for n in truth.nodules}
    assert shown == set(range(thinned.num_nodules))


def test_slabs_are_held_out_where_there_are_no_volumes(seg_store, small_store, tmp_path):
    trainer = open_training(TrainOptions(seg_store, tmp_path / "a", "cpu"), QUICK)
    assert isinstance(trainer.run.task.val, HeldOutVolumes)
    trainer = open_training(TrainOptions(small_store, tmp_path / "b", "cpu"), QUICK)
    assert isinstance(trainer.run.task.val, HeldOutSlabs)
    figures = trainer.run.task.validate(trainer.model, torch.device("cpu"), trainer.amp).figures
    assert 0 <= figures["recall"] <= 1
    store = open_store(small_store)
    rows = np.arange(len(store.slabs))
    val = held_out_slabs(SlabLoader(*open_slabs(store), 8), store.slabs, rows)
    names = store.slabs["annotation_id"][store.slabs["is_positive"]]
    assert val.num_nodules == names.nunique() + names.isna().sum()


def test_a_run_leaves_pictures_curves_and_figures(trained):
    lines = read_metrics(trained)
    assert [line["part"] for line in lines] == ["train", "val"]
    for name in (
        "mean_recall",
        "precision",
        "recall",
        "f1",
        "dice",
        "fp_ratio",
        "threshold",
        "nodules_touched",
        "loss",
    ):
        assert name in lines[1]
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((trained / "predictions").iterdir())] == ["000000016.png"]


def test_a_resumed_run_is_the_run_that_was_not_stopped(trained, seg_store, tmp_path):
    options = TrainOptions(seg_store, tmp_path / "run", "cpu")
    trainer = open_training(options, QUICK)
    batches = trainer.run.loader.batches(trainer.run.plan.batches(0))
    trainer.step(next(batches))
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "last.pt", trainer.state())
    resumed, _ = resume_training(options)
    run_training(resumed)
    expected, found = (load_checkpoint(run / "last.pt").state for run in (trained, tmp_path / "run"))
    assert all(torch.equal(tensor, found["model"][name]) for name, tensor in expected["model"].items())
    assert expected["progress"]["best_figures"] == found["progress"]["best_figures"]


def test_a_trained_network_is_found_again(trained, seg_store):
    model, facts = load_segmenter(trained)
    assert (facts["context"], facts["num_classes"], facts["kind"]) == (7, 1, "slices")
    best = load_checkpoint(trained / "best.pt").state
    assert facts["threshold"] == best["progress"]["best_figures"]["threshold"]
    assert facts["store_id"] == open_store(seg_store).record["store_id"]
    assert predict_volume(model, np.zeros((3, 16, 16), np.int16), "cpu").shape == (3, 16, 16)


def test_a_state_of_the_book_is_a_segmenter(tmp_path):
    torch.save({"model_state": UNet().state_dict()}, tmp_path / "seg.state")
    model, facts = load_segmenter(tmp_path / "seg.state")
    assert (facts["threshold"], facts["context"]) == (0.5, 7)
    assert not model.training


def test_wrong_checkpoints_and_settings_are_named(trained, seg_store, small_store, tmp_path):
    save_checkpoint(tmp_path / "cls.pt", {"model_args": {"name": "luna"}, "model": {}})
    with pytest.raises(CheckpointError, match="no segmentation"):
        load_segmenter(tmp_path / "cls.pt")
    with pytest.raises(UsageError, match="no checkpoint"):
        load_segmenter(tmp_path)
    with pytest.raises(CheckpointError, match="this is"):
        resume_training(TrainOptions(small_store, trained, "cpu"))
    with pytest.raises(UsageError, match="--side"):
        SegConfig(side=2)
    with pytest.raises(UsageError, match="a setting 'colour'"):
        config_from_json({**QUICK.to_json(), "colour": 1}, SegConfig)
    assert config_from_json(json.loads(json.dumps(QUICK.to_json())), SegConfig) == QUICK
    with pytest.raises(UsageError, match="model must be one of"):
        open_training(TrainOptions(seg_store, tmp_path / "x", "cpu"), SegConfig(model="luna"))


def test_the_books_preset_shows_positives_alone(seg_store, tmp_path):
    options = TrainOptions(seg_store, tmp_path / "x", "cpu")
    trainer = open_training(options, SEG_PRESETS["book-ch13"])
    assert len(trainer.run.plan) == 300_000 // 16
    is_positive = open_store(seg_store).slabs["is_positive"].to_numpy()
    rows = next(iter(trainer.run.plan.batches(0)))
    assert is_positive[rows].all()


def test_init_starts_from_a_run(trained, seg_store, tmp_path):
    trainer = open_training(TrainOptions(seg_store, tmp_path / "x", "cpu", trained / "best.pt"), QUICK)
    best = load_checkpoint(trained / "best.pt").state["model"]
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_segmentation_is_no_classifier(trained):
    with pytest.raises(CheckpointError, match="is no classifier"):
        load_model(trained / "best.pt", (32, 48, 48))
