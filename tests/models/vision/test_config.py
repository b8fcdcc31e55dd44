"""The sizes of encoders, and the presets."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel.models.vision import (
    PRESETS,
    ResNetConfig,
    VGGConfig,
    check_images,
    encoder_config,
    make_encoder,
)
from tests.zoo.encoders import BASIC, TINY, VGG_TINY, images

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
