"""How well a CLIPmapper answers questions about Shapes, and where its relevance lies."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Bool, Int
from tqdm.auto import trange

from jaxrel.explanations.explain import BIMODAL_METHODS
from jaxrel.metrics import bootstrap, bootstrap_ratio
from jaxrel.models.clipmapper import CLIPMapperVQA
from jaxrel.train.data.shapes import Scene, Shapes, answers
from jaxrel.train.data.shapes.questions import ANSWERS, Question
from jaxrel.train.evaluate.batching import equal_batches
from jaxrel.train.evaluate.localisation import localisation_table, localise
from jaxrel.train.evaluate.tables import Table, cell

# What points at objects of the image: the answer is read off them.
LOCATED = ("colour", "shape", "size")

Asked = Sequence[tuple[Scene, Question]]


def evaluate(
    model: CLIPMapperVQA,
    *,
    data_seed: int = 0,
    split: str = "test",
    scenes: int = 2048,
    located: int = 256,
    batch: int = 64,
) -> dict[str, Any]:
    """Judge a model on held-out scenes: accuracy by kind of question, and where relevance lies.

    Accuracy is also given with the image withheld (all its patches hidden from attention):
    then it should be that of always giving the most frequent answer of the kind. Localisation:
    relevance mass accuracy on the object that a question about a colour, a shape or a size names,
    where the answer is right, and the pointing game, by method.

    Args:
      model: one that knows Shapes' words and answers.
      data_seed: of the Shapes data set.
      split: of the data set.
      scenes: how many; each with all its questions.
      located: how many questions serve localisation.
      batch: questions at a time.

    Returns:
      `protocol`, `accuracy`, `localisation` with means and bootstrap 95% intervals.

    Raises:
      ValueError: no scenes, or the model is made for other answers.
    """
    if scenes < 1:
        raise ValueError(f"scenes must be at least 1, got {scenes}")
    check_answers(model)
    data = Shapes(seed=data_seed)
    drawn = [data.scene(split, i) for i in trange(scenes, desc="drawing", leave=False)]
    asked = [(scene, question) for scene in drawn for question in scene.questions]
    right = _right(model, asked, batch, withheld=False)
    blind = _right(model, asked, batch, withheld=True)
    return {
        "protocol": "vqa-shapes/1",
        "split": split,
        "data_seed": data_seed,
        "scenes": scenes,
        "questions": len(asked),
        "accuracy": _by_kind(asked, right),
        "image withheld": _by_kind(asked, blind),
        "most frequent answer": _most_frequent(asked),
        "localisation": _localisation(model, asked, right, located, batch),
    }


def model_inputs(model: CLIPMapperVQA, asked: Asked) -> dict[str, Any]:
    """Images and questions as the model's inputs."""
    return model.prepare(
        image=[scene.image for scene, _ in asked], text=[question.text for _, question in asked]
    )


def check_answers(model: CLIPMapperVQA) -> None:
    """Raise ValueError unless the model has all answers of Shapes."""
    unknown = sorted(set(answers()) - set(model.config.answers))
    if unknown:
        raise ValueError(
            f"the model does not know the answers {', '.join(unknown)}; it was not made for Shapes"
        )


def answer_indices(model: CLIPMapperVQA, asked: Asked) -> Int[np.ndarray, " questions"]:
    """The right answers, as the model numbers them."""
    index = {answer: i for i, answer in enumerate(model.config.answers)}
    return np.asarray([index[question.answer] for _, question in asked], np.int32)


@jax.jit
def best_answers(model: CLIPMapperVQA, inputs: Any) -> jax.Array:
    """The index of the most probable answer to each question."""
    return model(inputs).argmax(-1)


def _right(
    model: CLIPMapperVQA, asked: Asked, batch: int, *, withheld: bool
) -> Bool[np.ndarray, " questions"]:
    found = []
    truth = answer_indices(model, asked)
    for rows in equal_batches(len(asked), batch, "answering", leave=False):
        inputs = model_inputs(model, [asked[i] for i in rows])
        if withheld:
            keep = np.arange(model.config.clip.vision.tokens) == 0
            inputs["image_keep"] = jnp.broadcast_to(jnp.asarray(keep), (batch, len(keep)))
        found.append(np.asarray(best_answers(model, inputs)))
    return np.concatenate(found)[: len(asked)] == truth


def _by_kind(asked: Asked, right: Bool[np.ndarray, " questions"]) -> dict[str, Any]:
    kinds = np.asarray([question.kind for _, question in asked])
    # A scene has one question of a kind at most; all its questions are not independent.
    _, scene = np.unique([scene.index for scene, _ in asked], return_inverse=True)
    found = {"all": bootstrap_ratio(np.bincount(scene, right), np.bincount(scene))}
    for kind in ANSWERS:
        if (kinds == kind).any():
            found[kind] = bootstrap(right[kinds == kind])
    return {kind: interval._asdict() for kind, interval in found.items()}


def _most_frequent(asked: Asked) -> dict[str, float]:
    shares: dict[str, float] = {}
    for kind in ANSWERS:
        given = [question.answer for _, question in asked if question.kind == kind]
        if given:
            shares[kind] = max(given.count(answer) for answer in set(given)) / len(given)
    return shares


def _localisation(
    model: CLIPMapperVQA,
    asked: Asked,
    right: Bool[np.ndarray, " questions"],
    count: int,
    batch: int,
) -> dict[str, Any]:
    chosen = [
        one
        for one, fine in zip(asked, right, strict=True)
        if fine and one[1].kind in LOCATED and len(one[0].objects) > 1
    ]
    batch = min(batch, len(chosen), count)
    if not batch:
        return {"examples": 0}
    chosen = chosen[:count]
    return localise(
        model,
        [scene.image for scene, _ in chosen],
        [question.text for _, question in chosen],
        np.stack([scene.masks[question.objects[0]] for scene, question in chosen]),
        methods=BIMODAL_METHODS,
        batch=batch,
    )


def tables(result: dict[str, Any]) -> list[Table]:
    """Accuracy by kind of question, and relevance by method.

    Args:
      result: of `evaluate`, or read back from JSON.
    """
    frequent = result["most frequent answer"]
    rows = [
        [kind, cell(found), cell(result["image withheld"][kind]), _share(frequent.get(kind))]
        for kind, found in result["accuracy"].items()
    ]
    head = ["questions", "accuracy", "image withheld", "most frequent answer"]
    note = (
        f"Split `{result['split']}`, {result['questions']} questions of {result['scenes']} scenes."
    )
    local = result["localisation"]
    return [
        Table("Accuracy", note, head, rows),
        *([localisation_table(local)] if local["examples"] else []),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
