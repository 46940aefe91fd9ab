"""Sequential kernel least squares: refit a pruned network, layer by layer, to what the original computed.

Two copies see the same unlabelled images. Wherever removal has changed what a layer reads, the layer is refitted so
that from the *pruned* copy's input it gives the *original* copy's output: all kernel taps and input channels at once,
by ridge regression shrunk towards the present weights; the constant goes into its bias, or into the running mean of
the batch norm behind it. One forward pass of each copy does it all: the original's notes its outputs at a sample of
positions, and the pruned one's refits each layer at the moment when its input has arrived.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.plan import Plan, Refit
from prunekit.restore.images import Images, gather
from prunekit.restore.least_squares import fit_towards
from prunekit.restore.samples import Layer, inputs_at, outputs_at, positions
from prunekit.surgery import Graph, edit, resolve
from prunekit.surgery.edit import refit
from prunekit.surgery.layer_rules import is_batch_norm

ROWS = 24_000  # positions of each layer, over all images
RIDGE = 1e-2  # of the mean second moment of the layer's inputs
MEMORY = 4 << 30  # bytes of activations

_OPS = ("convolution", "addmm", "mm")


@dataclass(frozen=True)
class _Target:
    """Where a layer's output was sampled, and what the original gave there on the kept channels, `(rows, C)`.

    `stream` is what the original's stream held at the same places, for a layer that adds into one.
    """

    where: Tensor
    output: Tensor
    stream: Tensor | None = None


def calibrate(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    images: Images,
    *,
    ridge: float = RIDGE,
    rows: int = ROWS,
    memory: int = MEMORY,
    seed: int = 0,
) -> Plan:
    """`plan` with refits for the layers whose inputs it changes; its removals and folds are what they start from.

    `images` are normalised, `(N, C, H, W)` or batches of them; labels are never asked for. All images pass as one
    batch: no more of them are used than `memory` bytes of activations allow. Besides, `rows` output vectors of every
    refitted layer are held, and for one layer at a time the square of its fan-in, or of `rows` if that is smaller.
    `notes["calibration"]` tells the number of images and of refitted layers, and which layers were left, and why.
    The same images, seed, machine and number of threads give the same bits.

    Raises:
        InputError: images that do not suit the network, or none.
    """
    with torch.no_grad():
        batch = gather(images, model, graph, memory)
        layers, left = refittable(model, graph, plan)
        targets = _targets(model, graph, plan, layers, batch, rows, seed)
        refits, failed = _walk(edit(model, plan, graph), graph, targets, batch, ridge)
    done = {operation.layer for operation in refits}
    left |= {name: failed.get(name, "its forward is not called") for name in layers if name not in done}
    notes = {"images": len(batch), "layers": len(done.intersection(layers)), "left": left}
    return Plan([*plan.operations, *refits], {**plan.notes, "calibration": notes}, plan.example)


def refittable(model: nn.Module, graph: Graph, plan: Plan) -> tuple[list[str], dict[str, str]]:
    """The layers whose inputs `plan` changes, in execution order; and those that cannot be refitted, why."""
    modules = dict(model.named_modules())
    layers: list[str] = []
    left: dict[str, str] = {}
    for name in _changed(graph, plan):
        reason = _obstacle(graph, name, modules.get(name))
        if reason is None:
            layers.append(name)
        else:
            left[name] = reason
    return layers, left


def _changed(graph: Graph, plan: Plan) -> list[str]:
    """The convolutions and linear layers that lose inputs, or read what has passed through one that does."""
    kept = graph.kept_classes(resolve(graph, plan))
    losing = {name for name, dim in graph.kept_indices(kept) if graph.roles[name, dim] == "in"}
    values: set[int] = set()
    layers: dict[str, None] = {}
    for node in graph.nodes:
        norm = graph.normalised.get(node.index)
        touched = not values.isdisjoint(node.inputs) or not losing.isdisjoint(node.parameters)
        if touched or (norm is not None and not kept[norm[1]].all()):
            values.update(node.outputs)
            if node.op in _OPS:
                layers.update((p.rpartition(".")[0], None) for p in node.parameters if len(graph.shapes[p]) > 1)
    return list(layers)


def _obstacle(graph: Graph, name: str, module: nn.Module | None) -> str | None:
    if not isinstance(module, Layer) or _weight(name) not in graph.parameters:
        return f"a {type(module).__name__} cannot be refitted"
    if len(_calls(graph, name, lambda op: op in _OPS)) != 1:
        return "it is used more than once"
    return None


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _targets(
    model: nn.Module, graph: Graph, plan: Plan, joins: dict[str, Join | None], batch: Tensor, rows: int, seed: int
) -> dict[str, _Target]:
    """What the original network gives at samples of the outputs of these layers, in execution order."""
    kept = graph.kept_indices(graph.kept_classes(resolve(graph, plan)))
    watch, original = Watch(graph, filter(None, joins.values())), copy.deepcopy(model).eval()
    targets: dict[str, _Target] = {}

    def note(name: str, generator: torch.Generator) -> None:
        stays = kept.get((_weight(name), 0))

        def hook(layer: Any, _args: Any, output: Tensor) -> None:
            with watch.aside():
                where = positions(output, layer, rows, generator)
                stream = watch.take(joins[name], output.shape)
                samples = [outputs_at(whole, layer, where) for whole in (output, stream) if whole is not None]
                cut = samples if stays is None else [sample[:, torch.from_numpy(stays)] for sample in samples]
                targets[name] = _Target(where, *cut)

        original.get_submodule(name).register_forward_hook(hook)

    for number, name in enumerate(joins):
        note(name, torch.Generator().manual_seed(seed + number))
    _forward(original, batch, watch)
    plain = {name for name, join in joins.items() if join is None or join.sum in watch.weighted}
    return {name: replace(t, stream=None) if name in plain else t for name, t in targets.items()}


def _walk(
    small: nn.Module,
    graph: Graph,
    targets: dict[str, _Target],
    joins: dict[str, Join | None],
    batch: Tensor,
    ridge: float,
) -> tuple[list[Refit], dict[str, str]]:
    """Refit the layers of `small` in place, each just before it runs: the refits, and the layers that failed."""
    watch = Watch(graph, filter(None, joins.values()))
    refits: list[Refit] = []
    failed: dict[str, str] = {}

    def meet(name: str) -> None:
        norm = _norm_behind(graph, name)

        def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
            with watch.aside():
                target, stream = targets.pop(name), watch.take(joins[name])
                wanted = target.output
                if target.stream is not None and stream is not None:
                    missing = target.stream - outputs_at(stream, layer, target.where)
                    wanted = wanted + _before_norm(small, joins[name], missing)
                try:
                    found = _fitted(small, name, norm, args[0], target.where, wanted, ridge)
                except FloatingPointError as error:
                    failed[name] = str(error)
                    return
                refit(small, Plan(found))
                refits.extend(found)

        small.get_submodule(name).register_forward_pre_hook(hook)

    for name in targets:
        meet(name)
    _forward(small.eval(), batch, watch)
    return refits, failed


def _norm_behind(graph: Graph, layer: str) -> str | None:
    """The batch norm whose running mean can take this layer's constant: it serves this layer alone."""
    norm = graph.batch_norm_after(layer)
    if norm is None or f"{norm}.running_mean" not in graph.shapes:
        return None
    return norm if len(_calls(graph, norm, is_batch_norm)) == 1 else None


