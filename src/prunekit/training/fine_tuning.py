"""What suits a network that is trained already: smaller steps than from scratch, by the data and by what was cut.

Measured with Network Slimming and Neuron Merging on the digits and on CIFAR-10 (5,000 images, a ResNet-20): a rate for
training from scratch undoes in the first epoch what restoration had saved; without a warm-up most of the rest goes;
augmentation pays only over many epochs where labels teach. Two epochs of labels make a restored network no better, nor
do the answers of the original beside them; what it gives on the way, block by block, does, and bears varied images.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from prunekit.spec import origin_of
from prunekit.training.config import TrainConfig, batch_for, rate_factor

FEWEST_STEPS = 20  # in an epoch: with fewer, tuning hardly moves or jumps
_RATES = {"sgd": 0.007, "adamw": 1e-3}  # of batches of 128
_TAUGHT_RATES = {"sgd": 0.01, "adamw": 1e-3}
_SHORT = 10  # epochs in which an image is not seen often enough to be learnt by heart
_TAUGHT, _MATCHED = 0.9, 25.0  # share of the loss, and weight of the blocks in it


def suited(config: TrainConfig, images: int, cut: float, *, taught: bool) -> TrainConfig:
    """Return `config` with what it leaves open filled in for tuning a trained network.

    Args:
        config: The settings that were asked for; None is open, and so is the augmentation "auto".
        images: Number of training images.
        cut: Share of the MACs that was cut since the network was trained, 0 to 1.
        taught: Whether there is a teacher.
    """
    batch = config.batch_size or batch_for(images)
    rate = (_TAUGHT_RATES if taught else _RATES)[config.optimizer] * rate_factor(batch)
    by_heart = not taught and config.epochs < _SHORT
    return dataclasses.replace(
        config,
        batch_size=batch,
        lr=rate if config.lr is None else config.lr,
        warmup=min(1.0, config.epochs / 2) * max(0.25, cut) if config.warmup is None else config.warmup,
        augment="none" if config.augment == "auto" and by_heart else config.augment,
        distill=_TAUGHT if taught and config.distill is None else config.distill,
        match=_MATCHED if taught and config.match is None else config.match,
        # a penalty is there for its zeros, which cost accuracy
        keep=config.keep or ("last" if config.sparsity else "best"),
    )


def cut_since_training(model: nn.Module) -> float:
    """The share of its MACs, 0 to 1, that `model` has lost since it was last trained, as it remembers."""
    origin = origin_of(model)
    left = 1.0
    for step in reversed(origin.history if origin else ()):
        if step.get("method") == "train":
            break
        if step.get("before") and step.get("after"):
            left *= step["after"]["macs"] / max(1, step["before"]["macs"])
    return 1 - left
