"""What a report draws: plain values, whoever made them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Real, UInt8


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """What one method found for one example.

    Attributes:
      title: the name of the method.
      target: what is explained.
      score: the explained score.
      signed: whether relevance may be negative.
      image: the image as shown, None where there is none.
      map: relevance of the image, None where the method has none.
      words: the words and their relevance; empty where the method has none.
      flag: what the map says of the explained word; empty where the word is not judged.
      flagged: the end of the target that is flagged; empty where nothing is.
      about: where the input comes from, as (name, text), such as ("file", "scene.png").
      notes: what to know before reading the map, such as that the image is unlike those the
        model was trained on.
      word: the explained word of a caption; "" where no word is explained.
      caption: panels of one number stand for the words of one caption, one after the other.
    """

    title: str
    target: str
    score: float
    signed: bool
    image: UInt8[np.ndarray, "height width 3"] | None = None
    map: Real[np.ndarray, "rows columns"] | None = None
    words: Sequence[tuple[str, float]] = ()
    flag: str = ""
    flagged: str = ""
    about: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    word: str = ""
    caption: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Column:
    """What one method found: a panel per example, and what is said of all of them.

    Attributes:
      panels: at least one, all with the same title.
      model: the name of the model; may be empty.
      settings: the settings of the method, in words; may be empty.
      meaning: what its relevance means, in a sentence; may be empty.
      report: entries for the table below the panels; dictionaries may be nested.
    """

    panels: tuple[Panel, ...]
    model: str = ""
    settings: str = ""
    meaning: str = ""
    report: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name of the method."""
        return self.panels[0].title


@runtime_checkable
class Drawable(Protocol):
    """What a report can draw, such as `jaxrel.Explanation`."""

    def column(self) -> Column:
        """The column of the report that shows this."""


Explanations = Sequence[Drawable] | Drawable


def columns(explanations: Explanations) -> list[Column]:
    """The columns of a report, after making sure that they can stand side by side.

    Raises:
      ValueError: there are none, or they explain different inputs.
    """
    given = [explanations] if isinstance(explanations, Drawable) else explanations
    found = [one.column() for one in given]
    if not found:
        raise ValueError("a report needs at least one explanation, got an empty list")
    for other in found[1:]:
        if what := _difference(found[0], other):
            raise ValueError(
                f"explanations side by side must be of the same inputs; {found[0].title!r} and "
                f"{other.title!r} differ in {what}"
            )
    return found


def rows(side_by_side: Sequence[Column]) -> list[tuple[Panel, ...]]:
    """The panels of each example, one per column."""
    return list(zip(*(column.panels for column in side_by_side), strict=True))


def shown_image(row: Sequence[Panel]) -> UInt8[np.ndarray, "height width 3"] | None:
    """The image of one example, from the first panel that has one."""
    return next((panel.image for panel in row if panel.image is not None), None)


Row = Sequence[Panel]


def views(side_by_side: Sequence[Column]) -> list[list[Row]]:
    """The rows that are shown together: the words of a caption, or one example alone."""
    together: list[list[Row]] = []
    for row in rows(side_by_side):
        caption = row[0].caption
        if together and caption is not None and together[-1][0][0].caption == caption:
            together[-1].append(row)
        else:
            together.append([row])
    return together


def named(side_by_side: Sequence[Column]) -> list[str]:
    """The name of each column: its method, with its settings where others share the method."""
    titles = [column.title for column in side_by_side]
    return [
        f"{column.title} ({column.settings})"
        if titles.count(column.title) > 1 and column.settings
        else column.title
        for column in side_by_side
    ]


def _difference(a: Column, b: Column) -> str | None:
    if [panel.target for panel in a.panels] != [panel.target for panel in b.panels]:
        return "target"
    pairs = list(zip(a.panels, b.panels, strict=True))
    # A method may explain one modality only: its words or images are then left out.
    words = [([w for w, _ in x.words], [w for w, _ in y.words]) for x, y in pairs]
    if any(x and y and x != y for x, y in words):
        return "tokens"
    images = [(x.image, y.image) for x, y in pairs if x.image is not None and y.image is not None]
    return None if all(np.array_equal(x, y) for x, y in images) else "images"
