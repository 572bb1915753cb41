"""A checkpoint is whole or absent, every changed bit is found, and nothing in it runs."""

import os
import pickle
import random

import pytest
import torch

from lunatrain.checkpoint import BEST, LAST, load_checkpoint, load_newest, save_checkpoint
from lunatrain.errors import CheckpointError


@pytest.fixture
def state():
    return {
        "model": {"w": torch.arange(6.0).reshape(2, 3)},
        "progress": {"epoch": 2, "sums": {"loss": 0.5}},
        "none": None,
    }


def test_what_is_saved_comes_back(tmp_path, state):
    save_checkpoint(tmp_path / LAST, state)
    loaded = load_checkpoint(tmp_path / LAST).state
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert (loaded["progress"], loaded["none"]) == (state["progress"], None)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


def test_plain_torch_load_opens_it(tmp_path, state):
    save_checkpoint(tmp_path / LAST, state)
    assert torch.load(tmp_path / LAST, weights_only=True)["progress"]["epoch"] == 2


def test_every_flipped_bit_is_found(tmp_path, state):
    save_checkpoint(tmp_path / LAST, state)
    good = (tmp_path / LAST).read_bytes()
    draw = random.Random(0)
    for _ in range(250):
        spoiled = bytearray(good)
        spoiled[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        (tmp_path / "x.pt").write_bytes(spoiled)
        with pytest.raises(CheckpointError) as info:
            load_checkpoint(tmp_path / "x.pt")
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("size", [0, 1, 66, 67, 500, -1, -64, -66, -1000])
def test_a_cut_file_is_found(tmp_path, state, size):
    save_checkpoint(tmp_path / LAST, state)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:size])
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path / LAST)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"x": Bomb()}, tmp_path / "b.pt")
    save_checkpoint(tmp_path / "c.pt", {**state, "x": Bomb()})  # even with a right checksum
    for name in ("a.pt", "b.pt", "c.pt"):
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_last_falls_back_to_best(tmp_path, state):
    save_checkpoint(tmp_path / BEST, state)
    save_checkpoint(tmp_path / LAST, {**state, "progress": {"epoch": 3}})
    assert load_newest(tmp_path).path.name == LAST
    (tmp_path / LAST).write_bytes(b"rubbish")
    assert load_newest(tmp_path).path.name == BEST
    (tmp_path / BEST).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError):
        load_newest(tmp_path)
    assert load_newest(tmp_path / "empty") is None


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, state):
    save_checkpoint(tmp_path / LAST, state)
    before = (tmp_path / LAST).read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / LAST, {**state, "progress": {"epoch": 9}})
    assert (tmp_path / LAST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
