"""The ways of restoring that come with prunekit, as restorations; the work is done elsewhere in this room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prunekit.errors import InputError
from prunekit.plan import Fold, Plan
from prunekit.restoration.base import Evidence, Restoration
from prunekit.restoration.memory import MEMORY, read_memory

if TYPE_CHECKING:
    from torch import nn

    from prunekit.restoration.images import Images
    from prunekit.surgery import ChannelGroup, Graph


class Nothing(Restoration):
    """The plan as it is."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "Prune only."

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return the plan as it is."""
        del model, graph, evidence
        return plan


class Constants(Restoration):
    """What removed channels are worth where batch norms scale them by (nearly) zero; see `restoration.constants`.

    The folds take the place of others that the same layers have for the same channels.
    """

    name: ClassVar[str] = "constants"
    summary: ClassVar[str] = "Fold what a removed channel is worth on average, act(beta), into the next layer."

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return the plan with these folds; the note `constants_lost` names layers that cannot take them, and why."""
        from prunekit.restoration.constants import constant_folds

        del evidence
        found = constant_folds(model, graph, {keep.group: keep.index for keep in plan.keeps})
        lost = {"constants_lost": dict(found.lost)} if found.lost else {}
        taken = {(fold.consumer, fold.group) for fold in found.folds}
        others = [op for op in plan if not (isinstance(op, Fold) and (op.consumer, op.group) in taken)]
        return Plan([*others, *found.folds], {**plan.notes, **lost}, plan.example)


