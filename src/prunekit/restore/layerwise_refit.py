"""The two passes of a calibration: the original tells what it computes, the pruned copy is refitted as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError, SurgeryError
from prunekit.plan import Plan, Refit
from prunekit.restore.least_squares import Chunks, fit_towards
from prunekit.restore.plain_layers import given
from prunekit.restore.refit_targets import Site
from prunekit.restore.samples import inputs_at, outputs_at, positions
from prunekit.restore.streams import Watch, scale_of
from prunekit.surgery import Graph
from prunekit.surgery.copying import copied
from prunekit.surgery.editing.editor import refit
from prunekit.surgery.execution.hooks import hooked

ROUNDS = 4  # repetitions of a fit that a ReLU follows; twelve gained nothing more
HELD = 512 << 20  # bytes of one layer's rows


@dataclass(frozen=True)
class Target:
    """Where a layer's output was sampled, and what the original gave there on the kept channels, `(rows, C)`.

    `stream` is what the original's residual stream held at the same places, for a layer that adds into one.
    """

    where: Tensor
    output: Tensor
    stream: Tensor | None = None


def note_targets(
    model: nn.Module, graph: Graph, sites: Sequence[Site], batch: Tensor, rows: int, seed: int
) -> dict[str, Target]:
    """Run the original network once: what it gives at random positions of the outputs of these layers."""
    original, watch = copied(model).eval(), Watch(graph, [site.join for site in sites])
    targets: dict[str, Target] = {}

    def hook_for(site: Site, generator: torch.Generator) -> Callable[..., None]:
        def hook(layer: Any, _args: Any, output: Tensor) -> None:
            with watch.aside():
                where, stream = positions(output, layer, rows, generator), watch.take(site.join)
                wholes = [output] if stream is None or stream.shape != output.shape else [output, stream]
                parts = [outputs_at(whole, layer, where) for whole in wholes]
                targets[site.layer] = Target(where, *(p if site.kept is None else p[:, site.kept] for p in parts))

        return hook

    for number, site in enumerate(sites):
        hook = hook_for(site, torch.Generator().manual_seed(seed + number))
        original.get_submodule(site.layer).register_forward_hook(hook)
    _forward(original, batch, watch)
    for site in sites:
        if site.join and site.join.sum in watch.weighted and site.layer in targets:
            targets[site.layer] = replace(targets[site.layer], stream=None)
    return targets


def refit_in_order(
    small: nn.Module, graph: Graph, sites: Sequence[Site], targets: dict[str, Target], batch: Tensor, ridge: float
) -> tuple[list[Refit], dict[str, str]]:
    """Run the pruned network once, refitting each layer in place just before it runs; also, what failed and why.

    `targets` is used up on the way.
    """
    watch = Watch(graph, [site.join for site in sites])
    refits: list[Refit] = []
    failed: dict[str, str] = {}

    def hook_for(site: Site) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            with watch.aside():
                target, stream = targets.pop(site.layer), watch.take(site.join)
                wanted = _wanted(
                    small, site, target, None if stream is None else outputs_at(stream, layer, target.where)
                )
                try:
                    found = _fitted(small, site, given(args, kwargs), wanted, ridge)
                except FloatingPointError as error:
                    failed[site.layer] = str(error)
                    return
                refit(small, Plan(found))
                refits.extend(found)

        return hook

    known = [site for site in sites if site.layer in targets]
    hooks = (small.get_submodule(s.layer).register_forward_pre_hook(hook_for(s), with_kwargs=True) for s in known)
    try:
        with hooked(hooks), watch:
            small.eval()(batch)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise SurgeryError(
            f"the pruned network does not run on what the original does: {' '.join(str(error).split())[:160]}",
            hint="its forward has sizes written into it; compute them from the input",
        ) from error
    return refits, failed


@dataclass(frozen=True)
class Wanted:
    """What a layer of the pruned network should give at the places `where`, `(rows, C)`, before its batch norm.

    A ReLU that reads `scale * output + offset`, and nothing else does, cannot tell one negative number from another:
    then nothing is wanted where both networks are negative. `scale` is None where there is no such ReLU.
    """

    where: Tensor
    output: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None

    def relaxed(self, rows: slice, given: Tensor) -> Tensor:
        """What is wanted of a layer that gives `given`, `(rows, C)`: its loss bounds that of the ReLU's output."""
        assert self.scale is not None
        assert self.offset is not None
        wanted = self.output[rows].to(given)
        now, then = self.scale * given + self.offset, self.scale * wanted + self.offset
        nearest = torch.where(now > 0, -self.offset / self.scale, given)  # zero behind the ReLU, or as it is
        return torch.where((then > 0) | ~self.scale.isfinite(), wanted, nearest)


