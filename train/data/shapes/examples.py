"""Scenes as a recipe trains on them: drawn once and kept in memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, UInt8
from tqdm.auto import trange

from jaxrel.models.processor import Processor
from jaxrel.train.data.shapes.dataset import Scene, Shapes
from jaxrel.train.data.shapes.language import words
from jaxrel.train.data.shapes.patches import NAMES, shown_by_patch
from jaxrel.train.loop.batches import Example

SIDE = 64
CAPTIONS = 5  # of a scene; the first FULL of them name every object
FULL = 2


def normalise(image: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch height width 3"]:
    """Pixels as `image_processing` hands them to the model, when nothing need be resized."""
    return image.astype(jnp.float32) / 127.5 - 1


def draw_scenes(
    data_seed: int,
    split: str,
    count: int,
    read: Callable[[Scene], Any],
    *,
    grid: tuple[int, int] | None = None,
) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Draw the first scenes of a split.

    Args:
      data_seed: of the data set.
      split: its name.
      count: how many scenes.
      read: what is wanted of each beside its image.
      grid: (rows, columns) of patches; None leaves out what they show.

    Returns:
      The images, uint8 [scenes, 64, 64, 3], with what each patch shows, int8 [scenes, patches, 3];
      and what `read` returned.
    """
    data = Shapes(seed=data_seed)
    arrays = {"image": np.empty((count, SIDE, SIDE, 3), np.uint8)}
    if grid is not None:
        arrays["shown"] = np.empty((count, grid[0] * grid[1], len(NAMES)), np.int8)
    rest = []
    for i in trange(count, desc=f"drawing {split} scenes", unit="scene", leave=False):
        scene = data.scene(split, i)
        arrays["image"][i] = scene.image
        if grid is not None:
            arrays["shown"][i] = shown_by_patch(scene, grid)
        rest.append(read(scene))
    return arrays, rest


def caption_texts(scene: Scene) -> list[str]:
    """The captions of a scene without punctuation, which the tokenizer does not know."""
    return [" ".join(words(caption.text)) for caption in scene.captions]


class CaptionExamples:
    """Scenes with one caption each; five times as many examples as scenes.

    Example i is scene i modulo their number, with a caption that i draws.

    Args:
      recipe: its data_seed, seed, scenes and full count.
      split: of the data set.
      processor: of the model.
      context: tokens that the model reads.
      grid: (rows, columns) of patches.

    Attributes:
      text: token ids of all captions, [scenes, 5, tokens].
    """

    def __init__(
        self, recipe: Any, split: str, processor: Processor, context: int, grid: tuple[int, int]
    ) -> None:
        self._arrays, captions = draw_scenes(
            recipe.data_seed, split, recipe.scenes, caption_texts, grid=grid
        )
        ids = processor.text([text for five in captions for text in five], context)
        self.text = ids.astype(np.int16).reshape(recipe.scenes, CAPTIONS, -1)
        self._seed, self._full = recipe.seed, recipe.full

    def __len__(self) -> int:
        return CAPTIONS * len(self.text)

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((self._seed, index))
        low, high = (0, FULL) if rng.random() < self._full else (FULL, CAPTIONS)
        scene = index % len(self.text)
        return {
            "id": np.int64(index),
            **{name: array[scene] for name, array in self._arrays.items()},
            "text": self.text[scene, rng.integers(low, high)],
        }
