"""The bundled architectures, their names and arguments, and the keys of published state dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prunekit import models
from prunekit.errors import InputError
from prunekit.nn.channels import ChannelPad
from prunekit.spec import InputSpec, origin_of

# As published by He et al. 2016, Zagoruyko & Komodakis 2016, and with Network Slimming (VGG-19: 20.04 M).
PARAMETERS = {
    "lenet_300_100": 266_610,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "resnet110_cifar": 1_727_962,
    "vgg11_cifar": 9_228_362,
    "vgg13_cifar": 9_413_066,
    "vgg16_cifar": 14_724_042,
    "vgg19_cifar": 20_035_018,
    "wrn40_4": 8_949_210,
    "preresnet164": 1_703_258,
    "densenet40_12": 1_059_298,
    "vgg_digits": 288_170,
    "vit_cifar": 1_806_154,
    "vit_digits": 77_434,
}
PUBLISHED_RESNET56 = {"shortcut": "conv", "relu": "input"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Images = Callable[[int], tuple[Tensor, Tensor]]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_names_are_the_bundled_ones() -> None:
    assert models.names() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_size_and_output(name: str) -> None:
    model = models.build(name)
    spec = models.default_input(name)
    assert spec is not None
    assert parameters(model) == PARAMETERS[name]
    assert not model.training
    with torch.device("meta"):
        scores = model.to("meta")(torch.zeros(2, *spec.shape))
    assert scores.shape == (2, 10)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_width_and_classes(name: str) -> None:
    model = models.build(name, {"width": 0.25, "in_channels": 2}, num_classes=7)
    origin = origin_of(model)
    assert origin is not None
    assert origin.arch == name
    assert origin.arch_args == {"width": 0.25, "in_channels": 2, "num_classes": 7}
    assert origin.input is not None
    assert origin.input.shape[0] == 2
    assert origin.input.mean == ()
    assert parameters(model) < PARAMETERS[name] / 2
    assert model(torch.zeros(1, *origin.input.shape)).shape == (1, 7)


def test_both_relu_orders_compute_the_same() -> None:
    after = models.build("resnet20_cifar", {"shortcut": "conv"})
    before = models.build("resnet20_cifar", PUBLISHED_RESNET56)
    before.load_state_dict(after.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(after(x), before(x))


def test_parameter_free_shortcut_is_a_module_that_surgery_can_edit() -> None:
    pads = [m for m in models.build("resnet20_cifar").modules() if isinstance(m, ChannelPad)]
    assert [(pad.before, pad.after) for pad in pads] == [(8, 8), (16, 16)]
    assert not any(isinstance(m, ChannelPad) for m in models.build("resnet20_cifar", PUBLISHED_RESNET56).modules())


def test_gamma_starts_where_it_is_asked_to() -> None:
    def gammas(name: str, **args: float) -> set[float]:
        norms = (m for m in models.build(name, args).modules() if isinstance(m, nn.BatchNorm2d))
        return {float(g) for norm in norms for g in norm.weight.detach()}

    assert gammas("resnet20_cifar") == {1.0}
    assert gammas("vgg_digits") == {0.5}
    assert gammas("vgg_digits", gamma=0.25) == {0.25}


def test_config_makes_any_vgg() -> None:
    model = models.build("vgg_digits", {"config": "4-M-6"})
    assert [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d)] == [
        (4, 1, 3, 3),
        (6, 4, 3, 3),
    ]


@pytest.mark.parametrize(
    ("given", "arch"),
    [
        ("prunekit:resnet56", "resnet56_cifar"),
        ("prunekit:vgg16", "vgg16_cifar"),
        ("prunekit:wrn40_4", "wrn40_4"),
        ("resnet20", "resnet20_cifar"),
        ("resnet18", "torchvision:resnet18"),
        ("torchvision:squeezenet1_1", "torchvision:squeezenet1_1"),
    ],
)
def test_names_resolve(given: str, arch: str) -> None:
    origin = origin_of(models.build(given))
    assert origin is not None
    assert origin.arch == arch


def test_bare_names_prefer_torchvision_over_a_missing_suffix() -> None:
    spec = models.default_input("vgg16")
    assert spec == InputSpec((3, 224, 224), *IMAGENET)
    assert models.default_input("vgg16_cifar") != spec


def test_inception_networks_come_without_training_heads() -> None:
    origin = origin_of(models.build("googlenet", num_classes=4))
    assert origin is not None
    assert origin.arch_args == {"aux_logits": False, "init_weights": False, "num_classes": 4}
    assert models.default_input("inception_v3") == InputSpec((3, 299, 299), *IMAGENET)


def test_published_weights_are_stored_without_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    def no_network(_self: object, **options: object) -> dict[str, Tensor]:
        assert options["weights_only"] is True
        assert options["check_hash"] is True
        print("Downloading")
        return models.build("torchvision:squeezenet1_1").state_dict()

    monkeypatch.setattr(SqueezeNet1_1_Weights, "get_state_dict", no_network)
    origin = origin_of(models.build("torchvision:squeezenet1_1@IMAGENET1K_V1"))
    assert origin is not None
    assert origin.arch == "torchvision:squeezenet1_1"
    assert origin.arch_args == {"num_classes": 1000}
    assert len(origin.classes) == 1000


def test_a_failed_download_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    def offline(_self: object, **_options: object) -> dict[str, Tensor]:
        raise OSError("name not known")

    monkeypatch.setattr(SqueezeNet1_1_Weights, "get_state_dict", offline)
    with pytest.raises(InputError, match="cannot download torchvision:squeezenet1_1@DEFAULT: name not known"):
        models.build("torchvision:squeezenet1_1@DEFAULT")


def test_text_becomes_typed_arguments() -> None:
    text = "shortcut=conv, relu=input,width=0.25,gamma=1e-1,num_classes=3,flag=True,none=none,config=8-M-8"
    assert models.parse_args(text) == {
        "shortcut": "conv",
        "relu": "input",
        "width": 0.25,
        "gamma": 0.1,
        "num_classes": 3,
        "flag": True,
        "none": None,
        "config": "8-M-8",
    }
    assert models.parse_args("") == {}


@pytest.mark.parametrize("text", ["width", "=3", "a b=3", "width=1,width=2"])
def test_text_that_is_no_argument(text: str) -> None:
    with pytest.raises(InputError):
        models.parse_args(text)


@pytest.mark.parametrize(
    ("arch", "args", "message"),
    [
        ("resnet65_cifar", {}, "did you mean resnet56_cifar"),
        ("prunekit:resnet57", {}, "did you mean resnet56_cifar"),
        ("torchvision:resnet5", {}, "did you mean resnet50"),
        ("resnet50@IMAGENET", {}, "did you mean IMAGENET1K_V1 or IMAGENET1K_V2"),
        ("nothing_like_it", {}, "known: "),
        ("", {}, "unknown architecture ''"),
        ("resnet56_cifar", {"relu": "both"}, "must be output or input, not 'both'"),
        ("resnet56_cifar", {"depth": 20}, "unknown argument of resnet56_cifar 'depth'"),
        ("resnet56_cifar", {"shortcuts": "conv"}, "did you mean shortcut"),
        ("resnet56_cifar", {"width": "wide"}, "must be a positive number"),
        ("resnet56_cifar", {"width": float("nan")}, "must be a positive number"),
        ("resnet56_cifar", {"num_classes": 0}, "must be a positive whole number"),
        ("resnet56_cifar", {"num_classes": True}, "must be a positive whole number"),
        ("vgg16_cifar", {"config": "M-M"}, "config 'M-M' is not a list"),
        ("vgg16_cifar", {"config": "8,8"}, "config '8,8' is not a list"),
        ("vgg16_cifar", {"config": 8}, "must be text"),
        ("resnet18", {"colour": "red"}, "unknown argument of resnet18 'colour'"),
    ],
)
def test_bad_names_and_arguments(arch: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        models.build(arch, args)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


USER_CODE = """
import dataclasses
from torch import nn

