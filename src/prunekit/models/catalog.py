"""The bundled architectures, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prunekit.models import vgg
from prunekit.models.densenet import CifarDenseNet
from prunekit.models.lenet import LeNet300100
from prunekit.models.preresnet import PreResNet, WideResNet
from prunekit.models.resnet import CifarResNet
from prunekit.models.vit import SmallViT
from prunekit.spec import InputSpec

CIFAR = InputSpec((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class Architecture:
    """A class, the arguments fixed by the name, the defaults it overrides, and the intended input.

    An `input` without mean and std leaves the normalisation to the data set.
    """

    make: Callable[..., nn.Module]
    input: InputSpec
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _vgg(config: str) -> Architecture:
    return Architecture(vgg.CifarVGG, CIFAR, defaults={"config": config})


CATALOG: dict[str, Architecture] = {
    "lenet_300_100": Architecture(LeNet300100, InputSpec((1, 28, 28))),
    "vgg_digits": Architecture(
        vgg.CifarVGG, InputSpec((1, 8, 8)), defaults={"config": vgg.VGG_DIGITS, "in_channels": 1}
    ),
    "vgg11_cifar": _vgg(vgg.VGG11),
    "vgg13_cifar": _vgg(vgg.VGG13),
    "vgg16_cifar": _vgg(vgg.VGG16),
    "vgg19_cifar": _vgg(vgg.VGG19),
    **{
        f"resnet{depth}_cifar": Architecture(CifarResNet, CIFAR, fixed={"depth": depth})
        for depth in (20, 32, 44, 56, 110)
    },
    "wrn40_4": Architecture(WideResNet, CIFAR, fixed={"depth": 40, "widen": 4}),
    "preresnet164": Architecture(PreResNet, CIFAR, fixed={"depth": 164}),
    "vit_cifar": Architecture(SmallViT, CIFAR),
    "vit_digits": Architecture(
        SmallViT,
        InputSpec((1, 8, 8)),
        fixed={"size": 8},
        defaults={"patch": 2, "embedding": 48, "depth": 4, "in_channels": 1},
    ),
    "densenet40_12": Architecture(CifarDenseNet, CIFAR, fixed={"depth": 40, "growth": 12}),
}
