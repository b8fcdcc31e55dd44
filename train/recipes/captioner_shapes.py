"""Recipes `gridtd-shapes` and `aoa-shapes`: captioners with attention, trained on Shapes.

All is learnt from nothing, on two CPU cores. The training split is biased: in nine of ten scenes
with a heart there is a star, in nine of ten with a circle it is red, and so on. On `biased_test`
none of this holds, and what the models say because they are used to it is hallucinated.

While training, the loss of naming the object that each position of the features shows (colour,
shape, size, or background) is added, by a linear layer that is then thrown away: it makes the
encoder tell objects apart many times sooner than words do. Captions are learnt without their
punctuation.

An encoder can also be trained elsewhere, by naming alone (`--split train --word-loss 0`), and then
be taken over by other captioners (`--encoder-of FOLDER --encoder-rate 0`).
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.metrics import Interval
from jaxrel.models.captioner import Captioner
from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.preprocessing import image_processing
from jaxrel.models.processor import Processor
from jaxrel.models.tokenizer import word_tokenizer
from jaxrel.train.data.shapes import vocabulary
from jaxrel.train.data.shapes.examples import SIDE, CaptionExamples, normalise
from jaxrel.train.evaluate import captions
from jaxrel.train.loop.train import train_model
from jaxrel.train.losses.auxiliary import PatchNames
from jaxrel.train.losses.captions import caption_loss
from jaxrel.train.recipes.captioner import (
    AoA,
    GridTD,
    NewCaptioner,
    new_config,
)
from jaxrel.train.recipes.registry import Recipe
from jaxrel.train.recipes.settings import OnShapes, setting, write_card


@dataclasses.dataclass(frozen=True)
class CaptionerShapes(OnShapes, NewCaptioner):
    """What the recipes `gridtd-shapes` and `aoa-shapes` have in common."""

    least_context = (31, "captions")

    split: str = setting("biased_train", "split to train on; biased_train teaches to hallucinate")
    scenes: int = 40_000
    full: float = setting(1.0, "share of captions that name every object", "from 0 to 1")
    steps: int = 2_000
    batch: int = 64
    learning_rate: float = 1e-3
    encoder: str = setting(
        "16,32-32,64-64,128-128", "channels of the VGG's convolutions; a pooling is at each comma"
    )
    embed: int = 128
    hidden: int = 256
    patch_loss: float = setting(
        0.5, "weight of the loss of naming the object at each position", "0 or more"
    )
    word_loss: float = setting(
        1.0, "weight of the loss of words; 0 trains the encoder alone", "0 or more"
    )
    encoder_of: str = setting(
        "", "captioner whose encoder is taken over: a bundled model or a folder; empty: none"
    )
    encoder_rate: float = setting(
        1.0, "factor on the learning rate in the encoder; 0 freezes it", "0 or more"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.word_loss and not (self.patch_loss and self.encoder_rate):
            raise ValueError(
                f"word_loss is 0, patch_loss {self.patch_loss} and encoder_rate "
                f"{self.encoder_rate}: nothing would be trained; give --word-loss 1, or "
                "--patch-loss 1 with --encoder-rate 1 to train the encoder alone"
            )
        if not self.encoder_rate and not self.encoder_of:
            raise ValueError(
                "encoder_rate is 0 and encoder_of empty: an encoder would be frozen that has "
                "learnt nothing. Name a captioner with --encoder-of, or train it with "
                "--encoder-rate 1"
            )


@dataclasses.dataclass(frozen=True)
class GridTDShapes(GridTD, CaptionerShapes):
    """Settings of the recipe `gridtd-shapes`."""


@dataclasses.dataclass(frozen=True)
class AoAShapes(AoA, CaptionerShapes):
    """Settings of the recipe `aoa-shapes`."""


def new_model(recipe: CaptionerShapes) -> Captioner:
    """The model before training, with its tokenizer and image preprocessing.

    Raises:
      FileNotFoundError: there is no captioner whose encoder is to be taken over.
      ValueError: a size is out of range, the image is too small for the poolings, or the encoder
        that is taken over has other sizes.
    """
    tokenizer = word_tokenizer(vocabulary(), recipe.context)
    config = new_config(recipe, vocab_size=len(tokenizer), image_size=SIDE)
    processor = Processor(tokenizer, image_processing(SIDE))
    model = Captioner(config, rngs=nnx.Rngs(recipe.seed), processor=processor)
    if recipe.encoder_of:
        other = Captioner.from_pretrained(recipe.encoder_of, dtype=recipe.dtype)
        if other.config.encoder != config.encoder:
            raise ValueError(
                f"the encoder of {recipe.encoder_of!r} is {other.config.encoder}, and the recipe's "
                f"{config.encoder}; give the same sizes with --encoder"
            )
        model.encoder = other.encoder
    return model


def loss(
    parts: dict[str, Any],
    batch: dict[str, Array],
    key: Array,
    *,
    patch_loss: float,
    word_loss: float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """The loss of the words, and that of naming what each position shows.

    Args:
      parts: "model", and "names", a `PatchNames`.
      batch: as `CaptionExamples` makes it.
      key: for dropout.
      patch_loss: weight of the names.
      word_loss: weight of the words; at 0 they are not predicted.

    Returns:
      The sum, and {"accuracy": the share of words that are predicted, if any are, "patches": the
      loss of the names}.
    """
    model = parts["model"]
    features = model.encode(normalise(batch["image"]))
    # The head leaves out the first token, in a CLIP that of the class.
    named = parts["names"].loss(jnp.pad(features, ((0, 0), (1, 0), (0, 0))), batch["shown"])
    if not word_loss:
        return patch_loss * named, {"patches": named}
    value, metrics = caption_loss(model, features, batch["text"], key)
    return word_loss * value + patch_loss * named, metrics | {"patches": named}


def train(recipe: CaptionerShapes, folder: Path) -> Captioner:
    """Train on one caption of each image of a batch; see `Recipe`."""
    check_new_folder(folder)
    model = new_model(recipe)
    grid = model.config.grid
    assert grid is not None
    names = PatchNames(model.config.features, grid, rngs=nnx.Rngs(recipe.seed))

    def weighed(parts: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        weights = {"patch_loss": recipe.patch_loss, "word_loss": recipe.word_loss}
        return loss(parts, batch, key, **weights)

    return train_model(
        recipe,
        folder,
        {"model": model, "names": names},
        weighed,
        CaptionExamples(recipe, recipe.split, model.processor, recipe.context, grid),
        name=f"{recipe.kind}-shapes",
        show="accuracy" if recipe.word_loss else "patches",
    )


def evaluate(
    model: Captioner,
    *,
    data_seed: int = 0,
    split: str = "biased_test",
    scenes: int = 2048,
    batch: int = 64,
) -> dict[str, Any]:
    """Judge a model on a split, and beside it on `test`, which has no bias.

    Args:
      model: one that knows Shapes' words.
      data_seed: of the Shapes data set.
      split: of the data set.
      scenes: how many of each split.
      batch: images at a time.

    Returns:
      `protocol`, and `splits`: for each what `captions.evaluate` returns.

    Raises:
      ValueError: no scenes, or no such split.
    """
    judged = {
        name: captions.evaluate(model, data_seed=data_seed, split=name, scenes=scenes, batch=batch)
        for name in dict.fromkeys((split, "test"))
    }
    return {"protocol": "captioner-shapes/1", "splits": judged}


def card(folder: Path, result: dict[str, Any], *, recipe: type[CaptionerShapes]) -> str:
    """The model card; `result` is what `evaluate` found."""
    judged = result["splits"]
    first = next(iter(judged.values()))
    return write_card(
        CARD,
        folder,
        recipe(),
        kind=recipe.kind,
        what=_WHAT[recipe.kind],
        splits=" | ".join(f"`{name}`" for name in judged),
        columns="---|" * len(judged),
        truth=table_rows([one["truth"] for one in judged.values()]),
        hallucination=table_rows([one["hallucination"] for one in judged.values()]),
        cider=table_rows([{"CIDEr-D (times 10)": one["CIDEr-D"]} for one in judged.values()]),
        tested=first["scenes"],
        among=first["split"],
        examples="\n".join(f"- {caption}" for caption in first["examples"]),
    )


def table_rows(tables: list[dict[str, Any]]) -> str:
    """Lines of a table with a column per split; "" where there was nothing to take a share of."""
    names = dict.fromkeys(name for table in tables for name in table)
    shown = {
        name: [str(Interval(**table[name])) if name in table else "" for table in tables]
        for name in names
    }
    return "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in shown.items())


_WHAT = {
    "gridtd": "adaptive attention with a visual sentinel and two LSTMs (Ada-LSTM there)",
    "aoa": "multi-head attention behind a gate and one LSTM (MH-FC there)",
}

CARD = """\
# {kind}-shapes

