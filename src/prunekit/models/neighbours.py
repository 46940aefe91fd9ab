"""Import neighbours of the user's code while it runs, as `python file.py` would.

A script finds its neighbours because its folder stands first on `sys.path`. Here several such folders follow each other
in one process, and each may hold a `blocks.py` of its own. So each has a `Space`: the folders that its code searches,
and the modules that came from there. Inside `importable`, names lead to these modules; afterwards `sys.path` is as it
was, and names lead where they would have led without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# These packages are kept once they are loaded: no script works beside a file of such a name, and a second copy in one
# process is worse than a failed import. Any other package gives way to a neighbour of its name.
_KEPT = sys.stdlib_module_names | {"numpy", "prunekit", "torch", "torchvision"}


class Space:
    """The folders that a piece of code searches before (`first`) and after (`last`) all others, and their modules."""

    def __init__(self, first: Sequence[str], last: Sequence[str]) -> None:
        self.first, self.last = list(first), list(last)
        self.modules: dict[str, ModuleType] = {}
        self._sources: dict[str, bytes] = {}

    @property
    def folders(self) -> list[str]:
        """All folders of the space."""
        return [*self.first, *self.last]

    @property
    def changed(self) -> bool:
        """True where a file has changed since it was imported."""
        return any(_digest(file) != digest for file, digest in self._sources.items())

    def forget(self) -> None:
        """Drop all modules, so that they are imported anew."""
        self.leave()
        self.modules, self._sources = {}, {}

    def leave(self) -> None:
        """Take the space's modules out of `sys.modules`."""
        _take_out(self.modules.keys(), self.modules)

    def search(self, outside: Sequence[str]) -> list[str]:
        """Return `sys.path` for the inside: each of the space's folders once, before and after those of `outside`."""
        behind = [folder for folder in self.last if folder not in {os.path.realpath(entry) for entry in outside}]
        return [*self.first, *outside, *behind]

    def remember(self, path: Sequence[str], outside: Sequence[str], modules: Iterable[str]) -> None:
        """Keep what the code has added to `path`, and those of the new `modules` that came from the space's folders."""
        start = path.index(self.first[0]) if self.first[0] in path else 0
        known = {*outside, *self.folders}
        self.first = [*[folder for folder in path[:start] if folder not in known], *self.first]
        self.last = [*self.last, *[folder for folder in path[start:] if folder not in known]]
        elsewhere = {os.path.realpath(entry) for entry in outside}
        for name in modules:
            file = _file(sys.modules[name])
            if file is not None and self._owns(file, elsewhere):
                self.modules[name] = sys.modules[name]
                self._sources[file] = _digest(file)

    def _owns(self, file: str, elsewhere: set[str]) -> bool:
        """Return whether the innermost import folder around `file` belongs to this space alone."""
        around = {str(parent) for parent in Path(file).parents}
        own = {os.path.realpath(folder) for folder in self.folders} & around
        others = elsewhere & around
        return bool(own) and max(map(len, own)) > max(map(len, others), default=0)


_spaces: dict[tuple[str, ...], Space] = {}


class _Latecomers:
    """Import finder, asked last, for neighbours of code that imports only when called: it searches the latest space."""

    space: Space | None = None

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Find a module, following the import system's protocol."""
        del target
        if path is not None or cls.space is None:
            return None
        spec = PathFinder.find_spec(name, cls.space.folders)
        return spec if _is_file(spec) else None  # a folder of results is not an installed package


@contextlib.contextmanager
def importable(first: Path, last: Sequence[Path] = (), *, program: str) -> Iterator[None]:
    """Search the folder `first` before, and `last` after, all others for imports inside; the code runs as `program`.

    The code sees no command line but that name, its standard output goes to standard error, and nothing is written into
    its folders.
    """
    space = _enter(os.path.realpath(first), [os.path.realpath(folder) for folder in last])
    outside, argv, quiet = list(sys.path), sys.argv, sys.dont_write_bytecode
    hidden = _hidden(space)
    _take_out(hidden, hidden)
    before = set(sys.modules)
    sys.modules.update(space.modules)
    sys.path[:], sys.argv, sys.dont_write_bytecode = space.search(outside), [program], True
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv, sys.dont_write_bytecode = argv, quiet
        space.remember(sys.path, outside, set(sys.modules) - before)
        sys.path[:] = outside
        _take_out([name for name in space.modules if _leads_elsewhere(name, hidden)], space.modules)
        sys.modules.update(hidden)


def _enter(first: str, last: list[str]) -> Space:
    last = [folder for folder in dict.fromkeys(last) if folder != first]
    space = _spaces.setdefault((first, *last), Space([first], last))
    for other in _spaces.values():
        if other is not space:
            other.leave()
    if space.changed:
        space.forget()
    importlib.invalidate_caches()  # files may have been added since
    if _Latecomers not in sys.meta_path:
        sys.meta_path.append(_Latecomers)
    _Latecomers.space = space
    return space


def _hidden(space: Space) -> dict[str, ModuleType]:
    """Return the loaded modules that neighbours of the same name hide."""
    names = {name.partition(".")[0] for name in sys.modules} - _KEPT
    own = {name for name in names if _is_file(PathFinder.find_spec(name, space.first))}
    inside = tuple(folder + os.sep for folder in space.first)
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in own}
    return {name: module for name, module in loaded.items() if not (_file(module) or "").startswith(inside)}


def _is_file(spec: ModuleSpec | None) -> bool:
    """Return whether a module or regular package was found; a mere folder of that name hides nothing."""
    return spec is not None and spec.origin is not None


def _leads_elsewhere(name: str, hidden: dict[str, ModuleType]) -> bool:
    """Return whether the name means another module to all other code."""
    top = name.partition(".")[0]
    finders = [finder for finder in sys.meta_path if finder is not _Latecomers and hasattr(finder, "find_spec")]
    return top in hidden or any(_is_file(finder.find_spec(top, None)) for finder in finders)


def _take_out(names: Iterable[str], modules: dict[str, ModuleType]) -> None:
    for name in names:
        if sys.modules.get(name) is modules[name]:
            del sys.modules[name]


def _file(module: ModuleType) -> str | None:
    """Return the origin of a module: its file, or the folder of a package without one."""
    where = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return os.path.realpath(where) if isinstance(where, str) else None


def _digest(file: str) -> bytes:
    try:
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:  # a folder, or a file that has gone
        return b""
