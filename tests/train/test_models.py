"""The networks: shapes, the book's names, and its state files, among them some that should not be trusted."""

import copy
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lunatrain.errors import UsageError
from lunatrain.models import MODELS, build_model, load_book_state, prepare_for

# ../shared/notes/book_states.md: the classifier's published file
BOOK_SHAPES = {
    "tail_batchnorm.weight": (1,),
    "tail_batchnorm.bias": (1,),
    "tail_batchnorm.running_mean": (1,),
    "tail_batchnorm.running_var": (1,),
    "head_linear.weight": (2, 1152),
    "head_linear.bias": (2,),
}
for block, (before, after) in enumerate([(1, 8), (8, 16), (16, 32), (32, 64)], start=1):
    BOOK_SHAPES[f"block{block}.conv1.weight"] = (after, before, 3, 3, 3)
    BOOK_SHAPES[f"block{block}.conv1.bias"] = (after,)
    BOOK_SHAPES[f"block{block}.conv2.weight"] = (after, after, 3, 3, 3)
    BOOK_SHAPES[f"block{block}.conv2.bias"] = (after,)

UNET_SHAPES = {
    "input_batchnorm.weight": (7,),
    "input_batchnorm.bias": (7,),
    "unet.down_path.0.block.0.weight": (16, 7, 3, 3),
    "unet.last.weight": (1, 16, 1, 1),
    "unet.last.bias": (1,),
}
BOTH = pytest.mark.parametrize("name", MODELS)


def some_crops(num: int = 3, shape: tuple[int, int, int] = (32, 48, 48)) -> torch.Tensor:
    return torch.rand(num, 1, *shape, generator=torch.Generator().manual_seed(1)) * 2000 - 1000


def some_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return OrderedDict((name, torch.rand(shape, generator=generator) * 0.1) for name, shape in shapes.items())


def save_as_the_book(path: Path, state: Any, **more: Any) -> Path:
    momenta = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.001, "params": [0]}]}
    saved = {"model_state": state, "model_name": "LunaModel", "optimizer_name": "SGD", "optimizer_state": momenta}
    saved |= {"epoch": 90, "totalTrainingSamples_count": 4500000, **more}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    return path


@BOTH
def test_hu_go_in_and_logits_come_out(name: str) -> None:
    for num_classes, shape in ((2, (32, 48, 48)), (1, (16, 16, 16)), (3, (33, 49, 70))):
        model = build_model(name, num_classes, shape).eval()
        logits = model(some_crops(2, shape))
        assert logits.shape == (2, num_classes)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()


@BOTH
def test_every_parameter_learns_and_crops_stay_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    for layer in model.modules():  # blocks that begin as their shortcut hold back the gradient once
        if isinstance(layer, nn.BatchNorm3d):
            nn.init.ones_(layer.weight)
    crops = some_crops(4)
    before = crops.clone()
    nn.functional.cross_entropy(model(crops), torch.tensor([0, 1, 0, 1])).backward()
    assert torch.equal(crops, before)
    assert all(parameter.grad is not None for parameter in model.parameters())
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not still


@BOTH
def test_a_sample_does_not_depend_on_its_batch_when_evaluated(name: str) -> None:
    model = build_model(name).eval()
    crops = some_crops(3)
    torch.testing.assert_close(model(crops)[1:2], model(crops[1:2]), atol=1e-4, rtol=1e-4)


@BOTH
def test_the_fast_memory_format_gives_the_same_to_rounding(name: str) -> None:
    torch.manual_seed(0)
    plain = build_model(name)
    fast = build_model(name)
    fast.load_state_dict(plain.state_dict())
    fast = prepare_for("cpu", fast)
    crops, labels = some_crops(4), torch.tensor([0, 1, 0, 1])
    losses = []
    for model in (plain, fast):
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        loss = nn.functional.cross_entropy(model(crops), labels)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        scale = float(one.grad.abs().max()) + 1e-6
        torch.testing.assert_close(one.grad / scale, other.grad / scale, rtol=0, atol=2e-3)


@BOTH
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    torch.manual_seed(7)
    one = build_model(name)
    torch.manual_seed(7)
    other = build_model(name)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_sizes() -> None:
    counts = {name: sum(p.numel() for p in build_model(name).parameters()) for name in MODELS}
    assert counts["luna"] == 222_220
    assert counts["residual"] <= 1_000_000


def test_luna_has_the_books_names_and_shapes() -> None:
    state = build_model("luna").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert shapes == BOOK_SHAPES


