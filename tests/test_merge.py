"""Neuron Merging: the paper's arithmetic, its guards, and its published numbers on its published checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from networks import lively
from prunekit import models
from prunekit.errors import InputError
from prunekit.restoration.paper import BatchNormStatistics, scaling_batch_norm, scaling_linear

PARAMETERS = {0.1: 759_632, 0.2: 678_650, 0.3: 590_180, 0.4: 509_198, 0.5: 430_826, 0.6: 334_688}
PUBLISHED = {  # criterion, ratio -> accuracy in percent after pruning alone, and after merging
    ("l1-norm", 0.1): (91.53, 92.61),
    ("l1-norm", 0.2): (87.02, 90.02),
    ("l1-norm", 0.3): (74.46, 83.72),
    ("l1-norm", 0.4): (49.68, 75.37),
    ("l1-norm", 0.5): (25.58, 57.06),
    ("l1-norm", 0.6): (21.31, 21.14),
    ("l2-norm", 0.3): (76.95, 84.47),
    ("l2-norm", 0.5): (24.34, 57.82),
    ("l2-GM", 0.5): (17.84, 50.79),
}


def resnet56() -> nn.Module:
    return models.build("resnet56_cifar", {"shortcut": "conv", "relu": "input"})


@pytest.mark.parametrize(("ratio", "parameters"), PARAMETERS.items())
def test_parameter_counts_are_the_papers(ratio: float, parameters: int) -> None:
    result = pk.prune("merge", resnet56(), ratio=ratio, restore="none")
    assert result.after.params == parameters == sum(p.numel() for p in result.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "ratio"), PUBLISHED)
def test_published_accuracies(
    criterion: Any, ratio: float, assets: Path, cifar_test: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    model = pk.load(
        assets / "checkpoints" / "ResNet.cifar10.original.56.pth.tar",
        arch="resnet56_cifar",
        arch_args={"shortcut": "conv", "relu": "input"},
    )
    images, labels = cifar_test(1)
    assert len(labels) == 10_000
    ways: tuple[Any, ...] = ("none", "paper")
    for restore, published in zip(ways, PUBLISHED[criterion, ratio], strict=True):
        small, _ = pk.merge(model, ratio=ratio, criterion=criterion, restore=restore)
        assert accuracy(small, images, labels) == pytest.approx(published, abs=0.05)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    right = 0
    with torch.inference_mode():
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            right += int((model((x / 255 - mean) / std).argmax(1) == y).sum())
    return 100 * right / len(labels)


def release_row(w: Tensor, bn: BatchNormStatistics, kept: list[int], i: int, t: float, lam: float) -> dict[int, float]:
    """One row of Z for removed filter `i`, the formulas of section 3.3 written out one scalar at a time."""
    assert bn.mean is not None
    assert bn.variance is not None
    norms = [float(f.norm()) for f in w]
    cosines, scales, distances = [], [], []
    g1, b1, m1, v1 = (float(x[i]) for x in (bn.gamma, bn.beta, bn.mean, bn.variance))
    for j in kept:
        g2, b2, m2, v2 = (float(x[j]) for x in (bn.gamma, bn.beta, bn.mean, bn.variance))
        s0 = norms[i] / norms[j]
        scale = s0 * (g2 / g1) * (v1 / v2)
        distances.append(abs(g2 / v2 * (s0 * (-v1 * b1 / g1 + m1) - m2) + b2) / scale)
        scales.append(scale)
        cosines.append(float(w[i] @ w[j]) / (norms[i] * norms[j]))
    low, high = min(distances), max(distances)
    scores = [lam * (1 - c) + (1 - lam) * (d - low) / (high - low) for c, d in zip(cosines, distances, strict=True)]
    best = int(np.argmin(scores))
    return {best: scales[best]} if cosines[best] >= t else {}


@pytest.mark.parametrize("lam", [0.7, 0.85, 1.0])
def test_the_matrix_form_is_the_scalar_form(lam: float) -> None:
    w = torch.randn(12, 30, dtype=torch.float64)
    bn = BatchNormStatistics(*(torch.rand(12, dtype=torch.float64) + 0.2 for _ in range(4)))
    kept, removed = [0, 3, 4, 7, 11], [1, 2, 5, 6, 8, 9, 10]
    scaling = scaling_batch_norm(w, bn, torch.tensor(kept), torch.tensor(removed), 0.1, lam)
    for row, i in enumerate(removed):
        expected = torch.zeros(len(kept), dtype=torch.float64)
        for j, scale in release_row(w, bn, kept, i, 0.1, lam).items():
            expected[j] = scale
        torch.testing.assert_close(scaling.matrix[row], expected)


def test_a_filter_that_is_a_multiple_of_another_is_restored_exactly() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        for small, large, scale in ((0, 4, 0.5), (1, 5, 0.2), (2, 6, 0.3), (3, 7, 0.6)):
            model[0].weight[small] = scale * model[0].weight[large]
            model[0].bias[small] = scale * model[0].bias[large]
    x = torch.randn(50, 6, dtype=torch.float64)
    merged, plan = pk.merge(model, x, ratio={"0": 0.5}, threshold=0.45)
    pruned, _ = pk.merge(model, x, ratio={"0": 0.5}, restore="none")
    assert plan.notes["merged"] == 4
    torch.testing.assert_close(merged(x), model(x))
    assert not torch.allclose(pruned(x), model(x), rtol=1e-2)


def test_each_channel_owns_its_columns_across_a_flatten() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double().eval()
    with torch.no_grad():
        for small, large in ((1, 0), (3, 2)):
            model[0].weight[small] = 0.5 * model[0].weight[large]
            model[0].bias[small] = 0.5 * model[0].bias[large]
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    merged, _ = pk.merge(model, x, ratio={"0": 0.5})
    assert merged[0].out_channels == 2
    torch.testing.assert_close(merged(x), model(x))


def test_guards() -> None:
    w = torch.randn(4, 9, dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    dead = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    bn = BatchNormStatistics(dead, ones, ones, ones)
    only = scaling_batch_norm(w, bn, torch.tensor([0]), torch.tensor([1, 2, 3]), -1.0, 0.85)
    assert torch.isfinite(only.matrix).all()
    assert (only.matrix[[0, 2]] == 0).all()  # gamma = 0 merges with nothing
    nothing = scaling_batch_norm(w, bn, torch.tensor([1, 3]), torch.tensor([0, 2]), -1.0, 0.85)
    assert nothing.merged == 0  # a kept gamma = 0 is no candidate
    zero = scaling_linear(torch.zeros(3, 4), torch.tensor([0]), torch.tensor([1, 2]), 0.1)
    assert torch.isfinite(zero.matrix).all()


def test_a_gamma_near_zero_does_not_run_away() -> None:
    w = torch.rand(3, 9, dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    tiny = torch.tensor([1.0, 1e-6, 0.5], dtype=torch.float64)
    scaling = scaling_batch_norm(
        w, BatchNormStatistics(tiny, ones, ones, ones), torch.tensor([0]), torch.tensor([1, 2]), 0.1, 0.85
    )
    assert scaling.merged == 1
    assert float(scaling.matrix.abs().max()) < 10


def test_a_negative_scale_is_counted() -> None:
    w = torch.eye(2, 4, dtype=torch.float64) + 0.9
    plus, minus = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    bn = BatchNormStatistics(minus, plus, plus, plus)
    scaling = scaling_batch_norm(w, bn, torch.tensor([0]), torch.tensor([1]), 0.1, 0.85)
    assert (scaling.merged, scaling.negative) == (1, 1)


def test_streams_are_left_whole_and_said() -> None:
    plan = pk.prune("merge", models.build("resnet20_cifar"), ratio=0.5).plan
    assert plan.notes["left"]["layer3.0.conv2"] == "several layers add into these channels"
    assert all(keep.group.endswith("conv1") for keep in plan.keeps)


@pytest.mark.parametrize(("flag", "amount"), [("target_macs", "60%"), ("target_params", "500K")])
def test_targets(flag: str, amount: str) -> None:
    target: dict[str, Any] = {flag: amount}
    result = pk.prune("merge", resnet56(), **target)
    if flag == "target_macs":
        assert 0.57 * result.before.macs <= result.after.macs <= 0.6 * result.before.macs
    else:
        assert 480_000 <= result.after.params <= 500_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 1}, "between 0 and 1"),
        ({"ratio": -0.5}, "between 0 and 1"),
        ({"ratio": math.nan}, "between 0 and 1"),
        ({}, "exactly one"),
        ({"ratio": 0.5, "target_macs": "50%"}, "exactly one"),
        ({"ratio": 0.5, "criterion": "l1"}, "(?s)unknown criterion 'l1'.did you mean.*l1-norm"),
        ({"ratio": 0.5, "restore": "papr"}, "did you mean paper"),
        ({"ratio": 0.5, "threshold": 2.0}, "--threshold"),
        ({"ratio": 0.5, "lam": -1.0}, "--lambda"),
        ({"ratio": 0.5, "speed": 1}, "no setting 'speed'"),
        ({"target_macs": "1"}, "would leave 1 MACs"),
        ({"target_macs": "2000"}, "cannot be met"),
        ({"target_macs": "200%"}, "must lie between"),
        ({"target_macs": "many"}, "takes an amount"),
        ({"ratio": {"layer1.0.conv1": 1.5}}, "between 0 and 1"),
        ({"ratio": {"layer3.0.conv2": 0.5}}, "cannot be merged"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pk.prune("merge", models.build("resnet20_cifar"), **settings)


def _body(norm: Callable[[int], nn.Module], activation: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), norm(16), activation, nn.Conv2d(16, 8, 1), norm(8), activation]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


class Tokens(nn.Module):
    """A small vision transformer's shape: patches, layer norm, a hidden layer behind GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.norm, self.hidden, self.back = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.back(nn.functional.gelu(self.hidden(self.norm(x))))).mean(1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "SiLU": (lambda: _body(nn.BatchNorm2d, nn.SiLU()), "'silu' in 2", "moments"),
    "hard swish": (lambda: _body(nn.BatchNorm2d, nn.Hardswish()), "'hardswish' in 2", "moments"),
    "softplus": (lambda: _body(nn.BatchNorm2d, nn.Softplus()), "'softplus' in 2", "moments"),
    "group norm": (lambda: _body(lambda width: nn.GroupNorm(4, width), nn.SiLU()), "native_group_norm", "calibrate"),
    "SiLU, no norm": (lambda: _body(lambda _: nn.Identity(), nn.SiLU()), "'silu' in 2", "calibrate"),
    "batch norm without statistics": (
        lambda: _body(lambda width: nn.BatchNorm2d(width, track_running_stats=False), nn.SiLU()),
        "'silu' in 2",
        "calibrate",
    ),
    "transformer": (Tokens, "'gelu' in Tokens", "moments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_papers_way_refuses_is_told_which_way_works(name: str) -> None:
    build, reason, way = REFUSED[name]
    model, x = build(), torch.randn(1, 3, 8, 8)
    with pytest.raises(InputError, match=re.escape(reason)) as refusal:
        pk.merge(model, x, ratio=0.5, restore="paper")
    assert f"--restore {way}" in str(refusal.value.hint)
    settings: dict[str, Any] = {"images": torch.randn(8, 3, 8, 8)} if way == "calibrate" else {}
    result = pk.prune("merge", model, x, ratio=0.5, restore=way, **settings)
    assert result.after.params < result.before.params


@pytest.mark.parametrize("name", REFUSED)
def test_without_images_each_layer_is_restored_as_best_it_can(name: str) -> None:
    """Nothing that can be pruned is refused: by moments where there are statistics, else plainly, and that is said."""
    build, reason, way = REFUSED[name]
    result = pk.prune("merge", build(), torch.randn(1, 3, 8, 8), ratio=0.5)
    notes = result.plan.notes
    assert result.after.params < result.before.params
    assert notes["restore"] == ("moments" if way == "moments" else "none")
    assert (notes["plain"] == {}) == (way == "moments")
    assert way == "moments" or any(reason in said for said in notes["plain"].values())


class Mixed(nn.Module):
    """A layer for each way: with statistics, behind ReLU without, behind SiLU without, and gated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Conv2d(12, 10, 3)
        self.c, self.d = nn.Conv2d(10, 8, 3), nn.Conv2d(8, 12, 3)
        self.squeeze, self.excite, self.e = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.a(x)))
        x = self.d(nn.functional.silu(self.c(self.b(x).relu()))).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.e(x * gate)


class Ghost(nn.Module):
    """A layer whose channels are read as they are, and by a depthwise convolution, as in GhostNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.cheap, self.cheap_norm = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.a(x)).relu()
        return self.b(torch.cat([x, self.cheap_norm(self.cheap(x)).relu()], 1))


