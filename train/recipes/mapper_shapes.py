"""Recipes `vqa-shapes` and `caption-shapes`: CLIPmapper, trained on Shapes on two CPU cores.

Stage 1 begins as a CLIP. Both losses add, while training, that of naming the object each patch
shows (colour, shape, size, or background) and the patch's place from stage 1's tokens, by a linear
layer that is then thrown away: it makes stage 1 tell objects apart many times sooner than answers
or words do, and gives it a notion of left and below, which a CLIP need not have.
That of questions also adds the loss of finding what each question is about: its patches, from the
image's tokens in stage 2, and its place, from the token that the answer is read from. Without
these, counts and comparisons were learnt late, and how two objects lie to each other not at all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from tqdm.auto import trange

from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.clipmapper import (
    CLIPMapper,
    CLIPMapperCaption,
    CLIPMapperVQA,
)
from jaxrel.train.data.shapes import Scene, Shapes, answers, words
from jaxrel.train.data.shapes.scene import COLOURS, SHAPES, SIZES
from jaxrel.train.loop.batches import Arrays
from jaxrel.train.recipes.clip_shapes import normalise
from jaxrel.train.recipes.mapper import caption_loss, new_model, train_mapper
from jaxrel.train.recipes.settings import CaptionShapes, MapperShapes, VqaShapes

SIDE = 64
CAPTIONS = 5
QUESTIONS = 7
_VALUES = (tuple(COLOURS), SHAPES, tuple(SIZES))
# The most phrases of a question that stand for objects.
_PHRASES = 2
# A patch shows the object that covers the most of it, if that is at least this share.
_COVERED = 0.15


class PatchNames(nnx.Module):
    """What each patch shows, and where it is, read from normalised tokens by one linear layer.

    Args:
      features: of a token.
      grid: (rows, columns) of patches.
      rngs: for the initial parameters.
    """

    def __init__(self, features: int, grid: tuple[int, int], *, rngs: nnx.Rngs) -> None:
        self.head = nnx.Linear(features, sum(map(len, _VALUES)) + 3, rngs=rngs)
        self.grid = grid

    def loss(
        self,
        tokens: Float[Array, "batch tokens features"],
        shown: Int[Array, "batch patches 3"],
    ) -> Float[Array, ""]:
        """Mean cross-entropy of colour, shape and size where there is an object, and of whether.

        Added is the mean Huber loss of the row and the column.

        Args:
          tokens: of the image, normalised, the class token first.
          shown: indices of colour, shape and size; -1 where a patch shows the background.
        """
        logits = self.head(tokens[:, 1:]).astype(jnp.float32)
        *names, rest = jnp.split(logits, np.cumsum([len(v) for v in _VALUES]), axis=-1)
        there, place = rest[..., :1], rest[..., 1:]
        shown = shown.astype(jnp.int32)
        covered = shown[..., 0] >= 0
        entropy = optax.softmax_cross_entropy_with_integer_labels
        wrong = sum(entropy(name, shown[..., i].clip(0)) for i, name in enumerate(names))
        background = optax.sigmoid_binary_cross_entropy(there[..., 0], covered.astype(jnp.float32))
        named = jnp.where(covered, wrong, 0).sum() / jnp.maximum(covered.sum(), 1)
        index = jnp.arange(shown.shape[1])
        placed = jnp.stack([index // self.grid[1], index % self.grid[1]], axis=-1)
        wrong_place = optax.huber_loss(place, jnp.broadcast_to(placed, place.shape))
        return named + background.mean() + wrong_place.mean()


class Asked(nnx.Module):
    """What a question asks about: which patches show it, and where it lies."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Linear(features, _PHRASES, rngs=rngs)
        self.places = nnx.Linear(features, 2 * _PHRASES, rngs=rngs)

    def place_loss(
        self,
        token: Float[Array, "batch features"],
        place: Float[Array, "batch phrases 2"],
    ) -> Float[Array, ""]:
        """Mean Huber loss of the places of single objects, in sides of a patch.

        Args:
          token: that the answer is read from, normalised.
          place: (x, y) of what each phrase stands for; -1 where that is not one object.
        """
        found = self.places(token).astype(jnp.float32).reshape(place.shape)
        there = place >= 0
        wrong = optax.huber_loss(found, place.astype(jnp.float32))
        return jnp.where(there, wrong, 0).sum() / jnp.maximum(there.sum(), 1)

    def patch_loss(
        self,
        tokens: Float[Array, "batch tokens features"],
        asked: Bool[Array, "batch patches phrases"],
        counted: Bool[Array, " batch"],
    ) -> Float[Array, ""]:
        """Mean binary cross-entropy of the patches asked about plus that of all others.

        Args:
          tokens: of the image, for one question each, the class token first.
          asked: whether a patch shows what the first phrase of the question stands for, and the
            second.
          counted: which questions count.
        """
        logits = self.patches(tokens[:, 1:]).astype(jnp.float32)
        wrong = optax.sigmoid_binary_cross_entropy(logits, asked.astype(jnp.float32))

        def mean(of: Array) -> Array:
            of = of & counted[:, None, None]
            return jnp.where(of, wrong, 0).sum() / jnp.maximum(of.sum(), 1)

        return mean(asked) + mean(~asked)


