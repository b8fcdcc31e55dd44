"""`explain` for models of token streams: relevance of patches and words at the tokens."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.attention.bimodal_relevance import covered_bimodal_relevance
from jaxrel.attention.discovery import sites
from jaxrel.attention.followed import Coverage
from jaxrel.attention.importance import measure
from jaxrel.attention.maps import indices
from jaxrel.attention.methods import TABLE, check_methods
from jaxrel.attention.pooling import Pooling
from jaxrel.attention.unimodal_relevance import covered_relevance
from jaxrel.explanations.examples import Rows, rows_of
from jaxrel.explanations.methods import (
    BY_RULES,
    CONVOLUTIONAL,
    LAST_LAYER,
    Request,
    computed,
    family,
)
from jaxrel.gradients import grad_cam
from jaxrel.propagation.composites import Composite, as_composite
from jaxrel.propagation.conservation import value_and_measured_lrp
from jaxrel.tracing.sharding import compiler_sharded, fetch, shard_rows

NEEDING_SCORES = frozenset(one.name for one in TABLE.values() if "layer scores" in one.needs)


def check(model: Any, request: Request) -> None:
    """Raise ValueError where the model cannot be explained as asked."""
    name = type(model).__name__
    if request.detector is not None:
        raise ValueError(
            "detector judges words of captions by maps in pixels, which models that score words "
            f"have, such as Captioner; {name} does not"
        )
    measure(request.importance)
    needing = NEEDING_SCORES & {*request.methods}
    if needing and not hasattr(model, "layer_scores"):
        raise ValueError(
            f"method {min(needing)!r} scores the tokens of every layer by the model's head, and "
            f"{name} has no layer_scores(inputs); see jaxrel.models.CLIP.layer_scores"
        )
    if request.layers is None and request.heads is None and request.sinks is None:
        return
    asked = "layers and heads choose" if request.sinks is None else "layers, heads and sinks choose"
    if family(model) is CONVOLUTIONAL:
        raise ValueError(f"{asked} attention maps, and {name} reads images by convolutions")
    if _schedule(model):
        raise ValueError(
            f"{asked} attention maps of a model whose streams attend to "
            f"themselves; in {name} they attend to each other, and all maps count"
        )
    if set(request.methods) <= set(BY_RULES):
        raise ValueError(
            f"{asked} attention maps; method "
            f"{', '.join(request.methods)} goes through all of the model"
        )
    if request.sinks is not None:
        _sinks(model, request.sinks)


def relevance(
    model: Any,
    prepared: Mapping[str, Any],
    rows: Mapping[str, Any],
    request: Request,
    *,
    count: int,
    size: int,
) -> Iterator[tuple[Rows, np.ndarray, dict[str, dict[str, Any]]]]:
    """Explain each row, in batches of one size.

    Args:
      model: a model that speaks the protocol `Explainable`.
      prepared: the model's inputs, as `prepare` returns them; the rows hold all of them.
      rows: the same with one row per example to explain, as `pairs` returns them.
      request: the methods and their settings.
      count: how many of the prepared examples are asked for; others fill up.
      size: how many rows go together.

    Yields:
      Rows, the score of each that is asked for, and by method the fields of an `Explanation` that
      depend on it.
    """
    del prepared
    for batch in rows_of(rows, count, size):
        inputs = computed(batch.inputs)
        given = shard_rows((inputs, model.target_tokens(inputs), batch.asked))
        chosen = _chosen(model, inputs, request)
        score, found, reports, covered = fetch(
            _explained(model, *given, chosen, **_options(model, request))
        )
        content = jax.device_get(model.content(inputs))
        found, content = jax.tree.map(lambda x, n=batch.count: x[:n], (found, content))
        fields = _fields(model, batch, found, content, (reports, covered), request)
        yield batch, score[: batch.count], fields


def _fields(
    model: Any, batch: Rows, found: Any, content: Any, told: tuple[Any, Any], request: Request
) -> dict[str, dict[str, Any]]:
    """By method, the fields of an `Explanation`; `told` are reports and counts of layers."""
    reports, covered = told
    streams, where = model.layout.streams, {}
    if "example" in batch.inputs:
        where = {"example": np.asarray(batch.inputs["example"])[: batch.count].tolist()}
    return {
        one: {
            **_modalities(streams, found[one], content),
            "settings": _settings(one, request),
            "report": where
            | {"coverage": _coverage(covered.get(one))}
            | {s.name: _summary(found[one][s.name], content[s.name]) for s in streams}
            | jax.tree.map(np.ndarray.item, reports.get(one, {})),
        }
        for one in request.methods
    }


def map_shapes(model: Any, methods: Sequence[str]) -> set[tuple[int, ...]]:
    """Rows and columns of the image's relevance; empty where the model sees none."""
    del methods
    return {stream.grid for stream in model.layout.streams if stream.grid is not None}