def test_what_ghosts_cannot_be_made_up_for_is_said_in_words() -> None:
    model, x = lively(Ghost()), torch.randn(60, 3, 12, 12, dtype=torch.float64)
    notes = pk.prune("merge", model, x[:1], ratio=0.4).plan.notes
    assert notes["plain"] == {
        "a": "not only the depthwise convolution in cheap reads these channels: making up for that takes images"
    }
    with pytest.raises(InputError, match="the depthwise convolution in cheap stands between this layer and the next"):
        pk.prune("merge", model, x[:1], ratio=0.4, restore="paper")
    restored = pk.prune("merge", model, x[:1], images=x, ratio=0.4)
    assert restored.plan.notes["plain"] == {}
    assert "b" in {refit.layer for refit in restored.plan.refits}


def test_ways_are_chosen_layer_by_layer() -> None:
    model, x = lively(Mixed()), torch.randn(60, 3, 12, 12, dtype=torch.float64)
    result = pk.prune("merge", model, x[:1], ratio=0.4)
    notes = result.plan.notes
    assert {refit.layer for refit in result.plan.refits} == {"b"}
    assert {fold.consumer for fold in result.plan.folds} == {"c", "excite"}
    assert notes["plain"] == {}
    assert notes["left"]["c"] == "'silu' in Mixed stands between this layer and the next"
    assert notes["left"]["d"] == "'excite' scales these channels: making up for that takes images"
    restored = pk.prune("merge", model, x[:1], images=x, ratio=0.4)
    assert {"d", "e", "squeeze", "excite"} <= {refit.layer for refit in restored.plan.refits}
    assert restored.plan.notes["plain"] == {}
    with torch.no_grad():
        want = model(x)
        errors = [float((found.model(x) - want).square().mean()) for found in (restored, result)]
    assert errors[0] < errors[1]


