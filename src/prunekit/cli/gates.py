"""Networks with gates among those that are measured: their budgets, and what an image costs in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunekit.errors import InputError
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.data import Examples
    from prunekit.evaluation.score import EvalResult
    from prunekit.exporting.runtimes import ExportedClassifier

_BATCH_SIZE = 256


def has_gates(model: nn.Module) -> bool:
    """Return whether a network has gates."""
    from prunekit.nn.gated import gated_layers

    return any(gated_layers(model))


def check_flags(models: Sequence[nn.Module], asked: Mapping[str, object]) -> None:
    """Raise `InputError` where a flag of gates was `asked` for, with a value by its name, and no network has any."""
    given = [name for name, value in asked.items() if value is not None]
    if given and not any(map(has_gates, models)):
        raise InputError(
            f"--{given[0].replace('_', '-')} is for networks with gates", hint="prunekit manidp train makes them"
        )


def choose_budget(model: nn.Module, name: str, own: str | None, general: str | None) -> None:
    """Set the thresholds of the budget `own`, named with the model called `name`, or else of the `general` one.

    Raises:
        InputError: The model has no gates and a budget of its own, or a budget is not stored in it.
    """
    from prunekit.methods.manidp.budgets import use_budget

    if own is not None and not has_gates(model):
        raise InputError(f"{name} names a budget, and has no gates", hint=f"leave @{own} out")
    budget = own or general
    if budget is not None and has_gates(model):
        try:
            use_budget(model, budget)
        except InputError as error:
            raise InputError(f"{name}: {error.message}", hint=error.hint) from error


def with_mean_cost(
    output: Output, model: nn.Module, images: Examples | None, result: EvalResult, batch_size: int
) -> EvalResult:
    """Return the result of a network with gates, with what they did: its MACs are those of an image on average.

    These include the gates' own. Without images they are those with every channel kept, which a note says.
    """
    from prunekit.methods.manidp.assess import assess
    from prunekit.methods.manidp.budgets import used_budget
    from prunekit.methods.manidp.gating import baseline_of
    from prunekit.methods.manidp.record import observe
    from prunekit.methods.manidp.view import GatedView
    from prunekit.nn.gated import gated_layers
    from prunekit.tasks.sets import labelled_batches

    view = GatedView.of(model, result.graph)
    facts: dict[str, Any] = {"dense_macs": view.cost.dense, "gate_macs": view.cost.gates}
    macs = view.cost.dense + view.cost.gates
    if images is not None:
        found = assess(observe(view, labelled_batches(images, batch_size)), view.cost)
        facts, macs = found.to_json(), round(found.with_gates["mean"])
    else:
        output.note(f"{result.model}: MACs are those with every channel kept; the mean over images needs --data")
    facts["budgets"] = list(next(layer for _, layer in gated_layers(model)).budgets)
    facts["budget"] = used_budget(model)
    facts["baseline_accuracy"] = baseline_of(model)
    return dataclasses.replace(result, macs=macs, runtime="masked", gates=facts)


def with_mean_of_buckets(
    output: Output, model: ExportedClassifier, images: Examples | None, result: EvalResult
) -> EvalResult:
    """Return the result of a folder of sub-networks with its MACs, the mean over the images, router included.

    Without images they are unknown, which a note says. Other files keep theirs.
    """
    from prunekit.methods.manidp.runtimes.folder import BucketFolder

    if not isinstance(model, BucketFolder):
        return result
    if images is None:
        output.note(f"{result.model}: MACs depend on the sub-network that an image goes to; the mean needs --data")
        return result
    return dataclasses.replace(result, macs=round(model.mean_macs(images.batches(_BATCH_SIZE))))
