"""Residual blocks that go as a whole: what their branches give without any input is read off, and takes their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.devices import device_of
from prunekit.errors import SurgeryError
from prunekit.nn.skipped import SkippedBlock, put_skip
from prunekit.surgery.copying import aliases, copied, named_tensors
from prunekit.surgery.execution.dispatch import DispatchMode, op_name, unfused_attention
from prunekit.surgery.execution.draws import own_randomness
from prunekit.surgery.execution.hooks import running
from prunekit.surgery.execution.sources import random_inputs
from prunekit.surgery.graph.blocks import ResidualBlock
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Mask
from prunekit.surgery.graph.resolved import ResolvedPlan

_INPUTS = 2  # random ones, on which a constant must be the same
_STEADY = 1e-4  # how much a constant may move between places and inputs, relative to 1 + its size: it is rounded


def with_blocks(resolved: ResolvedPlan) -> Mask:
    """Return which classes stay, those in blocks that are skipped among them."""
    graph, kept = resolved.graph, resolved.kept.copy()
    numbers = [graph.number(name) for block in resolved.skipped for name in block.groups]
    kept[np.isin(graph.group_of, numbers)] = True
    for link in graph.links:  # what a stream loses, its readers lose
        kept[link.private[~kept[link.stream]]] = False
    return kept


def silenced(model: nn.Module, resolved: ResolvedPlan, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in blocks that are skipped, at full width, with zeros where they read what goes with these."""
    graph, tensors = resolved.graph, named_tensors(model)
    found: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.read is None or not any(block.module in node.modules for block in resolved.skipped):
            continue
        name, dim = node.read.parameter, node.read.dim
        gone = (
            np.flatnonzero(~resolved.kept[graph.slots[name, dim]]) if (name, dim) in graph.slots else np.empty(0, int)
        )
        if gone.size:
            values = found.get(name, changed.get(name, tensors[name].detach()))
            found[name] = values.index_fill(dim, torch.from_numpy(gone).to(values.device), 0.0)
    return found


def skip_blocks(small: nn.Module, resolved: ResolvedPlan) -> None:
    """Put a constant into the place of each branch that goes, **in place**; its layers read nothing any more.

    Raises:
        SurgeryError: what is left of a branch is no constant.
    """
    if not resolved.skipped:
        return
    branches = _branches(small, resolved.graph, resolved.skipped)
    for block in resolved.skipped:
        bias = _constant(branches[block.module], block)
        put_skip(small, block.module, SkippedBlock(bias, block.axis, block.activation and block.activation[0]))


def _branches(small: nn.Module, graph: Graph, blocks: Sequence[ResidualBlock]) -> dict[str, list[Tensor]]:
    """Return what the branches of blocks give, on two random inputs."""
    device, network = device_of(small), copied(small, dict(aliases(small))).eval()
    found: dict[str, list[Tensor]] = {block.module: [] for block in blocks}
    for seed in range(_INPUTS):
        inputs = random_inputs(graph.example, device, seed)
        modules = dict(network.named_modules())
        with (
            own_randomness(device),
            unfused_attention(),
            running(modules) as stack,
            _Sums(graph, blocks, stack) as sums,
        ):
            network(*inputs)
        for name, branch in sums.found.items():
            found[name].append(branch)
    return found


class _Sums(DispatchMode):
    """Mode that notes what the branches of some blocks give: operands of sums, known by their number in the block."""

    def __init__(self, graph: Graph, blocks: Iterable[ResidualBlock], stack: Sequence[str]) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}
        self._stack, self._seen = stack, Counter[str]()
        self._wanted = {block.module: (_number(graph, block), block.branch) for block in blocks}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        if op_name(func) == "add":
            for name in self._wanted.keys() & set(self._stack):
                number, operand = self._wanted[name]
                if self._seen[name] == number:
                    self.found[name] = args[operand].clone()
                self._seen[name] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def _number(graph: Graph, block: ResidualBlock) -> int:
    """Return how many sums come before that of the block while it runs."""
    return sum(node.op == "add" and block.module in node.modules for node in graph.nodes[: block.sum])


def _constant(branches: Sequence[Tensor], block: ResidualBlock) -> Tensor:
    """Return what a branch always gives, `(C,)`.

    Raises:
        SurgeryError: it does not always give the same.
    """
    lines = [branch.movedim(block.axis, 0).flatten(1) for branch in branches]
    constant = lines[0][:, 0] if lines else torch.empty(0)
    if len(lines) < _INPUTS or not all(bool(_same(line, constant)) for line in lines):
        raise SurgeryError(
            f"block '{block.module}' cannot go: what its branch adds still depends on the input",
            hint="keep channels in it",
        )
    return constant.clone()


def _same(line: Tensor, constant: Tensor) -> bool:
    if line.is_meta:
        return True
    return bool(((line - constant[:, None]).abs() <= _STEADY * (1 + constant[:, None].abs())).all())
