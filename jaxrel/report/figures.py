"""Explanations drawn as one figure, as wide as a page: a row per example, a cell per method.

Of a caption the image is drawn once, and a small map for each of its words. Many examples are
drawn as an overview.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxrel.report import colours, fonts, heat, texts
from jaxrel.report.blocks import (
    Block,
    Box,
    Colour,
    Text,
    beside,
    framed,
    picture,
    raster,
    stack,
    svg,
    wrapped,
)
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

_INK = (28, 32, 36)
_MUTED = (96, 100, 108)
_LINE = (222, 225, 230)
_FLAGGED = (117, 89, 15)

_MARGIN = 32
_GAP = 24
_TITLE, _HEAD, _BODY, _SMALL = 20, 17, 15, 12

# So many cells stand beside each other on a page; more go into the next line.
_CELLS = 4
# More examples than these are drawn as an overview, and of it so many.
MOST, _OVERVIEW = 24, 240
# Pages are drawn with this many pixels per unit, and are as high as A4 is for its width.
_FINE, _ASPECT = 2, 297 / 210


def figure(explanations: Explanations, *, cell: int = 320) -> Image.Image:
    """Draw explanations of the same inputs side by side.

    The first cell shows the input with its target and score. A cell per method follows: the
    image under its heat, the words as coloured boxes, and a colour bar below each; more cells
    than four go into further lines. Each map has its own scale, and what is negative is hatched.
    A caption has its image once, and a small map per word. More than 24 examples are drawn as an
    overview. A flagged word is underlined, and the reason stands below the method's map. The same
    explanations give the same image.

    Args:
      explanations: one, or several of the same inputs (one per method).
      cell: the width of a cell in pixels, at least 80.

    Returns:
      An RGB image.

    Raises:
      ValueError: the list is empty, they explain different inputs, or `cell` is too
        small.
    """
    return raster(_framed(_parts(columns(explanations), cell)))


def drawing(explanations: Explanations, *, cell: int = 320) -> str:
    """The figure as SVG; see `figure`."""
    checked = columns(explanations)
    return svg(_framed(_parts(checked, cell)), texts.title(checked))


def pages(explanations: Explanations, *, cell: int = 320) -> bytes:
    """The figure as PDF, in pages of the shape of A4; see `figure`.

    An example that is higher than a page has a longer page.
    """
    checked = columns(explanations)
    parts = _parts(checked, cell)
    # Narrow figures are not blown up: four cells are as wide as a page.
    width = max(_CELLS * (cell + _GAP) - _GAP, *(part.width for part in parts))
    limit = (width + 2 * _MARGIN) * _ASPECT - 2 * _MARGIN
    filled: list[list[Block]] = [[]]
    for part in parts:
        used = sum(block.height + _GAP for block in filled[-1])
        if filled[-1] and used + part.height > limit:
            filled.append([])
        filled[-1].append(part)
    first, *rest = [raster(_framed(blocks, width, round(limit)), _FINE) for blocks in filled]
    buffer = io.BytesIO()
    # A4 is 8.27 inches wide.
    resolution = first.width / 8.27
    title = texts.title(checked)
    first.save(buffer, "PDF", resolution=resolution, save_all=True, append_images=rest, title=title)
    return buffer.getvalue()


def _framed(parts: Sequence[Block], width: int = 0, height: int = 0) -> Block:
    block = stack(parts, gap=18, width=width)
    return framed(Block(block.width, max(block.height, height), block.marks), _MARGIN)


def _parts(checked: Sequence[Column], cell: int) -> list[Block]:
    """The title, and a block per example: what belongs together on a page."""
    if cell < 80:
        raise ValueError(f"figure: cell is {cell} pixels; words need at least 80 to be legible")
    every = views(checked)
    many = len(every) > MOST
    words = any(view[0][0].caption is not None for view in every)
    cells = _CELLS if many or words else min(_CELLS, len(checked) + 1)
    width = cells * (cell + _GAP) - _GAP
    if many:
        title = texts.overview(min(len(every), _OVERVIEW), len(every), checked[0].title)
        grid = [_overview(view, cell // 2 - _GAP) for view in every[:_OVERVIEW]]
        lines = [grid[i : i + 2 * cells] for i in range(0, len(grid), 2 * cells)]
        found = [beside(line, gap=_GAP) for line in lines]
    else:
        title = ""
        found = [stack([_rule(width), _view(view, checked, cell, width)], gap=18) for view in every]
    return [_head(checked, width, title), *found]


def _head(checked: Sequence[Column], width: int, more: str) -> Block:
    said = [texts.legend(checked), texts.OWN_SCALE, more, _lacking(checked)]
    lines = [_text(line, _SMALL, width, ink=_MUTED) for line in (" ".join(said[:2]), *said[2:])]
    if models := texts.models(checked):
        lines.insert(0, _text(models, _TITLE, width))
    return stack([line for line in lines if line.height], gap=2)


def _lacking(checked: Sequence[Column]) -> str:
    """Which letters no font here draws; "" where all are drawn."""
    shown = "".join(
        text
        for column in checked
        for panel in column.panels
        for text in (panel.target, *(word for word, _ in panel.words))
    )
    letters = fonts.lacking(texts.clean(shown))
    return f"No font on this machine draws {letters}; they are boxes here." if letters else ""


def _view(view: Sequence[Row], checked: Sequence[Column], cell: int, width: int) -> Block:
    if view[0][0].caption is not None:
        return _caption(view, checked, cell, width)
    (row,) = view
    shown = shown_image(row)
    cells = [_input(row, shown, cell)]
    for panel, name in zip(row, named(checked), strict=True):
        cells.append(_cell(panel, texts.clean(name), shown, cell))
    return wrapped(cells, width=width, gap=_GAP)


def _input(row: Row, shown: np.ndarray | None, cell: int) -> Block:
    blocks = [_text("input", _HEAD, cell)]
    if shown is not None:
        blocks.append(picture(heat.fit(shown, cell)))
    start, flagged = texts.target(row)
    blocks.append(_text(start + flagged, _BODY, cell, underlined=flagged))
    blocks.append(_text(f"score {texts.score(row)}", _SMALL, cell, ink=_MUTED))
    return stack(blocks + _about(row, cell), gap=12, width=cell)


def _about(row: Row, cell: int) -> list[Block]:
    """The file, its id and the question, and what to know before reading the map."""
    told = [(name, text) for name, text in row[0].about if name in ("file", "id", "question")]
    lines = [_text(f"{name}: {text}", _SMALL, cell, ink=_MUTED) for name, text in told]
    notes = dict.fromkeys(note for panel in row for note in panel.notes)
    return lines + [_text(note, _SMALL, cell, ink=_FLAGGED) for note in notes]


def _cell(panel: Panel, name: str, shown: np.ndarray | None, cell: int) -> Block:
    blocks = [_text(name, _HEAD, cell)]
    if panel.map is not None:
        blocks.append(picture(heat.drawn_map(panel.map, shown, cell, signed=panel.signed)))
        blocks.append(_bar(colours.scale(panel.map), panel.signed, cell, shown))
    if panel.words:
        words, values = zip(*panel.words, strict=True)
        blocks.append(_words(words, np.array(values), panel.signed, cell))
        blocks.append(_bar(colours.scale(np.array(values)), panel.signed, cell, None))
    if panel.flag:
        ink = _FLAGGED if panel.flagged else _MUTED
        blocks.append(_text(panel.flag, _SMALL, cell, ink=ink))
    return stack(blocks, gap=12, width=cell)


def _caption(view: Sequence[Row], checked: Sequence[Column], cell: int, width: int) -> Block:
    """A caption: its image once, and beside it, by method, a small map per word."""
    shown = shown_image(view[-1])
    told = [_text("input", _HEAD, cell)]
    if shown is not None:
        told.append(picture(heat.fit(shown, cell)))
    told.append(_text(" ".join(map(texts.shown_word, view)), _BODY, cell))
    told += _about(view[-1], cell)
    told += [_text(flag, _SMALL, cell, ink=_FLAGGED) for flag in texts.flags(view)]
    room = width - cell - _GAP
    small = (room + _GAP) // 6 - _GAP
    methods = []
    for i, name in enumerate(named(checked)):
        maps = [_word(row[i], texts.shown_word(row), shown, small) for row in view]
        grid = wrapped(maps, width=room, gap=_GAP)
        methods.append(stack([_text(name, _HEAD, room), grid], gap=8))
    found = [stack(told, gap=8, width=cell), stack(methods, gap=18, width=room)]
    return beside(found, gap=_GAP)


def _word(panel: Panel, word: str, shown: np.ndarray | None, cell: int) -> Block:
    """The map of one word of a caption, the end of its scale, and the word that helped most."""
    blocks = [_text(word, _BODY, cell, underlined=word if panel.flagged else "")]
    if panel.map is not None:
        blocks.append(picture(heat.drawn_map(panel.map, shown, cell, signed=panel.signed)))
        end = texts.number(colours.scale(panel.map), 2)
        blocks.append(_text(f"to {'±' if panel.signed else ''}{end}", _SMALL, cell, ink=_MUTED))
    if panel.words:
        helped, value = max(panel.words, key=lambda pair: pair[1])
        if value > 0:
            said = f"after {helped} {texts.number(value, 2)}"
            blocks.append(_text(said, _SMALL, cell, ink=_MUTED))
    return stack(blocks, gap=4, width=cell)


def _overview(view: Sequence[Row], cell: int) -> Block:
    """One of many: the first method's map, small, with its target."""
    panel, shown = view[-1][0], shown_image(view[-1])
    blocks = []
    if panel.map is not None:
        blocks.append(picture(heat.drawn_map(panel.map, shown, cell, signed=panel.signed)))
    start, flagged = texts.target(view[-1])
    said = start + flagged
    short = said if len(said) <= 60 else f"{said[:57]}..."
    blocks.append(_text(short, _SMALL, cell))
    blocks.append(_text(f"score {texts.score(view[-1][:1])}", _SMALL, cell, ink=_MUTED))
    if panel.notes:
        blocks.append(_text("see the notes", _SMALL, cell, ink=_FLAGGED))
    return stack(blocks, gap=4, width=cell)