@dataclasses.dataclass
class Settings:
    width: int = 4

class Net(nn.Sequential):
    def __init__(self, width=4, num_classes=3):
        super().__init__(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, num_classes))

def broken():
    raise RuntimeError("out of luck")

def fixed():
    return nn.Linear(2, 2)

text = lambda: "no network"
number = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my net.py"
    path.write_text(USER_CODE)
    return path


def test_a_users_own_file(user_file: Path) -> None:
    arch = f"{user_file}:Net"
    model = models.build(arch, {"width": 5}, num_classes=2)
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 2)
    origin = origin_of(model)
    assert origin is not None
    assert (origin.arch, origin.arch_args, origin.input) == (arch, {"width": 5, "num_classes": 2}, None)
    assert models.is_code(arch)
    assert models.source_file(arch) == user_file
    assert models.default_input(arch) is None


def test_a_users_own_module() -> None:
    model = models.build("torch.nn:Linear", {"in_features": 2, "out_features": 3})
    assert isinstance(model, nn.Linear)
    assert models.source_file("torch.nn:Linear") is None


def test_an_edited_file_is_read_again(user_file: Path) -> None:
    arch = f"{user_file}:fixed"
    assert parameters(models.build(arch)) == 6
    user_file.write_text(USER_CODE.replace("nn.Linear(2, 2)", "nn.Linear(3, 3)"))
    assert parameters(models.build(arch)) == 12


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Nett", {}, "did you mean Net"),
        ("number", {}, "unknown callable"),
        ("broken", {}, "RuntimeError: out of luck"),
        ("text", {}, "returned str, expected an nn.Module"),
        ("fixed", {"num_classes": 3}, "takes no num_classes"),
        ("Net", {"depth": 3}, "unexpected keyword argument"),
    ],
)
def test_users_code_that_does_not_work(user_file: Path, name: str, args: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.build(f"{user_file}:{name}", args)


def test_users_code_that_is_not_there(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nowhere_to_be_found")
    with pytest.raises(InputError, match="No such file"):
        models.build(f"{tmp_path}/missing.py:Net")
    with pytest.raises(InputError, match="ModuleNotFoundError"):
        models.build(f"{broken}:Net")
    with pytest.raises(InputError, match="importing nowhere_to_be_found failed"):
        models.build("nowhere_to_be_found:Net")


def test_other_names_of_the_same_layers() -> None:
    model = models.build("resnet20_cifar", {"shortcut": "conv", "width": 0.25})
    own = model.state_dict()
    foreign = {
        "module._orig_mod." + key.replace("downsample", "shortcut").replace("fc.", "linear."): tensor
        for key, tensor in own.items()
        if not key.endswith("num_batches_tracked")
    }
    foreign["n_averaged"] = torch.tensor(3)
    foreign["module.layer1.total_ops"] = torch.tensor(1.0)
    matched = models.match_keys(model, foreign)
    assert matched.keys() == own.keys()
    assert all(torch.equal(matched[key], own[key]) for key in own)


def test_wide_resnets_published_names() -> None:
    model = models.build("wrn40_4", {"width": 0.25})
    own = model.state_dict()
    foreign = {}
    for key, tensor in own.items():
        name = key.replace("downsample", "convShortcut")
        name = f"block{name[5]}.layer{name[6:]}" if name.startswith("layer") else name
        foreign["bn1" + name[2:] if name.startswith("bn.") else name] = tensor
    assert models.match_keys(model, foreign).keys() == own.keys()


def test_foreign_keys_keep_their_names_for_the_report() -> None:
    model = models.build("vgg_digits")
    matched = models.match_keys(model, {"classifier.weight": torch.zeros(1), "tail.weight": torch.zeros(1)})
    assert {"fc.weight", "tail.weight"} <= matched.keys()


def test_two_names_for_one_layer_both_stay_visible() -> None:
    model = models.build("lenet_300_100")
    matched = models.match_keys(model, {"ip1.bias": torch.zeros(1), "fc1.bias": torch.ones(1)})
    assert matched.keys() == {"ip1.bias", "fc1.bias"}


CHECKPOINTS = [
    ("LeNet_300_100.original.300_100.bias.pth.tar", "lenet_300_100", {}),
    ("ResNet.cifar10.original.56.pth.tar", "resnet56_cifar", PUBLISHED_RESNET56),
    ("resnet20-12fca82f.th", "resnet20_cifar", {}),
]


def published(assets: Path, file: str, arch: str, args: dict[str, str]) -> nn.Module:
    content = torch.load(assets / "checkpoints" / file, weights_only=True, map_location="cpu")
    model = models.build(arch, args)
    model.load_state_dict(models.match_keys(model, content["state_dict"]))
    return model


@pytest.mark.parametrize(("file", "arch", "args"), CHECKPOINTS)
def test_published_checkpoints_load(assets: Path, file: str, arch: str, args: dict[str, str]) -> None:
    published(assets, file, arch, args)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, mean: object, std: object) -> float:
    x = images.float().div(255).sub(torch.tensor(mean).view(3, 1, 1)).div(torch.tensor(std).view(3, 1, 1))
    with torch.inference_mode():
        guessed = torch.cat([model(batch).argmax(1) for batch in x.split(500)])
    return 100 * (guessed == labels).double().mean().item()


@pytest.mark.parametrize(
    ("every", "resnet56", "resnet20"),
    [(40, 94.4, 92.8), pytest.param(1, 93.88, 91.73, marks=pytest.mark.slow)],
)
def test_published_accuracies(assets: Path, cifar_test: Images, every: int, resnet56: float, resnet20: float) -> None:
    images, labels = cifar_test(every)
    spec = models.default_input("resnet56_cifar")
    assert spec is not None
    model = published(assets, *CHECKPOINTS[1])
    assert accuracy(model, images, labels, spec.mean, spec.std) == pytest.approx(resnet56, abs=0.005)
    model = published(assets, *CHECKPOINTS[2])
    assert accuracy(model, images, labels, *IMAGENET) == pytest.approx(resnet20, abs=0.005)
