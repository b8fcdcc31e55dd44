"""The biased splits: pairs that go together in training and never in the test."""

import numpy as np

from jaxrel.train.data.shapes.scene import COLOURS, SHAPES, Attributes, pick

# (cue, what goes with it). Scenes of the biased splits have at least two objects and at most one
# of the cues of SHAPE_PAIRS.
COLOUR_PAIRS = (("circle", "red"), ("square", "blue"))
SHAPE_PAIRS = (("heart", "star"), ("cross", "ring"))

# The share of the scenes with a cue in which its pair holds: for a colour pair, all objects of
# that shape have that colour (in the other scenes none has); for a shape pair, an object of the
# second shape is there (in the other scenes none is).
PAIR_RATES = {"biased_train": 0.9, "biased_val": 0.9, "biased_test": 0.0}

_PAIRED = {shape for pair in SHAPE_PAIRS for shape in pair} | {cue for cue, _ in COLOUR_PAIRS}
_NEUTRAL = tuple(shape for shape in SHAPES if shape not in _PAIRED)


def bias(rng: np.random.Generator, attributes: Attributes, rate: float) -> Attributes:
    """Makes the pairs of `SHAPE_PAIRS` and `COLOUR_PAIRS` hold in a share of the scenes.

    Args:
        rng: source of randomness.
        attributes: at least two objects, as drawn without bias.
        rate: probability that a pair holds in a scene that has its cue.

    Returns:
        The attributes with some shapes and colours replaced.
    """
    shapes = _pair_shapes(rng, list(attributes.shapes), rate)
    colours = list(attributes.colours)
    for cue, paired in COLOUR_PAIRS:
        together = rng.random() < rate
        others = [colour for colour in COLOURS if colour != paired]
        for i, shape in enumerate(shapes):
            if shape == cue:
                colours[i] = paired if together else pick(rng, others)
    return attributes._replace(shapes=shapes, colours=colours)


def _pair_shapes(rng: np.random.Generator, shapes: list[str], rate: float) -> list[str]:
    present = [pair for pair in SHAPE_PAIRS if pair[0] in shapes]
    if not present:
        return shapes
    cue, partner = pick(rng, present)
    other_cues = {other for other, _ in present if other != cue}
    together = rng.random() < rate
    removed = other_cues if together else other_cues | {partner}
    shapes = [pick(rng, _NEUTRAL) if shape in removed else shape for shape in shapes]
    if together and partner not in shapes:
        free = [i for i, shape in enumerate(shapes) if shape != cue]
        # With nothing but cues there, all but the first may change.
        shapes[pick(rng, free or range(1, len(shapes)))] = partner
    return shapes
