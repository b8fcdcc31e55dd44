"""What is explained: six networks with random weights, and by which methods."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from jaxrel import Composite, composites, op, rules
from tests.benchmarks import captioner, clip_attention, lrp, lrp_models
from tests.benchmarks.clip_attention import CLIP, CLIPConfig

ATTENTION, GRAD_CAM, INTEGRATED = "attention relevance", "Grad-CAM", "integrated gradients"
STEPS = 4  # of integrated gradients
WORD = 10  # of the captioner, with all words before it

CONVOLUTIONAL = {
    "epsilon": lrp.CONVOLUTIONAL["epsilon"],
    "z+": lrp.CONVOLUTIONAL["epsilon_plus"],
    "gamma": Composite([(op("conv"), rules.Gamma(lrp.GAMMA))]) + composites.epsilon_plus(),
    "alpha-beta": lrp.CONVOLUTIONAL["epsilon_alpha2_beta1"],
}
TRANSFORMER = {
    "AttnLRP": lrp.TRANSFORMER["attn_lrp"],
    "CP-LRP": lrp.TRANSFORMER["cp_lrp"],
    "gamma": lrp.TRANSFORMER["cp_lrp, gamma"],
}
# CLIP's MLPs have no name of their own by which Gamma could choose them.
CLIP_RULES = {name: TRANSFORMER[name] for name in ("AttnLRP", "CP-LRP")}
CAPTIONING = {"alpha-beta": composites.captioning()}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, its arguments, and what of it is explained.

    Args:
      name: one of `NETWORKS`.
      fun: (params, x) -> [batch, classes].
      params: the weights, as dicts or a Flax module.
      x: what is explained: images, or embedded words.
      classes: which class of each example, [batch].
      rules: composites by method.
      features: the tag that Grad-CAM explains; None for none.
      token: whose row attention relevance is; None where there is no attention relevance.
      options: what else the network knows.
    """

    name: str
    fun: Callable
    params: Any
    x: Any
    classes: np.ndarray
    rules: Mapping[str, Composite]
    features: str | None = None
    token: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build(name: str, tiny: bool) -> Network:
    """One of `NETWORKS`, with tiny sizes or those published."""
    return NETWORKS[name](name, tiny)


def methods(name: str) -> tuple[str, ...]:
    """The methods that a network is explained by, the first those of attention."""
    attention = (ATTENTION,) if name in (CLIP_B32, VIT, DECODER) else ()
    cam = () if name == DECODER else (GRAD_CAM,)
    return (*attention, *RULES[name], *cam, INTEGRATED)


def plain(name: str, tiny: bool) -> Network:
    """One of `lrp_models`."""
    made = lrp_models.build(name, batch=BATCH[name], quick=tiny)
    depth = len(made.params["layers"]) if name == VIT else 0
    features = {"VGG16": "stages/4", "ResNet-50": "blocks", VIT: f"norm1/{depth - 1}"}
    classes = np.arange(len(made.x))
    token = {VIT: 0, DECODER: -1}.get(name)
    return Network(
        name,
        made.fun,
        made.params,
        made.x,
        classes,
        RULES[name],
        features.get(name),
        token,
        made.options,
    )


def clip(name: str, tiny: bool) -> Network:
    """CLIP: the score of an image with the embedding of a text; for attention, of both."""
    config = clip_attention.TINY if tiny else CLIPConfig()
    model = CLIP(config, rngs=nnx.Rngs(0))
    inputs = clip_attention.random_inputs(config, BATCH[name])
    scale = jnp.exp(model.logit_scale[...])
    texts = np.asarray(jax.jit(lambda model, text: model.encode_text(text))(model, inputs["text"]))
    fun = partial(clip_score, texts=np.asarray(scale) * texts)
    classes = np.zeros(BATCH[name], np.int64)
    features, options = "vision/before", {"inputs": inputs, "texts": np.asarray(scale) * texts}
    x = jnp.asarray(inputs["image"])
    return Network(name, fun, model, x, classes, RULES[name], features, 0, options)


def clip_score(model: CLIP, image: Any, *, texts: np.ndarray) -> Any:
    """Similarities [batch, 1] of images and embedded texts."""
    return jnp.sum(model.encode_image(image) * texts, axis=-1, keepdims=True)


def captions(name: str, tiny: bool) -> Network:
    """The captioner with multi-head attention: the logit of one word of a caption."""
    model, inputs = captioner.model_and_inputs("aoa", tiny)
    text = np.asarray(inputs["text"])[:, : WORD + 1]
    fun, classes = partial(word_score, text=text), np.zeros(len(text), np.int64)
    options = {"text": text}
    image = inputs["image"]
    return Network(name, fun, model, image, classes, RULES[name], "features", options=options)


def word_score(model: Any, image: Any, *, text: np.ndarray) -> Any:
    """The logit [batch, 1] of the last word of `text`, given those before it."""
    return model.score({"image": image, "text": text}, text.shape[1] - 1)[:, None]


def by_patch(tokens: Any) -> Any:
    """The tokens after the first, [batch, 1 + patches, width], as a square grid of channels."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].reshape(len(tokens), side, side, tokens.shape[-1])


CLIP_B32, VIT, DECODER, CAPTIONER = "CLIP ViT-B/32", "ViT-B/16", "12-layer decoder", "captioner"
NETWORKS: Mapping[str, Callable[[str, bool], Network]] = {
    CLIP_B32: clip,
    VIT: plain,
    "VGG16": plain,
    "ResNet-50": plain,
    DECODER: plain,
    CAPTIONER: captions,
}
BATCH = {CLIP_B32: 2, VIT: 1, "VGG16": 1, "ResNet-50": 2, DECODER: 2, CAPTIONER: 1}
RULES = {
    CLIP_B32: CLIP_RULES,
    VIT: TRANSFORMER,
    "VGG16": CONVOLUTIONAL,
    "ResNet-50": CONVOLUTIONAL,
    DECODER: TRANSFORMER,
    CAPTIONER: CAPTIONING,
}
METHODS_OF = {name: methods(name) for name in NETWORKS}
