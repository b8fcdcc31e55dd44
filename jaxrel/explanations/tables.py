"""Explanations as tables: a row per example for Parquet, a row per token or patch for pandas.

pyarrow and pandas are optional (`pip install 'jaxrel[batch]'`), and are imported when needed.
"""

import dataclasses
import importlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrel.explanations.joined import part
from jaxrel.flags import Flag

# The columns of a table with a row per example, in this order.
COLUMNS = (
    "id",
    "row",
    "image",
    "text",
    "target",
    "score",
    "method",
    "tokens",
    "position",
    "text_relevance",
    "image_relevance",
    "flag",
    "report",
    "error",
)

Columns = dict[str, list]


def required(module: str, *, extra: str = "batch") -> Any:
    """An optional package, or ModuleNotFoundError that says with which extra it comes."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"this needs {package}: pip install 'jaxrel[{extra}]'", name=package
        ) from error


def example_of(explanation: Any) -> Sequence[int]:
    """By row of an explanation, the number of its example; several words may be of one."""
    return explanation.report.get("example", range(len(explanation)))


def columns(
    explanation: Any, *, ids: Sequence[str] | None = None, given: Sequence[Mapping] | None = None
) -> Columns:
    """The columns of a table with a row per example of an explanation.

    Args:
      explanation: an `Explanation`.
      ids: what to call its examples, by number; by default their numbers.
      given: by the same number, "image" and "text" as they were given (names, or None).

    Returns:
      {column: a list}; see `COLUMNS`.
    """
    count, example = len(explanation), example_of(explanation)
    numbers, places = dict.fromkeys(example, 0), []
    for one in example:
        places.append(numbers[one])
        numbers[one] += 1
    told = explanation.report.get("examples", [{}] * count)
    reports = [part(_kept(explanation.report), slice(i, i + 1), count) for i in range(count)]
    shown = [[i for i, token in enumerate(row) if token] for row in explanation.tokens]
    rows = [{"image": None, "text": None} if given is None else given[i] for i in example]
    text, maps, nothing = explanation.text, explanation.image, [None] * count
    return {
        "id": [str(i) if ids is None else ids[i] for i in example],
        "row": places,
        "image": [row["image"] for row in rows],
        "text": [row["text"] for row in rows],
        "target": list(explanation.target),
        "score": explanation.score.tolist(),
        "method": [explanation.method] * count,
        "tokens": nothing
        if text is None
        else [[row[i] for i in kept] for row, kept in zip(explanation.tokens, shown, strict=True)],
        "position": nothing
        if text is None
        else [_among(kept, one.get("position")) for kept, one in zip(shown, told, strict=True)],
        "text_relevance": nothing
        if text is None
        else [row[kept] for row, kept in zip(text, shown, strict=True)],
        "image_relevance": nothing if maps is None else list(maps),
        "flag": [_flag(one) for one in explanation.flags] or nothing,
        "report": [json.dumps(_row_report(report)) for report in reports],
        "error": nothing,
    }


def _kept(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what columns say."""
    kept = {name: value for name, value in report.items() if name != "example"}
    if "examples" in kept:
        kept["examples"] = [
            {name: value for name, value in one.items() if name != "position"}
            for one in kept["examples"]
        ]
    return kept


def _among(kept: Sequence[int], position: int | None) -> int | None:
    """The place of a token among those that are kept."""
    return None if position is None else sum(i < position for i in kept)


def _flag(flag: Flag | None) -> dict[str, Any] | None:
    """A flag as a table holds it, with what follows from its numbers."""
    return None if flag is None else dataclasses.asdict(flag) | {"flagged": flag.flagged}


def flag_of(held: Mapping[str, Any] | None) -> Flag | None:
    """A flag from what a table holds."""
    names = [field.name for field in dataclasses.fields(Flag)]
    return None if held is None else Flag(**{name: held[name] for name in names})


def _row_report(report: Any) -> Any:
    """A report of one row: lists of one entry are the entry."""
    if isinstance(report, dict):
        return {name: _row_report(value) for name, value in report.items()}
    return report[0] if isinstance(report, list) and len(report) == 1 else report


def failed(identity: str, given: Mapping, error: str) -> Columns:
    """The columns of one row that could not be explained."""
    known = {"id": identity, "row": 0, "image": given["image"], "text": given["text"]}
    return {name: [known.get(name)] for name in COLUMNS} | {"error": [error]}


def stacked(parts: Sequence[Columns]) -> Columns:
    """Tables one after the other."""
    return {name: [value for part in parts for value in part[name]] for name in COLUMNS}


