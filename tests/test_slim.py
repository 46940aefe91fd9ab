"""Network Slimming, one shot: the threshold, the budgets, the guards, and what removal does to the next layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import prunekit as pk
from prunekit import models, surgery
from prunekit.errors import InputError

X = torch.zeros(1, 3, 16, 16)


def with_random_gammas(arch: str, args: dict[str, object] | None = None, seed: int = 0) -> nn.Module:
    model = models.build(arch, args or {})
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.01, 1.0, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
    return model


def plain(widths: tuple[int, ...] = (8, 8, 8)) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 4)).eval()


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5, 0.75])
def test_exactly_the_asked_number_of_channels_goes(ratio: float) -> None:
    model = with_random_gammas("vgg11_cifar", {"width": 0.25})
    total = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    small, _ = pk.slim(model, ratio=ratio)
    left = sum(m.num_features for m in small.modules() if isinstance(m, nn.BatchNorm2d))
    assert total - left == round(ratio * total)


def test_the_smallest_gammas_go_and_ties_do_not_take_more() -> None:
    model = plain()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    small, plan = pk.slim(model, X, ratio=0.25)
    assert sum(m.num_features for m in small.modules() if isinstance(m, nn.BatchNorm2d)) == 18
    assert plan.notes["threshold"] == 1.0


def test_coupled_channels_go_only_where_all_agree() -> None:
    model = with_random_gammas("resnet20_cifar", {"shortcut": "conv"})
    graph = pk.inspect(model).graph
    result = pk.prune("slim", model, ratio=0.5)
    stream = graph.group("layer1.0.conv2")
    kept = next(k.index for k in result.plan.keeps if graph.group(k.group) is stream)
    norms = [m for n, m in model.named_modules() if n == "bn1" or (n.startswith("layer1") and n.endswith("bn2"))]
    worst = torch.stack([m.weight.detach().abs() for m in norms]).amax(0)
    gone = [u for u in range(stream.size) if u not in kept]
    assert float(worst[gone].max()) <= result.plan.notes["threshold"]
    assert float(worst[list(kept)].min()) >= result.plan.notes["threshold"]


def test_no_layer_dies_and_the_ratio_is_met_elsewhere() -> None:
    model = plain((8, 8, 8))
    with torch.no_grad():
        model[1].weight.fill_(0.01)
        model[4].weight.uniform_(0.5, 1)
        model[7].weight.uniform_(0.5, 1)
    small, plan = pk.slim(model, X, ratio=0.5)
    widths = [m.num_features for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert widths[0] == 1
    assert sum(widths) == 12
    assert plan.notes["protected"] == ["0"]
    wide, _ = pk.slim(model, X, ratio=0.5, min_channels=3)
    assert min(m.num_features for m in wide.modules() if isinstance(m, nn.BatchNorm2d)) == 3


@pytest.mark.parametrize("arch", ["vgg11_cifar", "resnet20_cifar", "densenet40_12", "preresnet164"])
@pytest.mark.parametrize("target", ["70%", "30%"])
def test_macs_are_met_within_one_percent(arch: str, target: str) -> None:
    result = pk.prune(
        "slim", with_random_gammas(arch, {"width": 0.25} if arch == "vgg11_cifar" else {}), target_macs=target
    )
    wanted = float(target.rstrip("%")) / 100
    assert result.after.macs / result.before.macs == pytest.approx(wanted, rel=0.01)


def test_parameters_are_met() -> None:
    result = pk.prune("slim", with_random_gammas("resnet20_cifar"), target_params="100K")
    assert result.after.params == pytest.approx(100_000, rel=0.01)


@pytest.mark.parametrize("unit", [4, 8])
def test_widths_are_rounded(unit: int) -> None:
    small, _ = pk.slim(with_random_gammas("resnet20_cifar", {"shortcut": "conv"}), ratio=0.4, round_to=unit)
    widths = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % unit == 0 for width in widths)
    assert min(widths) < 16


def test_scope_inner_leaves_streams_alone() -> None:
    small, _ = pk.slim(with_random_gammas("resnet20_cifar"), ratio=0.4, scope="inner")
    assert [small.get_submodule(f"layer{i}.0.conv2").out_channels for i in (1, 2, 3)] == [16, 32, 64]
    gated = models.build("mobilenet_v3_small")
    _, plan = pk.slim(gated, ratio=0.2, scope="inner")
    assert any("block.0" in keep.group for keep in plan.keeps)  # a squeeze-and-excite gate is no stream


def test_a_channel_with_gamma_zero_is_absorbed_exactly_away_from_borders() -> None:
    torch.manual_seed(1)
    model = plain().double()
    with torch.no_grad():
        for i in (1, 4, 7):
            model[i].bias.uniform_(0.1, 1.0)
            model[i].weight[:4] = 0.0
    for i in (0, 3, 6):
        model[i].padding = (0, 0)  # constants meet no zero padding
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    absorbed, plan = pk.slim(model, x, ratio=0.5)
    dropped, _ = pk.slim(model, x, ratio=0.5, restore="none")
    assert len(plan.folds) == 3
    torch.testing.assert_close(absorbed(x), model(x))
    assert not torch.allclose(dropped(x), model(x), rtol=0.05)


def test_constants_pass_through_residual_sums_and_smooth_activations() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)
            self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.silu(self.na(self.a(x)))
            return self.c(torch.nn.functional.silu(x + self.nb(self.b(x))))

    model = Block().double().eval()
    with torch.no_grad():
        for norm in (model.na, model.nb):
            norm.weight[:4] = 0.0
            norm.bias.normal_()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    small, _ = pk.slim(model, x, ratio=0.5)
    assert small.a.out_channels == 4
    torch.testing.assert_close(small(x), model(x))


def test_a_value_that_follows_the_input_is_not_taken_for_a_constant() -> None:
    model = models.build("mobilenet_v3_small")
    _, plan = pk.slim(model, ratio=0.3)
    gated = {fold.consumer for fold in plan.folds}
    assert "features.1.block.2.0" not in gated  # behind squeeze-and-excite: the constant is scaled per image


def test_ratios_by_group() -> None:
    model = with_random_gammas("resnet20_cifar")
    small, plan = pk.slim(model, ratio={"layer1.0.conv1": 0.5, "layer2.1.conv1": 0.25})
    assert small.layer1[0].conv1.out_channels == 8
    assert small.layer2[1].conv1.out_channels == 24
    assert len(plan.keeps) == 2


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), {"ratio": 0.5}, "no batch norm"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), {"ratio": 0.5}, "nothing in this model can be pruned"),
        (plain(), {"ratio": 0.001}, "too small"),
        (plain(), {"ratio": 2.0}, "between 0 and 1"),
        (plain(), {"ratio": 0.5, "min_channels": 0}, "at least 1"),
        (plain(), {"ratio": 0.5, "scope": "outer"}, "unknown scope"),
        (plain(), {"target_macs": "1"}, "would leave 1 MACs"),
        (plain(), {"target_macs": 1000.0}, "cannot be met"),
        (plain(), {"ratio": {"17": 0.5}}, "'17' matches no layer"),
    ],
)
def test_bad_input(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pk.PrunekitError, match=message):
        pk.slim(model.eval(), X, **settings)


def test_an_input_that_the_model_does_not_take() -> None:
    with pytest.raises(InputError, match="forward fails on an input of shape"):
        pk.slim(plain(), torch.zeros(1, 5, 16, 16), ratio=0.5)
    with pytest.raises(InputError, match="example input is needed"):
        pk.slim(plain(), ratio=0.5)


def test_sizes_written_into_the_code_are_worked_around() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.fixed, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.head = nn.Linear(8 * 256, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.n1(self.free(x)))
            return self.head(torch.relu(self.n2(self.fixed(x))).view(-1, 8 * 256))

    small, _ = pk.slim(Hard().eval(), X, ratio=0.5)
    assert (small.free.out_channels, small.fixed.out_channels) == (4, 8)


def _without_biases(norm: bool) -> nn.Sequential:
    """Constants of its first channels can only go into a bias that is made, or into a running mean."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 1, bias=False)),
        *(nn.BatchNorm2d(64) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(64, 4, 1)),
    )
    with torch.no_grad():
        model[1].weight.uniform_()
        model[1].bias.normal_()
    return model.eval()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("restore", ["constants", "none", "calibrate", "synthetic"])