def _wanted(small: nn.Module, site: Site, target: Target, stream: Tensor | None) -> Wanted:
    """The original's output, and what brings a residual stream back to the original's."""
    if site.join and target.stream is not None and stream is not None:
        missing = (target.stream - stream) / scale_of(small, site.join.norm)
        return Wanted(target.where, target.output + missing)
    if site.rectified:
        return Wanted(target.where, target.output, *_affine(small, site.norm))
    return Wanted(target.where, target.output)


def _affine(small: nn.Module, norm: str | None) -> tuple[Tensor, Tensor]:
    """Scale and offset of a batch norm; one and zero without."""
    scale = scale_of(small, norm)
    if norm is None:
        return scale, torch.zeros_like(scale)
    module: Any = small.get_submodule(norm)
    offset = -module.running_mean * scale
    return scale, offset if module.bias is None else offset + module.bias


def _fitted(small: nn.Module, site: Site, x: Tensor, wanted: Wanted, ridge: float) -> list[Refit]:
    """The refits of a layer, and of the batch norm that takes its constant, to give `wanted` from its input `x`.

    Raises:
        FloatingPointError: the layer's input, or what is wanted of it, is not finite.
    """
    layer: Any = small.get_submodule(site.layer)
    weight, bias, groups = layer.weight, layer.bias, getattr(layer, "groups", 1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    present = weight.reshape(groups, weight.size(0) // groups, -1)

    def grouped(rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), groups, -1).transpose(0, 1)  # (groups, rows, outputs)

    def relax(rows: slice, given: Tensor) -> Tensor:
        return grouped(wanted.relaxed(rows, given.transpose(0, 1).flatten(1)))

    fit = fit_towards(
        present,
        _chunks(x, layer, wanted.where, wide),
        grouped(wanted.output.to(wide)),
        ridge,
        constant=bias is not None or site.norm is not None,
        relax=None if wanted.scale is None else relax,
        rounds=ROUNDS,
    )
    values = {"weight": fit.weight.reshape(weight.shape).to(weight)}
    if bias is not None:
        return [Refit(site.layer, {**values, "bias": fit.constant.flatten().to(bias)})]
    if site.norm is None:
        return [Refit(site.layer, values)]
    mean = small.get_buffer(f"{site.norm}.running_mean")
    shifted = (mean - fit.constant.flatten()).to(mean)
    return [Refit(site.layer, values), Refit(site.norm, {"running_mean": shifted})]


def _chunks(x: Tensor, layer: Any, where: Tensor, wide: torch.dtype) -> Chunks:
    """The layer's inputs at these places; held, unless they take too much, since each round asks for them again."""

    def gather() -> Iterator[tuple[slice, Tensor]]:
        return ((rows, part.to(wide)) for rows, part in inputs_at(x, layer, where))

    if len(where) * layer.weight[0].numel() * getattr(layer, "groups", 1) * wide.itemsize > HELD:
        return gather
    held = list(gather())
    return lambda: held


def _forward(model: nn.Module, batch: Tensor, watch: Watch) -> None:
    try:
        with watch:
            model(batch)
    except RuntimeError as error:
        raise InputError(
            f"the network fails on {len(batch)} calibration images at once: {' '.join(str(error).split())[:160]}",
            hint="pass fewer images",
        ) from error
