"""Dataclasses as options: each field of a settings object becomes a flag, and the flags make the object again.

The same code serves a method's `Config`, the training settings and the option groups that commands share. The metadata
of a field is all optional:

    help      description of the flag
    choices   allowed values, or a function that lists them; another is an error that suggests the nearest
    complete  a function that returns what a shell may complete, where `choices` does not say it
    flag      name on the command line, where it is not `--` and the field's name; several separated by commas
    metavar   placeholder of the value in the help
    section   heading of the flag in the help
    hidden    True for a field that only the Python API has

A field may be a float, int, str or bool, or one of these or None, or a tuple of numbers or texts, which is written with
commas. Texts may also be given one by one, each with the flag, and so may a dictionary of numbers, as `name=number`. A
field of any other type has no form on the command line and keeps its default.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from prunekit.errors import InputError, unknown_name
from prunekit.methods.base import choices_of

_METAVARS = {float: "NUMBER", int: "COUNT", str: "TEXT"}


@dataclasses.dataclass(frozen=True)
class Form:
    """Command-line form of a field: its `kind`, perhaps left out (`optional`), perhaps `many` with commas, perhaps each
    with a name (`named`).
    """

    kind: type
    optional: bool = False
    many: bool = False
    named: bool = False

    @property
    def repeated(self) -> bool:
        """Whether the flag may be given several times."""
        return self.named or (self.many and self.kind is str)


def options_of(
    settings: type, *, section: str | None = None, flags: Mapping[str, str] | None = None
) -> list[inspect.Parameter]:
    """Return the options that make up the dataclass `settings`, one per field.

    Args:
        settings: The dataclass.
        section: The heading of fields that set none.
        flags: Other flags than their own for some fields, by field name.
    """
    hints = get_type_hints(settings)
    forms = [(field, _form(hints[field.name])) for field in dataclasses.fields(settings)]
    return [
        _option(field, form, section, (flags or {}).get(field.name))
        for field, form in forms
        if form is not None and not field.metadata.get("hidden")
    ]


def collect(settings: type, values: Mapping[str, Any]) -> Any:
    """Return a `settings` object from its options' values; raise `InputError` for one outside its choices."""
    hints = get_type_hints(settings)
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        form = _form(hints[field.name])
        if field.name not in values or form is None or field.metadata.get("hidden"):
            continue
        value = values[field.name]
        if form.repeated and not value:
            continue
        choices = choices_of(field)
        if choices and value is not None and value not in choices:
            raise unknown_name(flags_of(field)[0].lstrip("-"), str(value), choices)
        chosen[field.name] = _many(field, form, value) if form.many and value is not None else value
    return settings(**chosen)


def from_text(settings: type, text: str) -> dict[str, Any]:
    """Parse `key=value[,key=value]`, with the flags' keys, into values of the fields of `settings`.

    Raises:
        InputError: A key is unknown or given twice, or a value has another type.
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
        if form.repeated:
            found[field.name] = _joined(found.get(field.name), _many(field, form, [value]))
        elif field.name in found:
            raise InputError(f"setting '{key}' is given twice")
        else:
            found[field.name] = _typed(key, value, form)
    return found


def _joined(before: Any, more: Any) -> Any:
    return more if before is None else {**before, **more} if isinstance(more, dict) else (*before, *more)


def _typed(key: str, text: str, form: Form) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if form.kind is bool else number(text) if form.kind is float else form.kind(text)
    except (KeyError, ValueError):
        raise InputError(f"{key}={text}: expected {'true or false' if form.kind is bool else 'a number'}") from None


def number(text: str | float) -> float:
    """Return a number that may be written as a percentage: `0.5` and `50%` are the same.

    Raises:
        ValueError: It is no number.
    """
    if isinstance(text, str) and text.strip().endswith("%"):
        return float(text.strip()[:-1]) / 100
    return float(text)


def _number_of_flag(text: str | float) -> float:
    try:
        return number(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no number") from None


def flags_of(field: dataclasses.Field[Any], given: str | None = None) -> list[str]:
    """Return the flags of a field: `given`, its own, or `--` and its name."""
    given = given or field.metadata.get("flag")
    return [name.strip() for name in given.split(",")] if given else ["--" + field.name.replace("_", "-")]


def _option(field: dataclasses.Field[Any], form: Form, section: str | None, flag: str | None) -> inspect.Parameter:
    metadata, kind = field.metadata, str if form.many else form.kind
    default, flags, choices = _default(field), flags_of(field, flag), choices_of(field)
    if form.repeated:
        default = None if default is ... else [*(default or ())]
    elif form.many and default not in (None, ...):
        default = ",".join(map(str, default))
    if kind is bool and default is True:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}", *flags[1:]]
    option = typer.Option(
        default,
        *flags,
        help=_sentence(metadata.get("help", "")),
        metavar=None if kind is bool else metadata.get("metavar") or _metavar(form, choices),
        show_default=kind is not bool and default not in (None, "", []),
        autocompletion=_completion(field) if choices or "complete" in metadata else None,
        rich_help_panel=metadata.get("section") or section,
        parser=_number_of_flag if kind is float else None,
    )
    annotation: Any = kind | None if form.optional and kind is not bool else kind
    if form.repeated:
        annotation = list[str] | None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _metavar(form: Form, choices: tuple[str, ...]) -> str:
    one = "|".join(map(str, choices)) if choices else _METAVARS[form.kind]
    return f"{one},..." if form.many else one


def _sentence(text: str) -> str:
    """Return a help text with an initial capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")")) or not text else ".")


def _completion(field: dataclasses.Field[Any]) -> Any:
    found = field.metadata.get("complete") or (lambda: choices_of(field))

    def complete(incomplete: str) -> list[str]:
        return [str(value) for value in found() if str(value).startswith(incomplete)]

    return complete


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ...  # a required option


def _form(hint: Any) -> Form | None:
    """Return the form of a field with this annotation, or None where there is none."""
    if get_origin(hint) in (Union, types.UnionType):
        members = get_args(hint)
        forms = [form for member in members if (form := _form(member)) is not None]
        # text first: a field that may be text or a number is parsed by the code that defines it; a plain value before
        # several by their names
        plain = [form for form in forms if not form.named] or forms
        best = next((form for form in plain if form.kind is str), plain[0] if len(plain) == 1 else None)
        return best and dataclasses.replace(best, optional=type(None) in members)
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,) and get_args(hint)[0] in _METAVARS:
        return Form(get_args(hint)[0], many=True)
    if get_origin(hint) is dict and get_args(hint) == (str, float):
        return Form(float, many=True, named=True)
    return Form(hint) if hint in (*_METAVARS, bool) else None


def _many(field: dataclasses.Field[Any], form: Form, texts: str | Sequence[str]) -> Any:
    """Return the values of a field that has many: a tuple, or a dictionary where they have names; it may be None."""
    text = texts if isinstance(texts, str) else ",".join(texts)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if form.named:
        return dict(_named(field, part) for part in parts) or _default(field)
    try:
        return tuple(form.kind(part) for part in parts)
    except ValueError:
        raise InputError(f"{flags_of(field)[0]} '{text}' is not a list of numbers separated by commas") from None


def _named(field: dataclasses.Field[Any], text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    wrong = InputError(f"{flags_of(field)[0]} '{text}' is not {field.metadata.get('metavar', 'NAME=NUMBER')}")
    if not name.strip():
        raise wrong
    try:
        return name.strip(), number(value)
    except ValueError:
        raise wrong from None
