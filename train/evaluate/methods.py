"""All methods in one table (`methods/1`): what they find, where it lies, and what it costs.

On Shapes and its models: CLIPmapper that answers questions or captions, and CLIP. The columns:

- the perturbation test (see `perturbation`): the area under the curve while patches or words are
  removed, the least relevant first (-) or the most relevant first (+). CLIP chooses the caption of
  an image, or the image of a caption, among the scenes of a group.
- localisation: the share of the positive relevance that is on the object a text is about, and the
  pointing game (see `located_examples`).
- cost: the passes through the model, and XLA's count of operations over those of `jax.grad`.

Each figure has its bootstrap 95% interval. The best of a column is told from the others by the
interval of their difference on the same examples.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxrel.explanations.methods import BY_RULES, family
from jaxrel.metrics import pointing_game, relevance_mass_accuracy
from jaxrel.metrics.intervals import bootstrap_many
from jaxrel.metrics.perturbation import auc
from jaxrel.models.clip import CLIP
from jaxrel.models.clipmapper import CLIPMapper
from jaxrel.train.evaluate import pair_examples, perturbation
from jaxrel.train.evaluate.batching import equal_batches
from jaxrel.train.evaluate.flops import flops, gradient
from jaxrel.train.evaluate.located_examples import Located, located_examples
from jaxrel.train.evaluate.mapper_examples import (
    Examples,
    check_sizes,
    draw_examples,
    once_each,
)
from jaxrel.train.evaluate.tables import Table, check_protocol
from jaxrel.train.evaluate.weighting import relevance_by_rule

PROTOCOL = "methods/1"
# Rules of `weighting` beside the method that it is about.
RULES = {"weighted, root values": "grad_value, root values"}
_OTHERS = ("weighted, root values", "no_aggregation", "token_tm", "legrad", "grad_eclip")
# By method, the passes that it needs: those by rules, which go to the tokens themselves, are last.
COST = {name: passes for name, passes in perturbation.COST.items() if name not in BY_RULES}
COST |= dict.fromkeys(_OTHERS, "forward + gradient")
COST |= {name: perturbation.COST[name] for name in BY_RULES}
METHODS = tuple(COST)
# What is measured of a model, by its kind: the first part of its columns' heads.
KINDS = {"vqa": "questions", "caption": "captions", "clip": "CLIP"}
REMOVED = {"image": "patches", "text": "words"}
SIGNS = {"negative": "-", "positive": "+"}
# Rows of which operations are counted.
COUNTED = 4


def evaluate(
    models: Mapping[str, Any],
    *,
    methods: Sequence[str] = METHODS,
    data_seed: int = 0,
    split: str = "test",
    examples: int = 1024,
    located: int = 512,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure all methods on held-out scenes.

    Args:
      models: by name, at most one of each kind: CLIPmappers of either task, and a CLIP with a ViT.
      methods: of `METHODS`.
      data_seed: of the Shapes data set.
      split: of the data set.
      examples: how many for each perturbation test; of a CLIP a multiple of `batch`, which is
        the number of scenes it chooses among.
      located: how many for localisation.
      batch: examples at a time.
      seed: of what is drawn, and of the random method.

    Returns:
      "figures", a list of columns as `figure` makes them, "costs" by model and method (operations
      over those of `jax.grad`), and the settings.

    Raises:
      ValueError: an unknown method, a number out of range, two models of a kind, or a model that
        no method explains token by token.
    """
    methods = once_each("methods", "method", methods, METHODS)
    check_sizes("methods", examples, batch)
    check_sizes("methods, localisation", located, batch)
    kinds = {name: pair_examples.kind_of(name, model) for name, model in models.items()}
    if len(set(kinds.values())) < len(kinds):
        raise ValueError(
            f"methods: a table has one model of each kind, got {', '.join(models)} of the kinds "
            f"{', '.join(kinds.values())}"
        )
    options: dict[str, Any] = {"data_seed": data_seed, "split": split, "seed": seed, "batch": batch}
    found = [
        judge(model, kind, methods, examples=examples, located=located, **options)
        for model, kind in zip(models.values(), kinds.values(), strict=True)
    ]
    return {
        "protocol": PROTOCOL,
        "models": kinds,
        "methods": list(methods),
        **options,
        "examples": examples,
        "located": located,
        "lrp": "attn_lrp; cp_lrp for the method of this name",
        "versions": {"jaxrel": version("jaxrel"), "jax": jax.__version__},
        "figures": [column for one in found for column in one["figures"]],
        "costs": {name: one["costs"] for name, one in zip(models, found, strict=True)},
    }


