"""Small random CLIPmappers."""

import functools

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from jaxrel.models import (
    CLIPConfig,
    CLIPMapperCaption,
    CLIPMapperConfig,
    CLIPMapperVQA,
    Processor,
    TextConfig,
    VisionConfig,
    image_processing,
    word_tokenizer,
)

WORDS = ("a", "red", "blue", "circle", "square", "above", "what", "is")
STAGE1 = CLIPConfig(
    vision=VisionConfig(width=16, layers=2, heads=2, mlp_width=32, image_size=16, patch_size=8),
    text=TextConfig(
        width=12, layers=2, heads=3, mlp_width=24, vocab_size=12, context=9, eos_token_id=3
    ),
    projection=4,
)
ANSWERS = ("red", "blue", "two", "yes")
# Two texts of different length: 7 and 5 of the 9 tokens are no padding.
TEXTS = ["what is a red circle", "a blue square"]
# float32 values of order 1 to 10 after a few layers, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}
FORWARD = jax.jit(lambda model, inputs: model(inputs, return_attention=True))


@functools.cache
def processor():
    return Processor(word_tokenizer(WORDS, STAGE1.text.context), image_processing(16))


def random_values(make, seed=0, scale=0.5):
    """A model with values from NumPy, which needs no compilation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype),
        nnx.eval_shape(make),
    )


def random_mapper(task, layers, stage1=STAGE1, processor=processor):
    config = CLIPMapperConfig(
        task=task,
        clip=stage1,
        answers=ANSWERS if task == "vqa" else (),
        width=16,
        layers=layers,
        heads=2,
        mlp_width=24,
    )
    kind = CLIPMapperVQA if task == "vqa" else CLIPMapperCaption
    return random_values(lambda: kind(config, rngs=nnx.Rngs(0), processor=processor()))


def answered(inputs):
    return {**inputs, "answer": jnp.array([2, 0])}


def values(model):
    return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
