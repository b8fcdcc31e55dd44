"""Chosen rows of what a job wrote, as explanations again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrel.explanations.explain import family
from jaxrel.explanations.result import Explanation
from jaxrel.explanations.tables import COLUMNS, required
from jaxrel.images import read_image

Found = Mapping[str, Any]

_QUERY = """
  with everything as (select * from read_parquet($parts) where error is null),
  chosen as (
    select id, "row", row_number() over (order by {order}) as place
    from (select distinct on (id, "row") * from everything where {where})
  )
  select everything.* from everything join chosen using (id, "row")
  where place <= $limit order by place, method
"""


def find_rows(folder: Path, where: str, *, order: str, limit: int) -> list[Found]:
    """The rows of a job that a condition holds for, with all methods of each.

    Args:
      folder: what `jaxrel batch` wrote.
      where: a condition in DuckDB's SQL over `jaxrel.batch.COLUMNS`.
      order: the columns that say the order.
      limit: at most so many rows.

    Raises:
      ValueError: the condition cannot be understood, or holds for no row.
      ModuleNotFoundError: DuckDB is missing.
    """
    duckdb = required("duckdb")
    parts = sorted(map(str, folder.glob("part-*.parquet")))
    if not parts:
        raise ValueError(f"{folder} holds no results yet; `jaxrel batch` writes them part by part")
    try:
        found = duckdb.execute(
            _QUERY.format(where=f"({where})", order=order), {"parts": parts, "limit": limit}
        )
        names = [column[0] for column in found.description]
        rows: list[Found] = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    except duckdb.Error as error:
        damaged = next((part for part in parts if part in str(error)), None)
        if damaged is not None:
            raise ValueError(
                f"{damaged} cannot be read ({str(error).splitlines()[0]}): delete it, and give the "
                "command of the job again, which writes it anew"
            ) from None
        raise ValueError(
            f"--where {where!r} --order {order!r} cannot be read as SQL over the columns "
            f"{', '.join(COLUMNS)}: {str(error).splitlines()[0]}"
        ) from None
    if not rows:
        raise ValueError(f"no row of {folder} without an error has {where!r}")
    return rows


def explanations(rows: Sequence[Found], model: Any, *, name: str) -> list[Explanation]:
    """Rows of a table as explanations, one per method.

    Args:
      rows: as `find_rows` returns them.
      model: the model that explained them; it says which part of an image it saw.
      name: its name.

    Raises:
      OSError, ValueError: an image is not there any more, or cannot be read.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    pixels = {row["image"]: _seen(row["image"], model) for row in rows}
    return [
        _explanation([row for row in rows if row["method"] == method], pixels, model, name)
        for method in methods
    ]


def _seen(image: str | None, model: Any) -> np.ndarray | None:
    return None if image is None else np.asarray(model.seen(read_image(image)))


def _explanation(rows: Sequence[Found], pixels: Mapping, model: Any, name: str) -> Explanation:
    first = rows[0]
    tokens = [row["tokens"] or [] for row in rows]
    length = max(map(len, tokens))
    filled = [[*words, *[""] * (length - len(words))] for words in tokens]
    text = [
        np.pad(np.asarray(row["text_relevance"] or [], np.float32), (0, length - len(words)))
        for row, words in zip(rows, tokens, strict=True)
    ]
    shown = [pixels[row["image"]] for row in rows]
    return Explanation(
        target=[row["target"] for row in rows],
        score=[row["score"] for row in rows],
        method=first["method"],
        signed=first["method"] in family(model).signed,
        image=_maps(rows, model),
        text=np.stack(text) if length else None,
        tokens=filled if length else (),
        pixels=None if any(one is None for one in shown) else shown,
        model=name,
        report=_joined([json.loads(row["report"]) for row in rows]),
    )


def _maps(rows: Sequence[Found], model: Any) -> np.ndarray | None:
    if rows[0]["image_relevance"] is None:
        return None
    flat = np.asarray([row["image_relevance"] for row in rows], np.float32)
    return flat.reshape(len(rows), *_grid(flat.shape[1], model))


def _grid(size: int, model: Any) -> tuple[int, int]:
    """Rows and columns of maps of this size: of patches, or of square pixels."""
    grids = [stream.grid for stream in model.layout.streams if stream.grid is not None]
    side = round(size**0.5)
    return next((grid for grid in grids if np.prod(grid) == size), (side, side))


def _joined(reports: Sequence[Any]) -> Any:
    """Reports of rows as one report, with an entry per row."""
    first = reports[0]
    if isinstance(first, dict):
        return {
            # What is told of an example stays together, whatever is told of the others.
            name: [report[name] for report in reports]
            if name == "examples"
            else _joined([report[name] for report in reports])
            for name in first
            if all(name in report for report in reports)
        }
    return list(reports)
