"""What a sweep is asked for: its variants, budgets, seeds and tuning, from the command line to the workflow's terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from prunekit.cli.framework.fields import from_text, number
from prunekit.cli.framework.options import DataOptions, option
from prunekit.cli.tuning import Tuning
from prunekit.errors import InputError
from prunekit.methods.base import Config
from prunekit.training.config import TrainConfig

if TYPE_CHECKING:
    from prunekit.cli.sweep_file import Stored
    from prunekit.report.terminal.output import Output
    from prunekit.workflows.sweeps.points import Variant

_MOST = 1000  # points: a larger number is a typing error
_RATIOS = "0.1:0.9:0.1"


def methods_option(said: str) -> Any:
    """Return the option `--methods`, which `read_variants` reads; `said` is its help."""
    return typer.Option("--methods", "--method", metavar="NAME[:RESTORATION][:KEY=VALUE,...],...", help=said)


@dataclass(frozen=True)
class SweepTuning(Tuning):
    """Settings of the tuning after each pruning; measuring has flags of the same names, which keep their meaning."""

    batch_size: int | None = option(None, hidden=True)
    train_batch_size: int | None = option(None, help="Images of one optimiser step (default: by the data).")
    device: str = option("auto", hidden=True)
    seed: int = option(0, hidden=True)
    sparsity: float = option(0.0, hidden=True)  # it prepares for another pruning, and none follows
    sparsity_scope: str = option("all", hidden=True)
    proximal: bool = option(False, hidden=True)
    save_every: int = option(0, hidden=True)
    save_seconds: float = option(300.0, hidden=True)

    def settled(self, device: str | None) -> TrainConfig | None:
        """Return the settings, checked; None where there is no tuning.

        Raises:
            InputError: A value out of its range.
        """
        if not self.epochs:
            return None
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)}
        config = TrainConfig(**values | {"batch_size": self.train_batch_size, "device": device or "auto"})
        config.check()
        return config


def _of_methods(name: str) -> Any:
    """Return a setting that all methods have as one of the sweep, for all its variants."""
    setting = Config.__dataclass_fields__[name]
    return dataclasses.field(default=setting.default, metadata=setting.metadata)


@dataclass(frozen=True)
class PartOptions:
    """The layers that all methods of a sweep may narrow."""

    only: tuple[str, ...] = _of_methods("only")
    skip: tuple[str, ...] = _of_methods("skip")
    ratio_of: dict[str, float] | None = _of_methods("ratio_of")

    def of(self, variant: Variant) -> Variant:
        """Return the variant with these settings, where they are given.

        Raises:
            InputError: Gates are trained in the whole network.
        """
        from prunekit.workflows.sweeps.points import GATES

        given = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name))}
        if given and variant.method == GATES:
            raise InputError(
                f"--{next(iter(given)).replace('_', '-')} is for methods that remove channels, and manidp trains gates",
                hint="leave manidp out, or sweep it by itself",
            )
        return dataclasses.replace(variant, settings={**variant.settings, **given})


@dataclass(frozen=True)
class Grid:
    """The points of a sweep: each variant at each budget with each seed."""

    variants: tuple[Variant, ...]
    axis: str
    budgets: tuple[float | str, ...]
    seeds: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, in the words of the command line."""
        from prunekit.workflows.sweeps.points import written

        labels = [variant.label for variant in self.variants]
        return {"methods": labels, "budgets": [written(budget) for budget in self.budgets], "seeds": list(self.seeds)}


def asked_for(output: Output, methods: Sequence[str] | None, flags: Any, part: PartOptions, stored: Stored) -> Grid:
    """Return what is swept; what no flag says is as it was in the stored sweep, or else by default.

    Raises:
        InputError: Something that is none, two axes at once, or too many points.
    """
    given = {axis: value for axis in _PARSERS if (value := getattr(flags, _flag_field(axis))) is not None}
    if len(given) > 1:
        both = " and ".join(_flag(axis) for axis in given)
        raise InputError(f"a sweep has one axis, and {both} are two", hint="make a sweep of each, with its own -o FILE")
    before = stored.asked
    axis = next(iter(given), stored.facts.get("axis", "ratio"))
    budgets = given.get(axis) or ",".join(before.get("budgets", ())) or (_RATIOS if axis == "ratio" else "")
    seeds = flags.seeds if flags.seeds is not None else ",".join(map(str, before.get("seeds", (0,))))
    found = read_variants(methods or before.get("methods") or _defaults(output))
    variants = tuple(part.of(variant) for variant in found)
    grid = Grid(variants, axis, _PARSERS[axis](budgets), read_seeds(seeds))
    count = len(grid.variants) * len(grid.budgets) * len(grid.seeds)
    if count > _MOST:
        raise InputError(f"{count} points are more than {_MOST}")
    return grid


