"""Foreign checkpoints: find the networks and state dicts in them, and choose one.

A place in a checkpoint is written as the keys that lead there, joined by dots; "" is the checkpoint itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

from torch import Tensor, nn

from prunekit.errors import InputError

StateDict = Mapping[str, Tensor]

_SHOWN = 5


def is_state_dict(value: Any) -> TypeGuard[StateDict]:
    """Return whether `value` maps names to tensors, and to nothing else."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def networks(content: Any, name: str) -> dict[str, StateDict | nn.Module]:
    """Return the state dicts and modules in the content of the file `name`, by their places.

    The state of an optimiser is not among them.

    Raises:
        InputError: There is none; the message says what is there instead.
    """
    if is_state_dict(content):
        return {"": content}
    found: dict[str, StateDict | nn.Module] = {}
    seen, waiting = {id(content)}, deque([("", content)])
    while waiting:
        place, value = waiting.popleft()
        if isinstance(value, nn.Module):
            found[place] = value
        elif isinstance(value, Mapping) and "param_groups" not in value:
            weights = _weights(value)
            if weights:
                found[place] = weights
            for key, inner in () if weights else value.items():
                # a file may hold itself
                if isinstance(key, str) and not key.startswith("optim") and id(inner) not in seen:
                    seen.add(id(inner))
                    waiting.append((f"{place}.{key}" if place else key, inner))
    if not found:
        raise _nothing(content, name)
    return found


def at(found: Mapping[str, StateDict | nn.Module], key: str, name: str) -> StateDict | nn.Module:
    """Return the network at the place `key`, or the part of a state dict whose names begin with the rest of `key`.

    Raises:
        InputError: There is none.
    """
    if key in found:
        return found[key]
    for place, value in found.items():
        if isinstance(value, Mapping) and (key.startswith(f"{place}.") or not place):
            prefix = key[len(place) + 1 if place else 0 :] + "."
            part = {entry.removeprefix(prefix): tensor for entry, tensor in value.items() if entry.startswith(prefix)}
            if part:
                return part
    places = [place for place in found if place]
    hint = "there are weights at " + _listed(places) if places else "it holds one network, without a key"
    raise InputError(f"{name} has no weights at '{key}'", hint=hint)


def without(found: Mapping[str, StateDict], patterns: Sequence[str], name: str) -> dict[str, StateDict]:
    """Return the state dicts without the keys that match one of `patterns`, such as `loss.*`.

    Raises:
        InputError: A pattern matches no key.
    """
    keys = sorted({key for state in found.values() for key in state})
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in keys):
            hint = "there are keys such as " + ", ".join(keys[:3])
            raise InputError(f"{name} has no key like '{pattern}' to ignore (--ignore-keys)", hint=hint)
    ignored = {key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)}
    return {place: {key: state[key] for key in state if key not in ignored} for place, state in found.items()}


def hyper_parameters(content: Any) -> dict[str, Any]:
    """Return the plain values among the arguments that Lightning stores beside the weights of a network."""
    stored = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if not isinstance(stored, Mapping):
        return {}
    plain = str | int | float | bool | None
    return {name: value for name, value in stored.items() if isinstance(name, str) and isinstance(value, plain)}


def only(found: Mapping[str, Any], name: str, what: str) -> Any:
    """Return the only entry of `found`; raise `InputError` with their places where there are several."""
    if len(found) == 1:
        return next(iter(found.values()))
    places = list(found)
    raise InputError(
        f"{name} holds {len(found)} {what}: {_listed(places)}", hint=f"say which: key (--key) {places[-1] or places[0]}"
    )


def _weights(value: Mapping[Any, Any]) -> StateDict | None:
    """Return the tensors of a mapping of weights, beside which it may hold notes such as the epoch; None otherwise.

    Counters, states of random generators and averages of a metric are tensors too; weights include a
    floating-point or complex tensor of at least one dimension.
    """
    tensors = {key: tensor for key, tensor in value.items() if isinstance(key, str) and isinstance(tensor, Tensor)}
    others = [inner for inner in value.values() if not isinstance(inner, Tensor)]
    if any(isinstance(inner, Mapping | list | tuple | nn.Module) for inner in others):
        return None
    real = any(tensor.dim() > 0 and (tensor.is_floating_point() or tensor.is_complex()) for tensor in tensors.values())
    return tensors if real else None


def _nothing(content: Any, name: str) -> InputError:
    """Return the error that describes the content instead, objects by their types."""
    if not isinstance(content, Mapping):
        return InputError(f"{name} holds {type(content).__name__}, expected a state dict")
    entries = [(key if isinstance(key, str) else type(key).__name__) + _kind(inner) for key, inner in content.items()]
    found = "the keys " + _listed(entries) if entries else "an empty dict"
    return InputError(f"{name} holds no state dict, but {found}", hint="expected the state_dict() of a network in it")


def _kind(value: object) -> str:
    return "" if type(value).__module__ == "builtins" else f" ({type(value).__name__})"


def _listed(names: list[str]) -> str:
    return ", ".join(name or "(at the top)" for name in names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
