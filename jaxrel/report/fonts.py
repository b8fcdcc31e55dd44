"""Fonts for drawing: Pillow's own, and another where that one lacks a letter."""

import functools
import unicodedata

from PIL import ImageFont

# Pillow's own font has the letters of English. Others are found by Pillow where the system
# keeps its fonts; which of them exist depends on the system.
_OTHERS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansArabic-Regular.ttf",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "arial.ttf",
)

# A code point that no font draws: what it gives is the sign for a missing letter.
_MISSING = "\uffff"

Font = ImageFont.FreeTypeFont


def choose(text: str, size: int) -> Font:
    """The font that lacks fewest letters of the text; Pillow's own where several do."""
    fonts = [_own(size)]
    if not _lacks(fonts[0], text):
        return fonts[0]
    fonts += [font for name in _OTHERS if (font := _other(name, size)) is not None]
    return min(fonts, key=lambda font: _lacks(font, text))


def lacking(text: str) -> str:
    """The letters of a text that no font here draws, in their order, each once."""
    every = [_own(12), *(font for name in _OTHERS if (font := _other(name, 12)) is not None)]
    letters = dict.fromkeys(c for c in text if not c.isspace())
    return "".join(c for c in letters if not any(_has(font, c) for font in every))


def drawable(text: str, font: Font) -> str:
    """The text with accents taken off where the font lacks the accented letter.

    A letter that the font lacks altogether stays; it is drawn as a box.
    """
    return "".join(c if _has(font, c) else _plain(c) for c in text)


def _plain(character: str) -> str:
    parts = unicodedata.normalize("NFKD", character)
    return "".join(c for c in parts if not unicodedata.combining(c)) or character


def _lacks(font: Font, text: str) -> int:
    return sum(not _has(font, character) for character in set(text))


@functools.lru_cache(maxsize=4096)
def _has(font: Font, character: str) -> bool:
    return bytes(font.getmask(character)) != bytes(font.getmask(_MISSING))


@functools.lru_cache(maxsize=16)
def _own(size: int) -> Font:
    font = ImageFont.load_default(size)
    # Pillow built without FreeType has one small bitmap font of a fixed size.
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError("drawing text needs Pillow with FreeType; reinstall pillow from a wheel")
    return font


@functools.lru_cache(maxsize=64)
def _other(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None
