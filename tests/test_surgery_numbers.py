"""Numbers that modules keep about their widths, where another method than the recorded forward reads them."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from networks import lively, random_plan
from prunekit import surgery
from prunekit.errors import InputError
from prunekit.plan import Keep, Plan
from prunekit.surgery.structure import conform, describe

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def block(inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Split(nn.Module):
    """YOLO's C2f: the forward halves what it gets, the one for export splits it by a number."""

    def __init__(self, inputs: int, outputs: int, more: int = 2) -> None:
        super().__init__()
        self.c = outputs // 2
        self.heads, self.sizes = self.c, (3, 3)
        self.enter, self.leave = block(inputs, 2 * self.c, 1), block((2 + more) * self.c, outputs, 1)
        self.inner = nn.ModuleList(block(self.c, self.c) for _ in range(more))

    def forward(self, x: Tensor) -> Tensor:
        return self._leave(self.enter(x).chunk(2, 1))

    def forward_split(self, x: Tensor) -> Tensor:
        return self._leave(self.enter(x).split((self.c, self.c), 1))

    def _leave(self, parts: Any) -> Tensor:
        parts = list(parts)
        parts.extend(inner(parts[-1]) for inner in self.inner)
        return self.leave(torch.cat(parts, 1))


class Sized(Split):
    """The same with the two widths in a list."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.widths = [self.c, self.c]

    def forward_split(self, x: Tensor) -> Tensor:
        return self._leave(self.enter(x).split(self.widths, 1))


class Fused(nn.Module):
    """RepVGG: a convolution and the identity, which become one kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.groups = width, 1
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if self.width else self.conv(x)

    def switch_to_deploy(self) -> None:
        kernel = torch.zeros(self.width, self.width // self.groups, 3, 3, dtype=self.conv.weight.dtype)
        kernel[range(self.width), range(self.width), 1, 1] = 1
        self.conv.weight.data = self.conv.weight.data + kernel.to(self.conv.weight.device)
        self.width = 0


def network(*middle: nn.Module) -> nn.Module:
    return lively(nn.Sequential(block(3, 8), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))


def pruned(model: nn.Module, seed: int) -> nn.Module:
    """Random channels of everything gone, proven."""
    graph = surgery.trace(model, X)
    plan = random_plan(graph, seed)
    small = surgery.edit(model, plan, graph)
    surgery.verify(model, small, plan, graph)
    return small


def agree(block: Any, method: str) -> None:
    """The block computes the same either way."""
    x = torch.randn(1, block.enter[0].in_channels, 8, 8, dtype=torch.float64)
    assert torch.equal(getattr(block, method)(x), block(x))


@pytest.mark.parametrize("kind", [Split, Sized])
@pytest.mark.parametrize("seed", range(3))
def test_a_second_forward_follows_its_width(kind: type[Split], seed: int) -> None:
    model = network(kind(8, 8), kind(8, 8))
    small = pruned(model, seed)
    for name in ("1", "2"):
        assert small.get_submodule(name).enter[0].out_channels < 8
        agree(small.get_submodule(name), "forward_split")
        assert small.get_submodule(name).heads == 4  # equal to the width, by chance
    assert model[1].c == 4


def test_the_whole_network_may_have_a_second_forward_too() -> None:
    class Whole(Split):
        def __init__(self) -> None:
            super().__init__(3, 8)
            self.leave = nn.Sequential(self.leave, nn.Conv2d(8, 2, 1))

    small = pruned(lively(Whole()), 0)
    assert small.c < 4
    agree(small, "forward_split")


def test_a_kernel_is_fused_at_its_new_width() -> None:
    model = network(Fused(8))
    small = pk.apply(model, Plan([Keep("0.0", range(5))]), X)
    assert small[1].width == small[1].conv.out_channels == 5
    assert small[1].groups == 1
    before = small(X)
    small[1].switch_to_deploy()
    assert torch.allclose(small(X), before)


def test_numbers_survive_copies_further_pruning_and_files() -> None:
    model = network(Split(8, 8))
    once = pruned(model, 0)
    twice = pruned(copy.deepcopy(once), 2)
    assert twice[1].c <= once[1].c < 4
    agree(twice[1], "forward_split")
    file = io.BytesIO()
    torch.save(twice, file)
    file.seek(0)
    agree(torch.load(file, weights_only=False)[1], "forward_split")
    fresh = conform(network(Split(8, 8)), describe(twice))
    fresh.load_state_dict(twice.state_dict())
    agree(fresh[1], "forward_split")
    assert describe(fresh) == describe(twice)


@pytest.mark.parametrize(
    "values",
    [
        *({"c": 5}, {"c": 0}, {"c": -1}, {"c": True}, {"c": "4"}, {"c": [4]}, {"c": 2.0}, {"c": None}),
        *({"sizes": 3}, {"sizes": [3]}, {"sizes": [3, 10**9]}, {"sizes": [3, "3"]}),
        *({"training": 0}, {"_c": 1}, {"d": 1}, {"enter": 1}, {"forward": 1}),
    ],
)
def test_a_file_cannot_set_what_is_no_number_or_make_it_larger(values: dict[str, Any]) -> None:
    model = network(Split(8, 8))
    structure = describe(model)
    structure["attributes"]["1"] = values
    with pytest.raises(InputError, match=r"not a shape attribute of a Split|sets '\w+' of a Split|the file gives '1'"):
        conform(model, structure)


def test_a_method_that_cannot_be_helped_is_named() -> None:
    class Stubborn(Split):
        def forward_split(self, x: Tensor) -> Tensor:
            return self._leave(self.enter(x).split(8 // 2, 1))

    model = network(Stubborn(8, 8))
    graph = surgery.trace(model, X)
    with pytest.warns(UserWarning, match="'1' may not run any more beside its forward: forward_split"):
        small = surgery.edit(model, random_plan(graph, 0), graph)
    assert small[1].c == 4


def test_methods_that_never_ran_or_run_as_they_are_say_nothing() -> None:
    class Quiet(Split):
        def forward_features(self, x: Tensor) -> Tensor:
            return self.enter(x)

        def forward_split(self, x: Tensor, guide: Tensor) -> Tensor:  # type: ignore[override]
            return x.split(self.c, 1)[0] + guide

        def forward_broken(self, x: Tensor) -> Tensor:
            raise NotImplementedError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = pruned(network(Quiet(8, 8)), 0)
    assert small[1].c == 4


def test_api_sets_them_too() -> None:
    small = pk.apply(network(Split(8, 8)), Plan([Keep("1.enter.0", [0, 2])]), X)
    assert small[1].c == 2
