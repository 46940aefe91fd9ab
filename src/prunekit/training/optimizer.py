"""The optimisers and their weight-decay groups."""

from __future__ import annotations

from torch import nn, optim

from prunekit.errors import TrainingError
from prunekit.recipe import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> optim.Optimizer:
    """The optimiser over the trainable parameters; `TrainingError` where there are none.

    Without `decay_norm`, biases and normalisation weights (all parameters of one dimension) are not decayed.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise TrainingError("the network is frozen: no parameter requires a gradient")
    vectors = [] if config.decay_norm else [p for p in trainable if p.ndim <= 1]
    matrices = [p for p in trainable if config.decay_norm or p.ndim > 1]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if params
    ]
    if config.optimizer == "adamw":
        return optim.AdamW(groups, lr=config.peak_lr)
    nesterov = config.nesterov and config.momentum > 0
    return optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum, nesterov=nesterov)
