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
    texts = ["a red circle", "a small blue square"]
    return model.pairs(model.prepare(image=scene, text=texts))


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
    x = jaxrel.capture(lambda inputs: model.score(inputs), f"{stream}/before")(inputs)[1]
    x = x[f"{stream}/before"][0]
    if stream == "vision":
        norm, other = tower.post_norm, of_text
        weights = np.full((2, 1, x.shape[1]), 1 / x.shape[1])
    else:
        norm, other = tower.final_norm, of_image
        words = np.arange(x.shape[1]) <= end[:, None]
        weights = (words / words.sum(-1, keepdims=True))[:, None]
    mask = None if stream == "vision" else np.tril(np.ones((x.shape[1],) * 2, bool))
    grads = []
    for block in blocks(tower):
        attention = block.attention
        normed = block.norm1(x)
        by_head = lambda y, heads=attention.heads: y.reshape(*y.shape[:2], heads, -1)
        q, k, v = (
            by_head(linear(normed)) for linear in (attention.query, attention.key, attention.value)
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = np.where(mask, scores, -np.inf)
        attn = np.asarray(jax.nn.softmax(scores, axis=-1))

        def score(attn, x=x, v=v, block=block):
            mixed = jnp.einsum("bhqk,bkhd->bqhd", attn, v).reshape(x.shape)
            y = x + block.attention.out(mixed)
            hidden = block.expand(block.norm2(y))
            y = y + block.contract(hidden * jax.nn.sigmoid(1.702 * hidden))
            embedded = tower.projection(norm((weights @ y)[:, 0]))
            embedded = embedded / jnp.linalg.norm(embedded, axis=-1, keepdims=True)
            return jnp.exp(model.logit_scale[...]) * (embedded * other).sum(), y

        grad, x = jax.grad(score, has_aux=True)(attn)
        grads.append(np.asarray(grad))
    want = np.maximum(np.stack(grads), 0).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(explained(model, inputs, "legrad")[stream], want, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_explanations(model, scene, method):
    texts = ["a red circle", "a small blue square", "a ring"]
    one = jaxrel.explain(model, image=scene, text=texts, method=method)
    assert not one.signed
    assert (one.image >= 0).all()
    assert one.image.any()
    assert one.text.any()
    small = jaxrel.explain(model, image=scene, text=texts, method=method, batch_size=2)
    np.testing.assert_allclose(small.image, one.image, **CLOSE)
    for i, text in enumerate(texts):
        alone = jaxrel.explain(model, image=scene, text=text, method=method)
        np.testing.assert_allclose(alone.image[0], one.image[i], **CLOSE)
        np.testing.assert_allclose(alone.text[0], one.text[i], **CLOSE)
    layers = {"grad_eclip": 2}.get(method, 6)  # the last of each tower, or all
    assert one.report["coverage"]["followed"] == layers


@pytest.mark.parametrize("method", METHODS)
def test_a_choice_of_layers_and_heads(model, scene, method):
    options = {"image": scene, "text": "a red circle", "method": method}
    every = jaxrel.explain(model, **options)
    last = jaxrel.explain(model, **options, layers=[-1])
    assert np.array_equal(every.image, last.image) == (method == "grad_eclip")
    heads = jaxrel.explain(model, **options, heads=[0, 2])
    assert not np.allclose(every.image, heads.image)


def test_the_object_is_found(model, scene):
    for one in jaxrel.explain(model, image=scene, text="a red circle", method=METHODS):
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
