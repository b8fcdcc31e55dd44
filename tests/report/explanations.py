"""An explanation to be drawn."""

import numpy as np

from jaxrel.explanations.result import Explanation


def make(**changes):
    rng = np.random.default_rng(0)
    fields = dict(
        target=["a red circle", "a blue square"],
        score=[24.3125, -1.5],
        method="weighted",
        signed=True,
        image=rng.normal(size=(2, 4, 4)),
        text=rng.normal(size=(2, 5)),
        tokens=[["", "a", "red", "cir", "##cle"], ["", "a", "blue", "square", ""]],
        pixels=rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8),
        model="clip-shapes",
        settings="layers 0 to 3",
        report={"seconds": 0.5, "loss": {"bias": 0.25, "layers": [1, 2]}, "streaming": True},
    )
    return Explanation(**(fields | changes))
