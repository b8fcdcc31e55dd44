"""Images with captions and with what their words name: what captioners are judged on."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt8
from tqdm.auto import trange

from jaxrel.metrics.caption_scores import tokenise
from jaxrel.metrics.correctness import box_masks, scale_boxes
from jaxrel.metrics.words import COCO_FREQUENT, FLICKR30K_FREQUENT, OBJECTS, match
from jaxrel.models.captioner import Captioner
from jaxrel.models.processor import Processor
from jaxrel.train.data import coco, flickr30k
from jaxrel.train.data.files import ImageSource, Record
from jaxrel.train.data.shapes import Scene, Shapes
from jaxrel.train.data.shapes.claims import Claim, claims, true_of
from jaxrel.train.data.shapes.language import Description, pluralise
from jaxrel.train.data.shapes.scene import COLOURS, MAX_OBJECTS, SHAPES

STOP = "stop word"
# Words for a category of COCO other than its name, as in the paper.
_SYNONYMS = {
    word: name
    for name, words in {
        "person": "people woman women man men boy girl player baby",
        "airplane": "plane jetliner jet",
        "bicycle": "bike",
        "car": "taxi",
    }.items()
    for word in words.split()
}


class Word(NamedTuple):
    """A word of a caption that is asked about.

    Attributes:
      position: of its token, from 1.
      name: what it names, the same for all forms of a word.
      group: the kind of word; each is judged for itself.
      true: whether it is true of the image, and not hallucinated.
      objects: which objects of the image it stands for; none where that is not known.
    """

    position: int
    name: str
    group: str
    true: bool = True
    objects: tuple[int, ...] = ()


@runtime_checkable
class Images(Protocol):
    """Images, and what words about them mean.

    Attributes:
      name: of the data set.
      groups: of words that name something, those of things first.
      frequent: the words whose precision and recall are measured.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - among the attributes

    @property
    def groups(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def frequent(self) -> tuple[str, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def image(self, i: int) -> UInt8[np.ndarray, "height width 3"]:
        """An image."""
        ...

    def masks(self, i: int) -> Bool[np.ndarray, "objects side side"]:
        """Where its objects are in what the model sees, filled up to one number with none."""
        ...

    def words(self, i: int, caption: Sequence[str]) -> list[Word]:
        """The words of its caption that name something, in their order."""
        ...

    def references(self, i: int) -> list[list[str]]:
        """Its captions by people, as words."""
        ...

    def corpus(self) -> list[list[list[str]]]:
        """The references in which CIDEr-D counts how rare words are."""
        ...

    def forms(self, caption: Sequence[str]) -> list[str]:
        """The words of a caption as `frequent` has them."""
        ...

    def vocabulary(self, group: str) -> tuple[str, ...]:
        """The words of a group in all forms that the model may write."""
        ...


@dataclasses.dataclass(frozen=True)
class ShapesImages:
    """Scenes of Shapes, in which the names of shapes and of colours are asked about.

    A shape is true where the scene has an object of it. A colour is true where an object of the
    shape that it is said of has it. A shape in a true claim stands for all objects that are as
    claimed, such as all red circles; in another it stands for none.

    Attributes:
      scenes: in the model's size.
    """

    scenes: tuple[Scene, ...]
    name = "Shapes"
    groups = ("shape", "colour")
    frequent = (*SHAPES, *COLOURS)

    def __len__(self) -> int:
        return len(self.scenes)

    def image(self, i: int) -> UInt8[np.ndarray, "height width 3"]:
        """An image."""
        return self.scenes[i].image

    def masks(self, i: int) -> Bool[np.ndarray, "objects side side"]:
        """The masks of its objects."""
        masks = self.scenes[i].masks
        return np.pad(masks, ((0, MAX_OBJECTS - len(masks)), (0, 0), (0, 0)))

    def words(self, i: int, caption: Sequence[str]) -> list[Word]:
        """The shapes and colours of what its caption claims to be there."""
        objects = self.scenes[i].objects
        found = []
        for place, claim in _placed_claims(caption):
            _, colour, shape = claim.description
            if colour is not None:
                # Of several colours before a noun the last counts.
                said = max(k for k in range(place) if caption[k] == colour)
                there = Description(colour=colour, shape=shape).matches(objects)
                found.append(Word(said + 1, colour, "colour", bool(there)))
            if shape is not None:
                there = Description(shape=shape).matches(objects)
                meant = claim.description.matches(objects) if true_of(claim, objects) else ()
                found.append(Word(place + 1, shape, "shape", bool(there), meant))
        return found

    def references(self, i: int) -> list[list[str]]:
        """Its five captions."""
        return [tokenise(caption.text) for caption in self.scenes[i].captions]

    def corpus(self) -> list[list[list[str]]]:
        """The captions of all scenes."""
        return [self.references(i) for i in range(len(self))]

    def forms(self, caption: Sequence[str]) -> list[str]:
        """The words, with shapes in the singular."""
        return [_SINGULAR.get(word, word) for word in caption]

    def vocabulary(self, group: str) -> tuple[str, ...]:
        """Shapes in singular and plural, or colours."""
        return (*SHAPES, *_SINGULAR) if group == "shape" else tuple(COLOURS)


_SINGULAR = {pluralise(shape): shape for shape in SHAPES}


def _placed_claims(caption: Sequence[str]) -> list[tuple[int, Claim]]:
    """What a caption claims, with the place of the noun that ends each claim."""
    read = [claims(" ".join(caption[:end])) for end in range(len(caption) + 1)]
    grown = enumerate(itertools.pairwise(read))
    return [(place, now[-1]) for place, (before, now) in grown if len(now) > len(before)]


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Images of COCO or Flickr30k, in which words for objects are asked about.

    Words are those of `jaxrel.metrics.words.OBJECTS`, in singular or plural; those for people
    are one name, as are a few others. A word is true where a reference of the image has its
    name, or where an annotated object of the image is of its category. It stands for all boxes
    of that category that the model sees.

    Attributes:
      source: images and captions.
      count: how many of its images, the first ones.
      annotated: boxes and categories by the image's id; empty where there are none.
      processor: of the model, which crops.
      side: of the image that the model sees, in pixels.
      name: of the data set.
      frequent: of the data set.
    """

    source: ImageSource
    count: int
    annotated: Mapping[int, Record]
    processor: Processor
    side: int
    name: str
    frequent: tuple[str, ...]
    groups = ("object",)

    def __len__(self) -> int:
        return self.count

    def image(self, i: int) -> UInt8[np.ndarray, "height width 3"]:
        """An image, read when it is asked for."""
        return self.source[i]["image"]

    def masks(self, i: int) -> Bool[np.ndarray, "objects side side"]:
        """The boxes of its objects."""
        boxes = np.zeros((self._most, 4), np.int64)
        boxes[: len(self._categories(i))] = self._boxes(i)
        return np.asarray(box_masks(boxes, self.side, self.side))

    def words(self, i: int, caption: Sequence[str]) -> list[Word]:
        """The words for objects, all of one group."""
        categories, boxes = self._categories(i), self._boxes(i)
        seen = np.all(boxes[:, 2:] > boxes[:, :2], axis=-1).tolist()
        written = {_object_name(word) for tokens in self.references(i) for word in tokens}
        found = []
        for place, word in enumerate(caption):
            name = _object_name(word)
            if name is not None:
                category = match(name, categories)
                of_it = zip(categories, seen, strict=True)
                objects = tuple(k for k, (c, s) in enumerate(of_it) if c == category and s)
                true = category is not None or name in written
                found.append(Word(place + 1, name, "object", true, objects))
        return found

    def references(self, i: int) -> list[list[str]]:
        """Its captions."""
        return [tokenise(text) for text in self.source.records[i]["captions"]]

    def corpus(self) -> list[list[list[str]]]:
        """The captions of the whole split, as in published numbers."""
        records = self.source.records
        return [[tokenise(text) for text in record["captions"]] for record in records]

    def forms(self, caption: Sequence[str]) -> list[str]:
        """The words themselves: in the paper's lists each form is a word of its own."""
        return list(caption)

    def vocabulary(self, group: str) -> tuple[str, ...]:
        """All words for objects that the model knows."""
        known = self.processor.tokenizer.get_vocab()
        return tuple(sorted(word for word in known if _object_name(word) is not None))

    @functools.cached_property
    def _most(self) -> int:
        """The most objects of an image; at least one, as metrics have it."""
        return max(1, *(len(self._categories(i)) for i in range(self.count)))

    def _record(self, i: int) -> Record | None:
        return self.annotated.get(self.source.records[i]["id"])

    def _categories(self, i: int) -> tuple[str, ...]:
        record = self._record(i)
        return () if record is None else record["categories"]

    def _boxes(self, i: int) -> Int[np.ndarray, "objects 4"]:
        """Left, top, right and bottom in what the model sees; empty where it sees nothing."""
        record = self._record(i)
        if record is None:
            return np.zeros((0, 4), np.int64)
        width, height = record["width"], record["height"]
        seen = self.processor.seen(np.zeros((height, width, 3), np.uint8)).size
        # What is cropped away is the same on both sides.
        corner = np.array([(width - seen[0]) // 2, (height - seen[1]) // 2, 0, 0])
        boxes = scale_boxes(record["boxes"] - corner, size=seen, to=(self.side, self.side))
        return boxes.clip(0, self.side)


def _object_name(word: str) -> str | None:
    name = match(word, OBJECTS)
    return None if name is None else _SYNONYMS.get(name, name)


SPLITS = {"Shapes": "biased_test", "COCO": "val2017", "Flickr30k": "test"}


def open_images(
    model: Captioner, data: str | None, *, split: str | None, scenes: int, data_seed: int = 0
) -> ShapesImages | RealImages:
    """The images that a model is judged on.

    The arguments and errors are those of `evaluate`.
    """
    side = model.config.image_size
    if data is None:
        made, split = Shapes(seed=data_seed, size=side), split or SPLITS["Shapes"]
        drawn = trange(scenes, desc="drawing", leave=False)
        return ShapesImages(tuple(made.scene(split, i) for i in drawn))
    folder = Path(data)
    annotated: dict[int, Record] = {}
    if (folder / "dataset_flickr30k.json").is_file():
        name, frequent = "Flickr30k", FLICKR30K_FREQUENT
        source = flickr30k.captions(folder, split or SPLITS[name])
    else:
        name, frequent = "COCO", COCO_FREQUENT
        split = split or SPLITS[name]
        read = coco.captions if split in coco.SPLITS else coco.karpathy_captions
        source = read(folder, split)
        # Karpathy's splits are of images of two official ones.
        for official in sorted({record["file"].split("/")[0] for record in source.records}):
            annotated |= coco.objects(folder, official)
    count = min(scenes, len(source))
    return RealImages(source, count, annotated, model.processor, side, name, frequent)
