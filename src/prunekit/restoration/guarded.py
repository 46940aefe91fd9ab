"""Restorations at work: what they return is checked, and what others have written is refused by name where it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError, SurgeryError
from prunekit.plan import Plan
from prunekit.restoration.base import Evidence, Restoration
from prunekit.restoration.images import Images
from prunekit.surgery import ChannelGroup, Graph, edit, resolve
from prunekit.surgery.copying import copied


def restored(model: nn.Module, graph: Graph, plan: Plan, way: Restoration, evidence: Evidence) -> Plan:
    """Return `plan` with what makes up for its removals.

    The note `restore` names the way, and `plain` the groups that it could do nothing for, and why.

    Raises:
        InputError: The way cannot be taken with this network or these images.
        SurgeryError: The plan does not fit the network, or the way of another package fails or returns a plan that
            cannot be applied.
    """
    notes = dict(plan.notes)
    notes.pop("restore", None)
    if "plain" not in notes:
        reasons = {name: way.obstacle(model, graph, graph.group(name)) for name in resolve(graph, plan).keeps}
        notes |= {"plain": plain} if (plain := {name: said for name, said in reasons.items() if said}) else {}
    found = way.restore(model, graph, Plan(plan.operations, notes, plan.example), evidence)
    return Plan(found.operations, {"restore": way.name, **found.notes}, found.example)


def guarded(way: Restoration) -> Restoration:
    """Return the restoration itself if it is prunekit's own, else one that trusts it in nothing."""
    own = type(way).__module__.partition(".")[0] == __name__.partition(".")[0]
    return way if own else _Guarded(way)


class _Guarded(Restoration):
    """Restoration of another package: it works on copies, and what it raises and returns is refused under its name."""

    def __init__(self, way: Restoration) -> None:
        self._way = way
        self.name = getattr(way, "name", type(way).__name__)  # type: ignore[misc]
        self.needs_images = way.needs_images  # type: ignore[misc]

    def obstacle(self, model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
        """Return what it says about a group."""
        with self._named():
            reason = self._way.obstacle(model, graph, group)
        if not (reason is None or isinstance(reason, str)):
            raise self._refusal(f"returns a {type(reason).__name__} as an obstacle, where a reason or None is expected")
        return reason

    def evidence(self, model: nn.Module, graph: Graph, images: Images | None) -> Evidence:
        """Return what it knows of the data."""
        own = copied(model)
        with self._named():
            found = self._way.evidence(own, graph, images)
        if not isinstance(found, Evidence):
            raise self._refusal(f"returns a {type(found).__name__}, where Evidence is expected")
        return Evidence(model, found.images) if found.model is own else found

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return its plan, which has been applied once."""
        own = copied(model)
        evidence = Evidence(own, evidence.images) if evidence.model is model else evidence
        with self._named():
            found = self._way.restore(own, graph, plan, evidence)
        if not isinstance(found, Plan):
            raise self._refusal(f"returns a {type(found).__name__}, where a Plan is expected")
        if set(found.keeps) != set(plan.keeps) or found.gates != plan.gates:
            raise self._refusal("changes what the plan removes or gates", "it may add folds and refits alone")
        for place, values in _values(found):
            if not isinstance(values, Tensor) or not bool(torch.isfinite(values).all()):
                raise self._refusal(f"gives '{place}' values that are not finite")
        try:
            edit(model, found, graph)
        except SurgeryError as error:
            raise self._refusal(f"makes a plan that cannot be applied: {error.message}", error.hint) from error
        return found

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except PrunekitError:
            raise  # said on purpose
        except Exception as error:
            raise self._refusal(f"fails: {type(error).__name__}: {error}") from error

    def _refusal(self, what: str, hint: str | None = None) -> SurgeryError:
        return SurgeryError(f"restoration '{self.name}' {what}", hint=hint)


def _values(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Yield the values of folds and refits, and where they go."""
    for fold in plan.folds:
        yield from ((fold.consumer, values) for values in (fold.matrix, fold.offset) if values is not None)
    for refit in plan.refits:
        yield from ((f"{refit.layer}.{name}", values) for name, values in refit.values.items())
