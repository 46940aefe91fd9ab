"""Hooks that last as long as a block, whatever happens in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block, also where it fails, or where a generator fails to register another.

    ```
    with hooked(layer.register_forward_hook(note) for layer in layers):
        model(x)
    ```
    """
    with contextlib.ExitStack() as hooks:
        for handle in handles:
            hooks.callback(handle.remove)
        yield


@contextlib.contextmanager
def running(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield the dotted names of the `modules` whose forward is running, innermost last.

    A forward that fails leaves the list as it was at that moment.
    """
    stack: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    def handles() -> Iterator[RemovableHandle]:
        for name, module in modules.items():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                yield module.register_forward_pre_hook(enter(name))
                yield module.register_forward_hook(leave)

    with hooked(handles()):
        yield stack


@contextlib.contextmanager
def plain_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, bool]]:
    """Yield, for each of the `modules` whose forward has ended, whether it was called once, tensor to tensor."""
    plain: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            plain[name] = alone and name not in plain

        return hook

    takers = {name: module for name, module in modules.items() if not isinstance(module, torch.jit.ScriptModule)}
    with hooked(module.register_forward_hook(note(name), with_kwargs=True) for name, module in takers.items()):
        yield plain
