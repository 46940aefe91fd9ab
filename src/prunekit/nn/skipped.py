"""What stays of a residual block once its branch is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.errors import InputError

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish}
"""What may follow the sum of a residual block, by the name of the operation."""


class SkippedBlock(nn.Module):
    """A residual block without its branch: `activation(x + bias)`, in the place of `activation(x + branch(x))`.

    The bias, `(C,)`, is what the branch gives without the channels that it was made of: a constant for each channel of
    the stream, along dimension `axis` of `x`.
    """

    def __init__(self, bias: Tensor, axis: int, activation: str | None) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.axis = axis
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Add the constant."""
        x = x + self.bias.view(-1, *(1,) * (x.dim() - self.axis - 1))
        return x if self.activation is None else ACTIVATIONS[self.activation](x)

    def extra_repr(self) -> str:
        """Return channels, dimension and activation, for `repr`."""
        return f"{self.bias.numel()}, axis={self.axis}, activation={self.activation}"


def put_skip(model: nn.Module, name: str, skip: SkippedBlock) -> None:
    """Put a skipped block in the place of a block of `model`, **in place**."""
    block = model.get_submodule(name)
    learns = all(parameter.requires_grad for parameter in block.parameters())
    model.set_submodule(name, skip.train(block.training).requires_grad_(learns))


def describe_skips(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the settings of each skipped block by its name, as JSON."""
    return {
        name: {"axis": module.axis, "activation": module.activation}
        for name, module in model.named_modules()
        if isinstance(module, SkippedBlock)
    }


def restore_skips(
    model: nn.Module, described: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Give a freshly built `model` the skipped blocks that `describe_skips` has noted, **in place**.

    Raises:
        InputError: the model has no such block, or what is left of it is not described.
    """
    modules = dict(model.named_modules())
    for name, settings in described.items():
        like = next(modules[name].parameters(), None) if name and name in modules else None
        if like is None:
            raise InputError(f"the file skips a block '{name}' that its architecture does not have")
        said = settings if isinstance(settings, dict) else {}
        axis, activation, shape = said.get("axis"), said.get("activation"), shapes.get(f"{name}.bias", ())
        if type(axis) is not int or not 0 < axis < 5 or activation not in (None, *ACTIVATIONS) or len(shape) != 1:
            raise InputError(f"the file does not say what is left of the block '{name}' that it skips")
        put_skip(model, name, SkippedBlock(like.detach().new_empty(tuple(shape)), axis, activation))
