"""Random networks some of whose channels are known to be dead: gamma is zero, beta is not.

What a dead channel passes on is a constant, so a network without it, whose readers have taken the constant over,
computes exactly the same. Except at borders that are padded with zeros, and behind operations that have nothing to put
a constant in: such networks get dead channels whose constant is zero.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from networks import lively
from prunekit.surgery import Graph
from prunekit.surgery.ops import is_batch_norm

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BACK = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZE = {1: 20, 2: 12, 3: 9}


def raw(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64) / max(shape[1:], default=1) ** 0.5)


class RawConv(nn.Module):
    """A convolution called as a function, with parameters of the module's own, one kernel of several."""

    def __init__(self, rank: int, inputs: int, outputs: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.call = FUNCTION[rank]
        self.kernels = nn.ParameterList([raw(outputs, inputs, *(kernel,) * rank) for _ in range(2)])
        self.shift = raw(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.kernels[0], self.shift) - self.call(x, self.kernels[1])


class OwnBias(nn.Module):
    """A function call whose bias is an argument of it: a constant can go there."""

    def __init__(self, rank: int, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.call, self.kernel, self.shift = FUNCTION[rank], raw(outputs, inputs, *(kernel,) * rank), raw(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.kernel, self.shift)


class OverChannels(nn.Module):
    """Products of matrices over the channels, in several spellings."""

    def __init__(self, how: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.how, self.table, self.shift = how, raw(outputs, inputs), raw(outputs)
        self.turned, self.layer = raw(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "einsum":
            return torch.einsum("nc...,oc->no...", x, self.table)
        last = x.movedim(1, -1)
        if self.how == "linear":
            last = F.linear(last, self.table, self.shift)
        elif self.how == "matmul":
            last = torch.matmul(last, self.turned) + self.shift
        elif self.how == "at":
            last = last @ self.table.t()
        else:
            last = self.layer(last)
        return last.movedim(-1, 1)


class LoRA(nn.Module):
    """Base weights and a correction of low rank: three weights in one module."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = raw(outputs, inputs), raw(outputs)
        self.lora_a, self.lora_b = raw(3, inputs), raw(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        y = F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y.movedim(-1, 1)


class Cell(nn.Module):
    """A hand-written cell: `W2 act(norm(W1 x))` with both weights its own, tied by transposition if asked for."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.w1 = raw(hidden, inputs)
        self.w2 = None if inputs == outputs else raw(outputs, hidden)
        self.b2, self.norm = raw(outputs), nn.BatchNorm1d(hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(F.linear(x, self.w1)))
        return F.linear(hidden, self.w1.t() if self.w2 is None else self.w2, self.b2)


@dataclass
class Parts:
    """An output of the user's own."""

    scores: Tensor
    others: dict[str, Tensor]


class Plain:
    """Another one, with nothing but attributes."""

    def __init__(self, scores: Tensor, others: dict[str, Tensor]) -> None:
        self.scores, self.inner = scores, [others]


class Stage(nn.Module):
    """A reader of channels, its batch norm, an activation and what follows; or a residual block of them."""

    def __init__(self, layers: list[nn.Module], residual: bool) -> None:
        super().__init__()
        self.layers, self.residual = nn.Sequential(*layers), residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class Branches(nn.Module):
    """Two readers of the same channels, side by side."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Whole(nn.Module):
    """Stages, then one or several heads, returned in one of several ways."""

    def __init__(self, stages: list[nn.Module], heads: list[nn.Module], how: str) -> None:
        super().__init__()
        self.stages, self.heads, self.how = nn.Sequential(*stages), nn.ModuleList(heads), how

    def forward(self, x: Tensor) -> Any:
        x = self.stages(x)
        first, *rest = [head(x) for head in self.heads]
        others = {f"head{number}": value for number, value in enumerate(rest)}
        ways: dict[str, Callable[[], Any]] = {
            "tensor": lambda: torch.cat([first, *rest], 1),
            "tuple": lambda: (first, *rest),
            "dict": lambda: {"scores": first, **others},
            "dataclass": lambda: Parts(first, others),
            "object": lambda: Plain(first, others),
        }
        return ways[self.how]()


class Builder:
    """Draws one network; `zero` says that every dead channel's constant is zero, so that any reader is exact."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.chance = random.Random(seed)
        self.zero = self.chance.random() < 0.5
        self.rank = self.chance.choice([1, 2, 2, 2, 3])
        self.size, self.width = SIZE[self.rank], 3
        self.kinds: list[str] = []

    def build(self) -> nn.Module:
        stages = [self.stage() for _ in range(self.chance.randint(2, 4))]
        heads = [self.head() for _ in range(self.chance.choice([1, 1, 2, 3]))]
        model = Whole(stages, heads, self.chance.choice(["tensor", "tuple", "dict", "dataclass", "object"]))
        model = lively(model, self.chance.randrange(10**6))
        self.kill(model)
        return model

    def kill(self, model: nn.Module) -> None:
        """A quarter or half of each batch norm's channels die, at places that agree wherever they are added or tied."""
        dead = torch.tensor([False, True, self.chance.random() < 0.5, False])
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                gone = dead.repeat(module.num_features // 4)
                with torch.no_grad():
                    module.weight[gone] = 0.0
                    module.bias[gone] = -module.bias[gone].abs() if self.zero else module.bias[gone] + 0.5

    def activation(self) -> nn.Module:
        if self.zero:
            return nn.ReLU()
        return self.chance.choice([nn.ReLU, nn.SiLU, nn.Tanh, nn.Identity])()

    def stage(self) -> nn.Module:
        outputs = 4 * self.chance.randint(1, 2)
        if self.width > 3 and self.chance.random() < 0.2:  # a residual block keeps positions and width
            layers = [OverChannels(self.chance.choice(("module", "linear")), self.width, self.width)]
            self.kinds.append("residual")
            return Stage([*layers, NORM[self.rank](self.width), self.activation()], residual=True)
        if self.width > 3 and self.chance.random() < 0.2:
            self.kinds.append("branches")
            sides = [OwnBias(self.rank, self.width, 4, 1), CONV[self.rank](self.width, 4, 1)]
            both = [nn.Sequential(side, NORM[self.rank](4), self.activation()) for side in sides]
            self.width = 8
            return Branches(*both)
        layers = []
        if self.width > 3 and self.chance.random() < 0.3:
            layers += self.rider()
        if self.width > 3 and self.chance.random() < 0.2:  # a batch norm before its reader
            self.kinds.append("norm first")
            layers += [NORM[self.rank](self.width), self.activation()]
        layers.append(self.reader(outputs))
        self.width = outputs
        layers += [NORM[self.rank](outputs), self.activation()]
        return Stage([*layers, *self.behind()], residual=False)

    def rider(self) -> list[nn.Module]:
        """A depthwise convolution, which passes constants on."""
        multiplier = self.chance.choice([1, 2])
        kernel = 3 if self.size > 4 else 1
        kind: Any = self.chance.choice([CONV, BACK]) if multiplier == 1 and kernel == 1 else CONV
        layer = kind[self.rank](self.width, self.width * multiplier, kernel, groups=self.width)
        self.size -= kernel - 1
        self.width *= multiplier
        self.kinds.append("depthwise")
        return [layer] if not self.zero else [layer, NORM[self.rank](self.width), nn.ReLU()]

    def reader(self, outputs: int) -> nn.Module:
        if self.width == 3:
            return CONV[self.rank](3, outputs, 1)
        exact = ["plain", "valid", "dilated", "strided", "grouped", "back", "own bias", "module", "linear", "matmul"]
        exact += [mode for mode in ("reflect", "replicate", "circular") if (mode, self.rank) != ("reflect", 3)]
        others = ["padded", "back strided", "back padded", "raw", "lora", "einsum", "at"]
        kind = self.chance.choice([*exact, *others] if self.zero else exact)
        self.kinds.append(kind)
        conv: Any = CONV[self.rank]
        back = BACK[self.rank]
        kernel = 3 if self.size > 5 else 1
        bias = self.chance.random() < 0.5
        if kind in ("reflect", "replicate", "circular"):
            return conv(self.width, outputs, 3 if self.size > 3 else 1, padding=int(self.size > 3), padding_mode=kind)
        if kind == "padded":
            return conv(self.width, outputs, 3, padding=1, bias=bias)
        if kind.startswith("back"):
            return self.transposed(kind, back, outputs, bias)
        if kind in ("einsum", "matmul", "at", "module", "linear"):
            return OverChannels(kind, self.width, outputs)
        if kind == "lora":
            return LoRA(self.width, outputs)
        if kind == "plain":
            return conv(self.width, outputs, 1, bias=bias)
        if kind == "strided":
            self.size = (self.size - 1) // 2 + 1
            return conv(self.width, outputs, 1, stride=2, bias=bias)
        wide = kind == "dilated" and self.size > 6
        self.size -= 4 if wide else kernel - 1
        if kind == "raw":
            return RawConv(self.rank, self.width, outputs, kernel, bias)
        if kind == "own bias":
            return OwnBias(self.rank, self.width, outputs, kernel)
        groups = 2 if kind == "grouped" and self.width % 8 == 0 else 1
        return conv(self.width, outputs, 3 if wide else kernel, dilation=2 if wide else 1, groups=groups, bias=bias)

    def transposed(self, kind: str, back: Any, outputs: int, bias: bool) -> nn.Module:
        groups = 2 if self.width % 8 == 0 and self.chance.random() < 0.4 else 1
        if kind == "back strided" and self.size <= 6:
            self.size *= 2
            return back(self.width, outputs, 2, stride=2, groups=groups, bias=bias)
        if kind == "back padded":
            return back(self.width, outputs, 3, padding=1, groups=groups, bias=bias)
        kernel = 3 if self.size > 5 else 1
        self.size -= kernel - 1
        return back(self.width, outputs, kernel, padding=kernel - 1, groups=groups, bias=bias)

    def behind(self) -> list[nn.Module]:
        """Pooling and resampling."""
        pools = {1: (nn.AvgPool1d, nn.MaxPool1d), 2: (nn.AvgPool2d, nn.MaxPool2d), 3: (nn.AvgPool3d, nn.MaxPool3d)}
        if self.size >= 6 and self.chance.random() < 0.4:
            self.size //= 2
            return [self.chance.choice(pools[self.rank])(2)]
        if self.size <= 4 and self.rank == 2 and self.chance.random() < 0.3:
            self.size *= 2
            return [nn.Upsample(scale_factor=2)]
        return []

    def head(self) -> nn.Module:
        pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[self.rank](1)
        kind = self.chance.choice(["pooled", "flat", "cell", "tied"])
        self.kinds.append(kind)
        features = self.width * self.size**self.rank
        if kind == "flat" and features <= 4000:
            hidden = [nn.Linear(features, 8), nn.BatchNorm1d(8), self.activation(), nn.Linear(8, 3, bias=False)]
            return nn.Sequential(nn.Flatten(), *hidden)
        if kind in ("cell", "tied"):
            cell = Cell(self.width, 8, self.width if kind == "tied" else 5)
            return nn.Sequential(pool, nn.Flatten(), cell, nn.Linear(cell.b2.numel(), 3))
        return nn.Sequential(pool, nn.Flatten(), nn.Linear(self.width, 3))


def dead_keeps(model: nn.Module, graph: Graph) -> dict[str, list[int]]:
    """What stays of each group without the units all of whose batch-norm scales are zero."""
    alive: dict[str, np.ndarray] = {}
    for node in graph.nodes:
        if not is_batch_norm(node.op):
            continue
        scale = node.parameters[0]
        classes = graph.slots[scale, 0]
        for one, gamma in zip(classes.tolist(), model.get_parameter(scale).tolist(), strict=True):
            number = int(graph.group_of[one])
            if number >= 0:
                group = graph.groups[number]
                states = alive.setdefault(group.name, np.full(group.size, -1))
                unit = graph.unit_of[one]
                states[unit] = max(states[unit], int(gamma != 0))
    keeps = {}
    for name, states in alive.items():
        group = graph.group(name)
        if any(member.parameter.endswith("w1") and member.dim == 1 for member in group.producers):
            continue  # a tied weight adds to it what no batch norm scales
        gone = {u for u in group.free if states[u] == 0}
        if gone and len(gone) < group.size:
            keeps[name] = [u for u in range(group.size) if u not in gone]
    return keeps
