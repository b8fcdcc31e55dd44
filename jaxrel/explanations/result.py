"""`Explanation`: the result. What was explained, by which method, and the relevance it found."""

import dataclasses
import importlib
import json
import operator
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.typing import ArrayLike
from PIL import Image

from jaxrel import report
from jaxrel.explanations import archive, joined, panels, tables
from jaxrel.files import write_atomically
from jaxrel.flags import Flag
from jaxrel.renamed import renamed_attribute, renamed_keywords
from jaxrel.report.panels import Column

_ESCAPED = re.compile(r"\\+##")


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class Explanation:
    """Relevance maps for a batch of examples, with what is needed to read them.

    Anything array-like is accepted (JAX arrays of any float type, lists, PIL images); it is
    copied to NumPy, and the copy is read-only. `explanation[i]` is the explanation of one
    example, `explanation[2:5]` of several, `len(explanation)` the number of examples.

    Attributes:
      target: per example, what was explained, in words.
      score: per example, the scalar whose relevance this is.
      method: the name of the method.
      signed: whether relevance may be negative (drawn with zero-centred colours).
      image: relevance of the image at the method's own resolution (patches or pixels).
      text: relevance of each token, 0 where there is padding.
      tokens: per example, one display string per token: `""` is a special or padding token
        (never shown), `"##ing"` continues the word before it, and so does `"##"`, a part of a
        character that is shown already. A word that itself begins with `##` has a backslash
        before it.
      pixels: per example, the image as shown; sizes may differ.
      model: the model's name.
      settings: the method's settings, in words.
      report: a summary that JSON can hold: losses of relevance, and under "coverage" what share of
        the model's layers the method follows. A list with an entry per example goes with its
        examples when they are taken apart or put together. Its entry "examples", if there is one,
        has a dictionary per example: what is known of the input, such as "file", "against", what
        the target is contrasted with, and "notes", what to know before reading the map.
      flags: per example, what the map says of the word explained, None for a word that is not
        judged; empty where no word is.

    Raises:
      TypeError: a field is of a kind that cannot be used (one string for a list of strings,
        a report that JSON cannot hold).
      ValueError: shapes disagree, a map holds NaN or infinity, or an unsigned map is negative
        somewhere; the message names the example.
    """

    target: tuple[str, ...]
    score: Float32[np.ndarray, " batch"]
    method: str
    signed: bool
    image: Float32[np.ndarray, "batch rows columns"] | None
    text: Float32[np.ndarray, "batch tokens"] | None
    tokens: tuple[tuple[str, ...], ...]
    pixels: tuple[UInt8[np.ndarray, "_ _ 3"], ...] | None
    model: str
    settings: str
    report: dict[str, Any]
    flags: tuple[Flag | None, ...]

    # Written out, since what may be given is wider than what is kept.
    @renamed_keywords(pictures="pixels", verdicts="flags")
    def __init__(
        self,
        *,
        target: Sequence[str],
        score: ArrayLike,
        method: str,
        signed: bool,
        image: ArrayLike | None = None,
        text: ArrayLike | None = None,
        tokens: Sequence[Sequence[str]] = (),
        pixels: Sequence[Any] | np.ndarray | None = None,
        model: str = "",
        settings: str = "",
        report: dict[str, Any] | None = None,
        flags: Sequence[Flag | None] = (),
    ) -> None:
        target = _strings("target", target)
        batch = len(target)
        if batch == 0:
            raise ValueError("Explanation: target is empty; give one description per example")
        if image is None and text is None:
            raise ValueError("Explanation: neither image nor text is given; give at least one map")
        image = None if image is None else _float32("image", image, (batch, "rows", "columns"))
        text = None if text is None else _float32("text", text, (batch, "tokens"))
        if not signed:
            _refuse_negative("image", image)
            _refuse_negative("text", text)
        fields = {
            "target": target,
            "score": _float32("score", score, (batch,)),
            "method": method,
            "signed": signed,
            "image": image,
            "text": text,
            "tokens": _tokens(tokens, text),
            "pixels": None if pixels is None else _images(pixels, batch),
            "model": model,
            "settings": settings,
            "report": _examples(_plain({} if report is None else report), batch),
            "flags": _flags(flags, batch),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    pictures = renamed_attribute("pictures", "pixels")
    verdicts = renamed_attribute("verdicts", "flags")

    def __len__(self) -> int:
        return len(self.target)

    def __repr__(self) -> str:
        parts = [f"method={self.method!r}", f"examples={len(self)}"]
        if self.image is not None:
            parts.append("image={}x{}".format(*self.image.shape[1:]))
        if self.text is not None:
            parts.append(f"text={self.text.shape[1]} tokens")
        return f"Explanation({', '.join(parts)}, signed={self.signed})"

    def __getitem__(self, index: SupportsIndex | slice) -> "Explanation":
        if isinstance(index, slice):
            part = index
        else:
            i = self._index(index)
            part = slice(i, i + 1)
        return dataclasses.replace(
            self,
            target=self.target[part],
            score=self.score[part],
            image=None if self.image is None else self.image[part],
            text=None if self.text is None else self.text[part],
            tokens=self.tokens[part],
            pixels=None if self.pixels is None else self.pixels[part],
            flags=self.flags[part],
            report=joined.part(self.report, part, len(self)),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Explanation"]) -> "Explanation":
        """Join explanations by one method, with one set of settings, of one model.

        Args:
          parts: at least one. Their maps have one size.

        Returns:
          All of their examples, in order. Entries of the reports with a value per example are
          joined, and the account of the relevance (`report["relevance"]`) is added up; of others
          those stay that all have in common.

        Raises:
          ValueError: there are none, or they differ in method, settings, model or size.
        """
        if len(parts) == 1:
            return parts[0]
        return cls(**joined.fields(parts))

    def _index(self, index: SupportsIndex) -> int:
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"Explanation: there is no example {i}; there are {len(self)}")
        return i % len(self)

    @overload
    def words(self) -> list[list[tuple[str, float]]]: ...
    @overload
    def words(self, index: SupportsIndex) -> list[tuple[str, float]]: ...
    def words(self, index=None):
        """Words and their relevance: sub-word tokens added up, special tokens left out.

        Args:
          index: one example; all of them when left out.

        Returns:
          A list of (word, relevance) for one example, or the list of these lists. An
          explanation without text has no words.

        Raises:
          IndexError: there is no such example.
        """
        if index is None:
            return [self._words(i) for i in range(len(self))]
        return self._words(self._index(index))

    def _words(self, index: int) -> list[tuple[str, float]]:
        if self.text is None:
            return []
        words: list[tuple[str, float]] = []
        after_word = False
        for token, relevance in zip(self.tokens[index], self.text[index].tolist(), strict=True):
            piece = token[2:] if token.startswith("##") else None
            if piece is not None and after_word:
                word, sum_so_far = words[-1]
                words[-1] = (word + piece, sum_so_far + relevance)
            elif piece is not None:
                # Without what it continues, "##" is a part of a character.
                words.append((piece or "\ufffd", relevance))
            elif token:
                words.append((token[1:] if _ESCAPED.match(token) else token, relevance))
            after_word = bool(token)
        return words

    def to_dataframe(self) -> Any:
        """The relevance as a tidy pandas table: one row per example and token or patch.

        Returns:
          A `pandas.DataFrame` with the columns example, target, score, method, modality ("image"
          or "text"), token (as in `tokens`; "" for patches), position (in the text, or in the
          image row by row), row and column (of patches, else missing) and relevance. Special
          and padding tokens are left out.

        Raises:
          ModuleNotFoundError: pandas is missing.
        """
        return tables.dataframe(self)

    def column(self) -> Column:
        """What `jaxrel.report` draws: a panel per example."""
        return panels.column(self)

    def show(self) -> Image.Image | None:
        """Show the explanation; never opens a window.

        Returns:
          A figure of it, an `PIL.Image.Image`. In a notebook the page of `save("....html")` is
          displayed instead and nothing is returned, since a notebook would show a returned image a
          second time.
        """
        if not _in_notebook():
            return report.figure([self])
        importlib.import_module("IPython.display").display(self)
        return None

    def _repr_html_(self) -> str:
        return report.fragment([self])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a figure (.png, .pdf, .svg), a page (.html), numbers (.npz) or a table (.parquet).

        A table has a row per example, as `jaxrel.batch.schema` says, and no images; it needs
        pyarrow (`pip install 'jaxrel[batch]'`). The file appears complete or not at all; one that
        is there is replaced, as NumPy's are. A missing folder is made.

        Args:
          path: where to; the suffix says what.

        Raises:
          ValueError: another suffix.
          OSError: the file cannot be written there.
        """
        match suffix := Path(path).suffix.lower():
            case ".npz":
                write_atomically(path, archive.encode(vars(self)))
            case ".png" | ".pdf" | ".svg" | ".html":
                report.save([self], path)
            case ".parquet":
                write_atomically(path, tables.parquet(tables.columns(self)))
            case _:
                raise ValueError(
                    f"cannot save an explanation as {str(path)!r}: the suffix is {suffix!r}; use "
                    ".png (image), .pdf or .svg (for print), .html (page), .npz (numbers) or "
                    ".parquet (table)"
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Explanation":
        """Read what `save("....npz")` wrote; every number and string comes back as it was.

        Args:
          path: the .npz file.

        Returns:
          The explanation.

        Raises:
          OSError: there is no such file, or it cannot be read.
          ValueError: the file is damaged, cut short, or is no explanation.
        """
        path = Path(path)
        if path.suffix.lower() != ".npz":
            raise ValueError(f"{path}: an explanation is loaded from the .npz file it was saved to")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the .npz file of an explanation")
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file; give a saved explanation")
        arrays = archive.read(path)
        try:
            return cls(**archive.decode(arrays))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a usable explanation: {error}") from error


def _strings(name: str, values: Sequence[str]) -> tuple[str, ...]:
    # A string is itself a sequence of strings: "cat" would become ("c", "a", "t").
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"Explanation: {name} must be a sequence of strings, got {values!r}")
    return tuple(values)


def _float32(name: str, value: ArrayLike, shape: tuple[int | str, ...]) -> np.ndarray:
    """A read-only float32 copy; in `shape`, a number is demanded and a word names an axis."""
    # A float64 beyond float32 becomes infinite here, and is refused below with the example.
    with np.errstate(over="ignore"):
        array = np.array(value, np.float32)
    fits = array.ndim == len(shape) and all(
        size == wanted if isinstance(wanted, int) else size > 0
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"Explanation: {name} must have the shape [{wanted}] "
            f"({shape[0]} examples, as many as target), got {list(array.shape)}"
        )
    bad = np.asarray((~np.isfinite(array)).any(axis=tuple(range(1, array.ndim))))
    if bad.any():
        raise ValueError(
            f"Explanation: {name} holds NaN or infinity in example {_indices(bad)}; "
            "look for them in the image and in the model's weights"
        )
    array.setflags(write=False)
    return array


def _refuse_negative(name: str, array: np.ndarray | None) -> None:
    if array is None:
        return
    negative = np.asarray((array < 0).any(axis=tuple(range(1, array.ndim))))
    if negative.any():
        raise ValueError(
            f"Explanation: signed is False, but {name} is negative in example "
            f"{_indices(negative)} (down to {array.min():.3g}); pass signed=True"
        )


def _indices(mask: np.ndarray) -> str:
    return ", ".join(map(str, np.flatnonzero(mask)[:8]))


def _tokens(tokens: Sequence[Sequence[str]], text: np.ndarray | None) -> tuple:
    rows = tuple(_strings("tokens of an example", row) for row in tokens)
    if text is None:
        if rows:
            raise ValueError("Explanation: tokens are given, but no text relevance for them")
        return ()
    batch, length = text.shape
    if len(rows) != batch:
        raise ValueError(f"Explanation: text has {batch} examples, tokens have {len(rows)}")
    for i, row in enumerate(rows):
        if len(row) != length:
            raise ValueError(
                f"Explanation: text has {length} tokens per example, "
                f'example {i} names {len(row)}; fill up with ""'
            )
    return rows


def _images(pixels: Sequence[Any] | np.ndarray, batch: int) -> tuple[np.ndarray, ...]:
    if len(pixels) != batch:
        raise ValueError(f"Explanation: {batch} examples, but {len(pixels)} images")
    # Rows of one image share one copy: a photograph with a caption has a row per word.
    given = list(pixels)
    one_each = {id(shown): np.array(shown) for shown in given}
    copies = tuple(one_each[id(shown)] for shown in given)
    for i, copy in enumerate(copies):
        if copy.dtype != np.uint8 or copy.ndim != 3 or copy.shape[2] != 3 or copy.size == 0:
            raise ValueError(
                "Explanation: an image must be uint8 [height, width, 3] (RGB, 0 to 255), "
                f"got {copy.dtype} {list(copy.shape)} for example {i}"
            )
        copy.setflags(write=False)
    return copies


def _flags(flags: Sequence[Flag | None], batch: int) -> tuple[Flag | None, ...]:
    if len(flags) not in (0, batch):
        raise ValueError(f"Explanation: {batch} examples, but {len(flags)} flags")
    return tuple(flags) if any(flags) else ()


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON gives it back, so that a saved one equals the one in memory."""

    def number(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError(f"{value!r} is a {type(value).__name__}")

    try:
        return json.loads(json.dumps(report, default=number, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Explanation: report must hold what JSON can (strings, finite numbers, lists, "
            f"dicts, None): {error}"
        ) from error


def _examples(report: dict[str, Any], batch: int) -> dict[str, Any]:
    """The report, after a look at what it tells of each example."""
    told = report.get("examples")
    good = isinstance(told, list) and len(told) == batch and all(isinstance(x, dict) for x in told)
    if told is not None and not good:
        raise ValueError(
            f"Explanation: report['examples'] must be a list of {batch} dictionaries, one per "
            "example"
        )
    return report


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    # The terminal's IPython has a shell too, but can display only text.
    return hasattr(shell, "kernel")
