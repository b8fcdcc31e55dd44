"""Rows to explain, in the forms that engines hand them over, and back in the same form."""

import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrel.explanations.tables import Columns, table
from jaxrel.images import read_image

Row = dict[str, Any]
NAMES = ("id", "image", "text", "target")


def as_rows(
    given: Any, shapes: Callable[[], Collection[tuple[int, ...]]]
) -> tuple[list[Row], Callable[[Columns], Any]]:
    """Rows as a list of dictionaries, and what brings columns into the form that they came in.

    Args:
      given: a `pyarrow.Table`, a pandas DataFrame, a mapping from names to columns, or a list of
        mappings.
      shapes: tells those of maps, as of `schema`, where a table is made.

    Raises:
      TypeError: something else.
      ValueError: no rows, columns of different lengths, or no column "image".
    """

    def as_table(found: Columns) -> Any:
        return table(found, shapes=shapes())

    if isinstance(given, Mapping):
        rows = _from_columns({name: list(column) for name, column in given.items()})
        back: Callable = dict
    elif hasattr(given, "to_pylist") and hasattr(given, "column_names"):
        rows, back = given.to_pylist(), as_table
    elif hasattr(given, "to_dict") and hasattr(given, "columns"):
        rows, back = given.to_dict("records"), lambda found: as_table(found).to_pandas()
    elif isinstance(given, list | tuple) and all(isinstance(row, Mapping) for row in given):
        rows, back = [dict(row) for row in given], _as_list
    else:
        raise TypeError(
            "Explainer: rows are a dict of columns, a list of dicts, a pyarrow.Table or a pandas "
            f"DataFrame, got {type(given).__name__}"
        )
    if not rows:
        raise ValueError("Explainer: there are no rows; give at least one")
    if "image" not in rows[0]:
        raise ValueError(
            f"Explainer: rows need a column 'image' (and may have {', '.join(NAMES)}); they have "
            f"{', '.join(map(str, rows[0]))}"
        )
    return [_named(row, i) for i, row in enumerate(rows)], back


def _from_columns(columns: Mapping[str, list]) -> list[Row]:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Explainer: columns differ in length: {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _as_list(found: Columns) -> list[Row]:
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _named(row: Mapping[str, Any], number: int) -> Row:
    named = {name: _plain(row.get(name)) for name in NAMES}
    identity = named["id"]
    return named | {"id": str(number) if identity is None else str(identity)}


def _plain(value: Any) -> Any:
    """A value as Python has it; pandas writes a missing one as NaN."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and value != value else value


def image_of(value: Any) -> Any:
    """An image from what a row may hold: a path, bytes, an image, an array, or bytes and a path.

    Raises:
      TypeError: something else.
      OSError, ValueError: see `read_image`.
    """
    if isinstance(value, Mapping) and {"bytes", "path"} & {*value}:
        held = value.get("bytes")
        value = held if held is not None else value.get("path")
    match value:
        case None:
            raise ValueError("the row has no image")
        case bytes():
            return read_image(io.BytesIO(value))
        case str() | os.PathLike():
            return read_image(value)
        case _:
            return value


def name_of(value: Any) -> str | None:
    """How a table names an image: by its path, if it has one."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return str(value) if isinstance(value, str | Path) else None


def given_of(rows: Sequence[Row]) -> list[Row]:
    """What a table says of each row as it was given."""
    return [
        {"image": name_of(row["image"]), "text": None if row["text"] is None else str(row["text"])}
        for row in rows
    ]
