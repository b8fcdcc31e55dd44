"""Do explanations depend on what the model learned? Cascading randomisation on Shapes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxrel.explanations.explain import token_relevance
from jaxrel.explanations.methods import family
from jaxrel.metrics.randomisation import agreement, cascade
from jaxrel.models.clip import CLIP
from jaxrel.models.clipmapper import CLIPMapper
from jaxrel.train.evaluate.mapper_examples import STREAMS, Examples, draw_examples
from jaxrel.train.evaluate.pair_examples import AMONG, kind_of, pair_examples
from jaxrel.train.evaluate.record import save as save_result
from jaxrel.train.evaluate.tables import Table, by_row, check_protocol
from jaxrel.train.evaluate.tables import markdown as tables_markdown

PROTOCOL = "randomisation/1"
# A model has most of them.
METHODS = (
    "raw",
    "rollout",
    "grad_cam",
    "partial_lrp",
    "transformer_attribution",
    "equal",
    "equal_lrp",
    "weighted",
    "no_aggregation",
    "token_tm",
    "legrad",
    "grad_eclip",
    "lrp",
    "cp_lrp",
    "input_x_gradient",
)


def evaluate(
    model: CLIPMapper | CLIP,
    *,
    methods: Sequence[str] | None = None,
    data_seed: int = 0,
    split: str = "test",
    examples: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare relevance with that of ever more randomised parameters (Adebayo et al. 2018).

    The answer, the word or the pair explained stays that of the trained model. See
    `jaxrel.metrics.randomisation`: parameters are shuffled from the head down to stage 1, or from
    the projections of a CLIP down to its embeddings.

    Args:
      model: either CLIPmapper, or a CLIP with a ViT.
      methods: of `METHODS`; None for all that the model has.
      data_seed: of the Shapes data set.
      split: of the data set.
      examples: how many; of a CLIP a multiple of `AMONG`, or fewer.
      seed: of the shuffling, and of the choice of questions or words.

    Returns:
      {"image": {group: {method: rank correlation with its interval}}, "text": ...} and the
      settings.

    Raises:
      ValueError: an unknown method, a model of another kind, or no examples.
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    task = kind_of("the model", model)
    if methods is None:
        methods = [one for one in METHODS if one in family(model).methods]
    scenes: dict[str, Any] = {"data_seed": data_seed, "split": split, "count": examples}
    if isinstance(model, CLIP):
        sets = pair_examples(model, **scenes, among=min(AMONG, examples))
    else:
        sets = draw_examples(model, **scenes, seed=seed, batch=examples)
    result: dict[str, Any] = {
        "protocol": PROTOCOL,
        "task": task,
        "split": split,
        "data_seed": data_seed,
        "seed": seed,
        "examples": examples,
    }
    for drawn in sets:
        result |= _agreement(model, drawn, methods, seed)
    return result


def _agreement(
    model: CLIPMapper | CLIP, drawn: Examples, methods: Sequence[str], seed: int
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


def groups(model: CLIPMapper | CLIP) -> dict[str, list[str]]:
    """The model's parameters from the output to the input."""
    if isinstance(model, CLIP):
        return _groups_of_towers(model)
    names = {"head": ["head", "final_norm"], "last mapper layer": ["mapper/last"]}
    for layer in reversed(range(model.config.layers - 1)):
        names[f"mapper layer {layer}"] = [f"mapper/blocks[{layer}]"]
    names["mapper's inputs"] = ["text_in", "vision_in", "text_norm", "vision_norm"]
    names["stage 1, text"] = ["text"]
    names["stage 1, image"] = ["vision"]
    return names


def _groups_of_towers(model: CLIP) -> dict[str, list[str]]:
    """Those of a CLIP; the layers of both towers, by how far they are from the end."""
    of_image = ("patch_embedding", "class_embedding", "position_embedding", "pre_norm")
    of_text = ("token_embedding", "position_embedding")
    projected = ("vision/post_norm", "vision/projection", "text/final_norm", "text/projection")
    names = {"projections": [*projected]}
    layers = {"image": model.config.vision.layers, "text": model.config.text.layers}
    for up in range(max(layers.values())):
        for modality, count in layers.items():
            if up < count:
                at = f"{STREAMS[modality]}/transformer/blocks[{count - 1 - up}]"
                names[f"{modality} layer {count - 1 - up}"] = [at]
    names["embeddings"] = [
        *(f"vision/{one}" for one in of_image),
        *(f"text/{one}" for one in of_text),
    ]
    return names


def tables(result: Mapping[str, Any]) -> list[Table]:
    """By modality a row per method, and a column per group of parameters, in cascading order.

    Args:
      result: of `evaluate`, or read back from JSON.

    Raises:
      ValueError: it is of another protocol.
    """
    check_protocol("tables", result, PROTOCOL)
    asked = {"vqa": "Questions", "caption": "Captions", "clip": "CLIP"}[result["task"]]
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
