"""Tables of what an exported program may call and pass; anything that they do not name is refused.

`torch.export.load` unpickles, evaluates expressions and compiles names and guards from the file, so a hostile file runs
code. Here only dispatcher operators are called, found by name, on values decoded by these tables.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from prunekit.programs.allowed import ALLOWED, SIZES

_Entry = TypeVar("_Entry")


class UnsupportedError(Exception):
    """Error for a program that uses something these tables do not name."""


@dataclass(frozen=True)
class Ref:
    """A value computed earlier in the program, by its name there."""

    name: str


class InputDevice:
    """Placeholder for the device of the program's input."""


_OPERATOR = re.compile(r"torch\.ops\.aten\.([a-zA-Z_]\w*)\.([a-zA-Z]\w*)")
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Restrict a function to single numbers: Python's operators would also repeat text and grow numbers forever."""

    def checked(*numbers: Any) -> Any:
        if not all(isinstance(number, _NUMBERS) for number in numbers):
            raise TypeError(f"{function.__name__} of what is no number")
        outcome = function(*numbers)
        if type(outcome) is int and outcome.bit_length() > 63:
            raise OverflowError(f"{function.__name__} of numbers too large for sizes")
        return outcome

    return checked


def _item(values: Any, place: Any) -> Any:
    """Return one of the results of an operator that has several."""
    if not isinstance(values, list | tuple):
        raise TypeError("an item of what has none")
    return values[place]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": _arithmetic(getattr(operator, name))
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "neg"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
        )
    },
    "_operator.getitem": _item,
    **{f"math.{name}": _arithmetic(getattr(math, name)) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.sym_{name}": _arithmetic(getattr(torch, f"sym_{name}"))
        for name in ("int", "float", "max", "min", "not", "ite")
    },
}

# Numbers of dtypes in torch.export's schema.
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
_LAYOUTS = {7: torch.strided}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}


# Types of arguments that have a form of their own in the file.
_CONSTANTS: dict[str, type] = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": type,  # `InputDevice`
    "Generator": type(None),
}


def function(target: str) -> Callable[..., Any]:
    """Return the operator or arithmetic function that a node calls; raise `UnsupportedError` for any other name."""
    if target in _FUNCTIONS:
        return _FUNCTIONS[target]
    match = _OPERATOR.fullmatch(target)
    name, overload = match.groups() if match else ("", "")
    found = getattr(getattr(torch.ops.aten, name, None), overload, None) if name in ALLOWED else None
    if not isinstance(found, torch._ops.OpOverload) or not _is_on_tensors(found._schema):
        raise UnsupportedError(target)
    return found


def _is_on_tensors(schema: Any) -> bool:
    """Return whether an operator returns tensors and has no out argument; TorchScript's own overloads check nothing."""
    if any(argument.is_out for argument in schema.arguments) or schema.overload_name.startswith("prim_"):
        return False
    if schema.name.removeprefix("aten::") in SIZES:
        return True
    return bool(schema.returns) and all(str(result.type) in ("Tensor", "List[Tensor]") for result in schema.returns)


def check_constants(call: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check dtypes, layouts, memory formats and devices: operators do not, and a bare number ends the process.

    Raises:
        TypeError: One of them is something else.
    """
    if not isinstance(call, torch._ops.OpOverload):
        return
    arguments = {argument.name: str(argument.real_type) for argument in call._schema.arguments}
    for name, given in (dict(zip(arguments, args, strict=False)) | dict(kwargs)).items():
        kind = _CONSTANTS.get(arguments[name].removeprefix("Optional[").removesuffix("]"))
        if given is not None and kind is not None and not isinstance(given, kind):
            raise TypeError(f"{call} takes no {type(given).__name__} as {name}")


def dtype(number: int) -> torch.dtype:
    """Return the dtype of a number in the schema."""
    return _look_up(_DTYPES, number, "dtype")


def value(argument: dict[str, Any]) -> Any:
    """Decode an argument: constants as they are, computed values as `Ref`."""
    ((kind, content),) = argument.items()
    if kind not in _DECODERS:
        raise UnsupportedError(kind)
    return _DECODERS[kind](content)


def _look_up(table: dict[int, _Entry], number: int, kind: str) -> _Entry:
    if number not in table:
        raise UnsupportedError(f"{kind} {number}")
    return table[number]


def _name(content: dict[str, Any]) -> Ref:
    return Ref(content["name"])


def _names(content: list[dict[str, Any]]) -> list[Ref]:
    return [_name(item) for item in content]


def _values(content: list[dict[str, Any]]) -> list[Any]:
    return [value(item) for item in content]


def _symbol(content: dict[str, Any]) -> Any:
    return Ref(content["as_name"]) if "as_name" in content else next(iter(content.values()))


def _symbols(content: list[dict[str, Any]]) -> list[Any]:
    return [_symbol(item) for item in content]


def _as_is(content: Any) -> Any:
    return content


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_tensor": _name,
    "as_tensors": _names,
    "as_nested_tensors": lambda content: [_names(item) for item in content],
    "as_optional_tensor": value,
    "as_optional_tensors": _values,
    "as_sym_int": _symbol,
    "as_sym_ints": _symbols,
    "as_sym_float": _symbol,
    "as_sym_floats": _symbols,
    "as_sym_bool": _symbol,
    "as_sym_bools": _symbols,
    "as_float": float,
    "as_floats": lambda content: [float(item) for item in content],
    "as_complex": lambda content: complex(content["real"], content["imag"]),
    "as_scalar_type": dtype,
    "as_layout": lambda content: _look_up(_LAYOUTS, content, "layout"),
    "as_memory_format": lambda content: _look_up(_MEMORY_FORMATS, content, "memory format"),
    "as_device": lambda _: InputDevice,
    **dict.fromkeys(
        ("as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings", "as_int_lists", "as_float_lists"),
        _as_is,
    ),
}
