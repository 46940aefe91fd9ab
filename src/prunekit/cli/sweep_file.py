"""The file that holds a sweep while it runs, and after: its own JSON document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.models import write_report
from prunekit.cli.resuming import differing
from prunekit.errors import InputError
from prunekit.report.documents import document, dumps
from prunekit.report.provenance import made_by

if TYPE_CHECKING:
    from prunekit.evaluation.score import EvalResult
    from prunekit.workflows.sweeps.points import SweepPoint
    from prunekit.workflows.sweeps.summary import Sweep

# What files from before there was a choice are sweeps of.
_ONCE: dict[str, Any] = {"axis": "ratio", "tuning": None, "asked": {}}


@dataclass(frozen=True)
class Stored:
    """What an earlier run left: what it was asked for, the unpruned network, and the points that were done."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    base: EvalResult | None = None
    points: tuple[SweepPoint, ...] = ()

    @property
    def asked(self) -> Mapping[str, Any]:
        """The `methods`, `budgets` and `seeds` of the earlier run, as on the command line; nothing where it is new."""
        asked: Mapping[str, Any] = self.facts.get("asked", {})
        return asked


def must_be_new(path: Path, *, force: bool) -> None:
    """Raise `InputError` where a new sweep would replace a file, unless `force` is set."""
    if path.exists() and not force:
        raise InputError(f"{path} exists", hint="--resume goes on with it, --force begins anew")


def read(path: Path) -> Stored:
    """Return what is stored; nothing where there is no file.

    Raises:
        InputError: The file is not a sweep.
    """
    from prunekit.workflows.sweeps.points import SweepPoint, result_from_json

    if not path.exists():
        return Stored()
    try:
        found = _ONCE | json.loads(path.read_text(encoding="utf-8"))
        points = tuple(SweepPoint.from_json(point) for point in found["points"])
        _check(found, points)
        return Stored(found, result_from_json(found["base"]), points)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a sweep that could go on: {error}") from error


def _check(found: Mapping[str, Any], points: Sequence[SweepPoint]) -> None:
    """Raise `TypeError` where a stored sweep does not hold together."""
    from prunekit.methods.budget import AXES

    if found["axis"] not in AXES or any(point.budget[0] != found["axis"] for point in points):
        raise TypeError("its points lie along another axis")
    for name, kind in (("methods", str), ("budgets", str), ("seeds", int)):
        values = found["asked"].get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise TypeError(f"asked.{name} is no list of them")
    if not isinstance(found["tuning"], dict | None):
        raise TypeError("tuning is not what it should be")


def must_agree(path: Path, stored: Stored, settings: Mapping[str, Any]) -> None:
    """Raise `InputError` that names each setting in which the stored sweep differs from the present one."""
    if not stored.facts:
        return
    before, now = _flat(stored.facts), _flat(settings)
    compared = [key for key in dict.fromkeys((*now, *before)) if key.partition(".")[0] in settings]
    others = differing(before, now, compared, length=12)
    if others:
        raise InputError(
            f"{path} is a sweep of other {others}",
            hint="resume with the same settings, or name another file with -o",
        )


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted names; a setting that is None is as good as none."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif value is not None:
            flat[key] = value
    return flat


def write(path: Path, facts: Mapping[str, Any], sweep: Sweep) -> dict[str, Any]:
    """Write the sweep as far as it is, and return the document."""
    found = sweep.recommendation
    views = {
        "summary": [summary.to_json() for summary in sweep.summaries],
        "recommendation": found.to_json() if found else None,
        "points": [point.to_json() for point in sweep.points],
    }
    whole = document("sweep", {"output": str(path), **made_by(), **facts, "base": sweep.base.to_json(), **views})
    write_report(str(path), dumps(whole) + "\n", force=True)
    return whole
