"""CLIP with a ResNet: as OpenAI published it, read from OpenCLIP, explained in pixels."""

import copy
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image

import jaxrel
from jaxrel.models import CLIP, CLIPResNet, from_pretrained
from tests.models import naive_towers
from tests.models.published import RESNET, write_clip_resnet

# Float32 against float64, through 24 convolutions on values of order 1 to 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SCORE = jax.jit(lambda model, inputs: model.score(inputs))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet") / "model"
    return folder, write_clip_resnet(folder)


def loaded(folder):
    model = CLIP.from_pretrained(folder)
    # These weights end texts at the highest id, and the tokenizer of the tests with another.
    model.config = replace(model.config, text=replace(model.config.text, eos_token_id=3))
    return model


@pytest.fixture(scope="module")
def model(published):
    return loaded(published[0])


# ---- The tower, naively


def convolve(x, kernel, stride):
    outputs, _, side, _ = kernel.shape
    x = np.pad(x, ((side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    rows, columns = ((size - side) // stride + 1 for size in x.shape[:2])
    out = np.zeros((rows, columns, outputs))
    for i in range(rows):
        for j in range(columns):
            part = x[i * stride : i * stride + side, j * stride : j * stride + side]
            out[i, j] = np.einsum("hwc,ochw->o", part, kernel)
    return out


def conv_norm(x, tensors, conv, norm, stride=1):
    get = lambda name: tensors[f"visual.{norm}.{name}"].astype(np.float64)
    x = convolve(x, tensors[f"visual.{conv}.weight"].astype(np.float64), stride)
    x = (x - get("running_mean")) / np.sqrt(get("running_var") + 1e-5)
    return x * get("weight") + get("bias")


def halved(x):
    rows, columns = x.shape[0] // 2, x.shape[1] // 2
    x = x[: 2 * rows, : 2 * columns]
    return x.reshape(rows, 2, columns, 2, -1).mean((1, 3))


def tower(image, tensors, heads):
    relu = lambda x: np.maximum(x, 0)
    x = image
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = relu(conv_norm(x, tensors, f"conv{i}", f"bn{i}", stride))
    x = halved(x)
    for stage, depth in enumerate(RESNET["model_cfg"]["vision_cfg"]["layers"], 1):
        for block in range(depth):
            name, down = f"layer{stage}.{block}", stage > 1 and block == 0
            y = relu(conv_norm(x, tensors, f"{name}.conv1", f"{name}.bn1"))
            y = relu(conv_norm(y, tensors, f"{name}.conv2", f"{name}.bn2"))
            if down:
                x, y = halved(x), halved(y)
            y = conv_norm(y, tensors, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = conv_norm(x, tensors, f"{name}.downsample.0", f"{name}.downsample.1")
            x = relu(x + y)
    x = x.reshape(-1, x.shape[-1])
    x = np.concatenate([x.mean(0, keepdims=True), x])
    x = x + tensors["visual.attnpool.positional_embedding"]
    q, k, v = (naive_towers.linear(x, tensors, f"visual.attnpool.{n}_proj") for n in "qkv")
    pooled, maps = naive_towers.attend(q[:1], k, v, heads)
    return naive_towers.linear(pooled, tensors, "visual.attnpool.c_proj")[0], maps


def random_inputs(size=(64, 64)):
    rng = np.random.default_rng(0)
    text = rng.integers(0, 11, (2, 8)).astype(np.int32)
    text[:, 4] = 3
    return {"image": rng.normal(size=(2, *size, 3)).astype(np.float32), "text": text}


def test_embeddings_and_the_pooling_map(published, model):
    inputs = random_inputs()
    output, maps = jax.jit(lambda m, x: m(x, return_attention=True))(model, inputs)
    found = [tower(x.astype(np.float64), published[1], 4) for x in inputs["image"]]
    expected = np.stack([x / np.linalg.norm(x) for x, _ in found])
    np.testing.assert_allclose(output["image_embeds"], expected, **TOLERANCE)
    np.testing.assert_allclose(maps["vision/pooling"], np.stack([m for _, m in found]), **TOLERANCE)
    assert maps["text"].shape == (2, 2, 3, 8, 8)
    logits = np.exp(published[1]["logit_scale"]) * expected @ np.asarray(output["text_embeds"]).T
    np.testing.assert_allclose(output["logits_per_image"], logits, **TOLERANCE)


def test_it_is_loaded_by_any_name(published):
    for load in (CLIP.from_pretrained, CLIPResNet.from_pretrained, from_pretrained):
        assert type(load(published[0])) is CLIPResNet


@jax.jit
def by_hand(model, inputs):
    """Score, Grad-CAM and input x gradient."""

    def score(image):
        return model.score({**inputs, "image": image})

    image = inputs["image"]
    value, pullback = jax.vjp(score, image)
    grid = jaxrel.gradients.grad_cam(score, "vision/features")(image)
    (gradient,) = pullback(jnp.ones_like(value))
    return value, grid, (gradient * image).sum(-1)


def test_explain(tmp_path):
    config = copy.deepcopy(RESNET)
    config["model_cfg"]["vision_cfg"]["layers"] = [1, 1, 3, 1]
    write_clip_resnet(tmp_path / "model", config)
    model = loaded(tmp_path / "model")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    asked = {"image": image, "text": ["a red circle", "blue"]}
    methods = ("lrp", "cp_lrp", "input_x_gradient")
    found = [jaxrel.explain(model, **asked), *jaxrel.explain(model, **asked, method=methods)]
    assert found[0].method == "grad_cam"
    inputs = model.pairs(model.prepare(**asked))
    score, grid, expected = by_hand(model, {name: inputs[name] for name in ("image", "text")})
    for explanation in found:
        assert explanation.image.shape == (2, 64, 64)  # in pixels
        assert [word for word, _ in explanation.words(0)] == ["a", "red", "circle"]
        np.testing.assert_allclose(explanation.score, score, rtol=1e-5)
    resized = jax.image.resize(grid, (2, 64, 64), "bilinear")
    np.testing.assert_allclose(found[0].image, resized, **TOLERANCE)  # fused differently
    np.testing.assert_allclose(found[3].image, expected, **TOLERANCE)


def test_methods_of_attention_are_refused(model):
    image = Image.new("RGB", (64, 64))
    message = "no attention over an image's tokens 'weighted'; there are grad_cam, lrp, cp_lrp"
    with pytest.raises(ValueError, match=message):
        jaxrel.explain(model, image=image, text="blue", method="weighted")
    message = "layers and heads choose attention maps, and CLIPResNet reads images by convolutions"
    with pytest.raises(ValueError, match=message):
        jaxrel.explain(model, image=image, text="blue", layers=[-1])


def test_another_image_size(published):
    model = CLIP.from_pretrained(published[0], image_size=(64, 96))
    assert model.vision.position_embedding.shape == (1 + 6, 128)
    assert np.isfinite(SCORE(model, random_inputs((64, 96)))).all()


def test_it_cannot_be_saved(model, tmp_path):
    with pytest.raises(NotImplementedError, match="a CLIP with a ResNet cannot be saved"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 2, 3]}, r"stages must be four positive integers, got \[1, 2, 3\]"),
        ({"head_width": 25}, "width 128 is not a multiple of its 5 heads"),
        ({"image_size": 16}, "image_size 16 is smaller than one patch of 32 pixels"),
        ({"attentional_pool": True}, "vision_cfg.attentional_pool is True"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, message):
    write_clip_resnet(tmp_path)
    config = json.loads(json.dumps(RESNET))
    config["model_cfg"]["vision_cfg"] |= changes
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(tmp_path)
