"""Residual blocks that go as a whole: a plan that keeps nothing of their channels, proven, stored and exported."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import EfficientNet, MobileNetV2, ResNet
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import Bottleneck

import prunekit as pk
from networks import lively, random_plan
from prunekit import surgery
from prunekit.errors import InputError, SurgeryError
from prunekit.models.preresnet import PreResNet
from prunekit.models.resnet import CifarResNet
from prunekit.nn.skipped import SkippedBlock
from prunekit.restoration.frontier import Frontier
from prunekit.restoration.refit_targets import find_sites
from prunekit.surgery import structure
from prunekit.surgery.graph.blocks import residual_blocks


class Residual(nn.Module):
    """The sum alone; an activation may follow outside."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Conditioned(Residual):
    """A block that is given something besides the stream."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.body(x)


class Squeezed(nn.Module):
    """Squeeze and excitation behind the last layer of the branch, which shares its ReLU with others."""

    def __init__(self, width: int, relu: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width, 3, padding=1)
        self.down, self.up, self.relu = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1), relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(self.relu(self.first(x)))
        out = out * torch.sigmoid(self.up(self.relu(self.down(out.mean((2, 3), keepdim=True)))))
        out += x
        return self.relu(out)


class Tokens(nn.Module):
    """A mixer's block on `(N, T, C)`, scaled for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


def _body(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, width, 3, padding=1))


def _plain(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def _mixer() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), Tokens(6), Tokens(6), nn.Linear(6, 5))


def _squeezed() -> nn.Module:
    relu = nn.ReLU()
    return _plain(relu, Squeezed(8, relu), Squeezed(8, relu))


def _efficient() -> nn.Module:
    setting = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 1, 8, 8, 2)]
    return EfficientNet(setting, dropout=0.0, num_classes=5, last_channel=16)


# The network, its input, and for each block that can go: its name, and the module or tensor that ends its branch.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = {
    "basic": (
        lambda: CifarResNet(depth=14, width=0.25),
        (3, 16, 16),
        dict.fromkeys(("layer1.0", "layer1.1", "layer2.1", "layer3.1"), "bn2"),
    ),
    "pre-activation": (
        lambda: PreResNet(depth=20, width=0.25),
        (3, 16, 16),
        {f"layer{n}.1": "conv3" for n in (1, 2, 3)},
    ),
    "bottleneck": (
        lambda: ResNet(Bottleneck, [2, 2, 1, 1], num_classes=5, width_per_group=4),
        (3, 32, 32),
        {"layer1.1": "bn3", "layer2.1": "bn3"},
    ),
    "inverted": (
        lambda: MobileNetV2(5, inverted_residual_setting=[[1, 16, 1, 1], [4, 8, 3, 2]]),
        (3, 32, 32),
        {"features.3": "conv.3", "features.4": "conv.3"},
    ),
    "squeezed": (_efficient, (3, 32, 32), {"features.2.0": "block.3", "features.2.1": "block.3"}),
    "activation outside": (
        lambda: _plain(nn.ReLU(), Residual(_body(8, 6)), nn.ReLU(), Residual(_body(8, 4)), nn.SiLU()),
        (3, 8, 8),
        {"2": "body", "4": "body"},
    ),
    "shared activation": (_squeezed, (3, 8, 8), {"2": "last", "3": "last"}),
    "tokens": (_mixer, (7, 8), {"1": "down", "2": "down"}),
}


def network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = NETWORKS[kind]
    return lively(make()), torch.randn(2, *shape, dtype=torch.float64)


def emptied(graph: surgery.Graph, names: Any) -> list[pk.Keep]:
    cuts = {block.module: block.cuts[-1] for block in residual_blocks(graph)}
    return [pk.Keep(cuts[name], ()) for name in names]


