"""Recipes `finetune-shapes`, `finetune-coco` and `finetune-flickr30k`: captioners are fine-tuned.

There are four modes: the loss of their first training ("plain", the control), LRP-inference
("lrp"), self-critical training with CIDEr-D as the reward ("scst"), and that with captions drawn
from re-weighted predictions ("lrp-scst"); see `jaxrel.train.losses`. What is written is a
captioner as any.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float, Integer

from jaxrel.metrics.caption_scores import Tokens
from jaxrel.metrics.words import STOP_WORDS
from jaxrel.models.captioner import Captioner
from jaxrel.models.checkpoint import check_new_folder
from jaxrel.train.data.shapes import vocabulary
from jaxrel.train.data.shapes.examples import SIDE, CaptionExamples, normalise
from jaxrel.train.loop.batches import Example, Source
from jaxrel.train.loop.train import Loss, read_settings, train_model
from jaxrel.train.losses.captions import caption_loss
from jaxrel.train.losses.lrp_inference import (
    WEIGHED,
    LRPInference,
    content_words,
    lrp_inference_loss,
)
from jaxrel.train.losses.scst import ENDS, IDFS, CiderReward, Reward, scst_loss
from jaxrel.train.recipes import captioner_real, captioner_shapes
from jaxrel.train.recipes.captioner import Adam
from jaxrel.train.recipes.captioner_real import READERS, caption_words
from jaxrel.train.recipes.captioner_shapes import table_rows
from jaxrel.train.recipes.real import read_images
from jaxrel.train.recipes.registry import Recipe
from jaxrel.train.recipes.settings import OnImages, OnShapes, setting, write_card

Encode = Callable[[Captioner, Array], Float[Array, "batch positions features"]]


@dataclasses.dataclass(frozen=True)
class Finetune(Adam):
    """What all recipes that fine-tune a captioner have in common."""

    model: str = setting("", "captioner to fine-tune: a bundled model, a folder or a hub name")
    mode: str = setting(
        "lrp",
        "plain: as in training; lrp: LRP-inference; scst: CIDEr-D of sampled captions as reward; "
        "lrp-scst: the same with captions from re-weighted predictions",
        ("plain", "lrp", "scst", "lrp-scst"),
    )
    mixing: float = setting(
        0.5,
        "mode lrp: weight of the plain prediction's loss; the rest is the re-weighted one's",
        "from 0 to 1",
    )
    temperature: float = setting(
        1.0, "modes lrp: t in the weights t R / max|R| + max(t, 1)", "positive"
    )
    weighed: str = setting(
        "both",
        "modes lrp: which values are weighed: both, attended or hidden (the paper's: both)",
        WEIGHED,
    )
    stop_words: str = setting(
        "", "modes lrp: words, with commas, that are not re-weighted; empty: English function words"
    )
    idf: str = setting("corpus", "modes scst: where words are weighed, corpus or batch", IDFS)
    ends: str = setting(
        "both",
        "modes scst: who has the end as a word in the reward: both, references or neither",
        ENDS,
    )
    dropout: int = setting(
        1,
        "modes plain and lrp: 1 drops values as in training, 0 does not (scst never does)",
        (0, 1),
    )
    encoder_rate: float = setting(
        0.2,
        "factor on the learning rate in the encoder; 0 freezes it (the paper's: 0.2 or 0)",
        "0 or more",
    )
    steps: int = 600
    learning_rate: float = setting(
        5e-4,
        "highest learning rate; it falls to 0 as a cosine (the paper's: 1e-5 or 5e-5, constant)",
        "positive",
    )
    warmup: int = 20
    log_every: int = 20
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("model is empty; name the captioner to fine-tune with --model")


@dataclasses.dataclass(frozen=True)
class FinetuneShapes(OnShapes, Finetune):
    """Settings of the recipe `finetune-shapes`."""

    model: str = "gridtd-shapes"
    split: str = setting("biased_train", "split to train on")
    scenes: int = 40_000
    full: float = setting(
        1.0, "modes plain and lrp: share of captions that name every object", "from 0 to 1"
    )
    batch: int = 64


@dataclasses.dataclass(frozen=True)
class FinetuneReal(OnImages, Finetune):
    """What the recipes `finetune-coco` and `finetune-flickr30k` have in common."""

    dataset: ClassVar[str]

    split: str = setting("train", "split to train on, in which the reward weighs words too")
    steps: int = setting(
        4_500, "number of optimiser steps; about one epoch (the paper's: one)", "at least 1"
    )
    encoder_rate: float = 0.0
    warmup: int = 100
    dtype: str = "bfloat16"
    checkpoint_every: int = 500


@dataclasses.dataclass(frozen=True)
class FinetuneCoco(FinetuneReal):
    """Settings of the recipe `finetune-coco`."""

    dataset: ClassVar[str] = "coco"

    split: str = "train+restval"
    steps: int = 17_500


@dataclasses.dataclass(frozen=True)
class FinetuneFlickr30k(FinetuneReal):
    """Settings of the recipe `finetune-flickr30k`."""

    dataset: ClassVar[str] = "flickr30k"


@dataclasses.dataclass(frozen=True, eq=False)
class WithImages:
    """Examples with the index of their image in the references of a reward, "references".

    Args:
      source: the examples.
      images: by example.
    """

    source: Source
    images: Integer[np.ndarray, " examples"]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return {**self.source[index], "references": np.int32(self.images[index])}


def train_shapes(recipe: FinetuneShapes, folder: Path) -> Captioner:
    """Fine-tune a captioner of Shapes, on the examples of its first training; see `Recipe`.

    The references of the reward are all five captions of a scene, as in the evaluation.
    """
    check_new_folder(folder)
    model = Captioner.from_pretrained(recipe.model, dtype=recipe.dtype)
    _check_images(model, recipe.model)
    _check_shapes(model, recipe.model)
    grid = model.config.grid
    assert grid is not None
    context = model.config.context
    examples = CaptionExamples(recipe, recipe.split, model.processor, context, grid)

    def encode(model: Captioner, image: Array) -> Float[Array, "batch positions features"]:
        return model.encode(normalise(image))

    return _finetune(
        recipe,
        folder,
        model,
        encode,
        WithImages(examples, np.arange(len(examples)) % recipe.scenes),
        lambda: _words(model, examples.text),
        name="finetune-shapes",
    )


def train_real(recipe: FinetuneReal, folder: Path) -> Captioner:
    """Fine-tune a captioner of COCO or Flickr30k, one caption of an image per example.

    The references of the reward are all captions of an image. See `Recipe`.
    """
    check_new_folder(folder)
    source = read_images(READERS[recipe.dataset], recipe)
    model = Captioner.from_pretrained(recipe.model, dtype=recipe.dtype)
    _check_images(model, recipe.model)
    examples = captioner_real.examples(source, model.processor, model.config.context)
    return _finetune(
        recipe,
        folder,
        model,
        Captioner.encode,
        WithImages(examples, examples.images),
        lambda: [caption_words(record) for record in source.records],
        name=f"finetune-{recipe.dataset}",
    )


def _finetune(
    recipe: FinetuneShapes | FinetuneReal,
    folder: Path,
    model: Captioner,
    encode: Encode,
    source: Source,
    references: Callable[[], Sequence[Sequence[Tokens]]],
    *,
    name: str,
) -> Captioner:
    """Train in the recipe's mode; the references of all images are asked for if they count."""
    reward = None
    if "scst" in recipe.mode:
        tokenizer = model.processor.tokenizer
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        form = model.caption_format()
        reward = CiderReward(references(), tokens, form, idf=recipe.idf, ends=recipe.ends)
    return train_model(
        recipe,
        folder,
        {"model": model},
        mode_loss(recipe, model, encode, reward),
        source,
        name=name,
    )


