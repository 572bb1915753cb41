"""Several processes that train one model together: `torchrun -m lunatrain cls …`. The home of torch.distributed.

torchrun starts the processes and says in the environment who is who; DistributedDataParallel averages the gradients.
What is here makes the rest agree: batch statistics, sums, stops, names.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lunatrain.errors import UsageError

RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
"""What torchrun sets."""


@dataclass(frozen=True)
class Processes:
    """Who trains: this process is number `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes, which give the same names."""
        if self.is_alone:
            return dict(values)
        names = sorted(values)
        total = _summed(np.array([values[name] for name in names]))
        return dict(zip(names, total.tolist(), strict=True))

    def any(self, is_so: bool) -> bool:
        """Whether it is so in any process."""
        return is_so if self.is_alone else bool(_summed(np.array([float(is_so)]))[0])

    def share(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows for this process out of some; `join` puts together what came of them."""
        return rows[self.rank :: self.world_size]

    def join(self, values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
        """One value for each of `count` rows, from the shares of all processes."""
        if self.is_alone:
            return values
        whole = np.zeros(count)
        whole[self.rank :: self.world_size] = values
        return _summed(whole)

    def of_first(self, value: float) -> float:
        """The first process's number, in all processes: what they decide by must not differ in its last bit."""
        return self.sum({"value": value if self.is_first else 0.0})["value"]

    def agree(self, text: str) -> str:
        """The first process's text, in all processes."""
        if self.is_alone:
            return text
        said = [text]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if not self.is_alone:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as each process calls it in training: gradients are averaged over the processes."""
        if self.is_alone:
            return model
        ids = [self.local_rank] if next(model.parameters()).is_cuda else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def share_statistics(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Let batch norm see the batch of all processes: on CUDA torch's own way, elsewhere `GlobalBatchNorm`."""
        if self.is_alone:
            return model
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call,no-any-return]
        return _with_global_batch_norm(model)


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes; torch's own `SyncBatchNorm` is for CUDA alone."""

    def _check_input_dim(self, input: torch.Tensor) -> None: ...

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, channels, ...) to the same, normalized; keeps running statistics as torch's batch norm does."""
        if not self.training or self.running_mean is None or self.running_var is None or not self.affine:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        sides = (1, -1, *[1] * (input.ndim - 2))
        count = torch.tensor([input.numel() / input.shape[1]])
        sums = _all_reduce(torch.cat([input.sum(axes), count]))
        count, mean = sums[-1], (sums[:-1] / sums[-1])
        centred = input - mean.view(sides)
        variance = _all_reduce(centred.square().sum(axes)) / count
        with torch.no_grad():
            momentum = self.momentum or 0.1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centred * scale.view(sides) + self.bias.view(sides)


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the other processes, where torchrun has started some.

    Parameters
    ----------
    device : str
        What --device says; on CUDA each process takes the GPU of its local number.

    Raises
    ------
    UsageError
        One --device for all processes, or fewer GPUs than processes.
    """
    said = [os.environ.get(name) for name in (RANK, WORLD_SIZE, LOCAL_RANK)]
    rank, world_size, local_rank = (int(number or 0) for number in said)
    if None in said or world_size == 1:  # SLURM exports some of them for jobs of its own
        yield Processes()
        return
    processes = Processes(rank, world_size, local_rank)
    if device not in ("auto", "cpu", "cuda"):
        message = f"--device {device}: each of {world_size} processes takes a GPU of its own. Use auto, cuda or cpu"
        raise UsageError(message)
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        if processes.local_rank >= torch.cuda.device_count():
            message = (
                f"process {processes.local_rank} of this machine finds {torch.cuda.device_count()} GPUs. "
                "Start as many processes as there are GPUs (torchrun --nproc-per-node gpu)"
            )
            raise UsageError(message)
        torch.cuda.set_device(processes.local_rank)
    # gloo beside NCCL carries what lies on the CPU: sums, stops, names
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def _summed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    tensor = torch.from_numpy(values.astype(np.float64))
    dist.all_reduce(tensor)
    return tensor.numpy()


def _all_reduce(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes that gradients flow back through."""
    summed: torch.Tensor = all_reduce(values)  # type: ignore[no-untyped-call]
    return summed


def _with_global_batch_norm(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            other = GlobalBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            other.load_state_dict(child.state_dict())
            setattr(model, name, other)
        else:
            _with_global_batch_norm(child)
    return model
