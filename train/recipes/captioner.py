"""What all recipes of captioners share: their settings, their sizes and the optimiser.

They are those of Sun et al. 2022: Adam, each component of the gradient bounded, and the
cross-entropy of every word given the true ones before it. The learning rate falls as a cosine,
by steps; there it falls when the validation captions get no better. "The paper" in the help texts
is theirs.
"""

import dataclasses
from typing import Any, ClassVar

from jaxrel.models.captioner import CaptionerConfig
from jaxrel.models.vision import PRESETS, EncoderConfig, VGGConfig
from jaxrel.train.recipes.settings import Training, setting

_DECAY = "from 0 to below 1"


@dataclasses.dataclass(frozen=True)
class Adam(Training):
    """The optimiser's settings, of captioners and of those that are fine-tuned."""

    batch: int = setting(
        32, "images per step, each with one caption (the paper's: 32)", "at least 1"
    )
    learning_rate: float = setting(
        5e-4,
        "highest learning rate; it falls to 0 as a cosine (the paper's: 5e-4, less on a plateau)",
        "positive",
    )
    warmup: int = setting(
        100, "steps until the highest learning rate (the paper's: 0)", "0 or more"
    )
    clamp: float = setting(
        0.1,
        "bound on each component of the gradient (the paper's: 0.1)",
        "positive (inf: no bound)",
    )

    def optimiser(self) -> dict[str, Any]:
        """Adam with bounded gradients, slower in the encoder if the recipe says so."""
        rate = getattr(self, "encoder_rate", None)
        factors = {} if rate is None else {"model/encoder": rate}
        b1, b2 = self.decays()
        return {"clip": None, "clamp": self.clamp, "b1": b1, "b2": b2, "factors": factors}

    def decays(self) -> tuple[float, float]:
        """Adam's decays of both moments, the paper's if they are no settings."""
        return 0.8, 0.999


@dataclasses.dataclass(frozen=True)
class NewCaptioner(Adam):
    """What all recipes of captioners have in common that are not fine-tuned."""

    kind: ClassVar[str]

    b1: float = setting(0.8, "Adam's decay of the first moment (the paper's: 0.8)", _DECAY)
    b2: float = setting(0.999, "Adam's decay of the second moment (the paper's: 0.999)", _DECAY)
    embed: int = setting(512, "features of a word (the paper's: 512)")
    hidden: int = setting(512, "features of states and attended values (the paper's: 512)")
    context: int = setting(32, "tokens of the longest caption, with start and end")

    def decays(self) -> tuple[float, float]:
        """Adam's decays of both moments."""
        return self.b1, self.b2


@dataclasses.dataclass(frozen=True)
class GridTD:
    """The settings of captioners with adaptive attention and two LSTMs."""

    kind: ClassVar[str] = "gridtd"

    dropout: float = setting(0.5, "dropout before a word is predicted (the paper's: 0.5)")
    attention: str = setting(
        "paper", "form of the attention scores: paper, or 'as coded' by its authors"
    )


@dataclasses.dataclass(frozen=True)
class AoA:
    """The settings of captioners with multi-head attention behind a gate."""

    kind: ClassVar[str] = "aoa"

    dropout: float = setting(0.3, "dropout before a word is predicted (the paper's: 0.3)")
    heads: int = setting(8, "attention heads (the paper's: 8)")
    attention_dropout: float = setting(0.1, "dropout of the attention maps (the paper's: 0.1)")


# Sizes that some recipes have as a setting; the others keep the model's default.
_SIZES = (
    "kind",
    "image_size",
    "embed",
    "hidden",
    "heads",
    "attention",
    "dropout",
    "attention_dropout",
    "context",
    "dtype",
)


def read_encoder(text: str) -> EncoderConfig:
    """Read the sizes of an encoder from a setting.

    Args:
      text: the name of a preset, such as "vgg16", or the channels of a VGG's convolutions, with
        a comma where a pooling is: "32-32,64-64" is `VGGConfig(((32, 32), (64, 64)))`.

    Raises:
      ValueError: it is neither.
    """
    if text in PRESETS:
        return PRESETS[text]
    try:
        return VGGConfig(tuple(tuple(map(int, stage.split("-"))) for stage in text.split(",")))
    except ValueError:
        raise ValueError(
            f"encoder must be one of {', '.join(PRESETS)}, or the channels of a VGG's "
            f"convolutions, with a comma where a pooling is, such as 32-32,64-64; got {text!r}"
        ) from None


def new_config(recipe: Any, **sizes: Any) -> CaptionerConfig:
    """The sizes of a recipe's model.

    Args:
      recipe: the settings.
      **sizes: those that are no settings.

    Raises:
      ValueError: a size is out of range; see `CaptionerConfig`.
    """
    chosen = {name: getattr(recipe, name) for name in _SIZES if hasattr(recipe, name)}
    return CaptionerConfig(**(chosen | sizes), encoder=read_encoder(recipe.encoder))