A captioner of 64x64 images of coloured shapes, as in Sun et al. 2022: a VGG,
{what}.
It is made to study hallucinated words: in `biased_train` some shapes and colours go together, in
`biased_test` they never do, and `test` has no bias. It knows the words of the Shapes grammar and
nothing of photographs.

    jaxrel train {kind}-shapes{flags} --out models/pretrained/{kind}-shapes
    jaxrel evaluate {kind}-shapes --model models/pretrained/{kind}-shapes --card

Trained from nothing on {scenes} scenes of the split `{split}` (data seed {data_seed}), {steps}
steps of {batch} images with one caption each; settings.json has every setting, train.jsonl the
loss.

Its greedy captions, judged on {tested} scenes of each split, with bootstrap 95% intervals:

| share of | {splits} |
|---|{columns}
{truth}
{hallucination}

| against five references | {splits} |
|---|{columns}
{cider}

A stated object is not there if no object of the scene is as described; CHAIR (Rohrbach et al.
2018) looks at its shape alone.

The first captions on `{among}` (punctuation was taken out of the training captions):

{examples}
"""

RECIPES = {
    f"{settings.kind}-shapes": Recipe(
        settings, Captioner, train, evaluate, partial(card, recipe=settings)
    )
    for settings in (GridTDShapes, AoAShapes)
}
