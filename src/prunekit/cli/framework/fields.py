"""Dataclasses as options: each field of a settings object becomes a flag, the flags the object again.

The same code serves a method's `Config`, the training settings and the option groups that commands share. A
field says more about itself in its metadata, all of it optional:

    help      what the flag does choices   the values it may have; another is an error that suggests the
    nearest flag      its name on the command line, where it is not `--` and the field's name; several
    separated by commas metavar   what stands for the value in the help section   the heading that the flag
    stands under in the help hidden    True for a field that only the Python API has

A field may be a float, int, str or bool, or one of these or None, or a tuple of numbers or texts, which is
written with commas. A field of any other type has no form on the command line and is left at its default.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from prunekit.errors import InputError, unknown_name

_METAVARS = {float: "NUMBER", int: "COUNT", str: "TEXT"}


@dataclasses.dataclass(frozen=True)
class Form:
    """How a field is written: as a `kind`, perhaps left out (`optional`), perhaps `many` with commas."""

    kind: type
    optional: bool = False
    many: bool = False


def options_of(
    settings: type, *, section: str | None = None, flags: Mapping[str, str] | None = None
) -> list[inspect.Parameter]:
    """The options that make up the dataclass `settings`, one a field; under `section` where none is set.

    `flags` gives some fields another flag than their own, by field name.
    """
    hints = get_type_hints(settings)
    forms = [(field, _form(hints[field.name])) for field in dataclasses.fields(settings)]
    return [
        _option(field, form, section, (flags or {}).get(field.name))
        for field, form in forms
        if form is not None and not field.metadata.get("hidden")
    ]


def collect(settings: type, values: Mapping[str, Any]) -> Any:
    """A `settings` object from its options' values; raises `InputError` for one outside its choices."""
    hints = get_type_hints(settings)
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        form = _form(hints[field.name])
        if field.name not in values or form is None:
            continue
        value = values[field.name]
        choices = field.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise unknown_name(flags_of(field)[0].lstrip("-"), str(value), choices)
        chosen[field.name] = _many(field, form, value) if form.many and value is not None else value
    return settings(**chosen)


def from_text(settings: type, text: str) -> dict[str, Any]:
    """Read `key=value[,key=value]`, keys as the flags have them, as values of the fields of `settings`.

    Raises:
        InputError: an unknown key, one given twice, or a value of another type.
    """
    hints = get_type_hints(settings)
    forms = {
        flag.lstrip("-"): (field, _form(hints[field.name]))
        for field in dataclasses.fields(settings)
        for flag in flags_of(field)
    }
    known = {name: (field, form) for name, (field, form) in forms.items() if form is not None}
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        name = key.replace("_", "-")
        if not equals:
            raise InputError(f"'{item}' is not a setting", hint="expected key=value[,key=value]")
        if name not in known:
            raise unknown_name("setting", key, known)
        field, form = known[name]
        if field.name in found:
            raise InputError(f"setting '{key}' is given twice")
        found[field.name] = _typed(key, value, form)
    return found


def _typed(key: str, text: str, form: Form) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if form.kind is bool else form.kind(text)
    except (KeyError, ValueError):
        raise InputError(f"{key}={text}: expected {'true or false' if form.kind is bool else 'a number'}") from None


def flags_of(field: dataclasses.Field[Any], given: str | None = None) -> list[str]:
    """The flags of a field: `given`, its own, or `--` and its name."""
    given = given or field.metadata.get("flag")
    return [name.strip() for name in given.split(",")] if given else ["--" + field.name.replace("_", "-")]


def _option(field: dataclasses.Field[Any], form: Form, section: str | None, flag: str | None) -> inspect.Parameter:
    metadata, kind = field.metadata, str if form.many else form.kind
    default, flags, choices = _default(field), flags_of(field, flag), metadata.get("choices")
    if form.many and default not in (None, ...):
        default = ",".join(map(str, default))
    if kind is bool and default is True:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}", *flags[1:]]
    option = typer.Option(
        default,
        *flags,
        help=_sentence(metadata.get("help", "")),
        metavar=None if kind is bool else metadata.get("metavar") or _metavar(form, choices),
        show_default=kind is not bool and default not in (None, ""),
        autocompletion=_completion(choices) if choices else None,
        rich_help_panel=metadata.get("section") or section,
    )
    annotation = kind | None if form.optional and kind is not bool else kind
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _metavar(form: Form, choices: tuple[str, ...] | None) -> str:
    one = "|".join(map(str, choices)) if choices else _METAVARS[form.kind]
    return f"{one},..." if form.many else one


def _sentence(text: str) -> str:
    """Help texts begin with a capital and end with a full stop, however they were written."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")")) or not text else ".")


def _completion(choices: tuple[str, ...]) -> Any:
    def complete(incomplete: str) -> list[str]:
        return [str(choice) for choice in choices if str(choice).startswith(incomplete)]

    return complete


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ...  # a required option


def _form(hint: Any) -> Form | None:
    """The form of a field with this annotation, or None where there is none."""
    if get_origin(hint) in (Union, types.UnionType):
        members = get_args(hint)
        forms = [form for member in members if (form := _form(member)) is not None]
        # text comes first: where a field may be text or a number, the text is read by whoever defined it
        best = next((form for form in forms if form.kind is str), forms[0] if len(forms) == 1 else None)
        return best and dataclasses.replace(best, optional=type(None) in members)
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,) and get_args(hint)[0] in _METAVARS:
        return Form(get_args(hint)[0], many=True)
    return Form(hint) if hint in (*_METAVARS, bool) else None


def _many(field: dataclasses.Field[Any], form: Form, text: str) -> tuple[Any, ...]:
    try:
        return tuple(form.kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{flags_of(field)[0]} '{text}' is not a list of numbers separated by commas") from None
