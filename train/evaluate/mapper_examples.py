"""What explanations of CLIPmapper are judged on: questions and captions about Shapes."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array
from tqdm.auto import tqdm, trange

from jaxrel.metrics.caption_scores import References, tokenise
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperCaption, CLIPMapperVQA
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.evaluate.vqa import answer_indices, check_answers, model_inputs

STREAMS = {"image": "vision", "text": "text"}
# Before the fifth word of a caption there are three that may be removed: fewer have no order.
FIRST = 5


@dataclasses.dataclass(frozen=True)
class Examples:
    """What is perturbed: inputs with one row per example, and which tokens may be removed.

    Attributes:
      inputs: as `model.pairs` returns them.
      removable: by modality, bool [examples, tokens].
      explained: what is explained, in words.
      measure: what is measured, in words.
      measured: `(model, words, inputs) -> [examples]`; `words` are the text's tokens in the end,
        as `model.map` returns them where some tokens are hidden.
      references: of captions, what people say of each example's scene, in words.
    """

    inputs: dict[str, Any]
    removable: dict[str, np.ndarray]
    explained: str
    measure: str
    measured: Callable[[Any, Array, Any], Array]
    references: Sequence[References] = ()


def once_each(who: str, what: str, given: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The names that are given, each once.

    Args:
      who: asks, for the message.
      what: they are names of.
      given: at least one.
      known: all that there are.

    Raises:
      ValueError: none is given, or one is unknown.
    """
    names = tuple(dict.fromkeys(given))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wrong = f"unknown {what} {unknown[0]!r}" if unknown else f"no {what} given"
        raise ValueError(f"{who}: {wrong}; there are {', '.join(known)}")
    return names


def check_sizes(who: str, examples: int, batch: int) -> None:
    """Raise ValueError unless there are examples, and some at a time."""
    if examples < 1 or batch < 1:
        raise ValueError(
            f"{who}: examples and batch must be at least 1, got {examples} and {batch}"
        )


def draw_examples(model: CLIPMapper, **options: Any) -> list[Examples]:
    """Questions or captions, as the model has it; see `question_examples`, `caption_examples`."""
    if isinstance(model, CLIPMapperVQA):
        check_answers(model)
        return [question_examples(model, **options)]
    if isinstance(model, CLIPMapperCaption):
        return caption_examples(model, **options)
    raise TypeError(f"expected a CLIPMapperVQA or CLIPMapperCaption, got {type(model).__name__}")


def question_examples(
    model: CLIPMapperVQA, *, data_seed: int, split: str, count: int, seed: int, batch: int
) -> Examples:
    """One question for each scene."""
    data, rng = Shapes(seed=data_seed), np.random.default_rng(seed)
    asked = []
    for i in trange(count, desc="drawing", leave=False):
        scene = data.scene(split, i)
        asked.append((scene, scene.questions[int(rng.integers(len(scene.questions)))]))
    parts = [
        model.pairs(model_inputs(model, asked[start : start + batch]))
        for start in range(0, count, batch)
    ]
    inputs = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    inputs["truth"] = answer_indices(model, asked)
    content = jax.device_get(model.content(inputs))

    def right(model: CLIPMapperVQA, words: Array, inputs: Any) -> Array:
        answer = model.answer_logits(words, jnp.asarray(inputs["text"])).argmax(-1)
        return (answer == inputs["truth"]).astype(jnp.float32)

    return Examples(
        inputs,
        {"image": content["vision"], "text": content["text"]},
        "the model's own answer",
        "share of right answers",
        right,
    )


def caption_examples(
    model: CLIPMapperCaption, *, data_seed: int, split: str, count: int, seed: int, batch: int
) -> list[Examples]:
    """The model's own caption of each scene, and one word of it, from the fifth on."""
    data, rng = Shapes(seed=data_seed), np.random.default_rng(seed)
    parts, references, made, index = [], [], 0, 0
    with tqdm(total=count, desc="captioning", leave=False) as bar:
        while made < count:
            scenes = [data.scene(split, i) for i in range(index, index + batch)]
            index += batch
            inputs = model.prepare(image=[scene.image for scene in scenes])
            words = np.asarray(model.content(inputs)["text"]).sum(-1)
            chosen = np.flatnonzero(words >= FIRST)[: count - made]
            part = {name: np.asarray(value)[chosen] for name, value in inputs.items()}
            part["position"] = rng.integers(FIRST, words[chosen] + 1).astype(np.int32)
            parts.append(part)
            references += [[tokenise(c.text) for c in scenes[i].captions] for i in chosen]
            made += len(chosen)
            bar.update(len(chosen))
            if not len(chosen) and index > 10 * count:
                raise ValueError(
                    f"perturbation: the model's captions have fewer than {FIRST} words; it is not "
                    "trained"
                )
    inputs = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    captions = {name: inputs[name] for name in ("image", "text")}
    whole = jax.device_get(dict(model.pairs(captions, "caption")))
    content = jax.device_get(model.content(inputs))
    # What the word is predicted from stays.
    columns = np.arange(content["text"].shape[1])
    text = content["text"] & (columns < inputs["position"][:, None] - 1)

    def of_word(model: CLIPMapperCaption, words: Array, inputs: Any) -> Array:
        row, position = jnp.arange(len(words)), jnp.asarray(inputs["position"])
        log_probability = jax.nn.log_softmax(model.word_logits(words)[row, position - 1])
        return log_probability[row, jnp.asarray(inputs["text"])[row, position]]

    def of_caption(model: CLIPMapperCaption, words: Array, inputs: Any) -> Array:
        logits, text = model.word_logits(words), jnp.asarray(inputs["text"])
        return model.mean_log_probability(logits, text)

    return [
        Examples(
            whole,
            {"image": content["vision"]},
            "the model's own caption as a whole: the mean of its words' logits",
            "mean log-probability of the model's own caption",
            of_caption,
            references,
        ),
        Examples(
            inputs,
            {"text": text},
            "one word of the model's own caption",
            "log-probability of the model's own word",
            of_word,
        ),
    ]
