"""What the weights of weighted accumulation do, and where (`weighting/1`).

On CLIPmapper and Shapes: how far the weights are from 1, how the maps differ from those of equal
accumulation, and what the perturbation test says of variants that weigh in one place only, by
layers or by tokens only, elsewhere in the equations, or at random.

This study is finished: its result is in train/results (`weighting-*.json`), and the code goes when
the rule of weighting is decided.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxrel.attention import (
    Layers,
    bimodal_accumulation,
    head_mean,
    layer_weights,
    measure,
    row,
    value_and_layers,
    weights,
)
from jaxrel.metrics import perturbation
from jaxrel.metrics.intervals import bootstrap
from jaxrel.metrics.randomisation import rank_correlation
from jaxrel.models.clipmapper import CLIPMapper
from jaxrel.train.evaluate.batching import equal_batches
from jaxrel.train.evaluate.mapper_examples import (
    STREAMS,
    Examples,
    check_sizes,
    draw_examples,
    once_each,
)
from jaxrel.train.evaluate.perturbation import sweep_program
from jaxrel.train.evaluate.perturbation import tables as perturbation_tables
from jaxrel.train.evaluate.record import save as save_result
from jaxrel.train.evaluate.tables import Table, by_row, check_protocol, markdown

PROTOCOL = "weighting/1"
IMPORTANCE = "grad_value"

# The attention layers of CLIPmapper by what they do, as `CLIPMapper` tags them.
VISION, TEXT = ("vision",), ("text",)
OWN = ("image_single", "text_single", "image_self", "text_self")
CROSS = ("text_to_image", "image_to_text")

# What is told of the weights of each kind of layer.
FACTS = {
    "beta": "mean of beta",
    "layers": "its spread between layers",
    "tokens": "its spread between tokens",
    "moved": "row sums of Ā",
    "agreement": "rank correlation of u(o) and row sums of Ā",
}
# What is told of the target token where its stream attends to itself, layer by layer.
AT_TARGET = {"beta": "beta", "direct": "what this layer alone moves, over equal's"}
# What is told of each variant's maps.
LIKENESS = {
    "correlation": "rank correlation with equal's",
    "top": "share of equal's top quarter in the variant's",
}
# There is no top quarter of three tokens, and no share of nothing moved.
SOMETIMES = {"top", "direct"}


class Weighed(NamedTuple):
    """The attention layers of one kind with the weights of their query tokens.

    `attn` and `grad` are `[layers, batch, heads, query, key]`; `alpha` and `beta`, whose sum is
    2, `[layers, batch, query]`, float; `counted`, bool of that shape, is False for tokens that
    what is explained does not depend on, such as padding.
    """

    attn: Array
    grad: Array
    alpha: Array
    beta: Array
    counted: Array


Change = Callable[[str, Weighed, PRNGKeyArray], Weighed]


def equal(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """Weights of 1."""
    ones = jnp.ones_like(layers.beta)
    return layers._replace(alpha=ones, beta=ones)


def weighted(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """Weights as they are."""
    return layers


def only(*tags: str) -> Change:
    """Weights in some kinds of layers, 1 in the others."""
    return lambda tag, layers, key: (weighted if tag in tags else equal)(tag, layers, key)


def without(*tags: str) -> Change:
    """Weights of 1 in some kinds of layers."""
    return lambda tag, layers, key: (equal if tag in tags else weighted)(tag, layers, key)


def layer_means(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """Each layer's mean over its tokens: the balance of layers remains."""
    alpha, beta = (_token_mean(w, layers.counted) for w in (layers.alpha, layers.beta))
    return layers._replace(alpha=alpha, beta=beta)