def test_layers_of_which_nothing_is_known_lose_what_equal_shares_take() -> None:
    """Three of four, behind SiLU: they do not have to pay for what the modelled layer keeps."""
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 32, 3), nn.SiLU()]
    layers += [nn.Conv2d(32, 32, 3), nn.SiLU(), nn.Conv2d(32, 16, 3), nn.SiLU(), nn.Conv2d(16, 4, 1)]
    model, x = lively(nn.Sequential(*layers)), torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    result = pk.prune("merge", model, x, ratio=0.4)
    kept = {keep.group: len(keep.index) for keep in result.plan.keeps}
    assert {name: kept[name] for name in ("3", "5", "7")} == {"3": 19, "5": 19, "7": 9}


def test_moments_know_what_else_goes() -> None:
    """A reader whose own outputs go plainly is refitted in the shape that is left."""
    model = lively(Mixed())
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    result = pk.prune("merge", model, x, ratio={"a": 0.5, "b": 0.5}, restore="moments", scope="all")
    assert next(refit for refit in result.plan.refits if refit.layer == "b").values["weight"].shape == (5, 6, 3, 3)


def test_far_less_than_asked_for_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 32, 3), nn.SiLU(), nn.Conv2d(32, 4, 1), nn.ReLU())
    model.extend([nn.Conv2d(4, 4, 1)])
    x = torch.zeros(1, 3, 12, 12)
    notes = pk.prune("merge", model.eval(), x, ratio=0.4, restore="paper").plan.notes
    assert "of the MACs, where 40% were asked for: without --restore paper 3 layers" in str(notes["warning"])
    assert "warning" not in pk.prune("merge", model, x, ratio=0.4).plan.notes


