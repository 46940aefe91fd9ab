"""Record of one forward of a network: ATen ops, parameter names, channel labels.

The network runs on the meta device, so nothing is computed and no activation is stored; a forward that needs values
is run on real tensors instead. `Recorder` is the dispatch mode; what each op means for labels stands in `rules.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import conv_flop_count, flop_registry

from prunekit.surgery.execution.dispatch import DispatchMode, op_name, run_op
from prunekit.surgery.execution.draws import is_random
from prunekit.surgery.execution.outputs import tensors_of
from prunekit.surgery.graph.joining import channels_along
from prunekit.surgery.graph.labels import along, none_like
from prunekit.surgery.graph.recording import (
    Call,
    Flow,
    Node,
    ParameterView,
    Recording,
    WeightRead,
    numbers_of,
    settings_of,
    tensors_in,
)
from prunekit.surgery.ops import LAYER_OPS, bias_of, readings

Rule = Callable[["Recorder", Call], None]

_OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)  # they check sizes of their own that nothing here edits


class Recorder(DispatchMode):
    """Mode that records every op into a `Recording`, following labels by the given rules."""

    def __init__(
        self,
        recording: Recording,
        tensors: Mapping[str, Tensor],
        rules: Mapping[str, Rule],
        fallback: Rule,
        modules: Mapping[str, nn.Module],
        stack: Sequence[str],
        values: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.recording = recording
        self.values = values
        self.ledger = recording.ledger
        self.modules = modules
        self.root = type(modules[""]).__name__
        self.stack = stack
        self._rules = rules
        self._fallback = fallback
        self._opaque = {name for name, module in modules.items() if isinstance(module, _OPAQUE)}
        self._labels: dict[int, Tensor] = {}
        self._views = {id(t): ParameterView(name, tuple(range(t.dim()))) for name, t in tensors.items()}
        self._values: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids stay unique only while the tensors live
        self._next_value = 0
        self._revealing: list[tuple[int, Tensor, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, then let its rule say what it did to the labels."""
        kwargs = kwargs or {}
        out = run_op(func, args, kwargs)
        where = self.stack[-1] if self.stack and self.stack[-1] else self.root
        call = Call(op_name(func), func, args, kwargs, list(tensors_in((out,))), where)
        node = self._node(call, out)
        arriving = tuple([self._labels[id(t)] for t in call.tensors if id(t) in self._labels])
        self._rule(call)(self, call)
        if is_random(func) and call.results:
            self.recording.draws[node.index] = self.labels(call.results[0])
        self.recording.nodes.append(node)
        leaving = tuple([self._labels.get(id(t)) for t in call.results])
        self.recording.flow.append(Flow(arriving, leaving, numbers_of(call.op, func, args, kwargs, out)))
        return out

    def _rule(self, call: Call) -> Rule:
        if call.where in self._opaque:
            return self._fallback
        rule = self._rules.get(call.op)
        if rule is None and torch.Tag.pointwise in call.func.tags:
            rule = self._rules["pointwise"]
        return rule or self._fallback

    def note_width(self, module: str, vector: Tensor) -> None:
        """Note which channels a norm sees that may have no parameters to tell its width by.

        An instance norm sees each image's channels, one image after the other.
        """
        own = self.modules.get(module)
        if isinstance(own, _NormBase):
            if any(True for _ in (*own.parameters(recurse=False), *own.buffers(recurse=False))):
                return
            vector = vector[: own.num_features]
        self.recording.widths[module] = vector

    def settle_links(self) -> None:
        """Let a batch norm that alone reads the layer (or norm) in front share its channels: that is no stream.

        An activation or a pooling may stand between the two.
        """
        nodes = self.recording.nodes
        readers = Counter(value for node in nodes for value in set(node.inputs))
        made: set[int] = set()
        for node, flow in zip(nodes, self.recording.flow, strict=True):
            alone = len(node.inputs) == 1 and node.inputs[0] in made and readers[node.inputs[0]] == 1
            makes = node.op in LAYER_OPS or not self.recording.links.keys().isdisjoint(node.parameters)
            if makes or (alone and flow.passes_on):
                made.update(node.outputs)
        for scale, link in list(self.recording.links.items()):
            if link.reads and all(readers[value] == 1 and value in made for value in link.reads):
                self.recording.join(scale)
            link.reads.clear()

    def _node(self, call: Call, out: Any) -> Node:
        activations, parameters = [], []
        for tensor in call.tensors:
            view = self.parameter(tensor)
            if view is None:
                activations.append(self.value(tensor))
            else:
                parameters.append(view.name)
        self.recording.used.update(parameters)
        macs = _macs(call, out)
        shape = tuple(call.results[0].shape) if call.results else ()
        outputs = tuple(self._new_value(t) for t in call.results)
        index, read = len(self.recording.nodes), self._weight_read(call)
        settings = settings_of(call.func, call.args, call.kwargs)
        values = tuple(activations), outputs
        where = call.where, *values, tuple(parameters)
        return Node(index, call.op, *where, macs, shape, read, settings, tuple(self.stack))

    def _weight_read(self, call: Call) -> WeightRead | None:
        """Return how the op reads an activation through a parameter, if it does."""
        for reading in readings(call.op, call.args):
            view = self.parameter(call.args[reading.weight])
            dim = None if view is None else view.dims[reading.into]
            if view is None or dim is None or self.parameter(call.args[reading.activation]) is not None:
                continue
            bias = bias_of(call.op, call.args)
            added = None if bias is None else self.parameter(bias)
            read = WeightRead(view.name, dim, added.name if added else None, bias is not None and added is None)
            if call.op != "convolution":
                return read
            stride, padding, dilation = map(tuple, call.args[3:6])
            read = replace(read, stride=stride, padding=padding, dilation=dilation)
            return replace(read, transposed=bool(call.args[6]), groups=int(call.args[8]))
        return None

    def value(self, tensor: Tensor) -> int:
        """Return the number of an activation's present value."""
        known = self._values.get(id(tensor))
        return self._new_value(tensor) if known is None else known

    def _new_value(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        self._values[id(tensor)] = self._next_value
        self._next_value += 1
        return self._next_value - 1

    def parameter(self, tensor: Tensor) -> ParameterView | None:
        """Return the parameter or buffer that `tensor` is, or is a plain view of; None for an activation."""
        return self._views.get(id(tensor))

    def set_view(self, tensor: Tensor, view: ParameterView) -> None:
        """Note that `tensor` is a view of a parameter."""
        self._views[id(tensor)] = view

    def is_bare(self, tensor: Tensor) -> bool:
        """Return whether an operand is a parameter, or a view of one: it has the channels of what it meets."""
        return id(tensor) in self._views and id(tensor) not in self._labels

    def labels(self, tensor: Tensor, channels: int | None = None) -> Tensor:
        """Return the labels of an operand; a parameter that is used like an activation gets some along its channels.

        These are its dimension `channels`; unless given, that of a map `(1, C, H, W)`, or the last of several entries.
        """
        known = self._labels.get(id(tensor))
        if known is not None:
            return known
        view = self.parameter(tensor)
        if view is None or tensor.numel() <= 1:
            return none_like(tensor.shape)
        channels = _channels_of(tensor, view) if channels is None else channels
        own = None if channels is None else view.dims[channels]
        if channels is None or own is None:
            return none_like(tensor.shape)
        slot = self.recording.slots.get((view.name, own))
        fresh = slot.labels if slot else self.ledger.fresh_given(tensor.size(channels))
        vector = self.recording.slot(view.name, own, "along", fresh)
        return along(vector, channels, tensor.shape)

    def channels(self, tensor: Tensor, dim: int, where: str) -> Tensor | None:
        """Return the channels along `dim` of an operand, the others being positions, or None; see `joining.py`."""
        labels = self.labels(tensor, dim) if self.is_bare(tensor) else self.labels(tensor)
        return channels_along(self.ledger, labels, dim, where)

    def set(self, tensor: Tensor, labels: Tensor) -> None:
        """Give a result its labels."""
        assert labels.shape == tensor.shape, (labels.shape, tensor.shape)
        self._labels[id(tensor)] = labels

    def freeze_if_read(self, result: Tensor, labels: Tensor, reason: str) -> None:
        """Freeze channels whose number shows in a result, if something reads that: weights of attention, averaged over
        its heads, are often made for nobody.
        """
        self._revealing.append((self.value(result), labels, reason))

    def settle_results(self, complete: bool) -> None:
        """Freeze what `freeze_if_read` was told of, once it is known which results are read."""
        read = {value for node in self.recording.nodes for value in node.inputs} | self.recording.returned
        for value, labels, reason in self._revealing:
            if value in read or not complete:
                self.ledger.freeze(labels, reason)

    def freeze_output(self, output: Any) -> None:
        """Freeze the channels of what the model returns: the caller reads them."""
        found = tensors_of(output).values()
        self.recording.returned.update(self.value(tensor) for tensor in found)
        for tensor in found:
            self.ledger.freeze(self.labels(tensor), "the model's output")


def _channels_of(tensor: Tensor, view: ParameterView) -> int | None:
    wide = [d for d in range(tensor.dim()) if tensor.size(d) > 1 and view.dims[d] is not None]
    is_map = tensor.dim() > 3 and tensor.size(0) == 1
    return 1 if is_map and 1 in wide else wide[-1] if wide else None


def _macs(call: Call, out: Any) -> int:
    """Return the multiply-accumulates of an op: half of the floating-point operations that PyTorch counts for it."""
    if call.op == "convolution":  # straight to the formula, past the search for tensors among the arguments
        x, weight = call.args[:2]
        return int(conv_flop_count(x.shape, weight.shape, out.shape, transposed=call.args[6])) // 2
    counter = flop_registry.get(call.func.overloadpacket)
    return int(counter(*call.args, **call.kwargs, out_val=out)) // 2 if counter else 0
