"""Captioned images whose explanations are known: the light is what every word names."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel.models import Processor, image_processing, word_tokenizer
from jaxrel.models.captioner import Captioner, CaptionerConfig
from jaxrel.models.vision import VGGConfig
from jaxrel.train.data.shapes import vocabulary
from jaxrel.train.evaluate import explained_words
from jaxrel.train.evaluate.caption_explanations import RANDOM, Settings, judge
from jaxrel.train.evaluate.captioned_images import Word

SIDE, CONTEXT = 32, 10
VOCABULARY = vocabulary()
QUICK = Settings(resamples=200)
ENCODER = VGGConfig(((4,), (5,), (6,)))


@functools.cache
def captioner(kind="adaptive", words=VOCABULARY, side=SIDE, seed=0, **changes):
    """A small model with parameters from NumPy, which needs no compilation."""
    processor = Processor(word_tokenizer(words, CONTEXT), image_processing(side))
    config = CaptionerConfig(
        kind=kind,
        encoder=ENCODER,
        image_size=side,
        vocab_size=len(processor.tokenizer),
        embed=5,
        hidden=8,
        heads=2,
        context=CONTEXT,
    )
    config, rng = replace(config, **changes), np.random.default_rng(seed)
    model = nnx.eval_shape(lambda: Captioner(config, rngs=nnx.Rngs(0), processor=processor))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), "float32"), model)


class Lights:
    """Black images with a light rectangle, and every word of a caption names it.

    In every other pair of images the rectangle is bright and words are true; in the others it
    is dim and they are hallucinated.
    """

    name, groups, frequent = "Lights", ("thing",), ("a", "star")

    def __init__(self, count):
        rng = np.random.default_rng(0)
        self.masks_of = np.zeros((count, 2, SIDE, SIDE), bool)
        for mask in self.masks_of[:, 0]:
            left, top = rng.integers(0, SIDE - 12, 2)
            width, height = rng.integers(4, 12, 2)
            mask[top : top + height, left : left + width] = True

    def __len__(self):
        return len(self.masks_of)

    def true(self, i):
        return i // 2 % 2 == 0

    def image(self, i):
        light = 255 if self.true(i) else 128
        return np.repeat(self.masks_of[i, 0, ..., None] * np.uint8(light), 3, axis=-1)

    def masks(self, i):
        return self.masks_of[i]

    def words(self, i, caption):
        return [Word(k + 1, word, "thing", self.true(i), (0,)) for k, word in enumerate(caption)]

    def references(self, i):
        return [["a", "star"], ["a", "dim", "square"]]

    def corpus(self):
        return [self.references(i) for i in range(len(self))]

    def forms(self, caption):
        return list(caption)

    def vocabulary(self, group):
        return VOCABULARY


def light(model, inputs, positions, *, method):
    """In place of `word_relevance`: the image's light, and maps that know nothing."""
    brightness = (inputs["image"].mean(-1) + 1) / 2
    shape, batch = (*positions.shape, SIDE, SIDE), len(positions)
    oracle = jnp.broadcast_to(brightness[:, None], shape)
    grid = jnp.ones((*positions.shape, 8, 8))
    words = jnp.broadcast_to(
        jnp.arange(1.0, CONTEXT + 1), (batch, positions.shape[1], inputs["text"].shape[1])
    )
    known = {"lrp": oracle, "gradient": -oracle, "attention": grid}
    return jnp.zeros(positions.shape), {one: (known[one], words) for one in method}


def judge_lights(batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explained_words, "word_relevance", light)
        methods = ("lrp", "gradient", "attention", RANDOM)
        return judge(captioner(), Lights(20), methods=methods, batch=batch, words=5, settings=QUICK)
