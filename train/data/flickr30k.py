"""Flickr30k (Young et al. 2014) in the split of Karpathy and Fei-Fei (2015), once downloaded.

FOLDER/dataset_flickr30k.json
FOLDER/flickr30k-images/1000092795.jpg ...
"""

from pathlib import Path

from jaxrel.train.data.files import (
    Choice,
    ImageSource,
    StrPath,
    check_choice,
    check_layout,
    image_source,
)
from jaxrel.train.data.karpathy import parse_splits, read_split

SPLITS = ("train", "val", "test")
IMAGES = "flickr30k-images"


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
    """Images with about five captions each.

    Args:
      folder: holds dataset_flickr30k.json and flickr30k-images/.
      split: "train" (29000 images), "val" (1014), "test" (1000), or several with +.
      annotations: the split file, where it is elsewhere.
      images: the folder that holds flickr30k-images/, where it is elsewhere.
      missing: as in `files.image_source`.
      corrupt: likewise.
      blank: captions without a word: "skip" leaves them out with one counted warning, "error"
        raises.

    Returns:
      A source of dicts with `"id"` (imgid), `"image"`, `"file"`, `"captions"` (texts),
      `"tokens"` (per caption) and `"caption_ids"`; `source.records` has all but the image.

    Raises:
      FileNotFoundError: the file, the folder or images are missing.
      ValueError: the split is unknown, or the file is damaged or inconsistent.
    """
    splits = parse_splits(split, SPLITS, "Flickr30k")
    for name, choice in (("missing", missing), ("corrupt", corrupt), ("blank", blank)):
        check_choice(name, choice, ("error", "skip"))
    folder = Path(folder)
    path = Path(annotations) if annotations is not None else folder / "dataset_flickr30k.json"
    root = Path(images) if images is not None else folder
    check_layout(
        "Flickr30k",
        {path: "Karpathy's split, of caption_datasets.zip"},
        {root / IMAGES: "the images, of flickr30k-images.tar.gz"},
        "Unpack them there, or say where they are with annotations= and images=",
    )
    records = read_split(path, splits, SPLITS, identity="imgid", folder=IMAGES, blank=blank)
    name = f"Flickr30k {'+'.join(splits)}"
    return image_source(name, root, records, missing=missing, corrupt=corrupt)
