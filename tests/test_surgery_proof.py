"""The test of surgery: masked output equals sliced output, in float64, on real and on random architectures."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import lively, random_network, random_plan
from prunekit import models, surgery
from prunekit.errors import SurgeryError
from prunekit.plan import Keep, Plan
from prunekit.spec import origin_of

BUNDLED = [
    ("lenet_300_100", {}),
    ("vgg_digits", {}),
    ("vgg11_cifar", {"width": 0.25}),
    ("resnet20_cifar", {}),
    ("resnet20_cifar", {"shortcut": "conv", "relu": "input"}),
    ("resnet32_cifar", {"shortcut": "conv"}),
    ("wrn40_4", {}),
    ("preresnet164", {}),
    ("densenet40_12", {}),
]
TORCHVISION = [
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "googlenet"),
    *("efficientnet_b0", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1"),
]


def prove(model: torch.nn.Module, x: torch.Tensor, seed: int) -> surgery.Cost:
    """Prune by a random plan; returns the predicted cost, which must be the real one."""
    graph = surgery.trace(model, x)
    plan = random_plan(graph, seed)
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) <= 1e-10
    predicted = surgery.predict(graph, surgery.resolve(graph, plan).kept)
    real = surgery.measure(small, x)
    assert (predicted.params, predicted.macs) == (real.params, real.macs)
    return real


@pytest.mark.parametrize(("arch", "args"), BUNDLED)
def test_bundled_architectures(arch: str, args: dict[str, object]) -> None:
    model = lively(models.build(arch, args))
    origin = origin_of(model)
    assert origin is not None
    assert origin.input is not None
    x = torch.zeros(2, *origin.input.shape, dtype=torch.float64)
    before = surgery.measure(model, x)
    after = prove(model, x, seed=1)
    assert after.params < before.params


@pytest.mark.slow
@pytest.mark.parametrize("arch", models.names())
def test_every_bundled_architecture(arch: str) -> None:
    model = lively(models.build(arch))
    origin = origin_of(model)
    assert origin is not None
    assert origin.input is not None
    prove(model, torch.zeros(2, *origin.input.shape, dtype=torch.float64), seed=5)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_architectures(name: str) -> None:
    extra = {"init_weights": False} if name == "googlenet" else {}
    model = lively(torchvision.models.get_model(name, weights=None, num_classes=10, **extra))
    before = surgery.measure(model, torch.zeros(2, 3, 64, 64, dtype=torch.float64))
    after = prove(model, torch.zeros(2, 3, 64, 64, dtype=torch.float64), seed=2)
    assert after.params < before.params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenet_v3_large", "convnext_tiny", "inception_v3", "mnasnet0_5"])
def test_large_torchvision_architectures(name: str) -> None:
    extra = {"init_weights": False} if name == "inception_v3" else {}
    model = lively(torchvision.models.get_model(name, weights=None, **extra))
    size = 299 if name == "inception_v3" else 224
    prove(model, torch.zeros(2, 3, size, size, dtype=torch.float64), seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_classifier(name: str) -> None:
    """Half of the channels of each group, with no setting of the model's own."""
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    size = 224 if any(part in name for part in ("vit", "swin")) else 96
    x = torch.zeros(1, 3, size, size)
    graph = surgery.trace(model, x)
    keeps = {g.name: list(range(g.size - len(g.free) // 2)) for g in graph.groups if not g.frozen and g.size > 1}
    plan = Plan([Keep(name, index) for name, index in surgery.balanced(graph, keeps, {}).items()])
    small = surgery.edit(model, plan, graph)
    surgery.verify(model, small, plan, graph)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    assert small(torch.randn(2, 3, size, size)).shape == (2, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "swin3d_t"])
def test_video_models(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.zeros(1, 3, 16, 224, 224) if name in ("mvit_v1_b", "s3d") else torch.zeros(1, 3, 8, 64, 64)
    graph = surgery.trace(model, x)
    plan = random_plan(graph, 8)
    assert plan.keeps
    surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


def test_auxiliary_heads_still_run_in_training_mode() -> None:
    model = torchvision.models.googlenet(weights=None, num_classes=10, init_weights=False, aux_logits=True)
    graph = surgery.trace(model, torch.zeros(1, 3, 64, 64))
    plan = random_plan(graph, 9)
    small = surgery.edit(model, plan, graph).train()
    outputs = small(torch.randn(2, 3, 64, 64))
    assert [tuple(out.shape) for out in outputs] == [(2, 10)] * 3
    assert small.aux1.fc1.in_features < model.aux1.fc1.in_features


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_random_networks(network: int, plan: int) -> None:
    prove(random_network(network), torch.zeros(2, 3, 8, 8, dtype=torch.float64), plan)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000, derandomize=False)
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_two_thousand_random_networks(network: int, plan: int) -> None:
    prove(random_network(network), torch.zeros(2, 3, 8, 8, dtype=torch.float64), plan)


@pytest.mark.parametrize("arch", ["resnet20_cifar", "vgg_digits", "densenet40_12"])
def test_the_proof_has_power(arch: str) -> None:
    """One wrong column in one layer is noticed, and the layer is named."""
    model = lively(models.build(arch))
    origin = origin_of(model)
    assert origin is not None
    assert origin.input is not None
    graph = surgery.trace(model, torch.zeros(2, *origin.input.shape, dtype=torch.float64))
    plan = random_plan(graph, seed=4, most=0.5)
    small = surgery.edit(model, plan, graph)
    convs = [(n, m) for n, m in small.named_modules() if isinstance(m, torch.nn.Conv2d)]
    name, conv = convs[len(convs) // 2]
    with torch.no_grad():
        conv.weight[:, 0] = conv.weight[:, 0].flip(0) + 0.01
    with pytest.raises(SurgeryError, match=rf"first in '{name}'"):
        surgery.verify(model, small, plan, graph)


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_attention_is_left_alone_and_the_rest_is_pruned(name: str) -> None:
    """Sizes that a transformer has written into its code are found by running it at another width."""
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.zeros(1, 3, 224, 224)
    graph = surgery.trace(model, x)
    hidden = [group for group in graph.groups if "mlp" in group.name]
    assert len(hidden) == 12
    assert all(len(group.free) == group.size for group in hidden)
    plan = random_plan(graph, 6)
    surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


def test_a_faint_network_is_proven_on_a_lively_copy() -> None:
    """With a last layer of zeros every pruned network gives the same output; that proves nothing."""
    model = models.build("resnet20_cifar")
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        model.fc.weight.zero_()
    graph = surgery.trace(model, x)
    plan = random_plan(graph, 7)
    small = surgery.edit(model, plan, graph)
    assert 0 < surgery.verify(model, small, plan, graph) < 1e-4
    with torch.no_grad():
        small.layer1[0].conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(SurgeryError, match="does not have the weights"):
        surgery.verify(model, small, plan, graph)
