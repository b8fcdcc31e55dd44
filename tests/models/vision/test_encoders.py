"""VGG and ResNet: features, against torch and a naive forward pass, and their relevance.

Fixtures: tiny stacks with random weights and their features, computed with torch, and what the
reference implementation of Sun et al. 2022 distributes of some relevance of these features.
"""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import composites, op, rules
from jaxrel.models.vision import ResNetConfig, VGGConfig, encoder_from_tensors, make_encoder
from tests.paths import FIXTURES
from tests.zoo.encoders import BATCH_NORM, TINY, error, forward, images, tensors_of

FIXTURE = FIXTURES / "vision.npz"
RELEVANCE = FIXTURES / "vision_relevance.npz"


def conv(x, weight, stride=1):
    side = weight.shape[-1]
    pad = [(side // 2, side // 2)] * 2
    return lax.conv_general_dilated(x, weight, (stride, stride), pad)


def max_pool(x, size, pad):
    window, strides, pads = (
        (1, 1, size, size),
        (1, 1, 2, 2),
        [(0, 0), (0, 0), (pad, pad), (pad, pad)],
    )
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, pads)


@jax.jit
def naive(tensors, images):
    """Features by the names of torchvision, written as its modules are."""
    x = images.transpose(0, 3, 1, 2)
    convolutions = (naive_vgg if "features.0.weight" in tensors else naive_resnet)(tensors, x)
    return convolutions.transpose(0, 2, 3, 1)


def naive_vgg(tensors, x):
    numbers = [int(name.split(".")[1]) for name in tensors if name.startswith("features.")]
    module = 0
    while module <= max(numbers):
        if f"features.{module}.weight" not in tensors:
            x, module = max_pool(x, 2, 0), module + 1
            continue
        y = conv(x, tensors[f"features.{module}.weight"])
        x = jnp.maximum(y + tensors[f"features.{module}.bias"][:, None, None], 0)
        module += 2
    return x


def naive_resnet(tensors, x):
    def conv_norm(x, conv_name, norm_name, stride):
        weight, bias, mean, var = (tensors[f"{norm_name}.{k}"][:, None, None] for k in BATCH_NORM)
        y = conv(x, tensors[f"{conv_name}.weight"], stride)
        return (y - mean) / jnp.sqrt(var + 1e-5) * weight + bias

    x = max_pool(jnp.maximum(conv_norm(x, "conv1", "bn1", 2), 0), 3, 1)
    found = {tuple(map(int, m)) for m in re.findall(r"layer(\d+)\.(\d+)\.", " ".join(tensors))}
    for stage, block in sorted(found):
        name = f"layer{stage}.{block}"
        stride = 2 if stage > 1 and block == 0 else 1
        count = 3 if f"{name}.conv3.weight" in tensors else 2
        y = x
        for i in range(1, count + 1):
            # Of both kinds of block it is the first or the only 3 x 3 convolution.
            here = stride if i == count - 1 else 1
            y = conv_norm(y, f"{name}.conv{i}", f"{name}.bn{i}", here)
            y = jnp.maximum(y, 0) if i < count else y
        if f"{name}.downsample.0.weight" in tensors:
            x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        x = jnp.maximum(x + y, 0)
    return x


# ---- features


# The last stack is one stage with a second block of another width: two stages of one block.
STACKS = {
    "vgg": (VGGConfig(((4, 4), (6,), (8,))), {}),
    "bottleneck": (ResNetConfig("bottleneck", (2,), (2,), 8), {}),
    "basic": (ResNetConfig("basic", (1, 1), (6, 8), 6), {"layer1.1.": "layer2.0."}),
}


def stored(fixture, name):
    """The arrays of a stack; images, features and relevance with the channels last."""
    with np.load(fixture, allow_pickle=False) as file:
        arrays = {k.removeprefix(f"{name}/"): file[k] for k in file.files if k.startswith(name)}
    return {
        k: v if k.startswith("w/") else jnp.asarray(v.transpose(0, 2, 3, 1))
        for k, v in arrays.items()
    }


def stack(name):
    """The model, an image, and the features that torch computes of it."""
    config, renamed = STACKS[name]
    arrays = stored(FIXTURE, name)
    tensors = {k.removeprefix("w/"): v for k, v in arrays.items() if k.startswith("w/")}
    for old, new in renamed.items():
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    return encoder_from_tensors(config, tensors), arrays["x"], arrays["features"]


@pytest.mark.parametrize("name", STACKS)
def test_features_are_those_of_torch(name):
    model, x, expected = stack(name)
    # float32 on both sides, through up to six convolutions; measured: 2e-7.
    assert error(forward(model, x), expected) < 1e-5


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(24, 24), (33, 26)], ids=["even", "odd"])
def test_features_are_those_of_a_naive_forward(name, size, loaded):
    x = images(*size)
    # float32, in another order of additions.
    assert error(forward(loaded[name], x), naive(tensors_of(name), x)) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_jit_is_eager_and_a_batch_is_one_by_one(name, loaded):
    model, x = loaded[name], images()
    features = forward(model, x)
    # float32, compiled otherwise.
    assert error(model(x), features) < 1e-5
    assert error(jnp.concatenate([forward(model, one[None]) for one in x]), features) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_bfloat16(name, loaded):
    model = encoder_from_tensors(TINY[name], tensors_of(name), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    features = forward(model, images())
    assert features.dtype == jnp.bfloat16
    # Eight bits of mantissa, through up to nine convolutions; measured: 0.02.
    assert error(features, forward(loaded[name], images())) < 0.06


@pytest.mark.parametrize(
    ("name", "preset"),
    [(name, preset) for name in TINY for preset in ("epsilon_plus", "captioning")],
)
def test_features_can_be_explained(name, preset, loaded):
    model, x = loaded[name], images()
    relevance = jaxrel.lrp(lambda m, x: m(x), getattr(composites, preset)(), argnums=1)
    relevance = jax.jit(relevance)(model, x)
    assert relevance.shape == x.shape
    assert np.all(np.isfinite(relevance))
    assert np.any(relevance != 0)


def test_normalisation_is_folded_into_its_convolution(loaded):
    plan = jaxrel.plan(lambda model, x: model(x), composites.epsilon_plus(), argnums=1)
    rows = [row for row in plan(loaded["basic"], images()) if row.kind == "conv"]
    assert all("normalisation folded in" in row.note for row in rows)
    assert all("x >= 0" in row.note for row in rows if not row.first)
    assert "stages/1/rest/convs/0/conv/kernel" in {path for row in rows for path in row.paths}


# ---- relevance


@jax.jit(static_argnums=0)
def explain(fun, module, x, relevance):
    """Relevance of x for fun(module, x), of which the relevance is given."""
    return jaxrel.lrp(fun, composites.captioning(), argnums=1)(module, x, seed=relevance)


def apply(module, x):
    return module(x)


def branch(block, x):
    """The block without its addition."""
    *convs, last = block.convs
    for conv in convs:
        x = jax.nn.relu(conv(x))
    return last(x)


def shortcut(block, x):
    return x if block.shortcut is None else block.shortcut(x)


def stem(model, x):
    return nnx.max_pool(jax.nn.relu(model.stem(x)), (3, 3), strides=(2, 2), padding=((1, 1),) * 2)


def blocks_of(model):
    for stage in model.stages:
        yield stage.first
        if stage.rest is not None:
            graph, parameters = nnx.split(stage.rest)
            yield nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], parameters))


