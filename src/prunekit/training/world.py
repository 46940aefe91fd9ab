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

from prunekit.devices import chosen, process_group_for

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
            dist.barrier(device_ids=None if self._on_host else [self.device.index])

    def wrapped(self, model: nn.Module) -> nn.Module:
        """Return the model wrapped so that its gradients are averaged over the processes.

        Batch norms normalise by the images of their own process (`synced_norm` offers the other way). Their running
        statistics are not broadcast at every step: being linear in the batches' statistics, they can be averaged
        whenever they are needed.
        """
        if self.size == 1:
            return model
        devices = None if self._on_host else [self.device.index]
        return DistributedDataParallel(model, device_ids=devices, **_NO_BROADCAST)

    @property
    def _on_host(self) -> bool:
        return process_group_for(self.device) == "gloo"

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
    own = chosen(device)
    running = dist.is_available() and dist.is_initialized()
    if not running and process_count() == 1:
        return World(0, 1, own)
    if own.type != "cpu":
        torch.accelerator.set_device_index(own)
    if not running:
        dist.init_process_group(process_group_for(own))
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size(), own)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Return whether this process of a torchrun is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Return the number of processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
