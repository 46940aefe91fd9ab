"""Networks for tests: randomised statistics, random plans, and a generator of random architectures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import prunekit as pk
from prunekit.errors import SurgeryError
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.fit import add_gates
from prunekit.nn.gated import GatedConv, gated_layers
from prunekit.plan import Keep, Plan
from prunekit.spec import InputSpec, origin_of, remember
from prunekit.surgery import Graph, balanced, resolve


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and eval mode, with batch norms that shift and scale each channel differently."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
    return model


def random_plan(graph: Graph, seed: int, most: float = 0.9) -> Plan:
    """Removes a random share of the free channels of every group, but never all channels of a layer."""
    chance = random.Random(seed)
    keeps = []
    for group in graph.groups:
        gone = set(chance.sample(group.free, int(len(group.free) * chance.random() * most)))
        for member in group.producers:
            if gone.issuperset(member.units.tolist()):
                gone.discard(int(member.units[0]))
        if gone:
            keeps.append(Keep(group.name, [u for u in range(group.size) if u not in gone]))
    scores = {group.name: np.array([chance.random() for _ in range(group.size)]) for group in graph.groups}
    even = balanced(graph, {keep.group: keep.index for keep in keeps}, scores)
    keeps = [Keep(name, index) for name, index in even.items()]
    while not _leaves_every_layer_alive(graph, Plan(keeps)):  # a stream may take all that one of its readers keeps
        keeps.pop(chance.randrange(len(keeps)))
    return Plan(keeps)


def _leaves_every_layer_alive(graph: Graph, plan: Plan) -> bool:
    try:
        resolve(graph, plan)
    except SurgeryError:
        return False
    return True


def gated(source: str | nn.Module, side: int, keep: float = 0.5, channels: int = 3) -> nn.Module:
    """A network on small images whose gates say something, with about a share `keep` of the channels on."""
    model = lively(pk.load(source) if isinstance(source, str) else source).float()
    origin = origin_of(model)
    assert origin is not None
    remember(model, replace(origin, input=InputSpec((channels, side, side))))
    model = add_gates(model, GateRecipe())
    generator = torch.Generator().manual_seed(0)

    def set_threshold(_: nn.Module, __: Any, pi: Tensor, *, layer: GatedConv) -> None:
        layer.threshold.copy_(pi.flatten().quantile(1 - keep))

    hooks = []
    for _, layer in gated_layers(model):
        nn.init.normal_(layer.gate.excite.weight, 0, 0.3 / layer.gate.excite.in_features, generator=generator)
        nn.init.uniform_(layer.gate.excite.bias, 0.3, 0.9, generator=generator)
        hooks.append(layer.gate.register_forward_hook(partial(set_threshold, layer=layer)))
    with torch.no_grad():
        model(torch.randn(8, channels, side, side, generator=generator))
    for hook in hooks:
        hook.remove()
    return model


class Residual(nn.Module):
    """`x + body(x)`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    """`cat([x, body(x)])`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Gated(nn.Module):
    """Squeeze-and-excite: `x * sigmoid(W2 relu(W1 mean(x)))`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class HalfAndHalf(nn.Module):
    """`chunk` into halves, one through a body, and together again."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([left, self.body(right)], 1)


class Shuffle(nn.Module):
    """Channel shuffle over `groups`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    """Half of the channels through a body, then all of them shuffled: the unit of ShuffleNetV2."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.halves, self.shuffle = HalfAndHalf(body), Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.halves(x))


class Several(nn.Module):
    """Cut in two, one half through two bodies, everything concatenated and mixed again: YOLO's C2f."""

    def __init__(self, width: int, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.mix = first, second, nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(2, 1))
        parts.append(self.first(parts[-1]))
        parts.append(self.second(parts[-1]) + parts[-1])
        return self.mix(torch.cat(parts, 1))


class Twice(nn.Module):
    """The same body two times, and its output beside itself."""

    def __init__(self, width: int, body: nn.Module) -> None:
        super().__init__()
        self.body, self.mix = body, nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(torch.relu(self.body(x)))
        return self.mix(torch.cat([y, y], 1))


class Scaled(nn.Module):
    """`x + scale * body(norm(x))`, the norm over channels of each position: ConvNeXt's block."""

    def __init__(self, width: int, body: nn.Module) -> None:
        super().__init__()
        self.norm, self.body, self.scale = nn.LayerNorm(width), body, nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.scale * self.body(normed)


