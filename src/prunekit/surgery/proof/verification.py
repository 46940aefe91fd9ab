"""Proof, not hope: a sliced network must compute what the original computes where removed inputs are what was claimed.

The reference is that of `reference.py`; both run on random inputs. A network whose output hardly follows its input (at
its first initialisation, say) would prove nothing: then the same plan is proven on a lively copy as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunekit.devices import CPU, device_of, has_double
from prunekit.errors import SurgeryError
from prunekit.plan import Plan
from prunekit.progress import counter
from prunekit.surgery.copying import aliases, copied
from prunekit.surgery.editing.editor import edit, take
from prunekit.surgery.execution.draws import DrawAgain, Draws, own_randomness, start_over
from prunekit.surgery.execution.hooks import hooked, running
from prunekit.surgery.execution.sources import random_inputs
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.resolved import ResolvedPlan, resolve
from prunekit.surgery.proof.comparison import DEFAULT_TOLERANCE, Comparison, compared, values_of
from prunekit.surgery.proof.enliven import enliven
from prunekit.surgery.proof.precision import InDouble
from prunekit.surgery.proof.reference import Reference
from prunekit.surgery.tracing.runs import check_training


def verify(model: nn.Module, small: nn.Module, plan: Plan, graph: Graph, *, seed: int = 0) -> float:
    """Return the largest relative difference between `model` as `plan` means it and sliced `small`, on random inputs.

    `small` runs in the modes that it is in, which must be those of `model`; where any part of `model` is in training
    mode, it is inference that is proven, on copies of both in eval mode. Forwards that draw random numbers are given
    the same ones; no generator's state is changed. Tolerances: 1e-4 in float32 (a network that exceeds it is judged
    again in float64), 1e-10 in float64. Both also run on the further examples of the graph, as they are; and where the
    original runs in training mode, `small` must.

    Raises:
        SurgeryError: they disagree, or `small` does not run (the module where it begins is named), or is in another
            mode; or the network returns no floating-point tensor, so that nothing can be compared.
    """
    check_training(model, small, graph)
    device = device_of(model)
    if not has_double(device):  # what float32 leaves in doubt is judged in float64
        model, small, device = copied(model).cpu(), copied(small).cpu(), CPU
    inputs = [random_inputs(graph.example, device, seed + i) for i in range(2)]
    # inference mode hides the ops that composite ones are made of
    with torch.inference_mode(False), torch.no_grad(), own_randomness(device):
        _check_modes(model, small)
        training = any(module.training for module in model.modules())
        resolved = resolve(graph, plan)
        result = _prove(_Proof(model, resolved, small, evaluating=training), inputs)
        others = [
            _prove(
                _Proof(model, resolved.on(other), small, evaluating=training), [_as_given(other.example, device, seed)]
            )
            for other in graph.on_further()
        ]
        difference = max(one.difference for one in (result, *others))
        if not result.faint:
            return difference
        _same_weights(edit(model, plan, graph), small)
        lively = enliven(model, inputs[0])
        again = _prove(_Proof(lively, resolved, edit(lively, plan, graph)), inputs)
        return max(difference, again.difference)


def _as_given(example: tuple[Any, ...], device: torch.device, seed: int) -> tuple[Any, ...]:
    """Return an example with its own values, for others might take other ways; random ones where it has none."""

    def given(own: Any, drawn: Any) -> Any:
        return own.to(device) if isinstance(own, Tensor) and not own.is_meta else drawn

    inputs: tuple[Any, ...] = tree_map(given, example, random_inputs(example, device, seed))
    return inputs


def _check_modes(model: nn.Module, small: nn.Module) -> None:
    """Raise unless every module that is left is in the mode that it was in."""
    ours = dict(small.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        other = ours.get(name)
        if other is not None and other.training != module.training:
            now, was = ("training" if one.training else "eval" for one in (other, module))
            raise SurgeryError(
                f"'{name or type(small).__name__}' of the pruned network is in {now} mode, the original in {was} mode",
                hint="bring both into the same mode before verifying",
            )


class _Proof:
    """Networks to be compared: `model` as the plan means it, and `candidate`, a copy of `small` that may be run."""

    def __init__(self, model: nn.Module, resolved: ResolvedPlan, small: nn.Module, *, evaluating: bool = False) -> None:
        self.model, self.resolved, self.small = model, resolved, small
        self.reference, self.candidate = Reference(model, resolved), copied(small, dict(aliases(small)))
        if evaluating:
            self.reference.network.eval()
            self.candidate.eval()

    def double(self) -> None:
        """Widen the copies of both networks."""
        self.reference.network.double()
        self.candidate.double()

    def in_double(self) -> _Proof:
        """Return the same plan applied to a copy of the network in float64, where sums of weights are not rounded."""
        wide = copied(self.model).double()
        return _Proof(wide, self.resolved, self.edited(wide), evaluating=True)

    def edited(self, model: nn.Module) -> nn.Module:
        """Return a copy of such a network with the plan applied."""
        return edit(model, self.resolved.plan, self.resolved.graph)


def _prove(proof: _Proof, inputs: list[tuple[Any, ...]]) -> Comparison:
    """Compare, in float64 if float32 leaves a doubt.

    Folds are rounded to the type of the weights. So where there are some, the doubt is whether the plan does in float64
    what it says, and whether the weights of `small` are, bit for bit, those that it gives.

    Raises:
        SurgeryError: they differ.
    """
    result = _compare(proof, inputs)
    if not result.equal and result.tolerance == DEFAULT_TOLERANCE:
        inputs = [_double(x) for x in inputs]
        if proof.resolved.plan.folds:
            _same_weights(proof.edited(proof.model), proof.small)
            proof = proof.in_double()
            result = _compare(proof, inputs)
        else:
            result = _compare_in_double(proof, inputs)
            if not result.equal:
                proof.double()
    if not result.equal:
        raise SurgeryError(
            f"the pruned network does not compute what was meant: outputs differ by {result.difference:.1e} "
            f"(at most {result.tolerance:.0e} allowed), first in '{_first_difference(proof, inputs[0])}'",
            hint="nothing was written; please report the architecture",
        )
    return result


def _compare_in_double(proof: _Proof, inputs: list[tuple[Any, ...]]) -> Comparison:
    """Compare in float64, without wider copies of the weights where the code lets its types alone."""
    try:
        with InDouble():
            return _compare(proof, inputs)
    except (RuntimeError, ValueError, TypeError, SurgeryError):  # recurrent layers look at the types of their weights
        proof.double()
        return _compare(proof, inputs)


def _same_weights(expected: nn.Module, small: nn.Module) -> None:
    """Raise unless the weights are, bit for bit, those of the plan: this tells where outputs cannot."""
    want, have = expected.state_dict(), small.state_dict()
    wrong = [name for name in want if name not in have or not torch.equal(want[name], have[name])]
    wrong += [name for name in have if name not in want]
    if wrong:
        raise SurgeryError(f"the pruned network does not have the weights that the plan gives it, first '{wrong[0]}'")


def _compare(proof: _Proof, inputs: list[tuple[Any, ...]]) -> Comparison:
    wanted, found, count = [], [], counter("proving")
    for done, x in enumerate(inputs):
        count(done, len(inputs))
        output, draws = proof.reference.run(x)
        wanted.append(values_of(output))
        found.append(values_of(_run_candidate(proof.candidate, x, draws)))
    proof.reference.check_complete()
    return compared(wanted, found)


def _double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    wide: tuple[Any, ...] = tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )
    return wide


def _run_candidate(candidate: nn.Module, inputs: tuple[Any, ...], draws: Draws) -> Any:
    """Run the sliced network; a failure is told with the module in which it happened."""
    start_over(draws.device)
    with running(dict(candidate.named_modules())) as stack:
        try:
            with DrawAgain(draws, narrow=True) if draws.any else contextlib.nullcontext():
                return candidate(*inputs)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            where = stack[-1] if stack and stack[-1] else type(candidate).__name__
            reason = " ".join(str(error).split())[:160]
            raise SurgeryError(
                f"the pruned network does not run: in '{where}': {reason}",
                hint=f"the forward of '{where}' or its parent has sizes written into it; compute them from the input",
            ) from error


def _first_difference(proof: _Proof, inputs: tuple[Any, ...]) -> str:
    """Return the first leaf module, in execution order, whose outputs differ on the kept channels."""
    reference, graph, indices = proof.reference, proof.resolved.graph, proof.resolved.indices
    made = {key[0].rpartition(".")[0]: key for key, role in graph.roles.items() if role != "in"}
    made |= {key[0].rpartition(".")[0]: key for key, role in graph.roles.items() if role == "out"}
    expected, draws = _leaf_outputs(reference.network, lambda: reference.run(inputs)[1])
    found, _ = _leaf_outputs(proof.candidate, lambda: _run_candidate(proof.candidate, inputs, draws))
    for name, want in expected.items():
        key, have = made.get(name), found.get(name)
        stays = None if key is None else indices.get(key)
        if key is not None and stays is not None:
            width = graph.shapes[key[0]][key[1]]
            channels = 1 if want.size(1) == width else want.dim() - 1
            want = take(want, channels, stays) if want.size(channels) == width else want
        if have is None or have.shape != want.shape:
            continue
        if float((want - have).abs().max()) > 1e-6 * max(float(want.abs().max()), 1e-30):
            return name
    return type(reference.network).__name__


def _leaf_outputs(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, Tensor], Any]:
    """Return the outputs of the leaf modules while `run` runs `model`, and what `run` returns."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.dim() > 1:
                outputs.setdefault(name, out.clone())

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    with hooked(module.register_forward_hook(note(name)) for name, module in leaves):
        return outputs, run()
