"""Widths that are written into the code: the channels concerned stay, and the rest of the network is pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit as pk
from networks import lively, random_plan
from prunekit import surgery

X = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
WIDTH = 12


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Widths(nn.Module):
    """A stem, a layer of `WIDTH` channels that some code reads, and a tail of twice as many."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self._body = body
        self.stem, self.middle = block(3, 16), block(16, WIDTH)
        self.gates = nn.Conv2d(WIDTH, 2 * WIDTH, 1)
        self.tail, self.out = block(WIDTH, 16), nn.Conv2d(16, 2, 1)

    @property
    def width(self) -> int:
        return WIDTH  # which no attribute holds

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.tail(self._body(self, self.middle(self.stem(x)))))


def gated(y: Tensor, z: Tensor) -> Tensor:
    return torch.sigmoid(y) * z


def sliced(m: Any, x: Tensor) -> Tensor:
    y = m.gates(x)
    return gated(y[:, : m.width], y[:, m.width :])


def sliced_from_the_end(m: Any, x: Tensor) -> Tensor:
    y = m.gates(x)
    return gated(y[:, : -m.width], y[:, -m.width :])


def state(m: Any, x: Tensor) -> Tensor:
    return gated(*m.gates(x + torch.zeros_like(x)).split(m.width, 1))


def empty_state(m: Any, x: Tensor) -> Tensor:
    return gated(*m.gates(x + x.new_zeros(x.size(0), m.width, 1, 1)).chunk(2, 1))


def root(m: Any, x: Tensor) -> Tensor:
    return gated(*(m.gates(x) / x.shape[1] ** 0.5).chunk(2, 1))


def count(m: Any, x: Tensor) -> Tensor:
    return gated(*(m.gates(x) / x.shape[1]).chunk(2, 1))


def constant(m: Any, x: Tensor) -> Tensor:
    scale = torch.tensor(float(x.shape[1]), dtype=x.dtype, device=x.device)
    return gated(*(m.gates(x) / scale.sqrt()).chunk(2, 1))


def filled(m: Any, x: Tensor) -> Tensor:
    return gated(*(m.gates(x) + torch.full((1,), x.shape[1], dtype=x.dtype, device=x.device)).chunk(2, 1))


def positions(_m: Any, x: Tensor) -> Tensor:
    ramp = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
    return x + ramp.sin()


def expanded(m: Any, x: Tensor) -> Tensor:
    return x + x.mean(1, keepdim=True).expand(-1, m.width, -1, -1)


def checked(m: Any, x: Tensor) -> Tensor:
    if x.shape[1] != m.width:
        raise ValueError(f"{m.width} channels are expected")
    return x.relu()


def chosen(m: Any, x: Tensor) -> Tensor:
    return x.relu() if x.shape[1] >= m.width else x.sigmoid().tanh()


def normalised(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (m.width,)).permute(0, 3, 1, 2)


def depthwise(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, torch.ones(m.width, 1, 3, 3, dtype=x.dtype, device=x.device), groups=m.width, padding=1)