def load_scenes(
    recipe: MapperShapes, model: CLIPMapper, split: str, count: int, read: Callable[[Scene], Any]
) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Draw scenes: images and what their patches show, and what `read` takes from each."""
    data = Shapes(seed=recipe.data_seed)
    vision = model.config.clip.vision
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    shown = np.empty((count, vision.tokens - 1, len(_VALUES)), np.int8)
    rest = []
    for i in trange(count, desc=f"drawing {split} scenes", unit="scene", leave=False):
        scene = data.scene(split, i)
        images[i], shown[i] = scene.image, shown_by_patch(scene, vision.grid)
        rest.append(read(scene))
    return {"image": images, "shown": shown}, rest


def shown_by_patch(scene: Scene, grid: tuple[int, int]) -> Int[np.ndarray, "patches 3"]:
    """Indices of colour, shape and size of the object each patch shows; -1 for background."""
    cover = _cover(scene, grid)
    named = [
        [values.index(x) for values, x in zip(_VALUES, (o.colour, o.shape, o.size), strict=True)]
        for o in scene.objects
    ]
    return np.where(
        cover.max(axis=0)[:, None] >= _COVERED, np.asarray(named)[cover.argmax(axis=0)], -1
    ).astype(np.int8)


def asked_by_patch(scene: Scene, grid: tuple[int, int]) -> Bool[np.ndarray, "7 patches 2"]:
    """By question and phrase, whether a patch shows an object that the phrase stands for."""
    covered = _cover(scene, grid) >= _COVERED
    asked = np.zeros((QUESTIONS, covered.shape[1], _PHRASES), bool)
    for i, question in enumerate(scene.questions):
        for phrase, objects in enumerate(question.named):
            asked[i, :, phrase] = covered[list(objects)].any(axis=0)
    return asked


def asked_places(scene: Scene, grid: tuple[int, int]) -> Float[np.ndarray, "7 2 2"]:
    """By question and phrase, (x, y) of the one object it stands for, in patches; or -1."""
    places = np.full((QUESTIONS, _PHRASES, 2), -1, np.float32)
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


def vqa_examples(recipe: VqaShapes, model: CLIPMapperVQA, split: str, count: int) -> Arrays:
    """Scenes with all their questions; what is missing to seven has the answer -1."""
    grid = model.config.clip.vision.grid

    def read(scene: Scene) -> Any:
        return scene.questions, asked_by_patch(scene, grid), asked_places(scene, grid)

    arrays, rest = load_scenes(recipe, model, split, count, read)
    asked = [questions for questions, *_ in rest]
    index = {answer: i for i, answer in enumerate(model.config.answers)}
    ids = model.processor.text([q.text for qs in asked for q in qs], recipe.context)
    text = np.zeros((count, QUESTIONS, recipe.context), np.int32)
    answer = np.full((count, QUESTIONS), -1, np.int8)
    start = 0
    for i, questions in enumerate(asked):
        text[i, : len(questions)] = ids[start : start + len(questions)]
        # A text that nobody asks still needs an end.
        text[i, len(questions) :] = ids[start]
        answer[i, : len(questions)] = [index[q.answer] for q in questions]
        start += len(questions)
    patches, places = (np.stack(part) for part in list(zip(*rest, strict=True))[1:])
    return Arrays(**arrays, text=text, answer=answer, asked=patches, place=places)


def caption_texts(scene: Scene) -> list[str]:
    """The captions of a scene without punctuation, which the tokenizer does not know."""
    return [" ".join(words(caption.text)) for caption in scene.captions]


class CaptionExamples:
    """Scenes with one caption each; five times as many examples as scenes.

    Example i is scene i modulo their number, with a caption that i draws.
    """

    def __init__(
        self, recipe: CaptionShapes, model: CLIPMapperCaption, split: str, count: int
    ) -> None:
        arrays, captions = load_scenes(recipe, model, split, count, caption_texts)
        ids = model.processor.text([text for five in captions for text in five], recipe.context)
        self._scenes = Arrays(**arrays)
        self._text = ids.reshape(count, CAPTIONS, -1)
        self._seed, self._full = recipe.seed, recipe.full

    def __len__(self) -> int:
        return CAPTIONS * len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self._seed, index))
        # The first two captions of a scene name every object.
        low, high = (0, 2) if rng.random() < self._full else (2, CAPTIONS)
        scene = index % len(self._scenes)
        return self._scenes[scene] | {"text": self._text[scene, rng.integers(low, high)]}


def vqa_loss(
    model: CLIPMapperVQA,
    about: Asked,
    tokens: Array,
    batch: dict[str, Array],
    asked_loss: float,
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of the right answers, with the loss of what is asked about.

    Args:
      model: what is trained.
      about: the heads that find what is asked about.
      tokens: of the images, as `encode_image` returns them.
      batch: as `vqa_examples` makes it.
      asked_loss: weight of finding what is asked about.

    Returns:
      The loss, and {"accuracy": the share of right answers, "asked": the loss of the patches,
      "places": that of the places}.
    """
    questions = batch["text"].shape[1]
    text = batch["text"].reshape(-1, batch["text"].shape[-1]).astype(jnp.int32)
    answer = batch["answer"].reshape(-1).astype(jnp.int32)
    (seen, words), _ = model.streams(jnp.repeat(tokens, questions, axis=0), text)
    logits = model.answer_logits(words, text)
    asked = answer >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, answer.clip(0))
    right = logits.argmax(-1) == answer
    count = asked.sum()
    patches, place = (x.reshape(-1, *x.shape[2:]) for x in (batch["asked"], batch["place"]))
    found = about.patch_loss(seen, patches, asked)
    placed = about.place_loss(model.at_end(words, text), place)
    loss = jnp.where(asked, entropy, 0).sum() / count + asked_loss * (found + placed)
    metrics = {"accuracy": (right & asked).sum() / count, "asked": found, "places": placed}
    return loss, metrics


