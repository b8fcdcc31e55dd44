"""Do explanations depend on what the model learned? Cascading randomisation on Shapes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxrel.explanations.explain import token_relevance
from jaxrel.metrics.randomisation import agreement, cascade
from jaxrel.models.clipmapper import CLIPMapper
from jaxrel.train.evaluate.mapper_examples import STREAMS, Examples, draw_examples
from jaxrel.train.evaluate.record import save as save_result
from jaxrel.train.evaluate.tables import Table, by_row, check_protocol
from jaxrel.train.evaluate.tables import markdown as tables_markdown

PROTOCOL = "randomisation/1"
METHODS = (
    "raw",
    "rollout",
    "grad_cam",
    "partial_lrp",
    "transformer_attribution",
    "equal",
    "equal_lrp",
    "weighted",
    "lrp",
    "cp_lrp",
    "input_x_gradient",
)


def evaluate(
    model: CLIPMapper,
    *,
    methods: Sequence[str] = METHODS,
    data_seed: int = 0,
    split: str = "test",
    examples: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare relevance with that of ever more randomised parameters (Adebayo et al. 2018).

    The answer or word explained stays that of the trained model. See
    `jaxrel.metrics.randomisation`: parameters are shuffled from the head down to stage 1.

    Args:
      model: either CLIPmapper.
      methods: of `jaxrel.explanations.explain.BIMODAL_METHODS`.
      data_seed: of the Shapes data set.
      split: of the data set.
      examples: how many.
      seed: of the shuffling, and of the choice of questions or words.

    Returns:
      {"image": {group: {method: rank correlation with its interval}}, "text": ...} and the
      settings.

    Raises:
      ValueError: an unknown method, or no examples.
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    sets = draw_examples(
        model, data_seed=data_seed, split=split, count=examples, seed=seed, batch=examples
    )
    result: dict[str, Any] = {
        "protocol": PROTOCOL,
        "task": model.task,
        "split": split,
        "data_seed": data_seed,
        "seed": seed,
        "examples": examples,
    }
    for drawn in sets:
        result |= _agreement(model, drawn, methods, seed)
    return result


def _agreement(
    model: CLIPMapper, drawn: Examples, methods: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """By modality of the examples, the table."""
    graph, parameters = nnx.split(model)

    def maps(parameters: Any) -> dict[str, dict[str, Any]]:
        found = token_relevance(nnx.merge(graph, parameters), drawn.inputs, method=methods)
        return jax.device_get(found)

    original = maps(parameters)
    shuffled = cascade(parameters, groups(model), jax.random.key(seed))
    forgotten = [(name, maps(one)) for name, one in shuffled]
    result = {}
    for modality, removable in drawn.removable.items():
        stream = STREAMS[modality]
        table = agreement(
            {method: rows[stream] for method, rows in original.items()},
            (
                (name, {method: rows[stream] for method, rows in found.items()})
                for name, found in forgotten
            ),
            valid=np.asarray(removable),
        )
        result[modality] = {
            name: {method: one._asdict() for method, one in row.items()}
            for name, row in table.items()
        }
    return result


def groups(model: CLIPMapper) -> dict[str, list[str]]:
    """The model's parameters from the output to the input."""
    names = {"head": ["head", "final_norm"], "last mapper layer": ["mapper/last"]}
    for layer in reversed(range(model.config.layers - 1)):
        names[f"mapper layer {layer}"] = [f"mapper/blocks[{layer}]"]
    names["mapper's inputs"] = ["text_in", "vision_in", "text_norm", "vision_norm"]
    names["stage 1, text"] = ["text"]
    names["stage 1, image"] = ["vision"]
    return names


def tables(result: Mapping[str, Any]) -> list[Table]:
    """By modality a row per method, and a column per group of parameters, in cascading order.

    Args:
      result: of `evaluate`, or read back from JSON.

    Raises:
      ValueError: it is of another protocol.
    """
    check_protocol("tables", result, PROTOCOL)
    asked = "Questions" if result["task"] == "vqa" else "Captions"
    note = (
        f"Rank correlation with the trained model's relevance, {result['examples']} examples; "
        "columns are cumulative."
    )
    return [
        by_row(f"{asked}, {tokens}", note, "method", _by_method(result[modality]))
        for modality, tokens in (("image", "patches"), ("text", "words"))
        if modality in result
    ]


def _by_method(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    methods = next(iter(table.values()))
    return {method: {group: row[method] for group, row in table.items()} for method in methods}


def save(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a result: JSON and the tables.

    Args:
      result: of `evaluate`, or with a "model" beside the settings.
      folder: made if it is not there.

    Returns:
      The files.
    """
    text = tables_markdown(tables(result))
    return save_result(result, text, folder / f"sanity-{result['task']}")
