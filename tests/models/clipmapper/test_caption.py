"""CLIPmapper that writes captions."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel import models
from jaxrel.models import CLIPMapperCaption, Processor, word_tokenizer
from jaxrel.models.transformer import key_mask
from jaxrel.train.data.shapes import Shapes
from tests.errors import error
from tests.zoo.clipmappers import FORWARD, STAGE1, TEXTS, WORDS, processor, random_mapper, values
from tests.zoo.images import random_images


def test_later_words_change_no_earlier_logit(caption, inputs):
    logits, _ = FORWARD(caption, inputs)
    changed = {**inputs, "text": inputs["text"].at[:, 4].set(9)}
    other, _ = FORWARD(caption, changed)
    np.testing.assert_array_equal(other[:, :4], logits[:, :4])
    assert np.abs(other[:, 4] - logits[:, 4]).min() > 0


def test_log_probability_and_score(caption, inputs, monkeypatch):
    logits, _ = FORWARD(caption, inputs)
    monkeypatch.setattr(CLIPMapperCaption, "__call__", lambda *_: logits)
    text, logp = np.asarray(inputs["text"]), np.asarray(jax.nn.log_softmax(logits))
    expected = []
    for b, length in enumerate((7, 5)):
        words = [logp[b, i - 1, text[b, i]] for i in range(1, length)]
        expected.append(np.mean(words))
    np.testing.assert_allclose(caption.log_probability(inputs), expected, rtol=1e-5)
    expected = [logits[0, 4, text[0, 5]], logits[1, 2, text[1, 3]]]
    np.testing.assert_array_equal(caption.score(inputs, np.array([5, 3])), expected)
    of_words = caption.score({**inputs, "position": jnp.array([5, 3])})
    np.testing.assert_array_equal(of_words, expected)


def with_bias_of_the_end(caption, bias):
    model = nnx.clone(caption)
    # Start and padding are tempting too, and never written.
    model.head.bias.set_value(
        model.head.bias[...].at[jnp.array([0, 2, 3])].add(jnp.array([3.0, 3.0, bias]))
    )
    return model


LOGITS = jax.jit(lambda model, inputs: model(inputs))
GENERATE = jax.jit(lambda model, image, keep=None: model.generate(image, keep))


def greedy(model, image, keep=None):
    """One word after the other, each from all tokens; after the words lie some that are no words.

    Start, end and padding are 2, 3 and 0, as `word_tokenizer` has them.
    """
    sizes = model.config.clip.text
    words = np.array([token for token in range(sizes.vocab_size) if token not in (0, 2)])
    text = np.full((len(image), sizes.context), 7, np.int32)
    text[:, 0] = 2
    ended = np.zeros(len(image), bool)
    for i in range(1, sizes.context):
        logits = LOGITS(model, {"image": image, "text": jnp.asarray(text), "image_keep": keep})
        best = words[np.asarray(logits)[:, i - 1, words].argmax(-1)]
        best[...] = 3 if i == sizes.context - 1 else best
        text[:, i] = np.where(ended, 0, best)
        ended |= best == 3
    return text


@pytest.mark.parametrize(("bias", "ends"), [(2.5, "early"), (-100, "never")])
def test_generate_is_greedy(caption, bias, ends):
    model = with_bias_of_the_end(caption, bias)
    image = model.prepare(image=random_images(2, seed=1), text=TEXTS)["image"]
    generated = model.prepare(image=random_images(2, seed=1))
    text = np.asarray(generated["text"])
    np.testing.assert_array_equal(text, greedy(model, image))
    np.testing.assert_array_equal(generated["image"], image)
    ended = (text == 3).argmax(-1)
    assert (ended == 8).all() if ends == "never" else (ended < 8).any()
    words = [[token for token in row if token] for row in model.tokens(generated)]
    assert model.predict(generated) == [" ".join(row) for row in words]


def hidden_and_left_out(tokens, kept):
    """The same choice of tokens for two images, as a mask and as indices."""
    indices = np.sort([np.random.default_rng(i).permutation(tokens)[:kept] for i in range(2)])
    return jnp.asarray((indices[..., None] == np.arange(tokens)).any(1)), jnp.asarray(indices)


def test_generate_from_some_patches():
    model = random_mapper("caption", layers=3)
    for path, value in values(model).items():
        # Random biases would choose the words of all images.
        if path[-1] == "bias":
            value.set_value(jnp.zeros_like(value[...]))
    image = jnp.asarray(processor().image(random_images(2, seed=2)))
    mask, indices = hidden_and_left_out(5, 3)
    expected = greedy(model, image, mask)
    np.testing.assert_array_equal(GENERATE(model, image, mask), expected)
    np.testing.assert_array_equal(GENERATE(model, image, indices), expected)
    assert (expected[0] != expected[1]).any()


def test_the_bundled_model_captions_as_without_a_memory():
    model = models.from_pretrained("caption-shapes")
    scenes = [Shapes().scene("test", i).image for i in (0, 1, 0, 1)]
    image = jnp.asarray(model.processor.image(scenes))
    mask, indices = hidden_and_left_out(65, 30)
    some = jnp.concatenate([jnp.ones_like(mask), mask])
    expected = greedy(model, image, some)
    assert len({tuple(row) for row in expected}) == 4
    np.testing.assert_array_equal(GENERATE(model, image, some), expected)
    np.testing.assert_array_equal(GENERATE(model, image[:2], indices), expected[2:])


@pytest.mark.parametrize("layers", [1, 3])
def test_word_by_word_the_logits_are_those_of_all_tokens(layers):
    model = random_mapper("caption", layers)
    image = jnp.asarray(processor().image(random_images()))
    text = jnp.asarray(np.random.default_rng(0).integers(0, 12, (2, 9)))
    mask, _ = hidden_and_left_out(5, 3)

    @jax.jit
    def by_word(model, image, text):
        tokens, _ = model.encode_image(image, mask)

        def step(memory, place):
            logits, memory = model.next_word(text[:, place], memory, place, key_mask(mask))
            return memory, logits

        places = jnp.arange(text.shape[1])
        logits = jax.lax.scan(step, model.begin(tokens, key_mask(mask)), places)[1]
        return logits.swapaxes(0, 1)

    expected = LOGITS(model, {"image": image, "text": text, "image_keep": mask})
    # float32, summed in another order.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(by_word(model, image, text), expected, atol=1e-5 * scale)


def test_generate_knows_the_end_of_old_configurations(caption):
    """There the id 2 stands for the highest id, which is the tokenizer's end token."""
    old = nnx.clone(caption)
    tokenizer = word_tokenizer(WORDS, 9)
    tokenizer.eos_token, tokenizer.pad_token = "is", None
    text = replace(STAGE1.text, eos_token_id=2)
    old.config = replace(caption.config, clip=replace(STAGE1, text=text))
    old.processor = Processor(tokenizer, processor().images)
    old.head.bias.set_value(old.head.bias[...].at[11].add(100))
    assert old.prepare(image=random_images(1))["text"].tolist() == [[2, *[11] * 8]]