def without(model: nn.Module, kind: str, names: Any) -> nn.Module:
    """The original whose last layers in these blocks have weights of zero: no surgery."""
    model = copy.deepcopy(model)
    for name in names:
        block = model.get_submodule(name)
        layers = [m for m in block.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        last = block.last if kind == "shared activation" else layers[-1]
        nn.init.zeros_(last.weight)
    return model


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_go_and_the_network_computes_the_rest(kind: str) -> None:
    model, x = network(kind)
    graph, names = surgery.trace(model, x), list(NETWORKS[kind][2])
    assert [block.module for block in residual_blocks(graph)] == names
    for going in (names[:1], names):
        plan = pk.Plan(emptied(graph, going))
        small = surgery.edit(model, plan, graph)
        assert surgery.verify(model, small, plan, graph) < 1e-10
        assert all(isinstance(small.get_submodule(name), SkippedBlock) for name in going)
        with torch.no_grad():
            assert torch.allclose(small(x), without(model, kind, going)(x), atol=1e-10)
            assert not torch.allclose(small(x), model(x), atol=1e-4)
        cost = surgery.measure(small, x)
        assert cost.to_json() == surgery.predict(graph, surgery.resolve(graph, plan).kept).to_json()


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_proof_can_fail(kind: str) -> None:
    model, x = network(kind)
    graph, names = surgery.trace(model, x), list(NETWORKS[kind][2])
    plan = pk.Plan(emptied(graph, names))
    small = surgery.edit(model, plan, graph)
    skip = small.get_submodule(names[0])
    with torch.no_grad():
        skip.bias[0] += 0.01
    with pytest.raises(SurgeryError, match="does not compute what was meant"):
        surgery.verify(model, small, plan, graph)
    small.set_submodule(names[0], nn.Identity())
    with pytest.raises(SurgeryError):
        surgery.verify(model, small, plan, graph)


@pytest.mark.parametrize("kind", ["basic", "pre-activation", "inverted", "tokens"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000))
def test_blocks_go_with_channels_of_other_groups(kind: str, seed: int) -> None:
    """Streams that the blocks add into among them."""
    model, x = network(kind)
    graph, chance = surgery.trace(model, x), random.Random(seed)
    going = [name for name in NETWORKS[kind][2] if chance.random() < 0.5] or list(NETWORKS[kind][2])
    empty = {keep.group: keep for keep in emptied(graph, going)}
    plan = pk.Plan(({keep.group: keep for keep in random_plan(graph, seed).keeps} | empty).values())
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) < 1e-10
    cost = surgery.measure(small, x)
    assert cost.to_json() == surgery.predict(graph, surgery.resolve(graph, plan).kept).to_json()


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "inverted", "tokens"])
def test_a_fold_says_what_the_branch_was_worth(kind: str) -> None:
    """The last layer goes on reading constants, which is the same as a branch that gives another constant."""
    model, x = network(kind)
    graph, (name, *_) = surgery.trace(model, x), list(NETWORKS[kind][2])
    block = residual_blocks(graph)[0]
    weight = block.last[0]
    size = graph.group(block.cuts[-1]).size
    offset = torch.rand(size, dtype=torch.float64)
    plan = pk.Plan([*emptied(graph, [name]), pk.Fold(graph.address(weight), block.cuts[-1], offset=offset)])
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) < 1e-10
    plain = surgery.edit(model, pk.Plan(emptied(graph, [name])), graph)
    moved = small.get_submodule(name).bias - plain.get_submodule(name).bias
    taps = model.get_parameter(weight).detach()
    expected = (taps.flatten(2).sum(2) if taps.dim() > 2 else taps) @ offset
    if kind == "tokens":
        expected = expected * model.get_submodule(name).scale.detach()
    else:
        norm = model.get_submodule(f"{name}.{NETWORKS[kind][2][name]}")
        expected = expected * norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(moved, expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["basic", "pre-activation", "inverted"])
