"""Ways of restoring, by name or as objects: the same for methods and plans by hand, and refused where they fail."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from prunekit import checkpoint, models, plugins, surgery
from prunekit.cli.app import run
from prunekit.restoration.dead_leaves import dead_leaves
from prunekit.restoration.norm_alignment import aligned
from prunekit.restoration.registry import RESTORATIONS

X = torch.zeros(1, 3, 12, 12)


def images(count: int = 200) -> Tensor:
    return dead_leaves(count, (3, 12, 12), torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Its statistics are those of such images; half of the first layer's filters are near multiples of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    first, norm = model[0], model[1]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        first.weight[8:] = first.weight[:8] * torch.linspace(0.5, 2, 8).reshape(-1, 1, 1, 1)
        first.weight[8:] += 0.02 * torch.randn(8, 3, 3, 3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, 0.1, 0.5)
    return aligned(model.eval(), surgery.trace(model, X), images(500))


PLAN = pk.Plan([pk.Keep("0", range(8))], {"by": "hand"})


def error(model: nn.Module, plan: pk.Plan) -> float:
    with torch.no_grad():
        return float((pk.apply(model, plan, X)(images()) - model(images())).square().mean())


def ways_that_do_something() -> list[str]:
    return [name for name in pk.restorations() if name != "none"]


@pytest.mark.parametrize("way", ways_that_do_something())
def test_a_plan_by_hand_is_nearer_to_the_original_when_restored(way: str, network: nn.Module) -> None:
    given = {"calibrate": images(200), "few": images(20)}.get(way)
    plan = pk.restore(network, PLAN, X, images=given, way=way)
    assert plan.keeps == PLAN.keeps
    assert plan.notes["by"] == "hand"
    assert plan.notes["restore"] == ("moments" if way == "closed-form" else way)
    if way != "constants":  # there are none here
        assert error(network, plan) < error(network, PLAN)
    plain = pk.restore(network, plan, X, way="none")
    assert plain.operations == plan.operations


def test_constants_are_kept(network: nn.Module) -> None:
    model = pk.apply(network, pk.Plan(), X)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight[8:] = 0.0
    once = pk.restore(model, PLAN, X, way="constants")
    assert error(model, once) < 0.1 * error(model, PLAN)  # not nothing: at the borders there are fewer of them
    assert error(model, pk.restore(model, once, X, way="constants")) == error(model, once)


def test_the_default_is_the_best_that_fits(network: nn.Module) -> None:
    assert pk.restore(network, PLAN, X).notes["restore"] == "moments"
    assert pk.restore(network, PLAN, X, images=images(20)).notes["restore"] == "calibrate"
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    plan = pk.restore(plain, pk.Plan([pk.Keep("0", range(4))]), X)
    assert plan.notes["restore"] == "paper"


def test_restoring_again_starts_from_what_is_there(network: nn.Module) -> None:
    by_moments = pk.restore(network, PLAN, X)
    both = pk.restore(network, by_moments, X, images=images())
    assert error(network, both) < error(network, by_moments)
    assert both.notes["restore"] == "calibrate"


@pytest.mark.parametrize(
    ("way", "given", "said"),
    [
        ("momnts", {}, "did you mean moments"),
        ("calibrate", {}, "needs images"),
        ("synthetic", {"sed": 1}, "it has seed"),
        ("moments", {"seed": 1}, "it has none"),
        ("paper", {"threshold": 7}, "between -1 and 1"),
    ],
)
def test_bad_input_is_explained(way: str, given: dict[str, Any], said: str, network: nn.Module) -> None:
    with pytest.raises(pk.InputError, match=said):
        pk.restore(network, PLAN, X, way=way, **given)


def test_a_way_that_can_do_nothing_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(pk.InputError, match="'paper' can make up for nothing here, not for '0': 'silu' in 1"):
        pk.restore(model, pk.Plan([pk.Keep("0", range(4))]), X, way="paper")


def test_a_graph_at_hand_is_not_read_again(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = pk.inspect(network, X).graph
    monkeypatch.setattr("prunekit.surgery.trace", None)
    assert pk.restore(network, PLAN, graph=graph).refits


# -- ways of other packages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shrinking(pk.Restoration):
    """Multiplies the next layer's weights, and notes what it was made with."""

    name = "shrinking"
    summary = "Multiply the weights that stay."
    seed: int = 0
    by: float = 0.5

    def restore(self, model: nn.Module, graph: pk.Graph, plan: pk.Plan, evidence: pk.Evidence) -> pk.Plan:
        assert evidence.model is model
        assert graph.group(plan.keeps[0].group)
        weight = model.get_parameter("3.weight")
        with torch.no_grad():
            weight *= self.by  # of a copy
        refit = pk.Refit("3", {"weight": weight[:, list(plan.keeps[0].index)].detach()})
        return pk.Plan([*plan, refit], {**plan.notes, "seed": self.seed})


def named(name: str, made: Callable[[pk.Plan], Any]) -> pk.Restoration:
    """A way that makes of a plan what it is told."""
    inside = {"name": name, "summary": "", "restore": lambda _, *given: made(given[2])}
    found: pk.Restoration = type("Way", (pk.Restoration,), inside)()
    return found


def _nan(plan: pk.Plan, value: float = float("nan")) -> pk.Plan:
    return pk.Plan([*plan, pk.Refit("3", {"weight": torch.full((8, 8, 3, 3), value)})], plan.notes)