def test_pairs_of_words(caption, inputs):
    pairs = caption.pairs({**inputs, "text_keep": jnp.ones((2, 9), bool)})
    assert pairs["position"].tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert pairs["example"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(pairs["text"], inputs["text"][pairs["example"]])
    np.testing.assert_array_equal(pairs["image"], inputs["image"][pairs["example"]])
    assert pairs["text_keep"].shape == (8, 9)
    assert caption.target_tokens(pairs)["text"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert caption.describe(pairs)[4:] == [
        "what is a red [circle]",
        "[a]",
        "a [blue]",
        "a blue [square]",
    ]
    before = [np.flatnonzero(row).tolist() for row in caption.content(pairs)["text"]]
    assert before[3:7] == [[1, 2, 3], [1, 2, 3, 4], [], [1]]
    some = caption.pairs(inputs, [3, 1])
    assert some["position"].tolist() == [3, 1, 3, 1]
    assert caption.pairs(inputs, 2)["position"].tolist() == [2, 2]


def test_captions_that_do_not_fit(caption, inputs):
    with error(r"the caption of image 1 has words 1 to 3, and no word 4"):
        caption.pairs(inputs, 4)
    with error(r"has words 1 to 5, and no word 0"):
        caption.pairs(inputs, [0])
    for target in ("circle", 1.5, [], [[1]]):
        with error(r"target must be the position of a word in its caption, from 1"):
            caption.pairs(inputs, target)
    empty = inputs["text"].at[1].set(jnp.array([2, 3, *[0] * 7]))
    with error(r"the caption of image 1 has no words"):
        caption.pairs({**inputs, "text": empty})
    with error(r"2 images and 1 captions: give one caption per image"):
        caption.pairs({**inputs, "text": inputs["text"][:1]})
    with error(r"which word of the caption\? Pass target= its position"):
        caption.score(inputs)
    plain = nnx.clone(caption)
    plain.processor = Processor(None, processor().images)
    with error(r"this model has no tokenizer, and does not know how captions start"):
        plain.prepare(image=random_images(1))
    with error(r"this model has no tokenizer: its folder holds no tokenizer.json"):
        jaxrel.explain(plain, image=random_images(1), text="a circle")
