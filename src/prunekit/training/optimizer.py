"""Optimisers, their weight-decay groups, and the reach of their steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, optim

from prunekit.errors import TrainingError
from prunekit.training.config import TrainConfig


def build_optimizer(
    model: nn.Module, config: TrainConfig, own: frozenset[str] = frozenset(), own_rate: float = 1.0
) -> optim.Optimizer:
    """Build the optimiser over the trainable parameters.

    The parameters named in `own` are not decayed and learn at `own_rate` times the rate (the group's "rate"); without
    `decay_norm`, biases and normalisation weights (all parameters of one dimension) are not decayed either.

    Raises:
        TrainingError: There are no trainable parameters.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainingError("the network is frozen: no parameter requires a gradient")
    spared = {name for name, p in trainable.items() if p.ndim <= 1 and not config.decay_norm} - own
    decayed = [p for name, p in trainable.items() if name not in spared | own]
    others = [p for name, p in trainable.items() if name in spared]
    special = [p for name, p in trainable.items() if name in own]
    groups = [
        {"params": params, "weight_decay": decay, "rate": rate}
        for params, decay, rate in ((decayed, config.weight_decay, 1.0), (others, 0.0, 1.0), (special, 0.0, own_rate))
        if params
    ]
    if config.optimizer == "adamw":
        return optim.AdamW(groups, lr=config.peak_lr)
    nesterov = config.nesterov and config.momentum > 0
    return optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum, nesterov=nesterov)


def pull(optimizer: optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter, gradient: float) -> float | Tensor:
    """Return how far a step of `optimizer` moves `parameter`, of its `group`, by a constant `gradient` in the long run.

    SGD has summed it up to `gradient / (1 - momentum)`, in Nesterov's form as in the plain one. AdamW divides it by the
    root of the mean square of the gradients that `parameter` has had, element by element; it is the step of a proximal
    method in AdamW's own metric (Yun, Lozano and Yang, "Adaptive Proximal Gradient Methods for Structured Neural
    Networks", NeurIPS 2021), here of at most twice the rate, which outweighs any constant gradient's step: where there
    is hardly a gradient, a gamma fades and does not vanish at once. Before the first step it is 0.
    """
    if isinstance(optimizer, optim.SGD):
        return float(group["lr"] * gradient / (1 - group["momentum"]))
    state = optimizer.state.get(parameter)
    if not state:
        return 0.0
    squares: Tensor = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    threshold: Tensor = (gradient / (squares.sqrt() + group["eps"])).clamp(max=2) * group["lr"]
    return threshold
