"""Activations as restoration knows them: the function, and which of its inputs it cannot tell from one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.surgery.graph.recording import Node


@dataclass(frozen=True)
class Activation:
    """An element-wise function of values `(C, n)`; all inputs up to `low` give the same, and all from `high` on."""

    function: Callable[[Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf

    @property
    def hides(self) -> bool:
        """True if some inputs look alike to it."""
        return self.low > -math.inf or self.high < math.inf


def activation_of(model: nn.Module, node: Node) -> Activation | None:
    """Return the activation that an op is, as it was called; None where it is none that is known.

    It reads one value; beside it at most a parameter, of one entry or one for each channel.
    """
    if len(node.inputs) != 1:
        return None
    if node.op == "_prelu_kernel" and node.parameters:
        return _prelu(model.get_parameter(node.parameters[0]))
    make = None if node.parameters else _TABLE.get(node.op)
    return make(node.settings) if make else None


def _prelu(slope: Tensor) -> Activation:
    column = slope.detach().double().cpu().reshape(-1, 1)
    return Activation(lambda x: torch.where(x > 0, x, column.to(x) * x))


def _clamp(settings: Mapping[str, Any], low: str, high: str) -> Activation:
    least, most = settings.get(low), settings.get(high)
    function = partial(torch.clamp, min=least, max=most)
    return Activation(function, -math.inf if least is None else float(least), math.inf if most is None else float(most))


def _elu(settings: Mapping[str, Any]) -> Activation:
    alpha, scale, inner = (settings.get(name, 1.0) for name in ("alpha", "scale", "input_scale"))
    return Activation(lambda x: scale * torch.where(x > 0, x, alpha * torch.expm1(inner * x.clamp_max(0))))


def _plain(function: Callable[..., Tensor], low: float = -math.inf, high: float = math.inf) -> Any:
    """Return an activation that is called with its settings by name."""
    return lambda settings: Activation(partial(function, **settings), low, high)


_TABLE: dict[str, Callable[[Mapping[str, Any]], Activation]] = {
    "relu": _plain(torch.relu, 0.0),
    "hardtanh": lambda given: _clamp({"min_val": -1.0, "max_val": 1.0, **given}, "min_val", "max_val"),
    "clamp": lambda given: _clamp(given, "min", "max"),
    "clamp_min": lambda given: _clamp(given, "min", "max"),
    "clamp_max": lambda given: _clamp(given, "min", "max"),
    "hardswish": _plain(F.hardswish, -3.0),
    "hardsigmoid": _plain(F.hardsigmoid, -3.0, 3.0),
    "silu": _plain(F.silu),
    "mish": _plain(F.mish),
    "gelu": _plain(F.gelu),
    "leaky_relu": _plain(F.leaky_relu),
    "elu": _elu,
    "celu": _plain(F.celu),
    "softplus": _plain(F.softplus),
    "sigmoid": _plain(torch.sigmoid),
    "tanh": _plain(torch.tanh),
}