def check_grid(grid: Grid, data: DataOptions, tuning: TrainConfig | None) -> None:
    """Raise `InputError`, before any work, for what some variant cannot do without."""
    from prunekit.methods import registry
    from prunekit.workflows.sweeps.points import GATES

    names = [variant.method for variant in grid.variants]
    if tuning is not None and not data.given:
        raise InputError("tuning needs images", hint="say which with --data digits, a folder or a data set's name")
    if GATES in names and tuning is None:
        raise InputError("manidp trains gates, which takes epochs", hint="say how many with --epochs, or leave it out")
    if GATES in names and grid.axis not in ("ratio", "target_macs"):
        raise InputError(
            "gates remove no parameters, and the time they take is no budget",
            hint="sweep manidp over --ratios or --target-macs",
        )
    labelled = [name for name in names if name != GATES and registry.get(name).labelled]
    if labelled and not data.given:
        raise InputError(f"{labelled[0]} reads labelled images", hint="say which with --data, or leave it out")


def read_variants(texts: Sequence[str]) -> tuple[Variant, ...]:
    """Parse `slim,merge:moments,merge:restore=paper,lambda=1` into variants, with their settings checked.

    Raises:
        InputError: A method or a setting that there is not; the nearest names are suggested.
    """
    from prunekit.workflows.sweeps.points import Variant, settings_of

    variants: dict[str, Variant] = {}
    for text in _apart(texts):
        name, _, rest = text.partition(":")
        kind = settings_of(name)
        settings = [_spelt(item, name, kind) for item in rest.replace(":", ",").split(",") if item.strip()]
        variant = Variant(name, from_text(kind, ",".join(settings)))
        variant.check()
        variants[variant.label] = variant
    return tuple(variants.values())


def _apart(texts: Sequence[str]) -> list[str]:
    """Return one text a variant: a comma stands between variants, and between the settings of one (`key=value`)."""
    found: list[str] = []
    for text in texts:
        first = True
        for part in (part.strip() for part in text.split(",")):
            if "=" in part.partition(":")[0] and not first:
                found[-1] += f",{part}"
            elif part:
                found.append(part)
            first = False
    if not found:
        raise InputError("--methods names none", hint="for example --methods slim,merge:moments,random")
    return found


def _spelt(item: str, name: str, kind: Any) -> str:
    """Return `moments` as `restore=moments`, and `key=value` as it is."""
    if "=" in item:
        return item
    if "restore" not in {field.name for field in dataclasses.fields(kind)}:
        raise InputError(f"'{name}' restores nothing, so '{item}' is no way of it", hint="settings are key=value")
    return f"restore={item}"


def _defaults(output: Output) -> list[str]:
    """Return the methods that are swept where none is named, with a warning for one that cannot be loaded."""
    from prunekit.methods import registry

    names = []
    for name in registry.names():
        try:
            if registry.is_general(registry.get(name)):
                names.append(name)
        except Exception as error:  # a plug-in may raise anything
            output.warn(f"method {name} is left out: it cannot be loaded ({type(error).__name__}: {error})")
    return names


def read_ratios(text: str) -> tuple[float, ...]:
    """Parse `0.1,0.5`, `10%,50%` or `0.1:0.9:0.2` (both ends included) into ascending ratios.

    Raises:
        InputError: The text has no numbers, or one that is not between 0 and 1.
    """
    try:
        if ":" in text:
            first, last, step = (number(part) for part in text.split(":"))
            count = int((last - first) / step + 1e-9) + 1 if step > 0 else 0
            found = [round(first + i * step, 10) for i in range(min(count, _MOST + 1))]
        else:
            found = [number(part) for part in text.split(",") if part.strip()]
    except (ValueError, OverflowError):
        found = []
    if not found or not all(0 < ratio < 1 for ratio in found):
        raise InputError(
            f"--ratios '{text}' are not shares between 0 and 1", hint="expected for example 0.2,0.5 or 0.1:0.9:0.1"
        )
    return tuple(sorted(set(found)))


def _amounts(axis: str, text: str) -> tuple[str, ...]:
    """Parse `75%,50%,20M` into amounts, in the order given.

    Raises:
        InputError: One of them is no amount.
    """
    from prunekit.methods.budget import check_budget

    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise InputError(f"{_flag(axis)} '{text}' has no amounts", hint="expected for example 75%,50%,25%")
    for amount in found:
        given: dict[str, Any] = {axis: amount}
        check_budget(Config(**given))
    return found


def read_seeds(text: str) -> tuple[int, ...]:
    """Parse `0,1,2`.

    Raises:
        InputError: Something that is no whole number from 0 on.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) < 2**63 for part in parts):
        raise InputError(f"--seeds '{text}' are not whole numbers from 0 on", hint="expected for example 0,1,2")
    return tuple(dict.fromkeys(map(int, parts)))


# How the budgets of each axis are written. A further axis is a further entry, and a flag of the command.
_PARSERS: dict[str, Any] = {
    "ratio": read_ratios,
    "target_macs": lambda text: _amounts("target_macs", text),
    "target_params": lambda text: _amounts("target_params", text),
    "target_latency": lambda text: _amounts("target_latency", text),
}


def _flag_field(axis: str) -> str:
    return "ratios" if axis == "ratio" else axis


def _flag(axis: str) -> str:
    return "--" + _flag_field(axis).replace("_", "-")
