"""Does a method's relevance lie on the object that a text is about?"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from tqdm.auto import trange

from jaxrel.explanations.explain import explain
from jaxrel.metrics import bootstrap, chance, pointing_game, relevance_mass_accuracy
from jaxrel.train.data.shapes import Scene
from jaxrel.train.data.shapes.language import with_article
from jaxrel.train.evaluate.tables import Table, cell


def named_objects(
    scenes: Iterable[Scene],
) -> Iterator[tuple[Scene, str, Bool[np.ndarray, "height width"]]]:
    """A phrase for one object of several in each scene that has one, such as "a red circle".

    Args:
      scenes: of Shapes.

    Yields:
      The scene, the phrase, which names the object alone, and where the object is.
    """
    for scene in scenes:
        looks = [(thing.colour, thing.shape) for thing in scene.objects]
        alone = [i for i, look in enumerate(looks) if looks.count(look) == 1]
        if len(looks) > 1 and alone:
            yield scene, with_article(" ".join(looks[alone[0]])), scene.masks[alone[0]]


def localise(
    model: Any,
    images: Sequence[np.ndarray],
    texts: Sequence[str],
    masks: Bool[np.ndarray, "examples height width"],
    *,
    methods: Sequence[str],
    batch: int,
) -> dict[str, Any]:
    """Relevance mass accuracy and the pointing game, by method, with bootstrap 95% intervals.

    Args:
      model: that explains images and texts.
      images: at least `batch`.
      texts: one for each image.
      masks: where the object is.
      methods: of the model, "equal" among them.
      batch: examples at a time; what does not fill the last batch is left out, since each size
        compiles a program of its own.

    Returns:
      "examples", "chance" (the mass accuracy of a map without information), and by method "share
      inside" (mass accuracy), its difference to that of "equal", and "pointing game".
    """
    used = masks[: len(masks) - len(masks) % batch]
    inside: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    points: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    for start in trange(0, len(used), batch, desc="relevance", leave=False):
        rows = slice(start, start + batch)
        for one in explain(model, image=images[rows], text=texts[rows], method=tuple(methods)):
            inside[one.method].append(relevance_mass_accuracy(one.image, used[rows]))
            points[one.method].append(pointing_game(one.image, used[rows]))
    shares = {method: np.concatenate(found) for method, found in inside.items()}
    return {
        "examples": len(used),
        "chance": bootstrap(chance(used))._asdict(),
        "share inside": {m: bootstrap(x)._asdict() for m, x in shares.items()},
        "share inside less equal's": {
            m: bootstrap(x - shares["equal"])._asdict() for m, x in shares.items() if m != "equal"
        },
        "pointing game": {m: bootstrap(np.concatenate(x))._asdict() for m, x in points.items()},
    }


def localisation_table(found: dict[str, Any]) -> Table:
    """Relevance mass accuracy, its difference to equal's, and the pointing game, by method."""
    paired = found["share inside less equal's"]
    head = ["method", "relevance mass accuracy", "difference to equal", "pointing game"]
    rows = [
        [method, cell(share), cell(paired.get(method)), cell(found["pointing game"][method])]
        for method, share in found["share inside"].items()
    ]
    note = f"{found['examples']} examples; chance: {cell(found['chance'])}."
    return Table("Localisation", note, head, rows)
