"""The optimisers and their weight-decay groups."""

from __future__ import annotations

from torch import nn, optim

from prunekit.errors import TrainingError
from prunekit.recipe import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig, undecayed: frozenset[str]) -> optim.Optimizer:
    """The optimiser over the trainable parameters; `TrainingError` where there are none.

    The parameters named in `undecayed` are not decayed; without `decay_norm`, neither are biases and normalisation
    weights (all parameters of one dimension).
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainingError("the network is frozen: no parameter requires a gradient")
    spared = {name for name, p in trainable.items() if p.ndim <= 1 and not config.decay_norm} | undecayed
    decayed = [p for name, p in trainable.items() if name not in spared]
    others = [p for name, p in trainable.items() if name in spared]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, config.weight_decay), (others, 0.0))
        if params
    ]
    if config.optimizer == "adamw":
        return optim.AdamW(groups, lr=config.peak_lr)
    nesterov = config.nesterov and config.momentum > 0
    return optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum, nesterov=nesterov)