def over_layer_means(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """Both weights over their layer's token mean, scaled to the sum 2: tokens' balance remains."""
    means = (_token_mean(w, layers.counted) for w in (layers.alpha, layers.beta))
    shares = [
        w / jnp.where(mean == 0, 1, mean)
        for w, mean in zip((layers.alpha, layers.beta), means, strict=True)
    ]
    alpha, beta = weights(*shares)
    return layers._replace(alpha=alpha, beta=beta)


def inside(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """Cross-attention with `diag(beta) Ā` in the place of `Ā`, so before eq. 10 mixes its rows.

    Eq. 10 adds `R_ss^T Ā R_qq` (normalised), whose rows are no longer the query tokens of `Ā`.
    What is carried over keeps the weight 1 there. Self-attention is weighted as ever.
    """
    return moved(tag, layers, key) if tag in CROSS else layers


def moved(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """`R + diag(beta) Ā R`: what is carried over keeps the weight 1 in all layers."""
    return equal(tag, layers._replace(attn=layers.attn * layers.beta[:, :, None, :, None]), key)


def key_values(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """`R + Ā diag(gamma) R`: the values that attention mixes are weighed, not the branches.

    With `c_j = sum over i of Ā_ij`, the positive part, by head and query, of the product of value
    j and the gradient by it, `gamma = c sum(c) / sum(c²)`: all that is moved stays as much.
    """
    c = head_mean(layers.attn, layers.grad).sum(-2)
    squares = jnp.square(c).sum(-1, keepdims=True)
    gamma = jnp.where(squares == 0, 1, c * c.sum(-1, keepdims=True) / _nonzero(squares))
    attn = layers.attn * gamma[:, :, None, None, :]
    return equal(tag, layers._replace(attn=attn), key)


def exchanged(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """Alpha for beta and beta for alpha."""
    return layers._replace(alpha=layers.beta, beta=layers.alpha)


def shuffled(tag: str, layers: Weighed, key: PRNGKeyArray) -> Weighed:
    """The weights of each kind of layer in random order over its layers and counted tokens."""

    def shuffle(beta, counted, noise):
        # The k-th counted place gets the weight of the k-th counted place of a random order.
        places = jnp.argsort(~counted, stable=True)
        drawn = jnp.argsort(jnp.where(counted, noise, jnp.inf))
        return jnp.where(counted, beta.at[places].set(beta[drawn]), beta)

    flat = [jnp.moveaxis(x, 1, 0) for x in (layers.beta, layers.counted)]
    shape = flat[0].shape
    beta, counted = (x.reshape(len(x), -1) for x in flat)
    found = jax.vmap(shuffle)(beta, counted, jax.random.uniform(key, beta.shape))
    beta = jnp.moveaxis(found.reshape(shape), 0, 1)
    return layers._replace(alpha=2 - beta, beta=beta)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to weigh.

    Attributes:
      change: `(tag, layers, key) -> layers`.
      normalise: whether eq. 10 normalises the streams' own relevance (eq. 8 and 9).
    """

    change: Change
    normalise: bool = True


BASELINE = "equal"
VARIANTS = {
    BASELINE: Variant(equal),
    "weighted": Variant(weighted),
    "only stage 1, image": Variant(only(*VISION)),
    "only stage 1, text": Variant(only(*TEXT)),
    "only mapper, self-attention": Variant(only(*OWN)),
    "only mapper, cross-attention": Variant(only(*CROSS)),
    "not stage 1, text": Variant(without(*TEXT)),
    "mean over tokens": Variant(layer_means),
    "over the mean over tokens": Variant(over_layer_means),
    "inside eq. 10": Variant(inside),
    "only what is moved": Variant(moved),
    "key values": Variant(key_values),
    "exchanged": Variant(exchanged),
    "shuffled": Variant(shuffled),
    "equal, not normalised": Variant(equal, normalise=False),
    "weighted, not normalised": Variant(weighted, normalise=False),
}


def evaluate(
    model: CLIPMapper,
    *,
    modality: Sequence[str] = ("image", "text"),
    variants: Sequence[str] = tuple(VARIANTS),
    data_seed: int = 0,
    split: str = "val",
    examples: int = 512,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Take the weights of weighted accumulation apart; see `perturbation.evaluate`.

    It explains, removes and measures the same, but regenerates no caption.

    Args:
      model: either CLIPmapper.
      modality: "image", "text" or both: of which tokens are removed.
      variants: of `VARIANTS`; equal accumulation is always among them.
      data_seed: of the Shapes data set.
      split: of the data set.
      examples: how many.
      batch: examples at a time.
      seed: of the choice of questions or words, and of "shuffled".

    Returns:
      By modality: "weights", {tag: {of `FACTS`: interval}}; "target_token", {tag and number of the
      layer: {of `AT_TARGET`: interval}}; "maps", {variant: {of `LIKENESS`: interval}};
      "perturbation", as `jaxrel.metrics.perturbation.summary`; and the settings.

    Raises:
      ValueError: an unknown variant or modality, or a number out of range.
    """
    variants = once_each("weighting", "variant", (BASELINE, *variants), VARIANTS)
    modality = once_each("weighting", "modality", modality, STREAMS)
    check_sizes("weighting", examples, batch)
    batch = min(batch, examples)
    sets = draw_examples(
        model, data_seed=data_seed, split=split, count=examples, seed=seed, batch=batch
    )
    settings = {
        "protocol": PROTOCOL,
        "task": model.task,
        "data": "Shapes",
        "split": split,
        "data_seed": data_seed,
        "seed": seed,
        "examples": examples,
        "importance": IMPORTANCE,
        "versions": {"jaxrel": version("jaxrel"), "jax": jax.__version__},
    }
    return {
        one: settings
        | {"modality": one, "explained": drawn.explained}
        | _compare(model, drawn, one, variants, batch=batch, seed=seed)
        for one in modality
        for drawn in sets
        if one in drawn.removable
    }


def relevance_by_variant(
    model: Any, inputs: Mapping[str, Any], variants: Sequence[str], key: PRNGKeyArray
) -> tuple[dict[str, dict[str, Array]], dict[str, dict[str, dict[str, Array]]]]:
    """Relevance by variant, and the facts of the weights, from one forward and backward pass.

    Args:
      model: either CLIPmapper.
      inputs: as `model.pairs` returns them.
      variants: of `VARIANTS`.
      key: of "shuffled".

    Returns:
      {variant: {stream: float [rows, tokens]}}, and {"weights": {tag: {of `FACTS`: float
      [rows]}}, "target_token": {tag: {of `AT_TARGET`: float [layers, rows]}}}.
    """
    (target_token,) = model.target_tokens(inputs).values()
    schedule = model.layout.schedule
    return _explained(model, inputs, target_token, key, variants=tuple(variants), schedule=schedule)


@functools.partial(jax.jit, static_argnames=("variants", "schedule"))
def _explained(model, inputs, target_token, key, *, variants, schedule):
    _, captured = value_and_layers(_score, schedule)(model, inputs)
    layers = {tag: _weigh(one) for tag, one in captured.items()}
    facts = {
        "weights": {tag: _facts(one, captured[tag]) for tag, one in layers.items()},
        "target_token": _at_target(layers, schedule, target_token),
    }
    keys = {tag: jax.random.fold_in(key, i) for i, tag in enumerate(layers)}

    def accumulated(weighed, normalise):
        # The gradients are the same for all.
        given = {tag: _given(layers[tag].grad, *one) for tag, one in weighed.items()}
        blocks = [
            [{pair: given[tag] for pair, tag in stage} for stage in block] for block in schedule
        ]
        maps = bimodal_accumulation(
            blocks, importance=_first_value, normalise=normalise, residual=False
        )
        # s is the text, q the image.
        return {"text": row(maps.ss, target_token), "vision": row(maps.sq, target_token)}

    relevance: dict[str, dict[str, Array]] = {}
    for normalise in (True, False):
        names = [name for name in variants if VARIANTS[name].normalise is normalise]
        changed = [
            {tag: VARIANTS[name].change(tag, one, keys[tag]) for tag, one in layers.items()}
            for name in names
        ]
        weighed = [
            {tag: (one.attn, one.alpha, one.beta) for tag, one in by_tag.items()}
            for by_tag in changed
        ]
        if names:
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *weighed)
            found = jax.lax.map(functools.partial(accumulated, normalise=normalise), stacked)
            relevance |= {
                name: jax.tree.map(lambda x: x[i], found)  # noqa: B023
                for i, name in enumerate(names)
            }
    return relevance, facts


def _score(model: CLIPMapper, inputs: Any) -> Array:
    return model.score(inputs)


def _weigh(layers: Layers) -> Weighed:
    alpha, beta = layer_weights(layers.before, layers.after, layers.value_grad, IMPORTANCE)
    counted = (layers.value_grad != 0).any(-1)
    return Weighed(layers.attn, layers.grad, alpha, beta, counted)


def _first_value(value: Array, grad: Array) -> Array:
    return value[..., 0]


def _given(grad: Array, attn: Array, alpha: Array, beta: Array) -> Layers:
    """As `bimodal_accumulation` takes them: importances that sum to 2 are their own weights."""
    return Layers(attn, grad, alpha[..., None], beta[..., None], jnp.ones_like(beta)[..., None])


def _facts(layers: Weighed, values: Layers) -> dict[str, Array]:
    """By name in `FACTS`, [batch]; spreads are standard deviations."""
    mean = _token_mean(layers.beta, layers.counted)
    of_tokens = _token_mean(jnp.square(layers.beta - mean), layers.counted, nothing=0.0)[..., 0]
    moved = head_mean(layers.attn, layers.grad).sum(-1)
    importance = measure(IMPORTANCE)(values.after, values.value_grad)
    by_example = [
        jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in (importance, moved, layers.counted)
    ]
    return {
        "beta": mean[..., 0].mean(0),
        "layers": mean[..., 0].std(0),
        "tokens": jnp.sqrt(of_tokens.mean(0)),
        "moved": by_example[1].mean(-1, where=by_example[2]),
        "agreement": rank_correlation(*by_example[:2], valid=by_example[2]),
    }


def _at_target(
    layers: Mapping[str, Weighed], schedule: Any, target_token: Array
) -> dict[str, dict[str, Array]]:
    """By tag and name in `AT_TARGET`, [layers, batch], for layers in which s attends to itself.

    What a layer alone moves from token j to the target token i counts alpha_j of each layer
    before it, its beta_i, and alpha_i of each layer after it. Where little is moved, that is
    nearly all; in equal accumulation it counts 1. NaN where nothing is moved.
    """
    order = [
        (pair, tag, i)
        for block in schedule
        for i in range(max(len(layers[tag].beta) for stage in block for _, tag in stage))
        for stage in block
        for pair, tag in stage
        if pair[0] == "s" and i < len(layers[tag].beta)
    ]
    alphas = jnp.stack([layers[tag].alpha[i] for _, tag, i in order])
    before = jnp.cumprod(jnp.concatenate([jnp.ones_like(alphas[:1]), alphas[:-1]]), axis=0)
    after = jnp.cumprod(jnp.concatenate([jnp.ones_like(alphas[:1]), alphas[:0:-1]]), axis=0)[::-1]
    found: dict[str, list[Array]] = {tag: [] for pair, tag, _ in order if pair == "ss"}
    for (pair, tag, i), kept, left in zip(order, before, after, strict=True):
        if pair == "ss":
            one = layers[tag]
            abar = head_mean(one.attn[i], one.grad[i])
            direct = one.beta[i] * left * (abar * kept[:, None]).sum(-1)
            both = row(jnp.stack([one.beta[i], direct, abar.sum(-1)], axis=-1), target_token)
            found[tag].append(jnp.stack([both[:, 0], both[:, 1] / both[:, 2]]))
    stacked = {tag: jnp.stack(x, axis=1) for tag, x in found.items()}
    return {tag: dict(zip(AT_TARGET, x, strict=True)) for tag, x in stacked.items()}


def _token_mean(
    x: Float[Array, "layers batch query"],
    counted: Bool[Array, "layers batch query"],
    nothing: float = 1.0,
) -> Float[Array, "layers batch query"]:
    """Each layer's mean over its counted tokens, at all of them; `nothing` where none counts."""
    count = counted.sum(-1, keepdims=True)
    mean = jnp.where(counted, x, 0).sum(-1, keepdims=True) / jnp.maximum(count, 1)
    return jnp.broadcast_to(jnp.where(count == 0, nothing, mean), x.shape)


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def _compare(
    model: CLIPMapper,
    drawn: Examples,
    modality: str,
    variants: Sequence[str],
    *,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """The tables of a modality."""
    graph, parameters = nnx.split(model)
    sweep = sweep_program(graph, drawn, modality)
    examples = len(drawn.inputs["text"])
    found = []
    for rows in equal_batches(examples, batch, f"weighting, {modality}"):
        inputs = jax.tree.map(lambda x: x[rows], drawn.inputs)  # noqa: B023
        key = jax.random.fold_in(jax.random.key(seed), int(rows[0]))
        relevance, facts = relevance_by_variant(model, inputs, variants, key)
        maps = jnp.stack([relevance[name][STREAMS[modality]] for name in variants])
        removable = jnp.asarray(drawn.removable[modality][rows])
        values = sweep(parameters, inputs, maps, removable)
        likeness = dict(zip(LIKENESS, _likeness(maps, removable), strict=True))
        found.append(jax.device_get((facts, likeness, values)))
    facts, likeness, values = jax.tree.map(
        lambda *parts: np.concatenate(parts, axis=-1)[..., :examples], *found
    )
    tags = [tag for block in model.layout.schedule for stage in block for _, tag in stage]
    of_layers = {
        f"{tag} {i + 1}": {what: x[i] for what, x in facts["target_token"][tag].items()}
        for tag in tags
        if tag in facts["target_token"]
        for i in range(len(facts["target_token"][tag]["beta"]))
    }
    return {
        "weights": {tag: _intervals(facts["weights"][tag]) for tag in tags},
        "target_token": {name: _intervals(x) for name, x in of_layers.items()},
        "maps": {
            name: _intervals({what: x[i] for what, x in likeness.items()})
            for i, name in enumerate(variants)
            if name != BASELINE
        },
        "perturbation": perturbation.summary(
            dict(zip(variants, values, strict=True)), measure=drawn.measure, baseline=BASELINE
        ),
    }


@jax.jit
def _likeness(
    maps: Float[Array, "variants batch tokens"], removable: Bool[Array, "batch tokens"]
) -> tuple[Float[Array, "variants batch"], Float[Array, "variants batch"]]:
    """As `LIKENESS` says, of all with the first; the top quarter of three tokens is none: NaN."""
    correlation = jax.vmap(lambda one: rank_correlation(one, maps[0], valid=removable))(maps)

    def top(one):
        keep = perturbation.keep_masks(one, removable, positive=False, steps=(0.75,))
        return keep[0] & removable

    chosen = jax.vmap(top)(maps)
    return correlation, (chosen & chosen[0]).sum(-1) / chosen[0].sum(-1)


def _intervals(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float] | None]:
    """Of some, only the examples that have a value count; None if none has."""
    found = {name: x[~np.isnan(x)] if name in SOMETIMES else x for name, x in values.items()}
    return {name: bootstrap(x)._asdict() if x.size else None for name, x in found.items()}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of one modality.

    Args:
      result: of `evaluate`, one of its values, or read back from JSON.

    Raises:
      ValueError: it is of another protocol.
    """
    check_protocol("tables", result, PROTOCOL)
    note = f"{result['examples']} examples of {result['split']}, {result['importance']}; "
    modality = result["modality"]
    removable = f"{note}relevance of the tokens that may be removed."
    target = f"{note}where its stream attends to itself."
    spread = f"{note}spreads are standard deviations."
    task = {"task": result["task"], "modality": modality}
    return [
        by_row(f"Weights, {modality}", spread, "attention", result["weights"], FACTS),
        by_row(f"Target token, {modality}", target, "layer", result["target_token"], AT_TARGET),
        by_row(f"Maps, {modality}", removable, "variant", result["maps"], LIKENESS),
        *perturbation_tables(result["perturbation"] | task),
    ]


def save(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a result: JSON and the tables, for each modality.

    Args:
      result: of `evaluate`, or with a "model" beside the settings.
      folder: made if it is not there.

    Returns:
      The files.
    """
    stems = {one: folder / f"weighting-{found['task']}-{one}" for one, found in result.items()}
    return [
        file
        for one, stem in stems.items()
        for file in save_result(result[one], markdown(tables(result[one])), stem)
    ]
