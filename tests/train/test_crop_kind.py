"""A classifier is judged by crops of the kind it has learnt from."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lunatrain.crop_kind import CropKind, check_fits, kind_of_model, kind_of_store
from lunatrain.errors import CheckpointError


def store(hu=(-1000, 1000), spacing=None, edge="shift"):
    return SimpleNamespace(crop_shape=(8, 8, 8), parameters={"hu": list(hu), "edge": edge}, crop_spacing=spacing)


@pytest.mark.parametrize(
    "kind", [CropKind((8, 8, 8)), CropKind((8, 9, 10), (-900, 400), "pad", (1.25, 0.7, 0.7))], ids=["plain", "own"]
)
def test_a_checkpoint_brings_it_back(kind):
    assert kind_of_model({"crop_shape": list(kind.shape), "crops": kind.to_json()}) == kind


def test_an_older_checkpoint_is_taken_for_one_of_the_default():
    assert kind_of_model({"crop_shape": [8, 9, 10]}) == CropKind((8, 9, 10))
    check_fits(Path("best.pt"), {"crop_shape": [8, 8, 8]}, store(spacing=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            store(spacing=(1.0, 1.0, 1.0)),
            "of their scan's spacing, HU -1000 to 1000; the store's are resampled to 1 x 1 x",
        ),
        (store(hu=(-1000, 400)), "the store's are of their scan's spacing, HU -1000 to 400"),
    ],
)
def test_a_store_of_another_kind_is_refused(other, words):
    args = {"crop_shape": [8, 8, 8], "crops": kind_of_store(store()).to_json()}
    check_fits(Path("best.pt"), args, store(edge="pad"))
    with pytest.raises(CheckpointError, match="Take another store") as caught:
        check_fits(Path("best.pt"), args, other)
    assert words in str(caught.value)
