"""Restoration from unlabelled images: exact where it can be, proven everywhere, blind to labels, and repeatable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from networks import Dense, FlattenHead, Residual, lively, random_network, random_plan
from prunekit import api, models, surgery
from prunekit.checkpoint import load
from prunekit.errors import InputError
from prunekit.nn.channels import SelectedNorm
from prunekit.plan import Keep, Plan, Refit
from prunekit.progress import report_progress
from prunekit.restoration import frontier, refit_targets, spilling
from prunekit.restoration.calibration import calibrate
from prunekit.restoration.images import bytes_per_image
from prunekit.restoration.least_squares import Wanted, fit_towards
from prunekit.restoration.memory import read_memory
from prunekit.restoration.plain_layers import obstacle_to_layer
from prunekit.restoration.samples import LayerCall, inputs_at, outputs_at, positions, rows_of
from prunekit.restoration.streams import Watch, find_join


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(x)
    return result


def restored(model: nn.Module, plan: Plan, images: Tensor, **settings: float) -> tuple[nn.Module, Plan]:
    """The pruned network, refitted to the images and proven."""
    graph = surgery.trace(model, images[:2])
    plan = calibrate(model, graph, plan, images, **settings)  # type: ignore[arg-type]
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) <= 1e-10
    return small, plan


def duplicate(layer: nn.Conv2d | nn.Linear, source: int, copies: dict[int, float]) -> None:
    """Makes output channels that are multiples of another."""
    assert layer.bias is not None
    with torch.no_grad():
        for channel, factor in copies.items():
            layer.weight[channel] = factor * layer.weight[source]
            layer.bias[channel] = factor * layer.bias[source]


# -- the regression -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [6, 60], ids=["more rows than inputs", "fewer rows than inputs"])
@pytest.mark.parametrize("constant", [True, False])
def test_regression_meets_its_definition(inputs: int, constant: bool) -> None:
    blocks, rows, wanted = 3, 40, 2
    x = torch.randn(blocks, rows, inputs, dtype=torch.float64) + 0.5
    y = torch.randn(blocks, rows, wanted, dtype=torch.float64) + 2
    start = torch.randn(blocks, wanted, inputs, dtype=torch.float64)
    fit = fit_towards(start, x.mT, Wanted(y.mT), 0.1, constant=constant)
    for b in range(blocks):
        centre = x[b].mean(0) if constant else torch.zeros(inputs)
        penalty = 0.1 * (x[b] - centre).square().mean()
        error = x[b] @ fit.weight[b].T + fit.constant[b].T - y[b]
        gradient = error.T @ x[b] / rows + penalty * (fit.weight[b] - start[b])
        assert gradient.abs().max() < 1e-10
        assert (error.mean(0).abs().max() < 1e-10) if constant else (fit.constant == 0).all()


def test_inputs_that_hardly_vary_do_not_drown_in_rounding() -> None:
    x = 1000 + 1e-2 * torch.randn(1, 300, 4)
    y = (x - 1000) @ torch.tensor([[1.0, 2.0, 3.0, 4.0]]).T + 7
    fit = fit_towards(torch.ones(1, 1, 4), x.mT, Wanted(y.mT), 1e-6, constant=True)
    assert torch.allclose(fit.weight[0, 0], torch.tensor([1.0, 2, 3, 4], dtype=torch.float64), atol=1e-2)


def test_silent_inputs_keep_their_weights() -> None:
    start = torch.randn(1, 2, 3)
    fit = fit_towards(start, torch.zeros(1, 3, 10), Wanted(torch.ones(1, 2, 10)), 1e-2, constant=True)
    assert torch.equal(fit.weight, start.double())
    assert torch.allclose(fit.constant, torch.ones(1, 2, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.Conv2d(6, 8, (3, 5), padding="same", groups=2),
        nn.Conv2d(6, 12, 3, groups=6, dilation=2, padding=(2, 1), bias=False),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 8, 1),
        nn.Conv1d(6, 4, 4, padding="same", dilation=2),
        nn.Conv1d(6, 4, 5, padding=2, stride=3),
        nn.Conv3d(6, 4, 2, padding=1),
        nn.Linear(6, 4),
    ],
    ids=repr,
)
def test_rows_reproduce_the_layer(layer: nn.Conv2d | nn.Linear) -> None:
    """Weights times what was gathered is the layer's output: strides, paddings, dilations, groups and all."""
    layer.double()
    dims = layer.weight.dim()
    x = torch.randn(4, 6, *[9, 8, 7][: dims - 2]) if dims > 2 else torch.randn(4, 5, 6)
    calls: list[tuple[LayerCall, Tensor]] = []

    class Calls(Watch):
        def after(self, layer: str, call: LayerCall, output: Tensor) -> None:  # noqa: ARG002
            calls.append((call, output))

    graph = surgery.trace(layer, x.double())
    with torch.no_grad(), Calls(layer, graph.nodes, [""], []):
        layer(x.double())
    [(call, out)] = calls
    for wanted in (50, 10_000):
        where = positions(rows_of(out), wanted, torch.Generator().manual_seed(0))
        assert len(where) == min(wanted, out.numel() // layer.weight.size(0))
        assert (where.diff() >= 0).all()
        weight = call.weight.detach().reshape(call.groups, layer.weight.size(0) // call.groups, -1)
        rows = torch.cat([weight @ part for _, part in inputs_at(call, where)], 2)
        found = rows.flatten(0, 1).t() + (0 if layer.bias is None else layer.bias.detach())
        assert torch.allclose(found, outputs_at(out, where))


# -- networks -----------------------------------------------------------------------------------------------------


def test_linear_combinations_are_restored_exactly() -> None:
    """Without batch norm, across a flatten: removed channels that are multiples of kept ones leave no trace."""
    body = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), FlattenHead(8 * 16)),
    ).double()
    duplicate(body[0], 1, {0: 2.0, 4: 0.5})
    duplicate(body[2], 7, {2: 1.5, 3: 3.0})
    duplicate(body[5].hidden, 0, {5: 2.0, 6: 1.0})
    images = torch.randn(200, 3, 8, 8, dtype=torch.float64)
    plan = Plan(
        [
            Keep("0", [1, 2, 3, 5]),
            Keep("2", [0, 1, 4, 5, 6, 7]),
            Keep("5.hidden", [u for u in range(12) if u not in (5, 6)]),
        ]
    )
    plain = surgery.edit(body, plan, surgery.trace(body, images[:2]))
    small, found = restored(body, plan, images, ridge=1e-13)
    assert found.notes["calibration"] == {"images": 200, "layers": 3, "left": {}}
    fresh = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    want = outputs(body, fresh)
    assert (outputs(plain, fresh) - want).abs().max() > 1e-2
    assert (outputs(small, fresh) - want).abs().max() < 1e-7