def test_a_target_out_of_reach_says_how_far_it_is_and_what_goes_further() -> None:
    """Behind ReLU6 the paper's merges stop: two layers are left to it, of three."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU6(), nn.Conv2d(32, 16, 1), nn.ReLU()]
    model, x = nn.Sequential(*layers, nn.Conv2d(16, 4, 1)).eval(), torch.zeros(1, 3, 12, 12)
    with pytest.raises(InputError, match="cannot be met: removing all that may go leaves") as refusal:
        pk.prune("merge", model, x, target_macs="5%", restore="paper")
    assert refusal.value.hint == "without --restore paper 3 layers can be narrowed instead of 2"
    left = int(refusal.value.message.rpartition(" ")[2].replace(",", ""))
    reached = pk.prune("merge", model, x, target_macs=left, restore="paper")
    assert reached.after.macs == left
    assert pk.prune("merge", model, x, target_macs="5%").after.macs <= 0.05 * reached.before.macs


@pytest.mark.parametrize("settings", [{"target_macs": "3%"}, {"target_params": "3%"}])
def test_widths_by_loss_reach_what_equal_shares_reach(settings: dict[str, Any]) -> None:
    """Even where measured losses would keep an eighth of each layer."""
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    model = lively(nn.Sequential(*layers, nn.Conv2d(32, 4, 1)))
    images = torch.randn(20, 3, 10, 10, dtype=torch.float64)
    result = pk.prune("merge", model, images[:1], images=images, **settings)
    shares = {
        "target_macs": result.after.macs / result.before.macs,
        "target_params": result.after.params / result.before.params,
    }
    assert shares[next(iter(settings))] <= 0.03


class Grouped(nn.Module):
    """A bottleneck with a grouped convolution, as in ResNeXt and RegNet."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.reduce = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1, bias=False)
        self.grouped, self.expand = nn.Conv2d(24, 24, 3, padding=1, groups=4, bias=False), nn.Conv2d(24, 8, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(24), nn.BatchNorm2d(24)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        inner = self.norms[1](self.grouped(self.norms[0](self.reduce(x)).relu())).relu()
        return self.head((x + self.expand(inner)).relu().mean((2, 3)))


@pytest.mark.parametrize("restore", ["none", "calibrate", "synthetic", None])
def test_grouped_convolutions_are_narrowed(restore: str | None) -> None:
    model, images = lively(Grouped()), torch.randn(60, 3, 8, 8, dtype=torch.float64)
    given = images if restore == "calibrate" else None
    result = pk.prune("merge", model, images[:1], ratio=0.5, restore=restore, images=given)
    small = result.model
    assert small.grouped.weight.shape == (12, 3, 3, 3)
    assert small.grouped.groups == 4
    left = {} if restore else {"a grouped convolution reads these channels", "blocks of channels go together, each"}
    assert all(any(said.startswith(one) for one in left) for said in result.plan.notes["plain"].values())
    assert bool(result.plan.notes["plain"]) == (restore is None)
    if restore == "calibrate":
        assert {"grouped", "expand"} <= {refit.layer for refit in result.plan.refits}
        with torch.no_grad():
            want, plain = model(images), pk.prune("merge", model, images[:1], ratio=0.5, restore="none").model
            errors = [float((net(images) - want).square().mean()) for net in (small, plain)]
        assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("restore", ["moments", "paper"])
def test_what_cannot_pass_a_grouped_convolution_is_said(restore: str) -> None:
    with pytest.raises(InputError, match=r"grouped convolution|blocks of channels|add into"):
        pk.prune("merge", lively(Grouped()), torch.zeros(1, 3, 8, 8, dtype=torch.float64), ratio=0.5, restore=restore)
    for scope in ("inner", "all"):
        result = pk.prune(
            "merge", lively(Grouped()), torch.zeros(1, 3, 8, 8, dtype=torch.float64), ratio=0.5, scope=scope
        )
        assert result.after.macs < 0.6 * result.before.macs


class StreamAlone(nn.Module):
    """Nothing but a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        return self.head(x + self.body(x).relu())


def test_where_streams_are_all_there_is_they_are_pruned_and_that_is_said() -> None:
    x = torch.randn(1, 3, 8, 8)
    result = pk.prune("merge", StreamAlone().eval(), x, ratio=0.5)
    assert result.model.stem.out_channels == 4
    assert result.plan.notes["plain"] == {"stem": "several layers add into these channels"}
    assert "(1 layer) goes plainly" in str(result.plan.notes["warning"])
    with pytest.raises(InputError, match="several layers add") as refusal:
        pk.prune("merge", StreamAlone().eval(), x, ratio=0.5, restore="paper")
    assert str(refusal.value.hint).startswith("--scope all --restore none")
    assert pk.prune("merge", StreamAlone().eval(), x, ratio=0.5, restore="none", scope="all").plan.keeps


class Standardised(nn.Conv2d):
    """Weights brought to mean zero and variance one, over all inputs of a filter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias)