def heads(m: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return x.reshape(n, 3, m.width // 3, h, w).flip(3).reshape(n, m.width, h, w)


FIXED = {
    "a slice up to the width": (sliced, "gates"),
    "a slice from the end": (sliced_from_the_end, "gates"),
    "a split behind zeros_like": (state, "gates"),
    "zeros of the width": (empty_state, "middle.0"),
    "the root of the width": (root, "middle.0"),
    "the width as a divisor": (count, "middle.0"),
    "the width as a fill": (filled, "middle.0"),
    "an expansion to the width": (expanded, "middle.0"),
    "a check of the width": (checked, "middle.0"),
    "a branch on the width": (chosen, "middle.0"),
    "a ramp over the channels": (positions, "middle.0"),
    "a functional norm of the width": (normalised, "middle.0"),
    "a fixed depthwise filter": (depthwise, "middle.0"),
    "a reshape into heads": (heads, "middle.0"),
}


@pytest.mark.parametrize(("body", "held"), FIXED.values(), ids=FIXED)
def test_a_written_width_holds_its_own_channels_and_no_others(body: Callable[[Any, Tensor], Tensor], held: str) -> None:
    model = lively(Widths(body))
    graph = surgery.trace(model, X)
    assert graph.group(held).reason
    assert len(graph.group("stem.0").free) == len(graph.group("tail.0").free) == 16
    for seed in range(2):
        plan = random_plan(graph, seed)
        assert surgery.verify(model, surgery.edit(model, plan, graph), plan, graph) <= 1e-10


class Counting(Widths):
    """The same with the width in an attribute, which can follow the channels."""

    width = 0

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(body)
        self.width = WIDTH


@pytest.mark.parametrize("body", [sliced, sliced_from_the_end, state, checked, normalised], ids=lambda b: b.__name__)
def test_a_width_in_an_attribute_follows_the_channels(body: Callable[[Any, Tensor], Tensor]) -> None:
    held = "gates" if body in (sliced, sliced_from_the_end, state) else "middle.0"
    model = lively(Counting(body))
    graph = surgery.trace(model, X)
    assert graph.group(held).free
    small = surgery.edit(model, pk.Plan([pk.Keep(held, range(5))]), graph)
    assert small.width == 5
    assert model.width == WIDTH
    for seed in range(2):
        plan = random_plan(graph, seed)
        assert surgery.verify(model, surgery.edit(model, plan, graph), plan, graph) <= 1e-10


FREE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a slice of half of them": lambda m, x: gated((y := m.gates(x))[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]),
    "a slice of all": lambda _m, x: x[:, : x.shape[1]] + x[:, :],
    "a slice past the end": lambda _m, x: x[:, :1000],
    "a free reshape": lambda _m, x: x.reshape(x.shape[0], -1, 1, *x.shape[2:]).flatten(1, 2),
    "contiguous": lambda _m, x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "groups written into a norm": lambda _m, x: F.group_norm(x, 3),
    "positions written into the code": lambda _m, x: (
        F.interpolate(x, size=(16, 16)).view(-1, x.shape[1], 256).view(-1, x.shape[1], 16, 16)
    ),
    "positions in a divisor": lambda _m, x: x / (x.shape[2] * x.shape[3]) ** 0.5,
}


@pytest.mark.parametrize("body", FREE.values(), ids=FREE)
def test_code_that_follows_the_width_is_pruned(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = lively(Widths(body))
    graph = surgery.trace(model, X)
    assert graph.group("middle.0").free
    for seed in range(2):
        plan = random_plan(graph, seed)
        assert surgery.verify(model, surgery.edit(model, plan, graph), plan, graph) <= 1e-10


def test_a_number_that_depends_on_the_width_holds_the_channels_that_it_counts() -> None:
    """And not those that it is applied to."""

    def body(m: Any, x: Tensor) -> Tensor:
        return m.gates(x).relu()[:, :, 1:] / x.shape[1]

    model = Widths(body)
    model.tail = block(2 * WIDTH, 16)
    graph = surgery.trace(lively(model), X)
    assert graph.group("middle.0").reason == "'div' in Widths computes with a number that depends on the width"
    assert len(graph.group("gates").free) == 2 * WIDTH


@pytest.mark.parametrize("body", [sliced, state, root, constant], ids=lambda body: body.__name__)
def test_methods_prune_around_a_written_width(body: Callable[[Any, Tensor], Tensor]) -> None:
    pruned = pk.prune("slim", lively(Widths(body)), X, ratio=0.3)
    assert pruned.after.params < pruned.before.params
    assert {keep.group for keep in pruned.plan.keeps} & {"stem.0", "tail.0"}


def test_written_widths_are_found_in_all_blocks_of_a_kind_and_behind_each_other() -> None:
    class Cell(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner, self.outer = block(width, 2 * width), block(width, width)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.inner(x).split(8, 1)
            return self.outer(a * b)

    model = lively(nn.Sequential(block(3, 8), *(Cell(8) for _ in range(4)), nn.Conv2d(8, 2, 1)))
    graph = surgery.trace(model, X)
    for number in range(1, 5):
        assert not graph.group(f"{number}.inner.0").free
        assert len(graph.group(f"{number}.outer.0").free) == 8


def test_a_forward_with_decisions_of_its_own_is_followed() -> None:
    """Fewer channels make other values; the decisions that hang on them are no written widths."""

    class Deciding(Widths):
        def forward(self, x: Tensor) -> Tensor:
            y = self.middle(self.stem(x))
            y = y.relu() if float(y.sum()) > self.bound else y.sigmoid()
            return self.out(self.tail(gated(*self.gates(y).split(self.width, 1))))

    model = lively(Deciding(sliced))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model.bound = 0.9 * float(model.middle(model.stem(x)).detach().sum())
    graph = surgery.trace(model, x)
    assert graph.group("gates").reason == "'split' in Deciding has sizes written into the code"
    assert len(graph.group("stem.0").free) == 16


def test_what_a_run_leaves_behind_does_not_lead_the_probe_astray() -> None:
    class Caching(Widths):
        ramp = None

        def forward(self, x: Tensor) -> Tensor:
            if self.ramp is None:
                self.ramp = torch.arange(8, dtype=x.dtype, device=x.device).exp().sin()
            return self.out(self.tail(state(self, self.middle(self.stem(x * self.ramp)))))

    graph = surgery.trace(lively(Caching(state)), X)
    assert graph.group("gates").reason == "'split' in Caching has sizes written into the code"
    assert len(graph.group("stem.0").free) == 16


def test_a_norm_that_must_keep_the_width_of_what_it_reads_shares_its_channels() -> None:
    """LeViT's layers give the normed values the shape of the values before the norm."""

    class Normed(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            return self.norm(x.flatten(0, 1)).reshape_as(x)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.down = nn.Conv2d(3, 8, 2, 2), Normed(8, 16), Normed(16, 8)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x).flatten(2).transpose(1, 2)
            return self.out(y + self.down(self.up(y).relu()))

    model = lively(Tokens())
    graph = surgery.trace(model, X)
    assert len(graph.group("up.linear").free) == 16
    for seed in range(2):
        plan = random_plan(graph, seed)
        assert surgery.verify(model, surgery.edit(model, plan, graph), plan, graph) <= 1e-10


def test_layers_that_must_be_equally_wide_are_found_out() -> None:
    """At half its width everything fits; at widths that differ it does not."""

    class Equal(Widths):
        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.out(self.tail(self.middle(y)).reshape(y.shape[0], y.shape[1], *x.shape[2:]))

    model = lively(Equal(root))
    graph = surgery.trace(model, X)
    assert graph.group("stem.0").reason
    assert graph.group("tail.0").reason
    assert len(graph.group("middle.0").free) == WIDTH


def test_constants_that_are_kept_between_runs_are_no_other_operations() -> None:
    kept: dict[str, Tensor] = {}

    class Keeping(Widths):
        def forward(self, x: Tensor) -> Tensor:
            y = self.middle(self.stem(x))
            if "ramp" not in kept:
                kept["ramp"] = torch.arange(8, dtype=x.dtype, device=x.device).div(8).exp().sin()
            return self.out(self.tail(state(self, y * kept["ramp"])))

    graph = surgery.trace(lively(Keeping(state)), X)
    assert graph.group("gates").reason == "'split' in Keeping has sizes written into the code"
    assert len(graph.group("middle.0").free) == WIDTH
