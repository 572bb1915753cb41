"""Processes that train together do what one process does with the same global batch."""

import multiprocessing
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from lunatrain.cli import cli
from lunatrain.distributed import GlobalBatchNorm, Processes
from lunatrain.log import read_metrics

from ..conftest import typed

TRAIN = ["-m", "lunatrain", "cls", "--model", "luna", "--augment", "", "--epochs", "2", "--samples", "30",
         "--batch-size", "8", "--lr", "0.001", "--device", "cpu"]  # fmt: skip


def run(launcher, store, out, *more):
    command = [sys.executable, *launcher, *TRAIN, "--store", str(store), "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


TOGETHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


RANK = "import os, sys; os.environ.update({}); sys.argv[1:] = {}; from lunatrain.cli import main; main()"


def start_ranks(number, *args):
    """What torchrun starts, as forks of a process that has imported torch once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(["lunatrain.training", "lunatrain.cli", "lunatrain.log"])
    ranks = []
    for rank in range(number):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code = RANK.format({name: str(value) for name, value in env.items()}, list(map(str, args)))
        ranks.append(warm.Process(target=exec, args=(code,)))
        ranks[-1].start()
    return ranks


def kill_after_first_epoch(store, out):
    """Two processes, both killed when the first checkpoint is there."""
    ranks = start_ranks(2, *TRAIN[2:], "--store", store, "--out", out)
    while all(rank.is_alive() for rank in ranks) and not (out / "last.pt").exists():
        time.sleep(0.005)
    for rank in ranks:
        rank.kill()
        rank.join()


@pytest.fixture(scope="module")
def two(small_store, tmp_path_factory):
    """A run of two processes, and what it printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, run(TOGETHER, small_store, out)


def test_two_processes_train_as_one(two, small_store, tmp_path):
    out, done = two
    assert done.stdout.count("best epoch") == 1  # the first process alone prints
    alone = typed(cli, [*TRAIN[2:], "--store", small_store, "--out", "one"], tmp_path)
    assert alone.returncode == 0, alone.stderr
    one, both = (read_metrics(path) for path in (tmp_path / "one", out))
    assert len(one) == len(both) == 4
    for line, other in zip(one, both, strict=True):
        assert other["samples"] == line["samples"]
        assert other["loss" if line["part"] == "train" else "auc"] == pytest.approx(
            line["loss" if line["part"] == "train" else "auc"], rel=1e-4
        )
    weights = [torch.load(path / "last.pt", weights_only=True)["model"] for path in (tmp_path / "one", out)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("processes", [2, 1])
def test_a_run_of_two_that_is_killed_goes_on(two, small_store, tmp_path, processes):
    kill_after_first_epoch(small_store, tmp_path / "killed")
    had = read_metrics(tmp_path / "killed")
    assert had[-1]["epoch"] == 0
    ranks = start_ranks(processes, "cls", "--resume", "--device", "cpu", "--out", tmp_path / "killed")
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * processes
    exact = 0 if processes == 2 else 1e-4
    for line, other in zip(read_metrics(tmp_path / "killed"), read_metrics(two[0]), strict=True):
        assert (line["epoch"], line["part"], line["samples"]) == (other["epoch"], other["part"], other["samples"])
        figure = "loss" if line["part"] == "train" else "auc"
        assert line[figure] == pytest.approx(other[figure], rel=exact, abs=0)


def test_global_batch_norm_of_one_process_is_batch_norm(monkeypatch):
    monkeypatch.setattr("lunatrain.distributed._all_reduce", lambda values: values)
    torch.manual_seed(0)
    plain = nn.BatchNorm3d(3).double()
    ours = GlobalBatchNorm(3).double()
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.uniform_(-1, 1)
    ours.load_state_dict(plain.state_dict())
    given = torch.randn(4, 3, 2, 3, 5, dtype=torch.float64) * 300 - 700
    for training in (True, True, False):
        plain.train(training)
        ours.train(training)
        inputs = [given.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(x) for layer, x in zip((plain, ours), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output in outputs:
            output.pow(3).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_one_process_needs_no_group():
    alone = Processes()
    assert alone.sum({"a": 1.0}) == {"a": 1.0}
    assert alone.any(True)
    assert not alone.any(False)
    assert alone.agree("x") == "x"
    alone.wait()
