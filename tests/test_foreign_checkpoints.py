"""Checkpoints of other repositories: the one network in them is found; where there are several, the user is asked."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.errors import InputError

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=3, width=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, num_classes)

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
"""

State = dict[str, Tensor]


@pytest.fixture
def arch(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py:Net"


@pytest.fixture
def state(arch: str) -> State:
    return dict(models.build(arch).state_dict())


def load(content: object, arch: str, **reading: Any) -> nn.Module:
    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    return checkpoint.load(stream, arch=arch, **reading)


def same(model: nn.Module, state: State) -> bool:
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def under(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def other(state: State) -> State:
    return {key: tensor + 1 for key, tensor in state.items()}


def optimizer(_: State) -> dict[str, Any]:
    """What Adam saves."""
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    return {"state": {0: moments, 1: moments}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}


NOTES: dict[str, Callable[[State], object]] = {
    "optimizer": optimizer,
    "optimizer_states": lambda state: [optimizer(state)],
    "optimizers": lambda state: {"net": {"momentum": other(state)}},
    "opt": optimizer,
    "rng": lambda _: {"torch": torch.get_rng_state()},
    "callbacks": lambda _: {"best": {"score": torch.tensor(0.5), "paths": {"a.ckpt": torch.tensor(0.5)}}},
    "acc": lambda _: torch.tensor(91.0),
    "normalisation": lambda _: {"mean": torch.zeros(3), "std": torch.ones(3)},
    "epoch": lambda _: 3,
    "ema": lambda _: None,
}


@pytest.mark.parametrize(
    "place",
    ["net", "network", "params_ema", "ema", "weights", "generator", "a.b", "state.model", "x.y.z", "model.module"],
)
def test_the_one_state_dict_is_found(arch: str, state: State, place: str) -> None:
    content: Any = OrderedDict(state)
    for key in reversed(place.split(".")):
        content = {"epoch": 3, key: content}
    assert same(load(content, arch), state)
    assert same(load(content, arch, key=place), state)


@pytest.mark.parametrize("note", NOTES)
def test_what_lies_beside_is_not_mistaken_for_weights(arch: str, state: State, note: str) -> None:
    assert same(load({note: NOTES[note](state), "net": state}, arch), state)
    with pytest.raises(InputError, match=r"holds no state dict|does not fit"):
        load({note: NOTES[note](state)}, arch)


def test_notes_between_the_weights(arch: str, state: State) -> None:
    assert same(load({**state, "epoch": 3, "name": "a net", "best": None}, arch), state)


def test_a_checkpoint_that_holds_itself(arch: str, state: State) -> None:
    content: dict[str, Any] = {"net": {"weights": state}}
    content["net"]["all"] = content
    assert same(load(content, arch), state)


PREFIXES: dict[str, Callable[[State], State]] = {
    "net.": lambda s: under("net.", s),
    "module.model.": lambda s: under("module.model.", s),
    "a.b.c.": lambda s: under("a.b.c.", s),
    "_orig_mod.net.": lambda s: under("_orig_mod.net.", s),
    "Lightning, with a loss": lambda s: {**under("model.", s), "loss.weight": torch.ones(3)},
    "another name, with a loss": lambda s: {
        **under("net.", s),
        "loss.weight": torch.ones(3),
        "network.x": torch.ones(1),
    },
    "one part wrapped": lambda s: {key.replace("features.", "features.module."): tensor for key, tensor in s.items()},
    "some keys": lambda s: {(f"net.{key}" if "features" in key else key): tensor for key, tensor in s.items()},
    "compiled within": lambda s: {
        f"net.{key.replace('head.', 'head._orig_mod.')}": tensor for key, tensor in s.items()
    },
    "without counters": lambda s: {f"net.{key}": t for key, t in s.items() if "num_batches" not in key},
    "another number of classes": lambda s: under(
        "net.", {**s, "head.weight": torch.ones(7, 4), "head.bias": torch.ones(7)}
    ),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes_go(arch: str, state: State, name: str) -> None:
    given = PREFIXES[name](state)
    for content in (given, {"state_dict": given, "epoch": 3}):
        model = load(content, arch)
        assert torch.equal(model.state_dict()["features.0.weight"], state["features.0.weight"])
        assert (
            model.state_dict()["head.bias"].numel()
            == given[next(k for k in given if k.endswith("bias") and "head" in k)].numel()
        )


def test_a_prefix_that_the_network_has_is_put_on(arch: str, state: State) -> None:
    wrapped = load(state, arch.replace(":Net", ":Wrapped"))
    assert same(wrapped.get_submodule("net"), state)


def test_prefixes_in_safetensors(arch: str, state: State, tmp_path: Path) -> None:
    safetensors.torch.save_file({**under("ema.", other(state)), **under("net.", state)}, tmp_path / "w.safetensors")
    assert same(checkpoint.load(tmp_path / "w.safetensors", arch=arch, key="net"), state)
    with pytest.raises(InputError, match=r"2 networks that fit .*: ema, net\n.*--key"):
        checkpoint.load(tmp_path / "w.safetensors", arch=arch)


SEVERAL: dict[str, tuple[Callable[[State], object], str]] = {
    "weights and their average": (lambda s: {"params": other(s), "params_ema": s}, "params_ema"),
    "the usual name and another": (lambda s: {"state_dict": other(s), "state_dict_ema": s}, "state_dict_ema"),
    "by prefix": (
        lambda s: {"state_dict": {**under("student.", s), **under("teacher.", other(s))}},
        "state_dict.student",
    ),
    "prefixes at the top": (lambda s: {**under("netG.", s), **under("netG_ema.", other(s))}, "netG"),
    "nested": (lambda s: {"state": {"model": s}, "best": {"model": other(s)}}, "state.model"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_that_fit_are_asked_about(arch: str, state: State, name: str) -> None:
    make, wanted = SEVERAL[name]
    content = make(state)
    with pytest.raises(InputError, match=r"holds 2 networks that fit .*net.py:Net: \S+, \S+\n.*--key") as caught:
        load(content, arch)
    assert wanted in caught.value.message
    assert same(load(content, arch, key=wanted), state)


def test_only_the_one_that_fits_is_taken(arch: str, state: State) -> None:
    wider = models.build(arch, {"width": 6}).state_dict()
    content = {"discriminator": {"body.weight": torch.ones(3)}, "teacher": dict(wider), "student": state}
    assert same(load(content, arch), state)
    assert load(content, arch, arch_args={"width": 6}).state_dict()["head.weight"].shape == (3, 6)


def test_what_does_not_fit_is_told_of_the_likeliest(arch: str, state: State) -> None:
    with pytest.raises(InputError, match=r"does not fit .*1 unexpected \(more.weight\)"):
        load({"a": {"x.weight": torch.ones(3)}, "net": {**state, "more.weight": torch.ones(3)}}, arch)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("ema", "no weights at 'ema'\nthere are weights at net, best"),
        ("optimizer", "no weights at 'optimizer'"),
        ("net.x", "no weights at 'net.x'"),
        ("net.head", "does not fit"),
    ],
)
def test_keys_that_lead_nowhere(arch: str, state: State, key: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load({"net": state, "best": other(state), "optimizer": optimizer(state)}, arch, key=key)


def test_files_without_keys_refuse_one() -> None:
    stream = io.BytesIO()
    checkpoint.save(models.build("lenet_300_100"), stream)
    stream.seek(0)
    for source in ("prunekit:lenet_300_100", stream):
        with pytest.raises(InputError, match="holds one network"):
            checkpoint.load(source, key="ema")


class Average:
    """A moving average that is an object of its own, as some training scripts keep it."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = model


def test_an_average_that_is_an_object_is_refused(arch: str) -> None:
    content = {"epoch": 3, "ema": Average(nn.Linear(2, 2))}
    with pytest.raises(InputError, match=r"refused.*Average"):
        load(content, arch)
    with pytest.raises(InputError, match=r"holds no state dict, but the keys epoch, ema \(Average\)"):
        load(content, arch, trust_pickle=True)


def test_networks_in_a_trusted_file() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(2, 4)
    content = {"model": first, "ema": None, "optimizer": optimizer({}), "epoch": 3}
    assert same(load(content, None, trust_pickle=True), first.state_dict())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"2 networks: model, ema\n.*--key"):
        load({**content, "ema": second}, None, trust_pickle=True)  # type: ignore[arg-type]
    assert same(load({**content, "ema": second}, None, trust_pickle=True, key="ema"), second.state_dict())  # type: ignore[arg-type]


def test_the_command_line_asks_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inspect", str(tmp_path / "c.pth"), "--arch", "lenet_300_100"]
    torch.save({kind: dict(models.build("lenet_300_100").state_dict()) for kind in ("a", "b")}, tmp_path / "c.pth")
    assert run(command) == 2
    assert "2 networks that fit lenet_300_100: a, b" in capsys.readouterr().err
    assert run([*command, "--key", "b"]) == 0
