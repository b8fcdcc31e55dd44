"""What every recipe does with its model, its loss and its examples: train, and write the result."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from jaxrel.train.loop.batches import Source, batches
from jaxrel.train.loop.fit import fit
from jaxrel.train.loop.optimiser import adamw, warmup_cosine

# (parts, batch, key) -> (value, metrics).
Loss = Callable[[dict[str, Any], dict[str, Array], Array], tuple[Array, dict[str, Array]]]

SETTINGS_FILE = "settings.json"


def train_model(
    recipe: Any,
    folder: Path,
    parts: dict[str, Any],
    loss: Loss,
    source: Source,
    *,
    name: str,
    dtype: str = "float16",
    show: str = "accuracy",
) -> Any:
    """Train, and write the model, its settings and `train.jsonl` into a folder.

    The learning rate rises in a line and falls to 0 as a cosine. Only `nnx.Param`s are trained:
    the statistics of batch normalisation stay as they are.

    Checkpoints go to `<folder>.checkpoints`, and are removed when the model is written; the
    same call resumes from the newest one.

    Args:
      recipe: the settings, a `jaxrel.train.recipes.settings.Training`.
      folder: where the model goes; check it with `check_new_folder` before any work.
      parts: what is trained: "model", and what is thrown away afterwards.
      loss: `(parts, batch, key) -> (value, metrics)`, the key for dropout and samples.
      source: see `jaxrel.train.loop.batches.batches`; a recipe on photographs says how many
        processes read them.
      name: the recipe's, for the progress bar and messages.
      dtype: of the file. float16 halves it, and hardly an answer or a word changes.
      show: the metric that the progress bar shows beside the loss.

    Returns:
      The model as it is in the folder.

    Raises:
      ValueError, FloatingPointError, OSError: see `fit`.
    """
    folder = Path(folder).expanduser().resolve()
    checkpoints = folder.with_name(f"{folder.name}.checkpoints")
    workers = getattr(recipe, "workers", 0)
    rate = warmup_cosine(recipe.learning_rate, recipe.steps, recipe.warmup)
    graph, params, *rest = nnx.split(parts, nnx.Param, ...)

    def of_params(params: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        return loss(nnx.merge(graph, params, *rest), batch, key)

    params = fit(
        of_params,
        params,
        adamw(rate, **recipe.optimiser()),
        batches(source, batch=recipe.batch, seed=recipe.seed, workers=workers),
        steps=recipe.steps,
        key=jax.random.key(recipe.seed),
        settings=recipe,
        folder=checkpoints,
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
        accumulate=recipe.accumulate,
        schedule=rate,
        show=show,
        name=name,
    )
    model = nnx.merge(graph, params, *rest)["model"]
    model.save_pretrained(folder, dtype=dtype)
    write_settings(recipe, folder)
    shutil.copy(checkpoints / "train.jsonl", folder / "train.jsonl")
    # Only what can be read again makes the checkpoints superfluous.
    trained = type(model).from_pretrained(folder)
    shutil.rmtree(checkpoints)
    return trained


def write_settings(recipe: Any, folder: Path) -> None:
    """Write the settings of a training beside its model."""
    text = json.dumps(dataclasses.asdict(recipe), indent=2)
    (Path(folder) / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read what `write_settings` wrote.

    Raises:
      FileNotFoundError: the folder has no settings.json.
    """
    return json.loads((Path(folder) / SETTINGS_FILE).read_text(encoding="utf-8"))
