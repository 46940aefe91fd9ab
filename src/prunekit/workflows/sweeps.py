"""Sweeps of methods over ratios: the curve of accuracy against cost, point by point.

A point that is known already is not measured again, so an interrupted sweep can be resumed, and a finished one refined.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from prunekit import api
from prunekit.errors import PrunekitError
from prunekit.evaluation.latency import Latency
from prunekit.evaluation.score import EvalResult
from prunekit.restoration.images import Images

_Record = TypeVar("_Record", "SweepPoint", EvalResult, Latency)


@dataclass(frozen=True)
class Variant:
    """A method with settings other than its defaults.

    Attributes:
        method: Its name.
        settings: The fields of its `Config` that differ, but no ratio.

    Examples:
        >>> import prunekit as pk
        >>> pk.Variant("merge", {"restore": "none"}).label
        'merge:restore=none'
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The command-line form, such as `merge:restore=none`."""
        settings = ",".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.method}:{settings}" if settings else self.method


@dataclass(frozen=True)
class SweepPoint:
    """One pruned network: its measurements, or the reason why there are none.

    Examples:
        >>> import prunekit as pk
        >>> refused = pk.SweepPoint("slim", "slim", {}, 0.9, None, "nothing in this model can be pruned", 0.1)
        >>> pk.SweepPoint.from_json(refused.to_json()) == refused
        True
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    ratio: float
    result: EvalResult | None
    error: str | None
    seconds: float

    @property
    def key(self) -> tuple[str, float]:
        """Label and ratio, which identify a point of a sweep."""
        return self.label, self.ratio

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


def result_from_json(data: Mapping[str, Any]) -> EvalResult:
    """Read the JSON that `EvalResult.to_json` wrote; raise `TypeError` for anything else."""
    timing = data["latency_ms"]
    latency = None if timing is None else _typed(Latency(**timing))
    return _typed(EvalResult(**{**data, "latency_ms": latency}))


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


def sweep(
    model: nn.Module,
    variants: Sequence[Variant],
    ratios: Sequence[float],
    measure: Callable[[nn.Module, str], EvalResult],
    *,
    images: Images | None = None,
    known: Sequence[SweepPoint] = (),
    on_point: Callable[[Sequence[SweepPoint]], None] | None = None,
) -> list[SweepPoint]:
    """Prune `model` with every variant at every ratio, and measure the pruned networks.

    Args:
        model: The network; it stays unchanged.
        variants: Methods with their settings.
        ratios: Shares of channels to remove, between 0 and 1.
        measure: Called with a pruned network and its name.
        images: Unlabelled images to restore from.
        known: Points of an earlier run.
        on_point: Called with all points after each new one.

    Returns:
        A point for each pair; where a method refuses, one with an `error`.

    Examples:
        >>> import prunekit as pk
        >>> points = pk.sweep(pk.load("prunekit:vgg_digits"), [pk.Variant("slim")], [0.25, 0.5, 2],
        ...                   lambda model, name: pk.evaluate(model, name=name))
        >>> [point.result.model if point.result else point.error for point in points]
        ['slim 0.25', 'slim 0.5', 'a ratio must lie between 0 and 1, both excluded; found 2']
    """
    done = {point.key: point for point in known}
    wanted = [(variant, ratio) for variant in variants for ratio in ratios]
    for variant, ratio in wanted:
        if (variant.label, ratio) not in done:
            point = _point(model, variant, ratio, measure, images)
            done[point.key] = point
            if on_point:
                on_point(list(done.values()))
    return [done[variant.label, ratio] for variant, ratio in wanted]


def _point(
    model: nn.Module,
    variant: Variant,
    ratio: float,
    measure: Callable[[nn.Module, str], EvalResult],
    images: Images | None,
) -> SweepPoint:
    started, result, error = time.perf_counter(), None, None
    try:
        config = api.make_config(variant.method, **{**variant.settings, "ratio": ratio})
        pruned = api.prune(variant.method, model, config=config, images=images)
        result = measure(pruned.model, f"{variant.label} {ratio:g}")
    except PrunekitError as refused:
        error = refused.message
    seconds = time.perf_counter() - started
    return SweepPoint(variant.label, variant.method, variant.settings, ratio, result, error, seconds)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the network's whole state, to tell whether a sweep is of the same network."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
