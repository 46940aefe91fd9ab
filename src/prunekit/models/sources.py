"""Source files of an architecture in a user's file: that file and the neighbours that it imports."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from prunekit.errors import InputError


def read_source(path: Path) -> bytes:
    """Return the content of a source file; raise `InputError` where it is missing."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the architecture's code: {path}: {error.strerror}",
            hint="arch (--arch) says where it is now: path/to/file.py:callable",
        ) from error


def source_digests(path: Path) -> tuple[str, str]:
    """Return the SHA-256 of the code in `path` with its neighbours, and of the file alone, as older artefacts store it.

    Both are the same where the file imports no neighbours. The location of the files does not matter.
    """
    alone = hashlib.sha256(read_source(path))
    others = [hashlib.sha256(read_source(file)).digest() for file in neighbours_of(path.resolve())]
    together = hashlib.sha256(alone.digest() + b"".join(others)) if others else alone
    return together.hexdigest(), alone.hexdigest()


def depth_of_relative_imports(source: bytes) -> int:
    """Return how many packages the code must lie in: the most dots before an imported name, 0 without any."""
    return max((node.level for node in _nodes(source) if isinstance(node, ast.ImportFrom)), default=0)


def packages_around(folder: Path, depth: int) -> list[Path]:
    """Return `folder` and those around it: the packages that it is in, at least `depth` of them, and their parent."""
    found = [folder]
    while ((found[-1] / "__init__.py").is_file() or len(found) <= depth) and found[-1].parent != found[-1]:
        found.append(found[-1].parent)
    return found


def neighbours_of(file: Path) -> list[Path]:
    """Return the files that `file` imports from its folder and the packages around it, and recursively their imports.

    They are found by reading, in the order of the imports; names that are composed at run time are not seen.
    """
    folders = packages_around(file.parent, depth_of_relative_imports(read_source(file)))
    found, waiting = {file: None}, [file]
    while waiting:
        here = waiting.pop(0)
        new = [other for other in _imported(here, folders) if other not in found]
        found.update(dict.fromkeys(new))
        waiting += new
    return list(found)[1:]


def _imported(file: Path, folders: list[Path]) -> Iterator[Path]:
    for node in _nodes(read_source(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(folders, alias.name)
        elif isinstance(node, ast.ImportFrom):
            roots = [file.parents[node.level - 1]] if 0 < node.level <= len(file.parents) else folders
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
            for name in names:
                yield from _files(roots, name)


def _files(roots: list[Path], name: str) -> Iterator[Path]:
    """Yield the module `name` and the packages that it is in, from the first of the folders that has any of them."""
    parts = name.split(".")
    for root in roots:
        places = [root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
        choices = [(place / "__init__.py", place.with_name(f"{place.name}.py")) for place in places]
        found = [next((file for file in choice if file.is_file()), None) for choice in choices]
        if any(found):
            yield from (file for file in found if file is not None)
            return


def _nodes(source: bytes) -> list[ast.AST]:
    """Return the syntax nodes of a file; none where it has errors, which importing it reports better."""
    try:
        return list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return []
