"""Constants that dead channels leave, read where an op reads them: however the layer is called, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit as pk


class Reader(nn.Module):
    """A convolution and a batch norm of which half the channels are dead, and something that reads them."""

    def __init__(self, read: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        with torch.no_grad():
            self.norm.weight[::2] = 0.0
            self.norm.weight[1::2].uniform_(0.5, 1.0)
            self.norm.bias.uniform_(0.1, 1.0)
        self._read = read
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self._read(self, F.relu(self.norm(self.conv(x))))


def unpadded(**settings: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 4, 3, **settings)


class Own(nn.Conv2d):
    """Its forward adds no bias of its own, whatever there is."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, None, self.stride, self.padding)


EXACT: dict[str, Callable[[], Reader]] = {
    "input by name": lambda: Reader(lambda net, x: net.a(input=x), a=unpadded()),
    "forward called": lambda: Reader(lambda net, x: net.a.forward(x), a=unpadded()),
    "its weight and bias used by a function": lambda: Reader(
        lambda net, x: F.conv2d(x, net.a.weight, net.a.bias), a=unpadded()
    ),
    "no bias, and a batch norm behind": lambda: Reader(
        lambda net, x: net.n(F.conv2d(x, net.a.weight)), a=unpadded(bias=False), n=nn.BatchNorm2d(4)
    ),
    "no bias": lambda: Reader(lambda net, x: net.a(x), a=unpadded(bias=False)),
    "groups": lambda: Reader(lambda net, x: net.a(x), a=unpadded(groups=2, bias=False)),
    "linear over the last dimension": lambda: Reader(
        lambda net, x: net.a(input=x.permute(0, 2, 3, 1)), a=nn.Linear(8, 4, bias=False)
    ),
    "called twice": lambda: Reader(lambda net, x: net.a(x) + net.a(x.flip(3)), a=unpadded()),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_constant_is_taken_over(name: str) -> None:
    model, x = EXACT[name]().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    small, plan = pk.slim(model, x, ratio=0.5)
    assert small.conv.out_channels == 4
    assert [fold.consumer for fold in plan.folds] == ["a"]
    torch.testing.assert_close(small(x), model(x))


DROPPED: dict[str, Callable[[], Reader]] = {
    "a parameter of the parent": lambda: Reader(
        lambda net, x: F.conv2d(x, net.w), w=nn.Parameter(torch.randn(4, 8, 3, 3))
    ),
    "its weight alone used by a function": lambda: Reader(lambda net, x: F.conv2d(x, net.a.weight), a=unpadded()),
    "a forward of its own": lambda: Reader(lambda net, x: net.a(x), a=Own(8, 4, 3, bias=False)),
    "transposed": lambda: Reader(lambda net, x: net.a(x), a=nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False)),
    "transposed, with a bias": lambda: Reader(lambda net, x: net.a(x), a=nn.ConvTranspose2d(8, 3, 3, 2)),
    "transposed, in groups": lambda: Reader(lambda net, x: net.a(x), a=nn.ConvTranspose2d(8, 6, 3, 2, groups=2)),
    "called with other constants": lambda: Reader(lambda net, x: net.a(x) + net.a(2 * x), a=unpadded()),
}


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("side", [4, 6, 16])
def test_what_nothing_can_take_over_is_dropped_plainly(name: str, side: int) -> None:
    model, x = DROPPED[name]().eval(), torch.randn(1, 3, side, side)
    result = pk.prune("slim", model, x, ratio=0.5)
    assert not result.plan.folds
    assert result.after.params < result.before.params


class Attending(nn.Module):
    """A convolutional stem, and attention over its places: the projections are parameters that no layer runs."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(Reader(lambda net, x: net.a(x), a=nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8), nn.ReLU())
        with torch.no_grad():
            self.stem[1].weight.uniform_()
            self.stem[1].bias.uniform_(0.1, 1.0)
        kind = nn.TransformerEncoderLayer if layer else nn.MultiheadAttention
        self.attention = kind(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.attention(query=tokens, key=tokens, value=tokens)[0]
        return self.attention(tokens)


PROJECTIONS = ("attention", "attention.self_attn")  # of queries, keys and values, which have a bias


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("side", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("slim", {}), ("slim", {"restore": "none"}), ("merge", {}), ("merge", {"restore": "moments"})],
)
def test_batch_norm_before_attention(layer: bool, side: int, method: str, settings: dict[str, Any]) -> None:
    """Whatever the number of places has to do with that of channels."""
    model = Attending(layer).eval()
    result = pk.prune(method, model, torch.randn(1, 3, side, side), ratio=0.3, **settings)
    assert result.after.params < result.before.params
    assert {fold.consumer for fold in result.plan.folds if fold.offset is not None} <= {"stem.0.a", *PROJECTIONS}


def test_inputs_that_are_lists_of_images_of_any_size() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Reader(lambda net, x: net.a(x), a=unpadded())

        def forward(self, images: list[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
            batch = torch.stack([(image - targets["mean"])[:, :8, :8] for image in images])
            return {"scores": self.body(batch).mean((2, 3))}

    model = Detector().eval()
    images, targets = [torch.randn(3, 8, 9), torch.randn(3, 10, 8)], {"mean": torch.zeros(3, 1, 1)}
    small, plan = pk.slim(model, (images, targets), ratio=0.5)
    assert [fold.consumer for fold in plan.folds] == ["body.a"]
    torch.testing.assert_close(small(images, targets), model(images, targets))


def test_a_generator_of_transposed_convolutions_is_pruned() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    nn.init.uniform_(model[1].weight, 0.1, 1)
    nn.init.normal_(model[1].bias)
    small, _ = pk.slim(model.eval(), torch.randn(1, 16, 1, 1), ratio=0.3)
    assert small[0].out_channels == 22
