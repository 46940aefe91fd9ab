"""Proof, not hope: a sliced network must compute what the original computes with the removed inputs masked.

The reference is the original at full width, folds and refits applied, in which every consumer's weights on removed
inputs are zero; layers that normalise across channels do so over the kept ones. Inputs are masked, not outputs: an
activation with `act(0) != 0` makes the two differ.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.errors import SurgeryError
from prunekit.plan import Plan
from prunekit.surgery.fold import folded
from prunekit.surgery.graph import Graph, resolve
from prunekit.surgery.groups import Mask
from prunekit.surgery.labels import Ids
from prunekit.surgery.meta import DispatchMode
from prunekit.surgery.record import plain, track_modules

TOLERANCE = {torch.float64: 1e-10}
DEFAULT_TOLERANCE = 1e-4


def verify(model: nn.Module, small: nn.Module, plan: Plan, graph: Graph, *, seed: int = 0) -> float:
    """Largest relative difference between the masked `model` and the sliced `small` on random inputs.

    Tolerances: 1e-4 in float32 (a network that exceeds it is judged again in float64), 1e-10 in float64.

    Raises:
        SurgeryError: they disagree, or `small` does not run; the module where it begins is named.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = random_inputs(graph.example, device, seed)
    with torch.no_grad():
        reference = masked(model, plan, graph).eval()
        candidate = copy.deepcopy(small).eval()
        worst, tolerance = _difference(reference, candidate, inputs, graph, plan)
        if not worst <= tolerance and tolerance == DEFAULT_TOLERANCE:
            reference, candidate, inputs = reference.double(), candidate.double(), _double(inputs)
            worst, tolerance = _difference(reference, candidate, inputs, graph, plan)
        if not worst <= tolerance:
            where = _first_difference(reference, candidate, inputs, graph, plan)
            raise SurgeryError(
                f"the pruned network does not compute what was meant: outputs differ by {worst:.1e} "
                f"(at most {tolerance:.0e} allowed), first in '{where}'",
                hint="nothing was written; please report the architecture",
            )
    return worst


def masked(model: nn.Module, plan: Plan, graph: Graph) -> nn.Module:
    """The reference: `model` at full width with folds and refits applied and removed inputs masked."""
    kept = graph.kept_classes(resolve(graph, plan))
    indices = graph.kept_indices(kept)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    changed = folded(model, plan, graph)
    _scatter_refits(plan, tensors, changed, indices)
    for key, classes in graph.slots.items():
        if graph.roles[key] == "in" and key in indices:
            name, dim = key
            values = changed.get(name, tensors[name].detach()).clone()
            values.index_fill_(dim, torch.from_numpy((~kept[classes]).nonzero()[0]).to(values.device), 0.0)
            changed[name] = values
    memo: dict[int, Any] = {}
    for name in changed.keys() & tensors.keys():
        old = tensors[name]
        memo[id(old)] = (
            nn.Parameter(changed[name], old.requires_grad) if isinstance(old, nn.Parameter) else changed[name]
        )
    reference = copy.deepcopy(model, memo)
    for name in changed.keys() - tensors.keys():
        reference.get_submodule(name.rpartition(".")[0]).bias = nn.Parameter(changed[name])
    return reference


def _scatter_refits(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    changed: dict[str, Tensor],
    indices: Mapping[tuple[str, int], Ids],
) -> None:
    """Refits are given in the final shapes; the reference needs them at full width."""
    for operation in plan.refits:
        for leaf, values in operation.values.items():
            name = f"{operation.layer}.{leaf}" if operation.layer else leaf
            full = changed[name].clone() if name in changed else tensors[name].detach().clone()
            # a bias that a fold has made has the outputs of its layer's weight
            known = name if name in tensors else f"{operation.layer}.weight"
            grid = [
                torch.from_numpy(indices[known, d]) if (known, d) in indices else torch.arange(full.size(d))
                for d in range(full.dim())
            ]
            if full.dim():
                full[torch.meshgrid(*grid, indexing="ij")] = values.to(full)
            else:
                full.copy_(values)
            changed[name] = full


def random_inputs(
    example: tuple[Any, ...], device: torch.device, seed: int, batch: int | None = None
) -> tuple[Any, ...]:
    """Standard normal inputs shaped like `example` (zeros where they are integers), `batch` of them if given."""
    generator = torch.Generator().manual_seed(seed)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = leaf.shape if batch is None or not leaf.dim() else (batch, *leaf.shape[1:])
        if leaf.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, leaf.dtype)
        return torch.zeros(shape, dtype=leaf.dtype, device=device)

    filled: tuple[Any, ...] = tree_map(fill, example)
    return filled


