"""Explanations as HTML: one file, images and style inside it, no script."""

import base64
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from jaxrel.report import colours, texts
from jaxrel.report.heat import drawn_map, fit, png
from jaxrel.report.panels import Column, Explanations, Panel, columns, rows, shown_image

_CELL = 320

# A notebook keeps what it shows; beyond this many examples it would grow by megabytes.
_FRAGMENT_EXAMPLES = 8

# Every rule is below .jaxrel, so that a notebook's own style stays as it is.
_STYLE = """
.jaxrel { --ink: #1c2024; --muted: #60646c; --line: #dee1e6; --paper: #ffffff; --tint: #f6f7f9;
  --flagged: #b3261e;
  color-scheme: light dark; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
@media (prefers-color-scheme: dark) {
  .jaxrel { --ink: #edeef0; --muted: #b0b4ba; --line: #3a3f45; --paper: #15171a; --tint: #1d2024;
    --flagged: #ff8a80; }
}
.jaxrel * { box-sizing: border-box; }
.jaxrel h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
.jaxrel h2 { font-size: 1.15rem; line-height: 1.35; margin: 0; overflow-wrap: anywhere; }
.jaxrel h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.jaxrel p { margin: 0; }
.jaxrel .muted { color: var(--muted); font-size: .875rem; overflow-wrap: anywhere; }
.jaxrel .flag { margin-top: .75rem; }
.jaxrel .flagged { color: var(--flagged); font-size: .875rem; overflow-wrap: anywhere; }
.jaxrel mark { color: inherit; background: none;
  text-decoration: underline dashed var(--flagged) 2px;
  text-underline-offset: .25em; }
.jaxrel section { border-top: 1px solid var(--line); margin-top: 1.75rem; padding-top: 1.25rem; }
.jaxrel .columns { display: grid; gap: .5rem 1.5rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 320px)); }
.jaxrel .column { display: grid; grid-row: span 2; grid-template-rows: subgrid; min-width: 0;
  padding-bottom: .75rem; }
.jaxrel img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
.jaxrel .bar { height: 10px; margin-top: .6rem; border: 1px solid var(--line);
  border-radius: 3px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.jaxrel .ticks { display: flex; justify-content: space-between; color: var(--muted);
  font-size: .8125rem; font-variant-numeric: tabular-nums; }
.jaxrel .ticks span { flex: 1; text-align: center; }
.jaxrel .ticks span:first-child { text-align: left; }
.jaxrel .ticks span:last-child:not(:first-child) { text-align: right; }
.jaxrel .words { display: flex; flex-wrap: wrap; gap: 4px; margin-top: .75rem; }
.jaxrel .word { padding: 1px 6px; border-radius: 4px; border: 1px solid var(--line);
  overflow-wrap: anywhere; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.jaxrel .scroll { overflow-x: auto; margin-top: .75rem; }
.jaxrel table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
.jaxrel th, .jaxrel td { text-align: left; vertical-align: top; padding: .35rem 1.25rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.jaxrel th[scope=row] { color: var(--muted); font-weight: 400; }
@media print {
  .jaxrel { --ink: #000; --muted: #444; --line: #bbb; --paper: #fff; --flagged: #a00;
    font-size: 11pt; }
  .jaxrel .columns { grid-template-columns: repeat(3, 1fr); }
  .jaxrel section, .jaxrel tr { break-inside: avoid; }
}
"""

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; }
body.jaxrel { min-height: 100vh; }
main { max-width: 1400px; margin: 0 auto; padding: 2.5rem 2rem 3rem; }
@media print { main { padding: 1rem 0 0; } }
"""


def page(explanations: Explanations, *, title: str = "Relevance") -> str:
    """Explanations of the same inputs side by side, as one HTML file that needs no other.

    All text is escaped; there is no script and no reference to anything outside the file.

    Args:
      explanations: one, or several of the same inputs (one per method).
      title: the heading.

    Returns:
      An HTML 5 document.

    Raises:
      ValueError: the list is empty, or they explain different inputs.
    """
    checked = columns(explanations)
    heading = _escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{_STYLE}{_PAGE_STYLE}</style>\n</head>\n"
        f'<body class="jaxrel">\n<main>\n<header>\n<h1>{heading}</h1>\n'
        f"{_summary(checked)}</header>\n"
        f"{_examples(rows(checked))}{_table(checked)}"
        "</main>\n</body>\n</html>\n"
    )


def fragment(explanations: Explanations) -> str:
    """The page's content as an element to be shown in a notebook; its first 8 examples.

    Args:
      explanations: one, or several of the same inputs (one per method).

    Returns:
      A `div` with its own style.

    Raises:
      ValueError: the list is empty, or they explain different inputs.
    """
    checked = columns(explanations)
    every = rows(checked)
    first = every[:_FRAGMENT_EXAMPLES]
    rest = f'<p class="muted">The first {len(first)} of {len(every)} examples.</p>'
    return (
        f'<div class="jaxrel"><style>{_STYLE}</style>{_summary(checked)}'
        f"{_examples(first)}{rest if len(first) < len(every) else ''}{_table(checked)}</div>"
    )


def _summary(columns: Sequence[Column]) -> str:
    methods = ", ".join(dict.fromkeys(column.title for column in columns))
    about = [
        ("Model", texts.models(columns)),
        ("Method" if len(columns) == 1 else "Methods", methods),
    ]
    text = " · ".join(f"{name}: {_escape(value)}" for name, value in about if value)
    legend = texts.legend(columns)
    return f'<p class="muted">{text}</p>\n<p class="muted">{legend}</p>\n'


def _examples(every: Sequence[Sequence[Panel]]) -> str:
    return "".join(map(_example, every))


def _example(row: Sequence[Panel]) -> str:
    start, flagged = map(escape, texts.target(row))
    marked = f"<mark>{flagged}</mark>" if flagged else ""
    shown = shown_image(row)
    cells = [_cell(panel, shown) for panel in row]
    if shown is not None:
        image = _img(fit(shown, _CELL), f"The image explained for: {start}{flagged}")
        cells.insert(0, _titled("input", image))
    score = _escape(texts.score(row))
    return (
        f'<section>\n<h2>{start}{marked}</h2>\n<p class="muted">score {score}</p>\n'
        f'<div class="columns">\n{"".join(cells)}</div>\n</section>\n'
    )


def _cell(panel: Panel, shown: np.ndarray | None) -> str:
    method = _escape(panel.title)
    parts = []
    if panel.map is not None:
        drawn = drawn_map(panel.map, shown, _CELL, signed=panel.signed)
        alt = f"Relevance of the image by {method}, for: {_escape(panel.target)}"
        parts.append(_img(drawn, alt))
        parts.append(_bar(colours.scale(panel.map), panel.signed))
    if panel.words:
        values = np.array([relevance for _, relevance in panel.words])
        parts.append(_words(panel.words, values, panel.signed))
        parts.append(_bar(colours.scale(values), panel.signed))
    if panel.flag:
        look = "flagged" if panel.flagged else "muted"
        parts.append(f'<p class="flag {look}">{_escape(panel.flag)}</p>')
    return _titled(method, "".join(parts))


def _titled(head: str, body: str) -> str:
    return f'<div class="column"><h3>{head}</h3><div>{body}</div></div>\n'


def _words(words: Sequence[tuple[str, float]], values: np.ndarray, signed: bool) -> str:
    shades = colours.colour(colours.normalise(values, colours.scale(values)), signed=signed)
    spans = [
        f'<span class="word" title="{texts.number(relevance, 3)}" style="background:'
        f'{colours.hex_code(shade)};color:{colours.ink(shade)}">{_escape(word)}</span>'
        for (word, relevance), shade in zip(words, shades, strict=True)
    ]
    return f'<div class="words">{" ".join(spans)}</div>'


def _bar(limit: float, signed: bool) -> str:
    ticks = "".join(f"<span>{tick}</span>" for tick in texts.ticks(limit, signed=signed))
    return (
        f'<div class="bar" style="background:{colours.gradient(signed=signed)}"></div>'
        f'<div class="ticks">{ticks}</div>'
    )


def _table(columns: Sequence[Column]) -> str:
    entries = texts.table(columns)
    if not entries:
        return ""
    heads = "".join(f'<th scope="col">{_escape(column.title)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{_escape(name)}</th>'
        f"{''.join(f'<td>{_escape(text)}</td>' for text in cells)}</tr>\n"
        for name, cells in entries
    )
    return (
        '<section>\n<h2>Report</h2>\n<div class="scroll"><table>\n'
        f"<thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n"
        "</section>\n"
    )


def _img(pixels: np.ndarray, alt: str) -> str:
    """An image with its PNG inside; `alt` is escaped already."""
    height, width = pixels.shape[:2]
    data = base64.b64encode(png(Image.fromarray(pixels))).decode()
    return f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{alt}">'


def _escape(text: str) -> str:
    return escape(texts.clean(text))