def program(model: Any, prepared: Any, rows: Any, request: Request) -> jax.stages.Lowered:
    """The program that explains such rows, not yet compiled.

    Args:
      model, prepared, request: as of `relevance`.
      rows: inputs with one row per example to explain, or their shapes.
    """
    del prepared
    rows = computed(rows)
    count = jax.tree.leaves(rows)[0].shape[0]
    asked = jax.ShapeDtypeStruct((count,), bool)
    target_tokens = jax.eval_shape(model.target_tokens, rows)
    chosen = _chosen(model, rows, request)
    return _explained.lower(model, rows, target_tokens, asked, chosen, **_options(model, request))


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
    methods = check_methods(method, family(model).methods, "method")
    measure(importance)
    options = _options(model, Request(methods, importance=importance))
    every = np.ones(len(next(iter(inputs.values()))), bool)
    return _explained(model, inputs, model.target_tokens(inputs), every, {}, **options)[1]


def _schedule(model: Any) -> tuple[Any, ...]:
    return getattr(model.layout, "schedule", ())


def _options(model: Any, request: Request) -> dict[str, Any]:
    """A request as the static arguments of the compiled program."""
    known = family(model).by_rules
    by_rules = {one: known[one] for one in request.methods if one in known}
    if "lrp" in by_rules and request.lrp is not None:
        by_rules["lrp"] = as_composite(request.lrp)
    return {
        "methods": tuple(one for one in request.methods if one not in BY_RULES),
        "propagated": tuple(by_rules.items()),
        "streams": tuple(model.layout.streams),
        "schedule": _schedule(model),
        "importance": request.importance,
    }


@functools.partial(
    jax.jit,
    static_argnames=(
        "methods",
        "propagated",
        "streams",
        "schedule",
        "importance",
    ),
)
def _explained(
    model: Any, inputs: Any, target_token: Any, asked: Any, chosen: Any, **options: Any
) -> Any:
    explained = functools.partial(_explained_rows, **options)
    sharded = compiler_sharded(explained, inputs, (0, 0, None, None))
    return sharded(model, inputs, target_token, asked, chosen)


def _explained_rows(
    model: Any,
    inputs: Any,
    target_token: Any,
    asked: Any,
    chosen: Any,
    *,
    methods: tuple[str, ...],
    propagated: tuple[tuple[str, Composite], ...],
    streams: tuple[Any, ...],
    schedule: tuple[Any, ...],
    importance: str,
) -> Any:
    score, relevance, reports, coverage = None, {}, {}, {}
    if methods and schedule:
        (name,) = target_token
        explained = covered_bimodal_relevance(
            _score, schedule, method=methods, target_token=target_token[name], importance=importance
        )
        score, found, coverage = explained(model, inputs)
        names = [stream.name for stream in streams]
        relevance = {one: dict(zip(names, rows, strict=True)) for one, rows in found.items()}
    elif methods:
        explained = covered_relevance(
            _score,
            method=methods,
            target_token=_targets(streams, target_token),
            attention=tuple(stream.name for stream in streams if not _features(stream)),
            layers=chosen.get("layers"),
            heads=chosen.get("heads"),
            sinks=chosen.get("sinks"),
            importance=importance,
            layer_scores=_layer_scores if NEEDING_SCORES & {*methods} else None,
        )
        score, relevance, coverage = explained(model, inputs)
        for stream in filter(_features, streams):
            # Grad-CAM, in pixels: the one method of attention that such a model has.
            maps = grad_cam(_score, stream.features, size=stream.grid)(model, inputs)
            relevance["grad_cam"][stream.name] = maps.reshape(len(maps), -1)
    for name, composite in propagated:
        tags = tuple(f"{stream.name}/tokens" for stream in streams)
        explained = value_and_measured_lrp(_asked_score, composite, argnums=None, at=tags)
        score, found, reports[name] = explained(model, inputs, asked)
        relevance[name] = {stream.name: _by_token(stream, found) for stream in streams}
    counts = {one: (of.followed, of.layers) for one, of in coverage.items()}
    return score, relevance, reports, counts


