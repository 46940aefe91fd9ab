"""Registry of ways of restoring: prunekit's own, and the entry points `prunekit.restorations` of other packages."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from prunekit.errors import InputError
from prunekit.plugins import Plugins
from prunekit.restoration.base import Restoration

_WAYS = "prunekit.restoration.ways"
RESTORATIONS = Plugins(
    "prunekit.restorations",
    "restoration",
    Restoration,  # type: ignore[type-abstract]
    {
        "calibrate": f"{_WAYS}:Calibrate",
        "closed-form": f"{_WAYS}:ClosedForm",
        "constants": f"{_WAYS}:Constants",
        "few": f"{_WAYS}:Few",
        "moments": f"{_WAYS}:Moments",
        "none": f"{_WAYS}:Nothing",
        "paper": f"{_WAYS}:Paper",
        "synthetic": f"{_WAYS}:Synthetic",
    },
)


def restorations() -> list[str]:
    """Return the names of all installed ways of restoring, sorted: what `restore` may be. Nothing is imported.

    Examples:
        A method that offers them all:

        >>> from dataclasses import dataclass
        >>> import prunekit as pk
        >>> @dataclass(frozen=True)
        ... class Settings(pk.Config):
        ...     restore: str = pk.option("none", help="How to restore.", choices=pk.restorations)
        >>> Settings(ratio=0.5, restore="paper").restore
        'paper'
        >>> "closed-form" in pk.restorations()
        True
    """
    return RESTORATIONS.names()


def get(name: str, **settings: Any) -> Restoration:
    """Return the restoration of that name with these settings.

    Raises:
        InputError: There is none (the nearest names are suggested), it cannot be loaded, or it has no such setting.
    """
    from prunekit.restoration.guarded import guarded

    kind = RESTORATIONS.load(name)
    known = settings_of(kind)
    for setting in settings:
        if setting not in known:
            hint = "it has " + ", ".join(known) if known else "it has none"
            raise InputError(f"restoration '{name}' has no setting '{setting}'", hint=hint)
    return guarded(kind(**settings))


def settings_of(kind: type[Restoration]) -> dict[str, Any]:
    """Return the settings of a restoration by name, with their defaults."""
    return {field.name: field.default for field in fields(kind) if field.init} if is_dataclass(kind) else {}


def chosen(asked: str | None, otherwise: str, *, images: bool, config: object = None, **settings: Any) -> Restoration:
    """Return the restoration `asked` for; otherwise `calibrate` where there are `images`, and `otherwise` without.

    Its settings are `settings`, and those of the same name of `config`, a method's.

    Raises:
        InputError: There is no such restoration or setting, or it needs images and there are none.
    """
    name = asked or ("calibrate" if images else otherwise)
    known = settings_of(RESTORATIONS.load(name))
    shared = {setting: getattr(config, setting) for setting in known if hasattr(config, setting)}
    way = get(name, **{**shared, **settings})
    check_images(way, images)
    return way


def check_images(way: Restoration, images: bool) -> None:
    """Raise `InputError` where a restoration needs images and there are none."""
    if way.needs_images and not images:
        raise InputError(
            f"--restore {way.name} needs images, and none were given",
            hint="name a data set or a folder with --data (from Python: images=...); a thousand are enough, "
            "their labels are not read",
        )