def test_what_is_not_followed_is_named() -> None:
    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(InputError, match=r"'0.weight' and other weights \(2 in all\) are read in a way that is not"):
        pk.prune("merge", model.eval(), torch.randn(1, 3, 8, 8), ratio=0.5)


def test_where_no_way_works_none_is_told() -> None:
    with pytest.raises(InputError, match="model's output") as refusal:
        pk.merge(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 8, 8), ratio=0.5)
    assert refusal.value.hint == "prunekit inspect lists the groups"


def test_a_way_that_is_refused_names_another() -> None:
    model = _body(lambda width: nn.GroupNorm(4, width), nn.ReLU())
    with pytest.raises(InputError, match="no batch norm behind this layer") as refusal:
        pk.merge(model, torch.randn(1, 3, 8, 8), ratio=0.5, restore="moments")
    assert "--restore calibrate" in str(refusal.value.hint)
    assert "--data" in str(refusal.value.hint)


@pytest.mark.parametrize("order", ["conv, norm without statistics, relu", "conv, relu, norm", "conv, norm, relu, norm"])
@pytest.mark.parametrize("reader", ["convolution", "linear behind a mean", "batch norm behind it"])
def test_multiples_of_kept_filters_leave_no_trace(order: str, reader: str) -> None:
    """Channels 4 to 7 are multiples of channels 0 to 3 behind the ReLU: the next layer makes up for all of them."""
    norm = nn.BatchNorm2d(8, eps=1e-12, track_running_stats=not order.startswith("conv, norm without"))
    late: list[Any] = [] if order.endswith("relu") else [nn.BatchNorm2d(8)]
    tails: dict[str, list[nn.Module]] = {
        "convolution": [nn.Conv2d(8, 4, 3)],
        "linear behind a mean": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)],
        "batch norm behind it": [nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)],
    }
    early = [] if order == "conv, relu, norm" else [norm]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *early, nn.ReLU(), *late, *tails[reader]).double().eval()
    with torch.no_grad():
        model[0].weight[4:], model[0].bias[4:] = model[0].weight[:4] / 2, model[0].bias[:4] / 2
        for layer in early:
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_()
            if layer.running_mean is None:
                layer.weight[4:], layer.bias[4:] = layer.weight[:4] * 0.7, layer.bias[:4] * 0.7
            else:
                layer.running_mean.normal_()
                layer.weight[4:], layer.bias[4:] = layer.weight[:4], layer.bias[:4] / 2
                layer.running_mean[4:] = layer.running_mean[:4] / 2
        for layer in late:
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_()
            layer.running_mean.uniform_(0, 1)
            layer.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    result = pk.prune("merge", model, x, ratio=0.5, criterion="l1-norm", threshold=0.0)
    assert result.model[0].out_channels == 4
    assert result.plan.notes["merged"] == 4
    torch.testing.assert_close(result.model(x), model(x))


