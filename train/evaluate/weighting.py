"""Which rule of weighted accumulation is best: a study on CLIPmapper and Shapes (`weighting/2`).

No formula of Huang, Jia, Zhang and Zhang 2023 could be had, so the rule is chosen by what their
paper claims: weighting by the importance of token values beats equal accumulation in perturbation
tests. The plan was written before the study was run:

1. Every `Rule` of `FAMILY` is a form of `R <- a R + b Ā g R`: `b` weighs the tokens that attention
   adds to, `g` the values that it adds, and `a` what is carried over. `equal` has all three at 1,
   and `grad_value, rest` is `weighted` as it was when the study began.
2. Each rule has eight figures: the difference to `equal` of the AUC of the perturbation test, for
   questions and captions, patches and words, the least and the most relevant removed first. A
   figure is better or worse by its sign, and clearly so where its bootstrap 95% interval excludes
   0.
3. The rule is chosen on 1,024 validation examples of each of both bundled mappers, of two layers:
   among the rules with no figure clearly worse, the one of the highest score. The score is the mean
   over the eight figures of the improvement over half the width of its interval, so that figures
   count alike. If every rule has one clearly worse, the fewest decide, then the score.
4. The chosen rule is measured once on 2,048 test examples of the bundled mappers, and of mappers of
   four and of six layers that are trained for it.
5. It wins at a depth if at least five of the eight figures are better and none is clearly worse. It
   becomes the method `weighted` if it wins at two layers and at one more depth, and has at most one
   figure of the 24 clearly worse: of so many, one is expected by chance. If not, `weighted` stays.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrel.attention import (
    Layers,
    bimodal_accumulation,
    head_mean,
    measure,
    row,
    value_and_layers,
    weights,
)
from jaxrel.metrics import perturbation
from jaxrel.models.clipmapper import CLIPMapper
from jaxrel.train.evaluate.mapper_examples import (
    STREAMS,
    Examples,
    check_sizes,
    draw_examples,
    once_each,
)
from jaxrel.train.evaluate.perturbation import sweep_program, swept
from jaxrel.train.evaluate.tables import Table, check_protocol, difference

PROTOCOL = "weighting/2"
SHARES = ("grad_value", "norm", "abs_grad_value")
# The sign of an improvement: the least relevant removed first, a higher AUC is better.
BETTER = {"negative": 1, "positive": -1}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to weigh: `R <- a R + b Ā g R`.

    Attributes:
      query: `b`, per token that attention adds to: 1 ("none"); `2 v / (u + v)` for the importance
        `u` of the token before and `v` of what is added to it, by a measure of `SHARES`; how much
        longer the token is after it ("length"); or how far it turned, 1 less the cosine ("turn").
      relative: whether `b` is over its mean over the tokens of its layer.
      value: `g`, per token whose value is added: 1 ("none"), `column_weights` ("values"), or
        those of the root of the column sums ("root values").
      residual: `a`: 1 ("one") or `2 - b` ("rest").
    """

    query: str = "none"
    relative: bool = False
    value: str = "none"
    residual: str = "one"

    @property
    def name(self) -> str:
        """What tables and the command line call it."""
        parts = (
            [self.query + (" relative" if self.relative else "")] * (self.query != "none"),
            [self.value] * (self.value != "none"),
            ["rest"] * (self.residual == "rest"),
        )
        return ", ".join(itertools.chain(*parts)) or BASELINE


BASELINE = "equal"
_QUERIES = (
    Rule(),
    *(Rule(query, residual=residual) for query in SHARES for residual in ("one", "rest")),
    *(Rule(query, relative=True) for query in (*SHARES, "length", "turn")),
    Rule("length"),
)
FAMILY = {
    rule.name: rule
    for rule in (
        dataclasses.replace(query, value=value)
        for query in _QUERIES
        for value in ("none", "values", "root values")
    )
}


