"""Does the device suite notice a forgotten `.to(device)`? Each is deleted in turn, and the tests are run against it.

    python tools/device_mutants.py --json mutants.json
    python tools/device_mutants.py --only methods/manidp --limit 20

A mutant is `src/prunekit` with one `.to(…)`, `.cpu()` or `device=…` deleted. Torch is imported once; each mutant runs
in a fork, in which its file is compiled anew, against the tests that run the line: these are found first, by a run of
the suite that notes which tests reach which of these lines. What was tried stays in the file of `--json`, so that the
same command goes on.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SUITE = ROOT / "src" / "prunekit", ROOT / "tests" / "devices"
_SECONDS = 240  # a mutant that does not end counts as caught


@dataclass(frozen=True)
class Mutant:
    """A file with the characters from `start` to `end` of its text left out; they begin in `line`."""

    path: str
    line: int
    start: int
    end: int
    said: str

    def text(self) -> str:
        """The file as it is then."""
        text = (SOURCE / self.path).read_bytes()
        return (text[: self.start] + text[self.end :]).decode()


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a file that still are Python."""
    content = path.read_bytes()
    starts = [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    for node in ast.walk(ast.parse(content)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cpu") and _moves(node):
            value = node.func.value
            start, end = place(value.end_lineno or 0, value.end_col_offset or 0), _end(node, place)
            found.append((node.func.value.end_lineno or 0, start, end))
        for keyword in node.keywords:
            if keyword.arg == "device" and not _nothing(keyword.value):
                start, end = place(keyword.lineno, keyword.col_offset), _end(keyword, place)
                while content[end : end + 1] in (b",", b" "):
                    end += 1
                found.append((keyword.lineno, start, end))
    name = path.relative_to(SOURCE).as_posix()
    every = [Mutant(name, line, a, b, " ".join(content[a:b].decode().split())) for line, a, b in found]
    return [mutant for mutant in every if _parses(mutant)]


def _end(node: ast.expr | ast.keyword, place: Any) -> int:
    end: int = place(node.end_lineno, node.end_col_offset)
    return end


def _moves(call: ast.Call) -> bool:
    """Whether `.to(…)` may move: it does not where all it is given is a type, a layout, or the meta device."""
    said = ast.unparse(call)
    kept = ("dtype", "memory_format", "float32", "float64", "self._kind", "'meta'", "self.kind", "kind)")
    return not any(word in said.rpartition(".to(")[2] for word in kept)


def _nothing(value: ast.expr) -> bool:
    """Whether `device=…` asks for no place where anything is computed."""
    return ast.unparse(value) in ("'meta'", "_META", "None")


def _parses(mutant: Mutant) -> bool:
    try:
        ast.parse(mutant.text())
    except SyntaxError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose path begins so")
    parser.add_argument("--limit", type=int, help="a sample of so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("mutants.json"))
    args = parser.parse_args()
    mutants = [m for path in sorted(SOURCE.rglob("*.py")) for m in mutants_of(path) if m.path.startswith(args.only)]
    total = len(mutants)
    random.Random(args.seed).shuffle(mutants)
    done: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    prepare()
    if "reached" not in done:
        done["reached"] = reached()
        args.json.write_text(json.dumps(done, indent=1))
    for mutant in mutants[: args.limit]:
        key = f"{mutant.path}:{mutant.line}:{mutant.start} {mutant.said}"
        if key not in done:
            tests = done["reached"].get(f"{mutant.path}:{mutant.line}", [])
            done[key] = "never run" if not tests else "caught" if caught(mutant, tests) else "survived"
            args.json.write_text(json.dumps(done, indent=1))
            print(done[key], key, flush=True)
    tried = {key: said for key, said in done.items() if key != "reached"}
    count = {said: list(tried.values()).count(said) for said in ("caught", "survived", "never run")}
    print(f"{total} mutants, {len(tried)} tried: {count}; caught {count['caught'] / max(1, len(tried)):.1%}")


def prepare() -> None:
    """Import what every fork needs."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(SUITE)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401


def reached() -> dict[str, list[str]]:
    """The tests that run each line in which a mutant begins, the quickest first; measured in a fork."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        watch = _Watch()
        _quiet(lambda: _pytest([str(SUITE)], [watch]))
        with os.fdopen(writing, "w") as stream:
            json.dump(watch.tests(), stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        found: dict[str, list[str]] = json.load(stream)
    os.waitpid(child, 0)
    return found


class _Watch:
    """A plug-in of pytest that notes which tests run the lines of mutants."""

    def __init__(self) -> None:
        files = {str(path): path for path in SOURCE.rglob("*.py")}
        self._lines = {name: {m.line for m in mutants_of(path)} for name, path in files.items()}
        self._seen: dict[str, dict[str, float]] = {}
        self._now: set[str] = set()

    def _trace(self, frame: Any, _event: str, _argument: Any) -> Any:
        wanted = self._lines.get(frame.f_code.co_filename)
        if not wanted:
            return None

        def line(inner: Any, event: str, _: Any) -> Any:
            if event == "line" and inner.f_lineno in wanted:
                path = Path(inner.f_code.co_filename).relative_to(SOURCE).as_posix()
                self._now.add(f"{path}:{inner.f_lineno}")
            return line

        first, last = frame.f_code.co_firstlineno, max(number or 0 for *_, number in frame.f_code.co_lines())
        return line if any(first <= number <= last for number in wanted) else None

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep what a test ran, with the time that it took."""
        if report.when == "call" and report.passed:
            for place in self._now:
                self._seen.setdefault(place, {})[report.nodeid] = report.duration
        if report.when == "teardown":
            self._now = set()

    def pytest_runtest_call(self) -> None:
        """Start to look."""
        self._now = set()
        sys.settrace(self._trace)

    def pytest_runtest_teardown(self) -> None:
        """Stop to look."""
        sys.settrace(None)

    def tests(self) -> dict[str, list[str]]:
        return {place: sorted(times, key=lambda name: times[name]) for place, times in self._seen.items()}


def caught(mutant: Mutant, tests: list[str]) -> bool:
    """Whether one of the tests fails with the mutant; in a fork."""
    child = os.fork()
    if not child:
        signal.alarm(_SECONDS)
        _replace(mutant)
        failed = _quiet(lambda: _pytest(["-x", *(f"{ROOT}/{name}" for name in tests)], []))
        os._exit(1 if failed else 0)
    _, status = os.waitpid(child, 0)
    return status != 0


def _replace(mutant: Mutant) -> None:
    """Let the import of this file give the mutant."""
    from importlib.machinery import SourceFileLoader

    plain = SourceFileLoader.get_code
    target, text = str(SOURCE / mutant.path), mutant.text()

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        return compile(text, target, "exec") if self.path == target else plain(self, fullname)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def _pytest(arguments: list[str], plugins: list[Any]) -> int:
    import pytest

    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-n", "0", "--rootdir", str(ROOT), *arguments], plugins))


def _quiet(run: Any) -> int:
    """Call with the streams of the process sent nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    found: int = run()
    return found


if __name__ == "__main__":
    main()
