"""What the example input does not reach: other heads, early exits, optional inputs, code for training alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import prunekit as pk
from networks import lively, random_plan
from prunekit import surgery
from prunekit.cli.app import run as command
from prunekit.errors import InputError, SurgeryError
from prunekit.plan import Keep, Plan
from prunekit.surgery.tracing.runs import check_training

X = torch.randn(1, 3, 8, 8, dtype=torch.float64)


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Heads(nn.Module):
    """One of two heads, as asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.heads = block(3, 16), nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 6)])

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.heads[task](self.stem(x).mean((2, 3)))


class Exit(nn.Module):
    """An exit after the first block for images without contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.early = block(3, 16), nn.Linear(16, 4)
        self.body, self.late = block(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.early(y.mean((2, 3))) if float(x.std()) < 0.5 else self.late(self.body(y).mean((2, 3)))


class Hinted(nn.Module):
    """An optional second input, which is added to the features of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hint, self.head = block(3, 16), block(1, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, hint: Tensor | None = None) -> Tensor:
        y = self.stem(x)
        return self.head((y if hint is None else y + self.hint(hint)).mean((2, 3)))


class Joined(nn.Module):
    """Two streams that the second mode adds; all parameters run in the first one too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(3, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor, add: bool = False) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.head(torch.cat([a + b, b] if add else [a, b], 1).mean((2, 3)))


CASES: dict[str, tuple[type[nn.Module], tuple[str, ...], Any]] = {
    "another head": (Heads, ("heads.1",), (X, 1)),
    "another head, by name": (Heads, ("heads.1",), {"x": X, "task": 1}),
    "an early exit": (Exit, ("early",), 0.1 * X),
    "an optional input": (Hinted, ("hint",), {"x": X, "hint": X[:, :1]}),
    "another way through all layers": (Joined, (), (X, True)),
}


def run(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


@pytest.mark.parametrize(("kind", "unseen", "example"), CASES.values(), ids=CASES)
def test_a_further_example_reaches_the_rest(kind: type[nn.Module], unseen: tuple[str, ...], example: Any) -> None:
    model = lively(kind())
    assert surgery.trace(model, X).never_ran == unseen
    graph = surgery.trace(model, X, examples=[example])
    assert graph.never_ran == ()
    plans = [random_plan(graph, seed) for seed in range(3)]
    assert any(plan.keeps for plan in plans)
    for plan in plans:
        small = surgery.edit(model, plan, graph)
        assert surgery.verify(model, small, plan, graph) <= 1e-10
        assert run(small, example).shape == run(model, example).shape


@pytest.mark.parametrize(("kind", "unseen", "example"), CASES.values(), ids=CASES)
def test_methods_take_further_examples(kind: type[nn.Module], unseen: tuple[str, ...], example: Any) -> None:
    del unseen
    model = lively(kind())
    small, plan = pk.slim(model, X, ratio=0.3, restore="none", examples=[example])
    assert "never_ran" not in plan.notes
    assert run(small, example).shape == run(model, example).shape
    again = pk.apply(model, plan, X, examples=[example])
    assert pk.verify(model, again, plan, X, examples=[example]) <= 1e-10
    assert pk.inspect(model, X, examples=[example]).groups


def test_what_no_example_reaches_is_named_in_a_warning_and_in_the_notes() -> None:
    with pytest.warns(UserWarning, match=r"^never ran on the example input: heads\.1; what they read may be gone"):
        _, plan = pk.slim(lively(Heads()), X, ratio=0.3)
    assert plan.notes["never_ran"] == ["heads.1"]
    with pytest.warns(UserWarning, match="never ran"):
        pk.apply(lively(Heads()), Plan([Keep("stem.0", range(8))]), X)


def test_many_unseen_parts_are_named_by_their_outermost_modules_and_counted() -> None:
    model = lively(Heads())
    model.spare = nn.ModuleList(nn.Sequential(block(3, 4), block(4, 4)) for _ in range(7))
    model.loose = nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match=r"loose, heads\.1, spare and 1 more|loose, heads\.1, spare;"):
        _, plan = pk.slim(model, X, ratio=0.3)
    assert plan.notes["never_ran"] == ["loose", "heads.1", "spare"]


def test_the_proof_runs_further_examples_as_they_are() -> None:
    model, example = lively(Exit()), 0.1 * X
    graph = surgery.trace(model, X, examples=[example])
    plan = random_plan(graph, 1)
    small = surgery.edit(model, plan, graph)
    with torch.no_grad():
        small.early.weight += 1
    with pytest.raises(SurgeryError, match="first in 'early'"):
        surgery.verify(model, small, plan, graph)


def test_examples_that_do_not_fit_are_refused() -> None:
    model = lively(Heads())
    with pytest.raises(InputError, match=r"fails on an input of shape \(1, 5, 8, 8\)"):
        pk.inspect(model, X, examples=[X.repeat(1, 2, 1, 1)[:, :5]])
    with pytest.raises(InputError, match="missing a required argument: 'x'"):
        pk.inspect(model, X, examples=[{"task": 1}])

    class ByName(Heads):
        def forward(self, x: Tensor, *, task: int = 0) -> Tensor:  # type: ignore[override]
            return super().forward(x, task)

    with pytest.raises(InputError, match="'task', which the forward takes by name alone"):
        pk.inspect(lively(ByName()), X, examples=[{"x": X, "task": 1}])


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    class Noisy(Exit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.01 * torch.rand_like(x))

    model, before = lively(Noisy()), torch.get_rng_state()
    graph = surgery.trace(model, X, examples=[0.1 * X])
    assert graph.never_ran == ()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cache_that_has_been_filled_hides_what_fills_it() -> None:
    class Caching(nn.Module):
        table = None

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.make, self.head = block(3, 16), nn.Linear(1, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = self.make(torch.ones(1, 1, dtype=x.dtype, device=x.device))[:, :, None, None]
            return self.head((self.stem(x) + self.table).mean((2, 3)))

    model = lively(Caching())
    assert surgery.trace(model, X).never_ran == ()
    assert model.table is None
    with torch.no_grad():
        model(X)
    graph = surgery.trace(model, X)
    assert graph.never_ran == ("make",)
    assert not graph.group("stem.0").free  # the table has a fixed number of channels


class Auxiliary(nn.Module):
    """A second head in training, behind a forward that looks at values."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.stem, self.body = block(3, 16), nn.Sequential(*block(16, 16), *block(16, 16))
        self.head, self.side = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the image has values that are no numbers")
        y = self.stem(x)
        out = self.head(self.body(y).mean((2, 3)))
        return (out, self.side(y.mean((2, 3)))) if self.training else out


