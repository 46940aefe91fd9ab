"""Names that are imported when they are first used, so that importing a package stays cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, home: Mapping[str, Iterable[str]], modules: Iterable[str] = ()) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names live elsewhere.

    `home` maps modules to the names that stand in them, as an import says them: `load`, or `fit as train`. `modules`
    are names themselves, by the last part of their paths.
    """
    places = {module.rpartition(".")[2]: (module, "") for module in modules}
    for module, names in home.items():
        places.update({name.rpartition(" as ")[2]: (module, name.partition(" as ")[0]) for name in names})

    def look_up(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module, attribute = places[name]
        found = import_module(module)
        return getattr(found, attribute) if attribute else found

    return look_up
