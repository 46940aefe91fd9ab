"""Ops on the meta device: the table answers what PyTorch would, shape, type and order in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.surgery.copying import copied
from prunekit.surgery.execution.dispatch import DispatchMode, run_op
from prunekit.surgery.execution.sources import skeleton

aten = torch.ops.aten


def image(*shape: int) -> Tensor:
    return torch.rand(shape or (2, 6, 5, 4))


def channels_last(*shape: int) -> Tensor:
    return image(*shape).contiguous(memory_format=torch.channels_last)


CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "relu": (aten.relu.default, (image(),)),
    "relu of channels-last": (aten.relu.default, (channels_last(),)),
    "relu of a permuted tensor": (aten.relu.default, (image().permute(0, 2, 3, 1),)),
    "relu of a slice": (aten.relu.default, (image()[:, 1:4],)),
    "relu of a permuted slice": (aten.relu.default, (image()[:, 1:4].permute(3, 0, 2, 1),)),
    "relu of an expanded tensor": (aten.relu.default, (image(2, 1, 5).expand(2, 6, 5),)),
    "relu in place": (aten.relu_.default, (channels_last(),)),
    "softmax": (aten._softmax.default, (image(), -1, False)),
    "add": (aten.add.Tensor, (image(), image())),
    "add a number": (aten.add.Tensor, (channels_last(), 2.0)),
    "add channels-last": (aten.add.Tensor, (channels_last(), channels_last())),
    "add what broadcasts": (aten.add.Tensor, (image(), image(6, 1, 1))),
    "add to what broadcasts": (aten.add.Tensor, (image(6, 1, 1), channels_last())),
    "add two that broadcast": (aten.add.Tensor, (image(2, 6, 1, 1), image(5, 4))),
    "add in place": (aten.add_.Tensor, (channels_last(), image(4))),
    "add another type": (aten.add.Tensor, (image(), image().double())),
    "mul by an imaginary number": (aten.mul.Tensor, (image(), 1j)),
    "mul by a mask": (aten.mul.Tensor, (image(), image() > 0.5)),
    "masked_fill": (aten.masked_fill.Scalar, (image(), image(5, 4) > 0.5, 0.0)),
    "masked_fill of what broadcasts": (aten.masked_fill.Scalar, (image(5, 4), image() > 0.5, 0.0)),
    "index": (aten.index.Tensor, (image(7, 3), [torch.tensor([[0, 2], [1, 1]])])),
    "index by a mask of a dimension": (aten.index.Tensor, (image(), [None, torch.tensor([0, 3])])),
    "batch_norm": (aten.native_batch_norm.default, (image(), *[image(6)] * 4, False, 0.1, 1e-5)),
    "layer_norm": (aten.native_layer_norm.default, (image(), [4], image(4), image(4), 1e-5)),
    "convolution": (
        aten.convolution.default,
        (image(), image(8, 6, 3, 3), None, [2, 1], [1, 0], [1, 1], False, [0], 1),
    ),
    "grouped": (aten.convolution.default, (image(), image(9, 2, 2, 1), image(9), [1], [0], [2], False, [0], 3)),
    "one-dimensional": (aten.convolution.default, (image(1, 4, 9), image(5, 4, 3), None, [3], [2], [2], False, [0], 1)),
    "transposed": (
        aten.convolution.default,
        (image(), image(6, 3, 2, 2), None, [2, 2], [0, 0], [1, 1], True, [1, 0], 1),
    ),
    "channels-last convolution": (
        aten.convolution.default,
        (channels_last(), image(8, 6, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    ),
    "mean": (aten.mean.dim, (image(), [-1, -2], True)),
    "mean without the dimensions": (aten.mean.dim, (image(), [1])),
    "norm": (aten.linalg_vector_norm.default, (image(), 2, [-1], True)),
    "addmm": (aten.addmm.default, (image(7), image(3, 5), image(5, 7))),
    "addmm of a wide bias": (aten.addmm.default, (image(3, 7), image(3, 5), image(5, 7))),
    "mm": (aten.mm.default, (image(3, 5), image(7, 5).t())),
    "bmm": (aten.bmm.default, (image(2, 3, 5), image(2, 5, 4))),
    "cat": (aten.cat.default, ([image(), image(2, 3, 5, 4)], 1)),
    "cat along the last": (aten.cat.default, ([image(2, 3), image(2, 1)], -1)),
    "view": (aten.view.default, (image(), [2, -1])),
    "permute": (aten.permute.default, (image(), [0, 2, 3, 1])),
    "transpose": (aten.transpose.int, (image(), 1, -1)),
    "t in place": (aten.t_.default, (image(3, 3)[:, :3],)),
    "unsqueeze in place": (aten.unsqueeze_.default, (image(3), 0)),
}

WRONG: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "add": (aten.add.Tensor, (image(2, 3), image(2, 4))),
    "add in place to what broadcasts": (aten.add_.Tensor, (image(1, 3), image(2, 3))),
    "cat": (aten.cat.default, ([image(2, 3), image(3, 3)], 1)),
    "mm": (aten.mm.default, (image(2, 3), image(2, 3))),
    "bmm": (aten.bmm.default, (image(2, 3, 4), image(3, 4, 2))),
    "addmm": (aten.addmm.default, (image(4), image(2, 3), image(3, 5))),
    "view": (aten.view.default, (image(), [7, -1])),
    "convolution": (aten.convolution.default, (image(), image(8, 5, 3, 3), None, [1], [1], [1], False, [0], 1)),
    "a kernel that is too large": (
        aten.convolution.default,
        (image(), image(8, 6, 9, 9), None, [1], [1], [1], False, [0], 1),
    ),
}


def without_values(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments on the meta device, strides and all."""

    def moved(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    result: tuple[Any, ...] = tree_map(lambda leaf: moved(leaf) if isinstance(leaf, Tensor) else leaf, args)
    return result


def described(out: Any) -> list[Any]:
    """Geometry and type of results; the strides of dimensions of one element mean nothing."""
    return [
        (t.shape, t.dtype, [s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1])
        for t in tree_leaves(out)
        if isinstance(t, Tensor)
    ]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_pytorchs_own(name: str) -> None:
    func, args = CASES[name]
    bare = without_values(args)
    answer = run_op(func, bare, {})
    real = func(*tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, args))
    expected = func(*without_values(args)) if name.endswith("norm") else real  # statistics have no agreed shape
    assert described(answer)[:1] == described(expected)[:1]
    assert (answer is bare[0]) == func._schema.name.endswith("_")


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_as_pytorch_does(name: str) -> None:
    func, args = WRONG[name]
    with pytest.raises(RuntimeError):
        run_op(func, without_values(args), {})


class _Results(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run_op(func, args, kwargs or {})
        self.seen.append((func, described(out)[:1]))
        return out


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "shufflenet_v2_x0_5"])
def test_networks_run_the_same_ops_with_and_without_values(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.get_model(name, weights=None).eval()
    runs = []
    for subject, x in ((model, torch.rand(1, 3, 64, 64)), (skeleton(model), torch.rand(1, 3, 64, 64, device="meta"))):
        with torch.no_grad(), _Results() as run:
            subject(x)
        runs.append([(func, shapes) for func, shapes in run.seen if func is not aten.empty.memory_format])
    assert runs[0] == runs[1]


def test_what_is_shared_in_a_network_is_shared_in_its_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    shared = {"of": ["two", model[0]]}
    model.first = model[2].second = shared
    copy = copied(model)
    assert copy.first is copy[2].second
    assert copy.first is not shared
    assert copy.first["of"][1] is copy[0]
    assert copy[0].weight is not model[0].weight
    assert torch.equal(copy[0].weight, model[0].weight)
