"""Explanations as HTML: one file that needs no other, with its own style, script and numbers.

Without its script the page shows still maps; the script replaces them by one compact view per
input. All text is escaped; the page's security policy allows this style and script alone.
"""

import base64
import functools
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources

import numpy as np

from jaxrel.report import colours, encode, texts
from jaxrel.report.panels import (
    Column,
    Explanations,
    Panel,
    Row,
    columns,
    named,
    shown_image,
    views,
)
from jaxrel.report.places import summary
from jaxrel.report.views import as_json, caption_words

# A page holds the first of many examples; a folder of files holds all: `jaxrel batch`.
MOST = 100

# A notebook keeps what it shows; beyond this many examples it would grow by megabytes.
_FRAGMENT_EXAMPLES = 8

# Words are coloured by classes: the page's policy allows no style on an element.
_SHADES = 12


def page(explanations: Explanations, *, title: str | None = None) -> str:
    """Explanations of the same inputs, as one HTML file that needs no other and no network.

    An input is one view: the image with its map and words; a caption is one too, with its words
    as buttons. One chooses the method, the scale and more; values are told on hover and focus.
    Still maps are there without script. More than 100 inputs are cut, and the page says so.

    Args:
      explanations: one, or several of the same inputs (one per method).
      title: the heading; by default, what is explained, in which file, by which model.

    Returns:
      An HTML 5 document.

    Raises:
      ValueError: the list is empty, or they explain different inputs.
    """
    return _page(columns(explanations), title, MOST)


def fragment(explanations: Explanations) -> str:
    """The page as an element to be shown in a notebook; its first 8 examples.

    Args:
      explanations: one, or several of the same inputs (one per method).

    Returns:
      A `div` with the page in an `iframe`: several in a notebook do not disturb each other.

    Raises:
      ValueError: the list is empty, or they explain different inputs.
    """
    checked = columns(explanations)
    content = escape(_page(checked, None, _FRAGMENT_EXAMPLES))
    name = escape(texts.title(checked))
    return (
        f'<div class="jaxrel"><iframe title="{name}" srcdoc="{content}" width="100%" '
        'height="640" style="border: 0"></iframe></div>'
    )


