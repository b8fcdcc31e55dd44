"""Explanations drawn as one image: a row per example, a column per method.

The sheet is put together from blocks. A block is an image of its own (a line of text, an
overlay, a colour bar); blocks are stacked into cells and set beside each other into rows.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from jaxrel.explanations.result import Explanation
from jaxrel.report import colours, content, fonts
from jaxrel.report.content import Explanations
from jaxrel.report.heat import flat, overlay

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

    The first column shows the input with its target and score, then there is a column per
    method: the image under its heat with a colour bar, and the words as coloured boxes with
    theirs. Each map has its own scale. A word that a method doubts is underlined, and why is
    said below the method's map. The same explanations give the same image.

    Args:
      explanations: one, or several of the same inputs (one per method).
      cell: the width of a column in pixels, at least 80.

    Returns:
      An RGB image.

    Raises:
      ValueError: the list is empty, they explain different inputs, or `cell` is too
        small.
    """
    checked = content.check(explanations)
    if cell < 80:
        raise ValueError(f"figure: cell is {cell} pixels; words need at least 80 to be legible")
    columns = len(checked) + 1
    width = columns * cell + (columns - 1) * _GAP
    heads = ["input", *(content.clean(e.method) for e in checked)]
    title = [_text(content.legend(checked), _SMALL, width, ink=_MUTED)]
    if models := _models(checked):
        title.insert(0, _text(models, _TITLE, width))
    blocks = [_stack(title, gap=2), _beside([_text(head, _HEAD, cell) for head in heads])]
    for index in range(len(checked[0])):
        blocks += [_rule(width), _row(checked, index, cell)]
    return _framed(_stack(blocks, gap=18))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def fit(image: np.ndarray, cell: int) -> np.ndarray:
    """The image scaled so that its longer side is `cell` pixels, each side at least one."""
    height, width = image.shape[:2]
    factor = cell / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    # A strongly enlarged image shows its own pixels; in between, squares would be uneven.
    how = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(image).resize(size, how))


def heat(explanation: Explanation, index: int, shown: np.ndarray | None, cell: int) -> np.ndarray:
    """One relevance map as drawn: over its image, or alone where there is none."""
    assert explanation.image is not None
    relevance = explanation.image[index]
    if shown is not None:
        return overlay(fit(shown, cell), relevance, signed=explanation.signed)
    height, width = relevance.shape
    factor = cell / max(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return flat(relevance, *size, signed=explanation.signed)


def _models(explanations: Sequence[Explanation]) -> str:
    return ", ".join(dict.fromkeys(content.clean(e.model) for e in explanations if e.model))


def _row(explanations: Sequence[Explanation], index: int, cell: int) -> Image.Image:
    shown = content.shown_image(explanations, index)
    first = [] if shown is None else [Image.fromarray(fit(shown, cell))]
    start, flagged = content.target(explanations, index)
    first.append(_text(start + flagged, _BODY, cell, underlined=flagged))
    score = f"score {content.score(explanations, index)}"
    first.append(_text(score, _SMALL, cell, ink=_MUTED))
    cells = [_stack(first, gap=8, width=cell)]
    cells += [_cell(explanation, index, shown, cell) for explanation in explanations]
    return _beside(cells)


def _cell(explanation: Explanation, index: int, shown: np.ndarray | None, cell: int) -> Image.Image:
    blocks = []
    if explanation.image is not None:
        limit = colours.scale(explanation.image[index])
        blocks.append(Image.fromarray(heat(explanation, index, shown, cell)))
        blocks.append(_bar(limit, explanation.signed, cell))
    if words := explanation.words(index):
        values = np.array([relevance for _, relevance in words])
        blocks.append(_words([word for word, _ in words], values, explanation.signed, cell))
        blocks.append(_bar(colours.scale(values), explanation.signed, cell))
    if (flag := content.flag(explanation, index)) is not None:
        ink = _FLAGGED if flag.flagged else _MUTED
        blocks.append(_text(content.clean(str(flag)), _SMALL, cell, ink=ink))
    return _stack(blocks, gap=12, width=cell)


def _bar(limit: float, signed: bool, width: int) -> Image.Image:
    """The colour table with its numbers beneath."""
    ramp = np.linspace(-1 if signed else 0, 1, width - 2)
    strip = np.broadcast_to(colours.colour(ramp, signed=signed), (8, width - 2, 3))
    ticks = content.ticks(limit, signed=signed)
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


def _words(words: list[str], values: np.ndarray, signed: bool, width: int) -> Image.Image:
    """Words as boxes in reading order, coloured by relevance."""
    pad, gap, height = 6, 4, 26
    shades = colours.colour(colours.normalise(values, colours.scale(values)), signed=signed)
    words = [content.clean(word) for word in words]
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
    """A dashed line of doubt, two pixels thick."""
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