WRONG: dict[str, tuple[Callable[[pk.Plan], Any], str]] = {
    "raises": (lambda plan: plan.no_such_thing, "fails: AttributeError"),  # type: ignore[attr-defined]
    "returns nothing": (lambda _: None, "returns a NoneType, where a Plan is expected"),
    "removes more": (lambda _: pk.Plan([pk.Keep("0", range(4))]), "changes what the plan removes"),
    "removes less": (lambda _: pk.Plan(), "changes what the plan removes"),
    "gates": (lambda plan: pk.Plan([*plan, pk.Gate("3", "4")]), "changes what the plan removes or gates"),
    "not a number": (_nan, "gives '3.weight' values that are not finite"),
    "another shape": (
        lambda plan: pk.Plan([*plan, pk.Refit("3", {"weight": torch.ones(2, 2)})]),
        "makes a plan that cannot be applied: the plan refits '3.weight' with shape",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_one_is_refused_by_name(what: str, network: nn.Module) -> None:
    made, said = WRONG[what]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(pk.SurgeryError, match=f"restoration 'wrong' {said}"):
        pk.restore(network, PLAN, X, way=named("wrong", made))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_an_object_is_a_way_and_sees_a_copy(network: nn.Module) -> None:
    before = network.get_parameter("3.weight").clone()
    plan = pk.restore(network, PLAN, X, way=Shrinking(by=0.25))
    assert torch.equal(network.get_parameter("3.weight"), before)
    assert torch.equal(plan.refits[0].values["weight"], before[:, :8] * 0.25)
    with pytest.raises(pk.InputError, match="settings of 'shrinking' are given to itself"):
        pk.restore(network, PLAN, X, way=Shrinking(), by=0.25)


def test_what_it_says_on_purpose_is_said_as_it_is(network: nn.Module) -> None:
    def refuse(_: pk.Plan) -> pk.Plan:
        raise pk.InputError("not on Mondays")

    with pytest.raises(pk.InputError, match=r"^not on Mondays$"):
        pk.restore(network, PLAN, X, way=named("choosy", refuse))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Entry points of a package with a way that works, one that cannot be imported, and one that is none."""
    module = types.ModuleType("shrinking_package")
    vars(module).update(Shrinking=Shrinking, Half=type("Half", (pk.Restoration,), {}), nothing=3)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    group = "prunekit.restorations"
    places = {"shrinking": "Shrinking", "half": "Half", "nothing": "nothing", "lost": "NoSuchClass"}
    real = plugins.entry_points
    entries = [EntryPoint(name, f"{module.__name__}:{place}", group) for name, place in places.items()]
    with monkeypatch.context() as patch:
        patch.setattr(
            plugins, "entry_points", lambda *, group: entries if group == RESTORATIONS.group else real(group=group)
        )
        vars(RESTORATIONS).pop("_entries", None)
        yield module
    vars(RESTORATIONS).pop("_entries", None)


@pytest.mark.usefixtures("installed")
def test_methods_take_installed_ways_by_name(network: nn.Module) -> None:
    for prune, settings in ((pk.slim, {"scope": "inner"}), (pk.merge, {"seed": 5})):
        done = prune(network, X, ratio={"0": 0.5}, restore="shrinking", **settings)
        assert done.plan.notes["restore"] == "shrinking"
        assert done.plan.notes["seed"] == settings.get("seed", 0)  # a setting of the method by the same name
        assert "3" in {refit.layer for refit in done.plan.refits}
    assert pk.restore(network, PLAN, X, way="shrinking", seed=3).notes["seed"] == 3


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("half", "is not a prunekit Restoration\nit lacks restore"),
        ("nothing", "is not a prunekit Restoration"),
        ("lost", "the restoration 'lost' of unknown cannot be loaded: AttributeError"),
        ("shrink", "did you mean shrinking?"),
    ],
)
def test_broken_ones_are_named(name: str, said: str, network: nn.Module) -> None:
    with pytest.raises(pk.InputError) as refusal:
        pk.restore(network, PLAN, X, way=name)
    assert said in str(refusal.value)


@pytest.mark.usefixtures("installed")
def test_the_list_tells_what_is_installed_and_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--json"]) == 0
    found = {way["name"]: way for way in json.loads(capsys.readouterr().out)["restorations"]}
    assert found["shrinking"]["settings"] == [{"name": "seed", "default": 0}, {"name": "by", "default": 0.5}]
    assert "cannot be loaded" in found["lost"]["error"]
    assert found["calibrate"]["needs_images"]
    assert run(["methods"]) == 0
    assert "Multiply the weights that stay." in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_the_command_line_takes_them_and_files_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, small = str(tmp_path / "net.pt"), str(tmp_path / "small.pt")
    checkpoint.save(models.build("vgg_digits", {"config": "8-8-M-16"}), net)
    given = ["merge", net, "--ratio", "0.3", "--restore"]
    assert run([*given, "nearest"]) == 2
    assert run([*given, "shrinkin"]) == 2
    assert "did you mean shrinking?" in capsys.readouterr().err
    assert run([*given, "shrinking", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "merge.toml").write_text(printed)
    assert 'restore = "shrinking"' in printed
    assert run([*given, "shrinking", "-o", small]) == 3  # this network has no layer '3'
    assert "restoration 'shrinking' fails" in capsys.readouterr().err
    assert not Path(small).exists()
    assert run([*given, "closed-form", "-o", small]) == 0
    capsys.readouterr()
    assert run(["inspect", small, "--json"]) == 0
    history = json.loads(capsys.readouterr().out)["history"]
    assert history[-1]["settings"]["restore"] == "closed-form"
    assert history[-1]["plan"]["notes"]["restore"] == "moments"
