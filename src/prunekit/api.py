"""The Python face of prunekit; the command line is a thin layer on it. Exported by `prunekit/__init__.py`."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn

from prunekit import surgery
from prunekit.errors import InputError, PrunekitError, SurgeryError
from prunekit.methods import registry
from prunekit.methods.base import Config, Method
from prunekit.nn.gated import gated_layers
from prunekit.plan import Plan
from prunekit.restore.images import Images
from prunekit.spec import origin_of, remember
from prunekit.surgery import Cost, Graph
from prunekit.surgery.editing.reparametrised import Result
from prunekit.surgery.tracing.tracer import example_of

if TYPE_CHECKING:
    from prunekit.exporting.parity import Batch
    from prunekit.exporting.writer import Exported


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: the channel groups and the cost of every layer."""

    graph: Graph = field(repr=False)
    cost: Cost

    @property
    def groups(self) -> tuple[surgery.ChannelGroup, ...]:
        """The channel groups, in execution order."""
        return self.graph.groups


@dataclass(frozen=True)
class Pruned:
    """A finished surgery: the new model, the plan, what it cost before and after, and the proof.

    `difference` is the largest relative difference between the masked original and the sliced network; `seconds` the
    time for tracing, planning and editing, `verify_seconds` that of the proof.
    """

    model: nn.Module
    plan: Plan
    graph: Graph = field(repr=False)
    before: Cost
    after: Cost
    difference: float
    seconds: float
    verify_seconds: float


def load(
    source: str | os.PathLike[str] | BinaryIO, *, runtime: str | None = None, budget: str | None = None, **reading: Any
) -> nn.Module:
    """A network in eval mode; `reading` is what `prunekit.checkpoint.load` takes: `arch`, `trust_pickle` and others.

    Networks with gates (ManiDP) also take the name of a stored `budget`, whose thresholds they then have, and a
    `runtime` (`masked`, `gather`, `buckets` or `auto`): the network returned then runs that way, for inference alone.

    Raises:
        InputError: the source is no such network, or has no such budget or runtime.
    """
    from prunekit.checkpoint import load as read

    model = read(source, **reading)
    if budget is not None:
        from prunekit.methods.manidp.thresholds import use_budget

        use_budget(model, budget)
    if runtime is None:
        return model
    from prunekit.methods.manidp.runtimes.choose import accelerate

    return accelerate(model, runtime)[0]


def inspect(model: nn.Module, x: Any = None, *, examples: Iterable[Any] = ()) -> Inspection:
    """Trace `model` on the example input `x` (default: the input that the model remembers).

    `x` is a tensor, a tuple of arguments, or a dictionary of them by their names. `examples` are more of these, for
    what `x` does not reach: another head, an early exit, an optional input. What they reach is pruned with the rest.
    """
    with _at_work(model, x):
        plain = surgery.materialised(surgery.unwrapped(model))
        graph = surgery.trace(plain, _example(plain, x), examples=_plain(examples))
        return Inspection(graph, surgery.cost_of(plain, graph))


# How a network is read, if need be with ever more care: sizes written into the code are rare, and looking for them
# takes a third of the time; tensors made of a width are rarer still, and show on real tensors alone.
_READINGS: tuple[Mapping[str, bool], ...] = ({"probe": False}, {"probe": True}, {"values": True})


