"""Proof, not hope: a sliced network must compute what the original computes with the removed inputs masked.

The reference is that of `reference.py`; both run on random inputs. A network whose output hardly follows its input (at
its first initialisation, say) would prove nothing: then the same plan is proven on a lively copy as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.errors import SurgeryError
from prunekit.plan import Plan
from prunekit.surgery.aliases import aliases
from prunekit.surgery.copying import copied
from prunekit.surgery.edit import edit, take
from prunekit.surgery.graph import Graph, kept_after
from prunekit.surgery.precise import InDouble
from prunekit.surgery.record import plain, track_modules
from prunekit.surgery.reference import NormaliseKept, enliven, masked
from prunekit.surgery.runs import check_training

TOLERANCE = {torch.float64: 1e-10}
DEFAULT_TOLERANCE = 1e-4
_FAINT = 1e-3  # an output that varies by less than this share of its size hardly follows the input


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same inputs: the largest difference relative to how far the output follows the input."""

    difference: float
    tolerance: float
    faint: bool

    @property
    def equal(self) -> bool:
        """Whether they compute the same; NaN is a difference."""
        return self.difference <= self.tolerance


def verify(model: nn.Module, small: nn.Module, plan: Plan, graph: Graph, *, seed: int = 0) -> float:
    """Largest relative difference between the masked `model` and the sliced `small` on random inputs.

    Both also run on the further examples of the graph; and where the original runs in training mode, `small` must.
    Tolerances: 1e-4 in float32 (a network that exceeds it is judged again in float64), 1e-10 in float64.

    Raises:
        SurgeryError: they disagree, or `small` does not run; the module where it begins is named.
    """
    check_training(model, small, graph)
    others = [_on_example(model, small, plan, other, seed) for other in graph.on_further()]
    return max([_on_random(model, small, plan, graph, seed), *others])


def _on_example(model: nn.Module, small: nn.Module, plan: Plan, graph: Graph, seed: int) -> float:
    """The difference on the example of `graph` as it was given: other values might take other ways."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    drawn = random_inputs(graph.example, device, seed)
    inputs: tuple[Any, ...] = tree_map(_given, graph.example, drawn)
    candidate = copied(small, dict(aliases(small))).eval()
    with torch.no_grad():
        return _prove(masked(model, plan, graph).eval(), candidate, [inputs], graph, plan).difference


def _given(own: Any, drawn: Any) -> Any:
    """A tensor on the device of the one that was drawn for it, which stands in where it has no values."""
    return own.to(drawn.device) if isinstance(own, Tensor) and not own.is_meta else drawn


def _on_random(model: nn.Module, small: nn.Module, plan: Plan, graph: Graph, seed: int) -> float:
    """The difference on random inputs, on a lively copy as well where those would not show it."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = [random_inputs(graph.example, device, seed + i) for i in range(2)]
    with torch.no_grad():
        candidate = copied(small, dict(aliases(small)))
        result = _prove(masked(model, plan, graph).eval(), candidate.eval(), inputs, graph, plan)
        if not result.faint:
            return result.difference
        _same_weights(edit(model, plan, graph), small)
        lively = enliven(model, inputs[0])
        candidate = edit(lively, plan, graph)
        again = _prove(masked(lively, plan, graph, spend=True), candidate, inputs, graph, plan)
        return max(result.difference, again.difference)


def _prove(
    reference: nn.Module, candidate: nn.Module, inputs: list[tuple[Any, ...]], graph: Graph, plan: Plan
) -> Comparison:
    """Compare, in float64 if float32 leaves a doubt.

    Raises:
        SurgeryError: they differ.
    """
    result = _compare(reference, candidate, inputs, graph, plan)
    if not result.equal and result.tolerance == DEFAULT_TOLERANCE:
        inputs = [_double(x) for x in inputs]
        result = _compare_in_double(reference, candidate, inputs, graph, plan)
        if not result.equal:
            reference, candidate = reference.double(), candidate.double()
    if not result.equal:
        where = _first_difference(reference, candidate, inputs[0], graph, plan)
        raise SurgeryError(
            f"the pruned network does not compute what was meant: outputs differ by {result.difference:.1e} "
            f"(at most {result.tolerance:.0e} allowed), first in '{where}'",
            hint="nothing was written; please report the architecture",
        )
    return result