def schema(shapes: Collection[tuple[int, ...]], *, precision: str = "float32") -> Any:
    """The `pyarrow.Schema` of a table.

    Args:
      shapes: (rows, columns) of the image's relevance by any method. Where there is one, lists have
        a fixed length, and the field's metadata says it as `shape`.
      precision: of the image's relevance, "float32" or "float16".
    """
    pa = required("pyarrow")
    number = {"float32": pa.float32(), "float16": pa.float16()}[precision]
    maps, shape = pa.list_(number), None
    if len(shapes) == 1:
        ((rows, columns),) = shapes
        maps, shape = pa.list_(number, rows * columns), {"shape": json.dumps([rows, columns])}
    text, real = pa.string(), pa.float64()
    flag = {"word": text, "statistic": text, "value": real, "threshold": real, "precision": real}
    flag |= {"evidence": text, "flagged": pa.bool_()}
    fields = {
        "id": pa.field("id", pa.string(), nullable=False),
        "row": pa.field("row", pa.int32(), nullable=False),
        "score": pa.field("score", pa.float32()),
        "position": pa.field("position", pa.int32()),
        "tokens": pa.field("tokens", pa.list_(pa.string())),
        "text_relevance": pa.field("text_relevance", pa.list_(pa.float32())),
        "image_relevance": pa.field("image_relevance", maps, metadata=shape),
        "flag": pa.field("flag", pa.struct([*flag.items()])),
    }
    return pa.schema([fields.get(name, pa.field(name, pa.string())) for name in COLUMNS])


def table(
    found: Columns,
    *,
    shapes: Collection[tuple[int, ...]] | None = None,
    precision: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """Columns as a `pyarrow.Table`.

    Args:
      found: the columns.
      shapes: as in `schema`; by default those of the maps that are there.
      precision: as in `schema`.
      metadata: what the file says of itself.
    """
    pa = required("pyarrow")
    if shapes is None:
        shapes = {x.shape for x in found["image_relevance"] if x is not None}
    types = schema(shapes, precision=precision)
    arrays = [
        _maps(found[field.name], field.type)
        if field.name == "image_relevance"
        else pa.array(found[field.name], field.type)
        for field in types
    ]
    return pa.Table.from_arrays(arrays, schema=types.with_metadata(metadata))


def _maps(maps: Sequence[np.ndarray | None], kind: Any) -> Any:
    """Maps as an array of lists, missing ones as null."""
    pa = required("pyarrow")
    if not pa.types.is_fixed_size_list(kind):
        dtype = kind.value_type.to_pandas_dtype()
        return pa.array([None if x is None else x.ravel().astype(dtype) for x in maps], kind)
    missing = np.asarray([one is None for one in maps], bool)
    flat = np.zeros((len(maps), kind.list_size), kind.value_type.to_pandas_dtype())
    for i in np.flatnonzero(~missing).tolist():
        flat[i] = np.asarray(maps[i]).ravel()
    mask = pa.array(missing) if missing.any() else None
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), type=kind, mask=mask)


def parquet(found: Columns, **options: Any) -> bytes:
    """Columns as the bytes of a Parquet file; options as of `table`."""
    buffer = io.BytesIO()
    required("pyarrow.parquet").write_table(table(found, **options), buffer, compression="zstd")
    return buffer.getvalue()


def dataframe(explanation: Any) -> Any:
    """See `Explanation.to_dataframe`."""
    pandas = required("pandas")
    parts = [x for x in (_patches(explanation), _words(explanation)) if x is not None]
    whole = {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}
    # By example, the image first.
    order = np.argsort(whole["example"], kind="stable")
    frame = pandas.DataFrame({name: values[order] for name, values in whole.items()})
    frame = frame.astype({"row": "Int64", "column": "Int64"})
    frame.insert(1, "target", np.asarray(explanation.target, object)[frame["example"]])
    frame.insert(2, "score", explanation.score[frame["example"]])
    frame.insert(3, "method", explanation.method)
    return frame


def _patches(explanation: Any) -> dict[str, np.ndarray] | None:
    maps = explanation.image
    if maps is None:
        return None
    example, row, column = (x.ravel() for x in np.indices(maps.shape))
    return {
        "example": example,
        "modality": np.full(maps.size, "image", object),
        "token": np.full(maps.size, "", object),
        "position": row * maps.shape[2] + column,
        "row": row.astype(object),
        "column": column.astype(object),
        "relevance": maps.ravel(),
    }


def _words(explanation: Any) -> dict[str, np.ndarray] | None:
    if explanation.text is None:
        return None
    tokens = np.asarray(explanation.tokens, object)
    example, position = np.nonzero(tokens != "")
    return {
        "example": example,
        "modality": np.full(len(example), "text", object),
        "token": tokens[example, position],
        "position": position,
        "row": np.full(len(example), None, object),
        "column": np.full(len(example), None, object),
        "relevance": explanation.text[example, position],
    }
