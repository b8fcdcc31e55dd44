"""`explain`: images and sentences in, an `Explanation` out.

Nothing here knows a particular model. What a model must answer is `Explainable`; a function
that is no such model is explained with `jaxrel.attention.relevance` directly.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax import numpy as jnp
from PIL import Image

from jaxrel import attention
from jaxrel.attention.bimodal_relevance import value_and_bimodal_relevance
from jaxrel.attention.importance import measure
from jaxrel.attention.methods import BIMODAL_METHODS, check_methods
from jaxrel.attention.unimodal_relevance import value_and_relevance
from jaxrel.explanations.captions import explain_captions
from jaxrel.explanations.result import Explanation
from jaxrel.images import seen_images
from jaxrel.metrics.detector import Detector
from jaxrel.propagation import composites, rules
from jaxrel.propagation.composites import Composite, as_composite, everything
from jaxrel.propagation.conservation import value_and_measured_lrp
from jaxrel.tracing.sharding import compiler_sharded, shard_rows

# What is propagated to the embedded tokens, and there summed over features.
BY_RULES = {
    "lrp": composites.attn_lrp(),
    "cp_lrp": composites.cp_lrp(),
    "input_x_gradient": Composite([(everything(), rules.Gradient())]),
}
METHODS = (*attention.METHODS, *BY_RULES)
# Of models whose streams attend to each other.
TWO_STREAM = (*BIMODAL_METHODS, *BY_RULES)
# These look at the last layer alone.
_LAST = frozenset({"raw", "grad_cam", "partial_lrp"})
SIGNED = frozenset({"partial_lrp", *BY_RULES})


class Explainable(Protocol):
    """What `explain` asks of a model.

    For LRP, the model tags each stream's embedded content tokens, `[batch, tokens, width]`, with
    `jaxrel.tag(x, "<stream>/tokens")`.
    """

    @property
    def layout(self) -> Any:
        """The streams of tokens: name, modality, tokens, grid and prefix of each.

        A `schedule` that is not empty says how two streams attend to each other, the first of
        them read out: see `attention.value_and_bimodal_relevance`.
        """

    def prepare(self, *, image: Any, text: Any) -> Mapping[str, Any]:
        """Images and sentences as the model's inputs."""

    def pairs(self, inputs: Mapping[str, Any], target: Any = None) -> Mapping[str, Any]:
        """Inputs with one row per example to explain.

        Where rows are not images one to one, "example" says which image each belongs to.
        """

    def score(self, inputs: Mapping[str, Any]) -> Any:
        """The scalar to explain, one per row."""

    def describe(self, inputs: Mapping[str, Any]) -> Sequence[str]:
        """By row, what is explained, in words."""

    def target_tokens(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """By stream, the token each row's score is read from."""

    def content(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """By stream, which tokens stand for something."""

    def tokens(self, inputs: Mapping[str, Any]) -> Sequence[Sequence[str]]:
        """By row, how to display the text's tokens."""

    def seen(self, image: Image.Image) -> Image.Image:
        """The part of an image that the model sees."""


def explain(
    model: Any,
    *,
    image: Any,
    text: Any = None,
    target: Any = None,
    method: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    importance: str = "grad_value",
    lrp: Any = None,
    name: str = "",
    detector: Detector | None = None,
) -> Any:
    """Explain how much each patch of an image and each word of a sentence matters to a score.

    For CLIP the score is the similarity of the image and the sentence, for CLIPMapper the
    logit of an answer to a question, or of each word of a caption, as for Captioner. Everything
    is one compiled program: one forward and one backward pass for all examples and all methods
    that need no LRP. For Captioner see `jaxrel.explanations.words`: its maps are of pixels, and the
    backward pass, not the forward pass, is one per word.

    Inside `jax.set_mesh` the rows (pairs, questions, words; of a Captioner captions) are shared
    among the devices of the mesh's first axis if their number is a multiple of its size, else
    computed whole. The result is the same.

    Args:
      model: a model that speaks the protocol `Explainable`, such as `jaxrel.models.CLIP`, and
        where it also speaks `jaxrel.explanations.words.Captions`, is explained by that.
      image: a PIL image, a uint8 `[height, width, 3]` array, or a list of them.
      text: a sentence, question or caption, or a list of them; see `model.pairs` for how
        images and texts are matched. None where the model writes the text (captions).
      target: what to explain of these, in the model's terms: by default the matching pairs, the
        most probable answer, all words of the caption.
      method: one of `jaxrel.explanations.explain.METHODS` (of a model whose streams attend to
        each other, `TWO_STREAM`), or several: those of `jaxrel.attention`, and 'lrp' (AttnLRP),
        'cp_lrp' and 'input_x_gradient', which propagate to the embedded tokens; of a Captioner,
        those of `jaxrel.explanations.words.WORD_METHODS`. By default 'weighted', of a
        Captioner 'lrp'.
      layers: the layers that count, such as `[-1]` for the last alone; all, by default. Not of
        models whose streams attend to each other, nor of a Captioner.
      heads: the attention heads that count; as `layers`. Of a Captioner with several heads,
        those through which relevance reaches the image.
      importance: the measure of the weighted method.
      lrp: other rules for the method 'lrp': see `jaxrel.lrp`.
      name: the model's name, for the record.
      detector: of a Captioner, what tells words that are likely hallucinated by their maps: see
        `jaxrel.metrics.detector`. It judges with all heads and the usual rules alone.

    Returns:
      An `Explanation` of the batch, or a list of them, one per method if several were given.

    Raises:
      TypeError, ValueError: bad images, text, target, method, layers or measure; the message
        says what was expected. Relevance that is not finite (a model with NaN weights).
    """
    if hasattr(model, "word_scores"):
        return explain_captions(
            model,
            image=image,
            text=text,
            target=target,
            method="lrp" if method is None else method,
            layers=layers,
            heads=heads,
            lrp=lrp,
            name=name,
            detector=detector,
        )
    if detector is not None:
        raise ValueError(
            "detector judges words of captions by maps in pixels, which models that score words "
            f"have, such as Captioner; {type(model).__name__} does not"
        )
    method = "weighted" if method is None else method
    layout = model.layout
    schedule = getattr(layout, "schedule", ())
    methods = check_methods(method, TWO_STREAM if schedule else METHODS, "method")
    measure(importance)
    propagated = {one: BY_RULES[one] for one in methods if one in BY_RULES}
    if lrp is not None:
        propagated = {
            one: as_composite(lrp) if one == "lrp" else c for one, c in propagated.items()
        }
    if schedule and (layers is not None or heads is not None):
        raise ValueError(
            "layers and heads choose attention maps of a model whose streams attend to "
            f"themselves; in {type(model).__name__} they attend to each other, and all maps count"
        )
    if set(methods) <= set(BY_RULES) and (layers is not None or heads is not None):
        raise ValueError(
            "layers and heads choose attention maps; method "
            f"{', '.join(methods)} goes through all of the model"
        )
    inputs = model.pairs(model.prepare(image=image, text=text), target)
    streams = {stream.name: stream for stream in layout.streams}
    score, relevance, reports = _explained(
        model,
        *shard_rows((inputs, model.target_tokens(inputs))),
        methods=tuple(one for one in methods if one not in BY_RULES),
        propagated=tuple(propagated.items()),
        streams=tuple(streams.values()),
        schedule=schedule,
        layers=None if layers is None else tuple(layers),
        heads=None if heads is None else tuple(heads),
        importance=importance,
    )
    score, relevance, reports = jax.device_get((score, relevance, reports))
    content = jax.device_get(model.content(inputs))
    shared: dict[str, Any] = {
        "target": tuple(model.describe(inputs)),
        "score": score,
        "tokens": tuple(map(tuple, model.tokens(inputs))),
        "pixels": seen_images(model, image, len(score), inputs.get("example")),
        "model": name,
    }
    where = {"example": np.asarray(inputs["example"]).tolist()} if "example" in inputs else {}
    explanations = [
        Explanation(
            **shared,
            **_modalities(streams.values(), relevance[one], content),
            method=one,
            signed=one in SIGNED,
            settings=_settings(one, layers, heads, importance),
            report=where
            | {stream: _summary(relevance[one][stream], content[stream]) for stream in streams}
            | jax.tree.map(np.ndarray.item, reports.get(one, {})),
        )
        for one in methods
    ]
    return explanations[0] if isinstance(method, str) else explanations


def token_relevance(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    method: Sequence[str],
    importance: str = "grad_value",
) -> dict[str, dict[str, Any]]:
    """What `explain` computes, for inputs that are prepared already: arrays in, arrays out.

    Args:
      model: as in `explain`.
      inputs: as `model.pairs` returns them.
      method: the methods.
      importance: the measure of the weighted method.

    Returns:
      {method: {stream: relevance [rows, tokens]}}, special tokens and padding included; sharded
      as the inputs' rows are.

    Raises:
      ValueError: unknown method or measure.
    """
    layout = model.layout
    schedule = getattr(layout, "schedule", ())
    methods = check_methods(method, TWO_STREAM if schedule else METHODS, "method")
    measure(importance)
    _, relevance, _ = _explained(
        model,
        inputs,
        model.target_tokens(inputs),
        methods=tuple(one for one in methods if one not in BY_RULES),
        propagated=tuple((one, BY_RULES[one]) for one in methods if one in BY_RULES),
        streams=tuple(layout.streams),
        schedule=schedule,
        layers=None,
        heads=None,
        importance=importance,
    )
    return relevance


@functools.partial(
    jax.jit,
    static_argnames=(
        "methods",
        "propagated",
        "streams",
        "schedule",
        "layers",
        "heads",
        "importance",
    ),
)
def _explained(model: Any, inputs: Any, target_token: Any, **options: Any) -> Any:
    explained = functools.partial(_explained_rows, **options)
    return compiler_sharded(explained, inputs, (0, 0, None))(model, inputs, target_token)


def _explained_rows(
    model: Any,
    inputs: Any,
    target_token: Any,
    *,
    methods: tuple[str, ...],
    propagated: tuple[tuple[str, Composite], ...],
    streams: tuple[Any, ...],
    schedule: tuple[Any, ...],
    layers: tuple[int, ...] | None,
    heads: tuple[int, ...] | None,
    importance: str,
) -> Any:
    score, relevance, reports = None, {}, {}
    if methods and schedule:
        (name,) = target_token
        explained = value_and_bimodal_relevance(
            _score, schedule, method=methods, target_token=target_token[name], importance=importance
        )
        score, found = explained(model, inputs)
        names = [stream.name for stream in streams]
        relevance = {one: dict(zip(names, rows, strict=True)) for one, rows in found.items()}
    elif methods:
        explained = value_and_relevance(
            _score,
            method=methods,
            target_token=target_token,
            attention=tuple(stream.name for stream in streams),
            layers=layers,
            heads=heads,
            importance=importance,
        )
        score, relevance = explained(model, inputs)
    for name, composite in propagated:
        tags = tuple(f"{stream.name}/tokens" for stream in streams)
        explained = value_and_measured_lrp(_score, composite, argnums=None, at=tags)
        score, found, reports[name] = explained(model, inputs)
        relevance[name] = {stream.name: _by_token(stream, found) for stream in streams}
    return score, relevance, reports


def _score(model: Any, inputs: Any) -> Any:
    return model.score(inputs)


def _by_token(stream: Any, found: Mapping[str, Any]) -> Any:
    """Relevance of each token of a stream; those before the tagged content have none."""
    relevance = found[f"{stream.name}/tokens"].sum(-1)
    return jnp.pad(relevance, ((0, 0), (stream.tokens - relevance.shape[1], 0)))


def _modalities(streams: Any, relevance: Mapping, content: Mapping) -> dict[str, Any]:
    """Relevance of the content tokens: an image's as a grid, a text's with zeros elsewhere."""
    maps = {}
    for stream in streams:
        kept = np.where(content[stream.name], relevance[stream.name], 0)
        if stream.grid is not None:
            kept = kept[:, stream.prefix :].reshape(-1, *stream.grid)
        maps[stream.modality] = kept
    return maps


def _settings(
    method: str, layers: Sequence[int] | None, heads: Sequence[int] | None, importance: str
) -> str:
    if method in BY_RULES:
        return "summed over the features of each token"
    chosen = [
        f"all {what}" if some is None else f"{what} {', '.join(map(str, some))}"
        for what, some in (("layers", layers), ("heads", heads))
    ]
    if method in _LAST:
        chosen[0] = "last layer" if layers is None else f"last of {chosen[0]}"
    return ", ".join([*chosen, f"importance {importance}"] if method == "weighted" else chosen)


def _summary(relevance: np.ndarray, content: np.ndarray) -> dict[str, Any]:
    kept = np.where(content, relevance, 0).sum(-1)
    return {"tokens": content.sum(-1).tolist(), "relevance of content tokens": kept.tolist()}
