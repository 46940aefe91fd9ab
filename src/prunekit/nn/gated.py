"""Convolutions whose active output channels depend on the input.

Tang et al., "Manifold Regularized Dynamic Network Pruning", CVPR 2021. Convolution, batch norm and gate are one module
in place of the convolution: no state passes between modules, so a gated network still traces, exports and copies.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from prunekit.devices import CPU, forked_generators, seed_generators
from prunekit.errors import InputError, SurgeryError
from prunekit.plan import Gate

LIMIT = 1000.0  # the largest saliency


class SaliencyNet(nn.Module):
    """Saliency of each output channel for each image: `(N, C, ...)` -> `(N, out)`.

    `pi = min(ReLU(W2 ReLU(W1 GAP(x)) + b2), 1000)`. It starts with `W2 = 0` and `b2 = 1`, so every saliency is exactly
    one and the network computes what it did before.
    """

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, out)
        nn.init.zeros_(self.excite.weight)
        nn.init.ones_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the saliencies of the feature map `x`, `(N, out)`."""
        return self.of_pooled(x.flatten(2).mean(2))

    def of_pooled(self, pooled: Tensor) -> Tensor:
        """Return the saliencies of a globally averaged feature map, `(N, C)` -> `(N, out)`."""
        return F.relu(self.excite(self.hidden(pooled))).clamp(max=LIMIT)

    def hidden(self, pooled: Tensor) -> Tensor:
        """Return the output of the hidden layer, `(N, hidden)`."""
        return F.relu(self.squeeze(pooled))


class GatedConv(nn.Module):
    """Convolution, batch norm and gate: `norm(conv(x)) * pi * [pi >= threshold]`.

    Kept channels are scaled by their saliency, the others are zero. `threshold` is one number for the layer; 0 lets
    every channel with a positive saliency through. `budgets` holds further thresholds by the name of the budget that
    each meets. `conv` may be a chain that ends in the convolution.
    """

    threshold: Tensor

    def __init__(self, conv: nn.Module, norm: nn.Module, gate: SaliencyNet, made_by: Gate) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.gate = gate
        self.made_by = made_by
        self.budgets: dict[str, float] = {}
        self.register_buffer("threshold", next(gate.parameters()).new_zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated, normalised feature map; its activation follows."""
        scale = self.kept(self.gate(x))
        y: Tensor = self.norm(self.conv(x))
        return y * scale.reshape(*scale.shape, *(1,) * (y.dim() - 2))

    def kept(self, pi: Tensor) -> Tensor:
        """Return the saliencies `(N, channels)`, zero below the threshold; the indicator has no gradient."""
        return pi * (pi >= self.threshold).to(pi.dtype)

    @property
    def layer(self) -> nn.Module:
        """The convolution itself, at the end of the chain."""
        return self.conv[-1] if isinstance(self.conv, nn.Sequential) else self.conv

    def extra_repr(self) -> str:
        """Return the names of the budgets with known thresholds, for `repr`."""
        return f"budgets={list(self.budgets)}" if self.budgets else ""


def gated_layers(model: nn.Module) -> Iterator[tuple[str, GatedConv]]:
    """Yield the name and module of each gated layer, in the order of the network's modules."""
    for name, module in model.named_modules():
        if isinstance(module, GatedConv):
            yield name, module


@contextlib.contextmanager
def same_thresholds(layers: Iterable[GatedConv]) -> Iterator[None]:
    """Thresholds that are moved inside are put back at the end, whatever happens."""
    before = [(layer.threshold, layer.threshold.clone()) for layer in layers]
    try:
        yield
    finally:
        for threshold, value in before:
            threshold.copy_(value)


def insert_gates(model: nn.Module, gates: Iterable[Gate]) -> nn.Module:
    """Put gates into `model` **in place** and return it; its outputs stay the same, since every saliency is one.

    Raises:
        SurgeryError: The model lacks a layer that a gate names, or it is no convolution or batch norm.
    """
    for gate in gates:
        modules = [_module(model, name) for name in (*gate.before, gate.conv, gate.norm)]
        *chain, norm = modules
        conv, first = chain[-1], chain[0]
        if not isinstance(norm, _NormBase) or not hasattr(first, "in_channels") or not hasattr(conv, "out_channels"):
            raise SurgeryError(f"'{gate.conv}' and '{gate.norm}' are no convolution with its batch norm")
        place = torch.device("meta" if next(conv.parameters()).is_meta else "cpu")
        with forked_generators(CPU), place:  # one plan, one result: the start depends on the layer's name alone
            seed_generators(CPU, zlib.crc32(gate.conv.encode()))
            net = SaliencyNet(int(str(first.in_channels)), gate.hidden, int(str(conv.out_channels)))
        net.to(next(conv.parameters()))
        inner = conv if len(chain) == 1 else nn.Sequential(*chain)
        for name, module in zip((*gate.before, gate.norm), (*chain[:-1], norm), strict=True):
            model.set_submodule(name, nn.Identity().train(module.training))
        gated = GatedConv(inner, norm, net.train(norm.training), gate)
        gated.training = inner.training = conv.training
        model.set_submodule(gate.conv, gated)
    return model


def remove_gates(model: nn.Module, scales: Mapping[str, Tensor]) -> nn.Module:
    """Take the gates out of `model` **in place** and return it, in its original architecture.

    Args:
        model: A gated network.
        scales: For each gated layer, the constants `(channels,)` that scale its channels in place of a saliency.
    """
    for name, layer in list(gated_layers(model)):
        made_by, norm, scale = layer.made_by, layer.norm, scales[name]
        assert isinstance(norm, _NormBase)
        with torch.no_grad():
            ones, zeros = torch.ones_like(scale), torch.zeros_like(scale)
            norm.weight = nn.Parameter(scale * (ones if norm.weight is None else norm.weight))
            norm.bias = nn.Parameter(scale * (zeros if norm.bias is None else norm.bias))
            norm.affine = True
        modules = list(layer.conv) if isinstance(layer.conv, nn.Sequential) else [layer.conv]
        for place, module in zip((*made_by.before, made_by.conv, made_by.norm), (*modules, norm), strict=True):
            model.set_submodule(place, module)
    return model


def describe_gates(model: nn.Module) -> list[dict[str, Any]]:
    """Return the gates of a network as JSON, each with its `budgets`; `restore_gates` puts them into a fresh one."""
    return [{**layer.made_by.to_json(), "budgets": dict(layer.budgets)} for _, layer in gated_layers(model)]


def restore_gates(model: nn.Module, described: Iterable[Mapping[str, Any]], shapes: Mapping[str, Any]) -> None:
    """Insert the gates that `describe_gates` returned, in place.

    Args:
        model: A fresh network of the same architecture.
        described: The gates as JSON.
        shapes: The shapes of the weights at hand, by name.

    Raises:
        InputError: The gates do not fit this network or these weights, or are no gates at all.
    """
    try:
        for entry in described:
            budgets = {str(name): float(value) for name, value in entry["budgets"].items()}
            fields = {key: value for key, value in entry.items() if key != "budgets"}
            gate = Gate(**{**fields, "before": tuple(fields["before"])})
            if shapes.get(f"{gate.conv}.gate.squeeze.weight", [])[:1] != [gate.hidden]:
                raise ValueError(f"'{gate.conv}' has no weights for the width {gate.hidden}")
            insert_gates(model, [gate])
            layer = model.get_submodule(gate.conv)
            assert isinstance(layer, GatedConv)
            layer.budgets = budgets
    except (SurgeryError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the file describes gates that its architecture cannot have: {error}") from error


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SurgeryError(f"the plan gates '{name}', which the model does not have") from None
