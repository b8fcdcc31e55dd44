"""DINOv2 and DINOv3: as their papers have them, read as they are published, and explained."""

import math

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import jaxrel
from jaxrel import attention
from jaxrel.models import DINO, DINOConfig, from_pretrained
from jaxrel.models.patches import interpolate_positions
from tests.models import naive_towers
from tests.models.published import DINO as CONFIGS
from tests.models.published import write_dino

# Float32 against float64, through two layers on values of order 1 to 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
NAMES = tuple(CONFIGS)
FORWARD = jax.jit(lambda model, inputs: model(inputs, return_attention=True))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folder, tensors, and the model for images of 24 x 24, the native size."""
    found = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("dino")
        tensors = write_dino(folder, config)
        found[name] = folder, tensors, DINO.from_pretrained(folder, image_size=24)
    return found


def images(size, batch=2):
    return np.random.default_rng(0).normal(size=(batch, *size, 3)).astype(np.float32)


def naive(name, tensors, image):
    config = CONFIGS[name]
    v3 = config["model_type"] == "dinov3_vit"
    options = {
        "layers": 2,
        "heads": 2,
        "patch": 4,
        "v3": v3,
        "eps": 1e-5 if v3 else 1e-6,
        "registers": config.get("num_register_tokens", 0),
        "act": naive_towers.silu if name == "dinov3 gated" else naive_towers.gelu,
    }
    return np.stack([naive_towers.dino(x.astype(np.float64), tensors, **options) for x in image])


@pytest.mark.parametrize("name", NAMES)
def test_features(published, name):
    _, tensors, model = published[name]
    image = images((24, 24))
    output, maps = FORWARD(model, {"image": image})
    expected = naive(name, tensors, image)
    np.testing.assert_allclose(output["last_hidden_state"], expected, **TOLERANCE)
    np.testing.assert_allclose(output["pooler_output"], expected[:, 0], **TOLERANCE)
    tokens = model.config.tokens
    assert maps["vision"].shape == (2, 2, 2, tokens, tokens)
    assert tokens == 36 + 1 + CONFIGS[name].get("num_register_tokens", 0)


def test_images_that_are_not_square(published):
    """DINOv3 reads any size as it is; DINOv2 with positions interpolated."""
    folder, tensors, _ = published["dinov3"]
    model = DINO.from_pretrained(folder, image_size=(8, 20))
    image = images((8, 20))
    expected = naive("dinov3", tensors, image)
    output, _ = FORWARD(model, {"image": image})
    np.testing.assert_allclose(output["last_hidden_state"], expected, **TOLERANCE)
    for name, antialias in (("dinov2", False), ("registers", True)):
        folder, tensors, _ = published[name]
        model = DINO.from_pretrained(folder, image_size=(8, 20))
        where = "embeddings.position_embeddings"
        moved = interpolate_positions(tensors[where], (6, 6), (2, 5), antialias=antialias)
        expected = naive(name, tensors | {where: moved}, image)
        found = FORWARD(model, {"image": image})[0]["last_hidden_state"]
        np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_the_image_size_is_that_of_the_preprocessing(published):
    """config.json of DINOv2 says how large training images were; the preprocessing makes others."""
    for name in ("dinov2", "registers", "dinov3"):
        model = from_pretrained(published[name][0])
        assert model.config.sides == (16, 16)
        assert model.prepare(image=Image.new("RGB", (40, 30)))["image"].shape == (1, 16, 16, 3)


def test_without_preprocessing_the_image_size_is_that_of_the_configuration(tmp_path):
    write_dino(tmp_path, CONFIGS["dinov2"], images=False)
    model = DINO.from_pretrained(tmp_path)
    assert model.config.image_size == 24
    with pytest.raises(ValueError, match=r"holds no preprocessor_config.json"):
        model.prepare(image=Image.new("RGB", (40, 30)))


def test_preprocessing(published):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    cases = {
        "dinov2": ((18, 27), Image.Resampling.BICUBIC, (slice(5, 21), slice(1, 17))),
        "dinov3": ((16, 16), Image.Resampling.BILINEAR, (slice(None), slice(None))),
    }
    for name, (size, resample, part) in cases.items():
        model = DINO.from_pretrained(published[name][0])
        want = np.asarray(image.resize(size, resample), np.float64)[part] / 255
        found = model.prepare(image=image)["image"][0]
        np.testing.assert_allclose(found, (want - mean) / std, rtol=1e-5, atol=1e-6)


# ---- Explanations


@jax.jit
def maps_and_gradients(model, image, feature):
    def score(inputs):
        return model(inputs)["pooler_output"][:, feature]

    return jaxrel.capture_with_grad(score, "vision")({"image": image})


def by_hand(model, image, feature):
    """Equal accumulation of the class token's row, of one image."""
    _, maps, grads = maps_and_gradients(model, image, feature)
    maps, grads = (np.asarray(x["vision"], np.float64)[:, 0] for x in (maps, grads))
    matrix = np.eye(maps.shape[-1])
    for layer in range(len(maps)):
        matrix = matrix + np.maximum(maps[layer] * grads[layer], 0).mean(0) @ matrix
    return matrix[0, model.config.prefix :].reshape(model.config.grid)


