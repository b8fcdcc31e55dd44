"""Recipe `clip-shapes`: a small CLIP, trained on Shapes from nothing, on two CPU cores.

The contrastive loss is CLIP's (Radford et al. 2021): in a batch of pictures with one caption
each, every picture shall find its caption, and every caption its picture.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
from tqdm.auto import tqdm, trange

from jaxrel.models.clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from jaxrel.models.processor import Processor, image_processing
from jaxrel.models.tokenizer import word_tokenizer
from jaxrel.train.data.shapes import Shapes, vocabulary

CAPTIONS = 5


@dataclasses.dataclass(frozen=True)
class ClipShapes:
    """Settings of the recipe; every one can be given on the command line.

    Args:
      seed: of the parameters and of the order of examples.
      data_seed: of the Shapes data set.
      scenes: training scenes, drawn once and kept in memory.
      steps: of the optimiser.
      batch: pictures, each with one caption, per step.
      learning_rate: the highest, after the warm-up; it falls to 0 as a cosine.
      warmup: steps until the highest learning rate.
      weight_decay: of AdamW.
      full: how often a caption is one of the two that name every object; the others are
        taken from the relation, the count and the single object in equal shares.
      width: features per token, in both towers.
      vision_layers: layers of the image tower.
      text_layers: layers of the text tower.
      heads: attention heads.
      patch_size: pixels of a side of a patch.
      context: tokens of the longest text.
      projection: features of the common space.
      log_every: steps between two lines of the log.
    """

    seed: int = 0
    data_seed: int = 0
    scenes: int = 60_000
    steps: int = 3_000
    batch: int = 256
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.1
    full: float = 0.6
    width: int = 128
    vision_layers: int = 4
    text_layers: int = 2
    heads: int = 4
    patch_size: int = 8
    context: int = 34
    projection: int = 128
    log_every: int = 50

    def __post_init__(self):
        for name in ("scenes", "steps", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"clip-shapes: {name} must be at least 1")
        if self.batch > self.scenes:
            raise ValueError(
                f"clip-shapes: batch {self.batch} is more than the {self.scenes} scenes"
            )
        if not 0 <= self.full <= 1:
            raise ValueError(f"clip-shapes: full must be from 0 to 1, got {self.full}")


def new_model(recipe: ClipShapes) -> CLIP:
    """The untrained model, with its tokenizer and picture preprocessing."""
    tower = {"width": recipe.width, "heads": recipe.heads, "mlp_width": 4 * recipe.width}
    tokenizer = word_tokenizer(vocabulary(), recipe.context)
    config = CLIPConfig(
        vision=VisionConfig(
            layers=recipe.vision_layers, image_size=64, patch_size=recipe.patch_size, **tower
        ),
        text=TextConfig(
            layers=recipe.text_layers,
            vocab_size=len(tokenizer),
            context=recipe.context,
            eos_token_id=tokenizer.eos_token_id,
            **tower,
        ),
        projection=recipe.projection,
    )
    processor = Processor(tokenizer, image_processing(config.vision.image_size))
    return CLIP(config, rngs=nnx.Rngs(recipe.seed), processor=processor)


def normalise(image: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch height width 3"]:
    """Pixels as `image_processing` hands them to the model, when nothing need be resized."""
    return image.astype(jnp.float32) / 127.5 - 1


def load(
    recipe: ClipShapes, model: CLIP, split: str, count: int
) -> tuple[UInt8[np.ndarray, "scenes 64 64 3"], Int[np.ndarray, "scenes 5 tokens"]]:
    """Draw scenes: their pictures, and the token ids of their captions."""
    data = Shapes(seed=recipe.data_seed)
    images = np.empty((count, 64, 64, 3), np.uint8)
    captions: list[str] = []
    for i in trange(count, desc=f"drawing {split} scenes", unit="scene", leave=False):
        scene = data.scene(split, i)
        images[i] = scene.image
        captions += [caption.text for caption in scene.captions]
    ids = model.processor.text(captions, recipe.context)
    return images, ids.astype(np.int16).reshape(count, CAPTIONS, -1)


def contrastive_loss(model: CLIP, image: Array, text: Array) -> Float[Array, ""]:
    """Mean cross-entropy of finding the caption and of finding the picture."""
    logits = model({"image": normalise(image), "text": text.astype(jnp.int32)})["logits_per_image"]
    labels = jnp.arange(len(logits))
    losses = optax.softmax_cross_entropy_with_integer_labels
    return (losses(logits, labels).mean() + losses(logits.T, labels).mean()) / 2


def optimiser(recipe: ClipShapes) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine; only matrices decay."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(recipe.warmup, recipe.steps // 2), recipe.steps
    )

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=recipe.weight_decay, mask=matrices),
    )


def train(recipe: ClipShapes, folder: Path) -> CLIP:
    """Train, write the model and `train.jsonl` (a line per `log_every` steps) into a folder.

    Args:
      recipe: the settings.
      folder: where the model goes; a model that is there is replaced at the end, not before.

    Returns:
      The trained model.

    Raises:
      FloatingPointError: the loss is no longer finite; nothing is written.
    """
    model = new_model(recipe)
    images, texts = load(recipe, model, "train", recipe.scenes)
    graph, params = nnx.split(model)
    transform = optimiser(recipe)

    @jax.jit
    def step(params: Any, state: Any, image: Array, text: Array) -> Any:
        def loss(params):
            return contrastive_loss(nnx.merge(graph, params), image, text)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, value

    state = transform.init(params)
    rng = np.random.default_rng(recipe.seed)
    log: list[dict[str, float]] = []
    losses: list[Any] = []
    progress = tqdm(range(1, recipe.steps + 1), desc="clip-shapes", unit="step")
    for number in progress:
        rows = rng.choice(recipe.scenes, recipe.batch, replace=False)
        which = _choose_captions(rng, recipe)
        params, state, value = step(params, state, images[rows], texts[rows, which])
        losses.append(value)
        if number % recipe.log_every == 0 or number == recipe.steps:
            mean = float(np.mean(jax.device_get(losses)))
            losses.clear()
            if not np.isfinite(mean):
                raise FloatingPointError(
                    f"clip-shapes: the loss is {mean} at step {number}; nothing was written. "
                    f"Try a learning rate below {recipe.learning_rate}"
                )
            log.append({"step": number, "loss": mean})
            progress.set_postfix(loss=f"{mean:.3f}")
    model = nnx.merge(graph, params)
    model.save_pretrained(folder)
    lines = "".join(json.dumps(line) + "\n" for line in log)
    (Path(folder) / "train.jsonl").write_text(lines, encoding="utf-8")
    return model


def _choose_captions(rng: np.random.Generator, recipe: ClipShapes) -> Int[np.ndarray, " batch"]:
    full = rng.random(recipe.batch) < recipe.full
    return np.where(full, rng.integers(0, 2, recipe.batch), rng.integers(2, 5, recipe.batch))