def _bar(limit: float, signed: bool, width: int, shown: np.ndarray | None) -> Block:
    """The colours as they are drawn, with their numbers beneath."""
    strip = heat.bar(width - 2, shown, signed=signed)
    outline = Box(0, 0, width, 10, _LINE)
    ticks = texts.ticks(limit, signed=signed)
    font = fonts.choose("".join(ticks), _SMALL)
    labels = []
    for i, tick in enumerate(ticks):
        share = i / max(1, len(ticks) - 1)
        x = round(share * (width - font.getlength(tick)))
        labels.append(Text(x, 14 + _SMALL, tick, _SMALL, _MUTED))
    marks = (outline, *framed(picture(strip), 1).marks, *labels)
    return Block(width, 14 + _line_height(_SMALL), marks)


def _words(words: Sequence[str], values: np.ndarray, signed: bool, width: int) -> Block:
    """Words as boxes in reading order, coloured by relevance; negative ones have a minus sign."""
    pad, gap, height = 6, 4, 26
    shades = colours.colour(colours.normalise(values, colours.scale(values)), signed=signed)
    marks: list[Box | Text] = []
    x = y = 0
    for word, value, shade in zip(words, values.tolist(), shades, strict=True):
        shown = texts.clean(f"\N{MINUS SIGN} {word}" if value < 0 else word)
        font = fonts.choose(shown, _BODY)
        # A word longer than a line becomes several boxes of one colour.
        for piece in _pieces(fonts.drawable(shown, font), font, width - 2 * pad):
            wide = int(np.ceil(font.getlength(piece))) + 2 * pad
            if x and x + wide > width:
                x, y = 0, y + height + gap
            ink = _rgb(colours.ink(shade))
            marks.append(Box(x, y, wide, height, tuple(shade.tolist()), _LINE, 4))
            marks.append(Text(x + pad, y + 18, piece, _BODY, ink))
            x += wide + gap
    return Block(width, y + height, tuple(marks))