@pytest.mark.parametrize("name", NAMES)
def test_explain(published, name):
    model = DINO.from_pretrained(published[name][0])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    methods = ("equal", "lrp")
    if name == "dinov3":
        methods = (*attention.METHODS, "lrp", "cp_lrp", "input_x_gradient")
    found = jaxrel.explain(model, image=list(pixels), method=methods)
    inputs = model.prepare(image=list(pixels))
    features = np.asarray(model.predict(inputs))
    for explanation in found:
        assert explanation.image.shape == (2, 4, 4)
        assert explanation.text is None
        largest = features.argmax(1)
        assert explanation.target == tuple(f"feature {i}" for i in largest)
        np.testing.assert_allclose(explanation.score, features.max(1), **TOLERANCE)
        assert explanation.report["coverage"]["share"] > 0
    equal = found[methods.index("equal")]
    expected = by_hand(model, inputs["image"][:1], int(features[0].argmax()))
    np.testing.assert_allclose(equal.image[0], expected, **TOLERANCE)


def test_a_feature_can_be_chosen(published):
    model = published["registers"][2]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    explanation = jaxrel.explain(model, image=list(pixels), target=[3, 5], method="equal")
    assert explanation.target == ("feature 3", "feature 5")
    features = np.asarray(model.predict(model.prepare(image=list(pixels))))
    np.testing.assert_allclose(explanation.score, features[[0, 1], [3, 5]], **TOLERANCE)
    for target, message in (
        (16, "target must be the index of a feature, 0 to 15, .* got 16"),
        ("cat", "index of a feature, 0 to 15, .* got 'cat'"),
        ([1, 2, 3], "3 features for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxrel.explain(model, image=list(pixels), target=target)
    with pytest.raises(ValueError, match="this model reads no text: leave text= out"):
        jaxrel.explain(model, image=list(pixels), text="a cat")


# ---- Files


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(published, name, tmp_path):
    _, tensors, model = published[name]
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(saved[key], value)
    again = DINO.from_pretrained(tmp_path / "again", image_size=24)
    assert again.config == model.config


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "dinov2",
            {"architectures": 5},
            "architectures names 5, and what is supported is 'Dinov2Model'",
        ),
        (
            "dinov2",
            {"architectures": ["Dinov2ForImageClassification"]},
            "architectures names 'Dinov2ForImageClassification', .* supported is 'Dinov2Model'",
        ),
        (
            "dinov2",
            {"use_mask_token": False},
            "use_mask_token is False, and what is supported is True",
        ),
        ("dinov2", {"mlp_ratio": "4"}, "mlp_ratio must be a positive number, got '4'"),
        ("dinov2", {"qkv_bias": 1}, "qkv_bias must be true or false, got 1"),
        ("dinov2", {"num_channels": 4}, "num_channels must be 3, got 4"),
        ("dinov2", {"hidden_act": "relu"}, "dino: unknown activation 'relu'"),
        ("registers", {"num_register_tokens": -1}, "registers must be 0 or a positive integer"),
        ("dinov3", {"mlp_bias": False}, "mlp_bias is False, and what is supported is True"),
        ("dinov3", {"num_attention_heads": 8}, "dinov3_vit need a multiple of 4 features .* 2$"),
        ("dinov3", {"rope_theta": "100"}, "rope_theta must be a number, got '100'"),
        ("dinov3", {"patch_size": [4, 2]}, r"patch_size must be one integer, got \[4, 2\]"),
        (
            "dinov3",
            {"model_type": "dinov3_convnext"},
            "model_type must be one of dinov2, .* got 'dinov3_conv",
        ),
    ],
)
def test_what_is_not_supported_is_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        DINOConfig.from_dict(CONFIGS[name] | changes)


def test_defaults_are_those_of_transformers():
    assert DINOConfig.from_dict({"model_type": "dinov2"}) == DINOConfig()
    registers = DINOConfig.from_dict({"model_type": "dinov2_with_registers"})
    assert (registers.registers, registers.tokens) == (4, 1 + 4 + 256)
    v3 = DINOConfig.from_dict({"model_type": "dinov3_vit", "num_register_tokens": 4})
    assert (v3.width, v3.patch_size, v3.biases, v3.tokens) == (384, 16, (True, False, True), 201)
    giant = {"model_type": "dinov2", "hidden_size": 1536, "num_attention_heads": 24}
    gated = DINOConfig.from_dict({**giant, "use_swiglu_ffn": True})
    assert (gated.mlp_width, gated.activation) == (4096, "silu")
    assert DINOConfig.from_dict(gated.to_dict()) == gated


# ---- Positions


def cubic(x, a):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize(("old", "new"), [(6, 4), (6, 3), (4, 7), (5, 5), (3, 1)])
def test_antialiased_positions(old, new):
    """Weights of a kernel that is as wide as a new cell, those within the border scaled to 1."""
    positions = np.random.default_rng(0).normal(size=(old, 2))
    found = interpolate_positions(positions, (1, old), (1, new), prefix=0, antialias=True)
    for i in range(new):
        scale = old / new
        centre, wide = (i + 0.5) * scale, max(scale, 1.0)
        weights = [cubic((j + 0.5 - centre) / wide, -0.5) for j in range(old)]
        expected = sum(w * p for w, p in zip(weights, positions, strict=True)) / math.fsum(weights)
        np.testing.assert_allclose(found[i], expected, rtol=1e-12, atol=1e-12)  # float64


def test_positions_of_two_axes_and_a_prefix():
    positions = np.random.default_rng(0).normal(size=(1, 2 + 6, 3))
    found = interpolate_positions(positions, (2, 3), (4, 3), prefix=2)
    assert found.shape == (1, 2 + 12, 3)
    np.testing.assert_array_equal(found[:, :2], positions[:, :2])
    one = interpolate_positions(positions[0], (2, 3), (4, 3), prefix=2)
    np.testing.assert_array_equal(found[0], one)
