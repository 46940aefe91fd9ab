"""The vocabulary of sweeps: variants of methods, axes of budgets, and points with their figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from prunekit import api
from prunekit.errors import InputError, unknown_name
from prunekit.evaluation.latency import Latency
from prunekit.evaluation.score import EvalResult
from prunekit.methods import registry
from prunekit.methods.base import Config
from prunekit.methods.budget import AXES, check_budget
from prunekit.methods.manidp.config import GateRecipe

GATES = "manidp"
"""The variant that gets gates instead of fewer channels."""

_Record = TypeVar("_Record", "SweepPoint", EvalResult, Latency)


@dataclass(frozen=True)
class Variant:
    """A method with settings other than its defaults.

    Attributes:
        method: Its name, or `manidp`.
        settings: The fields of its `Config` (of `GateRecipe` for `manidp`) that differ, but no budget.

    Examples:
        >>> import prunekit as pk
        >>> pk.Variant("merge", {"restore": "none"}).label
        'merge:none'
        >>> pk.Variant("merge", {"restore": "moments", "widths": "uniform"}).label
        'merge:moments,widths=uniform'
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The command-line form, such as `merge:moments`; the way of restoring stands first, by its name alone."""
        others = [
            f"{_flag(self.method, key)}={text}"
            for key, value in self.settings.items()
            if key != "restore"
            for text in _values(value)
        ]
        settings = ",".join([*([self.settings["restore"]] if "restore" in self.settings else []), *others])
        return f"{self.method}:{settings}" if settings else self.method

    def check(self) -> None:
        """Raise `InputError` for a method or a setting that there is not, and for one that says how much is to go."""
        if ({"keep"} if self.method == GATES else set(AXES)) & set(self.settings):
            raise InputError(
                f"{self.label} says how much is to go",
                hint="--ratios says that, or --target-macs, --target-params or --target-latency (from Python: budgets)",
            )
        if self.method == GATES:
            GateRecipe(**self.settings)
        else:
            api.make_config(self.method, **self.settings)


def _flag(method: str, field_name: str) -> str:
    """Return a setting as it is called on the command line."""
    known = settings_of(method).__dataclass_fields__ if method in (*registry.names(), GATES) else {}
    flag = known[field_name].metadata.get("flag") if field_name in known else None
    return str(flag or field_name.replace("_", "-")).lstrip("-")


def _values(value: object) -> list[str]:
    """Return the value of a setting as on the command line, where one that has many is given once for each."""
    if isinstance(value, Mapping):
        return [f"{name}={_value(one)}" for name, one in value.items()]
    return [_value(one) for one in value] if isinstance(value, list | tuple) else [_value(value)]


def _value(value: object) -> str:
    """Return the value of a setting as on the command line."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else f"{value}"


def settings_of(method: str) -> type[Config | GateRecipe]:
    """Return the class of a variant's settings.

    Raises:
        InputError: There is no such method; the nearest names are suggested.
    """
    if method == GATES:
        return GateRecipe
    if method not in registry.names():
        raise unknown_name("method", method, [*registry.names(), GATES])
    return registry.get(method).Config


def default_methods() -> list[str]:
    """Return the methods that are swept where none is named: no baselines, and none that needs heads of attention."""
    every = {name: registry.get(name) for name in registry.names()}
    return [name for name, method in every.items() if registry.is_general(method)]


def check_axis(axis: str, budgets: tuple[float | str, ...]) -> None:
    """Raise `InputError` for an axis that there is not, and for budgets that make no sense whatever the network."""
    if axis not in AXES:
        raise unknown_name("axis", axis, AXES)
    for budget in budgets:
        given: dict[str, Any] = {axis: budget}
        check_budget(Config(**given))


@dataclass(frozen=True)
class SweepPoint:
    """One network made with one budget and one seed: its measurements, or the reason why there are none.

    Attributes:
        label: The variant, as on the command line.
        method: Its method.
        settings: The settings of the method other than its defaults.
        ratio: The share of channels to remove, where the sweep's axis is that.
        result: The measurements, `macs` being the mean over images where the network has gates.
        error: Why there are none.
        seconds: The time that making and measuring the network took.
        target_macs: The budget, where the axis is MACs, such as `50%`.
        target_params: The same for parameters.
        target_latency: The same for the time of a pass, such as `60%` or `5ms`.
        seed: The seed of everything random.
        kept: What tuning came to on the validation images: `epoch` of `epochs` (0: as it was before), `accuracy` and
            `start`, the one before; None without tuning.

    Examples:
        >>> import prunekit as pk
        >>> refused = pk.SweepPoint("slim", "slim", {}, 0.9, None, "nothing in this model can be pruned", 0.1)
        >>> pk.SweepPoint.from_json(refused.to_json()) == refused
        True
        >>> refused.budget
        ('ratio', 0.9)
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    ratio: float | None
    result: EvalResult | None
    error: str | None
    seconds: float
    target_macs: str | None = None
    target_params: str | None = None
    target_latency: str | None = None
    seed: int = 0
    kept: Mapping[str, Any] | None = None

    @property
    def budget(self) -> tuple[str, float | str]:
        """The axis, and how far along it.

        Raises:
            TypeError: There is none.
        """
        for axis in AXES:
            value: float | str | None = getattr(self, axis)
            if value is not None:
                return axis, value
        raise TypeError("a point has no budget")

    @property
    def key(self) -> tuple[str, str, int]:
        """Label, budget and seed, which identify a point of a sweep."""
        return self.label, written(self.budget[1]), self.seed

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `from_json` reads it back."""
        result = self.result.to_json() if self.result else None
        return {**vars(self), "settings": dict(self.settings), "result": result}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SweepPoint:
        """Read the JSON that `to_json` wrote; raise `TypeError` for anything else."""
        result = data["result"]
        point = cls(**{**data, "result": None if result is None else result_from_json(result)})
        return _typed(point)


def written(budget: float | str) -> str:
    """Return a budget as on the command line."""
    return budget if isinstance(budget, str) else f"{budget:g}"


def result_from_json(data: Mapping[str, Any]) -> EvalResult:
    """Read the JSON that `EvalResult.to_json` wrote; raise `TypeError` for anything else."""
    result = EvalResult.from_json(data)
    if result.latency_ms is not None:
        _typed(result.latency_ms)
    return _typed(result)


def _typed(value: _Record) -> _Record:
    """Return `value` if its fields have their declared types, where an int may stand for a float.

    Raises:
        TypeError: A field has another type.
    """
    for name, hint in get_type_hints(type(value)).items():
        found = getattr(value, name)
        kinds = _kinds(hint)
        whole = isinstance(found, int) and not isinstance(found, bool) and float in kinds
        if not isinstance(found, kinds) and not whole:
            raise TypeError(f"{name} is {type(found).__name__}")
    return value


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the classes that an annotation allows."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for member in get_args(hint) for kind in _kinds(member))
    return (get_origin(hint) or hint,)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the network's whole state, to tell whether a sweep is of the same network."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
