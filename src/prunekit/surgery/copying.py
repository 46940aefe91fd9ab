"""Copies of networks in which some tensors are replaced.

`copy.deepcopy` spends most of its time on the many dictionaries that a module carries, nearly all of them empty. Here
modules are copied attribute by attribute, four times as fast, and only what is out of the ordinary goes the long way.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from typing import Any

from torch import nn

from prunekit.errors import SurgeryError

_ATOMS = (type(None), bool, int, float, str, type)
_SPECIAL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs_ex__", "__slots__")


def copied(model: nn.Module, replaced: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of `model`, in which objects give way to those that `replaced` has under their ids.

    Raises:
        SurgeryError: something in the model cannot be copied.
    """
    try:
        return _module(model, {} if replaced is None else replaced)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise SurgeryError(f"the model cannot be copied: {error}") from error


def _module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if not _ordinary(type(module)):
        return copy.deepcopy(module, memo)
    result = memo[id(module)] = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        result.__dict__[name] = _value(value, memo)
    return result


def _value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind is dict or kind is OrderedDict:
        result = memo[id(value)] = kind()
        for key, item in value.items():
            result[key] = _value(item, memo)
        return result
    if kind is set and not value:
        return set()
    if kind is tuple and all(type(item) in _ATOMS for item in value):
        return value
    return _module(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)


def _ordinary(kind: type[nn.Module]) -> bool:
    """Whether Python copies instances attribute by attribute."""
    bases = [base.__dict__ for base in kind.__mro__ if base is not object]
    return kind not in copyreg.dispatch_table and not any(name in base for name in _SPECIAL for base in bases)
