"""Copies of networks in which some tensors are replaced.

Modules are copied attribute by attribute, whatever way of their own they have: `copy.deepcopy` of a whole network takes
three times as long, nearly all of it for dictionaries that are empty, and classes that copy themselves lose something
(`fx` graph modules their mode and hooks) or know nothing of the tensors that are to be replaced. What the attributes
hold is for `copy.deepcopy`, with three things prepared that it refuses or hands on as they are: tensors with a history,
attributes that cannot be copied, and references from a module to its own network.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import gc
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from prunekit.errors import SurgeryError

_ATOMS = frozenset((type(None), bool, int, float, str, type))
_DICTS = (dict, OrderedDict)
_OWNED = ("_parameters", "_buffers", "_modules")
Memo = dict[int, Any]


def copied(model: nn.Module, replaced: Memo | None = None) -> nn.Module:
    """Return a deep copy of `model`, in which objects give way to those that `replaced` has under their ids.

    Every module keeps its mode, hooks and attributes. Tensors with a history lose it; attributes that cannot be copied,
    such as locks and open files, are shared.

    Raises:
        SurgeryError: something in the model cannot be copied.
    """
    memo = {} if replaced is None else replaced
    given = dict(memo)
    try:
        with _TensorCopies():
            try:
                return _copied(model, memo)
            except Exception:  # whatever a stranger's object raises
                memo.clear()
                memo.update(given | _uncopiable(model))
                return _copied(model, memo)
    except Exception as error:
        raise SurgeryError(f"the model cannot be copied: {error}") from error


def aliases(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return a memo for `copy.deepcopy(model, memo)` in which each parameter stands for a new one on the same storage.

    Such a copy may be run, moved, and converted to another type, which gives it memory of its own; its weights must not
    be written in place. Buffers, which a forward may write, are copied.
    """
    return {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad and not p.is_inference())
        for p in model.parameters()
    }


def named_tensors(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """Return parameters and buffers by their dotted names, in one walk over the modules."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        for own, found in ((module._parameters, parameters), (module._buffers, buffers)):
            for leaf, tensor in own.items():
                if tensor is not None and not (remove_duplicate and id(tensor) in seen):
                    seen.add(id(tensor))
                    found[f"{path}.{leaf}" if path else leaf] = tensor
    return parameters | buffers


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Run a block without garbage collection: surgery makes many small objects and no cycles.

    Looking for some takes up to a third of its time.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class _TensorCopies(TorchFunctionMode):
    """Copies, in `copy.deepcopy`, of tensors that it refuses: with a history, from inference mode, of other classes."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer for `Tensor.__deepcopy__`; run everything else as it is."""
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if not tensor.is_leaf or tensor.is_inference() or type(tensor) is not Tensor:
                if id(tensor) not in memo:
                    memo[id(tensor)] = _copied_values(tensor, memo)
                return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _copied_values(tensor: Tensor, memo: Memo) -> Tensor:
    with torch.no_grad():
        result = tensor.detach().clone()
    vars(result).update(copy.deepcopy(vars(tensor), memo))
    return result.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _copied(model: nn.Module, memo: Memo) -> nn.Module:
    modules = [m for m in model.modules() if id(m) not in memo and not isinstance(m, torch.jit.ScriptModule)]
    for module in modules:  # all of them first: they may refer to each other
        memo[id(module)] = _shell(type(module))
    redirection = _Redirection(memo)
    for state, names in [_fill(memo[id(module)], module, memo) for module in modules]:
        for name in names:
            state[name] = redirection(state[name])
    result: nn.Module = memo[id(model)] if id(model) in memo else copy.deepcopy(model, memo)
    return result


def _shell(kind: type[nn.Module]) -> nn.Module:
    """Return a new module without attributes."""
    if issubclass(kind, fx.GraphModule):  # each has a class of its own, for the forward of its own
        return kind.__new__(kind)
    return object.__new__(kind)


def _fill(result: nn.Module, module: nn.Module, memo: Memo) -> tuple[dict[str, Any], list[str]]:
    """Copy the attributes of a module one by one; return its new state, and those that may mean the original still."""
    state, names = vars(result), []
    for name, value in vars(module).items():
        if type(value) in _ATOMS or (type(value) is tuple and _ATOMS.issuperset(map(type, value))):
            state[name] = value
        elif type(value) in _DICTS and not value:  # most of what a module holds: hooks that it does not have
            state[name] = memo.setdefault(id(value), type(value)())
        elif type(value) in weakref.ProxyTypes:
            state[name] = value
            names.append(name)
        elif name != "_compiled_call_impl":  # which `nn.Module` leaves out of its state too
            state[name] = copy.deepcopy(value, memo)
            if name not in _OWNED:
                names.append(name)
    for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined]
        if hasattr(module, name):
            setattr(result, name, copy.deepcopy(getattr(module, name), memo))
    for name, parameter in module._parameters.items():
        if parameter is not None and vars(parameter):  # which `copy.deepcopy` leaves out
            vars(result._parameters[name]).update(copy.deepcopy(vars(parameter), memo))
    if isinstance(result, fx.GraphModule):
        result.graph = result._graph  # its forward is generated from its graph
        type(result).__name__ = type(module).__name__
    return state, names