def prune(
    name: str,
    model: nn.Module,
    x: Any = None,
    config: Config | None = None,
    *,
    images: Images | None = None,
    examples: Iterable[Any] = (),
    **settings: Any,
) -> Pruned:
    """Run an installed method: trace, plan, edit, verify. `settings` are the fields of the method's config.

    `images`, for methods that restore from data, are normalised and unlabelled: `(N, C, H, W)` or batches of them.
    `examples` are further inputs, for what `x` does not reach (see `inspect`); parts of the network that none of them
    reaches are named in a warning and in the plan's notes, as `never_ran`.
    What comes back is the network alone, out of `torch.compile` and parallel wrappers. Computed weights (masks of
    `torch.nn.utils.prune`, weight norms, parametrisations) stay computed where that gives the cut weight; where it
    cannot, they become plain parameters, which a warning and the plan's note `plain_weights` say.

    Raises:
        InputError: settings that do not fit, or nothing to prune.
        SurgeryError: the result could not be proven to compute what was meant.
    """
    method = registry.get(name)
    if any(gated_layers(model)):
        raise InputError(
            f"'{name}' prunes networks without gates, and this one has some",
            hint="prune the network first and train gates then; manidp prune-static removes what gates never keep",
        )
    config = config or make_config(name, **settings)
    started = time.perf_counter()
    with _at_work(model, x):
        subject = _Subject.of(model)
        example, further = _example(subject.plain, x), _plain(examples)

        def read(**care: bool) -> Pruned:
            graph = surgery.trace(subject.plain, example, examples=further, **care)
            return _prune(method, subject, graph, config, images, started)

        pruned = _first_proven(read, _READINGS[0 if images is None else 1 :])
    _warn_of_unseen(pruned.graph)
    return pruned


def _first_proven(read: Callable[..., Pruned], readings: Sequence[Mapping[str, bool]]) -> Pruned:
    for care in readings[:-1]:
        with contextlib.suppress(SurgeryError):
            return read(**care)
    return read(**readings[-1])


def _warn_of_unseen(graph: Graph) -> None:
    """Say what no example has reached: what it reads may be gone."""
    names, more = ", ".join(graph.never_ran[:5]), len(graph.never_ran) - 5
    if names:
        text = f"never ran on the example input: {names}{f' and {more} more' if more > 0 else ''}"
        warnings.warn(f"{text}; what they read may be gone (examples=[...] can reach them)", stacklevel=3)


@dataclass(frozen=True)
class _Subject:
    """A network, out of its wrappers, and the same one with plain weights where it computes them."""

    model: nn.Module
    plain: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> _Subject:
        model = surgery.unwrapped(model)
        return cls(model, surgery.materialised(model))

    def proven(self, plan: Plan, graph: Graph) -> tuple[Result, float, float]:
        """The pruned network, the largest difference in its proof, and when that began."""
        result = surgery.pruned(self.model, self.plain, plan, graph)
        edited = time.perf_counter()
        difference = surgery.verify(self.plain, result.plain, plan, graph)
        if result.left:
            names = ", ".join(result.left)
            warnings.warn(
                f"plain weights now, since their parametrisation does not hold for fewer channels: {names}",
                stacklevel=4,
            )
        return result, difference, edited


@contextlib.contextmanager
def _at_work(model: nn.Module, x: Any) -> Iterator[None]:
    """Without compilation and inference mode, and with what is behind some failures said.

    An exported program may be refused where its network is not, and a forward may fail on the type of `x`.
    """
    from prunekit.programs.program import ExportedProgram

    try:
        with surgery.uncompiled(), torch.inference_mode(False):
            yield
    except (InputError, SurgeryError, RuntimeError) as error:
        if isinstance(model, ExportedProgram) and isinstance(error, PrunekitError):
            error.hint = (
                "an exported program has sizes written into it; the checkpoint with its architecture (--arch) may be "
                "pruned where it cannot"
            )
        elif isinstance(error, RuntimeError) or error.__cause__ is not None:  # the forward has failed
            surgery.check_types(model, x)
        raise


def _prune(
    method: Method, subject: _Subject, graph: Graph, config: Config, images: Images | None, started: float
) -> Pruned:
    """Plan, edit, verify."""
    plan = method.plan(subject.plain, graph, config, images).made_on(graph.example_shapes)
    result, difference, edited = subject.proven(plan, graph)
    small = result.model
    if result.left:
        plan = Plan(plan.operations, {**plan.notes, "plain_weights": list(result.left)}, plan.example)
    if graph.never_ran:
        plan = Plan(plan.operations, {**plan.notes, "never_ran": list(graph.never_ran)}, plan.example)
    verified = time.perf_counter()
    kept = graph.kept_classes(surgery.resolve(graph, plan))
    before, after = surgery.predict(graph, graph.kept_classes({})), surgery.predict(graph, kept)
    after = replace(after, params=sum(p.numel() for p in small.parameters()))  # folds may have made biases
    _record_step(small, method.name, config, plan, before, after)
    return Pruned(small, plan, graph, before, after, difference, edited - started, verified - edited)