def with_inputs(model, x):
    """Each block with its input."""
    x = stem(model, x)
    for block in blocks_of(model):
        yield block, x
        x = block(x)


# float32 on both sides; measured: 4e-7 of the maximum.
PARITY = 1e-5


def test_relevance_is_that_of_the_reference():
    model, x, _ = stack("bottleneck")
    expected = stored(RELEVANCE, "bottleneck")
    found = explain(apply, model, x, expected["target"])
    assert error(found, expected["rel_in/conv1"]) < PARITY


def full(one, two, relevance):
    """What the reference leaves to the summands of a basic block: each takes all, twice the sum."""
    return relevance, relevance


def shares(one, two, relevance):
    """The rule of the other blocks: to each its share, of a sum that 0.01 keeps from zero."""
    total = one + two
    quotient = relevance / (total + jnp.where(total >= 0, 0.01, -0.01))
    return one * quotient, two * quotient


@jax.jit(static_argnums=3)
def block_by_block(model, x, relevance, shared):
    """Relevance of the pixels, with what the two summands of each block get of its relevance."""
    for block, inputs in reversed([*with_inputs(model, x)]):
        one, two = branch(block, inputs), shortcut(block, inputs)
        of_one, of_two = shared(one, two, relevance)
        through = explain(branch, block, inputs, of_one)
        beside = of_two if block.shortcut is None else explain(shortcut, block, inputs, of_two)
        relevance = through + beside
    return explain(stem, model, x, relevance)


