"""The U-Net: the book's names, shapes and numbers, its state file, and images of any size."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from lunatrain.errors import UsageError
from lunatrain.models import build_model, load_book_state
from lunatrain.models.unet import SEGMENTERS, UNet, build_segmenter

NORM = ("weight", "bias", "running_mean", "running_var")


def book_shapes():
    """../shared/notes/book_states.md: the U-Net's published file."""
    shapes = {f"input_batchnorm.{name}": (7,) for name in NORM}

    def block(prefix, before, after):
        for place, shape in ((0, (after, before, 3, 3)), (3, (after, after, 3, 3))):
            shapes[f"{prefix}.block.{place}.weight"] = shape
            shapes[f"{prefix}.block.{place}.bias"] = (after,)
            for name in NORM:
                shapes[f"{prefix}.block.{place + 2}.{name}"] = (after,)

    for level, (before, after) in enumerate([(7, 16), (16, 32), (32, 64)]):
        block(f"unet.down_path.{level}", before, after)
    for level, (before, after) in enumerate([(64, 32), (32, 16)]):
        shapes[f"unet.up_path.{level}.up.weight"] = (before, after, 2, 2)
        shapes[f"unet.up_path.{level}.up.bias"] = (after,)
        block(f"unet.up_path.{level}.conv_block", before, after)
    shapes["unet.last.weight"] = (1, 16, 1, 1)
    shapes["unet.last.bias"] = (1,)
    return shapes


def some_state():
    generator = torch.Generator().manual_seed(3)
    return OrderedDict((name, torch.rand(shape, generator=generator) * 0.2) for name, shape in book_shapes().items())


def save_as_the_book(path: Path, state, **more) -> Path:
    saved = {"sys_argv": ["train"], "time": "2020-01-26", "model_state": state, "model_name": "UNetWrapper", **more}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    return path


def plain_unet(state, hu):
    """The book's network written out, layer by layer, as functions."""

    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * weight[:, None, None] + bias[
            :, None, None
        ]

    def block(x, name):
        for place in (0, 3):
            weight, bias = state[f"{name}.block.{place}.weight"], state[f"{name}.block.{place}.bias"]
            x = norm(functional.conv2d(x, weight, bias, padding=1).clamp(min=0), f"{name}.block.{place + 2}")
        return x

    def up(x, bridge, name):
        x = functional.conv_transpose2d(x, state[f"{name}.up.weight"], state[f"{name}.up.bias"], stride=2)
        return block(torch.cat([x, bridge], 1), f"{name}.conv_block")

    first = block(norm(hu, "input_batchnorm"), "unet.down_path.0")
    second = block(functional.avg_pool2d(first, 2), "unet.down_path.1")
    third = block(functional.avg_pool2d(second, 2), "unet.down_path.2")
    found = up(up(third, second, "unet.up_path.0"), first, "unet.up_path.1")
    return functional.conv2d(found, state["unet.last.weight"], state["unet.last.bias"])


def test_names_and_shapes_are_the_books():
    own = {name: tuple(t.shape) for name, t in UNet().state_dict().items() if "num_batches" not in name}
    assert own == book_shapes()
    assert sum(parameter.numel() for parameter in UNet().parameters()) == 118_271


def test_a_state_file_of_the_book_gives_the_books_logits(tmp_path):
    state = some_state()
    model = UNet().eval()
    load_book_state(save_as_the_book(tmp_path / "seg.state", state), model)
    hu = torch.rand(2, 7, 16, 24, generator=torch.Generator().manual_seed(1)) * 2
    with torch.no_grad():
        expected = plain_unet(state, hu)
        torch.testing.assert_close(model(hu), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("model", "state", "words"),
    [
        (UNet(), {"block1.conv1.bias": torch.zeros(8), "head_linear.bias": torch.zeros(2)}, "classification state"),
        (build_model("luna"), some_state(), "segmentation state"),
        (UNet(), {"conv.weight": torch.zeros(3)}, "another model"),
        (UNet(in_channels=3), some_state(), "input_batchnorm.weight is \\(7,\\)"),
        (UNet(), {**some_state(), "unet.last.bias": torch.full((1,), torch.nan)}, "not all finite"),
    ],
)  # fmt: skip
def test_wrong_states_are_named(tmp_path, model, state, words):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=words):
        load_book_state(save_as_the_book(tmp_path / "x.state", state), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize(("channels", "classes", "shape"), [(7, 1, (64, 64)), (1, 1, (17, 30)), (3, 5, (5, 7))])
def test_any_rows_and_columns(name, channels, classes, shape):
    model = build_segmenter(name, channels, classes).eval()
    logits = model(torch.rand(2, channels, *shape) * 2000 - 1000)
    assert logits.shape == (2, classes, *shape)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", SEGMENTERS)
def test_what_lies_beyond_the_reach_changes_nothing(name):
    torch.manual_seed(0)
    model = build_segmenter(name).double().eval()
    side = 4 * (model.reach // 2 + 2)
    side += -side % model.multiple
    one = torch.rand(1, 7, side, 8, dtype=torch.float64)
    other = one.clone()
    other[:, :, model.reach + 1 :] += 1
    assert torch.equal(model(one)[:, :, 0], model(other)[:, :, 0])
    assert not torch.equal(model(one)[:, :, model.reach], model(other)[:, :, model.reach])


@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    model = build_segmenter(name)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(layer.weight)
    model(torch.rand(2, 7, 32, 32)).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]


@pytest.mark.parametrize("wrong", [{"in_channels": 0}, {"num_classes": 0}, {"depth": 0}, {"width_log2": -1}])
def test_a_network_of_nothing_is_refused(wrong):
    with pytest.raises(UsageError, match="U-Net needs"):
        UNet(**wrong)


def test_a_fresh_network_begins_with_the_prior():
    torch.manual_seed(0)
    model = UNet()
    model.begin_with(0.02)
    assert torch.sigmoid(model.unet.last.bias).tolist() == pytest.approx([0.02])


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match="model must be one of unet"):
        build_segmenter("vnet")