class Embracing(nn.Module):
    """One group with two readers behind batch norm and a residual sum, and a depthwise convolution on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.right = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.left(x) + self.right(x))
        logits: Tensor = self.head(torch.relu(self.deep(x)).mean((2, 3)))
        return logits


def test_several_readers_batch_norms_and_streams_are_restored_exactly() -> None:
    model = lively(Embracing())
    assert isinstance(model, Embracing)
    with torch.no_grad():  # channels 0 and 5 of the stem repeat channel 2, batch norm and all
        for tensor in (model.stem[0].weight, *model.stem[1].parameters(), *model.stem[1].buffers()):
            if tensor.dim():
                tensor[0] = tensor[5] = tensor[2]
    images = torch.randn(150, 3, 8, 8, dtype=torch.float64)
    graph = surgery.trace(model, images[:1])
    assert find_join(model, graph, "left.0") is None  # the other branch has not run yet
    join = find_join(model, graph, "right.0")
    assert join is not None
    assert join.norm == "right.1"
    small, _ = restored(model, Plan([Keep("stem.0", [1, 2, 3, 4, 6, 7])]), images, ridge=1e-13)
    fresh = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    assert (outputs(small, fresh) - outputs(model, fresh)).abs().max() < 1e-7


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_come_nearer(seed: int) -> None:
    """Any mix of residual, dense, gated, grouped and shuffled blocks: proven, finite, and no worse for it."""
    model = random_network(seed)
    images = torch.randn(120, 3, 8, 8, dtype=torch.float64)
    graph = surgery.trace(model, images[:2])
    plan = random_plan(graph, seed, most=0.5)
    if not plan.keeps:
        pytest.skip("nothing was removed")
    small, found = restored(model, plan, images)
    plain, want = surgery.edit(model, plan, graph), outputs(model, images)
    assert found.refits or found.notes["calibration"]["left"] or torch.equal(outputs(plain, images), want)
    after, before = (float((outputs(net, images) - want).square().mean()) for net in (small, plain))
    assert after <= before * 1.001 + 1e-20


@pytest.mark.parametrize(
    ("arch", "args"),
    [("vgg_digits", {}), ("resnet20_cifar", {}), ("resnet20_cifar", {"shortcut": "conv", "relu": "input"})],
)
def test_bundled_architectures(arch: str, args: dict[str, object]) -> None:
    model = lively(models.build(arch, args))
    graph = surgery.trace(model, torch.zeros(1, 1 if arch == "vgg_digits" else 3, 8, 8, dtype=torch.float64))
    images = torch.randn(12, *graph.example_shapes[0][1:], dtype=torch.float64)
    plan = random_plan(graph, 3, most=0.5)
    small, found = restored(model, plan, images, rows=400)
    assert found.notes["calibration"]["left"] == {}
    want, plain = outputs(model, images), outputs(surgery.edit(model, plan, graph), images)
    assert (outputs(small, images) - want).square().mean() < (plain - want).square().mean()


def pre_activation(inputs: int, outputs: int) -> nn.Module:
    """Batch norm and ReLU before each convolution, which has no bias and no batch norm of its own behind it."""
    return nn.Sequential(
        *(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 6, 1, bias=False)),
        *(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, outputs, 3, padding=1, bias=False)),
    )


def test_pre_activation_networks_with_channel_selection() -> None:
    """Selections that surgery puts in, and biases that folds of constants make, are no obstacle."""
    model = lively(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), Residual(pre_activation(8, 8)), Dense(pre_activation(8, 6))),
            *(Residual(pre_activation(14, 14)), nn.BatchNorm2d(14), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(14, 5),
        )
    )
    images = torch.randn(100, 3, 8, 8, dtype=torch.float64)
    want = outputs(model, images)
    folded, found = (api.prune("slim", model, images[:1], ratio=0.3, images=i) for i in (None, images))
    assert found.plan.folds
    assert found.plan.notes["calibration"]["left"] == {}
    assert any(isinstance(module, SelectedNorm) for module in found.model.modules())
    errors = [(outputs(result.model, images) - want).square().mean() for result in (folded, found)]
    assert errors[1] < 0.2 * errors[0]


def test_layers_that_add_into_a_stream_repair_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block makes up for what the stream has lost before; without that, errors add up."""
    torch.manual_seed(0)
    model = lively(models.build("resnet20_cifar", {"width": 0.5}))
    images, unseen = torch.randn(2, 60, 3, 16, 16, dtype=torch.float64)
    graph = surgery.trace(model, images[:1])
    keeps = [Keep(f"layer{s}.{b}.conv1", range(4 * 2 ** (s - 1))) for s in (1, 2, 3) for b in (0, 1, 2)]
    want, errors = outputs(model, unseen), []
    for _ in range(2):
        plan = calibrate(model, graph, Plan(keeps), images, ridge=1e-2, rows=4000)
        errors.append((outputs(surgery.edit(model, plan, graph), unseen) - want).square().mean())
        monkeypatch.setattr(refit_targets, "find_join", lambda *_: None)
    assert errors[0] < 0.95 * errors[1], errors


