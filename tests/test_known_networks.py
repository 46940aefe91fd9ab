"""Networks that are recognised by their weights, the table that they stand in, and the command that lists it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import schemas
from prunekit import checkpoint, models
from prunekit.checkpoint.weights import empty
from prunekit.cli.app import run
from prunekit.errors import InputError, Noted
from prunekit.models import known
from prunekit.spec import origin_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import known_networks

Capture = pytest.CaptureFixture[str]


def state_of(arch: str, **args: Any) -> dict[str, Tensor]:
    """A network's weights."""
    return models.build(arch, args).state_dict()


def saved(content: Any, folder: Path, name: str = "w.pth") -> Path:
    """A file of it."""
    path = folder / name
    if name.endswith(".safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def taken(path: Path, **arguments: Any) -> tuple[nn.Module, str]:
    """The network that a file is recognised as, and what is said of it."""
    with pytest.warns(Noted) as said:
        model = checkpoint.load(path, **arguments)
    return model, str(said[0].message)


@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("lenet_300_100", {}),
        ("vgg_digits", {"num_classes": 3}),
        ("vgg11_cifar", {"width": 0.25, "in_channels": 1}),
        ("densenet40_12", {"num_classes": 100}),
        ("torchvision:squeezenet1_1", {"num_classes": 7}),
        ("torchvision:mobilenet_v3_small", {}),
        ("torchvision:shufflenet_v2_x0_5", {"num_classes": 1}),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_the_only_network_that_fits_is_taken_and_said(
    arch: str, args: dict[str, Any], name: str, tmp_path: Path
) -> None:
    state = state_of(arch, **args)
    model, said = taken(saved(state, tmp_path, name))
    origin = origin_of(model)
    assert origin is not None
    assert origin.arch == arch
    assert args.items() <= origin.arch_args.items() | {("num_classes", 10)}
    assert said.startswith(f"took --arch {arch}")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


_WRAPS: list[Any] = [
    lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    lambda state: {"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}, "epoch": 3},
    lambda state: {"net": state, "optimizer": {"param_groups": [], "state": {}}},
    lambda state: {f"net.{key}": tensor for key, tensor in state.items()} | {"loss.weight": torch.ones(5, 5)},
    lambda state: {key: tensor for key, tensor in state.items() if "num_batches" not in key},
    lambda state: dict(reversed(state.items())) | {"total_ops": torch.zeros(1)},
    lambda state: {key.replace("fc.", "linear."): tensor for key, tensor in state.items()},
]


@pytest.mark.parametrize("wrap", _WRAPS)
def test_names_around_and_beside_the_weights_do_not_matter(wrap: Any, tmp_path: Path) -> None:
    state = state_of("resnet20_cifar")
    model, said = taken(saved(wrap(state), tmp_path))
    assert "--arch resnet20_cifar:" in said
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items() if key in state)


def test_two_that_fit_are_named_and_an_argument_decides(tmp_path: Path) -> None:
    path = saved(state_of("resnet20_cifar", shortcut="conv"), tmp_path)
    with pytest.raises(InputError, match="2 fit") as caught:
        checkpoint.load(path)
    assert caught.value.hint is not None
    assert "--arch resnet20_cifar --arch-args shortcut=conv,relu=input" in caught.value.hint
    model, said = taken(path, arch_args={"relu": "input"})
    assert said.startswith("took --arch resnet20_cifar --arch-args shortcut=conv,relu=input:")
    assert isinstance(model.relu1, nn.Identity)


def test_weights_and_their_average_are_not_guessed_between(tmp_path: Path) -> None:
    state = state_of("vgg_digits")
    path = saved({"model": state, "ema": state_of("vgg_digits")}, tmp_path)
    with pytest.raises(InputError, match="holds 2 networks that fit vgg_digits: model, ema"):
        checkpoint.load(path)
    assert taken(path, key="ema")[1].startswith("took --arch vgg_digits")


def test_the_nearest_is_named_with_what_differs(tmp_path: Path) -> None:
    state = state_of("torchvision:resnet18")
    state["layer3.0.conv1.weight"] = torch.zeros(7, 128, 3, 3)
    with pytest.raises(InputError, match=r"nearest is torchvision:resnet18.*layer3.0.conv1.weight \(7, 128"):
        checkpoint.load(saved(state, tmp_path))
    with pytest.raises(InputError, match="no known network is like it") as caught:
        checkpoint.load(saved({"a": torch.ones(3, 4), "b": torch.ones(4)}, tmp_path, "other.pth"))
    assert "prunekit archs" in str(caught.value.hint)


def test_other_names_for_the_same_shapes_do_not_fit(tmp_path: Path) -> None:
    state = {f"x{i}": tensor for i, tensor in enumerate(state_of("vgg_digits").values())}
    state = {f"{key}.weight": tensor for key, tensor in state.items()}
    with pytest.raises(InputError, match="does not say its architecture"):
        checkpoint.load(saved(state, tmp_path))


def test_commands_say_what_they_took(tmp_path: Path, capsys: Capture) -> None:
    path = saved(state_of("vgg_digits"), tmp_path)
    assert run(["inspect", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"took --arch vgg_digits: the keys and shapes of {path} fit\n"
    assert json.loads(captured.out)["arch"] == "vgg_digits"
    assert run(["inspect", str(path), "-q"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("resnet20-12fca82f.th", "took --arch resnet20_cifar:"),
        ("LeNet_300_100.original.300_100.bias.pth.tar", "took --arch lenet_300_100:"),
    ],
)
def test_published_checkpoints_are_recognised(name: str, arch: str, assets: Path) -> None:
    assert taken(assets / "checkpoints" / name)[1].startswith(arch)


def test_the_published_resnet56_could_be_two(assets: Path) -> None:
    with pytest.raises(InputError) as caught:
        checkpoint.load(assets / "checkpoints" / "ResNet.cifar10.original.56.pth.tar")
    assert "--arch resnet56_cifar --arch-args shortcut=conv,relu=output" in str(caught.value.hint)


FEW = ("resnet20_cifar", "vgg_digits", "torchvision:alexnet", "torchvision:resnet18", "torchvision:vit_b_32")


@pytest.mark.parametrize("arch", FEW)
def test_the_table_is_true(arch: str) -> None:
    assert known_networks.known(arch, {}) in known.table()


@pytest.mark.slow
def test_the_whole_table_is_true() -> None:
    assert known.TABLE.read_text(encoding="utf-8") == known_networks.written(list(known_networks.entries()))


def test_the_table_is_small_and_tells_networks_apart() -> None:
    assert known.TABLE.stat().st_size < 100_000
    same: dict[str, list[known.Known]] = defaultdict(list)
    for one in known.table():
        same[one.fingerprint].append(one)
    for several in same.values():
        assert len({one.arch for one in several}) == 1, several
        assert (
            len(several) == 1
            or all({"relu"} & {*one.args} for one in several)
            or (several[0].arch in ("torchvision:googlenet", "torchvision:inception_v3"))
        )


def test_the_classes_do_not_count_and_all_else_does() -> None:
    few, many = (
        {key: tuple(tensor.shape) for key, tensor in empty("vgg_digits", {"num_classes": number}).state_dict().items()}
        for number in (3, 12)
    )
    assert known.fingerprint(few, "fc") == known.fingerprint(many, "fc")
    assert [one.arch for one in known.fitting(many)] == ["vgg_digits"]
    for key, shape in few.items():
        if len(shape) > 1 and key != "fc.weight":
            assert not known.fitting({**few, key: (shape[0] + 1, *shape[1:])})


def test_archs_lists_and_searches(capsys: Capture) -> None:
    assert run(["archs", "resnet20"]) == 0
    assert "269,722" in capsys.readouterr().out
    assert run(["archs", "efficientnet_b*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    schemas.check(found)
    assert [one["name"] for one in found["networks"]] == [f"efficientnet_b{number}" for number in range(8)]
    assert run(["archs", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)["networks"]
    assert {one["name"] for one in everything if one["library"] == "prunekit"} == set(models.names())
    assert run(["archs", "resnet999"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_names_are_listed_and_completed_without_torch() -> None:
    code = (
        "import sys; from prunekit.cli.app import run; from prunekit.cli.framework.options import _architectures;"
        "assert run(['archs', 'vit']) == 0; assert 'resnet50' in _architectures();"
        "sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("arch", ["torchvision:vit_h_14"])
def test_a_transformer_without_weights_takes_the_images_that_it_is_built_for(arch: str) -> None:
    spec = models.default_input(arch)
    assert spec is not None
    assert spec.shape == (3, 224, 224)
