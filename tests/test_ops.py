"""The families of ops are what they say: each member is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.surgery import ops

SIZES = {"1d": (1, 2, 4), "2d": (1, 2, 4, 4), "3d": (1, 2, 4, 4, 4)}
SETTINGS: dict[str, tuple[Any, ...]] = {
    "channel_shuffle": (2,),
    "pixel_shuffle": (1,),
    "pixel_unshuffle": (2,),
    "im2col": ([2, 2], [1, 1], [0, 0], [2, 2]),
    "native_dropout": (0.5, False),
    "mean": ([2, 3],),
    "sum": ([2, 3],),
    "amax": ([2, 3],),
    "permute": ([0, 1, 3, 2],),
    "transpose": (2, 3),
    "slice": (2, 1, 3),
    "squeeze": (0,),
    "unsqueeze": (0,),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), ([1, 2, 16],)),
}


def run(name: str, fill: float | None = None, factor: float = 1.0) -> Tensor:
    """What an op gives of random numbers, times `factor`, or of a constant."""
    size = SIZES.get(name.removesuffix("_with_indices")[-2:], SIZES["2d"])
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) if fill is None else torch.full(size, fill)
    x = x * factor
    settings = SETTINGS.get(name, ())
    rank = x.dim() - 2
    if name == "t":
        x = x[0, 0]
    elif name == "col2im":
        x, settings = x.flatten(2), ([4, 4], [1, 1], [1, 1], [0, 0], [1, 1])
    elif name == "_reshape_alias":
        settings = ([1, 2, 16], [32, 16, 1])
    elif "pool" in name:
        settings = ([2] * rank,)
    elif name.startswith(("upsample", "_upsample")):
        settings = ([8] * rank,)
    given: Any = [x, x] if name == "cat" else x
    result = getattr(torch.ops.aten, name)(given, *settings)
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


@pytest.mark.parametrize("name", sorted(ops.ZERO_STAYS))
def test_zeros_stay_zeros(name: str) -> None:
    assert not run(name, 0.0).any()


@pytest.mark.parametrize("name", sorted(ops.CONSTANT_STAYS))
def test_constants_stay_constants(name: str) -> None:
    assert torch.equal(run(name, 3.0).unique(), torch.tensor([3.0]))


@pytest.mark.parametrize("name", sorted(ops.HOMOGENEOUS))
def test_scales_pass(name: str) -> None:
    assert torch.allclose(run(name, factor=2.0), 2 * run(name))


def test_families_lie_within_each_other() -> None:
    assert ops.VIEWS < ops.HAND_ON < ops.CONSTANT_STAYS < ops.HOMOGENEOUS
    assert ops.HAND_ON < ops.ZERO_STAYS
    assert set(ops.BATCH_NORMS) < set(ops.NORMS)
