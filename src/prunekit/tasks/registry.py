"""Tasks by name: prunekit's own, those of other packages (`prunekit.tasks`), and a class in a file of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from prunekit.errors import InputError
from prunekit.plugins import Plugins
from prunekit.tasks.base import Task

TASKS = Plugins(
    "prunekit.tasks",
    "task",
    Task,  # type: ignore[type-abstract]
    {
        "classification": "prunekit.tasks.classification:Classification",
        "segmentation": "prunekit.tasks.segmentation:Segmentation",
    },
)


def names() -> list[str]:
    """Return the names of all installed tasks, sorted. Nothing is imported."""
    return TASKS.names()


def is_code(name: str) -> bool:
    """Return whether a task is code that its user names: `path/to/file.py:Name` or `package.module:Name`."""
    return ":" in name


def get(name: str, *, data: str | None = None, args: Mapping[str, Any] | None = None) -> Task:
    """Return a task, made with `args` and, where it takes them, `data`.

    A name with a colon is code of the user's, which is imported, and so runs.

    Raises:
        InputError: There is none of that name, it lacks a part of the contract, or its arguments do not suit.
    """
    kind = _of_code(name) if is_code(name) else TASKS.load(name)
    given, takes = dict(args or {}), _parameters(kind)
    if data is not None:
        if takes is not None and "data" not in takes:
            raise InputError(f"the task {name} takes no --data", hint="it brings its own; --task-args reach it")
        given["data"] = data
    unknown = [] if takes is None else sorted(set(given) - set(takes))
    if unknown:
        raise InputError(
            f"the task {name} takes no argument '{unknown[0]}'", hint="it takes " + (", ".join(takes or ()) or "none")
        )
    try:
        task = kind(**given)
    except InputError:
        raise
    except Exception as error:  # whatever the code of a task raises
        from prunekit.models import told

        raise InputError(
            f"the task {name} cannot be made: {told(error)}", hint="--task-args KEY=VALUE,... gives it its arguments"
        ) from error
    return checked(task)


def checked(task: Task) -> Task:
    """Return a task that says what it is scored by.

    Raises:
        InputError: It does not.
    """
    score = getattr(task, "score", None)
    if not isinstance(score, str) or not score:
        raise InputError(
            f"the task {type(task).__name__} has no score that counts",
            hint='its class says which of its scores that is, for example: score = "accuracy"',
        )
    return task


def _of_code(name: str) -> type[Task]:
    from prunekit.models.user_code import named

    found = named(name)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise InputError(f"{name} is no task", hint="expected a class that derives from prunekit.Task")
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise InputError(f"the task {name} lacks {lacking}", hint="every task has examples, loss and scores")
    return found


def _parameters(kind: type[Task]) -> list[str] | None:
    """Return the names of the arguments that a task takes; None for any."""
    if kind.__init__ is object.__init__:
        return []
    found = inspect.signature(kind).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in found) else [p.name for p in found]
