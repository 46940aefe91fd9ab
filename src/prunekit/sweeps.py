"""Methods over ratios: the curve of accuracy against cost, point by point.

A point that is known already is not measured again, so that a sweep which was interrupted goes on, and one that is
done can be made denser.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunekit import api
from prunekit.errors import PrunekitError
from prunekit.evaluation import EvalResult, Latency
from prunekit.restore.images import Images


@dataclass(frozen=True)
class Variant:
    """A method with settings other than its defaults."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`merge:restore=none`, as the command line writes it."""
        settings = ",".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.method}:{settings}" if settings else self.method


@dataclass(frozen=True)
class SweepPoint:
    """One pruned network: measured, or with the reason why there is none."""

    label: str
    method: str
    settings: Mapping[str, Any]
    ratio: float
    result: EvalResult | None
    error: str | None
    seconds: float

    @property
    def key(self) -> tuple[str, float]:
        """What tells points of one model apart."""
        return self.label, self.ratio

    def to_json(self) -> dict[str, Any]:
        """The JSON form; `from_json` reads it back."""
        result = self.result.to_json() if self.result else None
        return {**vars(self), "settings": dict(self.settings), "result": result}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SweepPoint:
        """Read what `to_json` wrote."""
        return cls(**{**data, "result": result_from_json(data["result"]) if data["result"] else None})


def result_from_json(data: Mapping[str, Any]) -> EvalResult:
    """Read what `EvalResult.to_json` wrote."""
    latency = Latency(**data["latency_ms"]) if data["latency_ms"] else None
    return EvalResult(**{**data, "latency_ms": latency})


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
    """Prune `model` with every variant at every ratio, and measure what comes out.

    `measure` gets a pruned network and its name; `images` are the unlabelled ones to restore from. `on_point` is told
    all points after each new one. What a method refuses becomes a point with an `error`.
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
    """A hash of everything in the network's state, to tell whether a sweep is of the same network."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
