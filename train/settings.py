"""The settings of the recipes: one dataclass per experiment, every field a command-line option."""

import dataclasses
from typing import Any


def _setting(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class ClipShapes:
    """Settings of the recipe `clip-shapes`; `jaxrel train clip-shapes --help` lists them.

    Raises:
      ValueError: a setting is out of range.
    """

    seed: int = _setting(0, "of the parameters and of the order of examples")
    data_seed: int = _setting(0, "of the Shapes data set")
    scenes: int = _setting(60_000, "training scenes, drawn once and kept in memory")
    steps: int = _setting(3_000, "of the optimiser")
    batch: int = _setting(128, "pictures per step, each with one caption")
    learning_rate: float = _setting(1e-3, "the highest; it falls to 0 as a cosine")
    warmup: int = _setting(200, "steps until the highest learning rate")
    weight_decay: float = _setting(0.1, "of AdamW")
    full: float = _setting(0.6, "share of captions that name every object")
    width: int = _setting(128, "features per token, in both towers")
    vision_layers: int = _setting(4, "layers of the image tower")
    text_layers: int = _setting(2, "layers of the text tower")
    heads: int = _setting(4, "attention heads")
    patch_size: int = _setting(8, "pixels of a side of a patch")
    context: int = _setting(34, "tokens of the longest text")
    projection: int = _setting(128, "features of the common space")
    log_every: int = _setting(50, "steps between two lines of the log")

    def __post_init__(self):
        for name in ("scenes", "steps", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"clip-shapes: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.batch > self.scenes:
            raise ValueError(
                f"clip-shapes: batch {self.batch} is more than the {self.scenes} scenes"
            )
        if self.context < 32:
            raise ValueError(
                f"clip-shapes: context must be at least 32, for captions of 29 words and their "
                f"ends, got {self.context}"
            )
        if not 0 <= self.full <= 1:
            raise ValueError(f"clip-shapes: full must be from 0 to 1, got {self.full}")


SETTINGS: dict[str, type] = {"clip-shapes": ClipShapes}
