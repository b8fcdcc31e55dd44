"""What scenes of Shapes look like to a model, and how high its scores of them are."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxrel.models.familiarity import Familiarity, fit
from jaxrel.train.data.shapes import Scene, Shapes

# Scenes are drawn small, as for the training, and large, as a user might draw them.
_SIDES = (64, 256)
_ROWS = 256


def measure(
    model: Any, *, pixel_mean: Sequence[float], pixel_std: Sequence[float], scenes: int = 2048
) -> Familiarity:
    """Measure what is familiar to a model of Shapes.

    The splits are `val` for what scenes look like and `test` for the thresholds, half of them
    drawn with 64 pixels a side and half with 256. Scores are those of `test`: of each scene with
    its caption, its answer to a question, or the words of its own caption.

    Args:
      model: a model of Shapes.
      pixel_mean: what its preprocessing takes from each channel, of values 0 to 1.
      pixel_std: what it divides by.
      scenes: how many held-out scenes there are, and as many others; at least 4.

    Raises:
      ValueError: too few scenes.
    """
    if scenes < 4:
        raise ValueError(f"familiarity needs at least 4 scenes, got {scenes}")
    known, held_out = (_drawn(split, scenes) for split in ("val", "test"))
    return fit(
        _images(model, known),
        _images(model, held_out),
        _scores(model, held_out),
        data="Shapes",
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


def _drawn(split: str, scenes: int) -> list[Scene]:
    each = scenes // len(_SIDES)
    return [
        Shapes(size=side).scene(split, i * each + j)
        for i, side in enumerate(_SIDES)
        for j in range(each)
    ]


def _images(model: Any, scenes: Sequence[Scene]) -> Float[np.ndarray, "scenes height width 3"]:
    return np.concatenate([np.asarray(model.processor.image(scene.image)) for scene in scenes])


def _scores(model: Any, scenes: Sequence[Scene]) -> Float[np.ndarray, " scores"]:
    task = getattr(model, "task", "text")
    found = []
    for start in range(0, len(scenes), 64):
        part = scenes[start : start + 64]
        text = {
            "text": [scene.captions[0].text for scene in part],
            "vqa": [scene.questions[0].text for scene in part],
        }.get(task)
        rows = model.pairs(model.prepare(image=[scene.image for scene in part], text=text))
        found.append(_in_chunks(model, rows))
    return np.concatenate(found)


def _in_chunks(model: Any, rows: dict[str, Any]) -> Float[np.ndarray, " rows"]:
    """The score of each row, by one program: chunks are filled up with the last row."""
    count = len(rows["text"])
    rows = {name: np.asarray(value) for name, value in rows.items() if name != "spelling"}
    found = []
    for start in range(0, count, _ROWS):
        which = np.minimum(np.arange(start, start + _ROWS), count - 1)
        chunk = {name: value[which] for name, value in rows.items()}
        found.append(np.asarray(_score(model, chunk))[: count - start])
    return np.concatenate(found)


@jax.jit
def _score(model: Any, rows: Any) -> Any:
    return model.score(rows)
