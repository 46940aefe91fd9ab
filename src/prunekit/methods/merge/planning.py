"""Decisions of `merge`: which layers can be compensated, which filters stay, and what the next layers take over."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from prunekit.errors import InputError
from prunekit.methods.budget import has_budget
from prunekit.methods.merge.candidates import Candidate, candidates
from prunekit.methods.merge.measuring import measured
from prunekit.methods.merge.ranked import rank, with_losses
from prunekit.methods.merge.widths import Kept, choose, shortfall
from prunekit.methods.partial import part_of
from prunekit.plan import Keep, Plan
from prunekit.restoration import registry
from prunekit.restoration.base import Evidence, Restoration
from prunekit.restoration.batch_norm_statistics import refit_norms
from prunekit.restoration.guarded import restored
from prunekit.restoration.images import Images, reads_tensors
from prunekit.restoration.moments import modelled
from prunekit.restoration.plain_layers import obstacle
from prunekit.restoration.second_moments import Reading, measure
from prunekit.restoration.synthetic import obstacle_to_synthesis
from prunekit.restoration.ways import ClosedForm, Synthetic
from prunekit.surgery import Graph, resolve, trace

if TYPE_CHECKING:
    from prunekit.methods.merge.config import MergeConfig

_OTHER_WAYS = {
    "moments": "it needs no data",
    "synthetic": "it needs no data",
    "calibrate": "it needs a few hundred images, without labels: name some with --data (from Python: images=...)",
}
_NOTHING = "no layer of this model can be merged: "
_OUTPUT = "the model's output"
# Ways that make up for residual blocks which go as a whole.
_DEPTH = ("calibrate", "synthetic")
# What a way of restoring chooses by where nothing else is said: the criterion, and the widths. The paper's own ways
# know of no losses. Elsewhere it is pivot, or l2-norm where no activations are measured, and widths by loss.
_PAPER = ("l1-norm", "uniform")
_CHOICE = {"paper": _PAPER, "none": _PAPER, "constants": _PAPER, "moments": ("l2-norm", "loss")}


def plan_merging(model: nn.Module, graph: Graph, config: MergeConfig, images: Images | None = None) -> Plan:
    """Return the plan of Neuron Merging and its relatives; see `Merge.plan`."""
    way = registry.chosen(config.restore, ClosedForm.name, images=images is not None, config=config)
    if config.refit_bn and images is None and not isinstance(way, Synthetic):
        raise InputError("--refit-bn needs images", hint="name some with --data, or take --restore synthetic")
    layers, left = candidates(model, graph, way, config.scope)
    warnings = []
    if not layers and isinstance(way, ClosedForm):  # streams are all that can be narrowed
        layers, left = candidates(model, graph, way, "all")
        count = f"{len(layers)} layer" + "s" * (len(layers) > 1)
        warnings = [f"nothing here can be made up for: what goes ({count}) goes plainly, to be tuned afterwards"]
    if not layers:
        raise _refusal(model, graph, way, config, left)
    evidence = way.evidence(model, graph, images)
    name = way.leading(model, graph, [layer.group for layer in layers]) if isinstance(way, ClosedForm) else way.name
    further = partial(_further, model, graph, config)
    chosen, kept, notes = _narrowed(graph, layers, config, name, evidence, further)
    stays = {layer.group.name for layer in layers} - {layer.group.name for layer in chosen}
    left |= {layer.group.name: layer.reason for layer in layers if layer.reason and layer.group.name in stays}
    plain = {layer.group.name: layer.reason for layer in layers if layer.reason and layer.group.name in kept}
    notes |= {"merged": 0, "negative_scales": 0, "left": left, "plain": plain, "protected": []}
    plan = Plan([Keep(name, index) for name, index in kept.items()], notes)
    if blocks := [block.module for block in resolve(graph, plan).skipped]:
        plan = Plan(plan.operations, {**plan.notes, "blocks": blocks})
    plan = restored(model, graph, plan, way, evidence)
    if config.refit_bn and evidence.images is not None:
        plan = refit_norms(model, graph, plan, evidence.images)
    short = shortfall(graph, kept, config)
    if short is not None:
        warnings.append(f"{short}: {further(chosen) or '--target-macs says how much is to be left'}")
    return _with_warnings(plan, warnings)


def _further(model: nn.Module, graph: Graph, config: MergeConfig, layers: Sequence[Candidate]) -> str | None:
    """Return what to ask for where these layers are not enough, or None."""
    usual = len(candidates(model, graph, ClosedForm(), config.scope)[0]) if config.restore else 0
    if usual > len(layers):
        return f"without --restore {config.restore} {usual} layers can be narrowed instead of {len(layers)}"
    every = len(candidates(model, graph, registry.get(config.restore or ClosedForm.name), "all")[0])
    if every > len(layers):
        return f"--scope all narrows {every} layers instead of {len(layers)}"
    return None


def _with_warnings(plan: Plan, warnings: Sequence[str]) -> Plan:
    said = [*filter(None, [plan.notes.get("warning")]), *warnings]
    return Plan(plan.operations, {**plan.notes, "warning": "; ".join(said)}, plan.example) if warnings else plan


def _refusal(
    model: nn.Module, graph: Graph, way: Restoration, config: MergeConfig, left: Mapping[str, str]
) -> InputError:
    """Return why nothing can be merged, and another way of restoration that can make up for some layers, if any."""
    # with sizes that are written into the code looked for
    graph, scope = part_of(trace(model, graph.example), config.only, config.skip), config.scope
    reason = _main_reason(graph, left)
    possible = {
        "moments": True,
        "synthetic": obstacle_to_synthesis(model, graph) is None,
        "calibrate": reads_tensors(graph),
    }
    ways = [
        (f"--restore {name} can make up for what goes here; {said}", name, scope) for name, said in _OTHER_WAYS.items()
    ]
    ways.append(("--scope all --restore none prunes plainly, to be tuned afterwards", "none", "all"))
    for hint, name, wider in ways:
        other = possible.get(name, True) and (name, wider) != (way.name, scope)
        layers = candidates(model, graph, registry.get(name), wider)[0] if other else []
        if layers and (name == "none" or any(_is_refitted(model, graph, layer) for layer in layers)):
            return InputError(_NOTHING + left.get(layers[0].group.name, reason), hint=hint)
    return InputError(_NOTHING + reason, hint="prunekit inspect lists the groups")


def _main_reason(graph: Graph, left: Mapping[str, str]) -> str:
    """Return what holds most groups, besides being the model's output; or else which layers were not followed."""
    inner = Counter(reason for reason in left.values() if reason != _OUTPUT)
    if inner:
        return inner.most_common(1)[0][0]
    members = (m for group in graph.groups for m in (*group.producers, *group.followers, *group.consumers))
    followed = {member.parameter for member in members}
    weights = [name for name, shape in graph.shapes.items() if name in graph.parameters and len(shape) > 1]
    unread = [name for name in weights if name not in followed]
    if not unread:
        return _OUTPUT if left else "it has no convolution or linear layer"
    return f"'{unread[0]}' and other weights ({len(unread)} in all) are read in a way that is not followed"


