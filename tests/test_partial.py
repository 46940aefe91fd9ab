"""Partial pruning: layers named by patterns, and ratios of single layers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunekit as pk
from commands import Capture, call, document
from networks import lively, random_network
from prunekit import checkpoint, models
from prunekit.methods import registry
from prunekit.models.preresnet import PreResNet
from prunekit.workflows.sweeps.points import Variant

X = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
METHODS = [name for name in registry.names() if not (registry.get(name).labelled or registry.get(name).inside_heads)]


def widths(model: nn.Module) -> dict[str, int]:
    """The output widths of convolutions and linear layers, by name."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: module.weight.shape[0] for name, module in model.named_modules() if isinstance(module, layers)}


def narrowed(model: nn.Module, small: nn.Module) -> set[str]:
    after = widths(small)
    return {name for name, width in widths(model).items() if after[name] < width}


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_named_becomes_narrower(method: str) -> None:
    model = pk.load("prunekit:resnet20")
    small = pk.prune(method, model, ratio=0.5, only=("layer2", "layer3.1.*"), skip="layer2.1.bn1").model
    found = narrowed(model, small)
    assert found
    assert found <= {"layer2.0.conv1", "layer2.2.conv1", "layer3.1.conv1"}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 400), method=st.sampled_from(METHODS))
def test_no_layer_becomes_narrower_that_is_not_named(seed: int, method: str) -> None:
    model = random_network(seed)
    chance, layers = random.Random(seed), [*widths(model)]
    only = chance.sample(layers, chance.randint(1, len(layers)))
    skip = chance.sample(layers, chance.randint(0, 2))
    try:
        small = pk.prune(method, model, X, ratio=0.4, only=only, skip=skip, restore="none").model
    except pk.InputError:  # the layers named hold nothing that may go
        return
    assert narrowed(model, small) <= set(only) - set(skip)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 400))
def test_without_what_holds_it_the_same_pattern_prunes(seed: int) -> None:
    """A pattern for everything is no restriction, and a part of a graph does not stay one."""
    model = random_network(seed)
    try:
        whole = pk.prune("l1-norm", model, X, ratio=0.4)
    except pk.InputError:
        return
    assert pk.prune("l1-norm", model, X, ratio=0.4, only="*").plan.keeps == whole.plan.keeps
    first = whole.plan.keeps[0].group
    names = [member.module for member in whole.graph.group(first).producers]
    try:
        part = pk.prune("l1-norm", model, X, ratio=0.4, skip=names, graph=whole.graph)
    except pk.InputError:
        return
    assert first not in {keep.group for keep in part.plan.keeps}
    again = pk.prune("l1-norm", model, X, ratio=0.4, graph=part.graph)
    assert again.plan.keeps == whole.plan.keeps


def test_a_norm_that_reads_a_stream_keeps_what_it_is_told_to() -> None:
    model = lively(PreResNet(depth=11))
    small = pk.slim(model, torch.zeros(1, 3, 16, 16).double(), ratio=0.5, skip="*.bn1").model
    for name, module in model.named_modules():
        if name.endswith(".bn1"):
            assert module.num_features == small.get_submodule(name).num_features
    assert narrowed(model, small)


@pytest.mark.parametrize("method", METHODS)
def test_ratios_of_single_layers(method: str) -> None:
    model = pk.load("prunekit:resnet20")
    done = pk.prune(method, model, ratio_of={"layer2.*": 0.5, "layer2.1.*": 0.25})
    left = {keep.group: len(keep.index) for keep in done.plan.keeps}
    assert left == {"layer2.0.conv1": 16, "layer2.1.conv1": 24, "layer2.2.conv1": 16}


@pytest.mark.parametrize("method", METHODS)
def test_a_target_counts_what_has_its_own_ratio(method: str) -> None:
    model = pk.load("prunekit:resnet20")
    done = pk.prune(method, model, target_macs="60%", ratio_of={"layer3.*": 0.25})
    left = {keep.group: len(keep.index) for keep in done.plan.keeps}
    assert [left[f"layer3.{block}.conv1"] for block in range(3)] == [48, 48, 48]
    assert 0.55 < done.after.macs / done.before.macs <= 0.6


