"""The perturbation test of CLIPmapper on Shapes (`perturbation/1`, after Chefer et al. 2021).

Tokens are removed in the order of their relevance: patches are left out, and words are hidden from
attention everywhere. Does the model's answer stay right, does its own caption stay probable, and
how good is a regenerated caption? One program goes through methods, signs and steps, for each of
these.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.explanations.explain import token_relevance
from jaxrel.metrics import perturbation
from jaxrel.metrics.caption_scores import CiderD, References, tokenise
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperCaption
from jaxrel.report import plots
from jaxrel.train.evaluate.batching import equal_batches
from jaxrel.train.evaluate.mapper_examples import (
    STREAMS,
    Examples,
    check_sizes,
    draw_examples,
    once_each,
)
from jaxrel.train.evaluate.record import save as save_result
from jaxrel.train.evaluate.tables import Measured, Table, check_protocol, difference
from jaxrel.train.evaluate.tables import markdown as tables_markdown

PROTOCOL = perturbation.PROTOCOL
# The methods of the table, and the passes through the model that each needs. LRP's backward
# pass goes with rules of its own, beside the gradient's.
COST = {
    "random": "none",
    "raw": "forward",
    "rollout": "forward",
    "grad_cam": "forward + gradient",
    "partial_lrp": "forward + LRP",
    "transformer_attribution": "forward + gradient + LRP",
    "equal": "forward + gradient",
    "equal_lrp": "forward + gradient + LRP",
    "weighted, grad_value": "forward + gradient",
    "weighted, norm": "forward + gradient",
    "weighted, abs_grad_value": "forward + gradient",
    "lrp": "forward + LRP",
    "cp_lrp": "forward + LRP",
    "input_x_gradient": "forward + gradient",
}
METHODS = tuple(COST)
# The result for captions that are regenerated from the patches that are left.
REGENERATED = "image-cider"


def evaluate(
    model: CLIPMapper,
    *,
    modality: Sequence[str] = ("image", "text"),
    methods: Sequence[str] = METHODS,
    data_seed: int = 0,
    split: str = "test",
    examples: int = 2048,
    regenerated: int = 512,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the perturbation test of a model on held-out scenes.

    A model that answers questions is asked one question per scene, drawn by `seed`, and its own
    answer is explained; measured is whether its answer is right. A model that captions writes
    its own captions. Where patches are removed, the caption as a whole is explained, and measured
    is the mean log-probability of its words and end; of the first examples also the CIDEr-D of
    the caption that the model regenerates from the patches that are left, against the scene's
    captions, with the document frequencies of all scenes' captions. Where words are removed, one
    word of each caption is explained, drawn by `seed` from the fifth on, and measured is its
    log-probability.
    The token that an output is read from is never removed, nor are class, start and end tokens.

    Args:
      model: either of both.
      modality: "image", "text" or both: of which tokens are removed.
      methods: of `METHODS`.
      data_seed: of the Shapes data set.
      split: of the data set.
      examples: how many.
      regenerated: for how many of them captions are regenerated, which takes longer; 0 for none.
      batch: examples at a time.
      seed: of the choice of questions or words, and of the random method.

    Returns:
      {modality: as `jaxrel.metrics.perturbation.summary`, and the settings}; regenerated captions
      are under "image-cider".

    Raises:
      ValueError: an unknown method or modality, or a number out of range.
    """
    methods = once_each("perturbation", "method", methods, METHODS)
    modality = once_each("perturbation", "modality", modality, STREAMS)
    check_sizes("perturbation", examples, batch)
    if regenerated < 0:
        raise ValueError(f"perturbation: regenerated must be at least 0, got {regenerated}")
    batch = min(batch, examples)
    sets = draw_examples(
        model, data_seed=data_seed, split=split, count=examples, seed=seed, batch=batch
    )
    drawn = {one: next(x for x in sets if one in x.removable) for one in modality}
    values: dict[str, np.ndarray] = {}
    for some in sets:
        chosen = [one for one in modality if one in some.removable]
        if chosen:
            values |= _perturbed(
                model, some, chosen, methods, regenerated=regenerated, batch=batch, seed=seed
            )
    settings = {
        "task": model.task,
        "data": "Shapes",
        "split": split,
        "data_seed": data_seed,
        "seed": seed,
        "lrp": "attn_lrp; cp_lrp for the method of this name",
        "versions": {"jaxrel": version("jaxrel"), "jax": jax.__version__},
    }

    def summary(name: str, modality: str, measure: str) -> dict[str, Any]:
        found = perturbation.summary(
            dict(zip(methods, values[name], strict=True)),
            measure=measure,
            baseline="equal" if "equal" in methods else None,
            cost={method: COST[method] for method in methods},
        )
        return found | settings | {"modality": modality, "explained": drawn[modality].explained}

    result = {one: summary(one, one, drawn[one].measure) for one in modality}
    if REGENERATED in values:
        found = summary(REGENERATED, "image", "CIDEr-D of the regenerated caption")
        result[REGENERATED] = found | {"frequencies": f"captions of {examples} scenes"}
    return result