def _is_refitted(model: nn.Module, graph: Graph, layer: Candidate) -> bool:
    """Return whether any layer that reads these channels can be refitted."""
    return any(obstacle(model, graph, member) is None for member in layer.group.consumers)


def _narrowed(
    graph: Graph,
    layers: Sequence[Candidate],
    config: MergeConfig,
    way: str,
    evidence: Evidence,
    further: Callable[[Sequence[Candidate]], str | None],
) -> tuple[Sequence[Candidate], Kept, dict[str, Any]]:
    """Return the layers to narrow, their kept filters, and what these were chosen by.

    Those that could only be pruned plainly stay, unless the others come to less than half of what is asked.
    """
    able = [layer for layer in layers if layer.reason is None]
    if 0 < len(able) < len(layers) and config.scope == "inner" and has_budget(config):
        with contextlib.suppress(InputError):  # a target that they cannot meet
            kept, notes = _select(graph, able, config, way, evidence, partial(further, able))
            if shortfall(graph, kept, config) is None:
                return able, kept, notes
    return layers, *_select(graph, layers, config, way, evidence, partial(further, layers))


def _select(
    graph: Graph,
    layers: Sequence[Candidate],
    config: MergeConfig,
    way: str,
    evidence: Evidence,
    further: Callable[[], str | None],
) -> tuple[Kept, dict[str, Any]]:
    """Return the kept filters, and what they were chosen by."""
    model, images = evidence.model, evidence.images
    usual, widths = _CHOICE.get(way, ("l2-norm" if images is None else "pivot", "loss"))
    widths = config.widths or (widths if has_budget(config) else "uniform")
    if widths == "measured" and images is None:
        raise InputError("--widths measured runs the network on images", hint="name some with --data")
    judged = (config.criterion or usual) == "pivot" or widths != "uniform"
    readings: dict[str, Reading] = {}
    if judged or (config.criterion is None and way == "moments"):
        groups = [layer.group for layer in layers]
        readings = modelled(model, graph, groups) if images is None else measure(model, graph, groups, images)
    if judged and not readings and widths != "measured":
        asked = config.criterion == "pivot" or config.widths == "loss"
        if asked or (images is None and way in _CHOICE and all(layer.reason for layer in layers)):
            raise InputError(
                "nothing is known of what the layers read, which --criterion pivot and --widths loss judge by",
                hint="without batch norm it takes images: name some with --data"
                if images is None
                else "what reads them is no plain layer: --criterion l2-norm --widths uniform judges by the weights",
            )
        usual, widths = "l2-norm", "uniform"
    ranked = rank(layers, config.criterion, usual, readings)
    if widths != "uniform":
        ranked = with_losses(ranked, readings)
    if widths == "measured" and images is not None:
        ranked = measured(model, graph, ranked, images, depth=way in _DEPTH)
    kept = choose(graph, ranked, config, widths != "uniform", further)
    return kept, {"criterion": " and ".join(dict.fromkeys(one.criterion for one in ranked)), "widths": widths}
