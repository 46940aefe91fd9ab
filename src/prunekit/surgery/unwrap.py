"""The network itself, out of what people wrap it in, and the kinds of network that cannot be read.

`torch.compile` and the parallel wrappers run the network that they hold; surgery reads that one, and returns its like.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.devices import device_of
from prunekit.errors import InputError
from prunekit.surgery.copying import Memo, copied, named_tensors

_log = logging.getLogger(__name__)
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return `model` without compilation and parallel wrappers, around it or inside it, and without inference tensors.

    The same object where there is none; otherwise one on the same weights, inference tensors apart.

    Raises:
        InputError: TorchScript, weights that do not exist yet, or weights that are spread over several processes.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    _check(model)
    memo: Memo = {}
    for module in model.modules():
        inner = _inner(module)
        if inner is not None:
            memo[id(module)] = unwrapped(inner)
        for value in vars(module).values():
            plain = getattr(value, "_torchdynamo_orig_callable", None)
            if plain is not None:
                memo[id(value)] = plain
    tensors = named_tensors(model).values()
    if not memo and not any(tensor.is_inference() for tensor in tensors):
        return model
    return copied(model, {id(t): t for t in tensors if not t.is_inference()} | memo)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run functions and methods that were compiled as they are written: compiling each copy would take minutes."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def release(model: nn.Module) -> nn.Module:
    """Take out, in place, hooks that do not pickle and that their owner puts in again when it needs them.

    Transformers' networks get some on the first run that asks for hidden states or attention maps.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
        vars(module).pop("_output_capturing_hooks_installed", None)
    return model


def plain_example(x: Any) -> Any:
    """Return an example input as plain tensors without a history, whatever it was: a subclass, a parameter, NumPy's."""
    return tree_map(_plain, x)


def check_types(model: nn.Module, x: Any) -> None:
    """Say whether it is the type of the numbers in an example input that a forward fails on.

    Raises:
        InputError: it is.
    """
    example = plain_example(x)
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    given = {leaf.dtype for leaf in tree_leaves(example) if isinstance(leaf, Tensor)}
    if own and given - own and not _runs(unwrapped(model), example):
        given_names, own_names = (", ".join(sorted(map(str, kinds))) for kinds in (given - own, own))
        raise InputError(
            f"the example input is {given_names} where the network's weights are {own_names}, and its forward does not "
            "convert it",
            hint=f"pass x.to({own_names})" if len(own) == 1 else None,
        )


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        leaf = torch.from_numpy(leaf)
    if not isinstance(leaf, Tensor):
        return leaf
    with torch._C.DisableTorchFunctionSubclass():
        leaf = leaf.detach().as_subclass(Tensor)
        return leaf.clone() if leaf.is_inference() else leaf


def _runs(model: nn.Module, example: Any) -> bool:
    """Return whether a copy runs on zeros like the example."""
    device = device_of(model)
    zeros = tree_map(lambda t: torch.zeros_like(t, device=device) if isinstance(t, Tensor) else t, example)
    try:
        with torch.no_grad():
            copied(model).eval()(*(zeros if isinstance(zeros, tuple | list) else (zeros,)))
    except Exception as error:  # a stranger's forward
        _log.debug("the network does not run on its example: %s", error)
        return False
    return True


def _inner(model: nn.Module) -> nn.Module | None:
    """Return what a wrapper holds, or None where `model` is no wrapper."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        inner: nn.Module = model._orig_mod
        return inner
    return model.module if isinstance(model, _PARALLEL) else None


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted and (module is model or any(True for _ in module.parameters())):
            raise InputError(
                f"{_called(name)} is TorchScript, whose code and weights cannot be taken apart",
                hint="prune the network that it was made from, and script or trace the result",
            )
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()) if not scripted else ():
            if tensor is not None:
                _check_tensor(module, f"{name}.{leaf}" if name else leaf, tensor)


def _check_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise InputError(
            f"'{name}' does not exist yet: {type(module).__name__} gets its weights when it first runs",
            hint="run the network on an example input once, then load or train its weights",
        )
    if type(tensor).__name__ in ("DTensor", "FlatParameter"):
        raise InputError(
            f"'{name}' is spread over several processes ({type(tensor).__name__})",
            hint="gather the full weights into a plain network first",
        )


def _called(name: str) -> str:
    return f"'{name}'" if name else "the network"