def make_config(name: str, **settings: Any) -> Config:
    """The config of method `name` with these settings.

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


def slim(model: nn.Module, x: Any = None, *, examples: Iterable[Any] = (), **settings: Any) -> tuple[nn.Module, Plan]:
    """Network Slimming: a new, smaller model and the plan; `prunekit.methods.slim.method.SlimConfig` has the settings.

    `x` and `examples` are what `prune` takes.
    """
    result = prune("slim", model, x, examples=examples, **settings)
    return result.model, result.plan


def merge(model: nn.Module, x: Any = None, *, examples: Iterable[Any] = (), **settings: Any) -> tuple[nn.Module, Plan]:
    """Neuron Merging: a new, smaller model and the plan; `prunekit.methods.merge.method.MergeConfig` has the settings.

    `x` and `examples` are what `prune` takes.
    """
    result = prune("merge", model, x, examples=examples, **settings)
    return result.model, result.plan


def apply(model: nn.Module, plan: Plan, x: Any = None, *, examples: Iterable[Any] = ()) -> nn.Module:
    """Apply a plan, one that a method returned or one written by hand: a new model, verified.

    The same plan on the same model gives the same weights, bit for bit. `x` is an example input; by default the one
    that the model remembers, or the one that the plan was made with. Where the plan was made with further `examples`,
    they are needed again.

    Raises:
        SurgeryError: the plan does not fit, or the result does not compute what was meant.
    """
    with _at_work(model, x):
        subject = _Subject.of(model)
        graph = surgery.trace(subject.plain, _example(subject.plain, x, plan), examples=_plain(examples))
        small = subject.proven(plan, graph)[0].model
    _warn_of_unseen(graph)
    return small


def verify(model: nn.Module, small: nn.Module, plan: Plan, x: Any = None, *, examples: Iterable[Any] = ()) -> float:
    """Prove that `small` is `model` with `plan` applied; the largest relative difference of the outputs.

    It is also run on further `examples`, as they are given: other values may take other ways.

    Raises:
        SurgeryError: masked and sliced outputs disagree.
    """
    with _at_work(model, x):
        plain, candidate = (surgery.materialised(surgery.unwrapped(one)) for one in (model, small))
        graph = surgery.trace(plain, _example(plain, x, plan), examples=_plain(examples))
        return surgery.verify(plain, candidate, plan, graph)


def export(
    model: nn.Module,
    target: str | Path,
    x: Any = None,
    *,
    images: Iterable[Batch] | None = None,
    force: bool = False,
    **settings: Any,
) -> Exported:
    """Write `model` as `.pt2` or `.onnx`, which need neither prunekit nor the model's code.

    `x` is an example input `(N, ...)`, or a tuple of all positional inputs; by default an image as the model remembers
    it. Before it is kept, the file is run and every output compared with the model's on `images` (normalised batches,
    with their labels), or else on random inputs; see `prunekit.exporting.writer`. `settings` are the fields of its
    `ExportOptions`.

    Raises:
        InputError: an unknown suffix, a target that exists, or a package that is missing.
        SurgeryError: the model cannot be exported.
        CheckFailed: the file's outputs are not the model's. Nothing is written.
    """
    from prunekit.exporting.writer import ExportOptions
    from prunekit.exporting.writer import export as write

    model = surgery.materialised(surgery.unwrapped(model))
    return write(model, target, _example(model, x), options=ExportOptions(**settings), images=images, force=force)


def _plain(examples: Iterable[Any]) -> list[Any]:
    return [surgery.plain_example(one) for one in examples]


def _example(model: nn.Module, x: Any, plan: Plan | None = None) -> Any:
    """The example input: as given, or as the plan or the model remembers it."""
    from prunekit.programs.program import filled

    if x is not None:
        return surgery.plain_example(x)
    if plan is not None and plan.example:
        return tuple(example_of(model, shape) for shape in plan.example)
    origin = origin_of(model)
    if origin is None or origin.input is None:
        raise InputError("an example input is needed: this model does not say what it reads", hint="pass x=...")
    return filled(model, example_of(model, (1, *origin.input.shape)))
