"""Self-contained HTML pages: no scripts, nothing fetched from elsewhere; light and dark, wide and narrow."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prunekit.report.provenance import made
from prunekit.report.text import for_html

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b2430; --soft: #5b6775; --line: #dfe4ea; --tint: #f4f6f8;
  --before: #b8c2cd; --after: #2563eb; --s0: #2563eb; --s1: #d9480f; --s2: #2b8a3e; --s3: #9c36b5; --s4: #0c8599;
  --s5: #a61e4d; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6eaef; --soft: #9aa7b5; --line: #2f3742;
  --tint: #1c2229; --before: #4b5866; --after: #6ea0ff; --s0: #6ea0ff; --s1: #ff9b66; --s2: #69db7c; --s3: #da93f0;
  --s4: #66d9e8; --s5: #faa2c1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; color: var(--soft); overflow-wrap: anywhere; }
.wide { overflow-x: auto; background: linear-gradient(90deg, var(--paper) 30%, transparent) left,
  linear-gradient(270deg, var(--paper) 30%, transparent) right,
  linear-gradient(90deg, var(--line), transparent) left, linear-gradient(270deg, var(--line), transparent) right;
  background-repeat: no-repeat; background-size: 3rem 100%, 3rem 100%, 1rem 100%, 1rem 100%;
  background-attachment: local, local, scroll, scroll; } /* a shade where a table goes on */
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.t { min-width: 6rem; } td.i { color: var(--soft); width: 1%; }
@media (min-width: 40rem) { td.t:first-child { white-space: nowrap; } }
tbody tr:hover { background: var(--tint); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--tint); border-radius: .5rem; padding: .75rem 1rem; }
.card b { display: block; font-size: 1.25rem; } .card img { display: block; margin-bottom: .25rem; }
.card span { color: var(--soft); font-size: .875rem; }
.charts { display: grid; margin-top: 1.5rem; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.charts > div { max-width: 44rem; }
.both { display: flex; align-items: center; gap: .5rem; } .both > span:first-child { flex: none; width: 6.5rem; }
.both > span:last-child { flex: auto; min-width: 4rem; }
.bar { display: block; height: .7rem; background: var(--before); border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--after); border-radius: 2px; }
.w { min-width: 12rem; width: 32%; }
.key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.key svg { display: inline-block; width: .9rem; height: .9rem; margin-right: .35rem; vertical-align: -.1rem; }
footer { margin-top: 2.5rem; padding-top: .75rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .875rem; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
.heat th, .heat td { padding: .2rem .3rem; white-space: nowrap; } .heat td.t { min-width: 0; }
table.heat { width: auto; } .heat .n { min-width: 1.75rem; } /* empty columns are as wide as others */
.heat .right { background: rgb(37 99 235 / calc(var(--share) * .45)); }
.heat .wrong { background: rgb(217 72 15 / calc(.12 + var(--share) * .7)); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 15px system-ui, sans-serif; }
svg .axis { stroke: var(--line); }
svg .reference { stroke: var(--soft); stroke-dasharray: 5 4; }
svg .over { paint-order: stroke; stroke: var(--paper); stroke-width: 5px; }
svg .title { fill: var(--ink); font-weight: 600; font-size: 16px; }
svg .mark { fill: var(--paper); font-weight: 700; font-size: 11px; }
.fb { fill: var(--before); background: var(--before); } .lb { stroke: var(--before); fill: none; }
""" + "\n".join(
    f".f{i} {{ fill: var(--s{i}); background: var(--s{i}); }} .l{i} {{ stroke: var(--s{i}); fill: none; }}"
    for i in range(6)
)

_UNIT = re.compile(r"(?<=\d) (?=(?:%|[KMGT]B?|B|ms)(?!\w))")  # between a figure and its unit


def page(title: str, parts: Sequence[str], *, about: str = "") -> str:
    """Return a whole page; `parts` are pieces of HTML, one below the other.

    At the end stands what the figures are `about`, with the version and the date.
    """
    foot = "; ".join(filter(None, (about, made())))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{for_html(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{for_html(title)}</h1>\n" + "\n".join(parts) + f"\n<footer>{for_html(foot)}</footer>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """Return the heading of a section."""
    return f"<h2>{for_html(text)}</h2>"


def paragraph(text: str) -> str:
    """Return a paragraph of explanation."""
    return f"<p>{_unbroken(text)}</p>"


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """Return a row of prominent figures, given as (label, figure)."""
    inner = "".join(
        f'<div class="card"><b>{_unbroken(figure)}</b><span>{_unbroken(what)}</span></div>' for what, figure in facts
    )
    return f'<div class="cards">{inner}</div>'


def _unbroken(text: str) -> str:
    """Return text for an element, in which no line ends between a figure and its unit."""
    return _UNIT.sub("&nbsp;", for_html(text))


def charts(pictures: Sequence[str]) -> str:
    """Arrange SVG pictures side by side where there is room."""
    return '<div class="charts">' + "".join(f"<div>{picture}</div>" for picture in pictures) + "</div>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, raw: Sequence[int] = ()) -> str:
    """Return a table with `left` columns of text, then columns of figures; the columns `raw` are HTML already.

    A first column without a name numbers the rows.
    """
    kinds = ["w" if i in raw else "t" if i < left else "n" for i in range(len(columns))]
    if not columns[0]:
        kinds[0] = "i"
    head = "".join(f'<th class="{kind}">{for_html(text)}</th>' for kind, text in zip(kinds, columns, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{cell if kind == "w" else for_html(cell)}</td>'
            for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(text: str, whole: float, part: float) -> str:
    """Return a figure and a bar: `whole` is its share (0 to 1) of the full width, `part` the bright share of that."""
    inner = f'<span class="bar" style="width:{100 * whole:.1f}%"><i style="width:{100 * part:.1f}%"></i></span>'
    return f'<span class="both"><span>{for_html(text)}</span><span>{inner}</span></span>'


def folded(summary: str, content: str) -> str:
    """Return content that is folded until clicked."""
    return f"<details><summary>{for_html(summary)}</summary>{content}</details>"