@dataclass(frozen=True)
class Paper(Restoration):
    """Neuron Merging (Kim et al., NeurIPS 2020): each removed filter becomes a multiple of one kept filter.

    Attributes:
        threshold: Least cosine similarity, -1 to 1, of two filters that are merged (the paper's t).
        lam: Weight, 0 to 1, of the cosine against the batch-norm bias distance (the paper's lambda).
    """

    name: ClassVar[str] = "paper"
    summary: ClassVar[str] = "Neuron Merging: each removed filter becomes a multiple of one kept filter."
    threshold: float = 0.1
    lam: float = 0.85

    def __post_init__(self) -> None:
        for name, low in (("threshold", -1.0), ("lam", 0.0)):
            if not low <= getattr(self, name) <= 1:
                flag = "lambda" if name == "lam" else name
                raise InputError(f"--{flag} must lie between {low:g} and 1, not {getattr(self, name)}")

    def obstacle(self, model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
        """Return why the layers behind a group cannot read multiples of other channels, or None."""
        from prunekit.restoration.paper_folds import obstacle_to_folds

        return obstacle_to_folds(model, graph, group)

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return the plan with the paper's folds, and their number as the notes `merged` and `negative_scales`."""
        del evidence
        return self.folded(model, graph, plan, _able(self, model, graph, plan))

    def folded(self, model: nn.Module, graph: Graph, plan: Plan, groups: Iterable[str]) -> Plan:
        """Return the plan with the folds for some of the groups that it narrows."""
        from prunekit.restoration.paper_folds import paper_folds

        return paper_folds(model, graph, plan, groups, self.threshold, self.lam)


class Moments(Restoration):
    """Least squares on what norms tell of the activations; see `restoration.moment_refits`."""

    name: ClassVar[str] = "moments"
    summary: ClassVar[str] = "Solve for the next layer's weights in closed form, by the statistics that norms tell."

    def obstacle(self, model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
        """Return why what the layers behind a group read cannot be modelled, or None."""
        from prunekit.restoration.makers import obstacle_to_making_up
        from prunekit.restoration.moments import obstacle_to_moments

        return obstacle_to_making_up(model, graph, group) or obstacle_to_moments(model, graph, group)

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return the plan with new weights and statistics for the layers behind all groups that can be modelled."""
        del evidence
        return self.refitted(model, graph, plan, _able(self, model, graph, plan))

    def refitted(self, model: nn.Module, graph: Graph, plan: Plan, groups: Iterable[str]) -> Plan:
        """Return the plan with new weights and statistics for the layers behind some of the groups that it narrows."""
        from prunekit.restoration.moment_refits import moment_refits
        from prunekit.surgery import resolve

        refits = moment_refits(model, graph, resolve(graph, plan).keeps, groups)
        return Plan([*plan.operations, *refits], plan.notes, plan.example)


@dataclass(frozen=True)
class ClosedForm(Restoration):
    """The best that needs no data, group by group: `moments` where these can be modelled, else `paper`, else nothing.

    Attributes:
        threshold: As of `Paper`.
        lam: As of `Paper`.
    """

    name: ClassVar[str] = "closed-form"
    summary: ClassVar[str] = "Group by group the best that needs no data: moments, else paper, else nothing."
    threshold: float = Paper.threshold
    lam: float = Paper.lam

    @property
    def parts(self) -> tuple[Moments, Paper]:
        """The ways that it takes, the best first."""
        return Moments(), Paper(self.threshold, self.lam)

    def obstacle(self, model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
        """Return why none of its ways can make up for a group, or None."""
        return self._best(model, graph, group)[1]

    def part_for(self, model: nn.Module, graph: Graph, group: ChannelGroup) -> str:
        """Return the name of the way that it takes for a group, `none` where it has none."""
        return self._best(model, graph, group)[0]

    def _best(self, model: nn.Module, graph: Graph, group: ChannelGroup) -> tuple[str, str | None]:
        from prunekit.restoration.moments import knows_moments

        moments, paper = self.parts
        unmodelled = moments.obstacle(model, graph, group)
        if unmodelled is None:
            return moments.name, None
        reason = paper.obstacle(model, graph, group)
        if reason is not None:
            return Nothing.name, unmodelled if knows_moments(model, graph, group) else reason
        refitted = self._refitted(model, graph)
        reader = next((member.module for member in group.consumers if member.module in refitted), None)
        if reader is not None:  # a fold into weights that are solved for anew would be lost
            return Nothing.name, f"'{reader}' is refitted to other channels that it reads"
        return paper.name, None

    def _refitted(self, model: nn.Module, graph: Graph) -> frozenset[str]:
        """Return the layers that read any group which can be modelled."""
        known: frozenset[str] | None = graph.memo.get(ClosedForm)
        if known is None:
            able = (g for g in graph.groups if g.free and self.parts[0].obstacle(model, graph, g) is None)
            known = graph.memo[ClosedForm] = frozenset(member.module for g in able for member in g.consumers)
        return known

    def leading(self, model: nn.Module, graph: Graph, groups: Iterable[ChannelGroup]) -> str:
        """Return the name of the best way that it takes for any of these groups."""
        taken = {self.part_for(model, graph, group) for group in groups}
        return next((part.name for part in self.parts if part.name in taken), Nothing.name)

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return the plan with folds and refits; the note `restore` names the best way that was taken."""
        del evidence
        moments, paper = self.parts
        part = {name: self.part_for(model, graph, graph.group(name)) for name in _narrowed(graph, plan)}
        plan = paper.folded(model, graph, plan, [name for name, way in part.items() if way == paper.name])
        plan = moments.refitted(model, graph, plan, [name for name, way in part.items() if way == moments.name])
        best = next((way.name for way in self.parts if way.name in part.values()), Nothing.name)
        return Plan(plan.operations, {**plan.notes, "restore": best}, plan.example)


@dataclass(frozen=True)
class Synthetic(Restoration):
    """Refit to images that are made from the network itself; see `restoration.synthetic`.

    Attributes:
        seed: Seed of the images.
        memory: As of `Calibrate`.
    """

    name: ClassVar[str] = "synthetic"
    summary: ClassVar[str] = "Refit what stays, layer by layer, to images made from the network itself."
    seed: int = 0
    memory: str = MEMORY

    def evidence(self, model: nn.Module, graph: Graph, images: Images | None) -> Evidence:
        """Return the images that it makes, whatever was given."""
        from prunekit.restoration.synthetic import synthesise

        del images
        return synthesise(model, graph, seed=self.seed)

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return the plan with refits."""
        from prunekit.restoration.synthetic import refitted_to

        return refitted_to(evidence, model, graph, plan, self.memory)


@dataclass(frozen=True)
class Few(Synthetic):
    """Refit to views of a few images and to made ones; see `restoration.synthetic`.

    Attributes:
        seed: Seed of the views and the made images.
        memory: As of `Calibrate`.
    """

    name: ClassVar[str] = "few"
    summary: ClassVar[str] = "Refit what stays, layer by layer, to views of up to a hundred images, and to made ones."
    needs_images: ClassVar[bool] = True

    def evidence(self, model: nn.Module, graph: Graph, images: Images | None) -> Evidence:
        """Return views of the images, and made ones.

        Raises:
            InputError: There are more images than it is good for, or no statistics to make others from.
        """
        from prunekit.restoration.images import gather
        from prunekit.restoration.synthetic import FEW, synthesise

        assert images is not None
        given = gather(images, model, graph)
        if len(given) > FEW:
            raise InputError(
                f"--restore few is for up to {FEW} images, and these are {len(given):,}",
                hint=f"calibrate goes further with more; --calibration {FEW} takes as many of them",
            )
        return synthesise(model, graph, seed=self.seed, given=given)

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return the plan with refits."""
        from prunekit.restoration.synthetic import refitted_to

        return refitted_to(evidence, model, graph, plan, self.memory, note=self.name)


@dataclass(frozen=True)
class Calibrate(Restoration):
    """Refit to unlabelled images; see `restoration.calibration`.

    Attributes:
        memory: What images that wait at a layer may hold in memory, such as `2GiB`; what is more waits in a file.
    """

    name: ClassVar[str] = "calibrate"
    summary: ClassVar[str] = "Refit what stays, layer by layer, to unlabelled images."
    needs_images: ClassVar[bool] = True
    memory: str = MEMORY

    def __post_init__(self) -> None:
        read_memory(self.memory)

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return the plan with refits."""
        from prunekit.restoration.calibration import calibrate
        from prunekit.restoration.synthetic import FEW, obstacle_to_views

        assert evidence.images is not None
        found, count = calibrate(model, graph, plan, evidence.images, memory=self.memory), len(evidence.images)
        if count > FEW or obstacle_to_views(model, graph) is not None:
            return found
        few = f"few images ({count}): --restore few goes further, by views of them and images that it makes"
        said = "; ".join(filter(None, (found.notes.get("warning"), few)))
        return Plan(found.operations, {**found.notes, "warning": said}, found.example)


def _able(way: Restoration, model: nn.Module, graph: Graph, plan: Plan) -> Sequence[str]:
    """Return the groups that a plan narrows and a way can make up for."""
    return [name for name in _narrowed(graph, plan) if way.obstacle(model, graph, graph.group(name)) is None]


def _narrowed(graph: Graph, plan: Plan) -> Sequence[str]:
    """Return the groups that a plan narrows, without those in residual blocks that go as a whole."""
    from prunekit.surgery import resolve

    resolved = resolve(graph, plan)
    gone = {name for block in resolved.skipped for name in block.groups}
    return [name for name in resolved.keeps if name not in gone]
