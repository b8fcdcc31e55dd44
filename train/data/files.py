"""Files of downloaded data sets, read with checks: JSON annotations and folders of images."""

import dataclasses
import json
import operator
import os
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import UInt8
from tqdm.auto import tqdm

from jaxrel.images import read_image

Record = dict[str, Any]
Choice = Literal["error", "skip"]
StrPath = str | os.PathLike[str]

# The lists that a file of each kind holds at the top, and where such a file is found.
_LISTS: dict[str, tuple[str, ...]] = {
    "COCO captions": ("images", "annotations"),
    "COCO instances": ("images", "annotations", "categories"),
    "Karpathy split": ("images",),
    "VQA questions": ("questions",),
    "VQA annotations": ("annotations",),
}
_EXAMPLES = {
    "COCO captions": "captions_val2017.json",
    "COCO instances": "instances_val2017.json",
    "Karpathy split": "dataset_coco.json",
    "VQA questions": "v2_OpenEnded_mscoco_val2014_questions.json",
    "VQA annotations": "v2_mscoco_val2014_annotations.json",
}
_WORDS = {int: "a whole number", str: "a text", list: "a list", float: "a number"}
_NAMED = 3  # faulty things that one message names

# read_image swaps the process's list of warning filters while it reads; two threads that do so
# at once (Grain reads with threads) can leave the wrong list behind.
_READING = threading.Lock()


class Place(NamedTuple):
    """Where a record is: the file, the list in it, the number in the list (from 0)."""

    path: Path
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}: {self.name}[{self.number}]"


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check an argument that is one of several words.

    Raises:
      ValueError: it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def check_layout(
    what: str, files: Mapping[Path, str], folders: Mapping[Path, str], advice: str
) -> None:
    """Check that everything which will be read is there.

    Args:
      what: the data set, for the message.
      files: paths, and what each is.
      folders: likewise.
      advice: what to do when something is missing.

    Raises:
      FileNotFoundError: something is missing; the message lists all that is expected.
    """
    missing = [path for path in files if not path.is_file()]
    missing += [path for path in folders if not path.is_dir()]
    if missing:
        expected = [f"the file {path} ({meaning})" for path, meaning in files.items()]
        expected += [f"the folder {path} ({meaning})" for path, meaning in folders.items()]
        raise FileNotFoundError(
            f"{what}: {' and '.join(map(str, missing))} {'is' if len(missing) == 1 else 'are'} "
            f"missing. Expected: {'; '.join(expected)}. {advice}"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
      OSError: it cannot be opened.
      ValueError: it is not valid JSON; the message says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no JSON: byte {error.start} is not UTF-8 text ({error.reason}); unpack it "
            "if it is an archive, or download it again"
        ) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} (character "
            f"{error.pos} of {len(text)}): {error.msg}; the file is cut short or damaged, "
            "download or unpack it again"
        ) from None


def read_annotations(path: Path, kind: str) -> Record:
    """Read an annotation file and check that it is of the kind that is wanted.

    Args:
      path: of the JSON file.
      kind: "COCO captions", "COCO instances", "Karpathy split", "VQA questions" or
        "VQA annotations".

    Returns:
      The object at the top; the lists that the kind needs are there.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it is not valid JSON, or of another kind.
    """
    document = read_json(path)
    wanted = f"{kind} file, an object with {' and '.join(map(repr, _LISTS[kind]))}"
    if not isinstance(document, dict):
        raise ValueError(
            f"{path} holds {_short(document)} at the top; expected a {wanted}, such as "
            f"{_EXAMPLES[kind]}"
        )
    found = _kind(document)
    complete = all(isinstance(document.get(name), list) for name in _LISTS[kind])
    if not complete or found not in (None, kind):
        keys = ", ".join(map(repr, document)) or "nothing"
        guess = f"looks like a {found} file" if found else "is of no known kind"
        raise ValueError(
            f"{path} {guess} (it holds {keys}); expected a {wanted}, such as {_EXAMPLES[kind]}"
        )
    return document


def _kind(document: Record) -> str | None:
    image, annotation = _first(document, "images"), _first(document, "annotations")
    if "questions" in document:
        return "VQA questions"
    if "sentences" in image:
        return "Karpathy split"
    if "question_id" in annotation:
        return "VQA annotations"
    if "caption" in annotation:
        return "COCO captions"
    if "keypoints" in annotation:
        return "COCO keypoints"
    return "COCO instances" if "bbox" in annotation else None


