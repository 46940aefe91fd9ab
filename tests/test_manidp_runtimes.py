"""Ways of running a gated network: they compute what the masks do, or say how far off they are."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import prunekit as pk
from networks import gated
from prunekit.errors import InputError
from prunekit.methods.manidp.runtimes import choose
from prunekit.methods.manidp.runtimes.buckets import add_buckets, bucketed, k_means
from prunekit.methods.manidp.runtimes.gather import GatheredConv, gathered
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.buckets import NAME, BucketTable
from prunekit.nn.gated import gated_layers


def always_gather(runner: nn.Module) -> nn.Module:
    """Gather in every layer, whatever was faster here."""
    for module in runner.modules():
        if isinstance(module, GatheredConv):
            module.limit = module.width
    return runner


CASES = [
    ("prunekit:resnet20", 32),
    ("prunekit:vgg11_cifar", 16),
    ("torchvision:resnet18", 48),
    ("torchvision:resnet50", 48),
    ("torchvision:mobilenet_v2", 48),
    ("torchvision:mobilenet_v3_small", 48),
]


@pytest.mark.parametrize(("name", "side"), CASES)
def test_gather_computes_what_the_masks_do(name: str, side: int) -> None:
    model = gated(name, side, keep=0.4).double()  # where no saliency is so near its threshold that rounding decides
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    tuned = gathered(GatedView.of(model), images[:1])
    with torch.no_grad():
        wanted = model(images)
        for runner in (tuned, always_gather(tuned)):
            assert torch.allclose(runner(images), wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


def test_gather_in_single_precision() -> None:
    model = gated("prunekit:resnet20", 32)
    images = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)
        found = always_gather(gathered(GatedView.of(model), images[:1]))(images)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_gather_with_a_layer_that_keeps_nothing() -> None:
    model = gated("prunekit:resnet20", 32)
    for number, (_, layer) in enumerate(gated_layers(model)):
        if number in (2, 5):
            layer.threshold.fill_(1e6)
    images = torch.randn(2, 3, 32, 32)
    runner = always_gather(gathered(GatedView.of(model), images[:1]))
    with torch.no_grad():
        assert torch.allclose(runner(images), model(images), atol=1e-5 * float(model(images).abs().max()))


def test_compact_maps_pass_between_the_layers_of_a_block() -> None:
    runner = gathered(GatedView.of(gated("torchvision:resnet18", 48)), torch.randn(1, 3, 48, 48))
    sinks = [module.sink is not None for module in runner.modules() if isinstance(module, GatheredConv)]
    assert sinks == [True, False] * 8


def test_buckets_are_static_networks_behind_a_router() -> None:
    model = gated("prunekit:resnet20", 16)
    cost = GatedView.of(model).cost
    images = torch.randn(80, 3, 16, 16)
    right = add_buckets(GatedView.of(model), images, 2)
    assert 0.5 < right <= 1
    stream = io.BytesIO()
    pk.save(model, stream)
    stream.seek(0)
    runner = bucketed(pk.load(stream))
    with torch.no_grad():
        routes = runner.router(images).argmax(1)
        one_by_one = torch.cat([runner(image[None]) for image in images])
        assert torch.allclose(runner(images), one_by_one, atol=1e-4)
        for bucket, network in enumerate(runner.networks):
            members = images[routes == bucket]
            assert torch.allclose(runner(images)[routes == bucket], network(members), atol=1e-4)
            assert not any(gated_layers(network))
            assert pk.inspect(network).cost.macs < 0.75 * cost.dense


def test_a_bucket_of_identical_images_answers_as_the_masks_do() -> None:
    """Where all images of a bucket keep the same channels with the same saliencies, nothing is approximated."""
    model = gated("prunekit:vgg11_cifar", 16)
    pair = torch.randn(2, 3, 16, 16)
    images = pair.repeat_interleave(40, 0)
    add_buckets(GatedView.of(model), images, 2)
    with torch.no_grad():
        wanted = model(pair)
        assert torch.allclose(bucketed(model)(pair), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_k_means_finds_two_heaps() -> None:
    heaps = torch.cat([torch.zeros(10, 3), torch.ones(20, 3)]) + 0.01 * torch.randn(30, 3)
    home = k_means(heaps, 2, torch.Generator().manual_seed(1))
    assert len(set(home[:10].tolist())) == len(set(home[10:].tolist())) == 1
    assert home[0] != home[10]


def test_too_few_images_for_buckets() -> None:
    model = gated("prunekit:resnet20", 32)
    view = GatedView.of(model)
    for images, count in ((10, 2), (100, 1)):
        with pytest.raises(InputError, match="sub-networks from"):
            add_buckets(view, torch.randn(images, 3, 32, 32), count)
    assert not hasattr(model, NAME)


def test_auto_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated("prunekit:resnet20", 32)
    model.add_module(NAME, BucketTable(2, 5, 3))
    monkeypatch.setattr(choose, "_one", lambda _, name, __: name)
    for best in ("masked", "gather", "buckets"):
        monkeypatch.setattr(choose, "medians", lambda nets, _, b=best: {name: float(name != b) for name in nets})
        assert choose.accelerate(model, "auto")[1] == best
    monkeypatch.setattr(choose, "medians", lambda nets, _: {name: float(name != "masked") for name in nets})
    assert choose.accelerate(model, "auto", batch=4)[1] == "masked"


def test_runtimes_that_cannot_be() -> None:
    model = gated("prunekit:resnet20", 32)
    with pytest.raises(InputError, match="no static sub-networks"):
        choose.accelerate(model, "buckets")
    with pytest.raises(InputError, match="unknown runtime"):
        choose.accelerate(model, "warp")
    with pytest.raises(InputError, match="networks with gates"):
        choose.accelerate(pk.load("prunekit:resnet20"), "gather")


def test_load_takes_a_runtime_and_a_budget(tmp_path: Any) -> None:
    model = gated("prunekit:resnet20", 32)
    for _, layer in gated_layers(model):
        layer.budgets = {"50%": float(layer.threshold), "none": 1e6}
    pk.save(model, tmp_path / "gated.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fast = pk.load(tmp_path / "gated.pt", runtime="gather", budget="50%")(images)
        assert torch.allclose(fast, model(images), atol=1e-5 * float(fast.abs().max()))
        assert not torch.allclose(pk.load(tmp_path / "gated.pt", budget="none")(images), model(images))


@pytest.mark.parametrize("sizes", [{"buckets": 0, "channels": 1, "images": 1}, {"buckets": "x"}, [], 3])
def test_hostile_tables_are_input_errors(sizes: Any) -> None:
    from prunekit.nn.buckets import restore_buckets

    with pytest.raises(InputError, match="sub-networks that cannot be"):
        restore_buckets(
            pk.load("prunekit:resnet20"), sizes, {"buckets.scales": [0, 1], "buckets.router.conv1.weight": [16, 1]}
        )


def test_a_table_of_the_wrong_size_is_no_bucket() -> None:
    model = gated("prunekit:resnet20", 32)
    model.add_module(NAME, BucketTable(2, 5, 3))
    with pytest.raises((InputError, RuntimeError)):
        bucketed(model)
