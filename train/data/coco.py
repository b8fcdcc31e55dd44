"""COCO (Lin et al. 2014) captions and instances, once downloaded and unpacked.

FOLDER/annotations/captions_val2017.json      instances_val2017.json
FOLDER/val2017/000000000139.jpg               also train2017/, train2014/, val2014/
FOLDER/dataset_coco.json                      Karpathy's split of the 2014 images
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxrel.train.data.files import (
    Choice,
    ImageSource,
    Place,
    Record,
    StrPath,
    check_choice,
    check_layout,
    field,
    file_name,
    image_source,
    leave_out,
    new_id,
    places,
    read_annotations,
)
from jaxrel.train.data.karpathy import parse_splits, read_split

SPLITS = ("train2014", "val2014", "train2017", "val2017")
KARPATHY_SPLITS = ("train", "restval", "val", "test")

# Annotators' boxes end up to a pixel beyond the image.
_MARGIN = 1.0
_ADVICE = "Unpack them there, or say where they are with annotations= and images="


def captions(
    folder: StrPath,
    split: str,
    *,
    annotations: StrPath | None = None,
    images: StrPath | None = None,
    missing: Choice = "error",
    corrupt: Choice = "error",
    blank: Choice = "skip",
) -> ImageSource:
    """Images with about five captions each, in the official splits.

    Args:
      folder: holds annotations/captions_{split}.json and {split}/.
      split: "train2014", "val2014", "train2017" or "val2017".
      annotations: the captions file, where it is elsewhere.
      images: the folder that holds {split}/, where it is elsewhere.
      missing: as in `files.image_source`.
      corrupt: likewise.
      blank: captions without a letter, and images without captions: "skip" leaves them out
        with one counted warning, "error" raises.

    Returns:
      A source of dicts with `"id"` (the image's), `"image"`, `"file"`, `"captions"` (texts,
      stripped) and `"caption_ids"`; `source.records` has all but the image.

    Raises:
      FileNotFoundError: the file, the folder or images are missing.
      ValueError: the split is unknown, or the file is damaged or inconsistent.
    """
    _check_choices(split, missing=missing, corrupt=corrupt, blank=blank)
    path, root = _find(folder, "captions", split, annotations, images)
    _check_images(root, (split,), {path: f"captions, of {_archive(split)}"})
    records = _read_captions(path, split, blank)
    return image_source(f"COCO captions {split}", root, records, missing=missing, corrupt=corrupt)


def karpathy_captions(
    folder: StrPath,
    split: str,
    *,
    annotations: StrPath | None = None,
    images: StrPath | None = None,
    missing: Choice = "error",
    corrupt: Choice = "error",
    blank: Choice = "skip",
) -> ImageSource:
    """Images of 2014 with captions, in the split of Karpathy and Fei-Fei (2015).

    Args:
      folder: holds dataset_coco.json, train2014/ and val2014/.
      split: "train" (82783 images), "restval" (30504), "val" (5000), "test" (5000), or several
        with +; papers train on "train+restval".
      annotations: the split file, where it is elsewhere.
      images: the folder that holds train2014/ and val2014/, where they are elsewhere.
      missing: as in `files.image_source`.
      corrupt: likewise.
      blank: as in `captions`.

    Returns:
      A source of dicts with `"id"` (cocoid, as in `objects`), `"image"`, `"file"`,
      `"captions"`, `"tokens"` (per caption) and `"caption_ids"`.

    Raises:
      FileNotFoundError: the file, the folders or images are missing.
      ValueError: the split is unknown, or the file is damaged or inconsistent.
    """
    splits = parse_splits(split, KARPATHY_SPLITS, "COCO, Karpathy's split")
    _check_choices(None, missing=missing, corrupt=corrupt, blank=blank)
    path = Path(annotations) if annotations is not None else Path(folder) / "dataset_coco.json"
    root = Path(images if images is not None else folder)
    folders = [name for name, ours in _KARPATHY_FOLDERS.items() if ours & set(splits)]
    _check_images(root, folders, {path: "Karpathy's split, of caption_datasets.zip"})
    records = read_split(path, splits, KARPATHY_SPLITS, identity="cocoid", folder=None, blank=blank)
    name = f"COCO captions {'+'.join(splits)} (Karpathy)"
    return image_source(name, root, records, missing=missing, corrupt=corrupt)


_KARPATHY_FOLDERS = {"train2014": {"train"}, "val2014": {"restval", "val", "test"}}


def instances(
    folder: StrPath,
    split: str,
    *,
    annotations: StrPath | None = None,
    images: StrPath | None = None,
    missing: Choice = "error",
    corrupt: Choice = "error",
    bad_boxes: Choice = "skip",
) -> ImageSource:
    """Images with the boxes and categories of their objects.

    Args:
      folder: holds annotations/instances_{split}.json and {split}/.
      split: "train2014", "val2014", "train2017" or "val2017".
      annotations: the instances file, where it is elsewhere.
      images: the folder that holds {split}/, where it is elsewhere.
      missing: as in `files.image_source`.
      corrupt: likewise; an image whose size is not the annotated one counts as corrupt.
      bad_boxes: as in `objects`.

    Returns:
      A source of the records of `objects`, with `"image"`.

    Raises:
      FileNotFoundError: the file, the folder or images are missing.
      ValueError: the split is unknown, or the file is damaged or inconsistent.
    """
    _check_choices(split, missing=missing, corrupt=corrupt, bad_boxes=bad_boxes)
    path, root = _find(folder, "instances", split, annotations, images)
    _check_images(root, (split,), {path: f"instances, of {_archive(split)}"})
    records = _read_instances(path, split, bad_boxes)
    return image_source(f"COCO instances {split}", root, records, missing=missing, corrupt=corrupt)


def objects(
    folder: StrPath,
    split: str,
    *,
    annotations: StrPath | None = None,
    bad_boxes: Choice = "skip",
) -> dict[int, Record]:
    """Boxes and categories by image id, without images: for localisation and CHAIR.

    Args:
      folder: holds annotations/instances_{split}.json.
      split: "train2014", "val2014", "train2017" or "val2017".
      annotations: the instances file, where it is elsewhere.
      bad_boxes: boxes of no size, or that leave the image by more than a pixel: "skip" leaves
        their objects out with one counted warning, "error" raises. The published file of
        train2017 has two boxes of height 0.

    Returns:
      Per image id a dict: `"id"`, `"file"`, `"height"`, `"width"`, `"boxes"` float32
      [objects, 4] (left, top, width, height in pixels), `"categories"` (a name per box),
      `"crowd"` bool [objects] (the box holds a group), `"area"` float32 [objects] (of the mask,
      in pixels). Images without objects have empty ones. Masks are not read.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the split is unknown, or the file is damaged or inconsistent.
    """
    _check_choices(split, bad_boxes=bad_boxes)
    path, _ = _find(folder, "instances", split, annotations, None)
    check_layout("COCO", {path: f"instances, of {_archive(split)}"}, {}, _ADVICE)
    return {record["id"]: record for record in _read_instances(path, split, bad_boxes)}


def _check_choices(split: str | None, **choices: str) -> None:
    if split is not None:
        check_choice("COCO: split", split, SPLITS)
    for name, choice in choices.items():
        check_choice(name, choice, ("error", "skip"))


def _find(
    folder: StrPath,
    kind: str,
    split: str,
    annotations: StrPath | None,
    images: StrPath | None,
) -> tuple[Path, Path]:
    folder = Path(folder)
    path = folder / "annotations" / f"{kind}_{split}.json"
    return (
        path if annotations is None else Path(annotations),
        folder if images is None else Path(images),
    )


def _archive(split: str) -> str:
    return f"annotations_trainval{split[-4:]}.zip"


def _check_images(root: Path, folders: Iterable[str], files: dict[Path, str]) -> None:
    wanted = {root / name: f"the images, of {name}.zip" for name in folders}
    check_layout("COCO", files, wanted, _ADVICE)


def _read_images(document: Record, path: Path, split: str) -> dict[int, Record]:
    seen: dict[int, int] = {}
    images = {}
    for place, image in places(document, "images", path):
        number = new_id(image, "id", place, seen)
        images[number] = {
            "id": number,
            "file": f"{split}/{file_name(image, 'file_name', place)}",
            "height": field(image, "height", int, place),
            "width": field(image, "width", int, place),
        }
    if not images:
        raise ValueError(f"{path} lists no images; expected a whole copy, download it again")
    return images


def _image_of(annotation: Record, images: dict[int, Record], place: Place) -> int:
    number = field(annotation, "image_id", int, place)
    if number not in images:
        raise ValueError(
            f"{place}: 'image_id' is {number}, which is not among the {len(images)} ids of "
            f"'images'; expected one of them. Correct {place.path.name}, or download it again"
        )
    return number


def _read_captions(path: Path, split: str, blank: Choice) -> list[Record]:
    document = read_annotations(path, "COCO captions")
    images = _read_images(document, path, split)
    found: dict[int, list[tuple[str, int]]] = {number: [] for number in images}
    seen: dict[int, int] = {}
    described, faults = set(), []
    for place, annotation in places(document, "annotations", path):
        number = new_id(annotation, "id", place, seen)
        image = _image_of(annotation, images, place)
        described.add(image)
        text = field(annotation, "caption", str, place).strip()
        if text:
            found[image].append((text, number))
        else:
            faults.append(f"{place}: the caption {number} of image {image} is blank")
    bare = images.keys() - described
    faults += [f"image {number} has no caption" for number in sorted(bare)]
    leave_out(faults, len(seen) + len(bare), "captions", "blank", blank, path)
    records = []
    for number, pairs in found.items():
        if pairs:
            raws, numbers = zip(*pairs, strict=True)
            file = images[number]["file"]
            records.append({"id": number, "file": file, "captions": raws, "caption_ids": numbers})
    return records


def _read_instances(path: Path, split: str, bad_boxes: Choice) -> list[Record]:
    document = read_annotations(path, "COCO instances")
    images = _read_images(document, path, split)
    names = _read_categories(document, path)
    found: dict[int, list[tuple]] = {number: [] for number in images}
    seen: dict[int, int] = {}
    faults = []
    for place, annotation in places(document, "annotations", path):
        new_id(annotation, "id", place, seen)
        image = images[_image_of(annotation, images, place)]
        category = field(annotation, "category_id", int, place)
        if category not in names:
            raise ValueError(
                f"{place}: 'category_id' is {category}, which is not among the {len(names)} ids "
                f"of 'categories'; expected one of them. Correct {path.name}, or download it again"
            )
        box = _box(annotation, place)
        crowd = bool(field(annotation, "iscrowd", int, place))
        area = field(annotation, "area", float, place)
        if _inside(box, image["height"], image["width"]):
            found[image["id"]].append((box, names[category], crowd, area))
        else:
            faults.append(
                f"{place}: the box {list(box)} (left, top, width, height) of annotation "
                f"{annotation['id']} has no size or leaves its image of {image['width']} x "
                f"{image['height']} (width x height)"
            )
    leave_out(faults, len(seen), "boxes", "bad_boxes", bad_boxes, path)
    return [{**image, **_arrays(found[number])} for number, image in images.items()]


def _read_categories(document: Record, path: Path) -> dict[int, str]:
    seen: dict[int, int] = {}
    return {
        new_id(category, "id", place, seen): field(category, "name", str, place)
        for place, category in places(document, "categories", path)
    }


def _box(annotation: Record, place: Place) -> tuple[float, ...]:
    box = field(annotation, "bbox", list, place)
    numbers = [x for x in box if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(box) != 4 or len(numbers) != 4:
        raise ValueError(
            f"{place}: 'bbox' is {str(box)[:60]}; expected four numbers: left, top, width, "
            f"height. Correct {place.path.name}, or download it again"
        )
    return tuple(map(float, box))


def _inside(box: tuple[float, ...], height: int, width: int) -> bool:
    x, y, w, h = box
    fits = (
        x >= -_MARGIN and y >= -_MARGIN and x + w <= width + _MARGIN and y + h <= height + _MARGIN
    )
    # The JSON reader also takes NaN, which no comparison finds.
    return all(map(math.isfinite, box)) and w > 0 and h > 0 and fits


def _arrays(found: list[tuple]) -> Record:
    boxes, categories, crowd, area = zip(*found, strict=True) if found else ((), (), (), ())
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "categories": tuple(categories),
        "crowd": np.array(crowd, bool),
        "area": np.array(area, np.float32),
    }
