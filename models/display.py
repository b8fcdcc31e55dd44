"""How tokens are displayed: words as they are written, whatever pieces a tokenizer makes of them.

A string that begins with "##" continues the word before it ("##" alone: a part of a character
that the piece before shows), and "" is no word at all. A word that itself begins with "##" has a
backslash before it.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

SPELLING = "spelling"
UNKNOWN = "{} (unknown)"
_CONTINUES = "##"
# What decoders write where a character is not complete.
_PART = "\ufffd"
Decode = Callable[[list[str]], str]
# What gets a backslash, and what has one.
_ESCAPED, _UNESCAPED = re.compile(r"\\*##"), re.compile(r"\\+##")
# The joiners: what they stand between is written as one.
_JOINERS = "\u200c\u200d"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_TAGS = range(0xE0020, 0xE0080)


def word(text: str) -> str:
    """Return the string of a token that begins a word."""
    return f"\\{text}" if _ESCAPED.match(text) else text


def more(text: str) -> str:
    """Return the string of a token that continues the word before it."""
    return _CONTINUES + text


def sentence(shown: Sequence[str]) -> str:
    """Return the words of a text, with a space between two."""
    parts = []
    for token in filter(None, shown):
        if token.startswith(_CONTINUES):
            parts.append(token.removeprefix(_CONTINUES))
        else:
            parts.append(" " + (token[1:] if _UNESCAPED.match(token) else token))
    return "".join(parts).strip()


def is_word(text: str) -> bool:
    """Whether there is more in a text than punctuation and white space."""
    return any(unicodedata.category(letter)[0] not in "PZC" for letter in text)


def strings(tokenizer: Any, ids: Sequence[int], specials: Collection[int]) -> list[str]:
    """Return one string per token, from the ids alone.

    Args:
      tokenizer: a `transformers` tokenizer.
      ids: the tokens.
      specials: ids of tokens that stand for no part of a text.
    """
    backend = tokenizer.backend_tokenizer
    suffix, prefix = (
        getattr(backend.model, name, None)
        for name in ("end_of_word_suffix", "continuing_subword_prefix")
    )
    decode = backend.decoder.decode if backend.decoder is not None else "".join
    alone = {*tokenizer.get_added_vocab().values(), *specials}
    row: list[str] = []
    pieces: list[str] = []
    for index, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if index in alone or not (suffix or _goes_on(decode, pieces, token)):
            row += _pieces(decode, pieces, prefix)
            pieces = []
        if index in alone:
            row.append("" if index in specials else word(token))
            continue
        pieces.append(token.removesuffix(suffix) if suffix else token)
        if suffix and token.endswith(suffix):
            row += _pieces(decode, pieces, prefix)
            pieces = []
    return row + _pieces(decode, pieces, prefix)


def _goes_on(decode: Decode, pieces: list[str], token: str) -> bool:
    """Whether a token is of the character that the pieces before it have begun."""
    return bool(pieces) and decode(pieces)[-1:] == decode([token])[:1] == _PART


def _pieces(decode: Decode, pieces: list[str], prefix: str | None) -> list[str]:
    """One string per piece of a word; a character made of several pieces is in the first."""
    if not pieces:
        return []
    if prefix and len(pieces) == 1 and pieces[0].startswith(prefix):
        return [more(pieces[0].removeprefix(prefix))]
    starts = []
    for i in range(len(pieces)):
        before = decode(pieces[:i])
        whole = before.rstrip(_PART)
        starts.append(len(whole) + (whole != before))
    ends = [*starts[1:], None]
    shown = [decode(pieces)[a:b] for a, b in zip(starts, ends, strict=True)]
    return [word(part.strip()) if i == 0 else more(part) for i, part in enumerate(shown)]


def spelled(
    shown: Sequence[str],
    text: str,
    spans: Sequence[tuple[int, int]],
    unknown: Collection[int],
    alone: Collection[int],
) -> list[str]:
    """Return one string per token, with the text that they were made of.

    Unknown words keep their spelling. What is written as one word is one, such as a number, or a
    letter with its marks, though the tokenizer takes it apart.

    Args:
      shown: what `strings` returns.
      text: the text.
      spans: of each token, where its text starts and stops.
      unknown: the places of tokens that stand for what the tokenizer does not know.
      alone: the places of tokens that no other continues.
    """
    found = list(shown)
    for i, (start, stop) in enumerate(spans):
        before = spans[i - 1][1]  # above `start` where both are of the same character
        if i in unknown:
            written = text[start:stop].strip()
            found[i] = word(UNKNOWN.format(written) if is_word(written) else written)
        elif (
            i
            and shown[i]
            and shown[i - 1]
            and not shown[i].startswith(_CONTINUES)
            and not {i - 1, i} & {*unknown, *alone}
            and (start < before or (start == before and _is_inside(text, start)))
        ):
            found[i] = more(sentence([shown[i]]))
    return found


def _is_inside(text: str, place: int) -> bool:
    """Whether a place is inside of what is written as one word or one character."""
    if not 0 < place < len(text):
        return False
    if _extends(text[place]) or text[place - 1] == _JOINERS[1]:
        return not text[place - 1].isspace()
    base = place - 1
    while base and _extends(text[base]):
        base -= 1
    return text[base].isalnum() and text[place].isalnum()


def _extends(letter: str) -> bool:
    """Whether a character is written upon the one before it."""
    mark = unicodedata.category(letter).startswith("M")
    return mark or letter in _JOINERS or ord(letter) in _SKIN_TONES or ord(letter) in _TAGS


def encode(rows: Sequence[Sequence[str]], tokens: int) -> Int[np.ndarray, "batch tokens letters"]:
    """Return strings as Unicode code points, for the entry "spelling" of a model's inputs."""
    longest = max(len(token) for row in rows for token in row)
    found = np.zeros((len(rows), tokens, max(1, longest)), np.int32)
    for i, row in enumerate(rows):
        for j, token in enumerate(row):
            found[i, j, : len(token)] = [ord(letter) for letter in token]
    return found


def decode(spelling: Int[np.ndarray, "batch tokens letters"]) -> list[list[str]]:
    """Return the strings that `encode` was given."""
    return [["".join(map(chr, filter(None, token))) for token in row] for row in spelling.tolist()]


def without_spelling(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs without what is only displayed, and would compile a program per spelling."""
    return {name: value for name, value in inputs.items() if name != SPELLING}
