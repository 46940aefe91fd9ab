"""The site holds pages from outside `docs/` as well, and links that work on GitHub work there too.

`ADDED` become pages and pictures of the site. Links to anything else in the repository lead to GitHub.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent
ADDED = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "benchmarks/results/*.png")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what the site shows from elsewhere in the repository."""
    for path in sorted(path for pattern in ADDED for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Say where each relative link leads on the site."""
    folder = Path(page.file.abs_src_path).parent

    def moved(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return link[0]  # mkdocs says that it is broken
        return f"]({_on_site(target, page.file.src_uri, config, files)}{link[2] or ''})"

    return LINK.sub(moved, markdown)


def _on_site(target: Path, page: str, config: Any, files: Files) -> str:
    """The address of a file or folder as `page` writes it."""
    docs = Path(config.docs_dir)
    path = target.relative_to(docs if target.is_relative_to(docs) else ROOT).as_posix()
    if files.get_file_from_path(path) is not None:
        return posixpath.relpath(path, posixpath.dirname(page) or ".")
    kind = "tree" if target.is_dir() else "blob"
    repository = config.extra["repository"]
    return f"{repository}/{kind}/main/{target.relative_to(ROOT).as_posix()}"
