"""Explanations drawn as one image: a row per example, a column per method.

The figure is put together from blocks. A block is an image of its own (a line of text, an
overlay, a colour bar). Blocks are stacked into cells, and cells stand beside each other in rows.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from jaxrel.report import colours, fonts, texts
from jaxrel.report.heat import drawn_map, fit
from jaxrel.report.panels import Explanations, Panel, columns, rows, shown_image

_PAPER = (255, 255, 255)
_INK = (28, 32, 36)
_MUTED = (96, 100, 108)
_LINE = (222, 225, 230)
_FLAGGED = (179, 38, 30)

_MARGIN = 32
_GAP = 24
_TITLE, _HEAD, _BODY, _SMALL = 20, 17, 15, 12


def figure(explanations: Explanations, *, cell: int = 320) -> Image.Image:
    """Draw explanations of the same inputs side by side.

    The first column shows the input with its target and score. A column per method follows: the
    image under its heat, the words as coloured boxes, and a colour bar below each. Each map has
    its own scale. A flagged word is underlined, and the reason stands below the method's map.
    The same explanations give the same image.

    Args:
      explanations: one, or several of the same inputs (one per method).
      cell: the width of a column in pixels, at least 80.

    Returns:
      An RGB image.

    Raises:
      ValueError: the list is empty, they explain different inputs, or `cell` is too
        small.
    """
    checked = columns(explanations)
    if cell < 80:
        raise ValueError(f"figure: cell is {cell} pixels; words need at least 80 to be legible")
    width = (len(checked) + 1) * (cell + _GAP) - _GAP
    heads = ["input", *(texts.clean(column.title) for column in checked)]
    title = [_text(texts.legend(checked), _SMALL, width, ink=_MUTED)]
    if models := texts.models(checked):
        title.insert(0, _text(models, _TITLE, width))
    blocks = [_stack(title, gap=2), _beside([_text(head, _HEAD, cell) for head in heads])]
    for row in rows(checked):
        blocks += [_rule(width), _row(row, cell)]
    return _framed(_stack(blocks, gap=18))


def _row(row: Sequence[Panel], cell: int) -> Image.Image:
    shown = shown_image(row)
    first = [] if shown is None else [Image.fromarray(fit(shown, cell))]
    start, flagged = texts.target(row)
    first.append(_text(start + flagged, _BODY, cell, underlined=flagged))
    first.append(_text(f"score {texts.score(row)}", _SMALL, cell, ink=_MUTED))
    cells = [_stack(first, gap=8, width=cell)]
    return _beside(cells + [_cell(panel, shown, cell) for panel in row])


def _cell(panel: Panel, shown: np.ndarray | None, cell: int) -> Image.Image:
    blocks = []
    if panel.map is not None:
        blocks.append(Image.fromarray(drawn_map(panel.map, shown, cell, signed=panel.signed)))
        blocks.append(_bar(colours.scale(panel.map), panel.signed, cell))
    if panel.words:
        words, values = zip(*panel.words, strict=True)
        blocks.append(_words(words, np.array(values), panel.signed, cell))
        blocks.append(_bar(colours.scale(np.array(values)), panel.signed, cell))
    if panel.flag:
        ink = _FLAGGED if panel.flagged else _MUTED
        blocks.append(_text(texts.clean(panel.flag), _SMALL, cell, ink=ink))
    return _stack(blocks, gap=12, width=cell)


def _bar(limit: float, signed: bool, width: int) -> Image.Image:
    """The colour table with its numbers beneath."""
    ramp = np.linspace(-1 if signed else 0, 1, width - 2)
    strip = np.broadcast_to(colours.colour(ramp, signed=signed), (8, width - 2, 3))
    ticks = texts.ticks(limit, signed=signed)
    font = fonts.choose("".join(ticks), _SMALL)
    block = Image.new("RGB", (width, 10 + 4 + _line_height(_SMALL)), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.rectangle((0, 0, width - 1, 9), outline=_LINE)
    block.paste(Image.fromarray(np.ascontiguousarray(strip)), (1, 1))
    for i, tick in enumerate(ticks):
        share = i / max(1, len(ticks) - 1)
        x = share * (width - font.getlength(tick))
        draw.text((x, 14 + _SMALL), tick, _MUTED, font, anchor="ls")
    return block


def _words(words: Sequence[str], values: np.ndarray, signed: bool, width: int) -> Image.Image:
    """Words as boxes in reading order, coloured by relevance."""
    pad, gap, height = 6, 4, 26
    shades = colours.colour(colours.normalise(values, colours.scale(values)), signed=signed)
    words = [texts.clean(word) for word in words]
    font = fonts.choose("".join(words), _BODY)
    boxes = []
    x = y = 0
    for word, shade in zip(words, shades, strict=True):
        # A word longer than a line becomes several boxes of one colour.
        for piece in _pieces(fonts.drawable(word, font), font, width - 2 * pad):
            wide = int(np.ceil(font.getlength(piece))) + 2 * pad
            if x and x + wide > width:
                x, y = 0, y + height + gap
            boxes.append((x, y, wide, piece, shade))
            x += wide + gap
    block = Image.new("RGB", (width, y + height), _PAPER)
    draw = ImageDraw.Draw(block)
    for x, y, wide, piece, shade in boxes:
        corners = (x, y, x + wide - 1, y + height - 1)
        draw.rounded_rectangle(corners, 4, tuple(shade.tolist()), _LINE)
        draw.text((x + pad, y + 18), piece, colours.ink(shade), font, anchor="ls")
    return block


def _text(
    text: str,
    size: int,
    width: int,
    *,
    ink: tuple[int, int, int] = _INK,
    underlined: str = "",
) -> Image.Image:
    """Text in lines no wider than `width`.

    Its end may be `underlined`, as far as that is on the last line.
    """
    font = fonts.choose(text, size)
    lines = _wrap(fonts.drawable(text, font), font, width)
    height = _line_height(size)
    block = Image.new("RGB", (width, height * len(lines)), _PAPER)
    draw = ImageDraw.Draw(block)
    for i, line in enumerate(lines):
        draw.text((0, i * height + size), line, ink, font, anchor="ls")
    if underlined:
        right = round(font.getlength(lines[-1]))
        left = max(0, round(right - font.getlength(underlined)))
        _dashes(draw, left, right, height * len(lines) - 2)
    return block


def _dashes(draw: ImageDraw.ImageDraw, left: int, right: int, y: int) -> None:
    """A dashed line below a flagged word, two pixels thick."""
    for x in range(left, right, 7):
        draw.rectangle((x, y, min(x + 3, right), y + 1), fill=_FLAGGED)


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


def _stack(blocks: Sequence[Image.Image], *, gap: int, width: int = 0) -> Image.Image:
    """Blocks one below the other, left edges aligned."""
    width = max([width, *(block.width for block in blocks)])
    height = sum(block.height for block in blocks) + gap * max(0, len(blocks) - 1)
    stacked = Image.new("RGB", (width, height), _PAPER)
    y = 0
    for block in blocks:
        stacked.paste(block, (0, y))
        y += block.height + gap
    return stacked


def _beside(blocks: Sequence[Image.Image]) -> Image.Image:
    """Blocks in a row, upper edges aligned."""
    width = sum(block.width for block in blocks) + _GAP * (len(blocks) - 1)
    row = Image.new("RGB", (width, max(block.height for block in blocks)), _PAPER)
    x = 0
    for block in blocks:
        row.paste(block, (x, 0))
        x += block.width + _GAP
    return row


def _rule(width: int) -> Image.Image:
    return Image.new("RGB", (width, 1), _LINE)


def _framed(block: Image.Image) -> Image.Image:
    size = (block.width + 2 * _MARGIN, block.height + 2 * _MARGIN)
    framed = Image.new("RGB", size, _PAPER)
    framed.paste(block, (_MARGIN, _MARGIN))
    return framed
