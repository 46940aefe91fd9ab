"""The `gather` runtime: one image at a time, each layer computes the channels that the image keeps, from the channels
that the layer before has kept.

Batch norms are folded first. A layer collects the rows of its weights for the kept outputs and the columns for the kept
inputs, rounded up to a multiple of eight; what is rounded up is scaled by zero. Below which width that beats the dense
convolution is measured once, layer by layer. Compact feature maps pass only between layers where nothing else reads
them; what is added to a stream is spread out to its full width first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.errors import InputError
from prunekit.evaluation.latency import least_seconds
from prunekit.methods.manidp.costs import channels_of
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import GatedConv, gated_layers
from prunekit.surgery.editing.batch_norm_folding import fold_batch_norms
from prunekit.surgery.execution.hooks import hooked
from prunekit.surgery.graph.graph import Graph

_TIMINGS = 7
_MULTIPLE = 8  # channels that kept counts are rounded up to
_SHARES = (0.25, 0.5, 0.75, 0.9)  # of the channels, at which gathering is timed against the dense layer


@dataclass
class Wire:
    """Channels of a layer that a compact feature map holds; None for all, in order. Set on every call."""

    width: int
    index: Tensor | None = None


def gathered(view: GatedView, example: Tensor) -> nn.Module:
    """Return a copy of the gated network, for inference, that runs one image at a time and computes what it keeps.

    `example` is one typical image, `(1, C, H, W)`, to time the layers with.

    Raises:
        InputError: the model has no gates, or forward is later given more than one image.
    """
    if not view.layers:
        raise InputError("this network has no gates", hint="prunekit manidp train makes one that has")
    subject, _ = fold_batch_norms(view.model, view.graph)
    subject.to(memory_format=torch.channels_last)
    wires = _wires(view)
    for name, layer in list(gated_layers(subject)):
        source = next((wire for reader, wire in wires.values() if reader == name), None)
        own = wires.get(name)
        subject.set_submodule(name, GatheredConv(layer, source, own[1] if own else None))
    for reader, wire in wires.values():
        module = subject.get_submodule(reader)
        if isinstance(module, nn.Conv2d):
            subject.set_submodule(reader, ColumnConv(module, wire))
    runner = OneImage(subject)
    tune(runner, example.contiguous(memory_format=torch.channels_last))
    return runner.eval()


class OneImage(nn.Module):
    """Network that runs images one by one: gates differ between them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the answers: `(N, C, H, W)` -> `(N, classes)`."""
        if x.size(0) == 1:
            result: Tensor = self.network(x)
            return result
        return torch.cat([self.network(one) for one in torch.split(x, 1)])


class GatheredConv(nn.Module):
    """A gated layer with its batch norm folded, for one image. `source` says what its input holds, `sink` what its
    output does; without a sink the output is spread out to its full width.
    """

    def __init__(self, layer: GatedConv, source: Wire | None, sink: Wire | None) -> None:
        super().__init__()
        self.gate, self.threshold, self.source, self.sink = layer.gate, layer.threshold, source, sink
        chain = list(layer.conv) if isinstance(layer.conv, nn.Sequential) else [layer.conv]
        self.chain = nn.Sequential(*(m for m in chain if not isinstance(m, nn.Identity)))
        self.weights = {m: Rows(m) for m in self.chain if isinstance(m, nn.Conv2d)}
        self.width = int(self.gate.excite.out_features)
        self.limit = self.width  # of kept channels, up to which gathering is faster than the dense layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map of the kept channels."""
        pi = self.gate.of_pooled(_spread(x.mean((2, 3)), self.source))
        kept = pi * (pi >= self.threshold).to(pi.dtype)
        count = min(self.width, max(1, -(-int(torch.count_nonzero(kept)) // _MULTIPLE)) * _MULTIPLE)
        return self.gather(x, kept, count) if count <= self.limit else self.dense(x, kept)

    def gather(self, x: Tensor, kept: Tensor, count: int) -> Tensor:
        """Return the outputs with the `count` largest saliencies, alone."""
        index = kept[0].topk(count, sorted=False).indices.sort().values  # ascending, for the memory's sake
        y = self._thin(x, index) * kept[0, index].reshape(1, -1, 1, 1)
        if self.sink is not None:
            self.sink.index = index
            return y
        return _scatter(y, index, self.width)

    def dense(self, x: Tensor, kept: Tensor) -> Tensor:
        """Return all outputs, each times its saliency or zero."""
        if self.sink is not None:
            self.sink.index = None
        if self.source is not None and self.source.index is not None:
            x = _scatter(x, self.source.index, self.source.width)
        y: Tensor = self.chain(x)
        return y * kept[:, :, None, None]

    def _thin(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the convolution's outputs `index`; in a chain every convolution has these channels."""
        columns = None if self.source is None else self.source.index
        for number, module in enumerate(self.chain):
            if module not in self.weights:
                x = module(x)
            elif module.groups > 1 and number == 0:  # a depthwise convolution without an expansion in front
                x = self.weights[module](x.index_select(1, index), index, None)
            else:
                x = self.weights[module](x, index, columns)
            columns = None
        return x


class ColumnConv(nn.Module):
    """A convolution without a gate that reads a compact feature map."""

    def __init__(self, conv: nn.Conv2d, source: Wire) -> None:
        super().__init__()
        self.conv, self.source = conv, source
        self.weights = Rows(conv)

    def forward(self, x: Tensor) -> Tensor:
        """Return all output channels, from the input channels that are there."""
        if self.source.index is None:
            result: Tensor = self.conv(x)
            return result
        return self.weights(x, None, self.source.index)


class Rows:
    """The weights of a convolution in the order they are collected in: `(out, kernel, in)`, inputs innermost.

    Selecting from a two-dimensional view copies whole rows, and yields the channels-last layout that the convolution
    wants; selecting from the four-dimensional tensor takes four times as long.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        weight = conv.weight.detach()
        self.conv, self.kernel, self.inputs = conv, weight.shape[2:], weight.size(1)
        self.rows = weight.permute(0, 2, 3, 1).reshape(weight.size(0), -1).contiguous()
        self.bias = None if conv.bias is None else conv.bias.detach()

    def __call__(self, x: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
        """Return the convolution's `outputs` (all: None), where `x` holds only its `inputs` (all: None).

        A depthwise convolution's inputs are its outputs.
        """
        conv, rows, bias = self.conv, self.rows, self.bias
        if outputs is not None:
            rows = rows.index_select(0, outputs)
            bias = None if bias is None else bias.index_select(0, outputs)
        width, depthwise = self.inputs, conv.groups > 1
        if inputs is not None and not depthwise:
            width = len(inputs)
            rows = rows.view(-1, self.inputs).index_select(1, inputs)
        weight = rows.view(-1, *self.kernel, width).permute(0, 3, 1, 2)
        groups = weight.size(0) if depthwise else 1
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)


def _spread(pooled: Tensor, source: Wire | None) -> Tensor:
    """Return pooled compact features `(1, k)` at their places among all channels."""
    if source is None or source.index is None:
        return pooled
    return pooled.new_zeros(1, source.width).index_copy_(1, source.index, pooled)


def _scatter(y: Tensor, index: Tensor, width: int) -> Tensor:
    """Return the channels of `y` at their places among `width`, zeros elsewhere; channels-last."""
    full = torch.empty(
        (1, width, *y.shape[2:]), dtype=y.dtype, device=y.device, memory_format=torch.channels_last
    ).zero_()
    return full.index_copy_(1, index, y)


def _wires(view: GatedView) -> dict[str, tuple[str, Wire]]:
    """Return, for each gated layer whose output one layer alone reads, and can compactly, that layer and the wire."""
    gated, cost = view.layers, view.cost
    wires: dict[str, tuple[str, Wire]] = {}
    for number, name in enumerate(cost.layers):
        readers = {_home(term.layer, gated) for term in cost.terms if term.inputs == number}
        if readers == _consumers(view.graph, name, gated) and len(readers) == 1:
            reader = readers.pop()
            module = view.model.get_submodule(reader)
            if isinstance(module, GatedConv) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                wires[name] = (reader, Wire(cost.channels[number]))
    return wires


def _consumers(graph: Graph, name: str, gated: Mapping[str, GatedConv]) -> set[str]:
    """Return the layers that read the outputs of a gated layer; itself where other layers make or scale them too."""
    group = channels_of(graph, name)
    others = [m.module for m in (*group.producers, *group.followers) if _home(m.module, gated) != name]
    return {name} if others else {_home(member.module, gated) for member in group.consumers}


def _home(module: str, gated: Mapping[str, GatedConv]) -> str:
    return next((name for name in gated if module.startswith(f"{name}.")), module)


def tune(runner: OneImage, image: Tensor) -> None:
    """Find for each layer up to which width gathering beats the dense convolution, on what it reads from `image`."""
    layers = [module for module in runner.modules() if isinstance(module, GatheredConv)]
    inputs: dict[GatheredConv, Tensor] = {}

    def remember(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, GatheredConv)
        inputs[layer] = args[0]

    with torch.inference_mode():
        with hooked(layer.register_forward_pre_hook(remember) for layer in layers):
            runner(image)
        for layer in layers:
            layer.limit = _limit(layer, inputs[layer])


def _limit(layer: GatheredConv, x: Tensor) -> int:
    state = layer.sink.index if layer.sink else None
    kept = torch.ones(1, layer.width, dtype=x.dtype, device=x.device)
    dense = least_seconds(partial(layer.dense, x, kept), x.device, rounds=_TIMINGS)
    limit = 0
    for share in _SHARES:
        count = min(layer.width, max(1, round(share * layer.width / _MULTIPLE)) * _MULTIPLE)
        if least_seconds(partial(layer.gather, x, kept, count), x.device, rounds=_TIMINGS) < dense:
            limit = count
    if layer.sink is not None:
        layer.sink.index = state
    return limit
