"""`explain`: images and sentences in, an `Explanation` out.

Nothing here knows a particular model. What a model must answer is `Explainable`; a function
that is no such model is explained with `jaxrel.attention.relevance` directly.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from jaxrel.attention.methods import check_methods
from jaxrel.explanations import captions, inputs, tokens
from jaxrel.explanations.examples import (
    Batch,
    batches,
    by_example,
    count_of,
    size_of_batches,
)
from jaxrel.explanations.methods import (
    BIMODAL_METHODS,
    METHODS,
    SIGNED,
    WORD_BY_WORD,
    Detector,
    Request,
    family,
)
from jaxrel.explanations.result import Explanation
from jaxrel.explanations.tokens import token_relevance
from jaxrel.renamed import renamed

__all__ = ["BIMODAL_METHODS", "METHODS", "SIGNED", "Explainable", "explain", "token_relevance"]


class Explainable(Protocol):
    """What `explain` asks of a model.

    For LRP, the model tags each stream's embedded content tokens, `[batch, tokens, width]`, with
    `jaxrel.tag(x, "<stream>/tokens")`.

    A method `familiarity(inputs, text, score)` may be left out. Of rows, the texts as they were
    given ("" where the model wrote them) and the scores, it returns by row what the report tells
    of the example: "familiarity", numbers that say how far the input is from what the model was
    trained on, "unknown words", and "notes", what is to be known, in words.

    The method 'legrad' asks for `layer_scores(inputs)`, see `attention.relevance`, and 'grad_eclip'
    for the tags "<stream>/query", "/key", "/value" and "/mixed", [batch, tokens, heads, features].
    """

    @property
    def layout(self) -> Any:
        """The `streams` of tokens: name, modality, tokens, grid and prefix of each.

        A `schedule` that is not empty says how two streams attend to each other; the score is
        read from the first of them: see `attention.value_and_bimodal_relevance`. `by_word`
        says that captions are explained word by word in the image's pixels; the model then
        speaks the protocol `jaxrel.explanations.words.Captions` too. Either may be left out. So
        may a stream's `pooling`: the tag of the map of an attention that pools its tokens, where
        the score is read from no token; see `jaxrel.attention.pooling`.
        """

    def examples(self, *, image: Any, text: Any, target: Any) -> Mapping[str, Any]:
        """Images, texts and targets as lists with an entry per example, or one thing for all.

        It may be left out; image i then goes with text i, and one of either with all others.
        """

    def prepare(self, *, image: Any, text: Any) -> Mapping[str, Any]:
        """Images and sentences as the model's inputs."""

    def pairs(self, inputs: Mapping[str, Any], target: Any = None) -> Mapping[str, Any]:
        """Inputs with one row per example to explain.

        Where rows are not images one to one, "example" says which image each belongs to. An
        entry "spelling" is for `tokens` alone: nothing is computed from it.
        """

    def contrasted(self, inputs: Mapping[str, Any], against: Any) -> Mapping[str, Any]:
        """Rows whose score is the target's less that of others; it may be left out.

        `against` is one thing for all rows, or a list with one for each.
        """

    def score(self, inputs: Mapping[str, Any]) -> Any:
        """The scalar to explain, one per row."""

    def describe(self, inputs: Mapping[str, Any]) -> Sequence[str]:
        """By row, what is explained, in words."""

    def target_tokens(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """By stream, the token each row's score is read from; not of streams that are pooled."""

    def content(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """By stream, which tokens stand for something."""

    def tokens(self, inputs: Mapping[str, Any]) -> Sequence[Sequence[str]]:
        """By row, how to display the text's tokens."""

    def seen(self, image: Image.Image) -> Image.Image:
        """The part of an image that the model sees."""


def explain(
    model: Any,
    image: Any = None,
    *,
    text: Any = None,
    target: Any = None,
    method: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    sinks: Any = None,
    against: Any = None,
    importance: str = "grad_value",
    lrp: Any = None,
    name: str = "",
    detector: Detector | None = None,
    batch_size: int | None = None,
) -> Any:
    """Explain how much each patch of an image and each word of a sentence matters to a score.

    For CLIP and SigLIP the score is the similarity of the image and the sentence, for DINO a
    feature of the class token. For CLIPMapper it is the
    logit of an answer to a question, or of each word of a caption, as for Captioner. Everything
    is one compiled program: one forward and one backward pass for all examples and all methods
    that need no LRP. A Captioner is explained in pixels, with one forward pass per caption and
    one backward pass per word: see `jaxrel.explanations.words`.

    Inside `jax.set_mesh` the rows (pairs, questions, words; of a Captioner captions) are shared
    among the devices of the mesh's first axis if their number is a multiple of its size, else
    computed whole. The result is the same.

    Args:
      model: a model that speaks the protocol `Explainable`, such as `jaxrel.models.CLIP`; its
        `layout` says which methods there are.
      image: a PIL image, a uint8 `[height, width, 3]` array, or a list of them.
      text: a sentence, question or caption, or a list of them; see `model.pairs` for how
        images and texts are matched. None where the model writes the text (captions).
      target: what to explain of these, in the model's terms: by default the matching pairs, the
        most probable answer, all words of the caption.
      method: one of `jaxrel.explanations.explain.METHODS`, or several: those of
        `jaxrel.attention`, and 'lrp' (AttnLRP), 'cp_lrp' and 'input_x_gradient', which propagate
        to the embedded tokens. Models whose streams attend to each other have `BIMODAL_METHODS`,
        Captioners `jaxrel.explanations.words.WORD_METHODS`. By default 'weighted',
        of a Captioner 'lrp', of convolutions 'grad_cam'.
      layers: the layers that count, such as `[-1]` for the last alone; all, by default. Models
        whose streams attend to each other and Captioners have no such choice.
      heads: the attention heads that count; as `layers`, but a Captioner with several heads has
        the choice: of those through which relevance reaches the image.
      sinks: tokens whose columns are left out of the attention maps, as in `attention.relevance`:
        indices for all streams, or a mapping such as `{"text": [0]}`. Models have it that have a
        choice of layers.
      against: what the target is contrasted with, in the model's terms: another text, answer or
        word, or "*" for all others there are; a list has one for each example. A tuple names
        several. The score is then the target's less theirs: see `jaxrel.contrast`. Figure and page
        say so beside the target. CLIP and CLIPmapper have it.
      importance: the measure of the weighted method.
      lrp: other rules for the method 'lrp': see `jaxrel.lrp`.
      name: the model's name, for the record.
      detector: flags words of a Captioner that are likely hallucinated, by their maps, such as
        `jaxrel.metrics.Detector`. It judges only maps of all heads and of the usual rules.
      batch_size: how many examples are explained together (of captions also how many words). Memory
        depends on it and not on the number of examples. The last batch is filled up to this
        size, so that nothing is compiled for another number. By default 32, and for fewer
        examples the next power of two.

    Returns:
      An `Explanation` of the batch, or a list of them, one per method if several were given.

    Raises:
      TypeError: the model is no `Explainable`; the message says how it is explained instead.
      TypeError, ValueError: bad images, text, target, method, layers or measure; the message
        says what was expected. Relevance that is not finite (a model with NaN weights).
    """
    _check_explainable(model)
    kind = family(model)
    method = kind.usual if method is None else method
    methods = check_methods(method, kind.methods, kind.what)
    request = Request(methods, layers, heads, importance, lrp, detector, sinks)
    way(model).check(model, request)
    _check_against(model, against)
    examples = by_example(model, image, text, target)
    count = count_of(examples)
    examples = {**examples, "against": _one_each(against, count)}
    size = size_of_batches(count, batch_size)
    # Nobody waits for a bar of one batch.
    progress = tqdm(total=count, unit="example", delay=1, disable=count <= size)
    parts = []
    with progress:
        for batch in batches(examples, size):
            prepared = model.prepare(image=batch.image, text=batch.text)
            parts.append(explain_prepared(model, prepared, batch, request, name=name))
            progress.update(batch.count)
    explanations = [Explanation.concatenate(part) for part in zip(*parts, strict=True)]
    return explanations[0] if isinstance(method, str) else explanations


def way(model: Any) -> Any:
    """The module that explains a model: `captions` for one that explains word by word."""
    return captions if family(model) is WORD_BY_WORD else tokens


def explain_prepared(
    model: Any, prepared: Mapping[str, Any], batch: Batch, request: Request, *, name: str = ""
) -> list[Explanation]:
    """Explain a batch of examples.

    Args:
      model: as in `explain`.
      prepared: what `model.prepare` made of the batch.
      batch: the examples.
      request: what is asked, which `way(model).check` has checked.
      name: the model's name, for the record.

    Returns:
      An explanation of the examples that are asked for, by method.
    """
    rows = model.pairs(prepared, batch.target)
    if batch.against is not None:
        rows = model.contrasted(rows, _by_row(batch.against, rows))
    images = batch.image if isinstance(batch.image, list) else [batch.image]
    pixels = [np.asarray(model.seen(image)) for image in images[: batch.count]]
    size = len(images)
    kind = family(model)
    parts = []
    for some, score, found in way(model).relevance(
        model, prepared, rows, request, count=batch.count, size=size
    ):
        shown = [
            tuple(lines)[: some.count]
            for lines in (model.describe(some.inputs), model.tokens(some.inputs))
        ]
        of_row = some.inputs.get("example", np.arange(len(images)))
        seen = tuple(pixels[i] for i in np.asarray(of_row)[: some.count])
        about = inputs.examples(model, batch, some, seen=seen, score=score)
        parts.append(
            [
                Explanation(
                    target=shown[0],
                    score=score,
                    tokens=shown[1],
                    pixels=seen,
                    model=name,
                    method=one,
                    signed=one in kind.signed,
                    **_numbered(found[one], batch.start, about, batch.against),
                )
                for one in request.methods
            ]
        )
    return [Explanation.concatenate(part) for part in zip(*parts, strict=True)]


def _numbered(
    fields: Mapping[str, Any], start: int, about: Sequence[Mapping[str, Any]], against: Any
) -> dict[str, Any]:
    """Fields of a batch whose first example has this number, with what is told of its rows."""
    if against is not None:
        whom = "another for each example" if isinstance(against, list) else against
        fields = {**fields, "settings": f"{fields['settings']}, against {whom}"}
    report = {**fields["report"], "examples": list(about)}
    if "example" in report:
        report["example"] = [start + i for i in report["example"]]
    return {**fields, "report": report}


def _check_against(model: Any, against: Any) -> None:
    if against is not None and not hasattr(model, "contrasted"):
        raise ValueError(
            f"against= contrasts the score with others, and {type(model).__name__} has no "
            "contrasted(rows, against); explain a function of your own: "
            "jaxrel.contrastive(fun, target, against)"
        )


def _one_each(against: Any, count: int) -> Any:
    if isinstance(against, list) and len(against) != count:
        raise ValueError(
            f"against: a list has one for each of the {count} examples, got {len(against)}; a "
            "tuple names several to contrast each with"
        )
    return against


def _by_row(against: Any, rows: Mapping[str, Any]) -> Any:
    """What each row is contrasted with; one thing for all as it is."""
    if not isinstance(against, list) or "example" not in rows:
        return against
    return [against[i] for i in np.asarray(rows["example"])]


def _check_explainable(model: Any) -> None:
    left_out = ("examples", "contrasted")
    needed = [name for name in vars(Explainable) if name[0] != "_" and name not in left_out]
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"jaxrel.explain reads a model's own images and words, and {_called(model)} has no "
            f"{', '.join(missing)} (see jaxrel.explanations.explain.Explainable). To explain a "
            "model of your own: jaxrel.attention.relevance(score)(x) gives the relevance of a "
            "transformer's tokens, jaxrel.lrp(model)(x) that of any function's input, and "
            "jaxrel.Explanation(target=, score=, method=, signed=, image=, pixels=) shows and "
            "saves such maps"
        )


def _called(model: Any) -> str:
    name = None if isinstance(model, type) else getattr(model, "__name__", None)
    return f"the function {name}" if isinstance(name, str) else f"the {type(model).__name__} given"


__getattr__ = renamed(__name__, {"TWO_STREAM": "jaxrel.explanations.explain.BIMODAL_METHODS"})
