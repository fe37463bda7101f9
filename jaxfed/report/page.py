"""The frame of a page: one HTML file that asks nobody for anything."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

CONTINUED = " \\\n  "
"""Between the flags of a command that has a line for each."""


def cell(value: Any) -> str:
    """A value as text: four decimals for a number that has any, nothing for None. Escaped."""
    if value is None:
        return ""
    return html.escape(f"{value:.4f}" if isinstance(value, float) else str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, sortable: bool = False) -> str:
    """A table; `sortable` lets the page's script sort it when a column's head is clicked."""
    heads = "".join(f"<th>{cell(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row) + "</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="wide"><table{kind}><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names and values in two columns."""
    rows = "".join(f"<dt>{cell(name)}</dt><dd>{cell(value)}</dd>" for name, value in pairs)
    return f"<dl>{rows}</dl>"


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """The numbers one came for: a name, the number, and what it is of."""
    boxes = "".join(
        f"<div><b>{html.escape(number)}</b><span>{html.escape(name)}</span>"
        f"<small>{html.escape(note)}</small></div>"
        for name, number, note in items
    )
    return f'<div class="tiles">{boxes}</div>'


def section(title: str, *inside: str) -> str:
    """A part of the page under a heading; the arguments after the title are markup."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(inside)}</section>"


def grid(*figures: str) -> str:
    """Charts side by side, or below each other where it is narrow."""
    return f'<div class="charts">{"".join(figures)}</div>'


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(words)}</p>"


def code(words: str) -> str:
    """Something to copy."""
    return f"<pre>{html.escape(words)}</pre>"


def page(title: str, subtitle: str, *sections: str) -> str:
    """The whole file; `sections` are markup."""
    sorts = any('class="sortable"' in section for section in sections)
    script = f"<script>{SORT}</script>" if sorts else ""
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title>
<style>{STYLE}</style></head><body><main>
<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header>
{body}
</main>{script}</body></html>
"""


POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself refuses whatever would ask anybody for anything."""

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1e23; --soft: #5b626d; --line: #dfe2e7; --faint: #c2c8d0;
  --card: #fff; --page: #f4f5f7;
  --k0: #1f6feb; --k1: #d4580a; --k2: #11806a; --k3: #b3348b;
  --k4: #7654cf; --k5: #8a6a00; --k6: #c2323b; --k7: #4f7a12 }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e7e9ed; --soft: #a0a8b4; --line: #343a43; --faint: #505967;
  --card: #1c2026; --page: #121418;
  --k0: #62a0ff; --k1: #ff9a56; --k2: #45c9ab; --k3: #ef83cb;
  --k4: #b39bff; --k5: #dcb63c; --k6: #ff8087; --k7: #9dcb55 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h3 { font-size: .95rem; margin: 1rem 0 .3rem }
h2 { font-size: 1.1rem; margin: 0 0 .6rem }
p { margin: .4rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere }
header p, .none, small { color: var(--soft) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.2rem; margin-top: 1rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem }
.tiles div { display: flex; flex-direction: column }
.tiles b { font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 1.2rem }
figure { margin: 0; min-width: 0 }
figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .2rem }
svg { display: block; width: 100%; max-width: 32rem; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.end { text-anchor: end } .mid { text-anchor: middle }
.grid { stroke: var(--line); fill: none }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.bar { fill: var(--k0) }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; margin: .2rem 0 0;
  color: var(--soft); max-width: none }
.legend i { display: inline-block; width: 1.3em; margin-right: .4em; vertical-align: .25em;
  border-top: 2.5px solid }
.legend .dash { border-top-style: dashed }
.legend .box { width: .8em; height: .8em; border: 0; border-radius: 2px; vertical-align: -.05em }
.share { display: flex; height: .9rem; border-radius: 4px; overflow: hidden }
.share i { min-width: 1px }
.wide { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.heat td { border: 2px solid var(--card); min-width: 4.2rem; text-align: center;
  background: color-mix(in oklab, var(--k0) calc(var(--heat) * 55%), var(--card)) }
.heat th { white-space: normal }
.heat td.empty { background: none }
th button { all: unset; cursor: pointer }
th button:focus-visible { outline: 2px solid var(--k0) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
dl { display: grid; align-content: start; grid-template-columns: minmax(7rem, auto) 1fr;
  gap: .15rem 1rem; margin: 0;
  font-size: .92rem }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
pre { background: var(--page); border-radius: 6px; padding: .8rem; margin: .4rem 0;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; font-weight: 600; margin-top: .8rem }
@media print { section { break-inside: avoid } }
"""

SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const key = row => row.cells[column].textContent;
      const number = row => { const n = parseFloat(key(row)); return isNaN(n) ? -Infinity : n };
      body.append(...[...body.rows].sort((a, b) =>
        sign * (number(a) - number(b) || key(a).localeCompare(key(b)))));
    };
  });
}
"""
