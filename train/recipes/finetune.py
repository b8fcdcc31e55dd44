"""Recipes `finetune-shapes`, `finetune-coco` and `finetune-flickr30k`: going on with a captioner.

There are four modes: as in training ("plain", the control), LRP-inference ("lrp"), self-critical
training with CIDEr-D as the reward ("scst"), and that with captions drawn from re-weighted
predictions ("lrp-scst"); see `lrp_inference` and `scst`. What is written is a captioner as any.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Integer

from jaxrel.metrics.caption_scores import Tokens
from jaxrel.models.captioner import Captioner
from jaxrel.models.checkpoint import check_new_folder
from jaxrel.train.data.shapes import vocabulary
from jaxrel.train.loop.batches import Example, Source
from jaxrel.train.losses.lrp_inference import (
    STOP_WORDS,
    LRPInference,
    content_words,
    lrp_inference_loss,
)
from jaxrel.train.losses.scst import CiderReward, Reward, scst_loss
from jaxrel.train.recipes import captioner_shapes
from jaxrel.train.recipes.captioner import caption_loss, train_captioner
from jaxrel.train.recipes.captioner_real import READERS, Captions, caption_words
from jaxrel.train.recipes.captioner_shapes import table_rows
from jaxrel.train.recipes.clip_shapes import SETTINGS_FILE, normalise
from jaxrel.train.recipes.mapper import KeyedLoss
from jaxrel.train.recipes.mapper_real import choice
from jaxrel.train.recipes.mapper_shapes import SIDE
from jaxrel.train.recipes.settings import FinetuneReal, FinetuneShapes, changed_flags

Encode = Callable[[Captioner, Array], Float[Array, "batch positions features"]]


@dataclass(frozen=True, eq=False)
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
    """Go on with a captioner of Shapes, on the examples of `gridtd-shapes` and `aoa-shapes`.

    The references of the reward are all five captions of a scene, as in the evaluation.

    Args:
      recipe: the settings.
      folder: where the model goes; see `train_captioner`.

    Raises:
      FileExistsError, FileNotFoundError: the folder exists and is no model folder, or there is
        no such captioner; said before any work.
      ValueError: likewise, if the captioner does not read Shapes; see also `fit`.
      FloatingPointError, OSError: see `fit`.
    """
    check_new_folder(folder)
    model = Captioner.from_pretrained(recipe.model, dtype=recipe.dtype)
    _check_images(model, recipe.model)
    _check_shapes(model, recipe.model)
    examples = captioner_shapes.Examples(recipe.training(context=model.config.context), model)

    def encode(model: Captioner, image: Array) -> Float[Array, "batch positions features"]:
        return model.encode(normalise(image))

    return _go_on(
        recipe,
        folder,
        model,
        encode,
        WithImages(examples, np.arange(len(examples)) % recipe.scenes),
        lambda: _words(model, examples.text),
        name="finetune-shapes",
    )


def train_real(recipe: FinetuneReal, folder: Path) -> Captioner:
    """Go on with a captioner of COCO or Flickr30k, one caption of an image per example.

    The references of the reward are all captions of an image.

    Args:
      recipe: the settings; `data` is the folder of the data set.
      folder: where the model goes; see `train_captioner`.

    Raises:
      FileExistsError, FileNotFoundError: before any work; see `captioner_real.train`, or there
        is no such captioner.
      ValueError, FloatingPointError, OSError: see `fit`.
    """
    check_new_folder(folder)
    source = READERS[recipe.dataset](
        recipe.data, recipe.split, missing=choice(recipe.missing), corrupt=choice(recipe.corrupt)
    )
    model = Captioner.from_pretrained(recipe.model, dtype=recipe.dtype)
    _check_images(model, recipe.model)
    examples = Captions(source, model.processor, model.config.context)
    return _go_on(
        recipe,
        folder,
        model,
        Captioner.encode,
        WithImages(examples, examples.images),
        lambda: [caption_words(record) for record in source.records],
        name=f"finetune-{recipe.dataset}",
        workers=recipe.workers,
    )


def _go_on(
    recipe: FinetuneShapes | FinetuneReal,
    folder: Path,
    model: Captioner,
    encode: Encode,
    source: Source,
    references: Callable[[], Sequence[Sequence[Tokens]]],
    *,
    name: str,
    workers: int = 0,
) -> Captioner:
    """Train in the recipe's mode; the references of all images are asked for if they count."""
    reward = None
    if "scst" in recipe.mode:
        tokenizer = model.processor.tokenizer
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        form = model.caption_format()
        reward = CiderReward(references(), tokens, form, idf=recipe.idf, ends=recipe.ends)
    return train_captioner(
        recipe,
        folder,
        {"model": model},
        mode_loss(recipe, model, encode, reward),
        source,
        name=name,
        factors={"model/encoder": recipe.encoder_rate},
        workers=workers,
    )


def mode_loss(
    recipe: FinetuneShapes | FinetuneReal,
    model: Captioner,
    encode: Encode,
    reward: Reward | None = None,
) -> KeyedLoss:
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
    """The model card: what the model began as, how it went on, and what was found of it.

    Args:
      folder: as `train_shapes` wrote it.
      result: of `captioner_shapes.evaluate`.

    Raises:
      FileNotFoundError: the folder has no settings.json.
    """
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    judged = result["splits"]
    columns = [
        one["truth"] | one["hallucination"] | {"CIDEr-D (times 10)": one["CIDEr-D"]}
        for one in judged.values()
    ]
    first = next(iter(judged.values()))
    return CARD.format(
        flags=changed_flags(FinetuneShapes(), settings),
        how=_HOW[settings["mode"]],
        splits=" | ".join(f"`{name}`" for name in judged),
        lines="---|" * len(judged),
        rows=table_rows(columns),
        tested=first["scenes"],
        among=first["split"],
        examples="\n".join(f"- {caption}" for caption in first["examples"]),
        **{name: settings[name] for name in ("model", "split", "data_seed", "steps", "batch")},
    )


_HOW = {
    "plain": "the loss of its first training",
    "lrp": "LRP-inference (Sun et al. 2022)",
    "scst": "self-critical training, CIDEr-D of sampled captions as the reward",
    "lrp-scst": "self-critical training with captions drawn from re-weighted predictions "
    "(LRP-inference, Sun et al. 2022)",
}

CARD = """\
# A captioner that went on

`{model}`, a captioner of 64x64 images of coloured shapes, went on with {how}.

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
