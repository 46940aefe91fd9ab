"""Channels that move in blocks, channels that lie along several dimensions, and parameters that are maps of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import lively
from prunekit import surgery
from prunekit.plan import Keep, Plan


class Net(nn.Module):
    """Layers and parameters by name, and what to do with them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def mapped(shape: tuple[int, ...], joined: Callable[[Tensor, Tensor], Tensor], outputs: int = 16) -> nn.Module:
    """A learned map beside a convolution's output, `(N, 16, 8, 8)`."""
    return Net(
        lambda net, x: net.b(F.relu(joined(net.a(x), net.map))),
        a=nn.Conv2d(3, 16, 3, padding=1),
        b=nn.Conv2d(outputs, 4, 1),
        map=nn.Parameter(torch.randn(shape)),
    )


def between(something: Callable[[Tensor], Tensor], made: int, read: int) -> nn.Module:
    """A convolution that makes `made` channels, and one that reads `read`."""
    return Net(lambda net, x: net.b(something(net.a(x))), a=nn.Conv2d(3, made, 3, padding=1), b=nn.Conv2d(read, 4, 1))


def shuffled_by_hand(x: Tensor, r: int = 2) -> Tensor:
    n, _, h, w = x.shape
    return x.view(n, -1, r, r, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, h * r, w * r)


def spread_by_hand(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // 2, w // 2)


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., i::2, j::2] for i in range(2) for j in range(2)], 1)


def grouped_mean(x: Tensor) -> Tensor:
    return x.view(len(x), 4, -1, *x.shape[2:]).mean(1)


def maxout(x: Tensor) -> Tensor:
    return x.view(len(x), -1, 4, *x.shape[2:]).amax(2)


def rated(x: Tensor) -> Tensor:
    """A softmax over groups of channels, as split attention has it."""
    groups = x.mean((2, 3)).view(len(x), 4, -1).softmax(1)
    return x * groups.reshape(len(x), -1, 1, 1)


def groups_as_batch(x: Tensor) -> Tensor:
    """The groups of the channels as images of their own, each normalised by itself."""
    n, c, h, w = x.shape
    return F.batch_norm(x.reshape(n * 4, -1, h, w), None, None, training=True).view(n, c, h, w)


def latent(read: Callable[[Tensor], Tensor], **parts: nn.Module) -> nn.Module:
    """A generator: a linear layer, its features laid out as a map of 16 channels, a transposed convolution."""
    return Net(
        lambda net, z: net.b(F.relu(read(net.a(z.flatten(1)[:, :10])))),
        a=nn.Linear(10, 256),
        b=nn.ConvTranspose2d(16, 8, 4, 2, 1),
        **parts,
    )


def late_norm(net: Net, z: Tensor) -> Tensor:
    maps: Tensor = net.n(net.a(z.flatten(1)[:, :10]).view(len(z), -1, 4, 4))
    return net.b(F.relu(maps) + net.map)


