"""ManiDP: gates, their losses and schedule, thresholds for budgets (Tang et al., CVPR 2021)."""

from __future__ import annotations

import copy
import io
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunekit as pk
from networks import lively
from prunekit import surgery
from prunekit.data import ImageSet, open_data
from prunekit.errors import InputError, Interrupted, SurgeryError, TrainingError
from prunekit.methods.manidp.assess import assess
from prunekit.methods.manidp.budgets import calibrate, use_budget, used_budget
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.costs import DynamicCost, graph_of
from prunekit.methods.manidp.difficulty import foresee, hardness
from prunekit.methods.manidp.fit import add_gates, fit
from prunekit.methods.manidp.gating import plan_gates
from prunekit.methods.manidp.objective import ManifoldObjective, unlikeness
from prunekit.methods.manidp.rank_correlation import ranks, spearman
from prunekit.methods.manidp.record import kept_share, observe, watched
from prunekit.methods.manidp.static import prune_static
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import GatedConv, gated_layers, insert_gates, remove_gates
from prunekit.plan import Gate, Keep, Plan
from prunekit.spec import InputSpec, origin_of, remember
from prunekit.tasks.classification import CLASSIFICATION
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import Event, StepEvent
from prunekit.training.world import World

ARCHITECTURES = (
    *("prunekit:resnet20", "prunekit:vgg11_cifar", "prunekit:preresnet164", "torchvision:resnet18"),
    *("torchvision:resnet34", "torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:vgg11_bn"),
)


def sized(name: str, side: int = 32) -> nn.Module:
    """A network that takes small images, in float64, with lively batch norms."""
    model = lively(pk.load(name))
    origin = origin_of(model)
    assert origin is not None
    return remember(model, replace(origin, input=InputSpec((3, side, side))))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gates_change_nothing_at_the_start(name: str) -> None:
    model = sized(name, 64 if "torchvision" in name else 32)
    gated = add_gates(model, GateRecipe())
    spec = origin_of(model)
    assert spec is not None
    assert spec.input is not None
    x = torch.randn(2, *spec.input.shape, dtype=torch.float64)
    with torch.no_grad():
        assert (gated(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()
    assert not any(isinstance(module, GatedConv) for module in model.modules())


def gates_of(name: str) -> tuple[Gate, ...]:
    model = pk.load(name)
    return plan_gates(model, graph_of(model), GateRecipe()).gates


def test_which_layers_are_gated() -> None:
    plain = [gate.conv for gate in gates_of("prunekit:vgg11_cifar")]
    assert plain == [f"features.{i}" for i in (4, 8, 11, 15, 18, 22, 25)]
    basic = [gate.conv for gate in gates_of("torchvision:resnet18")]
    assert basic == [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)]
    rectified = {gate.conv: gate.rectified for gate in gates_of("torchvision:resnet18")}
    assert rectified["layer1.0.conv1"]
    assert not rectified["layer1.0.conv2"]
    inverted = gates_of("torchvision:mobilenet_v2")
    assert len(inverted) == 18  # one a block, and the last convolution
    assert inverted[-1].conv == "features.18.0"
    assert inverted[0].before == ()  # the first block has no expansion
    assert inverted[1].before == ("features.2.conv.0.0", "features.2.conv.0.1", "features.2.conv.0.2")


def test_hidden_widths() -> None:
    recipe = GateRecipe()
    assert (recipe.hidden(79), recipe.hidden(80), GateRecipe(squeeze=5).hidden(80)) == (79, 40, 5)


def test_layers_without_gates_are_said() -> None:
    notes = plan_gates(pk.load("torchvision:resnet18"), graph_of(pk.load("torchvision:resnet18")), GateRecipe()).notes
    assert notes["left"] == {
        "conv1": "the stem",
        "layer2.0.downsample.0": "a shortcut",
        "layer3.0.downsample.0": "a shortcut",
        "layer4.0.downsample.0": "a shortcut",
    }


@pytest.mark.parametrize("name", ["prunekit:lenet_300_100", "prunekit:densenet40_12"])
def test_networks_that_cannot_have_gates(name: str) -> None:
    with pytest.raises(InputError, match="no layer of this network can have a gate"):
        add_gates(pk.load(name), GateRecipe())


def test_plans_of_gates_are_json_and_refused_where_they_do_not_fit() -> None:
    model = pk.load("prunekit:resnet20")
    plan = plan_gates(model, graph_of(model), GateRecipe())
    assert Plan.from_json(plan.to_json()).gates == plan.gates
    for gate in (Gate("layer9", "bn1"), Gate("conv1", "relu1"), Gate("fc", "bn1")):
        with pytest.raises(SurgeryError):
            surgery.edit(model, Plan([gate]), graph_of(model))


def test_masking_is_the_papers() -> None:
    conv, norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4).eval()
    model = insert_gates(nn.Sequential(conv, norm), [Gate("0", "1", hidden=3)])
    layer = model[0]
    assert isinstance(layer, GatedConv)
    with torch.no_grad():
        layer.gate.excite.weight.normal_()
        layer.gate.excite.bias.copy_(torch.tensor([-50.0, 0.4, 0.9, 5000.0]))
        layer.threshold.fill_(0.5)
        x = torch.rand(3, 2, 5, 5) * 0.01
        pi = layer.gate(x)
        assert bool((pi[:, 0] == 0).all())
        assert bool((pi[:, 3] == 1000).all())
        wanted = norm(conv(x)) * torch.where(pi >= 0.5, pi, torch.zeros(()))[:, :, None, None]
        assert torch.equal(model(x), wanted)
        assert not bool(model(x)[:, :2].any())


