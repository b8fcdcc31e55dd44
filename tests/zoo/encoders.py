"""Small image encoders, and tensors for them as other libraries name theirs."""

import re

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.models.vision import ResNetConfig, VGGConfig

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