def _first(document: Record, name: str) -> Record:
    records = document.get(name)
    first = records[0] if isinstance(records, list) and records else None
    return first if isinstance(first, dict) else {}


def places(parent: Record, name: str, path: Path, prefix: str = "") -> Iterator[tuple[Place, Any]]:
    """Go through a list of objects in a file.

    Args:
      parent: the object that holds the list.
      name: the list's name in it.
      path: of the file, for messages.
      prefix: where the parent is in the file, such as "images[3]."

    Yields:
      The place of each object, and the object.

    Raises:
      ValueError: something in the list is no object.
    """
    for index, record in enumerate(parent[name]):
        place = Place(path, prefix + name, index)
        if not isinstance(record, dict):
            raise ValueError(f"{place} is {_short(record)}; expected an object. {_again(path)}")
        yield place, record


def field(record: Record, name: str, kind: type, place: Place) -> Any:
    """Return a field of a record.

    Args:
      record: of a file.
      name: of the field.
      kind: int, float (which takes whole numbers too), str or list.
      place: of the record.

    Raises:
      ValueError: there is no such field, or it has another type.
    """
    if name not in record:
        has = ", ".join(map(repr, record)) or "nothing"
        raise ValueError(
            f"{place} has no {name!r}; expected {_WORDS[kind]}, and it has {has}. "
            f"{_again(place.path)}"
        )
    value = record[name]
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or isinstance(value, bool):
        raise ValueError(
            f"{place}: {name!r} is {_short(value)}; expected {_WORDS[kind]}. {_again(place.path)}"
        )
    return value


def texts(record: Record, name: str, place: Place) -> tuple[str, ...]:
    """Return a field that is a list of texts; raises ValueError as `field` does."""
    value = field(record, name, list, place)
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(
                f"{place}: {name}[{index}] is {_short(text)}; expected a text. {_again(place.path)}"
            )
    return tuple(value)


def file_name(record: Record, name: str, place: Place) -> str:
    """Return a field that names a file or a folder, with no way out of the folder it is in.

    Raises:
      ValueError: as `field` does, or the name has a separator in it.
    """
    value = field(record, name, str, place)
    if value in ("", ".", "..") or any(letter in value for letter in "/\\\0"):
        raise ValueError(
            f"{place}: {name!r} is {value!r}; expected a plain name, without a path. "
            f"{_again(place.path)}"
        )
    return value


def new_id(record: Record, name: str, place: Place, seen: dict[int, int]) -> int:
    """Return an id that no record before had, and note it.

    Args:
      record: of a file.
      name: of the id's field.
      place: of the record.
      seen: the ids so far, with their records' number; this one is added.

    Raises:
      ValueError: the id is missing, no whole number, or not new.
    """
    number = field(record, name, int, place)
    if number in seen:
        raise ValueError(
            f"{place}: {name!r} is {number}, which {place.name}[{seen[number]}] has already; "
            f"expected every record to have its own. {_again(place.path)}"
        )
    seen[number] = place.number
    return number


def leave_out(
    faults: Sequence[str], total: int, what: str, option: str, choice: Choice, path: Path
) -> None:
    """Raise, or warn, about things in a file that cannot be used.

    Args:
      faults: what is wrong, one text each; nothing happens when there are none.
      total: how many there are, good and bad.
      what: the plural, such as "captions".
      option: the argument that decides.
      choice: its value.
      path: of the file.

    Raises:
      ValueError: there are faults, and the choice is "error".
    """
    if not faults:
        return
    message = f"{path}: {len(faults)} of {total} {what} cannot be used: {_few(faults, '; ')}"
    if choice == "error":
        raise ValueError(f'{message}. Correct the file, or leave them out with {option}="skip"')
    warnings.warn(f'{message}. They are left out ({option}="skip")', UserWarning, stacklevel=2)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageSource:
    """Examples with an image each, by index: a source for Grain, or a plain sequence.

    `source[i]` is the record i (a dict) with its image as `"image"`, uint8
    [height, width, 3], RGB, read when it is asked for: grey, CMYK, palette, transparent and
    16-bit images become RGB as `jaxrel.images.read_image` says, and images that the
    camera marked as turned (EXIF orientation) are upright. What index i gives never changes,
    so `grain.MapDataset.source(source)` can be shuffled, sliced by process and resumed.

    Args:
      name: of the data set and split.
      folder: what the records' `"file"` is relative to.
      records: one dict per example, with `"id"`, `"file"` and what belongs to the image. Where
        `"height"` and `"width"` are given, the image must have that size.
    """

    name: str
    folder: Path
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: SupportsIndex) -> Record:
        """Read one example.

        Raises:
          IndexError: there is no such example.
          OSError: the image cannot be opened.
          ValueError: the image is damaged, or not of the size that its record gives.
        """
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples; there is no number {number}")
        record = self.records[number]
        return {**record, "image": self._read(record)}

    def _read(self, record: Record) -> UInt8[np.ndarray, "height width 3"]:
        path = self.folder / record["file"]
        with _READING:
            image = np.array(read_image(path))
        size = (record.get("height", image.shape[0]), record.get("width", image.shape[1]))
        if image.shape[:2] != size:
            raise ValueError(
                f"{path} is {image.shape[0]} x {image.shape[1]} pixels (height x width) upright, "
                f"and the annotations of image {record['id']} are for {size[0]} x {size[1]}, so "
                "its boxes would be wrong; put the original image there, or leave it out with "
                'corrupt="skip"'
            )
        return image

    def __repr__(self) -> str:
        # Grain's DataLoader compares this text when it resumes, so it tells the examples apart
        # and says nothing of the folder, which may have moved.
        return f"ImageSource({self.name!r}, examples={len(self)}, ids={self._checksum():08x})"

    def _checksum(self) -> int:
        ids = ",".join(f"{record['id']}:{record['file']}" for record in self.records)
        return zlib.crc32(ids.encode())


