"""Batch norms folded into the convolutions in front of them: the same function, one layer less."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.surgery.copying import copied
from prunekit.surgery.graph.graph import Graph

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def fold_batch_norms(model: nn.Module, graph: Graph) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of `model` for inference without the batch norms that alone read a convolution or linear layer.

    With `s = gamma / sqrt(var + eps)`, `s (W x + b - mean) + beta` is the layer `(s W) x + s (b - mean) + beta`.
    Returns the copy and the names of the batch norms that are gone. `graph` is what `trace` read from `model`.
    """
    small = copied(model).eval()
    modules, folded = dict(small.named_modules()), []
    for name, layer in modules.items():
        norm_name = graph.batch_norm_after(name) if isinstance(layer, _FOLDABLE) else None
        if norm_name is None or _reads_others(graph, name, norm_name):
            continue
        norm = modules.get(norm_name)
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            _fold(layer, norm)
            small.set_submodule(norm_name, nn.Identity().eval())
            folded.append(norm_name)
    return small, tuple(folded)


def _reads_others(graph: Graph, layer: str, norm: str) -> bool:
    """Return whether the batch norm is called more often than the layer: it then stands behind another one as well."""
    outputs = {value for node in graph.calls(layer) for value in node.outputs}
    return any(outputs.isdisjoint(node.inputs) for node in graph.calls(norm))


def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    """Fold a batch norm into a layer, in double precision, so that nothing is lost before the final rounding."""
    weight, old_bias, mean, var = layer.weight, layer.bias, norm.running_mean, norm.running_var
    assert isinstance(weight, Tensor)
    assert isinstance(old_bias, Tensor | None)
    assert mean is not None
    assert var is not None
    with torch.no_grad():
        scale = (_wide(var) + norm.eps).rsqrt() * (1.0 if norm.weight is None else _wide(norm.weight))
        bias = torch.zeros(mean.shape, dtype=torch.float64) if old_bias is None else _wide(old_bias)
        shifted = scale * (bias - _wide(mean)) + (0.0 if norm.bias is None else _wide(norm.bias))
        scaled = _wide(weight) * scale.reshape(-1, *[1] * (weight.dim() - 1))
        layer.weight = nn.Parameter(scaled.to(weight), requires_grad=weight.requires_grad)
        layer.bias = nn.Parameter(shifted.to(weight), requires_grad=weight.requires_grad)


def _wide(values: Tensor) -> Tensor:
    """Return values in float64, on the CPU, which always has it."""
    return values.cpu().double()
