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
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.models.captioner import Captioner, CaptionerConfig
from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.processor import Processor
from jaxrel.models.tokenizer import word_tokenizer
from jaxrel.models.vision import imagenet_processing, load_encoder
from jaxrel.train.data import coco, flickr30k
from jaxrel.train.data.files import ImageSource, Record
from jaxrel.train.data.image_texts import ImageTexts
from jaxrel.train.loop.train import train_model
from jaxrel.train.losses.captions import caption_loss
from jaxrel.train.recipes.captioner import (
    AoA,
    GridTD,
    NewCaptioner,
    new_config,
)
from jaxrel.train.recipes.real import judge_captions, read_images
from jaxrel.train.recipes.registry import Recipe
from jaxrel.train.recipes.settings import OnImages, setting

# Each reads (folder, split) of a data set, with images and their captions.
READERS: dict[str, Callable[..., ImageSource]] = {
    "coco": coco.karpathy_captions,
    "flickr30k": flickr30k.captions,
}


@dataclasses.dataclass(frozen=True)
class CaptionerReal(OnImages, NewCaptioner):
    """What the recipes of captioners on COCO and on Flickr30k have in common."""

    dataset: ClassVar[str]

    split: str = setting("train", "split to train on, in which words are counted too")
    at_least: int = setting(3, "how often a word must occur to be one of the model's", "at least 1")
    encoder: str = setting(
        "vgg16", "vgg16, resnet50 or another preset, or a VGG's channels, such as 32-32,64-64"
    )
    encoder_weights: str = setting(
        "timm/vgg16.tv_in1k",
        "file, folder or hub name of the encoder's weights; empty: from nothing",
    )
    encoder_rate: float = setting(
        0.0,
        "factor on the learning rate in the encoder; 0 freezes it (the paper's, to fine-tune: 0.2)",
        "0 or more",
    )
    image_size: int = setting(224, "pixels of a side of the images (the paper's: 224)")
    steps: int = setting(45_000, "number of optimiser steps; about ten epochs", "at least 1")
    warmup: int = 1_000
    dtype: str = "bfloat16"
    checkpoint_every: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoder_weights and not self.encoder_rate:
            raise ValueError(
                "encoder_weights is empty and encoder_rate 0: an encoder would be frozen that "
                "has learnt nothing. Name its weights with --encoder-weights, or train it with "
                "--encoder-rate 1"
            )


@dataclasses.dataclass(frozen=True)
class _Coco(CaptionerReal):
    """COCO in Karpathy's splits."""

    dataset: ClassVar[str] = "coco"

    split: str = "train+restval"
    at_least: int = 4
    steps: int = 175_000


@dataclasses.dataclass(frozen=True)
class _Flickr30k(CaptionerReal):
    """Flickr30k in Karpathy's splits."""

    dataset: ClassVar[str] = "flickr30k"


@dataclasses.dataclass(frozen=True)
class GridTDCoco(GridTD, _Coco):
    """Settings of the recipe `gridtd-coco`."""


@dataclasses.dataclass(frozen=True)
class AoACoco(AoA, _Coco):
    """Settings of the recipe `aoa-coco`."""


@dataclasses.dataclass(frozen=True)
class GridTDFlickr30k(GridTD, _Flickr30k):
    """Settings of the recipe `gridtd-flickr30k`."""


@dataclasses.dataclass(frozen=True)
class AoAFlickr30k(AoA, _Flickr30k):
    """Settings of the recipe `aoa-flickr30k`."""


def examples(source: ImageSource, processor: Processor, context: int) -> ImageTexts:
    """Every caption of every image, in the words of `caption_words`."""
    texts = [[" ".join(words) for words in caption_words(record)] for record in source.records]
    return ImageTexts(source, texts, processor, context)


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
    """Train on the captions of a data set, one caption of an image per example; see `Recipe`."""
    check_new_folder(folder)
    config = new_config(recipe)
    source = read_images(READERS[recipe.dataset], recipe)
    model = new_model(recipe, config, build_vocabulary(source.records, recipe.at_least))

    def loss(parts: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        features = parts["model"].encode(batch["image"])
        return caption_loss(parts["model"], features, batch["text"], key)

    return train_model(
        recipe,
        folder,
        {"model": model},
        loss,
        examples(source, model.processor, recipe.context),
        name=f"{recipe.kind}-{recipe.dataset}",
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
    """CIDEr-D of captions against all references; see `judge_captions`.

    Args:
      model: trained by `train`.
      dataset: a name in `READERS`.
      data: the folder of the data set.
      split: of Karpathy's.
      scenes: how many images.
      batch: images at a time.
      beams: width of beam search, 3 in Sun et al. 2022; 1 is greedy.

    Raises:
      FileNotFoundError, ValueError: see `coco.karpathy_captions` and `flickr30k.captions`.
    """
    source = READERS[dataset](data, split)
    judged = judge_captions(model, source, scenes=scenes, batch=batch, beams=beams)
    return {"protocol": f"captioner-{dataset}/1", "split": split, "beams": beams, **judged}


RECIPES = {
    f"{settings.kind}-{settings.dataset}": Recipe(
        settings, Captioner, train, partial(evaluate, dataset=settings.dataset)
    )
    for settings in (GridTDCoco, AoACoco, GridTDFlickr30k, AoAFlickr30k)
}
