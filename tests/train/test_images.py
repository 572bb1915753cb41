"""`lunatrain seg --images`: folders of images and masks, good and bad, and what a run on them leaves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

from lunatrain.augment import Augmentation
from lunatrain.cli import cli
from lunatrain.errors import UsageError
from lunatrain.images import ImageBatch, ImageError, ImagePair, read_images
from lunatrain.log import RunLog, read_metrics
from lunatrain.loop import train
from lunatrain.segmentation import load_segmenter, open_training, resume_training
from lunatrain.segmentation_config import IMAGES
from lunatrain.tasks.segment_images import SegmentImages, confusion_figures, decide
from lunatrain.training import TrainOptions

QUICK = {"epochs": 2, "samples": 8, "batch_size": 4, "side": 32}
IMAGES_AUGMENTATION = Augmentation.parse(IMAGES.augment)


def write_pair(folder: Path, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    for kind, values in (("inputs", image), ("outputs", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / kind / name)


def make_folder(root: Path, *, colour: bool = False, values=(0, 255), count: int = 4) -> Path:
    """Bright discs on noise; with more values, each disc is of a class of its own."""
    rng = np.random.default_rng(0)
    for part, number in (("train", count), ("test", 2)):
        for k in range(number):
            rows, cols = (40, 53) if k % 2 else (61, 47)
            mask = np.full((rows, cols), values[0], dtype=np.uint8)
            image = rng.normal(60, 20, (rows, cols))
            for place, value in enumerate(values[1:]):
                y, x = rng.integers(12, (rows - 12, cols - 12))
                disc = np.hypot(np.arange(rows)[:, None] - y, np.arange(cols) - x) < 8
                mask[disc] = value
                image[disc] = 140 + 50 * place
            grey = image.clip(0, 255).astype(np.uint8)
            write_pair(root / part, f"{k}.png", np.stack([grey, 255 - grey, grey], -1) if colour else grey, mask)
    return root


def run_on(folder: Path, run: Path, **changes) -> Path:
    trainer = open_training(TrainOptions(folder, run, "cpu"), replace(IMAGES, **{**QUICK, **changes}))
    with RunLog(run) as log:
        train(trainer, log)
    return run


def test_pairs_are_read_by_name_with_classes_by_value(tmp_path):
    found = read_images(make_folder(tmp_path, values=(0, 7, 200)))
    assert found.values == (0, 7, 200)
    assert [pair.name for pair in found.train] == ["0.png", "1.png", "2.png", "3.png"]
    assert found.train[0].image.shape == (1, 61, 47)
    raw = np.asarray(Image.open(tmp_path / "train/outputs/0.png"))
    assert np.array_equal(np.asarray(found.values)[found.train[0].mask], raw)
    assert np.array_equal(found.train[0].image[0], np.asarray(Image.open(tmp_path / "train/inputs/0.png")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_all_kinds_of_png(tmp_path, mode):
    make_folder(tmp_path)
    grey = np.asarray(Image.open(tmp_path / "train/inputs/0.png"))
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "train/inputs/0.png")
    found = read_images(tmp_path)
    assert found.num_channels == (3 if mode in ("P", "RGB", "RGBA") else 1)
    if mode != "1":
        assert np.abs(found.train[0].image[0] - grey).max() <= 3
    assert {len(pair.image) for pair in (*found.train, *found.test)} == {found.num_channels}


def test_masks_of_a_palette_or_grey_as_colour(tmp_path):
    make_folder(tmp_path)
    path = tmp_path / "train/outputs/0.png"
    mask = np.asarray(Image.open(path))
    Image.fromarray(np.stack([mask] * 3, -1)).save(path)
    assert read_images(tmp_path).values == (0, 255)
    palette = Image.fromarray((mask > 0).astype(np.uint8) * 255, "L").convert("1")
    palette.save(path)
    assert read_images(tmp_path).values == (0, 255)


def spoil_nothing_there(folder: Path) -> None:
    (folder / "test").rename(folder / "validation")


def spoil_unmatched(folder: Path) -> None:
    (folder / "train/outputs/2.png").unlink()


def spoil_extra_mask(folder: Path) -> None:
    (folder / "test/inputs/1.png").unlink()


def spoil_size(folder: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "train/outputs/1.png")


def spoil_cut(folder: Path) -> None:
    path = folder / "train/inputs/3.png"
    path.write_bytes(path.read_bytes()[:400])


def spoil_other_format(folder: Path) -> None:
    Image.fromarray(np.zeros((61, 47), np.uint8)).save(folder / "train/inputs/0.png", format="BMP")


def spoil_soft(folder: Path) -> None:
    path = folder / "train/outputs/0.png"
    Image.fromarray(np.arange(61 * 47, dtype=np.uint16).reshape(61, 47).astype(np.uint8)).save(path)


def spoil_one_value(folder: Path) -> None:
    for path in folder.glob("*/outputs/*.png"):
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)


def spoil_coloured(folder: Path) -> None:
    path = folder / "train/outputs/0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (61, 47, 3)).astype(np.uint8)).save(path)


def spoil_empty(folder: Path) -> None:
    for path in folder.glob("test/*/*.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (spoil_nothing_there, UsageError, "test/inputs is no folder"),
        (spoil_unmatched, UsageError, "2.png is in inputs and not in outputs"),
        (spoil_extra_mask, UsageError, "1.png is in outputs and not in inputs"),
        (spoil_size, ImageError, "9×9, its image 53×40"),
        (spoil_cut, ImageError, "3.png cannot be read"),
        (spoil_other_format, ImageError, "0.png cannot be read"),
        (spoil_soft, ImageError, "hold 256 values"),
        (spoil_one_value, ImageError, "are all of one value"),
        (spoil_coloured, ImageError, "is coloured"),
        (spoil_empty, UsageError, "holds no PNG"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, spoil, error, words):
    make_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=words) as raised:
        read_images(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_huge_image_is_refused(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="cannot be read"):
        read_images(tmp_path)


def test_figures_are_sklearns():
    rng = np.random.default_rng(0)
    true, called = rng.integers(0, 3, 500), rng.integers(0, 3, 500)
    confusion = np.bincount(true * 3 + called, minlength=9).reshape(3, 3)
    figures = confusion_figures(confusion)
    assert figures["pixel_accuracy"] == pytest.approx(accuracy_score(true, called))
    assert figures["mean_iou"] == pytest.approx(jaccard_score(true, called, average="macro"))


def test_decisions_are_hard():
    one = torch.tensor([[[[-1.0, 0.0, 2.0]]]])
    assert decide(one).tolist() == [[[0, 0 + 1, 1]]]
    several = torch.tensor([[[[1.0, 0.0]], [[0.0, 3.0]], [[0.5, 5.0]]]])
    assert decide(several).tolist() == [[[0, 2]]]


def test_images_smaller_than_the_window_are_continued():
    rng = np.random.default_rng(0)
    pairs = [
        ImagePair("a", rng.random((1, h, w), np.float32), np.ones((h, w), np.uint8)) for h, w in ((9, 80), (70, 5))
    ]
    seen = []

    def model(images):
        seen.append(images)
        return images[:, :1]

    task = SegmentImages(2, IMAGES_AUGMENTATION, 32, lambda logits, target: logits.mean(), pairs)
    task.train_loss(model, ImageBatch(pairs, np.arange(2)), torch.Generator().manual_seed(0))
    assert seen[0].shape == (2, 1, 32, 32)
    assert seen[0].isfinite().all()


def test_two_classes_are_learnt_and_drawn(tmp_path):
    folder = make_folder(tmp_path / "discs", colour=True)
    run = run_on(folder, tmp_path / "run", samples=4)
    lines = read_metrics(run)
    assert [line["part"] for line in lines] == ["train", "val"] * 2
    assert all(0 <= line["pixel_accuracy"] <= 1 for line in lines)
    assert len(list((run / "predictions").glob("*.png"))) == 2
    assert (run / "curves.png").exists()
    model, facts = load_segmenter(run)
    assert (facts["kind"], facts["context"], facts["num_classes"]) == ("images", 3, 1)
    assert model(torch.zeros(1, 3, 13, 17)).shape == (1, 1, 13, 17)


def test_several_classes_are_learnt(tmp_path):
    run = run_on(make_folder(tmp_path / "discs", values=(0, 1, 2)), tmp_path / "run", samples=4, epochs=1)
    assert load_segmenter(run)[1]["num_classes"] == 3
    trainer, _ = resume_training(TrainOptions(tmp_path / "discs", run, "cpu"))
    assert trainer.progress.epoch == 1


def test_the_command_learns_a_folder_and_goes_on(tmp_path, monkeypatch):
    make_folder(tmp_path / "discs")
    monkeypatch.chdir(tmp_path)

    def call(*args):
        return CliRunner().invoke(cli, ["seg", *args])

    small = ["--epochs", "1", "--samples", "4", "--batch-size", "2", "--side", "16", "--device", "cpu", "--amp", "off"]
    done = call("--images", "discs", *small, "--json")
    assert done.exit_code == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["pixel_accuracy"] <= 1
    done = call("--resume")
    assert done.exit_code == 0, done.stderr
    assert "best epoch 1 of 1: pixel_accuracy" in done.stdout
    for args, words in ((["--images", "nowhere"], "is no folder"), (["--images", "a", "--store", "b"], "choose one")):
        done = call(*args)
        assert done.exit_code == 2
        assert words in done.stderr
