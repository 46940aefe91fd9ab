"""Architectures in the user's own code: `path/to/file.py:callable` and `package.module:callable`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from prunekit.errors import InputError, unknown_name
from prunekit.models.neighbours import importable
from prunekit.models.sources import depth_of_relative_imports, packages_around, read_source


def build(arch: str, args: Mapping[str, Any]) -> nn.Module:
    """Import the code that `arch` names, which runs it, and call the callable with `args`.

    Raises:
        InputError: The code is missing, fails, or returns no `nn.Module`.
    """
    code = _Code.of(arch)
    with code.surroundings(), explained(f"{arch} failed"):
        make = code.callable()
        model = make(**args)
    if not isinstance(model, nn.Module):
        raise InputError(f"{arch} returned {type(model).__name__}, expected an nn.Module")
    return model


def named(where: str) -> object:
    """Import the code that `where` names, which runs it, and return what is called so in it.

    Raises:
        InputError: The code is missing or fails, or there is nothing callable of that name.
    """
    code = _Code.of(where)
    with code.surroundings():
        return code.callable()


def accepts(arch: str, argument: str) -> bool:
    """Return whether the callable accepts a keyword argument of this name."""
    code = _Code.of(arch)
    with code.surroundings():
        parameters = inspect.signature(code.callable()).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def source_file(arch: str) -> Path | None:
    """Return the file of a `path/to/file.py:callable`; None for a module's."""
    where = arch.rpartition(":")[0]
    return Path(where) if where.endswith(".py") else None


@contextlib.contextmanager
def beside(folder: Path | None, arch: str | None = None) -> Iterator[None]:
    """Allow imports from `folder` and the working folder inside, as pickles of whole networks need them.

    Where `arch` names code, its module stands in for the script `__main__` in which a network may have been pickled.
    """
    own = [folder or Path.cwd(), Path.cwd()]
    if arch is None:
        with importable(own[0], own[1:], program=""):
            yield
        return
    code = _Code.of(arch)
    with replace(code, further=(*code.further, *own)).surroundings():
        script, sys.modules["__main__"] = sys.modules["__main__"], code.module()
        try:
            yield
        finally:
            sys.modules["__main__"] = script


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error of third-party code inside, an exit included, into an `InputError` that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except SystemExit as error:
        raise InputError(
            f"{what}: it ended the program (exit status {error.code})",
            hint="what a file does as a script belongs under `if __name__ == '__main__':`",
        ) from error
    except Exception as error:
        raise InputError(f"{what}: {told(error)}", hint=missing_code(error)) from error


@dataclass(frozen=True)
class _Code:
    """A callable of a module, the folders that it imports from, first and last, and its file, where one was named."""

    where: str
    name: str
    folder: Path
    further: tuple[Path, ...]
    module_name: str
    file: Path | None = None

    @classmethod
    def of(cls, arch: str) -> _Code:
        """Parse `arch`. A file with relative imports is a module of its package; any other is a script."""
        where, _, name = arch.rpartition(":")
        path = source_file(arch)
        if path is None:
            return cls(where, name, Path.cwd(), (), where)
        depth = depth_of_relative_imports(read_source(path))
        file = path.resolve()
        packages = packages_around(file.parent, depth)
        root = packages[-1] if depth or file.stem == "__init__" else file.parent
        parts = file.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if file.stem == "__init__" else parts)
        return cls(where, name, root, (*packages, Path.cwd()), module, file)

    def surroundings(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the code finds its neighbours; importing and calling it belong inside."""
        return importable(self.folder, self.further, program=str(self.file or self.where))

    def callable(self) -> Callable[..., Any]:
        """Return the callable, inside `surroundings`.

        Raises:
            InputError: Importing its module fails, or has nothing callable of that name.
        """
        module = self.module()
        found: object = module
        for part in self.name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise unknown_name(f"callable in {self.where}", self.name, public)
        return found

    def module(self) -> ModuleType:
        """Return the module, under the name that its neighbours import it by where that name leads to it."""
        with explained(f"importing {self.where} failed"):
            if self.file is None or _leads_to(self.module_name, self.file):
                return importlib.import_module(self.module_name)
            return _run(self.file)


def _leads_to(name: str, file: Path) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a loaded module without a known origin
        return False
    except ModuleNotFoundError as error:  # a dot in the name of the file, or else a missing import of its package
        if error.name is None or not name.startswith(error.name):
            raise
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file


def _run(file: Path) -> ModuleType:
    """Run the file as a module under a unique name, since it has no importable name or another module has it."""
    name = f"prunekit_user_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses, typing and pickle look up a class's module by its name
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def told(error: Exception) -> str:
    """Describe an error of the user's code in one line, with the last place in it that the error came from."""
    said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OTHERS)]
    if isinstance(error, SyntaxError) or not frames:  # a syntax error names its own place
        return said
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


# Code that is not the user's; frames of the import system have names in angle brackets.
_OTHERS = (
    "<",
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)


def missing_code(error: BaseException) -> str | None:
    """Return what to do where code was not found; None for any other error."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return (
            f"install what brings '{error.name.partition('.')[0]}'; if it is code of your own, run prunekit in the "
            "folder that holds it, or name that folder in PYTHONPATH"
        )
    if isinstance(error, AttributeError) and "__main__" in str(error):
        return (
            "its classes were written in the script that saved it; name that: arch (--arch) path/to/script.py:callable"
        )
    return None