def _double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    wide: tuple[Any, ...] = tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )
    return wide


def _difference(
    reference: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...], graph: Graph, plan: Plan
) -> tuple[float, float]:
    """The largest relative difference over all outputs, and the tolerance for their type."""
    with _NormaliseKept(graph, plan):
        expected = reference(*inputs)
    found = _run_candidate(candidate, inputs)
    worst, tolerance = 0.0, DEFAULT_TOLERANCE
    pairs = list(zip(_tensors(expected), _tensors(found), strict=True))
    for want, have in pairs:
        if want.shape != have.shape:
            raise SurgeryError(f"the pruned network returns shape {tuple(have.shape)}, not {tuple(want.shape)}")
        if not bool(torch.isfinite(want).all()):
            raise SurgeryError("the network's output is not finite on random inputs, so nothing can be verified")
        scale = float(want.abs().max()) if want.numel() else 1.0
        gap = float((want - have).abs().max()) / max(scale, 1e-30) if want.numel() else 0.0
        worst = gap if gap != gap or gap > worst else worst  # NaN counts as a difference
        tolerance = TOLERANCE.get(want.dtype, DEFAULT_TOLERANCE)
    return worst, tolerance


def _tensors(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(plain(output)) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _run_candidate(candidate: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Run the sliced network; a failure is told with the module in which it happened."""
    stack: list[str] = []
    handles = track_modules(candidate, stack)
    try:
        return candidate(*inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        where = stack[-1] if stack and stack[-1] else type(candidate).__name__
        reason = " ".join(str(error).split())[:160]
        raise SurgeryError(
            f"the pruned network does not run: in '{where}': {reason}",
            hint=f"the forward of '{where}' or of its parent has sizes written into it; compute them from the input",
        ) from error
    finally:
        for handle in handles:
            handle.remove()


class _NormaliseKept(DispatchMode):
    """Lets layer and group norms of the reference normalise over the kept channels only."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        super().__init__()
        kept = graph.kept_classes(resolve(graph, plan))
        norms = [n for n in graph.nodes if n.op in ("native_layer_norm", "native_group_norm")]
        self._masks: list[Mask | None] = []
        for node in norms:
            known = graph.normalised.get(node.index)
            mask = kept[known[1]] if known else None
            self._masks.append(None if mask is None or mask.all() else mask)
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the norms that lost channels; run everything else as it is."""
        name = func._schema.name
        if name in ("aten::native_layer_norm", "aten::native_group_norm"):
            mask = self._masks[self._next] if self._next < len(self._masks) else None
            self._next += 1
            if mask is not None:
                index = torch.from_numpy(mask.nonzero()[0]).to(args[0].device)
                return (_layer_norm if name == "aten::native_layer_norm" else _group_norm)(func, index, args)
        return func(*args, **(kwargs or {}))


def _layer_norm(func: Any, index: Tensor, args: Any) -> Any:
    x, _, weight, bias, eps = args
    scale, shift = (None if t is None else t[index] for t in (weight, bias))
    out, mean, rstd = func(x.index_select(-1, index), [index.numel()], scale, shift, eps)
    return torch.zeros_like(x).index_copy(-1, index, out), mean, rstd


def _group_norm(func: Any, index: Tensor, args: Any) -> Any:
    x, weight, bias, batch, _, positions, groups, eps = args
    scale, shift = (None if t is None else t[index] for t in (weight, bias))
    small = x.index_select(1, index).contiguous()
    out, mean, rstd = func(small, scale, shift, batch, index.numel(), positions, groups, eps)
    return torch.zeros_like(x).index_copy(1, index, out), mean, rstd


def _first_difference(
    reference: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...], graph: Graph, plan: Plan
) -> str:
    """The first leaf module, in execution order, whose outputs differ on the kept channels."""
    indices = graph.kept_indices(graph.kept_classes(resolve(graph, plan)))
    with _NormaliseKept(graph, plan):
        expected = _leaf_outputs(reference, inputs)
    found = _leaf_outputs(candidate, inputs)
    for name, want in expected.items():
        stays = indices.get((f"{name}.weight", 0))
        have = found.get(name)
        if stays is not None:
            width = graph.shapes[f"{name}.weight"][0]
            channels = 1 if want.size(1) == width else want.dim() - 1
            want = want.index_select(channels, torch.from_numpy(stays).to(want.device))
        if have is None or have.shape != want.shape:
            continue
        if float((want - have).abs().max()) > 1e-6 * max(float(want.abs().max()), 1e-30):
            return name
    return type(reference).__name__


def _leaf_outputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.dim() > 1:
                outputs.setdefault(name, out.clone())

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