class SideBySide(nn.Module):
    """Two branches behind ReLU, side by side; of each the second half of the channels are halves of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(14, 4, 3)
        with torch.no_grad():
            for layer in (self.a, self.b):
                assert layer.bias is not None
                half = layer.out_channels // 2
                layer.weight[half:], layer.bias[half:] = layer.weight[:half] / 2, layer.bias[:half] / 2

    def forward(self, x: torch.Tensor) -> Any:
        return self.read(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))


def test_channels_side_by_side_are_merged() -> None:
    model, x = SideBySide().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = pk.prune("merge", model, x, ratio=0.5)
    assert (result.plan.notes["restore"], result.plan.notes["merged"]) == ("paper", 7)
    torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize("settings", [{}, {"images": True}, {"restore": "none"}, {"scope": "all"}])
@pytest.mark.parametrize(
    ("between", "made", "read"),
    [
        (nn.PixelShuffle(2), 32, 8),
        (nn.PixelUnshuffle(2), 8, 32),
        (nn.ChannelShuffle(2), 8, 8),
        (nn.Sequential(nn.Unfold(2, stride=2), nn.Fold((8, 8), 2, stride=2)), 8, 8),
    ],
)
def test_blocks_of_channels_are_merged(between: nn.Module, made: int, read: int, settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, made, 1), nn.ReLU(), between, nn.Conv2d(read, 4, 1)).double().eval()
    with torch.no_grad():  # the second half of the units are halves of the first
        half = made // 2
        model[0].weight[half:], model[0].bias[half:] = model[0].weight[:half] / 2, model[0].bias[:half] / 2
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    settings = {**settings, **({"images": torch.randn(64, 3, 8, 8).double()} if "images" in settings else {})}
    result = pk.prune("merge", model, x, ratio=0.5, **settings)
    assert result.after.params < 0.6 * result.before.params
    if not settings and not isinstance(between, nn.ChannelShuffle):
        assert result.plan.notes["merged"] > 0
        torch.testing.assert_close(result.model(x), model(x))


def test_layers_that_add_into_tokens_make_a_stream() -> None:
    """Linear layers that run on every token add into a stream as convolutions do; those of a gate run once an image."""
    result = pk.prune("merge", Tokens().eval(), torch.randn(1, 3, 8, 8), ratio=0.5)
    assert [keep.group for keep in result.plan.keeps] == ["hidden"]
    assert result.plan.notes["left"]["patches"] == "several layers add into these channels"


class Auxiliary(nn.Module):
    """A second head that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.hidden, self.extra = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x).relu()
        return (self.head(x), self.extra(self.hidden(x).relu())) if self.training else self.head(x)


