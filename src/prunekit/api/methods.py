"""Slim and merge with their settings as keywords, which editors and type checkers know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from prunekit.api.pruning import prune
from prunekit.api.results import Pruned
from prunekit.methods.merge.config import MergeConfig
from prunekit.methods.slim.config import SlimConfig
from prunekit.progress import Progress
from prunekit.restoration.images import Images
from prunekit.restoration.ways import Calibrate


def slim(
    model: nn.Module,
    x: Any = None,
    *,
    images: Images | None = None,
    examples: Iterable[Any] = (),
    on_progress: Progress | None = None,
    ratio: float | Mapping[str, float] | None = None,
    target_macs: str | float | None = None,
    target_params: str | float | None = None,
    target_latency: str | None = None,
    latency_on: Literal["pytorch", "onnx"] | None = None,
    latency_batch: int | None = None,
    latency_threads: int | None = None,
    round_to: int = 1,
    min_channels: int = 1,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    ratio_of: Mapping[str, float] | None = None,
    scope: Literal["all", "inner"] = "all",
    aggregate: Literal["max", "mean", "sum"] = "max",
    restore: str | None = None,
    memory: str = Calibrate.memory,
) -> Pruned:
    """Prune with Network Slimming: channels whose batch-norm gamma is small go, by one threshold for all layers.

    After Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (ICCV 2017), section 3.3.
    Exactly one of `ratio`, `target_macs`, `target_params` and `target_latency` says how much goes.

    Args:
        model: A network with batch norms, best trained with `TrainConfig(sparsity=...)`; it stays as it is.
        x: An example input: a tensor `(N, ...)`, a tuple of arguments, or a dictionary of them by name. By default one
            of the shape that the model remembers.
        images: Unlabelled, normalised images `(N, C, H, W)`, or batches of them, to restore from.
        examples: Further inputs, for what `x` does not reach (see `inspect`).
        on_progress: Called with how much is done and how much there is in all; see `prune`.
        ratio: Share of the prunable channels to remove, above 0 and below 1; or one for each channel group by name
            or pattern (see `ratio_of`).
        target_macs: Multiply-accumulates to keep: `"50%"` of the present ones, `"20M"`, or a number.
        target_params: Parameters to keep, said likewise.
        target_latency: Time of a pass to come down to: `"5ms"`, or `"60%"` of what it takes now. The network and its
            layers are timed on this machine, and so is the result: the plan's note `latency` has what was found.
        latency_on: Where: `pytorch` (the default), or `onnx`, the exported file in ONNX Runtime.
        latency_batch: Images a pass, by default one.
        latency_threads: CPU threads, by default as many as PyTorch uses.
        round_to: Keep a multiple of this many channels in each layer.
        min_channels: Leave at least this many channels in every layer.
        only: Patterns, as of a shell, of the layers that may become narrower: `"layer3.*"`. Channels that several
            layers share go only if each of these is named.
        skip: Patterns of layers that stay as wide as they are, and with them what shares channels with them.
        ratio_of: The share that each layer loses which a pattern matches, by pattern; the last that matches counts.
            What else says how much goes is for the other layers, and may be left out.
        scope: `inner` leaves channels alone that several layers share by addition.
        aggregate: How the gammas of coupled channels become one score.
        restore: One of `restorations()`. `calibrate` refits what stays to `images` (the default where there are some),
            `synthetic` to images made from the network itself; `constants` folds what a removed channel is worth on
            average, act(beta), into the next layer (the default without images, and where every other way begins);
            `none` drops it, as the paper's release does.
        memory: What the images may hold in memory that wait at a layer which is refitted, such as `2GiB` or `500MB`;
            what is more waits in a temporary file.

    Returns:
        The new network, the plan and figures; `model, plan = pk.slim(...)` unpacks the first two.

    Raises:
        InputError: Settings that do not fit, no batch norm, or nothing to prune.
        SurgeryError: The result could not be proven to compute what was meant.

    Examples:
        >>> import prunekit as pk
        >>> model = pk.load("prunekit:vgg_digits")
        >>> small, plan = pk.slim(model, ratio=0.5)
        >>> pk.evaluate(small).params < pk.evaluate(model).params / 2
        True
        >>> plan.notes["restore"]
        'constants'
    """
    config = SlimConfig(
        ratio=_by_name(ratio),
        target_macs=target_macs,
        target_params=target_params,
        target_latency=target_latency,
        latency_on=latency_on,
        latency_batch=latency_batch,
        latency_threads=latency_threads,
        round_to=round_to,
        min_channels=min_channels,
        only=_several(only),
        skip=_several(skip),
        ratio_of=dict(ratio_of) if ratio_of else None,
        scope=scope,
        aggregate=aggregate,
        restore=restore,
        memory=memory,
    )
    return prune("slim", model, x, config, images=images, examples=examples, on_progress=on_progress)


def merge(
    model: nn.Module,
    x: Any = None,
    *,
    images: Images | None = None,
    examples: Iterable[Any] = (),
    on_progress: Progress | None = None,
    ratio: float | Mapping[str, float] | None = None,
    target_macs: str | float | None = None,
    target_params: str | float | None = None,
    target_latency: str | None = None,
    latency_on: Literal["pytorch", "onnx"] | None = None,
    latency_batch: int | None = None,
    latency_threads: int | None = None,
    round_to: int = 1,
    min_channels: int = 1,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    ratio_of: Mapping[str, float] | None = None,
    criterion: Literal["l1-norm", "l2-norm", "l2-GM", "pivot"] | None = None,
    restore: str | None = None,
    widths: Literal["uniform", "loss", "measured"] | None = None,
    scope: Literal["inner", "all"] = "inner",
    refit_bn: bool = False,
    seed: int = 0,
    memory: str = Calibrate.memory,
    threshold: float = 0.1,
    lam: float = 0.85,
) -> Pruned:
    """Prune with Neuron Merging: what a removed filter did is made up for in the layer that read it.

    After Kim et al., "Neuron Merging: Compensating for Pruned Neurons" (NeurIPS 2020), algorithms 1 and 2 for
    `restore="paper"`. Exactly one of `ratio`, `target_macs`, `target_params` and `target_latency` says how much goes.

    Args:
        model: The network; it stays as it is.
        x: An example input: a tensor `(N, ...)`, a tuple of arguments, or a dictionary of them by name. By default one
            of the shape that the model remembers.
        images: Unlabelled, normalised images `(N, C, H, W)`, or batches of them, to restore from.
        examples: Further inputs, for what `x` does not reach (see `inspect`).
        on_progress: Called with how much is done and how much there is in all; see `prune`.
        ratio: Share of the prunable channels to remove, above 0 and below 1; or one for each channel group by name
            or pattern (see `ratio_of`).
        target_macs: Multiply-accumulates to keep: `"50%"` of the present ones, `"20M"`, or a number.
        target_params: Parameters to keep, said likewise.
        target_latency: Time of a pass to come down to: `"5ms"`, or `"60%"` of what it takes now. The network and its
            layers are timed on this machine, and so is the result: the plan's note `latency` has what was found.
        latency_on: Where: `pytorch` (the default), or `onnx`, the exported file in ONNX Runtime.
        latency_batch: Images a pass, by default one.
        latency_threads: CPU threads, by default as many as PyTorch uses.
        round_to: Keep a multiple of this many channels in each layer.
        min_channels: Leave at least this many channels in every layer.
        only: Patterns, as of a shell, of the layers that may become narrower: `"layer3.*"`. Channels that several
            layers share go only if each of these is named.
        skip: Patterns of layers that stay as wide as they are, and with them what shares channels with them.
        ratio_of: The share that each layer loses which a pattern matches, by pattern; the last that matches counts.
            What else says how much goes is for the other layers, and may be left out.
        criterion: Which filters stay: those of the largest norms, of the largest sums of distances to all others
            (`l2-GM`), or those that explain best what the next layers read (`pivot`). By default `pivot` where
            activations are measured, `l2-norm` for `moments`, else the paper's `l1-norm`.
        restore: One of `restorations()`. `paper` merges each removed filter into a kept one; `moments` solves for the
            next layer's weights in closed form; `closed-form` takes the better of the two for each layer (the default
            without images); `synthetic` refits to images made from the network itself; `calibrate` refits to `images`
            (the default where there are some); `none` only prunes.
        widths: `uniform` takes the same share of every layer; `loss` takes most where least is lost, within the
            parameters and MACs of the same uniform ratio; `measured` likewise, by what the network's outputs lose with
            each layer narrowed and refitted alone, which takes images and longer. By default `uniform` for `paper` and
            `none`, else `loss`.
        scope: `inner` narrows only layers that can be made up for; `all` also residual streams and the rest.
        refit_bn: Estimate batch-norm statistics anew on the images, given or made.
        seed: Seed of everything random, such as the images that `synthetic` makes.
        memory: What the images may hold in memory that wait at a layer which is refitted, such as `2GiB` or `500MB`;
            what is more waits in a temporary file.
        threshold: Least cosine similarity, -1 to 1, of two filters that are merged (the paper's t).
        lam: Weight, 0 to 1, of the cosine against the batch-norm bias distance (the paper's lambda).

    Returns:
        The new network, the plan and figures; `model, plan = pk.merge(...)` unpacks the first two.

    Raises:
        InputError: Settings that do not fit, or nothing to prune.
        SurgeryError: The result could not be proven to compute what was meant.

    Examples:
        >>> import prunekit as pk
        >>> digits = pk.open_data("digits", "train")
        >>> images, _ = next(digits.batches(64))
        >>> small, plan = pk.merge(pk.load("prunekit:vgg_digits"), images=images, ratio=0.3, widths="uniform")
        >>> plan.notes["restore"]
        'calibrate'
    """
    config = MergeConfig(
        ratio=_by_name(ratio),
        target_macs=target_macs,
        target_params=target_params,
        target_latency=target_latency,
        latency_on=latency_on,
        latency_batch=latency_batch,
        latency_threads=latency_threads,
        round_to=round_to,
        min_channels=min_channels,
        only=_several(only),
        skip=_several(skip),
        ratio_of=dict(ratio_of) if ratio_of else None,
        criterion=criterion,
        restore=restore,
        widths=widths,
        scope=scope,
        refit_bn=refit_bn,
        seed=seed,
        memory=memory,
        threshold=threshold,
        lam=lam,
    )
    return prune("merge", model, x, config, images=images, examples=examples, on_progress=on_progress)


def _several(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _by_name(ratio: float | Mapping[str, float] | None) -> float | dict[str, float] | None:
    return dict(ratio) if isinstance(ratio, Mapping) else ratio
