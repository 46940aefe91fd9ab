"""What there is to do, by name: `nox -s check test`, `nox -s docs`, `nox -s bench -- surgery run`.

Sessions run in the environment that nox itself is installed in (`pip install -e ".[dev]"`), so that nothing as large as
PyTorch is installed twice. Only `docs` has an environment of its own: it reads the source without importing it.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent

nox.options.default_venv_backend = "none"
nox.options.sessions = ["check", "test"]


def python(session: nox.Session, *arguments: str) -> None:
    """Run a module or script with the Python that runs nox."""
    session.run(sys.executable, *arguments)


@nox.session
def check(session: nox.Session) -> None:
    """Format, lint and types, as CI checks them."""
    python(session, "-m", "ruff", "format", "--check", ".")
    python(session, "-m", "ruff", "check", ".")
    python(session, "-m", "mypy")
    python(session, "-m", "mypy", "--config-file", "tests/mypy.ini")


@nox.session
def test(session: nox.Session) -> None:
    """The tests, one worker a core; what follows `--` goes to pytest, such as `--cov` or `-m slow`."""
    python(session, "-m", "pytest", *session.posargs)


@nox.session(venv_backend="venv")
def docs(session: nox.Session) -> None:
    """Build the site into `site/`, any broken link an error; `-- serve` shows it while it is written."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    session.install(*project["optional-dependencies"]["docs"])
    session.run("mkdocs", *(session.posargs or ("build", "--strict")), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Run `benchmarks/NAME.py` with its arguments: `-- NAME ARGUMENTS`; without a name, list what there is."""
    if session.posargs:
        name, *arguments = session.posargs
        python(session, f"benchmarks/{name}.py", *arguments)
        return
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text:
            session.log(f"{path.stem}: {(ast.get_docstring(ast.parse(text)) or '').splitlines()[0]}")