def _uncopiable(model: nn.Module) -> Memo:
    """Return the attributes that cannot be copied, standing for themselves: as little as possible of what holds them.

    What belongs to the network is no matter here: it stands for itself while the attributes are tried.
    """
    modules = list(model.modules())
    known: Memo = {id(thing): thing for thing in (*modules, *named_tensors(model).values())}
    shared: Memo = {}
    for module in modules:
        for value in vars(module).values():
            _share(value, known, shared, set())
    return shared


def _share(value: Any, known: Memo, shared: Memo, seen: set[int]) -> None:
    if id(value) in seen or _can_be_copied(value, known | shared):
        return
    seen.add(id(value))
    for part in _parts(value):
        _share(part, known, shared, seen)
    if not _can_be_copied(value, known | shared):
        shared[id(value)] = value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, types.ModuleType):
        return []
    return list(value) if isinstance(value, list | tuple | set) else list(getattr(value, "__dict__", {}).values())


def _can_be_copied(value: Any, memo: Memo) -> bool:
    try:
        copy.deepcopy(value, memo)
    except Exception:  # whatever a stranger's object raises
        return False
    return True


class _Redirection:
    """Weak references and functions, which `copy.deepcopy` hands on as they are, made to mean the copy's modules."""

    def __init__(self, memo: Memo) -> None:
        self._memo = memo
        self._cells: dict[int, types.CellType] = {}
        self._kinds: dict[type, Callable[[Any], Any]] = {
            **dict.fromkeys(_DICTS, self._mapping),
            list: self._list,
            weakref.ref: self._reference,
            **dict.fromkeys(weakref.ProxyTypes, self._proxy),
            types.FunctionType: self._function,
            types.MethodType: self._method,
        }

    def __call__(self, value: Any) -> Any:
        """Return `value`, or what takes its place; lists and dictionaries are changed in place."""
        kind = self._kinds.get(type(value))
        shared = kind is None or self._memo.get(id(value)) is value
        return value if kind is None or shared else kind(value)

    def _mapping(self, mapping: dict[Any, Any]) -> dict[Any, Any]:
        for key, item in mapping.items():
            mapping[key] = self(item)
        return mapping

    def _list(self, items: list[Any]) -> list[Any]:
        items[:] = map(self, items)
        return items

    def _reference(self, reference: weakref.ref[Any]) -> weakref.ref[Any]:
        target = reference()
        new = self._memo.get(id(target), target)
        return reference if new is target else weakref.ref(new)

    def _proxy(self, proxy: Any) -> Any:
        if not isinstance(proxy, nn.Module):
            return proxy
        target: Any = proxy.modules.__self__  # type: ignore[attr-defined]  # what is behind a proxy shows in its methods
        new = self._memo.get(id(target), target)
        return proxy if new is target else weakref.proxy(new)

    def _method(self, method: types.MethodType) -> types.MethodType:
        new = self._memo.get(id(method.__self__), method.__self__)
        return types.MethodType(method.__func__, new)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Return the function itself, or one over cells and defaults that hold the copy's modules."""
        cells = tuple(map(self._cell, function.__closure__ or ()))
        defaults = tuple(map(self._held, function.__defaults__ or ()))
        if cells == (function.__closure__ or ()) and defaults == (function.__defaults__ or ()):
            return function
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults or None, cells)
        new.__kwdefaults__, new.__qualname__ = function.__kwdefaults__, function.__qualname__
        new.__module__, new.__doc__ = function.__module__, function.__doc__
        new.__dict__.update(function.__dict__)
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) not in self._cells:
            self._cells[id(cell)] = cell  # functions may refer to themselves
            with contextlib.suppress(ValueError):  # an empty cell
                held = cell.cell_contents
                new = self._held(held)
                if new is not held:
                    self._cells[id(cell)] = types.CellType(new)
        return self._cells[id(cell)]

    def _held(self, value: Any) -> Any:
        """Return what a function holds: containers stay what they are, since they may belong to others."""
        if isinstance(value, nn.Module):
            return self._memo.get(id(value), value)
        return self(value) if isinstance(value, types.FunctionType | types.MethodType | weakref.ref) else value
