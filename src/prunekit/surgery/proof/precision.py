"""Running a network in double precision without a second copy of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class InDouble(TorchFunctionMode):
    """Mode in which every function computes in float64; weights are widened for the one that reads them, and no longer.

    For inference: what would be written into a weight of lower precision is lost.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Widen what comes in, and what is made of nothing; attributes are only read."""
        if getattr(func, "__name__", "") == "__get__":
            return func(*args, **(kwargs or {}))
        wide = func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))
        return tree_map(_widened, wide)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(torch.float64)
    return value