def image_source(
    name: str, folder: Path, records: Iterable[Record], *, missing: Choice, corrupt: Choice
) -> ImageSource:
    """Join records with their images.

    A sequence whose indices stay valid cannot skip a bad image when it is met, so images are
    left out here or not at all: `missing` looks at the names in the folders, which is quick;
    `corrupt="skip"` decodes every image once, which takes minutes for a large data set.

    Args:
      name: of the data set and split.
      folder: what the records' `"file"` is relative to.
      records: one dict per example.
      missing: "error": an image that is not there raises; "skip": its examples are left out,
        with one counted warning.
      corrupt: "error": a damaged image raises when it is read; "skip": every image is read
        now, and the examples of the damaged ones are left out, with one counted warning.

    Returns:
      The source.

    Raises:
      FileNotFoundError: images are missing.
      ValueError: no example is left.
    """
    records = tuple(records)
    files = tuple(dict.fromkeys(record["file"] for record in records))
    present = _present(folder, files)
    absent = [file for file in files if file not in present]
    if absent:
        message = f"{name}: {len(absent)} of {len(files)} images are not in {folder}: "
        message += _few(absent)
        if missing == "error":
            raise FileNotFoundError(
                f"{message}. Unpack the rest of the images there, or leave them out with "
                'missing="skip"'
            )
        warnings.warn(f'{message}. They are left out (missing="skip")', UserWarning, stacklevel=2)
        records = tuple(record for record in records if record["file"] in present)
    source = ImageSource(name, folder, records)
    if corrupt == "skip":
        source = _readable(source)
    if not source.records:
        raise ValueError(f"{name}: no example is left; give a folder with readable images")
    return source


def _present(folder: Path, files: Sequence[str]) -> set[str]:
    """The files that are there; every folder is listed once."""
    present: set[str] = set()
    for parent in {os.path.dirname(file) for file in files}:
        if (folder / parent).is_dir():
            names = os.listdir(folder / parent)
            present.update(f"{parent}/{name}" if parent else name for name in names)
    return present.intersection(files)


def _readable(source: ImageSource) -> ImageSource:
    # Examples of one image (the questions of VQA) share its fate.
    ones = {record["file"]: record for record in source.records}
    faults: dict[str, str] = {}
    for file, record in tqdm(ones.items(), desc=f"checking {source.name}", unit="image"):
        try:
            source._read(record)
        except (OSError, ValueError) as error:
            faults[file] = str(error)
    if faults:
        warnings.warn(
            f"{source.name}: {len(faults)} of {len(ones)} images cannot be read: "
            f'{_few(faults.values(), "; ")}. They are left out (corrupt="skip")',
            UserWarning,
            stacklevel=3,
        )
    kept = tuple(record for record in source.records if record["file"] not in faults)
    return dataclasses.replace(source, records=kept)


def _again(path: Path) -> str:
    return f"Correct {path.name}, or download it again"


def _few(things: Iterable[str], separator: str = ", ") -> str:
    things = list(things)
    more = f"{separator}and {len(things) - _NAMED} more" if len(things) > _NAMED else ""
    return separator.join(things[:_NAMED]) + more


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"
