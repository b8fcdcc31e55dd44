"""Recipes `gridtd-` and `aoa-`, `coco` and `flickr30k`: captioners with attention on real data.

The encoder is a VGG or a ResNet whose weights are at hand, frozen unless its rate says otherwise.
Images are read, resized without keeping their aspect and normalised while the device computes;
they are not changed by chance (Sun et al. 2022 flip them and vary their colours). Words are
Karpathy's tokens, of letters and digits alone.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Int
from tqdm.auto import trange

from jaxrel.metrics import bootstrap
from jaxrel.metrics.caption_scores import CiderD, tokenise
from jaxrel.models.captioner import Captioner, CaptionerConfig
from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.processor import Processor, quiet_transformers
from jaxrel.models.tokenizer import word_tokenizer
from jaxrel.models.vision import imagenet_processing, load_encoder
from jaxrel.train.data import coco, flickr30k
from jaxrel.train.data.files import ImageSource, Record
from jaxrel.train.recipes.captioner import caption_loss, new_config, train_captioner
from jaxrel.train.recipes.mapper_real import _count, _fits, choice
from jaxrel.train.recipes.settings import CaptionerReal

# Each reads (folder, split) of a data set, with images and their captions.
READERS: dict[str, Callable[..., ImageSource]] = {
    "coco": coco.karpathy_captions,
    "flickr30k": flickr30k.captions,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """Every caption of every image as arrays: image and token ids.

    Args:
      source: of a reader in `READERS`.
      processor: of the model.
      context: tokens that the model reads; longer captions are left out with one warning.

    Attributes:
      images: the index in `source` of each example's image.
    """

    source: ImageSource
    processor: Processor
    context: int
    images: np.ndarray = dataclasses.field(init=False, repr=False)
    _text: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        written = [[" ".join(words) for words in caption_words(r)] for r in self.source.records]
        texts = [text for several in written for text in several]
        kept = np.flatnonzero(_fits(self.processor, texts, self.context, "captions"))
        images = np.repeat(np.arange(len(written)), [len(several) for several in written])
        # Once for all: words that the model does not know are many, and no fault.
        ids = encode(self.processor, [texts[i] for i in kept], self.context)
        object.__setattr__(self, "images", images[kept])
        object.__setattr__(self, "_text", ids)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source[self.images[index]]
        return {
            "id": np.int64(record["id"]),
            "image": self.processor.image(record["image"])[0],
            "text": self._text[index],
        }


def encode(
    processor: Processor, texts: Sequence[str], context: int
) -> Int[np.ndarray, "texts tokens"]:
    """Token ids of texts that fit, padded to `context`, with `<unk>` for rare words."""
    with quiet_transformers():
        rows = processor.tokenizer(texts, verbose=False)["input_ids"]
    ids = np.full((len(rows), context), processor.tokenizer.pad_token_id, np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids


def caption_words(record: Record) -> list[list[str]]:
    """The words of each caption of an image; a caption without any is left out."""
    split = [re.findall(r"[^\W_]+", " ".join(tokens).lower()) for tokens in record["tokens"]]
    return [words for words in split if words]


def build_vocabulary(records: Iterable[Record], at_least: int) -> tuple[str, ...]:
    """Count the words of all captions.

    Args:
      records: of a data set, with the tokens of captions.
      at_least: how often a word must occur.

    Returns:
      The words, in the order in which they are first seen.

    Raises:
      ValueError: no word occurs so often.
    """
    count = Counter(word for record in records for words in caption_words(record) for word in words)
    vocabulary = tuple(word for word, found in count.items() if found >= at_least)
    if not vocabulary:
        raise ValueError(
            f"no word occurs {at_least} times in the captions, of {len(count)} different ones; "
            "give more captions or a smaller at_least"
        )
    return vocabulary


def new_model(
    recipe: CaptionerReal, config: CaptionerConfig, vocabulary: Sequence[str]
) -> Captioner:
    """The model before training, with the weights of its encoder.

    Args:
      recipe: the settings.
      config: as `new_config` makes it; the number of tokens is added here.
      vocabulary: the words.

    Raises:
      FileNotFoundError, OSError, ValueError: see `load_encoder`.
    """
    tokenizer = word_tokenizer(vocabulary, recipe.context)
    config = dataclasses.replace(config, vocab_size=len(tokenizer))
    processor = Processor(tokenizer, imagenet_processing(recipe.image_size))
    model = Captioner(config, rngs=nnx.Rngs(recipe.seed), processor=processor)
    if recipe.encoder_weights:
        assert config.encoder is not None
        dtype = jnp.dtype(config.dtype)
        model.encoder = load_encoder(config.encoder, recipe.encoder_weights, dtype=dtype)
    return model


def train(recipe: CaptionerReal, folder: Path) -> Captioner:
    """Train on the captions of a data set, one caption of an image per example.

    Args:
      recipe: the settings; `data` is the folder of the data set.
      folder: where the model goes; see `train_captioner`.

    Raises:
      FileExistsError, FileNotFoundError: before any work; see `coco.karpathy_captions`,
        `flickr30k.captions` and `load_encoder`.
      ValueError, FloatingPointError, OSError: see `new_model` and `fit`.
    """
    check_new_folder(folder)
    config = new_config(recipe)
    source = READERS[recipe.dataset](
        recipe.data, recipe.split, missing=choice(recipe.missing), corrupt=choice(recipe.corrupt)
    )
    model = new_model(recipe, config, build_vocabulary(source.records, recipe.at_least))
    examples = Captions(source, model.processor, recipe.context)

    def loss(parts: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        features = parts["model"].encode(batch["image"])
        return caption_loss(parts["model"], features, batch["text"], key)

    return train_captioner(
        recipe,
        folder,
        {"model": model},
        loss,
        examples,
        name=f"{recipe.kind}-{recipe.dataset}",
        factors={"model/encoder": recipe.encoder_rate},
        workers=recipe.workers,
    )


def evaluate(
    model: Captioner,
    *,
    dataset: str,
    data: str,
    split: str = "test",
    scenes: int = 5000,
    batch: int = 32,
    beams: int = 3,
) -> dict[str, Any]:
    """CIDEr-D of captions against all references, words split without Java's tokenizer.

    Args:
      model: trained by `train`.
      dataset: a name in `READERS`.
      data: the folder of the data set.
      split: of Karpathy's.
      scenes: how many images.
      batch: images at a time.
      beams: of beam search, 3 in Sun et al. 2022; 1 is greedy.

    Raises:
      FileNotFoundError, ValueError: see `coco.karpathy_captions` and `flickr30k.captions`.
    """
    source = READERS[dataset](data, split)
    count = _count(scenes, source)
    captions: list[str] = []
    for start in trange(0, count, batch, desc="captioning", leave=False):
        images = [source[i]["image"] for i in range(start, min(start + batch, count))]
        # One size compiles once.
        padded = images + images[:1] * (batch - len(images))
        inputs = {"image": model.processor.image(padded)}
        captions += model.predict(inputs, beams=beams)[: len(images)]
    # Words are weighed over the whole split, as in published numbers, however many are judged.
    references = [[tokenise(c) for c in record["captions"]] for record in source.records]
    cider = CiderD.from_references(references)
    scores = cider.score([tokenise(c) for c in captions], references[:count])
    return {
        "protocol": f"captioner-{dataset}/1",
        "split": split,
        "images": count,
        "beams": beams,
        "CIDEr-D": bootstrap(np.asarray(scores))._asdict(),
        "examples": captions[:5],
    }