def test_a_dictionary_of_ratios_takes_patterns_too() -> None:
    model = pk.load("prunekit:resnet20")
    assert pk.slim(model, ratio={"layer2.*": 0.5}).plan.keeps == pk.slim(model, ratio_of={"layer2.*": 0.5}).plan.keeps


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"only": "layer9.*"}, "--only 'layer9.\\*' matches no layer\ndid you mean layer"),
        ({"skip": "layer1.0.conf1"}, "--skip 'layer1.0.conf1' matches no layer\ndid you mean layer1.0.conv1"),
        ({"only": "layer2.0.conv2"}, "'layer2.0.conv2' shares its channels with conv1, .* which are not named"),
        ({"only": "fc"}, "nothing is left to be pruned: the model's output"),
        ({"skip": "*"}, "--skip names all of it"),
        ({"ratio_of": {"leyer3.*": 0.5}}, "--ratio-of 'leyer3.\\*' matches no layer\ndid you mean layer3"),
        ({"ratio_of": {"layer2.0.conv2*": 0.5}}, "names nothing that can be pruned: 'layer2.0.conv2' shares"),
        ({"ratio_of": {"layer3.*": 1.5}}, "a ratio must lie between 0 and 1"),
        ({"ratio_of": {"*": 0.5}}, "every layer has a ratio of its own"),
        ({"ratio": None, "only": "layer3"}, "exactly one of"),
    ],
)
@pytest.mark.parametrize("method", ["slim", "merge"])
def test_bad_input(method: str, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(pk.InputError, match=said):
        pk.prune(method, pk.load("prunekit:resnet20"), **{"ratio": 0.5, **asked})


def test_attention_is_left_alone_by_its_name() -> None:
    model = pk.load("prunekit:vit_digits")
    small = pk.merge(model, ratio=0.5, only="*mlp*").model
    assert narrowed(model, small)
    assert all("mlp" in name for name in narrowed(model, small))


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    path = tmp_path / "net.pt"
    checkpoint.save(lively(models.build("vgg_digits", {"config": "8-8-M-16", "width": 1})).float(), path)
    return path


def test_commands_take_patterns_and_remember_them(network: Path, capsys: Capture) -> None:
    flags = ["--only", "features.0", "--only", "features.3,features.7", "--skip", "features.3"]
    found = document(capsys, "slim", network, *flags, "--ratio", "0.5", "-o", "small.pt")
    assert found["settings"]["only"] == ["features.0", "features.3", "features.7"]
    assert found["frozen"]["--skip names it, or a layer that shares its channels"] == ["features.3"]
    assert set(found["plan"]["keep"]) <= {"features.0", "features.7"}
    step = document(capsys, "inspect", "small.pt")["history"][-1]
    assert step["settings"]["skip"] == ["features.3"]
    status, out, _ = call(capsys, "inspect", "small.pt")
    assert status == 0
    assert "only=features.0,features.3,features.7" in " ".join(out.split())


def test_commands_take_ratios_of_layers(network: Path, capsys: Capture) -> None:
    found = document(capsys, "merge", network, "--ratio-of", "features.0=.5,features.3=25%", "--dry-run")
    assert found["settings"]["ratio_of"] == {"features.0": 0.5, "features.3": 0.25}
    assert found["settings"]["ratio"] is None
    status, _, err = call(capsys, "merge", network, "--ratio-of", "features.0", "--dry-run")
    assert status == 2
    assert "--ratio-of 'features.0' is not PATTERN=RATIO" in err


def test_settings_files_have_patterns(network: Path, capsys: Capture) -> None:
    asked = ["--ratio", ".5", "--only", "features.0", "--ratio-of", "features.3=.5"]
    status, out, _ = call(capsys, "slim", network, *asked, "--print-config")
    assert status == 0
    Path("s.toml").write_text(out, encoding="utf-8")
    flags = document(capsys, "slim", network, "--ratio", ".5", "--only", "features.0", "--dry-run")
    Path("s.toml").write_text('ratio = 0.5\nonly = ["features.0"]\n', encoding="utf-8")
    filed = document(capsys, "slim", network, "--config", "s.toml", "--dry-run")
    assert filed["plan"] == flags["plan"]
    assert filed["settings"] == flags["settings"]


def test_passes_approach_ratios_of_layers(network: Path, capsys: Capture) -> None:
    tuning = ["--data", "digits", "--epochs", "1", "--batch-size", "512", "--iterations", "2", "--device", "cpu"]
    found = document(capsys, "slim", network, "--ratio-of", "features.7=.75", *tuning, "-o", "small.pt")
    assert [done["widths"]["features.7"] for done in found["passes"]] == [8, 4]


def test_sweeps_keep_to_the_part(network: Path, capsys: Capture) -> None:
    flags = ["--methods", "merge:none,l1-norm", "--ratios", ".25,.5", "--only", "features.0", "--skip", "features.7"]
    found = document(capsys, "sweep", network, "--no-latency", *flags, "-o", "s.json")
    assert {point["label"] for point in found["points"]} == {
        "merge:none,only=features.0,skip=features.7",
        "l1-norm:only=features.0,skip=features.7",
    }
    assert all(point["error"] is None for point in found["points"])
    whole = found["base"]["params"]
    assert all(whole > point["result"]["params"] > 0.5 * whole for point in found["points"])
    again = document(capsys, "sweep", network, "--no-latency", "-o", "s.json", "--resume")
    assert again["points"] == found["points"]
    status, _, err = call(capsys, "sweep", network, "--methods", "manidp", "--only", "x", "--epochs", "1")
    assert status == 2
    assert "manidp trains gates" in err


def test_labels_of_variants_are_what_is_typed() -> None:
    settings = {"only": ("a.*", "b"), "ratio_of": {"c": 0.5}}
    assert Variant("merge", settings).label == "merge:only=a.*,only=b,ratio-of=c=0.5"