def _page(checked: Sequence[Column], title: str | None, most: int) -> str:
    every = views(checked)
    shown = every[:most]
    heading = _escape(texts.title(checked) if title is None else title)
    rest = ""
    if len(shown) < len(every):
        rest = f'<p class="note">{_escape(texts.cut(len(shown), len(every)))}</p>\n'
    articles = "".join(_view(i, view, checked, len(every) > 1) for i, view in enumerate(shown))
    style, script = _style(), _file("view.js")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n<header>\n<h1>{heading}</h1>\n"
        f"{_summary(checked)}{rest}</header>\n"
        f"{articles}{_methods(checked)}{_table(checked)}"
        f'</main>\n<script type="application/json" id="data">{as_json(checked, shown)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _policy(style: str, script: str) -> str:
    """What the page may load: its own style and script, and images that are inside it."""
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    return (
        "default-src 'none'; img-src data:; "
        f"style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _file(name: str) -> str:
    return resources.files("jaxrel.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _style() -> str:
    """The stylesheet, with a class per shade of relevance and the colour tables of bars."""
    rules = []
    for letter, signed in (("u", False), ("s", True)):
        steps = np.arange(-_SHADES if signed else 0, _SHADES + 1)
        shades = colours.colour(steps / _SHADES, signed=signed)
        rules += [
            f".{letter}{step} {{ background: {colours.hex_code(rgb)}; color: {colours.ink(rgb)}; }}"
            for step, rgb in zip(steps.tolist(), shades, strict=True)
        ]
        bar = ".bar.signed i" if signed else ".bar i"
        rules.append(f"{bar} {{ background: {colours.gradient(signed=signed)}; }}")
    return _file("view.css") + "\n".join(rules) + "\n"


def _summary(columns: Sequence[Column]) -> str:
    names = ", ".join(dict.fromkeys(column.title for column in columns))
    about = [
        ("Model", texts.models(columns)),
        ("Method" if len(columns) == 1 else "Methods", names),
    ]
    text = " · ".join(f"{name}: {_escape(value)}" for name, value in about if value)
    legend = f'{texts.legend(columns)} <span id="scale">{texts.OWN_SCALE}</span>'
    return f'<p class="muted">{text}</p>\n<p class="muted">{legend}</p>\n'


def _view(index: int, view: Sequence[Row], columns: Sequence[Column], several: bool) -> str:
    """An input: its heading, what to know, a place for the script, and still maps."""
    last = view[-1]
    # Of one input, the page's title names the file.
    below = [texts.source(last)] if several else []
    if last[0].caption is not None:
        heading = _escape(" ".join(word for word, _, _ in caption_words(view)))
    else:
        start, flagged = map(escape, texts.target(last))
        asked = _escape(dict(last[0].about).get("question", ""))
        heading = f"{asked} " * bool(asked) + start + (f"<mark>{flagged}</mark>" * bool(flagged))
        below.append(f"score {texts.score(last)}")
    told = _escape(" · ".join(filter(None, below)))
    line = f'<p class="muted" id="input{index}">{told}</p>\n' * bool(told)
    notes = "".join(f'<p class="note" role="note">{_escape(x)}</p>\n' for x in _notes(view))
    kind = "view words-of" if last[0].caption is not None else "view"
    return (
        f'<article class="{kind}" aria-labelledby="target{index}{f" input{index}" * bool(told)}">\n'
        f'<h2 id="target{index}">{heading}</h2>\n{line}{notes}'
        f'<div class="live" hidden></div>\n'
        f'<div class="still">{_stills(index, view, columns)}</div>\n'
        f"{_about(last[0].about)}</article>\n"
    )


def _notes(view: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(note for row in view for panel in row for note in panel.notes))


def _about(entries: Sequence[tuple[str, str]]) -> str:
    if not entries:
        return ""
    pairs = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(text)}</dd>" for name, text in entries)
    return f"<details><summary>About this input</summary><dl>{pairs}</dl></details>\n"


def _stills(index: int, view: Sequence[Row], columns: Sequence[Column]) -> str:
    """Figures that need no script: the image, and every map over it; of words, of one method."""
    shown = shown_image(view[0])
    photo, figures = "", []
    if shown is not None:
        height, width = shown.shape[:2]
        alt = _escape(f"The image as the model saw it, for: {view[-1][0].target}")
        photo = (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">'
            f"<defs>{_image(f'pale{index}', shown.shape, encode.below(shown))}</defs>"
            f"{_image(f'photo{index}', shown.shape, encode.photograph(shown))}</svg>"
        )
        figures.append(f"<figure>{photo}<figcaption>input</figcaption></figure>\n")
    alone = view[-1][0].caption is None
    for row in view:
        for panel, name in zip(row if alone else row[:1], named(columns), strict=False):
            figures.append(_still(index, panel, name if alone else panel.word, shown))
    return f'<div class="stills">\n{"".join(figures)}</div>'


def _image(name: str, shape: tuple[int, ...], url: str) -> str:
    height, width = shape[:2]
    return (
        f'<image id="{name}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none" href="{url}"/>'
    )


def _still(index: int, panel: Panel, name: str, shown: np.ndarray | None) -> str:
    """One map over the image of its view, with its words, and where its relevance lies."""
    said = _escape(f"{name}: {summary(panel)}")
    parts = []
    if panel.map is not None:
        height, width = panel.map.shape if shown is None else shown.shape[:2]
        over = "" if shown is None else f'<use href="#pale{index}"/>'
        heat = encode.still(panel.map, signed=panel.signed)
        parts.append(
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{said}">{over}'
            f'<image class="heat" width="{width}" height="{height}" '
            f'preserveAspectRatio="none" href="{heat}"/></svg>'
            f"{_bar(colours.scale(panel.map), panel.signed, over=bool(over))}"
        )
    if panel.words:
        parts.append(_words(panel.words, panel.signed))
    if panel.flag:
        look = "flag" if panel.flagged else "muted"
        parts.append(f'<p class="{look}">{_escape(panel.flag)}</p>')
    return f"<figure>{''.join(parts)}<figcaption>{said}</figcaption></figure>\n"


def _words(words: Sequence[tuple[str, float]], signed: bool) -> str:
    values = np.array([value for _, value in words])
    shares = colours.normalise(values, colours.scale(values))
    spans = [
        f'<span class="word {"s" if signed else "u"}{round(share * _SHADES)}'
        f'{" against" if share < 0 else ""}">{_escape(word)} '
        f"<small>{texts.number(value, 2)}</small></span>"
        for (word, value), share in zip(words, shares.tolist(), strict=True)
    ]
    return f'<div class="words">{" ".join(spans)}</div>{_bar(colours.scale(values), signed)}'


def _bar(limit: float, signed: bool, *, over: bool = False) -> str:
    """The colours as they are drawn, `over` an image or alone, with their numbers beneath."""
    ticks = "".join(f"<span>{tick}</span>" for tick in texts.ticks(limit, signed=signed))
    kind = f"bar{' signed' if signed else ''}{' over' if over else ''}"
    return f'<div class="{kind}"><i></i></div><div class="ticks">{ticks}</div>'


def _methods(columns: Sequence[Column]) -> str:
    """What each method means."""
    pairs = "".join(
        f"<dt>{_escape(name)}</dt><dd>{_escape(column.meaning)}</dd>"
        for name, column in zip(named(columns), columns, strict=True)
        if column.meaning
    )
    if not pairs:
        return ""
    return f"<section>\n<h2>What the methods mean</h2>\n<dl>{pairs}</dl>\n</section>\n"


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
    said = "".join(f"<p>{_escape(line)}</p>\n" for line in texts.balance(columns))
    return (
        f"<section>\n<h2>Report</h2>\n{said}<details><summary>All numbers, to 4 digits</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="All numbers of the report">'
        f"<table>\n<thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
        "</div></details>\n</section>\n"
    )


def _escape(text: str) -> str:
    return escape(texts.clean(text))
