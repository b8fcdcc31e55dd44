"""Where rows come from: a folder, CSV, JSONL, Parquet, and the files of COCO, VQA v2 and Flickr30k.

A `Source` knows its ids, and reads any range of its rows; images are read by whoever explains.
"""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrel.batch.rows import Row
from jaxrel.explanations.tables import required
from jaxrel.images import is_address

SUFFIXES = frozenset(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm".split())
COLUMNS = ("id", "image", "text", "target")


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Rows of a file or a folder.

    Attributes:
      ids: all ids, in order.
      read: `(start, stop) -> rows`.
      are_questions: whether the texts are questions, as the file says.
    """

    ids: Sequence[str]
    read: Callable[[int, int], list[Row]]
    are_questions: bool = False

    @property
    def digest(self) -> str:
        """What tells another list of rows apart: a digest of the ids in order."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:16]


def open_source(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
    text: str | None = None,
) -> Source:
    """The rows of a file or a folder.

    Args:
      path: a folder of images; a .csv, .jsonl or .parquet file; a .json file of COCO captions
        (or Flickr30k in Karpathy's format) or of VQA v2's questions.
      columns: the file's names of "id", "image", "text" and "target", where they are others.
      images: the folder that file names of images are in; by default the file's own.
      text: the text of every row, where the rows have none.

    Raises:
      ValueError: there are no rows; a column is missing; ids are missing or twice; the file is not
        what its suffix says.
      OSError: there is no such file, or it cannot be read.
      ModuleNotFoundError: pyarrow is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder; check the name")
    suffix = path.suffix.lower()
    if columns and (path.is_dir() or suffix == ".json"):
        raise ValueError(
            f"{path} has no columns to be named ({', '.join(columns)}); those of .csv, .jsonl and "
            ".parquet files have names"
        )
    if path.is_dir():
        return _listed(path, _folder_rows(path), text)
    root = path.parent if images is None else images
    if suffix == ".parquet":
        return _parquet(path, dict(columns or {}), root, text)
    if suffix not in (".csv", ".jsonl", ".json"):
        raise ValueError(
            f"{path}: a folder of images, .csv, .jsonl, .parquet or .json (COCO captions, VQA v2 "
            f"questions, Flickr30k) can be read, not {suffix or 'a file without suffix'}"
        )
    if suffix == ".json":
        rows, are_questions = _annotation_rows(path)
    else:
        rows, are_questions = _table_rows(path, dict(columns or {})), False
    source = _listed(path, [_placed(row, root) for row in rows], text)
    return dataclasses.replace(source, are_questions=are_questions)


def _listed(path: Path, rows: list[Row], text: str | None) -> Source:
    """A source of rows that are at hand."""
    if text is not None:
        rows = [row if row["text"] is not None else row | {"text": text} for row in rows]
    ids = _checked_ids(path, [row["id"] for row in rows])
    rows = [row | {"id": one} for row, one in zip(rows, ids, strict=True)]
    return Source(ids, lambda start, stop: rows[start:stop])


def _checked_ids(path: Path, given: Sequence[Any]) -> list[str]:
    if not given:
        raise ValueError(f"{path} holds no rows to explain; give at least one image")
    missing = [i for i, one in enumerate(given) if one is None or one == ""]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{path}: row {missing[0] + 1} has no id ({len(missing)} of {len(given)} rows); give "
            "all rows an id, or none and they are numbered"
        )
    ids = [str(i if missing else one) for i, one in enumerate(given)]
    twice = [one for one, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(
            f"{path}: the id {twice[0]!r} is there {ids.count(twice[0])} times ({len(twice)} such "
            "ids); ids name rows: give each its own, or leave the column out"
        )
    return ids


def _folder_rows(path: Path) -> list[Row]:
    files = sorted(x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())
    if not files:
        raise ValueError(f"{path} holds no images; they end in {', '.join(sorted(SUFFIXES))}")
    return [_row(str(x.relative_to(path)), str(x)) for x in files]


def _row(identity: Any, image: Any, text: Any = None, target: Any = None) -> Row:
    return {"id": identity, "image": image, "text": text, "target": target}


def _placed(row: Row, root: Path) -> Row:
    """A row whose image's file name is looked for in a folder."""
    image = row["image"]
    # An address stays as it is, so that the row's error is of it.
    there = isinstance(image, str) and not is_address(image)
    return row | {"image": str(root / image)} if there else row


def _table_rows(path: Path, names: dict[str, str]) -> list[Row]:
    """The rows of a CSV or JSONL file."""
    csv = path.suffix.lower() == ".csv"
    reader = required("pyarrow.csv" if csv else "pyarrow.json")
    pa = required("pyarrow")
    try:
        if csv:
            found = reader.read_csv(path, convert_options=_as_text(reader, path, names))
        else:
            found = reader.read_json(path)
        return _named_rows(path, found, names)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        needed = "rows with commas between columns" if csv else "one JSON object per line"
        raise ValueError(
            f"{path} cannot be read ({_fault(path) or str(error).strip()}); what is read is UTF-8, "
            f"with {needed}: mend the file, or write it anew"
        ) from None


def _fault(path: Path) -> str:
    """The first line of a file that is not UTF-8, or where each should be JSON, is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
                if path.suffix.lower() == ".jsonl" and text.strip():
                    json.loads(text)
            except ValueError as error:
                return f"line {number}: {error}"
    return ""


def _as_text(reader: Any, path: Path, names: dict[str, str]) -> Any:
    """Ids, names and texts as they are written: 007 is not 7, and "null" is a word."""
    pa = required("pyarrow")
    types = {names.get(name, name): pa.string() for name in COLUMNS}
    return reader.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])


def _named_rows(path: Path, found: Any, names: dict[str, str]) -> list[Row]:
    chosen = _columns(path, found.column_names, names)
    return [
        {name: row.get(chosen[name]) if name in chosen else None for name in COLUMNS}
        for row in found.select([*chosen.values()]).to_pylist()
    ]


def _columns(path: Path, there: Sequence[str], names: dict[str, str]) -> dict[str, str]:
    """By our name, the file's column; ValueError for one that is missing."""
    listed = ", ".join(there)
    unknown = [name for name in names.values() if name not in there]
    if unknown:
        raise ValueError(f"{path} has no column {unknown[0]!r}; it has {listed}")
    chosen = {name: names.get(name, name) for name in COLUMNS if names.get(name, name) in there}
    if "image" not in chosen and len(there) == 1 and (found := set(listed) & set(";\t|")):
        raise ValueError(
            f"{path} has one column, {listed!r:.80}: separate columns by commas, not by "
            f"{found.pop()!r}"
        )
    if "image" not in chosen:
        raise ValueError(
            f"{path} has no column 'image'; it has {listed}: name the one that holds the images "
            "with --columns image=NAME"
        )
    twice = [name for name in chosen.values() if there.count(name) > 1]
    if twice:
        raise ValueError(
            f"{path} has {there.count(twice[0])} columns {twice[0]!r}: give each a name of its own"
        )
    return chosen


def _annotation_rows(path: Path) -> tuple[list[Row], bool]:
    """The rows of a JSON file, by what it holds, and whether they are questions."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    try:
        if isinstance(held, dict) and "questions" in held:
            return _vqa(path, held), True
        if isinstance(held, dict) and "annotations" in held and "images" in held:
            return _coco(held), False
        if isinstance(held, dict) and "images" in held:
            return _karpathy(held), False
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: an entry lacks {error}; fetch the file again") from None
    raise ValueError(
        f"{path} is neither COCO's captions (images, annotations), nor VQA v2's questions, nor "
        "captions in Karpathy's format (images with sentences); use .jsonl for rows of your own"
    )


def _coco(held: Mapping) -> list[Row]:
    """A row per caption, with the caption's id (Lin et al. 2014)."""
    files = {image["id"]: image["file_name"] for image in held["images"]}
    return [
        _row(one["id"], files[one["image_id"]], one["caption"].strip())
        for one in held["annotations"]
    ]


def _vqa(path: Path, held: Mapping) -> list[Row]:
    """A row per question, with its id (Goyal et al. 2017); images are named as COCO's are."""
    part = held.get("data_subtype", "")
    if not part:
        raise ValueError(f"{path} does not say its data_subtype (such as val2014)")
    return [
        _row(
            one["question_id"],
            f"COCO_{part}_{one['image_id']:012d}.jpg",
            one["question"],
        )
        for one in held["questions"]
    ]


def _karpathy(held: Mapping) -> list[Row]:
    """A row per sentence, with its id: Flickr30k and COCO in Karpathy's format."""
    return [
        _row(sentence["sentid"], image["filename"], sentence["raw"].strip())
        for image in held["images"]
        for sentence in image["sentences"]
    ]


def _parquet(path: Path, names: dict[str, str], root: Path, text: str | None) -> Source:
    """A Parquet file, of which only the ids are held; the rest is read by row group."""
    pa, pq = required("pyarrow"), required("pyarrow.parquet")
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}") from None
    chosen = _columns(path, file.schema_arrow.names, names)
    count = file.metadata.num_rows
    given = [None] * count
    if "id" in chosen:
        given = file.read([chosen["id"]]).column(0).to_pylist()
    ids = _checked_ids(path, given)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    # One is held: rows are read in order.
    @functools.lru_cache(maxsize=1)
    def held(group: int) -> Any:
        return file.read_row_group(group, [*chosen.values()])

    def read(start: int, stop: int) -> list[Row]:
        rows, first = [], 0
        for group, size in enumerate(groups):
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                rows += _named_rows(path, held(group).slice(low, high - low), names)
            first += size
        placed = [_placed(row, root) for row in rows]
        return [
            row | {"id": one, "text": text if row["text"] is None else row["text"]}
            for row, one in zip(placed, ids[start:stop], strict=True)
        ]

    return Source(ids, read)
