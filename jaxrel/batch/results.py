"""Chosen rows of what a job wrote, as explanations again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrel.explanations.explain import family
from jaxrel.explanations.result import Explanation
from jaxrel.explanations.tables import COLUMNS, flag_of, required
from jaxrel.images import read_image

Found = Mapping[str, Any]

_ROWS = """
  with everything as (
    select * from read_parquet($parts, union_by_name = true, file_row_number = true)
    where error is null
  ),
  ordered as (
    select id, "row", row_number() over (order by {order}, id, "row") as place
    from (
      select distinct on (id, "row") * from everything where {where}
      order by id, "row", file_row_number
    )
  ),
  ends as (
    select place, id is distinct from lead(id) over (order by place) as is_end from ordered
  ),
  counted as (
    select count(*) as total, min(place) filter (is_end and place >= $limit) as last from ends
  )
  select everything.*, place, total
  from everything join ordered using (id, "row"), counted
  where place <= coalesce(last, total) order by place, file_row_number
"""

# What a report says of the method, and of every row alike.
_OF_METHOD = frozenset({"coverage", "rules"})
_FAILED = """
  select id, error from read_parquet($parts, union_by_name = true)
  where error is not null and {where} order by {order}
"""


class Chosen(NamedTuple):
    """Rows that a condition holds for.

    Attributes:
      rows: those to be shown, with all methods of each.
      shown: how many they are, methods aside.
      total: how many there are without a limit.
    """

    rows: list[Found]
    shown: int
    total: int


def find_rows(folder: Path, where: str, *, order: str, limit: int) -> Chosen:
    """The rows of a job that a condition holds for, with all methods of each.

    Args:
      folder: what `jaxrel batch` wrote.
      where: a condition in DuckDB's SQL over `jaxrel.batch.COLUMNS`.
      order: the columns that say the order.
      limit: at most so many rows, and those that follow the last of them in its caption.

    Raises:
      ValueError: the condition cannot be understood, or holds for no row.
      ModuleNotFoundError: DuckDB is missing.
    """
    rows = _query(_ROWS, folder, where, order, limit=limit)
    if not rows:
        failed = len(_query(_FAILED, folder, where, "id"))
        have = "has it and has" if failed == 1 else "have it and have"
        raise ValueError(
            f"no row of {folder} without an error has {where!r}"
            + (f"; {failed} with an error {have} no picture: --errors lists them" * bool(failed))
        )
    return Chosen(rows, rows[-1]["place"], rows[-1]["total"])


def find_errors(folder: Path, where: str) -> list[tuple[str, str]]:
    """The id and the error of each row that could not be explained, where a condition holds.

    Raises:
      ValueError: the condition cannot be understood.
      ModuleNotFoundError: DuckDB is missing.
    """
    return [(row["id"], row["error"]) for row in _query(_FAILED, folder, where, "id")]


def _query(query: str, folder: Path, where: str, order: str, **values: Any) -> list[Found]:
    duckdb = required("duckdb")
    parts = sorted(map(str, folder.glob("part-*.parquet")))
    if not parts:
        raise ValueError(f"{folder} holds no results yet; `jaxrel batch` writes them part by part")
    try:
        asked = query.format(where=f"({where})", order=order)
        found = duckdb.execute(asked, {"parts": parts, **values})
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
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


def explanations(rows: Sequence[Found], model: Any, *, name: str) -> list[Explanation]:
    """Rows of a table as explanations, one per method.

    Args:
      rows: of `Chosen`.
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
        # Tables were once without this column.
        flags=[flag_of(row.get("flag")) for row in rows],
        report=_report(rows),
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


def _report(rows: Sequence[Found]) -> Any:
    """The report of all rows, which names each of them and counts the tokens of the table."""
    reports = [json.loads(row["report"]) for row in rows]
    report = _joined(reports) | {name: reports[0][name] for name in _OF_METHOD & {*reports[0]}}
    # The parts of a job number the captions anew.
    numbers = {one: i for i, one in enumerate(dict.fromkeys(row["id"] for row in rows))}
    for row, told in zip(rows, report.get("examples", ()), strict=False):
        if row["id"] != told.get("file"):
            told["id"] = row["id"]
        if "caption" in told:
            told["caption"] = numbers[row["id"]]
            told["position"] = _position(row, told)
    return report


def _position(row: Found, told: Found) -> int | None:
    """The place of the explained word in the tokens of a row."""
    if "position" not in told:
        return row["position"]
    # Tables were once without this column. Their report counts the tokens that they left out: the
    # start, and unknown words.
    tokens, last = row["tokens"] or [], told["position"] - 1
    same = [i for i, token in enumerate(tokens[: last + 1]) if token == told["word"]]
    return same[-1] if same else last


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