class Bottled(Auxiliary):
    """Sizes are written into what only runs in training, and that has parameters of its own."""

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        out = self.head(self.body(y).mean((2, 3)))
        return (out, self.side(y.mean((2, 3)).view(-1, self.width))) if self.training else out


class Shared(Auxiliary):
    """In training the same layers are used in another way."""

    def __init__(self) -> None:
        super().__init__()
        del self.side

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        z = self.body(y)
        out = self.head(z.mean((2, 3)))
        return (out, self.head(y.view(-1, self.width, 64).mean(2))) if self.training else out


@pytest.mark.parametrize("kind", [Auxiliary, Bottled, Shared])
def test_a_pruned_network_trains_where_the_original_does(kind: type[nn.Module]) -> None:
    model = lively(kind())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, _ = pk.slim(model, X, ratio=0.4)
    both = torch.cat([X, X])
    assert [out.shape for out in small.train()(both)] == [out.shape for out in model.train()(both)]
    assert small.body[0].weight.numel() < model.body[0].weight.numel()


def test_dropout_of_whole_channels_does_not_hold_them() -> None:
    class Dropping(Bottled):
        def __init__(self) -> None:
            super().__init__()
            self.body.append(nn.Dropout2d(0.5))

    graph = surgery.trace(lively(Dropping()), X)
    assert len(graph.group("body.0").free) == 16


def test_a_network_that_no_longer_trains_is_refused() -> None:
    model = lively(Shared())
    graph = surgery.trace(model, X, probe=False)
    plan = Plan([Keep("stem.0", range(8))])
    with pytest.raises(SurgeryError, match="does not run in training mode as the original does"):
        surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_of_real_networks(name: str) -> None:
    size = 299 if name == "inception_v3" else 64
    model = torchvision.models.get_model(name, weights=None, num_classes=10, init_weights=False, aux_logits=True)
    graph = surgery.trace(model, torch.zeros(1, 3, size, size))
    assert graph.never_ran == ()
    check_training(model, surgery.edit(model, random_plan(graph, 9), graph), graph)


def test_the_command_warns_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two_heads.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Heads(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"
        "        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 6)\n\n"
        "    def forward(self, x, second=False):\n"
        "        return (self.b if second else self.a)(self.stem(x).mean((2, 3)))\n\n"
        "def net():\n    return Heads()\n"
    )
    state = {"stem.0.weight": torch.randn(8, 3, 3, 3), "stem.0.bias": torch.zeros(8)}
    state |= {
        "stem.1.weight": torch.rand(8),
        "stem.1.bias": torch.zeros(8),
        "stem.1.num_batches_tracked": torch.ones(1)[0].long(),
    }
    state |= {"stem.1.running_mean": torch.zeros(8), "stem.1.running_var": torch.ones(8)}
    state |= {
        "a.weight": torch.randn(4, 8),
        "a.bias": torch.zeros(4),
        "b.weight": torch.randn(6, 8),
        "b.bias": torch.zeros(6),
    }
    torch.save(state, "net.pt")
    arguments = [
        "slim",
        "net.pt",
        "--arch",
        "two_heads.py:net",
        "--input-size",
        "3,8,8",
        "--ratio",
        "0.5",
        "-o",
        "small.pt",
    ]
    assert command(arguments) == 0
    assert "warning: never ran on the example input: b; what they read may be gone" in capsys.readouterr().err