def test_weighted_sums_are_left_to_themselves() -> None:
    """`torch.add(..., alpha=...)` looks like a plain sum until it runs."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.outer = (nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6))
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = torch.add(x, self.outer(torch.relu(self.inner(x))), alpha=0.01)
            logits: Tensor = self.head(x.mean((2, 3)))
            return logits

    model = lively(Weighted())
    images = torch.randn(50, 3, 8, 8, dtype=torch.float64)
    small, _ = restored(model, Plan([Keep("stem", [0, 1, 2, 3]), Keep("inner", [0, 1, 2, 3])]), images)
    plain = model.get_submodule("outer").weight
    assert small.get_submodule("outer").weight.norm() < 2 * plain.norm()  # not a hundred times the stream's error


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t"])
def test_torchvision_architectures_run(name: str) -> None:
    """Attention projections that are not called as modules are left, and said to be."""
    model = lively(torchvision.models.get_model(name, weights=None, num_classes=10)).float()
    images = torch.randn(2, 3, 64, 64)
    graph = surgery.trace(model, images[:1])
    group = next(g for g in graph.groups if g.free and len(g.producers) == 1 and g.size > 8)
    plan = calibrate(model, graph, Plan([Keep(group.name, range(group.size // 2))]), images, rows=100)
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) <= 1e-4
    assert plan.refits
    left = plan.notes["calibration"]["left"]
    assert all(name.endswith(("attn.qkv", "attn.proj")) for name in left), left


def test_dense_connections_and_shared_layers() -> None:
    """A layer that runs twice has two things to reproduce: it is left plain, and said to be."""
    shared = nn.Conv2d(6, 6, 3, padding=1)
    model = lively(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), Residual(shared), Residual(shared), Dense(nn.Conv2d(6, 4, 1)), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5),
        )
    )  # fmt: skip
    _, plan = restored(model, Plan([Keep("0", [0, 1, 3, 4])]), torch.randn(60, 3, 8, 8, dtype=torch.float64))
    assert plan.notes["calibration"]["left"] == {"1.body": "it is used more than once"}
    assert plan.notes["calibration"]["layers"] == 2


# -- how it is asked for ------------------------------------------------------------------------------------------


def small_resnet() -> nn.Module:
    torch.manual_seed(1)
    return lively(models.build("resnet20_cifar", {"width": 0.5})).float()


def test_two_runs_give_identical_bytes_and_leave_the_model_alone() -> None:
    model, images = small_resnet().train(), torch.randn(40, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (api.prune("merge", model, ratio=0.5, restore="calibrate", images=images) for _ in range(2))
    state, again = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert model.training
    assert first.model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert any(isinstance(operation, Refit) for operation in first.plan)


@pytest.mark.parametrize(("method", "without"), [("slim", "constants"), ("merge", "moments")])
def test_images_choose_calibration(method: str, without: str) -> None:
    model, images = small_resnet(), torch.randn(20, 3, 32, 32)
    assert api.prune(method, model, ratio=0.4).plan.notes["restore"] == without
    assert api.prune(method, model, ratio=0.4, images=images).plan.notes["restore"] == "calibrate"
    left_alone = api.prune(method, model, ratio=0.4, restore="none", images=images).plan
    assert left_alone.notes["restore"] == "none"
    assert not left_alone.refits
    with pytest.raises(InputError, match="--restore calibrate needs images") as caught:
        api.prune(method, model, ratio=0.4, restore="calibrate")
    assert "--data" in str(caught.value)


@pytest.mark.parametrize("method", ["merge", "slim"])
def test_progress_counts_images_and_then_layers(method: str) -> None:
    heard: list[tuple[str, int, int]] = []
    images = torch.randn(20, 3, 32, 32)
    with report_progress(lambda *count: heard.append(count)):
        api.prune(method, small_resnet(), images=images, ratio=0.3)
    layers = [count for what, *count in heard if what == "refitting layers"]
    assert layers == [[done, len(layers) - 1] for done in range(len(layers))], "one after the other, from none to all"
    measured = [count for what, *count in heard if what == "measuring activations"]
    assert measured == ([[20, 20]] if method == "merge" else [])
    counts: list[tuple[int, int]] = []
    api.prune(method, small_resnet(), images=images, ratio=0.3, on_progress=lambda *count: counts.append(count))
    assert counts == [tuple(count) for _, *count in heard]


def test_batches_are_as_good_as_a_tensor() -> None:
    model, images = small_resnet(), torch.randn(30, 3, 32, 32)
    whole = api.prune("merge", model, ratio=0.5, images=images).model.state_dict()
    parts = api.prune("merge", model, ratio=0.5, images=iter(images.split(7))).model.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(0, 3, 32, 32), "no calibration images"),
        ([], "no calibration images"),
        (torch.zeros(4, 1, 32, 32), r"shape \(1, 32, 32\); the network reads \(3, 32, 32\)"),
        (torch.zeros(4, 3, 16, 16), r"shape \(3, 16, 16\)"),
        (torch.full((4, 3, 32, 32), torch.nan), "not finite"),
        (
            [(torch.zeros(4, 3, 32, 32), torch.zeros(4))],
            r"shape \(3, 32, 32\) and \(\); the network reads \(3, 32, 32\)",
        ),
    ],
    ids=["none", "no batches", "channels", "size", "nan", "with labels"],
)
def test_bad_images(images: Tensor | list[Tensor], said: str) -> None:
    with pytest.raises(InputError, match=said):
        api.prune("merge", small_resnet(), ratio=0.5, images=images)


def count_moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that are moved to a file from now on, one entry for each storage."""
    moved: list[int] = []
    put = spilling.Spill.put

    def counted(self: spilling.Spill, tensors: Sequence[Tensor]) -> None:
        moved.append(tensors[0].untyped_storage().nbytes())
        put(self, tensors)

    monkeypatch.setattr(spilling.Spill, "put", counted)
    return moved


