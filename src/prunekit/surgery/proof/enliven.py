"""A livelier copy of a network whose outputs hardly follow its inputs, such as one at its first initialisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prunekit.surgery.copying import copied
from prunekit.surgery.execution.hooks import hooked


def enliven(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Return a copy whose outputs follow its inputs, whatever state the weights of `model` are in.

    Weights that are all zero get random values, and batch norms the statistics of what they see, so that the signal
    neither dies nor drowns in biases on its way.
    """
    lively = copied(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lively.named_parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values / max(parameter.shape[1:].numel(), 1) ** 0.5)
        elif name.endswith("bias"):
            parameter.mul_(0.1)
    norms = [m for m in lively.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    with hooked(norm.train().register_forward_pre_hook(_take_statistics) for norm in norms):
        lively(*inputs)
    return lively.eval()


def _take_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Set a batch norm's running statistics to those of its input, and let it use them."""
    x = args[0]
    over = [d for d in range(x.dim()) if d != 1]
    norm.running_mean.copy_(x.mean(over))  # type: ignore[operator]
    norm.running_var.copy_(x.var(over, unbiased=False).clamp_min(1e-12))  # type: ignore[operator]
    norm.eval()