class FlattenHead(nn.Module):
    """Flatten with positions, then two linear layers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(torch.flatten(x, 1))))


def norm(chance: random.Random, channels: int) -> nn.Module:
    """A random layer that treats each of `channels` by itself, or normalises groups of them."""
    return chance.choice(
        [
            *(nn.BatchNorm2d(channels), nn.GroupNorm(2 if channels % 2 == 0 else 1, channels), nn.Identity()),
            *(nn.PReLU(channels), nn.InstanceNorm2d(channels, affine=chance.random() < 0.5)),
        ]
    )


def conv_body(chance: random.Random, inputs: int, outputs: int) -> nn.Module:
    """A random run of convolutions from `inputs` to `outputs` channels that keeps the positions."""
    act = chance.choice([nn.ReLU, nn.SiLU, nn.Hardswish])
    kind = chance.choice(["plain", "bottleneck", "depthwise", "grouped", "transposed"])
    if kind == "plain":
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=chance.random() < 0.5), norm(chance, outputs)]
    elif kind == "bottleneck":
        hidden = 2 * chance.randint(1, 4)
        layers = [nn.Conv2d(inputs, hidden, 1), norm(chance, hidden), act(), nn.Conv2d(hidden, outputs, 3, padding=1)]
    elif kind == "depthwise":
        hidden = 2 * chance.randint(1, 4)
        layers = [
            *(nn.Conv2d(inputs, hidden, 1), nn.BatchNorm2d(hidden), act()),
            *(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden), act()),
            nn.Conv2d(hidden, outputs, 1),
        ]
    elif kind == "transposed":
        hidden, groups = 4 * chance.randint(1, 3), chance.choice([1, 2, 4])
        layers = [
            *(nn.Conv2d(inputs, hidden, 1), act(), nn.ConvTranspose2d(hidden, hidden, 3, padding=1, groups=groups)),
            *(nn.BatchNorm2d(hidden), act(), nn.Conv2d(hidden, outputs, 1)),
        ]
    else:
        hidden = 4 * chance.randint(1, 3)
        layers = [
            *(nn.Conv2d(inputs, hidden, 1), act()),
            *(nn.Conv2d(hidden, hidden, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(hidden), act()),
            nn.Conv2d(hidden, outputs, 1),
        ]
    return nn.Sequential(*layers)


def conv_body_square(chance: random.Random, width: int) -> nn.Module:
    """A run of convolutions that keeps the number of channels."""
    return conv_body(chance, width, width)


def random_network(seed: int) -> nn.Module:
    """A random mix of all `BLOCKS`, dense blocks and pooling; input `(N, 3, 8, 8)`."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    width = 4 * chance.randint(1, 3)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), norm(chance, width)]
    size = 8
    for _ in range(chance.randint(1, 5)):
        kind = chance.choice([*BLOCKS, "dense", "pool"])
        if kind == "dense":
            grown = 2 * chance.randint(1, 3)
            layers.append(Dense(conv_body(chance, width, grown)))
            width += grown
        elif kind == "pool" and size > 2:
            layers.append(chance.choice([nn.MaxPool2d(2), nn.AvgPool2d(2)]))
            size //= 2
        else:
            layers.append(BLOCKS.get(kind, BLOCKS["residual"])(chance, width))
    if chance.random() < 0.5:
        head: nn.Module = FlattenHead(width * size * size)
    else:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    return lively(nn.Sequential(*layers, nn.ReLU(), head), seed)


BLOCKS: dict[str, Callable[[random.Random, int], nn.Module]] = {
    "residual": lambda chance, width: Residual(conv_body(chance, width, width)),
    "plain": conv_body_square,
    "preact": lambda chance, width: nn.Sequential(conv_body_square(chance, width), nn.ReLU(), norm(chance, width)),
    "gated": lambda chance, width: Gated(width, chance.randint(1, 4)),
    "halves": lambda chance, width: HalfAndHalf(conv_body_square(chance, width // 2)),
    "shuffle": lambda _chance, _width: Shuffle(2),
    "shuffle unit": lambda chance, width: ShuffleUnit(conv_body_square(chance, width // 2)),
    "shuffle units": lambda chance, width: nn.Sequential(
        *(ShuffleUnit(conv_body_square(chance, width // 2)) for _ in range(chance.randint(2, 4)))
    ),
    "several": lambda chance, width: Several(
        width, conv_body_square(chance, width // 2), conv_body_square(chance, width // 2)
    ),
    "twice": lambda chance, width: Twice(width, conv_body_square(chance, width)),
    "scaled": lambda chance, width: Scaled(width, conv_body_square(chance, width)),
}
