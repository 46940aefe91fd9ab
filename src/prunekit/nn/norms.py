"""Running statistics of a gated network's batch norms, one set for each budget.

Which channels are closed decides what the norms of later layers are given, and thus the statistics that suit them: with
those of another budget a network answers far worse than its weights can (Yu and Huang, "Universally Slimmable Networks
and Improved Training Techniques", ICCV 2019, find the same for fixed widths).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.errors import InputError

NAME = "budget_norms"  # the submodule of a gated network that holds the table


class NormTable(nn.Module):
    """Running `means` and `variances` `(budgets, channels)` of all batch norms, in the order of the network's modules,
    for the budgets named in `budgets`. The network's own forward does not use it.
    """

    means: Tensor
    variances: Tensor

    def __init__(self, budgets: Sequence[str], channels: int) -> None:
        super().__init__()
        self.budgets = list(budgets)
        self.register_buffer("means", torch.zeros(len(budgets), channels))
        self.register_buffer("variances", torch.ones(len(budgets), channels))


def norms_of(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield the batch norms that hold running statistics, by name."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def table_of(model: nn.Module) -> NormTable | None:
    """Return the table of a network, or None where it has none."""
    table = getattr(model, NAME, None)
    return table if isinstance(table, NormTable) else None


def present_norms(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return copies of the running means and variances, `(channels,)` each, of all batch norms."""
    values = [(norm.running_mean, norm.running_var) for _, norm in norms_of(model)]
    if not values:
        return torch.zeros(0), torch.zeros(0)
    means, variances = (
        torch.cat([one.detach() for one in column if one is not None]) for column in zip(*values, strict=True)
    )
    return means, variances


def store_norms(model: nn.Module, budget: str) -> None:
    """Note the present statistics of a network as those of `budget`, **in place**."""
    means, variances = present_norms(model)
    if not len(means):
        return
    earlier = table_of(model)
    names = [] if earlier is None else [name for name in earlier.budgets if name != budget]
    table = NormTable([*names, budget], len(means)).to(means)
    for place, name in enumerate(names):
        assert earlier is not None
        row = earlier.budgets.index(name)
        table.means[place], table.variances[place] = earlier.means[row], earlier.variances[row]
    table.means[-1], table.variances[-1] = means, variances
    model.add_module(NAME, table.eval())


def use_norms(model: nn.Module, budget: str) -> None:
    """Give a network the statistics of `budget`, **in place**, where some are stored for it."""
    table = table_of(model)
    if table is None or budget not in table.budgets:
        return
    row = table.budgets.index(budget)
    set_norms(model, (table.means[row], table.variances[row]))


@torch.no_grad()
def set_norms(model: nn.Module, values: tuple[Tensor, Tensor]) -> None:
    """Set the running means and variances, `(channels,)` each, of all batch norms, **in place**."""
    norms = [norm for _, norm in norms_of(model)]
    widths = [norm.num_features for norm in norms]
    for norm, mean, variance in zip(norms, *(torch.split(one, widths) for one in values), strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def drop_norms(model: nn.Module) -> None:
    """Take the table out of a network that has one, **in place**."""
    if table_of(model) is not None:
        delattr(model, NAME)


def describe_norms(model: nn.Module) -> dict[str, Any] | None:
    """Return a network's table as JSON, without its figures; None where it has none."""
    table = table_of(model)
    return None if table is None else {"budgets": table.budgets, "channels": table.means.size(1)}


def restore_norms(model: nn.Module, described: Any, shapes: Mapping[str, Any]) -> None:
    """Add an empty table like the one that `describe_norms` returned, in place.

    Args:
        model: The gated network.
        described: The description, or None to add nothing.
        shapes: The shapes of the weights at hand, by name.

    Raises:
        InputError: `described` is no description of a table, or does not match the weights.
    """
    if described is None:
        return
    try:
        budgets, channels = [str(name) for name in described["budgets"]], int(described["channels"])
        if any(shapes[f"{NAME}.{buffer}"] != [len(budgets), channels] for buffer in ("means", "variances")):
            raise ValueError("sizes other than those of the weights")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the file describes statistics of budgets that cannot be: {error}") from error
    with next(model.parameters()).device:
        model.add_module(NAME, NormTable(budgets, channels))
