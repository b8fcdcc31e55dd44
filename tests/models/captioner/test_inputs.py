"""What captioners say to sizes and inputs that do not fit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel.models import Processor, word_tokenizer
from jaxrel.models.captioner import Captioner, CaptionerConfig
from tests.errors import error
from tests.zoo.captioners import (
    CONFIG,
    REGIONS,
    RESNET,
    TEXTS,
    WORDS,
    captioner,
    processor,
    random_regions,
)
from tests.zoo.images import random_images


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "lstm"}, r"captioner: kind must be one of adaptive, gridtd, aoa, got 'lstm'"),
        ({"attention": "coded"}, r"attention must be one of paper, as coded, got 'coded'"),
        ({"dtype": "float16"}, r"dtype must be one of float32, bfloat16, got 'float16'"),
        ({"hidden": 0}, r"captioner: hidden must be a positive integer, got 0"),
        ({"embed": True}, r"captioner: embed must be a positive integer, got True"),
        ({"context": 2}, r"context is 2: start, one word and end need at least 3"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must be at least 0 .* got -0.1"),
        ({"kind": "aoa", "heads": 3}, r"hidden 8 is not a multiple of its 3 heads"),
        ({"encoder": None}, r"give encoder= for images, or encoder=None and regions=.*None"),
        ({"regions": (4, 6)}, r"got encoder VGGConfig.* and regions \(4, 6\)"),
        (REGIONS | {"regions": (4, 0)}, r"regions must be a positive integer, got 0"),
        ({"image_size": 2}, r"vgg: an image of 2 x 2 pixels is too small"),
    ],
)
def test_configurations_that_do_not_fit(changes, match):
    with error(match):
        replace(CONFIG, **changes)


def test_sizes_are_stored():
    for config in (CONFIG, replace(CONFIG, **REGIONS), replace(CONFIG, encoder=RESNET)):
        stored = json.loads(json.dumps(config.to_dict()))
        assert CaptionerConfig.from_dict(stored) == config
    assert replace(CONFIG, **REGIONS).positions == 4
    assert (CONFIG.grid, CONFIG.positions, CONFIG.features) == ((4, 4), 16, 6)


def test_a_tokenizer_of_another_model():
    big = Processor(word_tokenizer([*WORDS, "green"], 9))
    with error(r"the tokenizer has 12 tokens and the model 11, which lacks .*: this is the token"):
        nnx.eval_shape(lambda: Captioner(CONFIG, rngs=nnx.Rngs(0), processor=big))


@pytest.mark.parametrize(
    ("wrong", "match", "kind"),
    [
        ({"image": None}, r"must hold image \(or features\), and hold neither", ValueError),
        ({"features": np.zeros((2, 16, 6))}, r"and hold image and features", ValueError),
        ({"text": None}, r"inputs lack text; they hold image\. Make them with", ValueError),
        ({"image": np.zeros((2, 16, 16, 3), np.uint8)}, r"normalised floats, got uint8", TypeError),
        ({"image": np.zeros((2, 8, 8, 3), np.float32)}, r"\[batch, 16, 16, 3\], got", ValueError),
        ({"image": np.zeros((3, 16, 16, 3), np.float32)}, r"3 images and 2 captions", ValueError),
        ({"text": np.zeros((2, 10), np.int32)}, r"at most 9 tokens, got \[2, 10\]", ValueError),
        ({"text": np.zeros((2, 9), np.float32)}, r"integer token ids, got float32", TypeError),
        (
            {"text": np.full((2, 9), 11)},
            r"the id 11, and this model has the ids 0 to 10",
            ValueError,
        ),
        ({"text": np.full((2, 9), -1)}, r"text holds the id -1, and this model has", ValueError),
        ({"heads": np.ones((2, 2), bool)}, r"heads to choose, and .* 'gridtd' has one", ValueError),
    ],
)
def test_inputs_that_do_not_fit(wrong, match, kind):
    model = captioner("gridtd")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    given = {name: x for name, x in {**inputs, **wrong}.items() if x is not None}
    with error(match, kind):
        model(given)


def test_heads_that_do_not_fit():
    model = captioner("aoa")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    for heads in (np.ones((2, 3), bool), np.ones((2, 2))):
        with error(r"heads must be bool \[2, 2\], got (bool \[2, 3\]|float64 \[2, 2\])"):
            model({**inputs, "heads": heads})


def test_regions_that_do_not_fit():
    model, features = captioner("gridtd", **REGIONS), random_regions()
    with error(r"the features of image 0 are float32 \[5, 6\], and this model reads floats \[4, 6"):
        model.prepare(image=[np.zeros((5, 6), np.float32)], text=TEXTS[0])
    with error(r"the features of image 1 are float32 \[3, 6\].*zeros where there are fewer"):
        model.prepare(image=[features[0], features[1, :3]], text=TEXTS)
    with error(r"the features of image 0 are <U1 \[1\]"):
        model.prepare(image=[["x"]], text=TEXTS)
    for none in (None, []):
        with error(r"no features: pass image= those of the regions, \[4, 6\] for each image"):
            model.prepare(image=none, text=TEXTS)
    nan = features.copy()
    nan[1, 2, :2] = np.nan
    text = model.prepare(image=features, text=TEXTS)["text"]
    with error(r"the features of image 1 have 2 values that are NaN or infinite"):
        model.prepare(image=nan, text=TEXTS)
    with error(r"the features of image 1 have 2 values that are NaN or infinite"):
        model({"features": nan, "text": text})
    with error(r"features must have shape \[batch, 4, 6\], got \[2, 4, 5\]"):
        model({"features": features[..., :5], "text": text})
    with error(r"features must be finite floats, got int64", TypeError):
        model({"features": features.astype(int), "text": text})
    with error(r"inputs must hold features, and hold image"):
        model({"image": np.zeros((2, 16, 16, 3), np.float32), "text": text})
    with error(r"this model has no encoder: it reads features of regions"):
        model.encode(jnp.zeros((2, 16, 16, 3)))


def test_captions_that_do_not_fit():
    model = captioner("gridtd")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    image = random_images(1)
    with error(r"does not know 'Green', 'dog' in the caption 'a Green circle, dog'; it knows 11"):
        model.prepare(image=image, text=["a red circle", "a Green circle, dog"])
    with error(r"does not know 'cat' in the caption 'cat'"):
        model.prepare(image=image, text="cat")
    # Unknown punctuation is no word.
    comma = model.prepare(image=image, text="red, blue")["text"]
    assert comma[0, :6].tolist() == [2, 5, 1, 6, 3, 0]
    with error(r"the text is empty"):
        model.prepare(image=image, text=["a circle", " "])
    with error(r"has 10 tokens with its start and end token, .* at most 9: shorten it by 1"):
        model.prepare(image=image, text=" ".join(["red"] * 8))
    with error(r"text must be a string or a list of strings", TypeError):
        model.prepare(image=image, text=3)
    with error(r"text must be a string or a list of strings", TypeError):
        model.prepare(image=image, text=["red", 3])
    with error(r"no image: pass image="):
        model.prepare(text="a circle")
    with error(r"the caption of image 1 has words 1 to 3, and no word 4"):
        model.pairs(inputs, 4)
    for target in ("circle", 1.5, [], [[1]]):
        with error(r"target must be the position of a word in its caption, from 1"):
            model.pairs(inputs, target)
    empty = inputs["text"].at[1].set(jnp.array([2, 3, *[0] * 7]))
    with error(r"the caption of image 1 has no words"):
        model.pairs({**inputs, "text": empty})
    with error(r"2 images and 1 captions: give one caption per image"):
        model.pairs({**inputs, "text": inputs["text"][:1]})
    with error(r"which word of the caption\? Pass target= its position"):
        model.score(inputs)
    plain = nnx.clone(model)
    plain.processor = Processor(None, processor().images)
    with error(r"this model has no tokenizer, and does not know how captions start"):
        plain.prepare(image=image)
    with error(r"this model has no tokenizer: its folder holds no tokenizer.json"):
        plain.prepare(image=image, text="a circle")