def evaluate(
    model: CLIPMapper,
    *,
    modality: Sequence[str] = ("image", "text"),
    rules: Sequence[str] = tuple(FAMILY),
    data_seed: int = 0,
    split: str = "val",
    examples: int = 1024,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure rules by the perturbation test; see `perturbation.evaluate`.

    It explains, removes and measures the same, but regenerates no caption.

    Args:
      model: either CLIPmapper.
      modality: "image", "text" or both: of which tokens are removed.
      rules: names of `FAMILY`; equal accumulation is always among them.
      data_seed: of the Shapes data set.
      split: of the data set.
      examples: how many.
      batch: examples at a time.
      seed: of the choice of questions or words.

    Returns:
      By modality: as `jaxrel.metrics.perturbation.summary`, with the settings.

    Raises:
      ValueError: an unknown rule or modality, or a number out of range.
    """
    rules = once_each("weighting", "rule", (BASELINE, *rules), FAMILY)
    modality = once_each("weighting", "modality", modality, STREAMS)
    check_sizes("weighting", examples, batch)
    batch = min(batch, examples)
    sets = draw_examples(
        model, data_seed=data_seed, split=split, count=examples, seed=seed, batch=batch
    )
    settings = {
        "task": model.task,
        "layers": model.config.layers,
        "data": "Shapes",
        "split": split,
        "data_seed": data_seed,
        "seed": seed,
        "examples": examples,
        "versions": {"jaxrel": version("jaxrel"), "jax": jax.__version__},
    }
    return {
        one: _compare(model, drawn, one, rules, batch)
        | settings
        | {"modality": one, "explained": drawn.explained}
        for one in modality
        for drawn in sets
        if one in drawn.removable
    }


def _compare(
    model: CLIPMapper, drawn: Examples, modality: str, rules: Sequence[str], batch: int
) -> dict[str, Any]:
    """The perturbation test of a modality."""
    sweep = sweep_program(nnx.graphdef(model), drawn, modality)

    def relevance(inputs: Any, _: int) -> list[Any]:
        found = relevance_by_rule(model, inputs, rules)
        return [found[name] for name in rules]

    desc = f"weighting, {modality}"
    values = swept(model, drawn, modality, sweep, relevance, batch=batch, desc=desc)
    return perturbation.summary(
        dict(zip(rules, values, strict=True)), measure=drawn.measure, baseline=BASELINE
    )


def relevance_by_rule(
    model: Any, inputs: Mapping[str, Any], rules: Sequence[str]
) -> dict[str, dict[str, Array]]:
    """Relevance by rule, from one forward and backward pass.

    Args:
      model: either CLIPmapper.
      inputs: as `model.pairs` returns them.
      rules: names of `FAMILY`.

    Returns:
      {rule: {stream: float [rows, tokens]}}.
    """
    (target_token,) = model.target_tokens(inputs).values()
    schedule = model.layout.schedule
    return _explained(model, inputs, target_token, rules=tuple(rules), schedule=schedule)


@functools.partial(jax.jit, static_argnames=("rules", "schedule"))
def _explained(model, inputs, target_token, *, rules, schedule):
    _, captured = value_and_layers(_score, schedule)(model, inputs)
    by_rule = [{tag: weigh(one, FAMILY[name]) for tag, one in captured.items()} for name in rules]

    def accumulated(layers):
        # The gradients are the same for all.
        given = {tag: Layers(x[0], captured[tag].grad, *x[1:]) for tag, x in layers.items()}
        blocks = [
            [{pair: given[tag] for pair, tag in stage} for stage in block] for block in schedule
        ]
        maps = bimodal_accumulation(blocks, importance=_itself, residual=False)
        # s is the text, q the image.
        return {"text": row(maps.ss, target_token), "vision": row(maps.sq, target_token)}

    found = jax.lax.map(accumulated, jax.tree.map(lambda *x: jnp.stack(x), *by_rule))
    return {name: jax.tree.map(lambda x: x[i], found) for i, name in enumerate(rules)}  # noqa: B023


def _score(model: CLIPMapper, inputs: Any) -> Array:
    return model.score(inputs)


def _itself(value: Array, grad: Array) -> Array:
    return value[..., 0]


def weigh(layers: Layers, rule: Rule) -> tuple[Array, Array, Array, Array]:
    """The layers of one kind as `bimodal_accumulation` takes them, weighed by a rule.

    Args:
      layers: with their token values.
      rule: how to weigh.

    Returns:
      `attn`, `before`, `after` and `value_grad`. What a rule weighs inside of `Ā` is in the maps;
      importances that sum to 2 are their own weights.
    """
    b = _query_weights(layers, rule)
    attn = layers.attn
    if rule.value != "none":
        root = rule.value == "root values"
        attn = attn * column_weights(head_mean(attn, layers.grad), root=root)[:, :, None, None]
    ones = jnp.ones_like(b)
    if rule.residual == "one":
        attn, carried, moved = attn * b[:, :, None, :, None], ones, ones
    else:
        carried, moved = 2 - b, b
    return attn, carried[..., None], moved[..., None], ones[..., None]


def _query_weights(layers: Layers, rule: Rule) -> Float[Array, "layers batch query"]:
    before, after, grad = layers.before, layers.after, layers.value_grad
    if rule.query in SHARES:
        importance = measure(rule.query)
        b = weights(importance(before, grad), importance(after, grad))[1]
    elif rule.query == "none":
        b = jnp.ones(before.shape[:-1], before.dtype)
    else:
        length, sum_length = (jnp.sqrt(jnp.square(x).sum(-1)) for x in (before, before + after))
        if rule.query == "length":
            b = sum_length / _nonzero(length)
        else:
            b = 1 - (before * (before + after)).sum(-1) / _nonzero(length * sum_length)
    counted = (grad != 0).any(-1)
    return b / _nonzero(_token_mean(b, counted)) if rule.relative else b


def column_weights(
    abar: Float[Array, "*layers query key"], *, root: bool = False
) -> Float[Array, "*layers key"]:
    """`g`, the weights of the values that attention adds.

    The importance `c_j` of value j is the sum over i of `Ā_ij`: the positive part, by head and
    query, of the product of the value and the gradient by it. `g = s sum(c) / sum(s c)` for
    `s = c`, or its root, so that all that is moved stays as much.
    """
    c = abar.sum(-2)
    s = jnp.sqrt(c) if root else c
    total = (s * c).sum(-1, keepdims=True)
    return jnp.where(total == 0, 1, s * c.sum(-1, keepdims=True) / _nonzero(total))


def _token_mean(
    x: Float[Array, "layers batch query"], counted: Bool[Array, "layers batch query"]
) -> Float[Array, "layers batch 1"]:
    """Each layer's mean over the tokens that the explained scalar depends on; 1 without any."""
    count = counted.sum(-1, keepdims=True)
    mean = jnp.where(counted, x, 0).sum(-1, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(count == 0, 1, mean)


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def judge(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What the figures say of each rule, by the plan.

    Args:
      results: values of what `evaluate` returns, of all models and modalities.

    Returns:
      By rule: "score", "better" and "clearly worse" (counts of figures).

    Raises:
      ValueError: a result of another protocol.
    """
    found: dict[str, dict[str, float]] = {}
    for name in (name for name in results[0]["methods"] if name != BASELINE):
        gains = []
        for sign, direction in BETTER.items():
            for one in results:
                at = one["methods"][name][sign]["difference"]
                gains.append([direction * at[part] for part in ("mean", "low", "high")])
        mean, ends = np.array(gains)[:, 0], np.array(gains)[:, 1:]
        half = np.abs(ends[:, 0] - ends[:, 1]) / 2
        found[name] = {
            "score": float(np.mean(mean / np.where(half == 0, 1, half))),
            "better": int((mean > 0).sum()),
            "clearly worse": int((ends.max(axis=1) < 0).sum()),
        }
    return found


def ranked(judged: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The rules by the plan, the one that it chooses first."""
    return sorted(judged, key=lambda name: (judged[name]["clearly worse"], -judged[name]["score"]))


def tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The table of all figures: a row per rule, the best by the plan first.

    Args:
      results: values of what `evaluate` returns, of one or more models.

    Raises:
      ValueError: a result of another protocol.
    """
    for one in results:
        check_protocol("tables", one, perturbation.PROTOCOL)
    judged = judge(results)
    figures = [(one, sign) for one in results for sign in BETTER]
    rows = [
        [
            name,
            *(difference(one["methods"][name][sign]["difference"], 2) for one, sign in figures),
            f"{judged[name]['better']}",
            f"{judged[name]['clearly worse']}",
            f"{judged[name]['score']:+.2f}",
        ]
        for name in ranked(judged)
    ]
    first = results[0]
    note = (
        f"{first['examples']} examples of `{first['split']}`, mappers of {first['layers']} layers: "
        "differences of the AUC to equal accumulation; - is the negative test (higher is better), "
        "+ the positive one (lower is better); bold: the interval excludes 0."
    )
    heads = [f"{_asked(one)} {'-' if sign == 'negative' else '+'}" for one, sign in figures]
    columns = ["rule", *heads, "better", "clearly worse", "score"]
    return [Table(f"Rules, {first['split']}, {first['layers']} layers", note, columns, rows)]


def _asked(one: Mapping[str, Any]) -> str:
    asked = "questions" if one["task"] == "vqa" else "captions"
    return f"{asked}, {'patches' if one['modality'] == 'image' else 'words'}"
