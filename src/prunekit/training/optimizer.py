"""The optimisers and their weight-decay groups."""

from __future__ import annotations

from torch import nn, optim

from prunekit.errors import TrainingError
from prunekit.recipe import TrainConfig


def build_optimizer(
    model: nn.Module, config: TrainConfig, own: frozenset[str] = frozenset(), own_rate: float = 1.0
) -> optim.Optimizer:
    """The optimiser over the trainable parameters; `TrainingError` where there are none.

    The parameters named in `own` are not decayed and learn at `own_rate` times the rate, which a group's "rate" says;
    without `decay_norm`, biases and normalisation weights (all parameters of one dimension) are not decayed either.
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
