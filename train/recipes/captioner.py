"""What all recipes of captioners share: the sizes, the loss and the optimiser.

They are those of Sun et al. 2022: Adam, each component of the gradient bounded, and the
cross-entropy of every word given the true ones before it. The learning rate falls as a cosine,
by steps; there it falls when the validation captions get no better.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax import numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jaxrel.models.captioner import Captioner, CaptionerConfig
from jaxrel.models.captions import end_of_caption, special_ids
from jaxrel.models.vision import PRESETS, EncoderConfig, VGGConfig
from jaxrel.train.loop.batches import Source
from jaxrel.train.loop.optimiser import adamw, warmup_cosine
from jaxrel.train.recipes.mapper import KeyedLoss, train_parts, word_loss

# Sizes that some recipes have as a setting; the others keep the model's default.
_SIZES = (
    "kind",
    "image_size",
    "embed",
    "hidden",
    "heads",
    "attention",
    "dropout",
    "attention_dropout",
    "context",
    "dtype",
)


def read_encoder(text: str) -> EncoderConfig:
    """Read the sizes of an encoder from a setting.

    Args:
      text: the name of a preset, such as "vgg16", or the channels of a VGG's convolutions, with
        a comma where a pooling is: "32-32,64-64" is `VGGConfig(((32, 32), (64, 64)))`.

    Raises:
      ValueError: it is neither.
    """
    if text in PRESETS:
        return PRESETS[text]
    try:
        return VGGConfig(tuple(tuple(map(int, stage.split("-"))) for stage in text.split(",")))
    except ValueError:
        raise ValueError(
            f"encoder must be one of {', '.join(PRESETS)}, or the channels of a VGG's "
            f"convolutions, with a comma where a pooling is, such as 32-32,64-64; got {text!r}"
        ) from None


def new_config(recipe: Any, **sizes: Any) -> CaptionerConfig:
    """The sizes of a recipe's model.

    Args:
      recipe: the settings.
      **sizes: those that are no settings.

    Raises:
      ValueError: a size is out of range; see `CaptionerConfig`.
    """
    chosen = {name: getattr(recipe, name) for name in _SIZES if hasattr(recipe, name)}
    return CaptionerConfig(**(chosen | sizes), encoder=read_encoder(recipe.encoder))


def caption_loss(
    model: Captioner,
    features: Float[Array, "batch positions features"],
    text: Integer[Array, "batch tokens"],
    key: PRNGKeyArray | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of the captions' words and ends, and their share that is foreseen.

    Args:
      model: a captioner.
      features: of the images, as `encode` returns them, or of regions.
      text: one caption per image.
      key: for dropout; None: no dropout.
    """
    text = text.astype(jnp.int32)
    logits = model({"features": features, "text": text[:, :-1]}, dropout_key=key)
    _, end, _ = special_ids(model.processor.tokenizer)
    return word_loss(logits, text, end_of_caption(text, end))


def train_captioner(
    recipe: Any,
    folder: Path,
    parts: dict[str, Any],
    loss: KeyedLoss,
    source: Source,
    *,
    name: str,
    factors: Mapping[str, float] | None = None,
    workers: int = 0,
) -> Captioner:
    """Train, and write the model in half precision; see `train_mapper` for files and resuming.

    Args:
      recipe: the settings.
      folder: where the model goes; check it with `check_new_folder` before any work.
      parts: what is trained: "model", and what is thrown away afterwards. The statistics of
        batch normalisation stay as they are.
      loss: `(parts, batch, key) -> (value, metrics)`, the key for dropout.
      source, workers: see `jaxrel.train.loop.batches.batches`.
      name: of the recipe.
      factors: of the learning rate, by part; see `adamw`.

    Returns:
      The model as it is in the folder.

    Raises:
      ValueError, FloatingPointError, OSError: see `fit`.
    """
    rate = warmup_cosine(recipe.learning_rate, recipe.steps, recipe.warmup)
    optimiser = adamw(
        rate, clip=None, clamp=recipe.clamp, b1=recipe.b1, b2=recipe.b2, factors=factors
    )
    return train_parts(
        recipe,
        folder,
        parts,
        loss,
        optimiser,
        rate,
        source,
        name=name,
        workers=workers,
        # Half the size, and hardly a word changes.
        dtype="float16",
    )