CARRIED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "map (1, C, H, W)": (lambda: mapped((1, 16, 8, 8), torch.add), 16),
    "map (C, H, W)": (lambda: mapped((16, 8, 8), torch.mul), 16),
    "map (1, C, 1, W)": (lambda: mapped((1, 16, 1, 8), torch.mul), 16),
    "map of positions (1, 1, H, W)": (lambda: mapped((1, 1, 8, 8), torch.mul), 16),
    "map of positions (H, W)": (lambda: mapped((8, 8), torch.add), 16),
    "sigmoid of a map": (lambda: mapped((1, 16, 8, 8), lambda x, m: x * m.sigmoid()), 16),
    "layer scale (C, 1, 1)": (lambda: mapped((16, 1, 1), torch.mul), 16),
    "layer scale (1, C, 1, 1)": (lambda: mapped((1, 16, 1, 1), torch.mul), 16),
    "scale (C,) last": (lambda: mapped((16,), lambda x, m: (x.permute(0, 2, 3, 1) * m).permute(0, 3, 1, 2)), 16),
    "token positions (1, N, C)": (
        lambda: mapped((1, 64, 16), lambda x, m: (x.flatten(2).transpose(1, 2) + m).transpose(1, 2).view_as(x)),
        16,
    ),
    "token positions (1, C, N)": (lambda: mapped((1, 16, 64), lambda x, m: (x.flatten(2) + m).view_as(x)), 16),
    "token gates (1, N, 1)": (
        lambda: mapped((1, 64, 1), lambda x, m: (x.flatten(2).transpose(1, 2) * m).transpose(1, 2).view_as(x)),
        16,
    ),
    "map as further channels": (
        lambda: mapped((1, 4, 8, 8), lambda x, m: torch.cat([x, m.expand(len(x), -1, -1, -1)], 1), 20),
        16,
    ),
    "coordinates as a further channel": (
        lambda: mapped((1, 1, 8, 8), lambda x, m: torch.cat([m.expand(len(x), -1, -1, -1), x], 1), 17),
        16,
    ),
    "learned start": (lambda: mapped((1, 3, 8, 8), lambda x, m: x * m.repeat(len(x), 1, 1, 1).mean()), 16),
    "pixel shuffle": (lambda: between(nn.PixelShuffle(2), 32, 8), 8),
    "pixel shuffle by hand": (lambda: between(shuffled_by_hand, 32, 8), 8),
    "pixel unshuffle": (lambda: between(nn.PixelUnshuffle(2), 8, 32), 8),
    "space to depth by hand": (lambda: between(spread_by_hand, 8, 32), 8),
    "space to depth by slices": (lambda: between(focus, 8, 32), 8),
    "channel shuffle": (lambda: between(nn.ChannelShuffle(4), 16, 16), 4),
    "unfold and fold": (lambda: between(lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2), 8, 8), 8),
    "unfold": (lambda: between(lambda x: F.unfold(x, 2, stride=2).view(len(x), -1, 4, 4), 8, 32), 8),
    "fold": (lambda: between(lambda x: F.fold(x.flatten(2)[..., :16], (8, 8), 2, stride=2), 32, 8), 8),
    "mean over groups": (lambda: between(grouped_mean, 32, 8), 8),
    "maxout": (lambda: between(maxout, 32, 8), 8),
    "softmax over groups": (lambda: between(rated, 32, 32), 8),
    "groups as a batch": (lambda: between(groups_as_batch, 16, 16), 4),
    "linear, view": (lambda: latent(lambda x: x.view(len(x), -1, 4, 4)), 16),
    "linear, unflatten": (lambda: latent(nn.Unflatten(1, (-1, 4, 4))), 16),
    "linear, view, map, norm": (
        lambda: Net(
            late_norm,
            a=nn.Linear(10, 256),
            n=nn.BatchNorm2d(16),
            map=nn.Parameter(torch.randn(1, 16, 4, 4)),
            b=nn.ConvTranspose2d(16, 8, 4, 2, 1),
        ),
        16,
    ),
    "linear, view, pool": (
        lambda: Net(
            lambda net, z: net.b(net.a(z.flatten(1)[:, :10]).view(len(z), -1, 4, 4).mean((2, 3))),
            a=nn.Linear(10, 256),
            b=nn.Linear(16, 8),
        ),
        16,
    ),
}


# Images and groups that share a dimension are not told apart.
_ONE_IMAGE = ("groups as a batch",)


@pytest.mark.parametrize(("name", "batch"), [(n, b) for n in CARRIED for b in (1, 2) if b == 1 or n not in _ONE_IMAGE])
def test_channels_are_carried(name: str, batch: int) -> None:
    build, units = CARRIED[name]
    x = torch.zeros(batch, 3, 8, 8, dtype=torch.float64)
    model = lively(build())
    graph = surgery.trace(model, x)
    assert len(graph.group("a").free) == units, graph.group("a").frozen
    for seed in range(2):
        torch.manual_seed(seed)
        plan = Plan([Keep("a", torch.randperm(units)[: units // 2].tolist())])
        small = surgery.edit(model, plan, graph)
        surgery.verify(model, small, plan, graph)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


FIXED = {
    "linear, view of fixed sizes": lambda: latent(lambda x: x.view(-1, 16, 4, 4)),
    "shuffle of fixed sizes": lambda: between(
        lambda x: x.view(-1, 8, 4, 8, 8).flatten(3).sum(2).view(-1, 8, 8, 8), 32, 8
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_sizes_in_the_code_freeze_what_they_lay_out(name: str) -> None:
    graph = surgery.trace(lively(FIXED[name]()), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert "sizes written into the code" in str(graph.group("a").reason)


def test_a_norm_behind_an_activation_or_a_pooling_is_no_stream() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)),
        *(nn.Flatten(), nn.Linear(54, 10), nn.ReLU(), nn.BatchNorm1d(10), nn.Linear(10, 2)),
    )
    graph = surgery.trace(lively(model), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert [group.name for group in graph.groups] == ["0", "4", "6", "9"]
    assert not graph.links


def test_a_norm_behind_an_activation_that_others_read_is_one() -> None:
    model = Net(
        lambda net, x: net.b(net.n(h := F.relu(net.a(x)))) + net.c(h),
        **{"a": nn.Conv2d(3, 8, 3), "n": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 4, 1), "c": nn.Conv2d(8, 4, 1)},
    )
    graph = surgery.trace(lively(model), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert [link.norm for link in graph.links] == ["n"]