def _features(stream: Any) -> str:
    """The tag of the feature maps of a stream of pixels; "" where tokens attend."""
    return getattr(stream, "features", "")


def _targets(streams: tuple[Any, ...], target_token: Mapping[str, Any]) -> dict[str, Any]:
    """What each stream's score is read from: a token, or what is pooled of all."""
    pooled = {s.name: Pooling(s.pooling) for s in streams if getattr(s, "pooling", "")}
    return {**target_token, **pooled}


def _coverage(counts: Any) -> dict[str, Any]:
    """What share of the model a method follows: rules of LRP go through every operation."""
    if counts is None:
        return {"of": "operations", "share": 1.0}
    followed, layers = (None if count is None else int(count) for count in counts)
    share = Coverage(followed or 0, layers).share
    return {"of": "layers of attention", "followed": followed, "layers": layers, "share": share}


def _chosen(model: Any, inputs: Any, request: Request) -> dict[str, Any]:
    """Which layers and heads of each stream count, and which tokens are sinks, as bool arrays.

    One program serves all choices.

    Raises:
      ValueError: a layer or head does not exist.
    """
    asked = {"layers": request.layers, "heads": request.heads}
    asked = {what: x for what, x in asked.items() if x is not None}
    chosen: dict[str, Any] = {}
    if request.sinks is not None:
        chosen["sinks"] = _sinks(model, request.sinks)
    if not asked:
        return chosen
    counts = jax.device_get(_counts(model, inputs))
    chosen |= {what: {} for what in asked}
    for what, some in asked.items():
        for stream in model.layout.streams:
            count = int(counts[stream.name][what])
            mask = np.zeros(count, bool)
            mask[list(indices(some, count, what))] = True
            chosen[what][stream.name] = mask
    return chosen


def _sinks(model: Any, sinks: Any) -> dict[str, np.ndarray]:
    """Which tokens of each stream are sinks.

    Raises:
      ValueError: a stream or a token does not exist.
    """
    streams = {stream.name: stream.tokens for stream in model.layout.streams}
    by_stream = sinks if isinstance(sinks, Mapping) else dict.fromkeys(streams, sinks)
    for name in by_stream:
        if name not in streams:
            raise ValueError(f"sinks: there is no stream {name!r}; there are {', '.join(streams)}")
    found = {}
    for name, some in by_stream.items():
        if len(some):
            mask = np.zeros(streams[name], bool)
            mask[list(indices(some, len(mask), f"tokens of {name!r}"))] = True
            found[name] = mask
    return found


@jax.jit
def _counts(model: Any, inputs: Any) -> Any:
    """How many layers and heads the attention of each stream has; traced once for a model."""
    found = {stack.name: stack for stack in sites(_score)(model, inputs)}
    return {
        name: {"layers": stack.layers, "heads": stack.sites[0].shape[1]}
        for name, stack in found.items()
    }


def _score(model: Any, inputs: Any) -> Any:
    return model.score(inputs)


def _layer_scores(model: Any, inputs: Any) -> Any:
    return model.layer_scores(inputs)


def _asked_score(model: Any, inputs: Any, asked: Any) -> Any:
    """The score of the rows that are asked for; what fills up counts in no sum of relevance."""
    return jnp.where(asked, model.score(inputs), 0)


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


def _settings(method: str, request: Request) -> str:
    if method in BY_RULES:
        return "summed over the features of each token"
    chosen = [
        f"all {what}" if some is None else f"{what} {', '.join(map(str, some))}"
        for what, some in (("layers", request.layers), ("heads", request.heads))
    ]
    if method in LAST_LAYER:
        chosen[0] = "last layer" if request.layers is None else f"last of {chosen[0]}"
    if method == "weighted":
        chosen.append(f"importance {request.importance}")
    if request.sinks is not None:
        chosen.append(f"without the sinks {request.sinks}")
    return ", ".join(chosen)


def _summary(relevance: np.ndarray, content: np.ndarray) -> dict[str, Any]:
    kept = np.where(content, relevance, 0).sum(-1)
    return {"tokens": content.sum(-1).tolist(), "relevance of content tokens": kept.tolist()}
