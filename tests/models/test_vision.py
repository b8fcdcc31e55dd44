"""VGG and ResNet: features, sizes, every layout of weights, and what they say to bad input.

Fixtures: tiny stacks with random weights and their features, computed with torch, and what the
reference implementation of Sun et al. 2022 distributes of some relevance of these features.
"""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp
from PIL import Image
from safetensors.numpy import save_file

import jaxrel
from jaxrel import composites, op, rules
from jaxrel.models import Processor
from jaxrel.models.vision import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    ResNetConfig,
    VGGConfig,
    check_images,
    encoder_config,
    encoder_from_tensors,
    imagenet_processing,
    load_encoder,
    make_encoder,
)
from tests.paths import FIXTURES

FIXTURE = FIXTURES / "vision.npz"
RELEVANCE = FIXTURES / "vision_relevance.npz"

VGG_TINY = VGGConfig(((4, 4), (5,), (6, 7)))
BASIC = ResNetConfig("basic", (1, 3), (4, 6), 5)
BOTTLENECK = ResNetConfig("bottleneck", (3, 2), (2, 3), 8)
TINY = {"vgg": VGG_TINY, "basic": BASIC, "bottleneck": BOTTLENECK}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")

forward = jax.jit(lambda model, x: model(x))


def error(actual, expected):
    """The greatest difference, in units of the greatest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def images(height=24, width=None, batch=2):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(batch, height, width or height, 3)), jnp.float32)


# ---- weights in the layout of torchvision, and a naive forward pass over their names


def random_tensors(shapes):
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7, np.int64)
        elif name.endswith("running_var"):
            tensors[name] = rng.uniform(0.5, 2, shape).astype(np.float32)
        else:
            scale = 0.5 if len(shape) < 2 else np.sqrt(2 / np.prod(shape[1:]))
            tensors[name] = (scale * rng.normal(size=shape)).astype(np.float32)
    return tensors


def vgg_tensors(config=VGG_TINY):
    shapes, inputs, module = {"classifier.0.weight": (3, 7), "classifier.0.bias": (3,)}, 3, 0
    for stage in config.stages:
        for width in stage:
            shapes[f"features.{module}.weight"] = (width, inputs, 3, 3)
            shapes[f"features.{module}.bias"] = (width,)
            inputs, module = width, module + 2
        module += 1
    return random_tensors(shapes)


def resnet_tensors(config):
    shapes = {"fc.weight": (3, config.channels), "fc.bias": (3,)}

    def conv_norm(conv, norm, inputs, outputs, side):
        shapes[f"{conv}.weight"] = (outputs, inputs, side, side)
        shapes.update({f"{norm}.{name}": (outputs,) for name in BATCH_NORM})
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv_norm("conv1", "bn1", 3, config.stem, 7)
    inputs = config.stem
    for stage, (depth, width) in enumerate(zip(config.stages, config.widths, strict=True), 1):
        basic = config.block == "basic"
        outputs = width if basic else 4 * width
        sides = (3, 3) if basic else (1, 3, 1)
        sizes = [width] * (len(sides) - 1) + [outputs]
        for block in range(depth):
            name = f"layer{stage}.{block}"
            before = inputs
            for i, (side, size) in enumerate(zip(sides, sizes, strict=True), 1):
                conv_norm(f"{name}.conv{i}", f"{name}.bn{i}", before, size, side)
                before = size
            if inputs != outputs or (stage > 1 and block == 0):
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", inputs, outputs, 1)
            inputs = outputs
    return random_tensors(shapes)


def tensors_of(name):
    return vgg_tensors() if name == "vgg" else resnet_tensors(TINY[name])


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


def hugging_face(tensors, prefix="resnet."):
    """Rename the tensors of a ResNet as transformers does."""
    renames = [
        (r"^conv1\.", f"{prefix}embedder.embedder.convolution."),
        (r"^bn1\.", f"{prefix}embedder.embedder.normalization."),
        (r"^fc\.", "classifier.1."),
        (r"\.downsample\.0\.", ".shortcut.convolution."),
        (r"\.downsample\.1\.", ".shortcut.normalization."),
        (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
        (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
        (
            r"^layer(\d)\.(\d+)\.",
            lambda m: f"{prefix}encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
        ),
    ]
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


@pytest.fixture(scope="module")
def loaded():
    """A model of each kind, with random weights."""
    return {name: encoder_from_tensors(TINY[name], tensors_of(name)) for name in TINY}


def save(tensors, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def same(model, other):
    leaves = jax.tree.leaves(model), jax.tree.leaves(other)
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


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


# ---- sizes


SHAPES = {
    **dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), (14, 14, 512)),
    **dict.fromkeys(("resnet18", "resnet34"), (7, 7, 512)),
    **dict.fromkeys(("resnet50", "resnet101"), (7, 7, 2048)),
}
# Weights of the published models without their classifiers, and without statistics.
PARAMETERS = {
    "vgg11": 9_220_480,
    "vgg13": 9_404_992,
    "vgg16": 14_714_688,
    "vgg19": 20_024_384,
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = encoder_config(name)
    model = nnx.eval_shape(lambda: make_encoder(config, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    features = jax.eval_shape(lambda model, x: model(x), model, images)
    assert features.shape == (2, *SHAPES[name])
    assert (*config.grid(224), config.channels) == SHAPES[name]
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(np.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (32, 33), (63, 64)])
def test_grid_is_that_of_the_features(name, size, loaded):
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    features = jax.eval_shape(lambda model, x: model(x), loaded[name], images)
    assert features.shape[1:3] == TINY[name].grid(size)


@pytest.mark.parametrize("config", [*PRESETS.values(), *TINY.values()])
def test_configurations_round_trip(config):
    written = json.loads(json.dumps(config.to_dict()))
    assert encoder_config(written) == config
    assert type(config).from_dict(written) == config
    assert encoder_config(config) is config
    hash(config)


def changed(config, **changes):
    return config.to_dict() | changes


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VGGConfig(()), r"vgg: stages must hold a tuple of positive integers.*got \(\)"),
        (lambda: VGGConfig(((4,), ())), r"vgg: stages .* got \(\(4,\), \(\)\)"),
        (lambda: VGGConfig(((0,),)), r"vgg: stages .* got \(\(0,\),\)"),
        (lambda: ResNetConfig("wide"), "block must be 'basic' or 'bottleneck', got 'wide'"),
        (lambda: ResNetConfig(stages=()), r"stages must be a tuple of positive integers, got \(\)"),
        (lambda: ResNetConfig(widths=(64, -1)), r"widths must be .* got \(64, -1\)"),
        (lambda: ResNetConfig(stages=(1, 2)), "2 stages and 4 widths; give each stage one width"),
        (lambda: ResNetConfig(stem=0), "stem must be a positive integer, got 0"),
        (lambda: encoder_config("vgg12"), "no encoder is named 'vgg12'; known are vgg11, vgg13"),
        (
            lambda: encoder_config({"model_type": "clip"}),
            "unknown type of encoder 'clip', known are vgg, resnet",
        ),
        (
            lambda: VGGConfig.from_dict(BASIC.to_dict()),
            "sizes of a vgg encoder must hold .* missing or unknown: block, stem, widths",
        ),
        (
            lambda: VGGConfig.from_dict(changed(VGG_TINY, model_type="resnet")),
            "encoder of type 'resnet', and VGGConfig reads 'vgg'; use encoder_config",
        ),
        (
            lambda: encoder_config({"model_type": "resnet", "block": "basic"}),
            "sizes of a resnet encoder must hold .* missing or unknown: stages, stem, widths",
        ),
        (
            lambda: VGG_TINY.grid((3, 224)),
            "3 x 224 pixels is too small: 2 poolings halve it, .* at least 4 pixels",
        ),
        (lambda: VGG_TINY.grid(0), "vgg: image_size must be a positive number of pixels.* got 0"),
        (lambda: BASIC.grid((8, -8)), r"resnet: image_size .* got \(8, -8\)"),
        (
            lambda: check_images(BASIC, np.zeros((2, 3, 24, 24), np.float32)),
            r"images \[batch, height, width, 3\], got \[2, 3, 24, 24\]",
        ),
        (lambda: check_images(BASIC, np.zeros((24, 24, 3), np.float32)), r"got \[24, 24, 3\]"),
    ],
)
def test_bad_sizes(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_model_refuses_images_that_are_too_small(loaded):
    with pytest.raises(ValueError, match="3 x 3 pixels is too small"):
        loaded["vgg"](images(3))


def test_images_must_be_floats():
    with pytest.raises(TypeError, match="images must be normalised floats, got uint8"):
        check_images(BASIC, np.zeros((2, 24, 24, 3), np.uint8))


# ---- loading


@pytest.mark.parametrize("name", TINY)
def test_file_folder_and_sizes_as_a_mapping(name, loaded, tmp_path):
    path = save(tensors_of(name), tmp_path / "weights.safetensors")
    save(tensors_of(name), tmp_path / "folder" / "model.safetensors")
    for source in (path, str(path), tmp_path / "folder"):
        assert same(load_encoder(TINY[name].to_dict(), source), loaded[name])


def test_parameters_lie_where_they_should(loaded):
    tensors = resnet_tensors(BASIC)
    stage = loaded["basic"].stages[1]
    kernel = tensors["layer2.2.conv1.weight"]
    np.testing.assert_array_equal(stage.rest.convs[0].conv.kernel[1], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        stage.first.shortcut.norm.var[...], tensors["layer2.0.downsample.1.running_var"]
    )


@pytest.mark.parametrize("prefix", ["resnet.", ""])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_layout_of_transformers(name, prefix, loaded):
    tensors = hugging_face(resnet_tensors(TINY[name]), prefix)
    assert f"{prefix}encoder.stages.1.layers.0.shortcut.normalization.running_var" in tensors
    assert same(encoder_from_tensors(TINY[name], tensors), loaded[name])


def test_layout_of_timm(loaded):
    tensors = vgg_tensors()
    head = {"pre_logits.fc1.weight": "classifier.0.weight", "head.fc.bias": "classifier.0.bias"}
    tensors |= {new: tensors.pop(old) for new, old in head.items()}
    assert same(encoder_from_tensors(VGG_TINY, tensors), loaded["vgg"])


def test_prefix_in_the_file_of_a_larger_model(loaded, tmp_path):
    features = {k: v for k, v in vgg_tensors().items() if k.startswith("features.")}
    alone = {name.removeprefix("features."): value for name, value in features.items()}
    assert same(encoder_from_tensors(VGG_TINY, alone), loaded["vgg"])
    inside = {f"img_encoder.encoder.{name}": value for name, value in alone.items()}
    path = save(inside | {"fc.weight": np.zeros((2, 2))}, tmp_path / "captioner.safetensors")
    model = load_encoder(VGG_TINY, path, prefix="img_encoder.encoder.")
    assert same(model, loaded["vgg"])
    inside = {f"encoder.{name}": value for name, value in resnet_tensors(BASIC).items()}
    assert same(encoder_from_tensors(BASIC, inside, prefix="encoder."), loaded["basic"])


def test_half_precision_file(tmp_path):
    tensors = {name: x.astype(np.float16) for name, x in vgg_tensors().items()}
    model = load_encoder(VGG_TINY, save(tensors, tmp_path / "half.safetensors"))
    kernel = model.stages[0][0].kernel[...]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel[..., 0, 1], tensors["features.0.weight"][1, 0])


def edited(tensors, **changes):
    """The tensors with others in their place; None takes a tensor out."""
    tensors = tensors | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("config", "tensors", "match"),
    [
        (
            VGG_TINY,
            {"backbone.features.0.weight": zeros(4, 3, 3, 3)},
            "no layout of weights that is known here: expected one of the tensors "
            r"features.0.weight, .* got backbone.features.0.weight. .* prefix=",
        ),
        (
            VGG_TINY,
            resnet_tensors(BASIC),
            "the tensors of a ResNet of torchvision or timm, and the sizes those of "
            r"VGGConfig\(stages=\(\(4, 4\), \(5,\), \(6, 7\)\)\); give the sizes",
        ),
        (
            PRESETS["resnet18"],
            vgg_tensors(),
            "the tensors of a VGG of torchvision or timm, and the sizes those of resnet18",
        ),
        (
            VGG_TINY,
            edited(vgg_tensors(), features__1__running_mean=zeros(4)),
            r"has batch normalisation \(features.1.running_mean\), which is not supported",
        ),
        (
            VGG_TINY,
            edited(vgg_tensors(), features__10__bias=None, features__13__bias=zeros(7)),
            "weights are not those of a VGG of torchvision or timm with the sizes of VGGConfig"
            r".*\. 1 tensors are missing: features.10.bias\. 1 tensors are unexpected: "
            r"features.13.bias\. Give the sizes of the model in the file$",
        ),
        (
            BASIC,
            {n: x for n, x in resnet_tensors(BASIC).items() if not n.startswith("layer2.2.")},
            r"10 tensors are missing: layer2.2.bn1.bias, .*, .* and 5 more\. Give the sizes",
        ),
        (
            BOTTLENECK,
            edited(hugging_face(resnet_tensors(BOTTLENECK)), resnet__pooler__weight=zeros(2)),
            "of a ResNet of transformers .* 1 tensors are unexpected: resnet.pooler.weight",
        ),
        (
            VGG_TINY,
            edited(vgg_tensors(), features__2__weight=zeros(4, 5, 3, 3)),
            r"the tensor features.2.weight has shape \[4, 5, 3, 3\], and a VGG .* has "
            r"\[4, 4, 3, 3\]; give the sizes",
        ),
        (
            BASIC,
            edited(resnet_tensors(BASIC), layer2__1__bn2__weight=zeros(5)),
            r"the tensor layer2.1.bn2.weight has shape \[5\], and a ResNet .* has \[6\]",
        ),
        (
            BASIC,
            edited(resnet_tensors(BASIC), bn1__running_var=np.full(5, np.nan, np.float32)),
            "the tensor bn1.running_var has 5 values of 5 that are NaN or infinite",
        ),
        (
            VGG_TINY,
            edited(vgg_tensors(), features__0__bias=zeros(4, dtype=np.int8)),
            "the tensor features.0.bias has dtype int8; quantised",
        ),
    ],
)
def test_wrong_weights(config, tensors, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        encoder_from_tensors(config, tensors)
    path = save(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"weights.safetensors: .*{match}"):
        load_encoder(config, path)


def test_prefix_without_tensors():
    match = "known here under the prefix 'encoder.': expected .*, got no tensor"
    with pytest.raises(ValueError, match=match):
        encoder_from_tensors(VGG_TINY, vgg_tensors(), prefix="encoder.")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none.safetensors; check the path"):
        load_encoder("vgg16", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_encoder("vgg16", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_encoder("vgg16", tmp_path)
    with pytest.raises(ValueError, match="no encoder is named 'vgg'"):
        load_encoder("vgg", tmp_path / "none.safetensors")
    broken = save(vgg_tensors(), tmp_path / "broken.safetensors")
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(OSError, match=r"broken.safetensors \(\d+ bytes\) is truncated"):
        load_encoder(VGG_TINY, broken)
    pickled = tmp_path / "vgg16-397923af.pth"
    pickled.write_bytes(b"")
    match = (
        r"vgg16-397923af.pth is a pickled checkpoint, .*save_file\(torch.load\("
        r"'vgg16-397923af.pth', weights_only=True\), 'vgg16-397923af.safetensors'\).*allow_pickle"
    )
    with pytest.raises(ValueError, match=match):
        load_encoder("vgg16", pickled)


def test_variants_that_tensors_do_not_show(loaded, tmp_path):
    save(hugging_face(resnet_tensors(BASIC)), tmp_path / "model.safetensors")
    config = {"model_type": "resnet", "hidden_act": "relu", "downsample_in_bottleneck": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(load_encoder(BASIC, tmp_path), loaded["basic"])
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    assert same(load_encoder(BASIC, tmp_path), loaded["basic"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"downsample_in_bottleneck": True}))
    match = "downsample_in_bottleneck is True, and this ResNet has False; use another checkpoint"
    with pytest.raises(ValueError, match=match):
        load_encoder(BASIC, tmp_path)


# ---- preprocessing


def test_imagenet_processing(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 31, 3), np.uint8))
    processor = Processor(None, imagenet_processing(24))
    resized = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR), np.float32)
    expected = (resized / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    # float32 values of order 1.
    np.testing.assert_allclose(processor.image(image)[0], expected, atol=1e-6)
    assert processor.seen(image).size == image.size
    processor.save(tmp_path)
    again = Processor.from_folder(tmp_path)
    np.testing.assert_array_equal(again.image(image), processor.image(image))