def mode_loss(
    recipe: FinetuneShapes | FinetuneReal,
    model: Captioner,
    encode: Encode,
    reward: Reward | None = None,
) -> Loss:
    """The loss of a mode, of the parts {"model": a captioner}.

    Args:
      recipe: the settings.
      model: whose tokenizer counts.
      encode: the features of the images of a batch.
      reward: of the modes with "scst".
    """
    given = {word.strip() for word in recipe.stop_words.split(",") if word.strip()}
    explained = content_words(model.processor.tokenizer, given or STOP_WORDS)
    inference = LRPInference(explained, recipe.temperature, recipe.weighed)

    def loss(parts: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        model = parts["model"]
        features = encode(model, batch["image"])
        if reward is not None:
            reweighting = inference if recipe.mode == "lrp-scst" else None
            images = batch["references"]
            return scst_loss(model, features, images, reward, key, inference=reweighting)
        drop = key if recipe.dropout else None
        if recipe.mode == "lrp":
            mixing = recipe.mixing
            return lrp_inference_loss(
                model, features, batch["text"], inference, drop, mixing=mixing
            )
        return caption_loss(model, features, batch["text"], drop)

    return loss


def _words(
    model: Captioner, ids: Integer[np.ndarray, "images captions tokens"]
) -> list[list[list[str]]]:
    """The words of each image's captions, of which the model knows all."""
    tokenizer = model.processor.tokenizer
    tokens = np.asarray(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    special = np.isin(ids, tokenizer.all_special_ids)
    return [
        [tokens[row[~left_out]].tolist() for row, left_out in zip(*image, strict=True)]
        for image in zip(ids, special, strict=True)
    ]


def _check_images(model: Captioner, name: str) -> None:
    if model.encoder is None:
        raise ValueError(
            f"{name!r} reads features of regions, and this recipe has images; name a captioner "
            "with an encoder"
        )
    model.caption_format()  # says if there is no tokenizer


def _check_shapes(model: Captioner, name: str) -> None:
    unknown = sorted({*vocabulary()} - {*model.processor.tokenizer.get_vocab()})
    if unknown or model.config.image_size != SIDE:
        raise ValueError(
            f"{name!r} is no captioner of Shapes: its images have {model.config.image_size} "
            f"pixels a side (Shapes': {SIDE}), and it lacks {len(unknown)} of its words, such as "
            f"{', '.join(unknown[:5]) or 'none'}; train one with jaxrel train gridtd-shapes"
        )


def card(folder: Path, result: dict[str, Any]) -> str:
    """The model card; `result` is what `evaluate` found."""
    judged = result["splits"]
    columns = [
        one["truth"] | one["hallucination"] | {"CIDEr-D (times 10)": one["CIDEr-D"]}
        for one in judged.values()
    ]
    first = next(iter(judged.values()))
    return write_card(
        CARD,
        folder,
        FinetuneShapes(),
        how=_HOW[read_settings(folder)["mode"]],
        splits=" | ".join(f"`{name}`" for name in judged),
        lines="---|" * len(judged),
        rows=table_rows(columns),
        tested=first["scenes"],
        among=first["split"],
        examples="\n".join(f"- {caption}" for caption in first["examples"]),
    )


_HOW = {
    "plain": "the loss of its first training",
    "lrp": "LRP-inference (Sun et al. 2022)",
    "scst": "self-critical training, CIDEr-D of sampled captions as the reward",
    "lrp-scst": "self-critical training with captions drawn from re-weighted predictions "
    "(LRP-inference, Sun et al. 2022)",
}

CARD = """\
# A fine-tuned captioner

`{model}`, a captioner of 64x64 images of coloured shapes, fine-tuned with {how}.

    jaxrel train finetune-shapes{flags} --out FOLDER
    jaxrel evaluate finetune-shapes --model FOLDER --card

It had {steps} steps of {batch} scenes of the split `{split}` (data seed {data_seed}); settings.json
has every setting, train.jsonl the loss.

Its greedy captions, judged on {tested} scenes of each split, with bootstrap 95% intervals; shares,
and CIDEr-D against five references:

| | {splits} |
|---|{lines}
{rows}

The first captions on `{among}`:

{examples}
"""

RECIPES = {
    "finetune-shapes": Recipe(
        FinetuneShapes, Captioner, train_shapes, captioner_shapes.evaluate, card
    ),
    **{
        f"finetune-{settings.dataset}": Recipe(
            settings,
            Captioner,
            train_real,
            partial(captioner_real.evaluate, dataset=settings.dataset),
        )
        for settings in (FinetuneCoco, FinetuneFlickr30k)
    },
}
