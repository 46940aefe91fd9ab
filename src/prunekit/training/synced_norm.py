"""Synchronised batch norms, which normalise by the images of all processes, on any device.

PyTorch's own `SyncBatchNorm` runs on GPUs alone, and its modules would have to be exchanged back after training; here
each batch norm stays what it is, and its `forward` is replaced for the duration of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def synchronised(model: nn.Module) -> Iterator[None]:
    """Let batch norms of `model` in training mode take their statistics over all processes inside."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.forward = partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Normalise by the mean and variance of `x`, `(N, C, ...)`, over the batches of all processes."""
    if not norm.training:
        return type(norm).forward(norm, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over = [d for d in range(x.dim()) if d != 1]
    count = _total(wide.new_tensor([x.numel() / x.size(1)]))
    shape = [1, -1, *[1] * (x.dim() - 2)]
    mean = _total(wide.sum(over)) / count
    centred = wide - mean.view(shape)
    variance = _total(centred.square().sum(over)) / count
    _remember(norm, mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
    y = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


class _Sum(torch.autograd.Function):
    """Sum over the processes. The loss of each depends on every term, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _total(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total


@torch.no_grad()
def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics towards those of the batch; the variance is the unbiased one."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