def _rgb(code: str) -> Colour:
    return (int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16))


def _text(text: str, size: int, width: int, *, ink: Colour = _INK, underlined: str = "") -> Block:
    """Text in lines no wider than `width`.

    Its end may be `underlined`, as far as that is on the last line.
    """
    text = texts.clean(text)
    if not text:
        return Block(width, 0)
    font = fonts.choose(text, size)
    # Letters may reach a little beyond their length.
    lines = _wrap(fonts.drawable(text, font), font, width - 2)
    height = _line_height(size)
    marks: list[Box | Text] = [
        Text(0, i * height + size, line, size, ink) for i, line in enumerate(lines)
    ]
    if underlined:
        right = round(font.getlength(lines[-1]))
        left = max(0, round(right - font.getlength(underlined)))
        # A dashed line, two pixels thick: dashes of four pixels, gaps of three.
        marks += [
            Box(x, height * len(lines) - 2, min(x + 3, right) - x + 1, 2, _FLAGGED)
            for x in range(left, right, 7)
        ]
    return Block(width, height * len(lines), tuple(marks))


def _wrap(text: str, font: fonts.Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, font, width):
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    return lines


def _pieces(word: str, font: fonts.Font, width: int) -> list[str]:
    """The word, cut where it is wider than `width`."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _line_height(size: int) -> int:
    return round(1.4 * size)


def _rule(width: int) -> Block:
    return Block(width, 1, (Box(0, 0, width, 1, _LINE),))