def test_what_is_left_can_be_pruned_again(kind: str) -> None:
    model, x = network(kind)
    graph, names = surgery.trace(model, x), list(NETWORKS[kind][2])
    small = surgery.edit(model, pk.Plan(emptied(graph, names[:1])), graph)
    again = surgery.trace(small, x)
    assert [block.module for block in residual_blocks(again)] == names[1:]
    stream = next(g for g in again.groups if any(m.parameter == f"{names[0]}.bias" for m in g.followers))
    plan = pk.Plan([pk.Keep(stream.name, stream.free[: stream.size // 2]), *emptied(again, names[1:2])])
    smaller = surgery.edit(small, plan, again)
    assert surgery.verify(small, smaller, plan, again) < 1e-10
    assert len(smaller.get_submodule(names[0]).bias) < len(small.get_submodule(names[0]).bias)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "inverted", "squeezed"])
def test_images_tell_what_the_branch_gave_on_average(kind: str) -> None:
    model, _ = network(kind)
    images = torch.randn(12, *NETWORKS[kind][1], dtype=torch.float64)
    name, end = next(iter(NETWORKS[kind][2].items()))
    given: list[Tensor] = []
    hook = model.get_submodule(f"{name}.{end}").register_forward_hook(lambda *call: given.append(call[2].clone()))
    model(images)
    hook.remove()
    graph = surgery.trace(model, images[:1])
    plan = pk.restore(model, pk.Plan(emptied(graph, [name])), images[:1], images=images)
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) < 1e-9
    assert torch.allclose(small.get_submodule(name).bias, given[0].mean((0, 2, 3)), atol=1e-6)


def test_what_follows_a_block_that_went_makes_up_for_it() -> None:
    """Streams that later layers repair are followed in both networks."""
    model, _ = network("basic")
    images = torch.randn(24, 3, 16, 16, dtype=torch.float64)
    graph = surgery.trace(model, images[:1])
    plan = pk.Plan([*emptied(graph, ["layer1.1", "layer2.1"]), pk.Keep("layer3.0.conv1", range(8))])
    sites, _ = find_sites(model, graph, plan)
    assert not [site.layer for site in sites if site.layer.startswith(("layer1.1", "layer2.1"))]
    skipped = surgery.resolve(graph, plan).skipped
    met = set()
    with Frontier(model, surgery.edit(model, plan, graph), graph, sites, images, 1 << 28, skipped) as frontier:
        for site, arrivals in frontier.arrivals():
            for arrival in arrivals:
                assert arrival is not None
                if site.join is not None:
                    assert arrival.small.stream is not None
                    met.add(site.layer)
    assert "layer3.1.conv2" in met
    restored = surgery.edit(model, pk.restore(model, plan, images[:1], images=images), graph)
    plain = surgery.edit(model, plan, graph)
    with torch.no_grad():
        errors = [float((small(images) - model(images)).square().mean()) for small in (restored, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("way", ["none", "constants", "paper", "moments", "closed-form", "synthetic"])
def test_every_way_of_restoring_takes_such_plans(way: str) -> None:
    model, x = network("basic")
    graph = surgery.trace(model, x)
    plan = pk.Plan([*emptied(graph, ["layer1.1"]), pk.Keep("layer3.1.conv1", range(8)), pk.Keep("layer1.0.conv1", [1])])
    plan = pk.restore(model, plan, x, way=way)
    assert surgery.verify(model, surgery.edit(model, plan, graph), plan, graph) < 1e-9


def test_files_hold_what_is_left(tmp_path: Path) -> None:
    model = pk.load("prunekit:resnet20").eval()
    small = pk.apply(model, pk.Plan([pk.Keep("layer1.1.conv1", ()), pk.Keep("layer3.2.conv1", range(8))]))
    pk.save(small, tmp_path / "small.pt")
    again = pk.load(tmp_path / "small.pt").eval()
    x = torch.randn(2, 3, 32, 32)
    assert isinstance(again.get_submodule("layer1.1"), SkippedBlock)
    assert torch.equal(again(x), small(x))
    smaller = pk.apply(again, pk.Plan([pk.Keep("layer1.2.conv1", ())]))
    pk.save(smaller, tmp_path / "smaller.pt")
    assert torch.equal(pk.load(tmp_path / "smaller.pt").eval()(x), smaller(x))


@pytest.mark.parametrize("suffix", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_exported_files_have_no_branch(tmp_path: Path, suffix: str) -> None:
    """The file is run and compared before it is written."""
    model, x = network("activation outside")
    small = pk.apply(model.float(), pk.Plan([pk.Keep("2.body.0", ())]), x.float())
    pk.export(small, tmp_path / f"small.{suffix}", x.float())
    if suffix == "onnx":
        nodes = onnx.load(tmp_path / "small.onnx").graph.node
        assert sum(node.op_type == "Conv" for node in nodes) == sum(isinstance(m, nn.Conv2d) for m in small.modules())


def test_what_is_left_learns_and_keeps_its_mode() -> None:
    model = pk.load("prunekit:resnet20").train()
    small = pk.apply(model, pk.Plan([pk.Keep("layer1.1.conv1", ())]))
    skip = small.get_submodule("layer1.1")
    assert skip.training
    small(torch.randn(4, 3, 32, 32)).sum().backward()
    assert bool((skip.bias.grad != 0).any())


def test_blocks_that_cannot_go_are_refused() -> None:
    model = pk.load("prunekit:resnet20").eval()
    with pytest.raises(SurgeryError, match=r"leaves 'layer2\.0\.conv1' without a single channel") as refused:
        pk.apply(model, pk.Plan([pk.Keep("layer2.0.conv1", ())]))
    assert "layer1.0.conv1" in str(refused.value.hint)
    assert "layer2.0.conv1" not in str(refused.value.hint)


def test_blocks_that_take_more_than_the_stream_stay() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 1), Conditioned(_body(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x), scale=0.5)

    torch.manual_seed(0)
    model, x = Called().eval(), torch.randn(1, 3, 8, 8)
    graph = surgery.trace(model, x)
    assert residual_blocks(graph) == ()
    with pytest.raises(SurgeryError, match="without a single channel"):
        surgery.edit(model, pk.Plan([pk.Keep("block.body.0", ())]), graph)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"layer9.0": {"axis": 1, "activation": "relu"}}, "does not have"),
        ({"": {"axis": 1, "activation": None}}, "does not have"),
        ({"layer1.1": {"axis": 1, "activation": "eval"}}, "does not say what is left"),
        ({"layer1.1": {"axis": "1", "activation": None}}, "does not say what is left"),
        ({"layer1.1": "relu"}, "does not say what is left"),
        ({"layer1.2": {"axis": 1, "activation": None}}, "does not say what is left"),
    ],
)
def test_files_that_claim_otherwise_are_refused(broken: dict[str, Any], said: str) -> None:
    model = pk.load("prunekit:resnet20").eval()
    small = pk.apply(model, pk.Plan([pk.Keep("layer1.1.conv1", ())]))
    claims = structure.describe(small) | {"skipped": broken}
    with pytest.raises(InputError, match=said):
        structure.conform(pk.load("prunekit:resnet20"), claims)
