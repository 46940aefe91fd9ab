"""Build a network without memory for its weights, and no larger than its file supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from prunekit.errors import InputError
from prunekit.surgery.execution.hooks import hooked


class NoNormalDraws(TorchFunctionMode):
    """Skips normal draws, which on meta tensors import a second's worth of symbolic mathematics for nothing."""

    def __torch_function__(self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> Any:
        """Call every other function as it is."""
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))


class OnlyComputed(TorchFunctionMode):
    """Puts weights alone on the meta device, for networks that compute their widths with tensors."""

    def __torch_function__(self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> Any:
        """Allocate tensors whose values layers set later on the meta device; call every other function as it is."""
        if func in _ALLOCATING:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))


_ALLOCATING = (torch.empty, torch.zeros, torch.ones)


@contextmanager
def at_most(modules: int | None) -> Iterator[None]:
    """Raise `InputError` inside the block as soon as more than `modules` modules are built; None allows any number."""
    built = 0

    def count(_: nn.Module, __: str, ___: nn.Module | None) -> None:
        nonlocal built
        built += 1
        if modules is not None and built > modules:
            raise InputError(f"its architecture has more than {modules} modules, for which the file has no weights")

    with hooked([register_module_module_registration_hook(count)]):
        yield
