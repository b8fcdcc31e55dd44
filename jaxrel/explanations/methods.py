"""The methods of `explain`, by the family of the model, and what is asked of a model at once."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxrel import attention
from jaxrel.attention.methods import TABLE
from jaxrel.flags import Flag
from jaxrel.propagation import composites, rules
from jaxrel.propagation.composites import Composite, everything

# What is propagated to the embedded tokens, and there summed over features.
BY_RULES = {
    "lrp": composites.attn_lrp(),
    "cp_lrp": composites.cp_lrp(),
    "input_x_gradient": Composite([(everything(), rules.Gradient())]),
}
# Of models whose streams attend to themselves alone.
METHODS = (*attention.METHODS, *BY_RULES)
# Of models whose streams attend to each other.
BIMODAL_METHODS = (*attention.BIMODAL_METHODS, *BY_RULES)
SIGNED = frozenset({*(one.name for one in TABLE.values() if one.signed), *BY_RULES})
LAST_LAYER = frozenset(one.name for one in TABLE.values() if one.layers == "last")

# Of models that explain captions word by word.
WORD_METHODS = (
    "lrp",
    "gradient",
    "input_x_gradient",
    "guided_backprop",
    "grad_cam",
    "guided_grad_cam",
    "attention",
)
# The maps of "grad_cam" are not negative, its words may be.
SIGNED_WORDS = frozenset(WORD_METHODS) - {"attention"}


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that are explained by the same methods.

    Attributes:
      methods: their names.
      usual: the one that is used when none is named.
      signed: those whose relevance may be negative.
    """

    methods: tuple[str, ...]
    usual: str
    signed: frozenset[str]


UNIMODAL = Family(METHODS, "weighted", SIGNED)
BIMODAL = Family(BIMODAL_METHODS, "weighted", SIGNED)
WORD_BY_WORD = Family(WORD_METHODS, "lrp", SIGNED_WORDS)


def family(model: Any) -> Family:
    """The family of a model, which its `layout` tells (see `Explainable`)."""
    layout = model.layout
    if getattr(layout, "by_word", False):
        return WORD_BY_WORD
    return BIMODAL if getattr(layout, "schedule", ()) else UNIMODAL


def computed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A model's inputs without "spelling", which is only displayed.

    It is as long as the longest word, and a program would be compiled for each length.
    """
    return {name: value for name, value in inputs.items() if name != "spelling"}


@runtime_checkable
class Detector(Protocol):
    """What flags words by their maps, such as `jaxrel.metrics.Detector`."""

    def flags(self, method: str, words: Sequence[str], maps: Any) -> Sequence[Flag | None]:
        """A flag per word, None for a word that is not judged; empty where none is.

        Args:
          method: the method that made the maps.
          words: the words, as they are written.
          maps: a map per word in the image's pixels, `[words, height, width]`.
        """


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a model: the arguments of `jaxrel.explain` that choose the explanation."""

    methods: tuple[str, ...]
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    importance: str = "grad_value"
    lrp: Any = None
    detector: Detector | None = None