@pytest.mark.parametrize("restore", [None, "paper", "none"])
def test_layers_that_run_in_training_alone_are_no_obstacle(restore: Any) -> None:
    result = pk.prune("merge", Auxiliary().eval(), torch.randn(1, 3, 8, 8), ratio=0.5, restore=restore)
    if restore is None:
        assert result.plan.notes["left"]["hidden"] == "'hidden' runs in training alone"
        all_of_it = pk.prune("merge", Auxiliary().eval(), torch.randn(1, 3, 8, 8), ratio=0.5, scope="all")
        assert all_of_it.plan.notes["plain"] == {"hidden": "'hidden' runs in training alone"}
    assert [tuple(out.shape) for out in result.model.train()(torch.randn(2, 3, 8, 8))] == [(2, 4, 6, 6)] * 2


def test_layers_that_nothing_plain_reads_are_judged_by_their_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2)).eval()
    x, images = torch.randn(1, 3, 8, 8), torch.randn(8, 3, 8, 8)
    result = pk.prune("merge", model, x, ratio=0.5, images=images)
    assert result.model[0].out_channels == 4
    assert result.plan.notes["criterion"] == "l2-norm"
    assert result.plan.notes["widths"] == "uniform"
    with pytest.raises(InputError, match="nothing is known") as refusal:
        pk.prune("merge", model, x, ratio=0.5, images=images, widths="loss")
    assert "--widths uniform" in str(refusal.value.hint)