def test_relevance_of_basic_blocks():
    model, x, _ = stack("basic")
    expected = stored(RELEVANCE, "basic")
    target = expected["target"]
    assert error(block_by_block(model, x, target, full), expected["rel_in/conv1"]) < PARITY
    # The preset shares in every block.
    found = explain(apply, model, x, target)
    assert error(found, block_by_block(model, x, target, shares)) < PARITY


@pytest.mark.parametrize("name", ["bottleneck", "basic"])
def test_relevance_of_each_layer_is_that_of_the_reference(name):
    model, x, _ = stack(name)
    expected = stored(RELEVANCE, name)
    layers = {"": ([model.stem], None, x)}
    layers |= {
        f"layer1.{i}.": (block.convs, block.shortcut, inputs)
        for i, (block, inputs) in enumerate(with_inputs(model, x))
    }
    compared = 0
    for prefix, (convs, other, inputs) in layers.items():
        y, cases = inputs, []
        for i, conv in enumerate(convs, 1):
            cases.append((conv, y, f"bn{i}", f"conv{i}"))
            y = jax.nn.relu(conv(y))
        if other is not None:
            cases.append((other, inputs, "downsample.1", "downsample.0"))
        for layer, before, last, first in cases:
            found = explain(apply, layer, before, expected[f"rel_out/{prefix}{last}"])
            assert error(found, expected[f"rel_in/{prefix}{first}"]) < PARITY, prefix + first
            compared += 1
    assert compared == sum("rel_out" in key and "add" not in key for key in expected)


def test_relevance_of_the_summands_is_that_of_the_reference():
    model, x, _ = stack("bottleneck")
    expected = stored(RELEVANCE, "bottleneck")
    for i, (block, inputs) in enumerate(with_inputs(model, x)):
        add = f"layer1.{i}.add"
        found = jaxrel.lrp(lambda a, b: a + b, composites.captioning(), argnums=(0, 1))(
            branch(block, inputs), shortcut(block, inputs), seed=expected[f"rel_out/{add}"]
        )
        for one, key in zip(found, ("rel_in", "rel_in2"), strict=True):
            assert error(one, expected[f"{key}/{add}"]) < PARITY


