"""`explain` of CLIP by the methods for encoders: each layer's own score, and the projections."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from PIL import Image

import jaxrel
from jaxrel.attention.methods import ENCODER_METHODS
from jaxrel.explanations.explain import token_relevance
from jaxrel.models import CLIP

METHODS = (*ENCODER_METHODS, "token_tm")
TEXTS = ("a red circle", "a small blue square", "a ring")
# float32, and a program that is fused otherwise.
CLOSE = {"rtol": 2e-4, "atol": 2e-7}


@pytest.fixture(scope="module")
def model():
    return CLIP.from_pretrained("clip-shapes")


@pytest.fixture(scope="module")
def scene():
    return Image.open("train/data/samples/red-circle.png")


@pytest.fixture(scope="module")
def inputs(model, scene):
    return model.pairs(model.prepare(image=scene, text=list(TEXTS[:2])))


def by_method(model, scene, texts, **options):
    """The explanations by each method, of one program."""
    found = jaxrel.explain(model, image=scene, text=texts, method=METHODS, **options)
    return dict(zip(METHODS, found, strict=True))


@pytest.fixture(scope="module")
def of_each_text(model, scene):
    return [by_method(model, scene, text) for text in TEXTS]


@pytest.fixture(scope="module")
def of_all_texts(model, scene):
    """In one batch, and in two."""
    return [by_method(model, scene, list(TEXTS), batch_size=size) for size in (None, 2)]


@pytest.fixture(scope="module")
def of_a_choice(model, scene):
    """By the last layers, and by some heads."""
    choices = {"layers": [-1]}, {"heads": [0, 2]}
    return [by_method(model, scene, TEXTS[0], **choice) for choice in choices]


def explained(model, inputs, method):
    return token_relevance(model, inputs, method=(method,))[method]


def blocks(tower):
    """The layers of a tower one by one."""
    graph, state = nnx.split(tower.transformer.blocks)
    count = jax.tree.leaves(state)[0].shape[0]
    return [nnx.merge(graph, jax.tree.map(lambda x, n=n: x[n], state)) for n in range(count)]


@pytest.mark.parametrize("stream", ["vision", "text"])
def test_legrad_is_each_layers_own_gradient(model, inputs, stream):
    """Against a layer's map that is an argument, and its mean token embedded by hand."""
    tower = getattr(model, stream)
    of_image, of_text = model.encode_image(inputs["image"]), model.encode_text(inputs["text"])
    end = np.asarray(model.target_tokens(inputs)["text"])
    capture = jaxrel.capture(lambda model, inputs: model.score(inputs), f"{stream}/before")
    x = jax.jit(capture)(model, inputs)[1][f"{stream}/before"][0]
    if stream == "vision":
        norm, other = tower.post_norm, of_text
        weights = np.full((2, 1, x.shape[1]), 1 / x.shape[1])
    else:
        norm, other = tower.final_norm, of_image
        words = np.arange(x.shape[1]) <= end[:, None]
        weights = (words / words.sum(-1, keepdims=True))[:, None]
    mask = None if stream == "vision" else np.tril(np.ones((x.shape[1],) * 2, bool))

    @jax.jit
    def of_layer(block, x):
        """The gradient of the layer's own score by its map, and what the layer returns."""
        attention = block.attention
        normed = block.norm1(x)
        by_head = lambda y: y.reshape(*y.shape[:2], attention.heads, -1)
        q, k, v = (
            by_head(linear(normed)) for linear in (attention.query, attention.key, attention.value)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = jnp.where(mask, scores, -np.inf)

        def score(attn):
            mixed = jnp.einsum("bhqk,bkhd->bqhd", attn, v).reshape(x.shape)
            y = x + block.attention.out(mixed)
            hidden = block.expand(block.norm2(y))
            y = y + block.contract(hidden * jax.nn.sigmoid(1.702 * hidden))
            embedded = tower.projection(norm((weights @ y)[:, 0]))
            embedded = embedded / jnp.linalg.norm(embedded, axis=-1, keepdims=True)
            return jnp.exp(model.logit_scale[...]) * (embedded * other).sum(), y

        return jax.grad(score, has_aux=True)(jax.nn.softmax(scores, axis=-1))

    grads = []
    for block in blocks(tower):
        grad, x = of_layer(block, x)
        grads.append(np.asarray(grad))
    want = np.maximum(np.stack(grads), 0).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(explained(model, inputs, "legrad")[stream], want, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_explanations(of_all_texts, of_each_text, method):
    one, small = (found[method] for found in of_all_texts)
    assert not one.signed
    assert (one.image >= 0).all()
    assert one.image.any()
    assert one.text.any()
    np.testing.assert_allclose(small.image, one.image, **CLOSE)
    for i, found in enumerate(of_each_text):
        alone = found[method]
        np.testing.assert_allclose(alone.image[0], one.image[i], **CLOSE)
        np.testing.assert_allclose(alone.text[0], one.text[i], **CLOSE)
    layers = {"grad_eclip": 2}.get(method, 6)  # the last of each tower, or all
    assert one.report["coverage"]["followed"] == layers


@pytest.mark.parametrize("method", METHODS)
def test_a_choice_of_layers_and_heads(of_each_text, of_a_choice, method):
    every = of_each_text[0][method]
    last, heads = (found[method] for found in of_a_choice)
    assert np.array_equal(every.image, last.image) == (method == "grad_eclip")
    assert not np.allclose(every.image, heads.image)


def test_the_object_is_found(of_each_text):
    for one in of_each_text[0].values():
        row, _ = np.unravel_index(one.image[0].argmax(), one.image[0].shape)
        assert row in (4, 5), one.method  # the circle lies there, of 8 rows


def test_a_model_without_layer_scores(model, scene):
    class Plain:
        def __init__(self, model):
            self.model = model

        def __getattr__(self, name):
            if name == "layer_scores":
                raise AttributeError(name)
            return getattr(self.model, name)

    with pytest.raises(ValueError, match=r"head, and Plain has no layer_scores\(inputs\); see jax"):
        jaxrel.explain(Plain(model), image=scene, text="a red circle", method="legrad")