def explains(model: Any, method: str) -> bool:
    """Whether a method of `METHODS` is defined for a model.

    TokenTM, LeGrad, Grad-ECLIP and `no_aggregation` are defined for one stream of tokens,
    Transformer attribution for two, and rules of weighing have been studied on two.
    """
    if method in RULES:
        return isinstance(model, CLIPMapper)
    return method == "random" or method.partition(", ")[0] in family(model).methods


def relevance(
    model: Any, inputs: Mapping[str, Any], methods: Sequence[str], key: Array
) -> list[dict[str, Array]]:
    """By method, {stream: relevance [rows, tokens]}; arguments as of `relevance_by_method`."""
    rules = {name: RULES[name] for name in methods if name in RULES}
    others = [name for name in methods if name not in RULES]
    found = perturbation.relevance_by_method(model, inputs, others, key)
    if rules:
        by_rule = relevance_by_rule(model, inputs, tuple(rules.values()))
        found |= {name: by_rule[rule] for name, rule in rules.items()}
    return [found[name] for name in methods]


def judge(
    model: Any,
    kind: str,
    methods: Sequence[str],
    *,
    data_seed: int,
    split: str,
    examples: int,
    located: int,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """The columns and costs of one model; arguments and errors are those of `evaluate`."""
    some = [method for method in methods if explains(model, method)]
    scenes: dict[str, Any] = {"data_seed": data_seed, "split": split}
    options = scenes | {"seed": seed, "batch": batch}
    if kind == "clip":
        sets = pair_examples.pair_examples(model, **scenes, count=examples, among=batch)
    else:
        sets = draw_examples(model, **options, count=examples)
    figures = []
    for drawn in sets:
        for modality in drawn.removable:
            areas = perturbed(model, drawn, modality, some, batch=batch, seed=seed)
            for i, (sign, mark) in enumerate(SIGNS.items()):
                title = f"{KINDS[kind]}, {REMOVED[modality]} {mark}"
                figures.append(
                    figure(areas[:, i], some, title, drawn.measure, higher=sign == "negative")
                )
    rows = located_examples(model, **options, count=located)
    shares, hits = localised(model, rows, some, batch=batch, seed=seed)
    for values, what in ((shares, "on the object"), (hits, "pointing game")):
        figures.append(figure(values, some, f"{KINDS[kind]}, {what}", what, higher=True))
    few = jax.tree.map(lambda x: x[:COUNTED], rows.inputs)
    return {"figures": figures, "costs": costs(model, few, some)}


def perturbed(
    model: Any, drawn: Examples, modality: str, methods: Sequence[str], *, batch: int, seed: int
) -> Float[np.ndarray, "methods signs examples"]:
    """The area under each example's curve; see `jaxrel.metrics.perturbation.auc`."""
    program = pair_examples.sweep_program if isinstance(model, CLIP) else perturbation.sweep_program
    sweep = program(nnx.graphdef(model), drawn, modality)
    key = jax.random.key(seed)

    def explained(inputs: dict[str, Any], start: int) -> list[dict[str, Array]]:
        return relevance(model, inputs, methods, jax.random.fold_in(key, start))

    values = perturbation.swept(
        model, drawn, modality, sweep, explained, batch=batch, desc=f"perturbing, {modality}"
    )
    return np.asarray(auc(values.astype(np.float64)))


def localised(
    model: Any, rows: Located, methods: Sequence[str], *, batch: int, seed: int
) -> tuple[Float[np.ndarray, "methods rows"], Float[np.ndarray, "methods rows"]]:
    """Percent of the positive relevance that is on the object, and of hits of the pointing game."""
    stream, count = model.layout["vision"], len(rows.masks)
    key = jax.random.key(seed)
    found = []
    for some in equal_batches(count, min(batch, count), "localisation"):
        inputs, masks = jax.tree.map(lambda x: x[some], tuple(rows))  # noqa: B023
        by_method = relevance(model, inputs, methods, jax.random.fold_in(key, int(some[0])))
        maps = np.stack([one["vision"] for one in by_method])[:, :, stream.prefix :]
        maps = maps.reshape(*maps.shape[:2], *stream.grid)
        both = [(relevance_mass_accuracy(one, masks), pointing_game(one, masks)) for one in maps]
        found.append(np.asarray(both, np.float64))
    shares, hits = 100 * np.moveaxis(np.concatenate(found, axis=-1)[..., :count], 1, 0)
    return shares, hits


def costs(model: Any, inputs: Mapping[str, Any], methods: Sequence[str]) -> dict[str, float]:
    """By method, the operations of its relevance over those of the gradient alone."""
    key, once = jax.random.key(0), flops(gradient, model, inputs)

    def counted(method: str) -> float:
        return flops(lambda m, x: relevance(m, x, (method,), key), model, inputs)

    return {method: counted(method) / once for method in methods if method != "random"}


def figure(
    values: Float[np.ndarray, "methods examples"],
    methods: Sequence[str],
    title: str,
    measure: str,
    *,
    higher: bool,
) -> dict[str, Any]:
    """One column: means with bootstrap 95% intervals, and which methods are best.

    Args:
      values: of the same examples.
      methods: their names.
      title: the column's head.
      measure: what was measured.
      higher: whether more is better.

    Returns:
      "title", "measure", "better", "examples", "methods" (`mean`, `low` and `high` of each), "best"
      (the method of the best mean), and "as good": the others whose difference to it on the same
      examples has an interval with 0 in it.
    """
    means = bootstrap_many(values)
    best = int(np.argmax(means.mean if higher else -means.mean))
    gap = bootstrap_many(values - values[best])
    level = (gap.low <= 0) & (gap.high >= 0)
    return {
        "title": title,
        "measure": measure,
        "better": "higher" if higher else "lower",
        "examples": values.shape[-1],
        "methods": {name: means.at(i)._asdict() for i, name in enumerate(methods)},
        "best": methods[best],
        "as good": [name for i, name in enumerate(methods) if level[i] and i != best],
    }


NOTE = """\
Shapes, split `{split}`: {examples} examples for each perturbation test, {located} for
localisation, with bootstrap 95% intervals. Perturbation: the area, times 100, under the curve of
{measures}; - is the negative test, in which the least relevant go first (higher is better), + the
positive one (lower is better). Localisation: percent of the positive relevance that is on the
object which a question asks about, a caption's noun names or a phrase names, and of maps whose
highest point is on it (higher is better). **Bold** is the best of a column, and † marks what
cannot be told from it: the interval of the difference on the same examples has 0 in it. FLOPs are
XLA's count for the method alone, over that of `jax.grad`; methods that are asked for together
share their passes. A dash: `no_aggregation`, TokenTM, LeGrad and Grad-ECLIP are defined for
models of one stream of tokens, such as the towers of CLIP, Transformer attribution for models of
two, and `weighted, root values` is of the study of [rules](weighting-test-2-layers.md), which is
of CLIPmappers. `pairwise_relevance` has no row, since it is of pairs of a patch and a word, nor
has `token_activation`, which needs a decoder that reads an image's tokens among its words."""


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The one table: a row per method.

    Args:
      result: of `evaluate`, or read back from JSON.

    Raises:
      ValueError: it is of another protocol.
    """
    check_protocol("tables", result, PROTOCOL)
    figures, costs = result["figures"], result["costs"]
    of_model = [f"FLOPs, {KINDS[kind]}" for kind in result["models"].values()]
    columns = ["method", *(one["title"] for one in figures), "passes", *of_model]
    rows = [
        [
            method,
            *(_cell(one, method) for one in figures),
            COST[method],
            *(f"{one[method]:.2f}" if method in one else "-" for one in costs.values()),
        ]
        for method in result["methods"]
    ]
    # Those of words may be those of patches.
    measures = dict.fromkeys(one["measure"] for one in figures if one["title"][-1] in "-+")
    listed = ", or of ".join(f"the {one}" for one in measures)
    note = NOTE.replace("\n", " ").format(**{**result, "measures": listed})
    return [Table("Methods", note, columns, rows)]


def _cell(column: Mapping[str, Any], method: str) -> str:
    """A mean with its interval, marked where it is the best; a dash where there is none."""
    measured = column["methods"].get(method)
    if measured is None:
        return "-"
    text = "{mean:z.1f} [{low:z.1f}, {high:z.1f}]".format(**measured)
    if method == column["best"]:
        return f"**{text}**"
    return f"{text} †" if method in column["as good"] else text