def test_removing_gates_gives_the_architecture_back() -> None:
    for name in ("prunekit:resnet20", "torchvision:mobilenet_v2"):
        model = sized(name, 64)
        gated = add_gates(model, GateRecipe())
        ones = {n: torch.ones_like(layer.gate.excite.bias.detach()) for n, layer in gated_layers(gated)}
        remove_gates(gated, ones)
        assert [n for n, _ in gated.named_parameters()] == [n for n, _ in model.named_parameters()]
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            assert torch.equal(gated(x), model(x))


def cost_of(model: nn.Module) -> DynamicCost:
    return GatedView.of(model).cost


@pytest.mark.parametrize("name", ["prunekit:resnet20", "prunekit:vgg11_cifar", "torchvision:mobilenet_v2"])
def test_costs_are_those_of_a_sliced_network(name: str) -> None:
    model = sized(name, 32)
    graph = graph_of(model)
    gated = add_gates(model, GateRecipe())
    cost = cost_of(gated)
    assert cost.dense == surgery.cost_of(model, graph).macs
    inner: list[Keep] = []
    kept = torch.tensor([cost.channels])
    for number, (layer, width) in enumerate(zip(cost.layers, cost.channels, strict=True)):
        made_by = dict(gated_layers(gated))[layer].made_by
        first = (*made_by.before, made_by.conv)[0]
        group = next((g for g in graph.groups if first in {m.module for m in g.producers}), None)
        if group is not None and not graph.is_stream(group) and group.size == width:
            inner.append(Keep(group.name, range(width // 4)))
            kept[0, number] = width // 4
    assert inner
    sliced = surgery.predict(graph, surgery.resolve(graph, Plan(inner)).kept)
    assert int(cost.macs(kept)[0]) == sliced.macs


def test_half_of_all_channels_of_resnet56() -> None:
    cost = cost_of(add_gates(pk.load("prunekit:resnet56"), GateRecipe()))
    share = float(cost.macs(torch.tensor([cost.channels]) * 0.5)) / cost.dense
    assert 1 - share == pytest.approx(0.624, abs=2e-3)  # the paper's figure
    assert cost.gates / cost.dense == pytest.approx(0.0015, abs=1e-4)


def test_schedule() -> None:
    recipe = GateRecipe(keep=0.4)
    rates = [recipe.keep_rate(epoch + 1, 10) for epoch in range(10)]
    assert rates[-1] == pytest.approx(0.4)
    assert rates[4] == pytest.approx(0.3 * math.cos(math.pi / 2) + 0.7)
    assert rates == sorted(rates, reverse=True)
    assert GateRecipe(keep=0.4, ramp=0.5).keep_rate(5, 10) == pytest.approx(0.4)


@pytest.mark.parametrize(("epochs", "times"), [(1, 32), (2, 16), (6, 6), (32, 1), (200, 1)])
def test_thresholds_follow_short_runs_in_small_steps(epochs: int, times: int) -> None:
    assert GateRecipe().renewals(epochs) == times
    assert GateRecipe(renew=3).renewals(epochs) == 3


def test_thresholds_are_set_as_often_as_that() -> None:
    """In one epoch the share of channels falls step by step, never by a third at once."""
    torch.manual_seed(0)
    recipe = GateRecipe(keep=0.5, calibrate=False)
    model = add_gates(pk.load("prunekit:vgg_digits", arch_args={"config": "12-12-M-12"}), recipe)
    _, layer = next(gated_layers(model))
    kept: list[float] = []

    def look(event: Event) -> None:
        if isinstance(event, StepEvent):
            kept.append(float(layer.threshold))

    images = open_data("digits", "train").sample(256)
    fit(model, recipe, TrainConfig(epochs=1, batch_size=16, device="cpu", log_every=1), images, on_event=look)
    assert len(set(kept)) > len(kept) / 2


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep": 1.5}, {"ramp": 0}, {"tau": -1}, {"complexity": -1}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be"):
        GateRecipe(**wrong)  # type: ignore[arg-type]


def test_similarity_is_the_mean_squared_difference_of_cosines() -> None:
    features, pi = torch.rand(5, 7, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    total = 0.0
    for i in range(5):
        for j in range(5):
            r = torch.cosine_similarity(features[i], features[j], dim=0)
            t = torch.cosine_similarity(pi[i], pi[j], dim=0)
            total += float((r - t) ** 2)
    assert float(unlikeness(features, pi)) == pytest.approx(total / 25)
    assert float(unlikeness(pi, pi)) == pytest.approx(0)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(40, 10),
    )  # fmt: skip
    return remember(model.eval(), replace(origin_of(pk.load("prunekit:vgg_digits")), arch=""))  # type: ignore[type-var,arg-type]


def objective(model: nn.Module, **recipe: Any) -> ManifoldObjective:
    return ManifoldObjective(model, TrainConfig(), None, CLASSIFICATION, GateRecipe(**recipe), cost_of(model))


def test_loss_is_cross_entropy_with_both_terms() -> None:
    gated = add_gates(tiny(), GateRecipe()).train()
    aim = objective(gated, complexity=0.1, similarity=0.0)
    aim.begin(lambda: 3.0)
    x, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    loss, logits = aim(gated, (x, labels))
    losses = nn.functional.cross_entropy(logits, labels, reduction="none").detach()
    ease = ((3.0 - losses) / 3.0).clamp(min=0)  # every saliency is one at the start: two gated layers
    assert loss.item() == pytest.approx(float(losses.mean() + 0.1 * 2 * ease.mean()), rel=1e-5)
    aim.close()
    similar = objective(gated, complexity=0.0, similarity=1.0)
    similar.begin(lambda: 3.0)
    assert similar(gated, (x, labels))[0].item() > float(losses.mean())
    similar.close()


def test_losses_can_be_left_out() -> None:
    assert GateRecipe().losses == (5e-3, 1.0)
    assert GateRecipe(no_complexity=True).losses == (0.0, 1.0)
    assert GateRecipe(no_similarity=True).losses == (5e-3, 0.0)


class _Given(nn.Module):
    """Give what it was made with."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.output


def test_complexity_does_not_reward_wrong_answers() -> None:
    """Its weight is a constant: the gradient that reaches the logits is that of the cross-entropy alone."""
    gated = add_gates(tiny(), GateRecipe()).train()
    aim = objective(gated, complexity=5.0, similarity=0.0)
    aim.begin(lambda: 10.0)
    x, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    logits = gated(x)
    logits.retain_grad()
    torch.autograd.backward(aim(_Given(logits), (x, labels))[0])
    wanted = (torch.softmax(logits.detach(), 1) - nn.functional.one_hot(labels, 10)) / 6
    assert logits.grad is not None
    assert torch.allclose(logits.grad, wanted, atol=1e-6)
    gate = next(layer for _, layer in gated_layers(gated)).gate
    assert gate.excite.bias.grad is not None
    assert bool((gate.excite.bias.grad > 0).any())  # and the saliencies of easy images are pressed down
    aim.close()


def test_threshold_is_the_kth_largest_mean() -> None:
    gated = add_gates(tiny(), GateRecipe()).train()
    layers = [layer for _, layer in gated_layers(gated)]
    for layer in layers:
        nn.init.normal_(layer.gate.excite.weight)
    aim = objective(gated, keep=0.3, renew=1)
    world = World(0, 1, torch.device("cpu"))
    x, labels = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    with watched(layers) as seen:
        aim(gated, (x, labels))
        aim.end_step(0.5, 10, world)
        aim.end_step(1.0, 10, world)
        assert [float(layer.threshold) for layer in layers] == [0.0, 0.0]  # the first epoch prunes nothing
        seen.clear()
        aim(gated, (x, labels))
        aim.end_step(10.0, 10, world)
        for layer, pi in zip(layers, seen, strict=True):
            means = pi.detach().mean(0).sort(descending=True).values
            wanted = means[math.ceil(0.3 * len(means)) - 1]
            assert float(layer.threshold) == pytest.approx(float(wanted), rel=1e-5)
    aim.end_epoch(9, 10, world)
    assert set(aim.figures()) == {"kept", "macs"}
    aim.close()


def test_thresholds_stay_where_no_image_has_come_since() -> None:
    gated = add_gates(tiny(), GateRecipe()).train()
    layers = [layer for _, layer in gated_layers(gated)]
    aim = objective(gated, keep=0.3, renew=4)
    world = World(0, 1, torch.device("cpu"))
    aim(gated, (torch.rand(8, 1, 8, 8), torch.arange(8)))
    aim.end_step(0.5, 1, world)
    before = [float(layer.threshold) for layer in layers]
    aim.end_step(0.75, 1, world)
    assert [float(layer.threshold) for layer in layers] == before
    aim.close()


SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4, "device": "cpu"}


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_data("digits", "train")


@pytest.fixture(scope="module")
def trained(digits: ImageSet) -> nn.Module:
    """A network that knows digits fairly well, with gates that were trained for a few epochs."""
    torch.manual_seed(0)
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "16-16-M-24-24-M-32"})
    train(model, TrainConfig(**SETTINGS), digits)
    recipe = GateRecipe(keep=0.6)
    gated = add_gates(model, recipe)
    fit(gated, recipe, TrainConfig(**{**SETTINGS, "epochs": 5}), digits)
    return gated.eval()


def test_training_reaches_the_kept_share(trained: nn.Module, digits: ImageSet) -> None:
    record = observe(GatedView.of(trained), digits.batches(250))
    result = assess(record, cost_of(trained))
    assert 0.45 < result.kept < 0.75
    assert result.macs["mean"] < 0.75 * result.dense
    assert record.accuracy > 0.7
    assert result.with_gates["mean"] == result.macs["mean"] + result.gates
    assert result.macs["p5"] <= result.macs["median"] <= result.macs["p95"]
    for layer, share in zip(result.layers, record.kept.double().mean(0), strict=True):
        assert layer.kept == pytest.approx(float(share) / layer.channels)
        assert layer.always + layer.never <= layer.channels


def test_gates_are_not_decayed() -> None:
    gated = add_gates(tiny(), GateRecipe())
    assert objective(gated).own == {n for n, _ in gated.named_parameters() if ".gate." in n}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_gates_learn_at_a_share_of_the_rate(optimizer: str, rate: float, digits: ImageSet) -> None:
    moved = {}
    for share in (rate, 1.0):
        torch.manual_seed(0)
        gated = add_gates(pk.load("prunekit:vgg_digits", arch_args={"config": "8-8-M-8-8-M-8"}), GateRecipe())
        before = {name: p.detach().clone() for name, p in gated.named_parameters()}
        config = TrainConfig(epochs=1, batch_size=64, lr=0.01, optimizer=optimizer, warmup=0, device="cpu")
        fit(gated, GateRecipe(gate_rate=share, no_similarity=True), config, digits.subset(torch.arange(64)))
        moved[share] = {name: float((p.detach() - before[name]).norm()) for name, p in gated.named_parameters()}
    name = next(n for n in moved[1.0] if n.endswith("gate.excite.bias"))
    assert moved[1.0][name] > 0
    assert moved[rate][name] == pytest.approx(rate * moved[1.0][name], rel=1e-3)
    assert all(moved[rate][n] > 0 for n in moved[rate] if n.endswith("conv.weight"))


class StopAt:
    """A sink that interrupts the run at its n-th event."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def __call__(self, _: Event) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("moment", [3, 12, 17])
def test_resumed_to_the_same_weights(digits: ImageSet, tmp_path: Path, moment: int) -> None:
    few, recipe = digits.sample(256), GateRecipe(keep=0.5)
    config = TrainConfig(**{**SETTINGS, "log_every": 1})
    whole = add_gates(tiny(), recipe)
    fit(whole, recipe, config, few)
    state = tmp_path / "run.state"
    with pytest.raises(Interrupted):
        fit(add_gates(tiny(), recipe), recipe, config, few, state_path=state, on_event=StopAt(moment))
    again = add_gates(tiny(), recipe)
    fit(again, recipe, config, few, state_path=state, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_resuming_with_other_gates_is_refused(digits: ImageSet, tmp_path: Path) -> None:
    few, state, config = digits.sample(256), tmp_path / "run.state", TrainConfig(**SETTINGS)
    recipe = GateRecipe(keep=0.5)
    fit(add_gates(tiny(), recipe), recipe, config, few, state_path=state)
    other = GateRecipe(keep=0.7)
    with pytest.raises(TrainingError, match="other settings"):
        fit(add_gates(tiny(), other), other, config, few, state_path=state, resume=True)


def test_loss_that_is_no_number_stops(digits: ImageSet) -> None:
    recipe = GateRecipe(keep=0.5)
    gated = add_gates(tiny(), recipe)
    with pytest.raises(TrainingError, match="no number"):
        fit(gated, recipe, TrainConfig(**{**SETTINGS, "lr": 1e9}), digits.sample(256))


def test_five_budgets_are_met_on_other_images(trained: nn.Module, digits: ImageSet) -> None:
    model = copy.deepcopy(trained)
    cost, test = cost_of(model), open_data("digits", "test")
    for share in (0.4, 0.45, 0.5, 0.6, 0.7):
        found = calibrate(GatedView.of(model), lambda: digits.batches(250), share * cost.dense, f"{share:.0%}")
        assert found.realised == pytest.approx(share * cost.dense, rel=5e-3)
        assert observe(GatedView.of(model), test.batches(250)).mean_macs == pytest.approx(share * cost.dense, rel=0.02)
    use_budget(model, "40%")
    assert observe(GatedView.of(model), test.batches(250)).mean_macs == pytest.approx(0.4 * cost.dense, rel=0.02)
    with pytest.raises(InputError, match=r"no budget '1%'.*") as caught:
        use_budget(model, "1%")
    assert "40%" in str(caught.value)
    again = reloaded(model)
    use_budget(again, "60%")
    assert observe(GatedView.of(again), test.batches(250)).mean_macs == pytest.approx(0.6 * cost.dense, rel=0.02)


def test_thresholds_of_training_are_kept_where_they_meet_the_target(trained: nn.Module, digits: ImageSet) -> None:
    model, images = copy.deepcopy(trained), digits.sample(400)
    view = GatedView.of(model)
    before = observe(view, images.batches(200))
    found = calibrate(view, lambda: images.batches(200), before.mean_macs, "same")
    after = observe(view, images.batches(200))
    assert found.realised == pytest.approx(before.mean_macs, rel=2e-3)
    assert (after.kept - before.kept).abs().double().mean() < 0.05
    shares = {layer.threshold.item() for _, layer in gated_layers(trained)}
    assert len(shares) > 1


def test_hard_images_cost_more_once_gates_foresee_them(trained: nn.Module, digits: ImageSet) -> None:
    model, images = copy.deepcopy(trained), digits.sample(600)
    view = GatedView.of(model)
    before = observe(view, images.batches(200))
    calibrate(view, lambda: images.batches(200), before.mean_macs, "stale")
    pixels = next(images.batches(600))[0]
    with torch.no_grad():
        uncertain = hardness(model(pixels))
    foresee(model, pixels, ease=1.0)
    after = observe(view, images.batches(200))
    assert spearman(after.macs, uncertain) > max(0.3, spearman(before.macs, uncertain))
    assert after.mean_macs == pytest.approx(before.mean_macs, rel=0.05)
    assert not any(layer.budgets for _, layer in gated_layers(model))


def test_budgets_that_cannot_be_met_leave_the_thresholds(trained: nn.Module, digits: ImageSet) -> None:
    model = copy.deepcopy(trained)
    cost = cost_of(model)
    before = [layer.threshold.clone() for _, layer in gated_layers(model)]
    with pytest.raises(InputError, match="the nearest found is"):
        calibrate(GatedView.of(model), lambda: digits.batches(250), 0.5 * cost.least, "tiny")
    with pytest.raises(InputError, match="too few to set thresholds by: 10 images"):
        calibrate(GatedView.of(model), lambda: digits.sample(10).batches(10), 0.5 * cost.dense, "half")
    assert all(torch.equal(layer.threshold, b) for (_, layer), b in zip(gated_layers(model), before, strict=True))
    assert not any("tiny" in layer.budgets for _, layer in gated_layers(model))


def reloaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    pk.save(model, stream)
    stream.seek(0)
    return pk.load(stream)


def test_artefacts_bring_gates_back(trained: nn.Module) -> None:
    again = reloaded(trained)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), trained(x))
    assert [n for n, _ in gated_layers(again)] == [n for n, _ in gated_layers(trained)]


def test_channels_never_kept_are_removed_for_good(trained: nn.Module, digits: ImageSet) -> None:
    model = copy.deepcopy(trained)
    cost = cost_of(model)
    calibrate(GatedView.of(model), lambda: digits.batches(250), 0.4 * cost.dense, "40%")
    record = observe(GatedView.of(model), digits.batches(250))
    assert any(bool((used == 0).any()) for used in record.used)
    small, plan = prune_static(GatedView.of(model), record)
    assert plan.keeps
    images = next(digits.batches(len(digits)))[0]
    with torch.no_grad():
        assert torch.allclose(small(images), model(images), atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(reloaded(small)(images), small(images))
    everything = [torch.ones_like(used) for used in record.used]
    with pytest.raises(InputError, match="none can go for good"):
        prune_static(GatedView.of(model), replace(record, used=tuple(everything)))


@pytest.mark.parametrize("method", ["slim", "merge"])
def test_pruning_a_gated_network_is_refused(trained: nn.Module, method: str) -> None:
    with pytest.raises(InputError, match="prunes networks without gates"):
        pk.prune(method, trained, ratio=0.5)


def test_gates_twice_are_refused(trained: nn.Module) -> None:
    with pytest.raises(InputError, match="has gates already"):
        add_gates(trained, GateRecipe())


def test_ranks_and_their_correlation() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(0.8)  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert spearman(a, torch.ones(5)) == 0


@pytest.mark.parametrize("start", ["identity", "informed"])
def test_training_ends_at_the_share_asked_for(start: str, digits: ImageSet) -> None:
    recipe = GateRecipe(keep=0.55, start=start)
    gated = add_gates(tiny(), recipe)
    done = fit(gated, recipe, TrainConfig(**{**SETTINGS, "epochs": 2}), digits, digits.sample(200))
    record = observe(view := GatedView.of(gated.eval()), digits.batches(250))
    assert kept_share(record, view.cost) == pytest.approx(0.55, rel=0.03)
    assert done.keep.kept == pytest.approx(0.55, rel=0.02)
    assert done.keep.error is None
    # the accuracy is that of the thresholds that the network is left with
    assert done.accuracy == pytest.approx(observe(view, digits.sample(200).batches(250)).accuracy)


def test_thresholds_of_training_can_be_kept(digits: ImageSet) -> None:
    recipe = GateRecipe(keep=0.55, start="informed", calibrate=False)
    done = fit(gated := add_gates(tiny(), recipe), recipe, TrainConfig(**{**SETTINGS, "epochs": 1}), digits)
    assert done.keep.kept == done.keep.trained
    assert done.keep.trained == pytest.approx(
        kept_share(observe(view := GatedView.of(gated.eval()), digits.batches(250)), view.cost), abs=0.02
    )


def test_the_budget_in_use_is_known(trained: nn.Module, digits: ImageSet) -> None:
    model = copy.deepcopy(trained)
    assert used_budget(model) is None
    for share in (0.5, 0.6):
        calibrate(view := GatedView.of(model), lambda: digits.batches(250), share * view.cost.dense, f"{share:.0%}")
    assert used_budget(model) == "60%"
    use_budget(model, "50%")
    assert used_budget(reloaded(model)) == "50%"
