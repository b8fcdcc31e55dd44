"""The split files of Karpathy and Fei-Fei (2015): images with captions and tokens, one JSON."""

from collections.abc import Sequence
from pathlib import Path

from jaxrel.train.data.files import (
    Choice,
    Place,
    Record,
    field,
    file_name,
    leave_out,
    new_id,
    places,
    read_annotations,
    texts,
)


def parse_splits(split: str, known: Sequence[str], name: str) -> tuple[str, ...]:
    """Read the names of one or several splits, such as "train" or "train+restval".

    Raises:
      ValueError: one of them is not known.
    """
    splits = tuple(part.strip() for part in split.split("+"))
    for part in splits:
        if part not in known:
            raise ValueError(
                f"{name}: split is {split!r}; expected one of {', '.join(known)}, or several "
                "with + between them"
            )
    return splits


def read_split(
    path: Path,
    splits: Sequence[str],
    known: Sequence[str],
    *,
    identity: str,
    folder: str | None,
    blank: Choice,
) -> list[Record]:
    """Read the images of some splits, in the file's order; the whole file is checked.

    Args:
      path: of the JSON file.
      splits: the splits that are wanted.
      known: all that the file may name.
      identity: the field that is the record's `"id"`.
      folder: where the images are; None: the field `filepath` says it.
      blank: what becomes of captions without a word.

    Returns:
      A dict each: `"id"`, `"file"`, `"captions"` (texts, stripped), `"tokens"` (per caption, as
      the file has them), `"caption_ids"`.

    Raises:
      ValueError: the file is damaged, of another kind, or inconsistent.
    """
    document = read_annotations(path, "Karpathy split")
    records, faults, total = [], [], 0
    ids: dict[str, dict[int, int]] = {name: {} for name in {"imgid", identity}}
    sentence_ids: dict[int, int] = {}
    for place, image in places(document, "images", path):
        for name, seen in ids.items():
            new_id(image, name, place, seen)
        parent = file_name(image, "filepath", place) if folder is None else folder
        file = f"{parent}/{file_name(image, 'filename', place)}"
        captions = _captions(image, place, sentence_ids)
        split = field(image, "split", str, place)
        if split not in known:
            raise ValueError(
                f"{place}: 'split' is {split!r}; expected one of {', '.join(known)}. Correct "
                f"{path.name}, or download it again"
            )
        if split not in splits:
            continue
        total += len(captions) or 1
        kept = [caption for caption in captions if caption[0] and caption[1]]
        faults += [f"{place}: the caption {c[2]} has no word" for c in captions if c not in kept]
        if not captions:
            faults.append(f"{place} has no captions")
        if kept:
            raws, tokens, numbers = zip(*kept, strict=True)
            one = {"captions": raws, "tokens": tokens, "caption_ids": numbers}
            records.append({"id": image[identity], "file": file, **one})
    leave_out(faults, total, "captions", "blank", blank, path)
    if not records:
        raise ValueError(
            f"{path} has no images of the split {'+'.join(splits)}; expected a whole copy of "
            "the file, download it again"
        )
    return records


def _captions(
    image: Record, place: Place, seen: dict[int, int]
) -> list[tuple[str, tuple[str, ...], int]]:
    field(image, "sentences", list, place)
    prefix = f"{place.name}[{place.number}]."
    return [
        (
            field(sentence, "raw", str, where).strip(),
            texts(sentence, "tokens", where),
            new_id(sentence, "sentid", where, seen),
        )
        for where, sentence in places(image, "sentences", place.path, prefix)
    ]
