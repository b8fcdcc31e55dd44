"""Texts of Shapes about one object of several, with its mask: where should relevance lie?"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from jaxrel.explanations.methods import computed
from jaxrel.models.clipmapper import CLIPMapperCaption, CLIPMapperVQA
from jaxrel.train.data.shapes import Scene, Shapes
from jaxrel.train.evaluate.captioned_images import ShapesImages
from jaxrel.train.evaluate.localisation import named_objects
from jaxrel.train.evaluate.vqa import LOCATED, answer_indices, model_inputs

Masks = Bool[np.ndarray, "rows height width"]


class Located(NamedTuple):
    """Rows to explain, as `model.pairs` returns them, and where the object of each is."""

    inputs: dict[str, np.ndarray]
    masks: Masks


def located_examples(
    model: Any, *, data_seed: int, split: str, count: int, seed: int, batch: int
) -> Located:
    """Examples for a model of Shapes, at most one per scene.

    A model that answers questions is asked for the colour, shape or size of an object, and its
    answer is right. Of a model's own captions the noun of a true claim that fits some objects, but
    not all. To a CLIP, a phrase that names one object.

    Args:
      model: either CLIPmapper, or a CLIP.
      data_seed: of the Shapes data set.
      split: of the data set.
      count: how many.
      seed: of the choice of questions and words.
      batch: examples that the model reads at a time.

    Raises:
      ValueError: of ten scenes for each example that is asked for, too few give one.
    """
    data, rng = Shapes(seed=data_seed), np.random.default_rng(seed)
    scenes = (data.scene(split, i) for i in range(10 * count + batch))
    candidates: Iterator[Any] = scenes
    draw: Callable[[Any, list[Any], np.random.Generator], Located] = _phrases
    if isinstance(model, CLIPMapperVQA):
        candidates, draw = _questions(scenes, rng), _answered
    elif isinstance(model, CLIPMapperCaption):
        draw = _nouns
    else:
        candidates = named_objects(scenes)
    parts: list[Located] = []
    made = 0
    while made < count:
        some = list(itertools.islice(candidates, batch))
        if len(some) < batch:
            raise ValueError(
                f"localisation: in {10 * count + batch} scenes there are {made} examples for this "
                f"model, and {count} are asked for; it is not trained"
            )
        parts.append(draw(model, some, rng))
        made += len(parts[-1].masks)
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)


def _questions(scenes: Iterator[Scene], rng: np.random.Generator) -> Iterator[tuple[Scene, Any]]:
    """A question about one object of several in each scene that has one."""
    for scene in scenes:
        fitting = [question for question in scene.questions if question.kind in LOCATED]
        if fitting and len(scene.objects) > 1:
            yield scene, fitting[int(rng.integers(len(fitting)))]


def _answered(model: CLIPMapperVQA, asked: list[Any], rng: np.random.Generator) -> Located:
    """The questions that are answered rightly."""
    del rng
    inputs = computed(model.pairs(model_inputs(model, asked)))
    right = np.asarray(inputs["answer"]) == answer_indices(model, asked)
    masks = np.stack([scene.masks[question.objects[0]] for scene, question in asked])
    return Located({name: np.asarray(x)[right] for name, x in inputs.items()}, masks[right])


def _nouns(model: CLIPMapperCaption, scenes: list[Scene], rng: np.random.Generator) -> Located:
    """A noun of each caption that has one which says where it belongs."""
    inputs = model.prepare(image=[scene.image for scene in scenes])
    images = ShapesImages(tuple(scenes))
    rows, positions, masks = [], [], []
    for i, tokens in enumerate(model.tokens(inputs)):
        written = images.words(i, [token for token in tokens if token])
        some = range(1, len(scenes[i].objects))
        fitting = [word for word in written if len(word.objects) in some]
        if fitting:
            word = fitting[int(rng.integers(len(fitting)))]
            rows.append(i)
            positions.append(word.position)
            masks.append(scenes[i].masks[list(word.objects)].any(axis=0))
    found = {name: np.asarray(inputs[name])[rows] for name in ("image", "text")}
    side = scenes[0].masks.shape[1:]
    where = np.asarray(masks, bool).reshape(-1, *side)
    return Located(found | {"position": np.asarray(positions, np.int32)}, where)


def _phrases(model: Any, named: list[Any], rng: np.random.Generator) -> Located:
    """All phrases."""
    del rng
    scenes, phrases, masks = zip(*named, strict=True)
    prepared = model.prepare(image=[scene.image for scene in scenes], text=list(phrases))
    inputs = computed(model.pairs(prepared))
    return Located({name: np.asarray(x) for name, x in inputs.items()}, np.stack(masks))