def test_batches_give_what_one_batch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few pass at a time, and wherever they wait meanwhile."""
    model, images = small_resnet().double(), torch.randn(20, 3, 32, 32, dtype=torch.float64)
    graph = surgery.trace(model, images[:1])
    plan = Plan([Keep("layer1.0.conv1", [0, 1, 2]), Keep("layer2.0.conv1", [0, 1, 2, 3, 5])])
    whole = calibrate(model, graph, plan, images, rows=400)
    monkeypatch.setattr(frontier, "BATCH", 3)
    moved = count_moves(monkeypatch)
    for memory, spilled in (("1GiB", False), (20 * bytes_per_image(graph), True), (1, True)):
        parts = calibrate(model, graph, plan, images, rows=400, memory=memory)
        assert bool(moved) is spilled
        assert parts.notes == whole.notes
        for a, b in zip(parts.refits, whole.refits, strict=True):
            assert a.layer == b.layer
            assert all(torch.allclose(a.values[name], b.values[name], atol=1e-8) for name in a.values)


@pytest.mark.parametrize(("size", "found"), [("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 kb", 1500), (4096, 4096)])
def test_memory_is_read_as_people_write_it(size: str | int, found: int) -> None:
    assert read_memory(size) == found


@pytest.mark.parametrize("size", ["", "much", "0", "-1GB", "2 GiBs", "1e9"])
def test_what_is_no_size_is_told(size: str) -> None:
    for method in ("merge", "slim"):
        with pytest.raises(InputError, match=f"--memory '{size}' is no size"):
            api.prune(method, nn.Identity(), ratio=0.5, memory=size)


@pytest.mark.parametrize("images", [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32).expand(30, -1, -1, -1)])
def test_one_image_and_the_same_again_and_again(images: Tensor) -> None:
    done = api.merge(small_resnet(), images=images, ratio=0.3)
    assert "fewer than its" in done.plan.notes["warning"] or len(images) > 1
    assert all(bool(torch.isfinite(p).all()) for p in done.model.parameters())


def test_what_the_caller_has_switched_on_makes_no_difference() -> None:
    model, images = small_resnet(), torch.randn(20, 3, 32, 32)
    plain = api.slim(model, images=images, ratio=0.3).plan.refits
    with torch.inference_mode():
        assert_same(plain, api.slim(model, images=images, ratio=0.3).plan.refits)


def assert_same(first: Sequence[Refit], second: Sequence[Refit]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.layer == b.layer
        assert all(torch.equal(a.values[name], b.values[name]) for name in a.values)


class SamePadded(nn.Conv2d):
    """A convolution that pads in its own forward, unevenly."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """A convolution whose weight is computed from its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * 1.5, self.bias)