@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"target_params": 0.6}, {"target_params": 0.75}])
def test_the_parameters_said_are_those_of_the_network(norm: bool, restore: str, amount: dict[str, Any]) -> None:
    model, x = _without_biases(norm), torch.randn(1, 3, 8, 8)
    present = sum(p.numel() for p in model.parameters())
    amount = {flag: share * present if flag == "target_params" else share for flag, share in amount.items()}
    images: dict[str, Any] = {"images": torch.randn(8, 3, 8, 8)} if restore == "calibrate" else {}
    result = pk.prune("slim", model, x, restore=restore, **amount, **images)
    said = result.after.params
    assert said == sum(p.numel() for p in result.model.parameters()) == surgery.measure(result.model, x).params
    assert result.model[3].bias is None or (restore != "none" and not norm)
    assert said <= amount.get("target_params", present)


def test_biases_that_are_made_count_towards_the_target() -> None:
    """What fits only without the bias that constants need does not fit."""
    model, x = _without_biases(norm=False), torch.randn(1, 3, 8, 8)
    plain = pk.prune("slim", model, x, ratio=0.25, restore="none").after.params
    result = pk.prune("slim", model, x, target_params=plain)
    assert result.model[3].bias is not None
    assert result.after.params <= plain
    assert result.model[0].out_channels < 12
