"""What all recipes of CLIPmapper share: the optimiser, the loop, and what is written at the end."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrel.models.auto import from_pretrained
from jaxrel.models.clip import CLIP, end_of_text
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperCaption, CLIPMapperConfig
from jaxrel.train.loop.batches import Source, batches
from jaxrel.train.loop.fit import fit
from jaxrel.train.loop.optimiser import adamw, warmup_cosine
from jaxrel.train.recipes.clip_shapes import SETTINGS_FILE

M = TypeVar("M", bound=CLIPMapper)
Loss = Callable[[dict[str, Any], dict[str, Array]], tuple[Array, dict[str, Array]]]
KeyedLoss = Callable[[dict[str, Any], dict[str, Array], Array], tuple[Array, dict[str, Array]]]


def new_model(
    recipe: Any,
    kind: type[M],
    *,
    answers: tuple[str, ...] = (),
    several: bool = False,
) -> M:
    """The model before training: it begins as the recipe's `stage1` (see `CLIPMapper.init_from`).

    Raises:
      ValueError: stage 1 reads shorter texts than the recipe wants.
    """
    stage1 = from_pretrained(recipe.stage1)
    towers = stage1.config if isinstance(stage1, CLIP) else stage1.config.clip
    if recipe.context > towers.text.context:
        raise ValueError(
            f"context {recipe.context} is more than the {towers.text.context} tokens that "
            f"{recipe.stage1!r} reads"
        )
    text = replace(towers.text, context=recipe.context)
    config = CLIPMapperConfig(
        task=kind.task,
        clip=replace(towers, text=text, dtype=recipe.dtype),
        answers=answers,
        several=several,
        width=recipe.width,
        layers=recipe.layers,
        heads=recipe.heads,
        mlp_width=recipe.mlp_width,
    )
    model = kind(config, rngs=nnx.Rngs(recipe.seed), processor=stage1.processor)
    model.init_from(stage1)
    return model


def train_mapper(
    recipe: Any,
    folder: Path,
    parts: dict[str, Any],
    loss: Loss,
    source: Source,
    *,
    name: str,
    workers: int = 0,
    dtype: str = "float32",
) -> CLIPMapper:
    """Train, and write the model, its settings and `train.jsonl` into a folder.

    Checkpoints go to `<folder>.checkpoints`, and are removed when the model is written; the
    same call goes on from the newest one when it was stopped.

    Args:
      recipe: the settings.
      folder: where the model goes; check it with `check_new_folder` before any work.
      parts: what is trained: "model", and what is thrown away afterwards.
      loss: `(parts, batch) -> (value, metrics)`.
      source, workers: see `jaxrel.train.loop.batches.batches`.
      name: of the recipe.
      dtype: of the file.

    Returns:
      The model as it is in the folder.

    Raises:
      ValueError, FloatingPointError, OSError: see `fit`.
    """
    rate = warmup_cosine(recipe.learning_rate, recipe.steps, recipe.warmup)
    factors = {"model/vision": recipe.stage1_rate, "model/text": recipe.stage1_rate}
    return train_parts(
        recipe,
        folder,
        parts,
        lambda parts, batch, key: loss(parts, batch),
        adamw(rate, weight_decay=recipe.weight_decay, b2=0.98, factors=factors),
        rate,
        source,
        name=name,
        workers=workers,
        dtype=dtype,
    )


def train_parts(
    recipe: Any,
    folder: Path,
    parts: dict[str, Any],
    loss: KeyedLoss,
    optimiser: optax.GradientTransformation,
    rate: optax.Schedule,
    source: Source,
    *,
    name: str,
    workers: int = 0,
    dtype: str = "float32",
) -> Any:
    """What `train_mapper` does, for any model, optimiser and loss; only `nnx.Param`s are trained.

    Args:
      recipe, folder, parts, source, name, workers, dtype: see `train_mapper`.
      loss: `(parts, batch, key) -> (value, metrics)`, with the metric "accuracy".
      optimiser: of the parameters of the parts.
      rate: of learning, for the log.

    Returns:
      The model as it is in the folder.

    Raises:
      ValueError, FloatingPointError, OSError: see `fit`.
    """
    folder = Path(folder).expanduser().resolve()
    checkpoints = folder.with_name(f"{folder.name}.checkpoints")
    graph, params, *rest = nnx.split(parts, nnx.Param, ...)

    def of_params(params: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        return loss(nnx.merge(graph, params, *rest), batch, key)

    params = fit(
        of_params,
        params,
        optimiser,
        batches(source, batch=recipe.batch, seed=recipe.seed, workers=workers),
        steps=recipe.steps,
        key=jax.random.key(recipe.seed),
        settings=recipe,
        folder=checkpoints,
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
        accumulate=recipe.accumulate,
        schedule=rate,
        show="accuracy",
        name=name,
    )
    model = nnx.merge(graph, params, *rest)["model"]
    model.save_pretrained(folder, dtype=dtype)
    settings = json.dumps(dataclasses.asdict(recipe), indent=2)
    (folder / SETTINGS_FILE).write_text(settings + "\n", encoding="utf-8")
    shutil.copy(checkpoints / "train.jsonl", folder / "train.jsonl")
    # Only what can be read again makes the checkpoints superfluous.
    trained = type(model).from_pretrained(folder)
    shutil.rmtree(checkpoints)
    return trained


def caption_loss(
    model: CLIPMapperCaption, tokens: Array, text: Array
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of the captions' words and ends, and their share that is foreseen."""
    text = text.astype(jnp.int32)
    words, _ = model.map(tokens, text[:, :-1])
    end = end_of_text(text, model.config.clip.text.eos_token_id)
    return word_loss(model.word_logits(words), text, end)


def word_loss(
    logits: Float[Array, "batch rest vocabulary"],
    text: Int[Array, "batch tokens"],
    end: Int[Array, " batch"],
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of captions' words and ends, and their share that is foreseen.

    Args:
      logits: of the token after each but the last.
      text: token ids.
      end: the position of each caption's end; what follows it does not count.

    Returns:
      The loss, and {"accuracy": the share}.
    """
    following = text[:, 1:]
    counted = jnp.arange(1, text.shape[1]) <= end[:, None]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    right = (logits.argmax(-1) == following) & counted
    count = counted.sum()
    return jnp.where(counted, entropy, 0).sum() / count, {"accuracy": right.sum() / count}