@pytest.mark.parametrize("is_training", [True, False])
def test_luna_is_its_layers_one_after_the_other(is_training: bool) -> None:
    torch.manual_seed(0)
    model = build_model("luna", 2, (16, 32, 16)).double().train(is_training)
    nn.init.constant_(model.tail_batchnorm.weight, 0.7)
    nn.init.constant_(model.tail_batchnorm.bias, -0.4)
    plain = copy.deepcopy(model)
    crops, labels = some_crops(9, (16, 32, 16)).double(), torch.arange(9) % 2
    features = plain.tail_batchnorm(crops)
    for block in (plain.block1, plain.block2, plain.block3, plain.block4):
        features = nn.functional.max_pool3d(block.conv2(block.conv1(features).relu()).relu(), 2)
    logits = plain.head_linear(features.flatten(1))
    found = model(crops)
    torch.testing.assert_close(found, logits)
    for value in (found, logits):
        nn.functional.cross_entropy(value, labels).backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_luna_starts_as_the_book_does() -> None:
    torch.manual_seed(0)
    model = build_model("luna")
    weight = model.block4.conv2.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (64 * 27)) ** 0.5, rel=0.03)
    bound = (64 * 27) ** -0.5
    bias = torch.cat([build_model("luna").block4.conv2.bias.detach() for _ in range(40)])
    assert float(bias.mean()) == pytest.approx(-bound, rel=0.1)
    assert float(bias.std()) == pytest.approx(bound, rel=0.1)


@BOTH
def test_a_crop_too_small_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="each side must be 16 or more, got 8×48×48"):
        build_model(name, 2, (8, 48, 48))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="model must be one of luna, residual, got 'resnet'"):
        build_model("resnet")
    with pytest.raises(UsageError, match="1 class or more, got 0"):
        build_model("luna", 0)


@pytest.mark.parametrize("counted", [False, True])
def test_the_books_state_is_loaded(tmp_path: Path, counted: bool) -> None:
    state = some_state(BOOK_SHAPES)
    if counted:
        state["tail_batchnorm.num_batches_tracked"] = torch.tensor(123)
    path = save_as_the_book(tmp_path / "cls.best.state", state)
    model = prepare_for("cpu", build_model("luna"))
    load_book_state(path, model)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in BOOK_SHAPES)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = save_as_the_book(tmp_path / "bad.state", some_state(BOOK_SHAPES), sys_argv=Bomb(target))
    plain = tmp_path / "plain.state"
    plain.write_bytes(pickle.dumps({"model_state": Bomb(target)}))
    for file in (path, plain):
        refused(file, build_model("luna"), "not a file of weights only, so it was not loaded")
    assert not target.exists()


def refused(path: Path, model: nn.Module, said: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=said) as caught:
        load_book_state(path, model)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    state = some_state(BOOK_SHAPES)
    path = tmp_path / "some.state"
    luna = build_model("luna")

    save_as_the_book(path, some_state(UNET_SHAPES), model_name="UNetWrapper")
    refused(path, luna, r"is a segmentation state \(the book's U-Net\), this model is a classifier")

    save_as_the_book(path, {name: state[name] for name in BOOK_SHAPES if name != "head_linear.bias"})
    refused(path, luna, "lacks head_linear.bias: the weights of another model")

    save_as_the_book(path, state | {"extra.weight": torch.zeros(1)})
    refused(path, luna, "has extra.weight too much")

    save_as_the_book(path, state)
    refused(path, build_model("residual"), "lacks .* and [0-9]+ more and has block1.conv1.bias")
    refused(path, build_model("luna", 3), r"head_linear.weight is \(2, 1152\), this model's is \(3, 1152\)")

    save_as_the_book(path, state | {"head_linear.bias": torch.tensor([0.0, float("nan")])})
    refused(path, luna, "head_linear.bias holds torch.float32 values that are not all finite")
    save_as_the_book(path, state | {"head_linear.bias": torch.zeros(2, dtype=torch.int64)})
    refused(path, luna, "head_linear.bias holds torch.int64 values")


def test_what_is_no_state_file_is_refused(tmp_path: Path) -> None:
    luna = build_model("luna")
    path = tmp_path / "some.state"
    refused(path, luna, "cannot be read: No such file or directory")
    refused(tmp_path, luna, "cannot be read|not a file of weights only")

    whole = save_as_the_book(path, some_state(BOOK_SHAPES)).read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:100], b"PK\x03\x04" + bytes(50)):
        path.write_bytes(content)
        refused(path, luna, "not a file of weights only, so it was not loaded")

    torch.save([1, 2], path)
    refused(path, luna, r"holds no model_state \(list\)")
    torch.save({"weights": 1}, path)
    refused(path, luna, r"holds no model_state \(weights\)")
    save_as_the_book(path, {"tail_batchnorm.weight": 3})
    refused(path, luna, "model_state is not a table of names and tensors")