def test_normalisation_has_a_row_of_its_own_where_an_entry_names_it(loaded):
    def rows(composite):
        return jaxrel.plan(apply, composite, argnums=1)(loaded["basic"], images())

    found = rows(composites.captioning())
    assert not any("folded" in row.note for row in found)
    kinds = [row.kind for row in found if row.kind in ("conv", "batch_norm")]
    assert kinds == ["conv", "batch_norm"] * (len(kinds) // 2)
    (one,) = (row for row in found if "stages/1/rest/convs/0/norm/var" in row.paths)
    assert one.paths == tuple(
        f"stages/1/rest/convs/0/norm/{name}" for name in ("bias", "mean", "scale", "var")
    )
    assert (str(one.rule), one.bias) == ("ZAbsolute(stabiliser=0.0)", "fused")
    # `everything` names nothing, and an entry before may fold some of them.
    plain = [(op("conv"), rules.ZPlus()), (jaxrel.everything(), rules.Gradient())]
    assert "batch_norm" not in {row.kind for row in rows(plain)}
    some = [(jaxrel.path("stem") & op("batch_norm"), rules.ZAbsolute()), *plain]
    assert [row.paths[0] for row in rows(some) if row.kind == "batch_norm"] == ["stem/norm/bias"]


@pytest.mark.parametrize("core", ["conv", "dense"])
def test_the_bias_before_a_normalisation_is_not_part_of_it(core, x64):
    rng = np.random.default_rng(0)
    shape = (3, 3, 2, 4) if core == "conv" else (2, 4)
    w, x = rng.normal(size=shape), rng.normal(size=(2, 5, 5, 2))
    p = dict(zip(("bias", "mean", "scale", "shift"), rng.normal(size=(4, 4)), strict=True))

    def linear(w, x):
        if core == "dense":
            return x @ w
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def fun(w, p, x):
        return (linear(w, x) + p["bias"] - p["mean"]) * p["scale"] + p["shift"]

    relevance = rng.normal(size=(2, 5, 5, 4))
    found = explain(lambda m, x: fun(*m, x), (w, p), x, relevance)
    # By hand: the normalisation of the linear map's output, its own bias included.
    size = abs(p["scale"] * (linear(w, x) + p["bias"]))
    before = relevance * size / (size + abs(p["shift"] - p["mean"] * p["scale"]))
    expected = explain(lambda m, x: linear(m[0], x) + m[1]["bias"], (w, p), x, before)
    # float64.
    assert error(found, expected) < 1e-12


def test_normalisation_loses_what_its_shift_takes(loaded):
    found = jaxrel.conservation(apply, composites.captioning(), argnums=1)(
        loaded["basic"].stem, images()
    )
    (one,) = (one for one in found if one.kind == "batch_norm")
    # Sums of 1440 terms of both signs, in float32.
    scale = 1e-4 * abs(one.received)
    assert abs(one.bias) > scale
    assert abs(one.received - one.passed - one.bias) < scale
    assert max(abs(one.stabiliser), abs(one.rule)) < scale


def test_relevance_of_the_weights_of_a_normalisation(loaded):
    at = (jaxrel.path("conv/kernel"), jaxrel.path("norm/scale"))
    explain = jaxrel.lrp(apply, composites.captioning(), argnums=1, at=at)
    _, found = explain(loaded["basic"].stem, images())
    # All that goes through the scale of a channel goes on through the kernel's weights.
    assert error(found["norm/scale"], found["conv/kernel"].sum((0, 1, 2))) < PARITY


def test_depth_does_not_grow_the_trace():
    def equations(depth):
        config = ResNetConfig("basic", (2, depth), (4, 6), 5)
        model = nnx.eval_shape(lambda: make_encoder(config, rngs=nnx.Rngs(0)))
        return len(jax.make_jaxpr(lambda model, x: model(x))(model, images()).eqns)

    assert equations(2) == equations(12)


def test_statistics_are_not_trained(loaded):
    trained = {path[-1] for path in nnx.to_flat_state(nnx.state(loaded["basic"], nnx.Param)).paths}
    others = {path[-1] for path in nnx.to_flat_state(nnx.state(loaded["basic"])).paths} - trained
    assert trained == {"kernel", "scale", "bias"}
    assert others == {"mean", "var"}


@pytest.mark.parametrize("name", ["vgg", "basic"])
def test_new_encoders_give_features_of_the_size_of_their_input(name):
    model = nnx.jit(lambda: make_encoder(TINY[name], rngs=nnx.Rngs(0)))()
    # The initial values keep the size of the activations, within what few channels can tell.
    assert 0.05 < np.std(forward(model, images())) < 20