def _perturbed(
    model: CLIPMapper,
    drawn: Examples,
    modality: Sequence[str],
    methods: Sequence[str],
    *,
    regenerated: int,
    batch: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """By modality (or `REGENERATED`), what is measured: [methods, signs, steps, examples]."""
    graph, parameters = nnx.split(model)
    examples = len(drawn.inputs["text"])
    counts = dict.fromkeys(modality, examples)
    if "image" in modality and drawn.references and regenerated:
        counts[REGENERATED] = min(regenerated, examples)
    sweeps = {name: sweep_program(graph, drawn, name) for name in counts}
    found: dict[str, list[np.ndarray]] = {name: [] for name in counts}
    for rows in equal_batches(examples, batch, "perturbing"):
        start = int(rows[0])
        inputs = jax.tree.map(lambda x: x[rows], drawn.inputs)  # noqa: B023
        key = jax.random.fold_in(jax.random.key(seed), start)
        relevance = relevance_by_method(model, inputs, methods, key)
        for name in (name for name, count in counts.items() if start < count):
            one = "image" if name == REGENERATED else name
            stacked = jnp.stack([relevance[method][STREAMS[one]] for method in methods])
            removable = jnp.asarray(drawn.removable[one][rows])
            found[name].append(np.asarray(sweeps[name](parameters, inputs, stacked, removable)))
    values = {name: np.concatenate(x, axis=3)[:, :, :, : counts[name]] for name, x in found.items()}
    if REGENERATED in values:
        assert isinstance(model, CLIPMapperCaption)
        values[REGENERATED] = caption_scores(model, values[REGENERATED], drawn.references)
    return values


def caption_scores(
    model: CLIPMapperCaption,
    ids: Float[np.ndarray, "methods signs steps examples tokens"],
    references: Sequence[References],
) -> Float[np.ndarray, "methods signs steps examples"]:
    """CIDEr-D (0 to 10) of captions against their scenes' references.

    Args:
      model: that wrote them.
      ids: the captions, as `jaxrel.metrics.perturbation.sweep_indices` returns them.
      references: of each example, and of more scenes, whose words count in the frequencies.

    Returns:
      Scores, NaN where ids are.
    """
    cider = CiderD.from_references(references)
    written = np.isfinite(ids).all(-1)
    ids = np.where(written[..., None], ids, 0).astype(np.int32)
    scores = np.full(written.shape, np.nan)
    for i, image in zip(range(ids.shape[3]), references, strict=False):
        # Methods and steps have many captions in common.
        different, which = np.unique(
            ids[:, :, :, i].reshape(-1, ids.shape[-1]), axis=0, return_inverse=True
        )
        captions = [tokenise(caption) for caption in model.sentences(different)]
        weighed = [cider.weigh(tokens) for tokens in image]
        found = cider.score(captions, [weighed] * len(captions))
        scores[..., i] = found[which.reshape(written.shape[:-1])]
    return np.where(written, scores, np.nan)


def relevance_by_method(
    model: Any, inputs: Mapping[str, Any], methods: Sequence[str], key: Array
) -> dict[str, dict[str, Array]]:
    """{method: {stream: relevance [rows, tokens]}} for names as in `METHODS`."""
    plain = tuple(one for one in methods if one != "random" and "," not in one)
    found = token_relevance(model, inputs, method=plain) if plain else {}
    for method in methods:
        if method == "random":
            keys = {"vision": key, "text": jax.random.fold_in(key, 1)}
            shapes = {name: (len(inputs["text"]), model.layout[name].tokens) for name in keys}
            found[method] = {
                name: perturbation.random_relevance(keys[name], shapes[name]) for name in keys
            }
        elif "," in method:
            name, measure = method.split(", ")
            one = token_relevance(model, inputs, method=(name,), importance=measure)
            found[method] = one[name]
    return found


def swept(
    model: Any,
    drawn: Examples,
    modality: str,
    sweep: Callable,
    relevance: Callable[[dict[str, Any], int], Sequence[Mapping[str, Array]]],
    *,
    batch: int,
    desc: str,
) -> Float[np.ndarray, "methods signs steps examples"]:
    """What is measured while tokens of one modality are removed.

    Args:
      model: that is measured.
      drawn: the examples.
      modality: "image" or "text".
      sweep: as `sweep_program` makes it.
      relevance: from inputs, and the number of their first example, to the relevance by each
        method, by stream.
      batch: examples at a time.
      desc: for the progress bar.
    """
    parameters = nnx.split(model)[1]
    examples = len(drawn.inputs["text"])
    found = []
    for rows in equal_batches(examples, batch, desc):
        inputs = jax.tree.map(lambda x: x[rows], drawn.inputs)  # noqa: B023
        maps = jnp.stack([one[STREAMS[modality]] for one in relevance(inputs, int(rows[0]))])
        removable = jnp.asarray(drawn.removable[modality][rows])
        found.append(np.asarray(sweep(parameters, inputs, maps, removable)))
    return np.concatenate(found, axis=-1)[..., :examples]


def sweep_program(graph: Any, drawn: Examples, name: str) -> Callable:
    """A program that measures one batch: patches are left out, and words are hidden.

    What stays the same at every step is made once: the text's tokens in stage 1 where patches
    go, the image's where words do.
    """

    @jax.jit
    def sweep_image(parameters, inputs, relevance, removable):
        model = nnx.merge(graph, parameters)
        image, text = jnp.asarray(inputs["image"]), jnp.asarray(inputs["text"])
        encoded, _ = model.encode_text(text)

        def measured(kept):
            tokens, _ = model.encode_image(image, kept)
            words, _ = model.map(tokens, text, encoded=encoded)
            return drawn.measured(model, words, inputs)

        return perturbation.sweep_indices(measured, relevance, patches)

    @jax.jit
    def sweep_regenerated(parameters, inputs, relevance, removable):
        model, image = nnx.merge(graph, parameters), jnp.asarray(inputs["image"])
        return perturbation.sweep_indices(
            lambda kept: model.generate(image, kept), relevance, patches
        )

    @jax.jit
    def sweep_text(parameters, inputs, relevance, removable):
        model = nnx.merge(graph, parameters)
        tokens, _ = model.encode_image(jnp.asarray(inputs["image"]))

        def measured(keep):
            words, _ = model.map(tokens, jnp.asarray(inputs["text"]), text_keep=keep)
            return drawn.measured(model, words, inputs)

        return perturbation.sweep(measured, relevance, removable)

    if name == "text":
        return sweep_text
    # Images have the same patches.
    patches = drawn.removable["image"][0]
    return sweep_regenerated if name == REGENERATED else sweep_image


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """The table of one modality or measure, a row per method in the summary's order.

    Args:
      summary: of `evaluate`, one of its values, or read back from JSON.

    Raises:
      ValueError: it is of another protocol.
    """
    check_protocol("tables", summary, PROTOCOL)
    baseline = summary["baseline"]
    costs = any("cost" in one for one in summary["methods"].values())
    to_baseline = [] if baseline is None else [f"difference to {baseline}"]
    columns = ["method"]
    for sign, better in zip(perturbation.SIGNS, ("higher", "lower"), strict=True):
        columns += [f"{sign} AUC ({better} is better)", *to_baseline]
    rows = []
    for name, one in summary["methods"].items():
        row = [name]
        for sign in perturbation.SIGNS:
            row.append(_area(one[sign]["auc"]))
            if to_baseline:
                row.append(difference(one[sign].get("difference"), digits=2))
        rows.append([*row, one.get("cost", "")] if costs else row)
    note = (
        f"Perturbation test (`{summary['protocol']}`), {summary['measure']}, "
        f"{summary['examples']} examples, bootstrap 95% intervals"
    )
    note += "; bold: the interval of the difference excludes 0." if to_baseline else "."
    return [Table(_title(summary), note, [*columns, *(["cost"] if costs else [])], rows)]


def _title(summary: Mapping[str, Any]) -> str:
    """Such as "Questions, patches removed"."""
    if "task" not in summary:
        return "Perturbation test"
    asked = "Questions" if summary["task"] == "vqa" else "Captions"
    removed = "patches" if summary["modality"] == "image" else "words"
    return f"{asked}, {removed} removed" + (", regenerated" if "frequencies" in summary else "")


def _area(measured: Measured) -> str:
    assert measured is not None
    return f"{measured['mean']:z.2f} [{measured['low']:z.1f}, {measured['high']:z.1f}]"


def markdown(summary: Mapping[str, Any]) -> str:
    """`tables` as text; arguments and errors are theirs."""
    return tables_markdown(tables(summary))


def save(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a result: JSON, a Markdown table and the curves for each modality or measure.

    Args:
      result: of `evaluate`, or with a "model" beside the settings.
      folder: made if it is not there.

    Returns:
      The files.

    Raises:
      ImportError: matplotlib is not installed (extra `report`); JSON and tables are written.
    """
    stems = {one: folder / f"perturbation-{found['task']}-{one}" for one, found in result.items()}
    files = [
        file
        for one, stem in stems.items()
        for file in save_result(result[one], markdown(result[one]), stem)
    ]
    for one, stem in stems.items():
        files.append(stem.with_name(f"{stem.name}.png"))
        curves(result[one], files[-1])
    return files


def curves(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the negative and the positive test side by side, a line with its band per method.

    Bands are the bootstrap 95% intervals of each point. The file appears complete or not at
    all; a missing folder is made.

    Args:
      summary: one value of a result of `evaluate`, or read back from JSON.
      path: where to; must end in .png.

    Raises:
      ImportError: matplotlib is not installed (extra `report`).
      ValueError: another suffix, or a summary of another protocol.
      OSError: the file cannot be written there.
    """
    check_protocol("curves", summary, PROTOCOL)
    titles = {
        "negative": "Least relevant first: higher is better",
        "positive": "Most relevant first: lower is better",
    }
    panels = {
        title: {name: one[sign]["curve"] for name, one in summary["methods"].items()}
        for sign, title in titles.items()
    }
    examples = f"{summary['protocol']}, {summary['examples']} examples"
    plots.lines(
        panels,
        summary["steps"],
        path,
        x="share of tokens removed",
        y=summary["measure"],
        percent=True,
        size=(11.0, 4.4),
        note=f"{examples}; bands: bootstrap 95% intervals",
    )