def train_vqa(recipe: VqaShapes, folder: Path) -> CLIPMapper:
    """Train on all questions of each image of a batch; see `train_mapper`.

    Raises:
      FileExistsError: the folder exists and is no model folder; said before any work.
      ValueError, FloatingPointError, OSError: see `new_model` and `fit`.
    """
    check_new_folder(folder)
    model = new_model(recipe, CLIPMapperVQA, answers=answers())
    _check_size(recipe, model)
    examples = vqa_examples(recipe, model, "train", recipe.scenes)
    about = Asked(model.config.width, rngs=nnx.Rngs(recipe.seed))

    def loss(parts: Any, tokens: Array, batch: dict[str, Array]) -> Any:
        return vqa_loss(parts["model"], parts["about"], tokens, batch, recipe.asked_loss)

    parts = {"model": model, "about": about}
    return _train(recipe, folder, parts, loss, examples, "vqa-shapes")


def train_caption(recipe: CaptionShapes, folder: Path) -> CLIPMapper:
    """Train on one caption of each image of a batch; see `train_mapper`.

    Raises:
      FileExistsError, ValueError, FloatingPointError, OSError: as `train_vqa`.
    """
    check_new_folder(folder)
    model = new_model(recipe, CLIPMapperCaption)
    _check_size(recipe, model)
    examples = CaptionExamples(recipe, model, "train", recipe.scenes)

    def loss(parts: Any, tokens: Array, batch: dict[str, Array]) -> Any:
        return caption_loss(parts["model"], tokens, batch["text"])

    return _train(recipe, folder, {"model": model}, loss, examples, "caption-shapes")


def _check_size(recipe: MapperShapes, model: CLIPMapper) -> None:
    side = model.config.clip.vision.image_size
    if side != SIDE:
        raise ValueError(
            f"stage1 {recipe.stage1!r} reads images of {side} x {side} pixels, and this recipe "
            f"trains on Shapes of {SIDE} x {SIDE}; name a CLIP of that size, such as clip-shapes"
        )


def _train(
    recipe: MapperShapes,
    folder: Path,
    parts: dict[str, Any],
    loss_of: Callable[..., Any],
    examples: Any,
    name: str,
) -> CLIPMapper:
    vision = parts["model"].config.clip.vision
    parts = parts | {"names": PatchNames(vision.width, vision.grid, rngs=nnx.Rngs(recipe.seed))}

    def loss(parts: Any, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        model = parts["model"]
        tokens, _ = model.encode_image(normalise(batch["image"]))
        value, metrics = loss_of(parts, tokens, batch)
        named = parts["names"].loss(model.vision_norm(tokens), batch["shown"])
        return value + recipe.patch_loss * named, metrics | {"patches": named}

    # Half the size, and no answer or word changes.
    return train_mapper(recipe, folder, parts, loss, examples, name=name, dtype="float16")
