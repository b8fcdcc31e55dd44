"""The methods of `explain`, by the family of the model, and what is asked of a model at once."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxrel import attention
from jaxrel.attention.methods import TABLE
from jaxrel.flags import Flag
from jaxrel.propagation import composites, rules
from jaxrel.propagation.composites import Composite, everything, op

# What is propagated to the embedded tokens, and there summed over features.
BY_RULES = {
    "lrp": composites.attn_lrp(),
    "cp_lrp": composites.cp_lrp(),
    "input_x_gradient": Composite([(everything(), rules.Gradient())]),
}
# Of image encoders of convolutions: ZPlus for these, the rest as AttnLRP has it.
_ZPLUS = Composite([(op("conv"), rules.ZPlus())])
BY_RULES_OF_CONVOLUTIONS = {
    "lrp": _ZPLUS + BY_RULES["lrp"],
    "cp_lrp": _ZPLUS + BY_RULES["cp_lrp"],
    "input_x_gradient": BY_RULES["input_x_gradient"],
}
# Of models whose image encoder has no attention over tokens.
CONVOLUTIONAL_METHODS = ("grad_cam", *BY_RULES_OF_CONVOLUTIONS)
# Of models whose streams attend to themselves alone.
METHODS = (*attention.METHODS, *attention.ENCODER_METHODS, *BY_RULES)
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

# What the relevance of each method means, for readers who have not met it.
MEANINGS = {
    "weighted": "The attention of all layers, times the gradient of the score, accumulated from "
    "layer to layer; each layer counts as much as it changes the tokens.",
    "equal": "The attention of all layers, times the gradient of the score, accumulated from layer "
    "to layer; attention and the path around it count alike.",
    "raw": "The last layer's attention, averaged over its heads. It is the same for every target.",
    "rollout": "The attention of all layers, multiplied up. It is the same for every target.",
    "grad_cam": "The last maps, weighted by the gradient of the score; what speaks against the "
    "score is left out.",
    "no_aggregation": "As equal, but a layer does not hand on what the layers below gathered.",
    "transformer_attribution": "As equal, with the relevance of the attention by LRP in the place "
    "of the attention.",
    "equal_lrp": "As equal, with the relevance of the attention by LRP in its place.",
    "partial_lrp": "The relevance of the last layer's attention by LRP, averaged over its heads.",
    "token_tm": "The attention of all layers, times the gradient of the score, accumulated from "
    "layer to layer; each layer counts as much as it changes the tokens in length and direction.",
    "legrad": "Where the score that each layer's own tokens would get is sensitive to the layer's "
    "attention, averaged over layers; what speaks against the score is left out.",
    "grad_eclip": "What the last layer's attention could take of each token for the score, by the "
    "gradient, weighted by how alike its key and the reading token's query are.",
    "lrp": "The score, handed back from operation to operation to the input by the rules of "
    "layer-wise relevance propagation; the model's constants and the rules may keep a part of it "
    "on the way. Positive parts raise the score, negative ones lower it.",
    "cp_lrp": "As lrp, but attention maps count as constants.",
    "input_x_gradient": "Each input value times the gradient of the score: what a small relative "
    "change of it would change.",
    "gradient": "The gradient of the score: where a small change would raise or lower it most.",
    "guided_backprop": "The gradient of the score, of which each ReLU lets only positive parts "
    "through. It shows edges, and is nearly the same for every target.",
    "guided_grad_cam": "The product of guided_backprop and grad_cam.",
    "attention": "Where the model attended when it wrote the word, averaged over heads.",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that are explained by the same methods.

    Attributes:
      methods: their names.
      usual: the one that is used when none is named.
      signed: those whose relevance may be negative.
      by_rules: those that propagate by rules, and their rules.
      what: what an error calls a method.
    """

    methods: tuple[str, ...]
    usual: str
    signed: frozenset[str]
    by_rules: Mapping[str, Composite] = dataclasses.field(default_factory=lambda: BY_RULES)
    what: str = "method"


UNIMODAL = Family(METHODS, "weighted", SIGNED)
BIMODAL = Family(BIMODAL_METHODS, "weighted", SIGNED)
CONVOLUTIONAL = Family(
    CONVOLUTIONAL_METHODS,
    "grad_cam",
    SIGNED,
    BY_RULES_OF_CONVOLUTIONS,
    "method of a model that has no attention over an image's tokens",
)
WORD_BY_WORD = Family(WORD_METHODS, "lrp", SIGNED_WORDS)


def family(model: Any) -> Family:
    """The family of a model, which its `layout` tells (see `Explainable`)."""
    layout = model.layout
    if getattr(layout, "by_word", False):
        return WORD_BY_WORD
    if any(getattr(stream, "features", "") for stream in layout.streams):
        return CONVOLUTIONAL
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
    sinks: Any = None
