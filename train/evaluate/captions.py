"""How true the captions of a model for Shapes are, and what they hallucinate."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import trange

from jaxrel.metrics import bootstrap, bootstrap_ratio, chair
from jaxrel.metrics.caption_scores import CiderD, tokenise
from jaxrel.models.captioner import Captioner
from jaxrel.models.clipmapper import CLIPMapperCaption
from jaxrel.train.data.shapes import Scene, Shapes
from jaxrel.train.data.shapes.claims import claims, facts
from jaxrel.train.evaluate.batching import equal_batches
from jaxrel.train.evaluate.tables import Table, cell


def evaluate(
    model: CLIPMapperCaption | Captioner,
    *,
    data_seed: int = 0,
    split: str = "test",
    scenes: int = 2048,
    batch: int = 64,
) -> dict[str, Any]:
    """Judge a model on held-out scenes: are its greedy captions true, and like people's?

    Args:
      model: one that knows Shapes' words.
      data_seed: of the Shapes data set.
      split: of the data set.
      scenes: how many.
      batch: images at a time.

    Returns:
      `protocol`, the shares of stated objects that are true of their scene, of objects that are
      mentioned, of objects that are stated and not there (`hallucination`), and CIDEr-D against
      the scene's five captions, with bootstrap 95% intervals.

    Raises:
      ValueError: no scenes.
    """
    if scenes < 1:
        raise ValueError(f"scenes must be at least 1, got {scenes}")
    data = Shapes(seed=data_seed)
    drawn = [data.scene(split, i) for i in trange(scenes, desc="drawing", leave=False)]
    captions = write_captions(model, drawn, batch=batch)
    references = [[tokenise(c.text) for c in scene.captions] for scene in drawn]
    cider = CiderD.from_references(references).score([tokenise(c) for c in captions], references)
    counts = caption_counts(captions, drawn)
    return {
        "protocol": "caption-shapes/1",
        "split": split,
        "data_seed": data_seed,
        "scenes": scenes,
        "truth": _shares(counts, SHARES),
        "hallucination": _shares(counts, HALLUCINATIONS),
        "CIDEr-D": bootstrap(np.asarray(cider))._asdict(),
        "examples": captions[:5],
    }


def write_captions(
    model: CLIPMapperCaption | Captioner, scenes: Sequence[Scene], *, batch: int = 64
) -> list[str]:
    """The model's greedy caption of each scene.

    Args:
      model: one that knows Shapes' words.
      scenes: in the model's size.
      batch: images at a time.
    """
    captions: list[str] = []
    for rows in equal_batches(len(scenes), batch, "captioning", leave=False):
        images = [scenes[i].image for i in rows]
        captions += model.predict({"image": model.processor.image(images)})
    return captions[: len(scenes)]


def caption_counts(captions: Sequence[str], drawn: Sequence[Scene]) -> dict[str, np.ndarray]:
    """What each caption states and what of it is there; for CHAIR shapes alone.

    Args:
      captions: one per scene.
      drawn: the scenes.

    Returns:
      Counts by name, `[captions]`: those of `facts`, and what `SHARES` and `HALLUCINATIONS`
      name besides.
    """
    counts = facts(captions, drawn)
    named = [
        [claim.description.shape for claim in claims(caption) if claim.description.shape]
        for caption in captions
    ]
    shapes = chair(named, [{thing.shape for thing in scene.objects} for scene in drawn])
    return counts | {
        "captions": np.ones(len(captions), int),
        "hallucinates": counts["hallucinated"] > 0,
        "shapes": shapes.mentions,
        "no_such_shape": shapes.hallucinated,
        "hallucinates_shape": shapes.hallucinated > 0,
    }


def _shares(
    counts: dict[str, np.ndarray], shares: tuple[tuple[str, str, str], ...]
) -> dict[str, Any]:
    """Shares over all captions, with intervals from resampled captions."""
    return {
        name: bootstrap_ratio(counts[part], counts[whole])._asdict()
        for name, part, whole in shares
        if counts[whole].any()
    }


SHARES = (
    ("stated objects with colour and shape that are true", "coloured_true", "coloured"),
    ("stated objects that are true", "true", "stated"),
    ("stated numbers that are right", "counted_true", "counted"),
    ("stated relations that are true", "related_true", "related"),
    ("objects of the scene that are mentioned", "mentioned", "objects"),
)

HALLUCINATIONS = (
    ("stated objects that are not there", "hallucinated", "stated"),
    ("captions that state such an object", "hallucinates", "captions"),
    ("named shapes that are not there (CHAIR_i)", "no_such_shape", "shapes"),
    ("captions that name such a shape (CHAIR_s)", "hallucinates_shape", "captions"),
)


def tables(result: dict[str, Any]) -> list[Table]:
    """What share of what captions say is true.

    Args:
      result: of `evaluate`, or read back from JSON.
    """
    rows = [[name, cell(found)] for name, found in result["truth"].items()]
    rows.append(["CIDEr-D (times 10, five references)", cell(result["CIDEr-D"])])
    note = f"Greedy captions of {result['scenes']} scenes of the split `{result['split']}`."
    return [Table("Captions", note, ["share of", ""], rows)]