class Unusual(nn.Module):
    """Layers as people write them: subclasses, functions on a module's parameters, activations called as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = SamePadded(3, 12, 2, stride=2), nn.BatchNorm2d(12)
        self.plain, self.twice = nn.Conv2d(12, 10, 3), nn.Conv2d(10, 10, 3, padding=1)
        self.last, self.head = SamePadded(10, 6, 2, dilation=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = nn.functional.conv2d(x, self.plain.weight, self.plain.bias, stride=2).clamp(0, 6)
        x = self.last(self.twice(self.twice(x).relu()).relu()).relu().flatten(2).transpose(1, 2)
        return nn.functional.linear(x[:, ::2], self.head.weight, self.head.bias)


def test_layers_are_what_the_trace_saw() -> None:
    model, images = lively(Unusual()), torch.randn(40, 3, 24, 24, dtype=torch.float64)
    graph = surgery.trace(model, images[:2])
    plan = Plan([Keep("stem", range(9)), Keep("plain", range(7)), Keep("last", range(5))])
    small, found = restored(model, plan, images)
    assert {refit.layer for refit in found.refits} == {"plain", "last", "head"}
    assert found.notes["calibration"]["left"] == {"twice": "it is used more than once"}
    plain, want = surgery.edit(model, plan, graph), outputs(model, images)
    assert (outputs(small, images) - want).square().mean() < 0.7 * (outputs(plain, images) - want).square().mean()


def test_a_weight_that_is_computed_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Scaled(8, 4, 1)).eval()
    graph = surgery.trace(model, torch.zeros(1, 3, 8, 8))
    assert obstacle_to_layer(model, graph, "2") == "'2.weight' is not read as it is"
    assert obstacle_to_layer(model, graph, "0") is None


class Encoder(nn.Module):
    """A transformer layer, whose forward has a fused way that runs as one op."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return out


