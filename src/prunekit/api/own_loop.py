"""What a training loop of one's own needs beside `slim` and `merge`: an optimiser narrowed with its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn, optim

from prunekit import surgery
from prunekit.api.results import Pruned
from prunekit.errors import InputError
from prunekit.nn.channels import SelectedNorm
from prunekit.surgery.editing.editor import take
from prunekit.surgery.graph.labels import Ids


def narrow_state(optimizer: optim.Optimizer, model: nn.Module, pruned: Pruned) -> None:
    """Hand an optimiser over from a network to its pruned one, so that training goes on where it stood.

    The optimiser, in place, gets the parameters of the pruned network for those of the network, group by group. What it
    keeps for a parameter (momentum, first and second moments, any tensor as large as the parameter along each of its
    dimensions, or one there) loses the entries that the parameter has lost; counters stay. A bias that surgery has
    made has no state yet, and is trained with the weight beside it; so does the constant of a residual block that has
    gone, which is trained with the block's first parameter. Schedulers of the learning rate go on as they are.

    Args:
        optimizer: Any optimiser of `torch.optim` or like those. Parameters that are not the network's stay in it.
        model: The network that was pruned, whose parameters the optimiser has.
        pruned: What `slim`, `merge` or `prune` has returned for it.

    Raises:
        InputError: The optimiser has no parameter of the network, keeps something of another shape, or the plan makes
            gates, whose parameters are new. The optimiser is then as it was.

    Examples:
        >>> import torch, prunekit as pk
        >>> model = pk.load("prunekit:resnet20").train()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.rand(2, 3, 32, 32)).sum().backward()
        >>> optimizer.step()
        >>> done = pk.slim(model, ratio=0.5)
        >>> pk.narrow_state(optimizer, model, done)
        >>> small = done.model.get_parameter("layer1.0.conv1.weight")
        >>> optimizer.state[small]["momentum_buffer"].shape == small.shape
        True
    """
    if pruned.plan.gates:
        raise InputError("the plan makes gates, which have parameters of their own", hint="make a new optimiser")
    old = {id(parameter): name for name, parameter in surgery.unwrapped(model).named_parameters()}
    resolved = surgery.resolve(pruned.graph, pruned.plan)
    new, indices = dict(pruned.model.named_parameters()), resolved.indices
    states: dict[Tensor, Any] = {}
    groups, met = [], set[str]()
    for group in optimizer.param_groups:
        parameters: list[Tensor] = []
        for parameter in group["params"]:
            name = old.get(id(parameter))
            block = next((block for block in resolved.skipped if name and block.holds(name)), None)
            if name and block is not None:  # what is left of it, once, where its first parameter was
                constant = (
                    [] if met & {other for other in old.values() if block.holds(other)} else [new[block.constant]]
                )
                parameters += constant
                met.add(name)
                continue
            state = optimizer.state.get(parameter, {})
            successor = parameter if name is None else _successor(pruned.model, name, new)
            if name is not None:
                met.add(name)
                cut = {dim: index for (own, dim), index in indices.items() if own == name}
                state = _narrowed(state, parameter, successor, cut, name)
            parameters += [successor, *_made_beside(name, successor, new, old)]
            if state:
                states[successor] = state
        groups.append(parameters)
    if not met:
        raise InputError(
            "the optimiser has no parameter of this network", hint="give the network that was pruned, not its copy"
        )
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    optimizer.state.clear()
    optimizer.state.update(states)


def _successor(small: nn.Module, name: str, new: Mapping[str, nn.Parameter]) -> nn.Parameter:
    """Return the parameter of the pruned network that stands for the one of this name."""
    path, _, leaf = name.rpartition(".")
    module = dict(small.named_modules()).get(path)
    if isinstance(module, SelectedNorm):
        name = f"{path}.norm.{leaf}"
    if name not in new:
        raise InputError(f"the pruned network has no parameter '{name}'", hint="make a new optimiser")
    return new[name]


def _made_beside(
    name: str | None, successor: Tensor, new: Mapping[str, nn.Parameter], old: Mapping[int, str]
) -> list[nn.Parameter]:
    """Return the bias that surgery has made beside the weight of this name."""
    if name is None or name.rpartition(".")[2] != "weight":
        return []
    bias = f"{name.removesuffix('weight')}bias"
    made = bias in new and bias not in old.values() and new[bias] is not successor
    return [new[bias]] if made else []


def _narrowed(
    state: Mapping[str, Any], parameter: Tensor, successor: Tensor, cut: Mapping[int, Ids], name: str
) -> dict[str, Any]:
    """Return an optimiser's state of `parameter` for its successor; `cut` says what stays in each dimension."""
    found = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and cut:
            sizes = list(zip(value.shape, parameter.shape, strict=False))
            if value.dim() != parameter.dim() or any(size not in (1, whole) for size, whole in sizes):
                shapes = f"{tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
                raise InputError(f"the optimiser keeps '{key}' of '{name}' as {shapes}", hint="make a new optimiser")
            for dim, index in cut.items():
                value = take(value, dim, index) if value.shape[dim] == parameter.shape[dim] else value
        found[key] = value.clone() if isinstance(value, Tensor) else value
    return found if _fits(found, successor) else {}


def _fits(state: Mapping[str, Any], successor: Tensor) -> bool:
    """Return whether the state fits: that of tensors which a weight is computed from may not, and begins anew."""
    kept = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    return all(size in (1, whole) for value in kept for size, whole in zip(value.shape, successor.shape, strict=False))
