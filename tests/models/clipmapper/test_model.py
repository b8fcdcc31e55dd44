"""What both CLIPmappers compute: attention maps, their gradients, masks."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel.models.transformer import causal_mask
from tests.zoo.clipmappers import FORWARD, ROUNDING, STAGE1, answered, random_mapper
from tests.zoo.images import random_images

LENGTH = 7
GRADIENTS = jax.jit(lambda model, inputs: model.attention_gradients(inputs))


# ---- attention maps and their gradients


def shapes(task, layers):
    patches, words = 5, 9
    to_itself = {"image": (patches, patches), "text": (words, words)}
    maps = {"vision": (2, 2, 2, patches, patches), "text": (2, 2, 3, words, words)}
    maps |= {f"{name}_single": (layers, 2, 2, *size) for name, size in to_itself.items()}
    maps |= {"text_to_image": (layers, 2, 2, words, patches)}
    maps |= {"text_self": (layers, 2, 2, words, words)}
    if layers > 1:
        maps |= {"image_self": (layers - 1, 2, 2, patches, patches)}
        if task == "vqa":
            maps |= {"image_to_text": (layers - 1, 2, 2, patches, words)}
    return maps


def test_returned_maps_are_the_tagged_ones(model, inputs):
    logits, maps = FORWARD(model, inputs)
    names = tuple(shapes(model.task, model.config.layers))
    _, tagged = jax.jit(jaxrel.capture(lambda m, x: m(x), names))(model, inputs)
    assert {name: x.shape for name, x in maps.items()} == shapes(model.task, model.config.layers)
    assert set(tagged) == set(maps)
    for name, value in maps.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-5)  # rounding of a softmax
        np.testing.assert_allclose(tagged[name], value, **ROUNDING)
    expected = (2, 4) if model.task == "vqa" else (2, 9, 12)
    assert (logits.shape, logits.dtype) == (expected, jnp.float32)


def python_scan(step, carry, xs):
    outs = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, out = step(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        outs.append(out)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outs)


def test_gradients_by_maps_and_scan_and_remat(vqa, inputs, monkeypatch):
    """What is added to a map in a plain Python loop has the gradient of a scan with remat."""
    model = nnx.clone(vqa)
    model.config = replace(vqa.config, clip=replace(STAGE1, remat=True))
    score, maps, grads = GRADIENTS(model, answered(inputs))

    def by_loop(addends, model, inputs):
        counter = Counter()

        def add(x, name):
            if name not in addends:
                return x
            counter[name] += 1
            return x + addends[name][counter[name] - 1]

        monkeypatch.setattr(jax.lax, "scan", python_scan)
        monkeypatch.setattr("jaxrel.models.transformer.tag", add)
        score = model.score(inputs)
        monkeypatch.undo()
        assert counter == {name: len(x) for name, x in addends.items()}
        return score.sum(), score

    zeros = {name: jnp.zeros(shape) for name, shape in shapes("vqa", 3).items()}
    gradient = jax.jit(jax.grad(by_loop, has_aux=True))
    expected, of_loop = gradient(zeros, vqa, answered(inputs))
    np.testing.assert_allclose(of_loop, score, **ROUNDING)
    assert set(expected) == set(grads) == set(maps)
    for name, value in expected.items():
        scale = np.abs(value).max()
        assert scale > 1e-4
        np.testing.assert_allclose(grads[name], value, rtol=1e-4, atol=1e-4 * scale)


def test_one_layer(inputs):
    """No scan runs, and the maps have their layer axis nevertheless."""
    model = random_mapper("vqa", layers=1)
    _, maps, grads = jax.eval_shape(model.attention_gradients, answered(inputs))
    for found in (maps, grads):
        assert {name: x.shape for name, x in found.items()} == shapes("vqa", 1)


# ---- masks, padding, batch, dtype


def only(model, inputs, patches, words):
    """The logits of the tokens of these indices alone, each at its own position."""

    def take(x, index):
        return jnp.take_along_axis(x, index[..., None], axis=1)

    vision, text = model.vision, model.text
    image = vision.patch_embedding(inputs["image"])
    image = image.reshape(len(image), -1, image.shape[-1])
    first = jnp.broadcast_to(vision.class_embedding[...], (len(image), 1, image.shape[-1]))
    image = jnp.concatenate([first, image], axis=1) + vision.position_embedding[...]
    image, _ = vision.transformer(vision.pre_norm(take(image, patches)))
    embedded = text.token_embedding(inputs["text"]) + text.position_embedding[...]
    causal = causal_mask(words.shape[1])
    tokens, _ = text.transformer(take(embedded, words), causal)
    (_, out), _ = model.mapper(
        model.vision_in(model.vision_norm(image)),
        model.text_in(model.text_norm(tokens)),
        None,
        None if model.task == "vqa" else causal,
    )
    logits = model.head(model.final_norm(out))
    return logits[:, -1] if model.task == "vqa" else logits


def test_hidden_is_removed(model):
    """What is not kept counts as little as if it were not there."""
    inputs = model.prepare(image=random_images(), text=["is a circle", "a blue square"])
    patches, words = jnp.array([[0, 1, 3], [0, 2, 4]]), jnp.array([[0, 2, 4], [0, 1, 4]])
    expected = jax.jit(only)(model, inputs, patches, words)
    rows = jnp.arange(2)[:, None]
    everything = {"image_keep": jnp.ones((2, 5), bool), "text_keep": jnp.ones((2, 9), bool)}
    of_image = {"image_keep": jnp.zeros((2, 5), bool).at[rows, patches].set(True)}
    of_text = {"text_keep": jnp.zeros((2, 9), bool).at[rows, words].set(True)}

    def logits(keep):
        found, _ = FORWARD(model, inputs | everything | keep)
        return found if model.task == "vqa" else found[rows, words]

    both = logits(of_image | of_text)
    np.testing.assert_allclose(both, expected, **ROUNDING)
    # Neither mask is without effect.
    assert np.abs(logits(of_image) - both).max() > 1e-3
    assert np.abs(logits(of_text) - both).max() > 1e-3

    @jax.jit
    def left_out(model, inputs):
        tokens, _ = model.encode_image(inputs["image"], patches)
        encoded, _ = model.encode_text(inputs["text"])
        words, _ = model.map(tokens, inputs["text"], encoded=encoded)
        return words, model.map(tokens, inputs["text"])[0]

    outputs, again = left_out(model, inputs)
    if model.task == "vqa":
        found = model.answer_logits(outputs, inputs["text"])
    else:
        found = model.word_logits(outputs)[rows, words]
    np.testing.assert_allclose(found, logits(of_image), **ROUNDING)
    np.testing.assert_allclose(again, outputs, **ROUNDING)


def test_batch_is_one_by_one_and_padding_does_not_matter(model, inputs):
    logits, maps = FORWARD(model, inputs)
    for i in range(2):
        one = {"image": inputs["image"][i : i + 1], "text": inputs["text"][i : i + 1, :LENGTH]}
        alone, of_one = FORWARD(model, one)
        expected = logits[i : i + 1] if model.task == "vqa" else logits[i : i + 1, :LENGTH]
        np.testing.assert_allclose(alone, expected, **ROUNDING)
        to_image = maps["text_to_image"][:, i : i + 1, :, :LENGTH]
        np.testing.assert_allclose(of_one["text_to_image"], to_image, **ROUNDING)


def test_bfloat16(vqa, half, inputs):
    logits, maps = FORWARD(half, inputs)
    expected, plain = FORWARD(vqa, inputs)
    assert {x.dtype for x in (logits, *maps.values())} == {jnp.dtype("float32")}
    # 8 bits of precision, through 16 additions to the stream of the text.
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max())
    assert np.abs(logits - expected).max() > 1e-5
    for name, value in plain.items():
        seen = np.asarray(value) > 0
        uniform = seen / seen.sum(-1, keepdims=True)
        # So close that a map which is uniform over the tokens that are seen would not pass.
        far = np.abs(value - uniform).max()
        np.testing.assert_allclose(maps[name], value, rtol=0, atol=far / 2, err_msg=name)
