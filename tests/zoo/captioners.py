"""Captioners: small random ones, and those with the weights of the reference implementation."""

import functools
from dataclasses import replace

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from jaxrel.models import Processor, image_processing, word_tokenizer
from jaxrel.models.captioner import Captioner, CaptionerConfig, reference_order
from jaxrel.models.vision import ResNetConfig, VGGConfig
from tests.paths import FIXTURES

REFERENCES = ("adaptive", "gridtd", "aoa", "gridtd_regions", "aoa_regions")
VGG = VGGConfig(((4, 4), (6,), (8,)))
WORDS = ("a", "red", "blue", "circle", "square", "above", "small")
REGIONS = {"encoder": None, "regions": (4, 6)}
RESNET = ResNetConfig("basic", (2,), (6,), stem=4)
CONFIG = CaptionerConfig(
    encoder=VGGConfig(((4,), (5,), (6,))),
    image_size=16,
    vocab_size=11,
    embed=5,
    hidden=8,
    heads=2,
    context=9,
)
# Two captions of different length: 7 and 5 of the 9 tokens are no padding.
TEXTS = ["a small red circle above", "a blue square"]
# float32 values of order 1 to 10 after a few layers, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}
FORWARD = jax.jit(lambda model, inputs: model(inputs, return_attention=True))
ENCODE = jax.jit(Captioner.encode)


@functools.cache
def load(name):
    with np.load(FIXTURES / f"captioner_{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def reference_config(name):
    kind, regions = name.split("_")[0], name.endswith("regions")
    return CaptionerConfig(
        kind=kind,
        encoder=None if regions else VGG,
        regions=(6, 12) if regions else None,
        image_size=16,
        vocab_size=20,
        embed=8,
        hidden=8,
        heads=2,
        attention="as coded",
        context=12,
    )


def tensors(name):
    return {k.removeprefix("w/"): x for k, x in load(name).items() if k.startswith("w/")}


@functools.cache
def reference(name):
    """A model with the weights of the reference implementation, and its inputs."""
    arrays = load(name)
    # The list is <pad>, the words, <unk>, <start>, <end>.
    tokenizer = word_tokenizer(arrays["word_list"][1:-3].tolist(), 12)
    model = Captioner.from_reference(
        reference_config(name), tensors(name), processor=Processor(tokenizer, processor().images)
    )
    ids = np.argsort(reference_order(20))[arrays["caps"]]
    seen = {"features": arrays["region_features"]} if "region_features" in arrays else {}
    if "images" in arrays:
        seen = {"image": arrays["images"].transpose(0, 2, 3, 1)}
    length = arrays["fwd/predictions"].shape[1]
    return model, {**seen, "text": ids[:, :length].astype(np.int32)}


@functools.cache
def processor():
    return Processor(word_tokenizer(WORDS, CONFIG.context), image_processing(16))


@functools.cache
def captioner(kind, **changes):
    """A model with values from NumPy, which needs no compilation."""
    config = replace(CONFIG, kind=kind, **changes)
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: Captioner(config, rngs=nnx.Rngs(0), processor=processor()))

    def value(path, leaf):
        x = 0.5 * rng.normal(size=leaf.shape)
        # A variance is positive.
        return jnp.asarray(np.abs(x) + 0.5 if "var" in jax.tree_util.keystr(path) else x, "float32")

    return jax.tree_util.tree_map_with_path(value, model)


def random_regions(count=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 4, 6)).astype(np.float32)


def biased(model, **added):
    """A model that likes some tokens more."""
    model = nnx.clone(model)
    ids = {"pad": 0, "unknown": 1, "start": 2, "end": 3}
    for name, bias in added.items():
        model.head.bias.set_value(model.head.bias[...].at[ids[name]].add(bias))
    return model


def flat(module):
    paths = nnx.to_flat_state(nnx.state(module, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in paths}
