"""Our metrics against those of Quantus and captum on the same maps, where both have one."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import metrics
from jaxrel.metrics import bridges, randomisation
from jaxrel.metrics.faithfulness import deletion, infidelity, max_sensitivity

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
MAPS = RNG.normal(size=(4, 8, 8)).astype(np.float32)
WEIGHT = RNG.normal(size=(8, 8, 3, 5)).astype(np.float32)
TARGETS = np.array([0, 3, 2, 2])


def logits(x):
    return jnp.tanh(jnp.einsum("bhwc,hwck->bk", x, WEIGHT) / 8)


def of_target(x):
    return logits(x)[jnp.arange(len(x)), TARGETS[: len(x)]]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def quantus(torch):
    return pytest.importorskip("quantus")


@pytest.fixture(scope="module")
def captum(torch):
    return pytest.importorskip("captum.metrics")


def to_torch(torch, x):
    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())


def test_a_function_as_a_module(torch):
    out = bridges.torch_module(logits)(to_torch(torch, IMAGES))
    # One program in float32, called with the same numbers.
    np.testing.assert_array_equal(out.numpy(), logits(jnp.asarray(IMAGES)))
    plain = bridges.torch_module(lambda x: 2 * x, channels_first=False)
    np.testing.assert_array_equal(plain(torch.ones(2, 3)).numpy(), np.full((2, 3), 2))


@pytest.mark.filterwarnings("ignore")
def test_localisation_is_that_of_quantus(quantus):
    masks = np.zeros((4, 8, 8), bool)
    masks[:, 2:6, 1:5] = True
    quiet = {"disable_warnings": True, "normalise": False}
    mass = quantus.RelevanceMassAccuracy(**quiet)
    maps = np.abs(MAPS)  # negative relevance counts there, and does not here
    found = bridges.quantus_scores(mass, logits, IMAGES, TARGETS, maps, masks)
    want = metrics.relevance_mass_accuracy(maps, masks)
    np.testing.assert_allclose(found, want, rtol=1e-5)  # float32 sums of 64 numbers
    point = quantus.PointingGame(**quiet)
    found = bridges.quantus_scores(point, logits, IMAGES, TARGETS, maps, masks)
    np.testing.assert_array_equal(found, metrics.pointing_game(maps, masks))


@pytest.mark.filterwarnings("ignore")
def test_pixel_flipping_is_deletion(quantus):
    flipping = quantus.PixelFlipping(
        features_in_step=8, perturb_baseline="black", normalise=False, disable_warnings=True
    )
    images = np.abs(IMAGES[..., :1])
    images[:, 0, 0] = 0  # its black is the least value

    def of_one_channel(x):
        return logits(jnp.concatenate([x, x, x], axis=-1))

    found = bridges.quantus_scores(flipping, of_one_channel, images, TARGETS, MAPS, softmax=False)
    score = lambda x: of_one_channel(x)[jnp.arange(4), TARGETS]
    curve = deletion(score, images, MAPS, steps=8)
    # The whole image is not in its curves.
    np.testing.assert_allclose(found, np.asarray(curve[1:]).T, rtol=1e-4, atol=1e-5)


def test_infidelity_is_that_of_captum(torch, captum):
    changes = np.asarray(
        [0.1 * jax.random.normal(k, IMAGES.shape) for k in jax.random.split(jax.random.key(0), 6)]
    )
    relevance = RNG.normal(size=IMAGES.shape).astype(np.float32)

    def perturb(inputs):  # the draws of an example stand together
        some = np.swapaxes(changes, 0, 1).reshape(-1, *IMAGES.shape[1:])
        change = to_torch(torch, some)
        return change, inputs - change

    for normalise in (False, True):
        want = captum.infidelity(
            bridges.torch_module(logits),
            perturb,
            to_torch(torch, IMAGES),
            to_torch(torch, relevance),
            target=torch.from_numpy(TARGETS),
            n_perturb_samples=6,
            normalize=normalise,
        )
        found = infidelity(
            of_target,
            IMAGES,
            relevance,
            jax.random.key(0),
            perturb=0.1,
            samples=6,
            normalise=normalise,
        )
        # float32 squares of differences of scores of order 1.
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-3, atol=1e-6)


def test_sensitivity_is_that_of_captum(torch, captum):
    keys = jax.random.split(jax.random.key(0), 6)
    noise = [jax.random.uniform(k, IMAGES.shape, minval=-0.02, maxval=0.02) for k in keys]
    explain = jax.jit(jax.grad(lambda x: of_target(x).sum()))

    def perturb(inputs, radius):  # the draws of an example stand together
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        some = np.swapaxes(np.asarray(noise), 0, 1).reshape(-1, *IMAGES.shape[1:])
        return (x + to_torch(torch, some),)

    def of_torch(inputs):
        images = np.moveaxis(inputs[0].numpy(), 1, -1)
        many = len(images) // 4
        gradient = [explain(images[i::many]) for i in range(many)]
        return (to_torch(torch, np.stack(gradient, 1).reshape(images.shape)),)

    inputs = (to_torch(torch, IMAGES),)
    want = captum.sensitivity_max(of_torch, inputs, perturb_func=perturb, n_perturb_samples=6)
    found = max_sensitivity(explain, IMAGES, jax.random.key(0), samples=6)
    # float32 differences of gradients that are alike
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-3)


def test_entropy_is_that_of_quantus(quantus):
    from quantus.functions.complexity_func import discrete_entropy

    found = randomisation.entropy(MAPS.reshape(4, -1), bins=20)
    want = [discrete_entropy(one, one, n_bins=20) for one in MAPS.reshape(4, -1)]
    np.testing.assert_allclose(found, want, rtol=1e-5)  # float32 logarithms


def test_bad_maps():
    with pytest.raises(ValueError, match=r"maps \(4, 3, 8\) do not divide images \(4, 8, 8, 3\)"):
        bridges.quantus_scores(None, logits, IMAGES, TARGETS, MAPS[:, :3])