def _compare_in_double(
    reference: nn.Module, candidate: nn.Module, inputs: list[tuple[Any, ...]], graph: Graph, plan: Plan
) -> Comparison:
    """Compare in float64, without wider copies of the weights where the code lets its types alone."""
    try:
        with InDouble():
            return _compare(reference, candidate, inputs, graph, plan)
    except (RuntimeError, ValueError, TypeError, SurgeryError):  # recurrent layers look at the types of their weights
        return _compare(reference.double(), candidate.double(), inputs, graph, plan)


def _same_weights(expected: nn.Module, small: nn.Module) -> None:
    """Where outputs cannot tell, the weights must: bit for bit those of the plan."""
    want, have = expected.state_dict(), small.state_dict()
    wrong = [name for name in want if name not in have or not torch.equal(want[name], have[name])]
    wrong += [name for name in have if name not in want]
    if wrong:
        raise SurgeryError(f"the pruned network does not have the weights that the plan gives it, first '{wrong[0]}'")


def _compare(
    reference: nn.Module, candidate: nn.Module, inputs: list[tuple[Any, ...]], graph: Graph, plan: Plan
) -> Comparison:
    wanted, found = [], []
    for x in inputs:
        with NormaliseKept(graph, plan):
            wanted.append(_tensors(reference(*x)))
        found.append(_tensors(_run_candidate(candidate, x)))
    worst, tolerance, faint = 0.0, DEFAULT_TOLERANCE, True
    for place, pair in enumerate(zip(*wanted, strict=True)):
        if not all(bool(torch.isfinite(want).all()) for want in pair):
            raise SurgeryError("the network's output is not finite on random inputs, so nothing can be verified")
        size = max((float(want.abs().max()) for want in pair if want.numel()), default=0.0)
        follows = float((pair[0] - pair[-1]).abs().max()) if pair[0].numel() else 0.0
        scale = max(follows, _FAINT * size) if len(pair) > 1 else size
        faint = faint and follows < _FAINT * size
        for want, have in zip(pair, (outputs[place] for outputs in found), strict=True):
            worst = _worse(worst, _gap(want, have, scale))
        tolerance = TOLERANCE.get(pair[0].dtype, DEFAULT_TOLERANCE)
    return Comparison(worst, tolerance, faint)


def _gap(want: Tensor, have: Tensor, scale: float) -> float:
    if want.shape != have.shape:
        raise SurgeryError(f"the pruned network returns shape {tuple(have.shape)}, not {tuple(want.shape)}")
    return float((want - have).abs().max()) / max(scale, 1e-30) if want.numel() else 0.0


def _worse(worst: float, gap: float) -> float:
    """The larger one, or NaN."""
    return gap if gap != gap or gap > worst else worst


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


def _tensors(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(plain(output)) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _run_candidate(candidate: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Run the sliced network; a failure is told with the module in which it happened."""
    stack: list[str] = []
    handles = track_modules(dict(candidate.named_modules()), stack)
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


def _first_difference(
    reference: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...], graph: Graph, plan: Plan
) -> str:
    """The first leaf module, in execution order, whose outputs differ on the kept channels."""
    indices = graph.kept_indices(kept_after(graph, plan))
    with NormaliseKept(graph, plan):
        expected = _leaf_outputs(reference, inputs)
    found = _leaf_outputs(candidate, inputs)
    for name, want in expected.items():
        stays = indices.get((f"{name}.weight", 0))
        have = found.get(name)
        if stays is not None:
            width = graph.shapes[f"{name}.weight"][0]
            channels = 1 if want.size(1) == width else want.dim() - 1
            want = take(want, channels, stays)
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
