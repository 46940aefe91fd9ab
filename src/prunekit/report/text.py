"""Escaping of names from files and folders for display: one function for each kind of output.

Whoever made a file chose its names. A terminal obeys escape sequences, a spreadsheet computes cells that begin with
`=`, a page renders anything that looks like a tag, and characters that turn the text direction disguise a name.
"""

from __future__ import annotations

import html
import re
import unicodedata

# Controls, formats such as text direction marks, and line separators; not the joiners that some scripts need.
_UNPRINTABLE = {"Cc", "Cf", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"

# Characters that begin a formula in a spreadsheet, in either width.
_FORMULA = re.compile(r"[=+\-@\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+\-]?(\d[\d,]*\.?\d*|\.\d+)([eE][+\-]?\d+)?%?")
_MARKDOWN = re.compile(r"[\\`*\[\]|]")


def printable(text: str, *, keep: str = "") -> str:
    """Escape control characters as in Python (`\\x1b`, `\\u202e`), except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNPRINTABLE and character not in _JOINERS + keep
        else character
        for character in text
    )


def for_html(text: str) -> str:
    """Escape text for an element or a quoted attribute of HTML and SVG."""
    return html.escape(printable(text), quote=True)


def for_markdown(text: str) -> str:
    """Escape text for a cell of a table in Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(printable(text), quote=False))


def for_csv(value: object) -> object:
    """Escape a cell of comma-separated values: text that a spreadsheet would compute is marked as text."""
    if not isinstance(value, str):
        return "" if value is None else value
    shown = printable(value)
    computes = _FORMULA.match(shown) and not _NUMBER.fullmatch(shown)
    return f"'{shown}" if computes else shown
