"""What the patches of a scene show, and which of them a question is about."""

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrel.train.data.shapes.dataset import Scene
from jaxrel.train.data.shapes.scene import COLOURS, SHAPES, SIZES

# The most questions of a scene, and the most phrases of a question that stand for objects.
QUESTIONS = 7
PHRASES = 2
NAMES = (tuple(COLOURS), SHAPES, tuple(SIZES))
# A patch shows the object that covers the most of it, if that is at least this share.
_COVERED = 0.15


def shown_by_patch(scene: Scene, grid: tuple[int, int]) -> Int[np.ndarray, "patches 3"]:
    """Indices of colour, shape and size of the object each patch shows; -1 for background."""
    cover = _cover(scene, grid)
    named = [
        [values.index(x) for values, x in zip(NAMES, (o.colour, o.shape, o.size), strict=True)]
        for o in scene.objects
    ]
    return np.where(
        cover.max(axis=0)[:, None] >= _COVERED, np.asarray(named)[cover.argmax(axis=0)], -1
    ).astype(np.int8)


def asked_by_patch(scene: Scene, grid: tuple[int, int]) -> Bool[np.ndarray, "7 patches 2"]:
    """By question and phrase, whether a patch shows an object that the phrase stands for."""
    covered = _cover(scene, grid) >= _COVERED
    asked = np.zeros((QUESTIONS, covered.shape[1], PHRASES), bool)
    for i, question in enumerate(scene.questions):
        for phrase, objects in enumerate(question.named):
            asked[i, :, phrase] = covered[list(objects)].any(axis=0)
    return asked


def asked_places(scene: Scene, grid: tuple[int, int]) -> Float[np.ndarray, "7 2 2"]:
    """By question and phrase, (x, y) of the one object it stands for, in patches; or -1."""
    places = np.full((QUESTIONS, PHRASES, 2), -1, np.float32)
    for i, question in enumerate(scene.questions):
        for phrase, objects in enumerate(question.named):
            if len(objects) == 1:
                thing = scene.objects[objects[0]]
                places[i, phrase] = thing.x * grid[1], thing.y * grid[0]
    return places


def _cover(scene: Scene, grid: tuple[int, int]) -> Float[np.ndarray, "objects patches"]:
    """The share of each patch that each object covers."""
    rows, columns = grid
    objects, height, width = scene.masks.shape
    cells = scene.masks.reshape(objects, rows, height // rows, columns, width // columns)
    return cells.mean(axis=(2, 4)).reshape(objects, -1)