def test_layers_inside_a_fused_transformer_layer() -> None:
    model, images = lively(Encoder()), torch.randn(30, 3, 16, 16, dtype=torch.float64)
    small, found = restored(model, Plan([Keep("layer.linear1", range(9))]), images)
    assert {"layer.linear2", "head"} <= {refit.layer for refit in found.refits}
    assert found.notes["calibration"]["left"] == {}
    plain = surgery.edit(model, Plan(found.keeps), surgery.trace(model, images[:2]))
    want = outputs(model, images)
    assert (outputs(small, images) - want).square().mean() < (outputs(plain, images) - want).square().mean()


class Remembers(nn.Module):
    """Notes its input in itself, and adds it later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.noted = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.noted = x
        return self.second(self.first(x).relu()) + self.noted


def test_passes_do_not_mix_what_modules_note(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = lively(Remembers()), torch.randn(12, 3, 8, 8, dtype=torch.float64)
    plan = Plan([Keep("first", range(5))])
    whole = restored(model, plan, images)[1]
    monkeypatch.setattr(frontier, "BATCH", 5)
    parts = restored(model, plan, images)[1]
    for a, b in zip(parts.refits, whole.refits, strict=True):
        assert all(torch.allclose(a.values[name], b.values[name], atol=1e-8) for name in a.values)


class Fails(nn.Module):
    """Works on two images at most."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if len(x) > 2:
            raise RuntimeError("too many")
        return self.second(x)


def test_a_forward_that_fails_is_told_and_leaves_no_thread() -> None:
    model, before = lively(Fails()), threading.active_count()
    graph = surgery.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(InputError, match="fails on 8 calibration images at once: too many"):
        calibrate(model, graph, Plan([Keep("first", range(5))]), torch.randn(8, 3, 8, 8, dtype=torch.float64))
    assert threading.active_count() == before


def test_degenerate_statistics_stay_finite() -> None:
    """Dead channels, a gamma of zero and constant images: finite weights."""
    model = small_resnet()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight[:2] = 0
            norm.bias[:2] = -1
    small = api.prune("merge", model, ratio=0.5, images=torch.ones(10, 3, 32, 32)).model
    assert all(torch.isfinite(value).all() for value in small.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "least"), [(0.3, 88.0), (0.5, 80.0)])
def test_the_paper_network(
    assets: Path, cifar_test: Callable[[int], tuple[Tensor, Tensor]], ratio: float, least: float
) -> None:
    """ResNet-56 refitted to 500 unlabelled images, judged on others: Neuron Merging gives 83.7 and 57.1."""
    file = assets / "checkpoints" / "ResNet.cifar10.original.56.pth.tar"
    model = load(file, arch="resnet56_cifar", arch_args={"shortcut": "conv", "relu": "input"})
    pixels, labels = cifar_test(5)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    images = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[:500], order[500:]
    small = api.prune("merge", model, ratio=ratio, images=images[seen]).model
    right = [outputs(small, images[part]).argmax(1) == labels[part] for part in unseen.split(250)]
    assert 100 * float(torch.cat(right).float().mean()) >= least


def test_a_bias_that_a_fold_has_made_is_refitted_too() -> None:
    class Bare(nn.Module):
        """The second convolution has neither a bias nor a batch norm of its own behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.second, self.after, self.head = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(torch.relu(self.norm(self.first(x))))
            return self.head(torch.relu(self.after(torch.relu(x))))

    model = Bare().double().eval()
    nn.init.uniform_(model.norm.weight, 0.1, 1.0)
    nn.init.uniform_(model.norm.bias, 0.5, 1.0)
    nn.init.uniform_(model.after.weight, 0.1, 1.0)
    images = torch.randn(32, 3, 8, 8, dtype=torch.float64)
    result = api.prune("slim", model, images[:1], images=images, ratio=0.5, restore="calibrate")
    assert any(refit.layer == "second" and "bias" in refit.values for refit in result.plan.refits)
    plain = api.prune("slim", model, images[:1], ratio=0.5, restore="none").model
    wanted = outputs(model, images)
    gaps = [float((outputs(small, images) - wanted).norm()) for small in (result.model, plain)]
    assert gaps[0] < 0.9 * gaps[1]
