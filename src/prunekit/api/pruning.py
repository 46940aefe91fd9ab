"""Pruning with a method: trace, plan, edit, verify."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from prunekit import surgery
from prunekit.api.latency import Timed
from prunekit.api.results import Pruned
from prunekit.api.subject import Subject, at_work, example_input, plain_examples, warn_of_unseen
from prunekit.errors import InputError, SurgeryError
from prunekit.methods import registry
from prunekit.methods.base import Config
from prunekit.methods.partial import part_of
from prunekit.nn.gated import gated_layers
from prunekit.plan import Plan
from prunekit.progress import Progress, counts_to
from prunekit.restoration.images import Images, LabelledImages
from prunekit.spec import origin_of, remember
from prunekit.surgery import Cost, Graph

# How a network is read, if need be with ever more care: sizes written into the code are rare, and looking for them
# takes a third of the time; tensors made of a width are rarer still, and show on real tensors alone.
_READINGS: tuple[Mapping[str, bool], ...] = ({"probe": False}, {"probe": True}, {"values": True})


def prune(
    name: str,
    model: nn.Module,
    x: Any = None,
    config: Config | None = None,
    *,
    images: Images | LabelledImages | None = None,
    examples: Iterable[Any] = (),
    graph: Graph | None = None,
    on_progress: Progress | None = None,
    **settings: Any,
) -> Pruned:
    """Prune with any installed method, by name: trace, plan, edit, verify. Plug-ins are called this way.

    What comes back is the network alone, out of `torch.compile` and parallel wrappers. Computed weights (masks of
    `torch.nn.utils.prune`, weight norms, parametrisations) stay computed where that gives the cut weight; where it
    cannot, they become plain parameters, which a warning and the plan's note `plain_weights` say.

    Args:
        name: The method: `slim`, `merge`, or one of another package (`prunekit methods` lists them).
        model: The network; it stays as it is.
        x: An example input: a tensor `(N, ...)`, a tuple of arguments, or a dictionary of them by name. By default one
            of the shape that the model remembers.
        config: The settings as an object of the method's `Config`, in the place of `settings`.
        images: For methods that restore from data: unlabelled, normalised images `(N, C, H, W)`, or batches of them;
            for `taylor` and other methods that read labels, batches of images and their labels `(N,)`.
        examples: Further inputs, for what `x` does not reach (see `inspect`). Parts of the network that none of them
            reaches are named in a warning and in the plan's notes, as `never_ran`.
        graph: What an earlier call read of the same network with the same inputs, `Pruned.graph`: it is not traced
            again, and losses that were measured for one budget serve the next. Weights must not have changed since.
        on_progress: Called with how much is done and how much there is in all; each part of the work counts from the
            start. `report_progress` tells what is being done as well.
        **settings: The fields of the method's `Config`, such as `ratio`.

    Raises:
        InputError: No such method, settings that do not fit, or nothing to prune.
        SurgeryError: The result could not be proven to compute what was meant.

    Examples:
        >>> import prunekit as pk
        >>> done = pk.prune("merge", pk.load("prunekit:vgg_digits"), target_macs="50%")
        >>> done.after.macs <= 0.5 * done.before.macs
        True
        >>> done.difference < 1e-4
        True
    """
    method = registry.get(name)
    if any(gated_layers(model)):
        raise InputError(
            f"'{name}' prunes networks without gates, and this one has some",
            hint="prune the network first and train gates then; manidp prune-static removes what gates never keep",
        )
    config = config or make_config(name, **settings)
    read_from: Any = images  # with labels only for a method that reads them
    started = time.perf_counter()
    with counts_to(on_progress), at_work(model, x):
        subject = Subject.of(model)
        example, further = example_input(subject.plain, x), plain_examples(examples)

        def read(care: Mapping[str, bool], known: Graph | None = None) -> Pruned:
            whole = known or read_graph(subject.plain, example, further, method.inside_heads, care)
            found = part_of(whole, config.only, config.skip)
            timed = None if config.target_latency is None else Timed.of(subject, found, example, config)
            plan = method.plan(subject.plain, found, timed.planned_by(config) if timed else config, read_from)
            return _applied(name, plan.made_on(found.example_shapes), subject, found, config, started, timed)

        readings = [partial(read, care) for care in _READINGS[0 if images is None else 1 :]]
        pruned = _first_proven([partial(read, {}, graph), *readings] if graph else readings)
    warn_of_unseen(pruned.graph)
    return pruned


def read_graph(
    plain: nn.Module, example: Any, further: Sequence[Any], inside_heads: bool, care: Mapping[str, bool]
) -> Graph:
    """Return the graph of a network; where the widths of heads are looked for, its sizes are too."""
    if inside_heads:
        care = {**care, "probe": True}
    return surgery.trace(plain, example, examples=further, inside_heads=inside_heads, **care)


def _first_proven(readings: Sequence[Callable[[], Pruned]]) -> Pruned:
    for read in readings[:-1]:
        with contextlib.suppress(SurgeryError):
            return read()
    return readings[-1]()


def _applied(
    name: str, plan: Plan, subject: Subject, graph: Graph, config: Config, started: float, timed: Timed | None
) -> Pruned:
    """Edit, verify, and time the result where a latency is the goal."""
    result, difference, edited = subject.proven(plan, graph)
    small = result.model
    if result.left:
        plan = Plan(plan.operations, {**plan.notes, "plain_weights": list(result.left)}, plan.example)
    if graph.never_ran:
        plan = Plan(plan.operations, {**plan.notes, "never_ran": list(graph.never_ran)}, plan.example)
    verified = time.perf_counter()
    if timed is not None:
        plan = Plan(plan.operations, {**plan.notes, **timed.notes(result.plain, graph, plan)}, plan.example)
    kept = surgery.resolve(graph, plan).kept
    before, after = surgery.predict(graph, graph.kept_classes({})), surgery.predict(graph, kept)
    after = replace(after, params=sum(p.numel() for p in small.parameters()))  # folds may have made biases
    _record_step(small, name, config, plan, before, after)
    return Pruned(small, plan, graph, before, after, difference, edited - started, verified - edited)


def make_config(name: str, **settings: Any) -> Config:
    """Return the config of method `name` with these settings.

    Raises:
        InputError: a setting that the method does not have.
    """
    kind = registry.get(name).Config
    known = kind.__dataclass_fields__
    for setting in settings:
        if setting not in known:
            raise InputError(f"'{name}' has no setting '{setting}'", hint="it has " + ", ".join(known))
    return kind(**settings)


def _record_step(small: nn.Module, name: str, config: Config, plan: Plan, before: Cost, after: Cost) -> None:
    origin = origin_of(small)
    if origin is not None:
        step = {
            "method": name,
            "settings": config.to_json(),
            "before": before.to_json(),
            "after": after.to_json(),
            "plan": plan.to_json(),
        }
        remember(small, origin.after(step))
