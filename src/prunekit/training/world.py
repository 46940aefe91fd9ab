"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from prunekit.errors import InputError, TrainingError

# The name of the switch depends on the version of torch.
_SWITCHES = inspect.signature(DistributedDataParallel).parameters
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _SWITCHES else "broadcast_buffers": False
}


@dataclass(frozen=True)
class World:
    """This process among the `size` that train together; rank 0 alone writes and reports."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True where this process writes and reports."""
        return self.rank == 0

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum of `values` over the processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating-point tensors by their means over the processes, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            if tensor.is_floating_point():
                dist.all_reduce(tensor, dist.ReduceOp.SUM)
                tensor.div_(self.size)

    def wait(self) -> None:
        """Return once every process is here."""
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """Return the model wrapped so that its gradients are averaged over the processes.

        Batch norms normalise by the images of their own process (`synced_norm` offers the other way). Their running
        statistics are not broadcast at every step: being linear in the batches' statistics, they can be averaged
        whenever they are needed.
        """
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, **_NO_BROADCAST)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, operation)
        return values


def join(device: str) -> World:
    """Join the processes that the environment describes: torchrun sets RANK, LOCAL_RANK and WORLD_SIZE.

    This happens once per process: a second group of the same processes would read the addresses that the first left in
    torchrun's store, and wait for them forever.
    """
    chosen = _device(device)
    running = dist.is_available() and dist.is_initialized()
    if not running and process_count() == 1:
        return World(0, 1, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not running:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Return whether this process of a torchrun is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Return the number of processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    if name == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise TrainingError(f"process {local} has no GPU: there are {torch.cuda.device_count()}")
        return torch.device("cuda", local)
    return device
