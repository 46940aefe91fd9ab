"""Functions that need no method: look at a network, restore and apply a plan, prove the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from prunekit import surgery
from prunekit.api.results import Inspection
from prunekit.api.subject import Subject, at_work, example_input, plain_examples, warn_of_unseen
from prunekit.errors import InputError
from prunekit.plan import Plan
from prunekit.restoration import registry
from prunekit.restoration.base import Restoration
from prunekit.restoration.guarded import guarded, restored
from prunekit.restoration.images import Images
from prunekit.restoration.ways import ClosedForm
from prunekit.surgery import Graph
from prunekit.surgery.graph.inside import names_width


def inspect(model: nn.Module, x: Any = None, *, examples: Iterable[Any] = (), inside_heads: bool = False) -> Inspection:
    """Look at a network: its channel groups, what may not go and why, and its cost.

    Nothing is computed: the network runs on the meta device, where tensors have shapes alone.

    Args:
        model: The network; it stays as it is.
        x: An example input: a tensor `(N, ...)`, a tuple of arguments, or a dictionary of them by name. By default one
            of the shape that the model remembers. Costs are for one of its `N`.
        examples: Further inputs, for what `x` does not reach: another head, an early exit, an optional input. What
            they reach is pruned with the rest.
        inside_heads: Look for the widths of heads of attention as well: groups such as `blocks.0.attention.qkv[qk]`.

    Raises:
        InputError: The forward fails on one of the inputs, or none is given and none is remembered.

    Examples:
        >>> import torch, prunekit as pk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> found = pk.inspect(model, torch.zeros(1, 3, 32, 32))
        >>> [(group.name, len(group.free), group.reason) for group in found.groups]
        [('0', 8, None), ('2', 0, "the model's output")]
        >>> found.cost.params, found.cost.macs
        (260, 223200)
    """
    with at_work(model, x):
        plain = surgery.materialised(surgery.unwrapped(model))
        graph = surgery.trace(
            plain, example_input(plain, x), examples=plain_examples(examples), inside_heads=inside_heads
        )
        return Inspection(graph, surgery.cost_of(plain, graph))


def _read_for(plan: Plan, plain: nn.Module, x: Any, examples: Iterable[Any]) -> Graph:
    """Return the graph of a network with all groups that a plan names."""
    return surgery.trace(
        plain,
        example_input(plain, x, plan),
        examples=plain_examples(examples),
        inside_heads=any(names_width(keep.group) for keep in plan.keeps),
    )


def apply(model: nn.Module, plan: Plan, x: Any = None, *, examples: Iterable[Any] = ()) -> nn.Module:
    """Apply a plan, one that a method returned or one written by hand, and prove the result.

    The same plan on the same model gives the same weights, bit for bit.

    Args:
        model: The network; it stays as it is.
        plan: What to do.
        x: An example input (see `inspect`). By default one of the shape that the model remembers, or else of the one
            that the plan was made with.
        examples: Further inputs. Where the plan was made with some, they are needed again.

    Returns:
        The new network.

    Raises:
        InputError: The forward fails on one of the inputs, or none is known.
        SurgeryError: The plan does not fit, or the result does not compute what was meant.

    Examples:
        >>> import torch, prunekit as pk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> pk.apply(model, pk.Plan([pk.Keep("0", [0, 2, 5])]), torch.zeros(1, 3, 32, 32))
        Sequential(
          (0): Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    with at_work(model, x):
        subject = Subject.of(model)
        graph = _read_for(plan, subject.plain, x, examples)
        small = subject.proven(plan, graph)[0].model
    warn_of_unseen(graph)
    return small


def restore(
    model: nn.Module,
    plan: Plan,
    x: Any = None,
    *,
    images: Images | None = None,
    way: str | Restoration | None = None,
    examples: Iterable[Any] = (),
    graph: Graph | None = None,
    **settings: Any,
) -> Plan:
    """Make up for what a plan removes: in the layers that stay, from images or without any.

    Args:
        model: The network; it stays as it is.
        plan: What is removed, by a method or by hand. Folds and refits that are there already are where this begins.
        x: An example input, as for `apply`.
        images: Unlabelled, normalised images `(N, C, H, W)`, or batches of them.
        way: How: one of `restorations()`, or an object of a class of your own. By default `calibrate` with images,
            `closed-form` without.
        examples: Further inputs, for what `x` does not reach (see `inspect`).
        graph: The network as it was read already, where that is at hand: `inspect(model).graph`, or what a method was
            given. `x` and `examples` are not needed then.
        **settings: Those of a way that is named, such as `seed=1` of `synthetic`.

    Returns:
        The same removals with what makes up for them, for `apply`. The note `restore` names the way, `plain` the
        channel groups that it can do nothing for.

    Raises:
        InputError: There is no such way, it needs images, or it can do nothing for this plan.
        SurgeryError: The plan does not fit the network, or the way of another package returns one that does not.

    Examples:
        >>> import torch, prunekit as pk
        >>> model, images = pk.load("prunekit:vgg_digits"), torch.rand(64, 1, 8, 8)
        >>> plan = pk.Plan([pk.Keep("features.0", range(0, 32, 2))])
        >>> restored = pk.restore(model, plan, images=images)
        >>> restored.keeps == plan.keeps, len(restored.refits), restored.notes["restore"]
        (True, 11, 'calibrate')
        >>> def error(plan):
        ...     return (pk.apply(model, plan)(images) - model(images)).square().mean()
        >>> bool(error(restored) < error(plan))
        True
    """
    found = _way(way, images is not None, settings)
    with at_work(model, x):
        plain = Subject.of(model).plain
        if graph is None:
            graph = _read_for(plan, plain, x, examples)
        before = Plan(plan.operations, {key: said for key, said in plan.notes.items() if key != "plain"}, plan.example)
        after = restored(plain, graph, before, found, found.evidence(plain, graph, images))
        nothing_for = after.notes.get("plain", {})
        if nothing_for and nothing_for.keys() == surgery.resolve(graph, plan).keeps.keys():
            name, reason = next(iter(nothing_for.items()))
            hint = "calibrate takes a few hundred images, without labels; none leaves the plan as it is"
            raise InputError(f"'{found.name}' can make up for nothing here, not for '{name}': {reason}", hint=hint)
        return after.made_on(graph.example_shapes)


def _way(way: str | Restoration | None, images: bool, settings: Mapping[str, Any]) -> Restoration:
    if not isinstance(way, Restoration):
        return registry.chosen(way, ClosedForm.name, images=images, **settings)
    if settings:
        raise InputError(f"settings of '{way.name}' are given to itself", hint=f"{type(way).__name__}(...)")
    registry.check_images(way, images)
    return guarded(way)


def verify(model: nn.Module, small: nn.Module, plan: Plan, x: Any = None, *, examples: Iterable[Any] = ()) -> float:
    """Prove that `small` is `model` with `plan` applied.

    Wherever `model` reads removed channels it is given what the plan claims they are worth; its outputs on random
    inputs must then be those of `small`. Nothing of the surgery itself takes part in that.

    Args:
        model: The original network.
        small: The pruned one.
        plan: What was done.
        x: An example input, as for `apply`.
        examples: Further inputs, on which both are run as they are given: other values may take other ways.

    Returns:
        The largest difference of the outputs, relative to the largest output.

    Raises:
        SurgeryError: Outputs disagree.

    Examples:
        >>> import torch, prunekit as pk
        >>> model = pk.load("prunekit:resnet20")
        >>> plan = pk.Plan([pk.Keep("layer1.0.conv1", range(0, 16, 2))])
        >>> small = pk.apply(model, plan)
        >>> pk.verify(model, small, plan) < 1e-5
        True
    """
    with at_work(model, x):
        plain, candidate = (Subject.of(one).plain for one in (model, small))
        graph = _read_for(plan, plain, x, examples)
        return surgery.verify(plain, candidate, plan, graph)
