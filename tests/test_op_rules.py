"""Operations of the user's own: frozen until a rule says what they do to channels, and proven like any other then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from networks import lively

X = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


@torch.library.custom_op("pktest::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    """No table knows it."""
    return x * torch.sigmoid(x)


@torch.library.custom_op("pktest::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel of `(N, C, H, W)` by its entry of `(C,)`."""
    return x * weight[:, None, None] + 1


@torch.library.custom_op("pktest::scale_last", mutates_args=())
def scale_last(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel of `(N, H, W, C)` by its entry of `(C,)`."""
    return x * weight


@torch.library.custom_op("pktest::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    """Channels in the opposite order."""
    return x.flip(1)


@torch.library.custom_op("pktest::centred", mutates_args=())
def centred(x: Tensor) -> Tensor:
    """Mixes all channels."""
    return x - x.mean(1, keepdim=True)


@torch.library.custom_op("pktest::same_size", mutates_args=())
def same_size(x: Tensor) -> Tensor:
    """A rule for it is to say nothing of its result."""
    return x + 0


@torch.library.custom_op("pktest::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    """In place: it returns nothing."""
    x.mul_(2)


@torch.library.custom_op("pktest::parts", mutates_args=())
def parts(x: Tensor) -> list[Tensor]:
    """Several results."""
    return [x.clamp(min=0), x.clamp(max=0)]


@torch.library.custom_op("pktest::real", mutates_args=())
def real(x: Tensor) -> Tensor:
    """Without an implementation for fake tensors."""
    return torch.from_numpy(x.numpy() * 2)


for op in (swish, turned, centred, same_size):
    op.register_fake(lambda x: torch.empty_like(x))
double_.register_fake(lambda _: None)
parts.register_fake(lambda x: [torch.empty_like(x), torch.empty_like(x)])
for op in (scale, scale_last):
    op.register_fake(lambda x, _: torch.empty_like(x))


class Net(nn.Module):
    """Two convolutions, and an operation between them."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor], *, weighted: bool) -> None:
        super().__init__()
        self.before, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        weight = torch.linspace(0.5, 2, 8)
        self.weight = nn.Parameter(weight) if weighted else weight.double()
        self.after = nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` to `(N, 4, H, W)`."""
        return self.after(self.between(self.norm(self.before(x)), self.weight))


def net(between: Callable[[Tensor, Tensor], Tensor], *, weighted: bool = False) -> nn.Module:
    return lively(Net(between, weighted=weighted))


def turn(call: pk.OpCall) -> None:
    call.pass_on(call.results[0], call.channels(call.args[0], 1).flip(0), 1)


def scaled_in_rows(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.pktest.scale_last(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)


def doubled(x: Tensor, _: Tensor) -> Tensor:
    torch.ops.pktest.double_(x)
    return x


TAUGHT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, Any, int]] = {
    "pointwise": (lambda x, _: torch.ops.pktest.swish(x), "pktest::swish", "pointwise", 1),
    "channelwise": (lambda x, w: torch.ops.pktest.scale(x, w), "pktest::scale", "channelwise", 1),
    "channels last": (scaled_in_rows, "pktest::scale_last", "channelwise", -1),
    "in place": (doubled, "pktest::double", "pointwise", 1),
    "several results": (lambda x, _: sum(torch.ops.pktest.parts(x)), "pktest::parts", "channelwise", 1),
    "real tensors alone": (lambda x, _: torch.ops.pktest.real(x), "pktest::real", "pointwise", 1),
    "function": (lambda x, _: torch.ops.pktest.turned(x), "pktest::turned", turn, 1),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for name in ("swish", "scale", "scale_last", "turned", "centred", "same_size", "double_", "parts", "real"):
        pk.set_op_rule(f"pktest::{name}", None)


def named(op: str) -> str:
    """As it is registered; the tracer leaves the mark of what works in place out."""
    return "pktest::double_" if op == "pktest::double" else op


def free(model: nn.Module) -> int:
    return len(pk.inspect(model, X).groups[0].free)


@pytest.mark.parametrize("case", TAUGHT)
def test_an_operation_is_frozen_until_a_rule_is_given(case: str) -> None:
    between, op, rule, dim = TAUGHT[case]
    model = net(between, weighted="scale" in op)
    assert free(model) == 0
    assert f"the operation '{op}'" in str(pk.inspect(model, X).groups[0].reason)
    pk.set_op_rule(named(op), rule, dim=dim)
    assert free(model) == 8
    small = pk.apply(model, pk.Plan([pk.Keep("before", [0, 1, 5])]), X)
    assert small.before.out_channels == 3
    assert small(X).shape == (2, 4, 8, 8)
    pk.set_op_rule(named(op), None)
    assert free(model) == 0


@pytest.mark.parametrize("case", TAUGHT)
@pytest.mark.parametrize("method", ["slim", "merge"])
@pytest.mark.parametrize("restore", ["none", "calibrate"])
def test_methods_prune_through_it(case: str, method: str, restore: str) -> None:
    between, op, rule, dim = TAUGHT[case]
    pk.set_op_rule(named(op), rule, dim=dim)
    settings: dict[str, Any] = {"scope": "all"}
    images = torch.randn(20, 3, 8, 8, dtype=torch.float64) if restore == "calibrate" else None
    model = net(between, weighted="scale" in op)
    done = pk.prune(method, model, X, images=images, ratio=0.5, restore=restore, **settings)
    assert done.after.channels < done.before.channels
    assert done.difference < 1e-9


@pytest.mark.parametrize("method", ["slim", "merge"])
def test_without_images_the_default_restoration_holds(method: str) -> None:
    """What a removed channel is worth behind an operation that only its rule describes is not guessed."""
    pk.set_op_rule("pktest::swish", "pointwise")
    model = net(lambda x, _: torch.ops.pktest.swish(x))
    done = pk.prune(method, model, X, ratio=0.5, scope="all")
    assert done.difference < 1e-9


@pytest.mark.parametrize("rule", ["pointwise", "channelwise"])
def test_a_wrong_rule_is_refused_by_the_proof(rule: Any) -> None:
    model = net(lambda x, _: torch.ops.pktest.centred(x))
    pk.set_op_rule("pktest::centred", rule)
    assert free(model) == 8
    with pytest.raises(pk.SurgeryError):
        pk.apply(model, pk.Plan([pk.Keep("before", [0, 1, 5])]), X)


def test_a_rule_that_turns_the_order_wrongly_is_refused_by_the_proof() -> None:
    pk.set_op_rule("pktest::turned", "channelwise")
    model = net(lambda x, _: torch.ops.pktest.turned(x))
    with pytest.raises(pk.SurgeryError):
        pk.apply(model, pk.Plan([pk.Keep("before", [0, 1, 5])]), X)


def test_what_a_rule_says_nothing_about_stays_frozen() -> None:
    pk.set_op_rule(torch.ops.pktest.same_size, lambda _: None)
    model = net(lambda x, _: torch.ops.pktest.same_size(x))
    assert free(model) == 0


def test_a_rule_can_freeze_some_channels_and_say_why() -> None:
    def rule(call: pk.OpCall) -> None:
        channels = call.channels(call.args[0], 1)
        call.freeze(channels[:2], "the first two are special")
        call.pass_on(call.results[0], channels, 1)

    pk.set_op_rule(same_size, rule)
    found = pk.inspect(net(lambda x, _: torch.ops.pktest.same_size(x)), X).groups[0]
    assert found.free == (2, 3, 4, 5, 6, 7)
    assert "the first two are special" in found.frozen[0]


BROKEN: dict[str, Callable[[pk.OpCall], None]] = {
    "too few": lambda call: call.pass_on(call.results[0], call.channels(call.args[0], 1)[:3], 1),
    "no such dimension": lambda call: call.pass_on(call.results[0], call.channels(call.args[0], 7), 1),
    "positions": lambda call: call.pass_on(call.results[0], call.channels(call.args[0], 2), 2),
    "a mistake": lambda call: call.args[9],
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_rule_that_fails_is_named(case: str) -> None:
    pk.set_op_rule("pktest::same_size", BROKEN[case])
    with pytest.raises(pk.InputError, match="rule of the operation 'pktest::same_size' does not hold"):
        pk.inspect(net(lambda x, _: torch.ops.pktest.same_size(x)), X)


def test_an_operand_that_a_channelwise_rule_cannot_place_is_named() -> None:
    pk.set_op_rule("pktest::scale", "channelwise")
    with pytest.raises(pk.InputError, match="operand of shape"):
        pk.inspect(net(lambda x, w: torch.ops.pktest.scale(x, w.repeat(3)), weighted=True), X)


@pytest.mark.parametrize(
    ("op", "rule", "message"),
    [
        ("pktest::swsh", "pointwise", "no operation 'pktest::swsh' is registered"),
        ("swish", "pointwise", "no operation 'swish'"),
        ("aten::relu", "pointwise", "has a rule of prunekit's"),
        ("aten::sigmoid", "pointwise", "has a rule of prunekit's"),
        ("aten::convolution", "channelwise", "has a rule of prunekit's"),
        ("aten::conv2d", "channelwise", "is made of others"),
        ("pktest::swish", "elementwise", "unknown rule 'elementwise'"),
        ("pktest::swish", 3, "unknown rule '3'"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(op: str, rule: Any, message: str) -> None:
    with pytest.raises(pk.InputError, match=message):
        pk.set_op_rule(op, rule)