def _calls(graph: Graph, module: str, kind: Callable[[str], bool]) -> set[int]:
    """The nodes in which a module does its work (a node counts once, however many of its parameters it uses)."""
    return {node.index for node in graph.calls(module) if kind(node.op)}


def _fitted(small: nn.Module, name: str, norm: str | None, x: Tensor, target: _Target, ridge: float) -> list[Refit]:
    """The refits of one layer, and of the batch norm that takes its constant, to meet the target from the input `x`.

    Raises:
        FloatingPointError: the layer's input or target is not finite.
    """
    layer: Any = small.get_submodule(name)
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    wanted = target.values.reshape(len(target.where), groups, -1).transpose(0, 1).to(wide)  # (groups, rows, outputs)
    chunks = ((part.to(wide), wanted[:, rows]) for rows, part in inputs_at(x, layer, target.where))
    constant = layer.bias is not None or norm is not None
    present = weight.reshape(groups, weight.size(0) // groups, -1)
    fit = fit_towards(present, chunks, len(target.where), ridge, constant=constant)
    values = {"weight": fit.weight.reshape(weight.shape).to(weight)}
    if layer.bias is not None:
        return [Refit(name, {**values, "bias": fit.constant.flatten().to(layer.bias)})]
    if norm is None:
        return [Refit(name, values)]
    mean: Any = small.get_buffer(f"{norm}.running_mean")
    return [Refit(name, values), Refit(norm, {"running_mean": (mean - fit.constant.flatten()).to(mean)})]


def _forward(model: nn.Module, batch: Tensor) -> None:
    try:
        model(batch)
    except RuntimeError as error:
        raise InputError(
            f"the network fails on {len(batch)} calibration images at once: {' '.join(str(error).split())[:160]}",
            hint="pass fewer images",
        ) from error
