"""Blocks of a figure: marks in a rectangle, put together first and drawn afterwards.

A block is a size and what stands in it (text, boxes, images). Blocks are stacked and set beside
each other into larger ones; a finished one is drawn as pixels or as SVG.
"""

import base64
import dataclasses
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image, ImageDraw

from jaxrel.report import fonts
from jaxrel.report.heat import png

Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Text:
    """A line of text; `y` is its base line."""

    x: int
    y: int
    text: str
    size: int
    ink: Colour


@dataclasses.dataclass(frozen=True)
class Box:
    """A filled rectangle, with an outline if it has a colour."""

    x: int
    y: int
    width: int
    height: int
    fill: Colour
    outline: Colour | None = None
    radius: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An image as it is."""

    x: int
    y: int
    pixels: np.ndarray


Mark = Text | Box | Picture


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Marks in a rectangle, whose upper left corner is (0, 0)."""

    width: int
    height: int
    marks: tuple[Mark, ...] = ()


def picture(pixels: np.ndarray) -> Block:
    """An image alone."""
    return Block(pixels.shape[1], pixels.shape[0], (Picture(0, 0, pixels),))


def stack(blocks: Sequence[Block], *, gap: int, width: int = 0) -> Block:
    """Blocks one below the other, left edges aligned."""
    marks: list[Mark] = []
    y = 0
    for block in blocks:
        marks += _moved(block, 0, y)
        y += block.height + gap
    return Block(max([width, *(b.width for b in blocks)]), max(0, y - gap), tuple(marks))


def beside(blocks: Sequence[Block], *, gap: int) -> Block:
    """Blocks in a row, upper edges aligned."""
    marks: list[Mark] = []
    x = 0
    for block in blocks:
        marks += _moved(block, x, 0)
        x += block.width + gap
    return Block(max(0, x - gap), max(b.height for b in blocks), tuple(marks))


def wrapped(blocks: Sequence[Block], *, width: int, gap: int) -> Block:
    """Blocks in rows, as many in each as fit into the width."""
    lines: list[list[Block]] = [[]]
    for block in blocks:
        if lines[-1] and sum(b.width + gap for b in lines[-1]) + block.width > width:
            lines.append([])
        lines[-1].append(block)
    return stack([beside(line, gap=gap) for line in lines if line], gap=gap, width=width)


def framed(block: Block, margin: int) -> Block:
    """A block with an empty margin on all sides."""
    size = (block.width + 2 * margin, block.height + 2 * margin)
    return Block(*size, tuple(_moved(block, margin, margin)))


def _moved(block: Block, x: int, y: int) -> list[Mark]:
    return [dataclasses.replace(mark, x=mark.x + x, y=mark.y + y) for mark in block.marks]


def raster(block: Block, scale: int = 1) -> Image.Image:
    """A block as pixels, `scale` of them per unit."""
    drawn = Image.new("RGB", (scale * block.width, scale * block.height), PAPER)
    draw = ImageDraw.Draw(drawn)
    for mark in block.marks:
        x, y = round(scale * mark.x), round(scale * mark.y)
        match mark:
            case Text():
                font = fonts.choose(mark.text, scale * mark.size)
                shown = fonts.drawable(mark.text, font)
                # A first letter that begins left of its place is moved to it.
                x -= min(0, round(font.getbbox(shown, anchor="ls")[0]))
                draw.text((x, y), shown, mark.ink, font, anchor="ls")
            case Box():
                right = x + max(1, round(scale * mark.width)) - 1
                below = y + max(1, round(scale * mark.height)) - 1
                radius = scale * mark.radius
                draw.rounded_rectangle((x, y, right, below), radius, mark.fill, mark.outline)
            case Picture():
                image = Image.fromarray(np.ascontiguousarray(mark.pixels))
                size = (scale * image.width, scale * image.height)
                drawn.paste(image.resize(size, Image.Resampling.NEAREST), (x, y))
    return drawn


def svg(block: Block, title: str) -> str:
    """A block as a drawing that scales; its text stays text."""
    marks = "\n".join(map(_svg_mark, block.marks))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{block.width}" height="{block.height}" '
        f'viewBox="0 0 {block.width} {block.height}" role="img" '
        'font-family="DejaVu Sans, Verdana, Noto Sans, sans-serif">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="100%" height="100%" fill="{_css(PAPER)}"/>\n{marks}\n</svg>\n'
    )


def _svg_mark(mark: Mark) -> str:
    match mark:
        case Text():
            width = fonts.choose(mark.text, mark.size).getlength(mark.text)
            # Readers have other fonts: the text keeps the width that it was given room for.
            fit = f' textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs"' if width else ""
            return (
                f'<text x="{mark.x:g}" y="{mark.y:g}" font-size="{mark.size}" '
                f'fill="{_css(mark.ink)}"{fit}>{escape(mark.text)}</text>'
            )
        case Box():
            line = "" if mark.outline is None else f' stroke="{_css(mark.outline)}"'
            return (
                f'<rect x="{mark.x:g}" y="{mark.y:g}" width="{mark.width:g}" '
                f'height="{mark.height:g}" rx="{mark.radius}" fill="{_css(mark.fill)}"{line}/>'
            )
        case Picture():
            height, width = mark.pixels.shape[:2]
            data = base64.b64encode(png(Image.fromarray(np.ascontiguousarray(mark.pixels))))
            return (
                f'<image x="{mark.x:g}" y="{mark.y:g}" width="{width}" height="{height}" '
                f'href="data:image/png;base64,{data.decode()}"/>'
            )


def _css(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
