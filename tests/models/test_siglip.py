"""SigLIP: as the paper has it, read as it is published, and explained through its pooling."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image
from safetensors.numpy import load_file

import jaxrel
from jaxrel import attention
from jaxrel.models import SigLIP, SigLIPConfig, from_pretrained
from tests.models import naive_towers
from tests.models.published import SIGLIP, write_siglip

# Float32 against float64, through three layers on values of order 1 to 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
METHODS = attention.METHODS
FORWARD = jax.jit(lambda model, inputs: model(inputs, return_attention=True))
SCORE = jax.jit(lambda model, inputs: model.score(inputs))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    return folder, write_siglip(folder)


@pytest.fixture(scope="module")
def model(published):
    return SigLIP.from_pretrained(published[0])


@pytest.fixture
def folder(published, tmp_path):
    return Path(shutil.copytree(published[0], tmp_path / "model"))


def random_inputs(size=(16, 16), batch=2):
    rng = np.random.default_rng(0)
    text = rng.integers(0, 12, (batch, 8)).astype(np.int32)
    return {"image": rng.normal(size=(batch, *size, 3)).astype(np.float32), "text": text}


def naive_embeddings(tensors, inputs):
    vision, text = SIGLIP["vision_config"], SIGLIP["text_config"]
    of_vision, of_text = (
        {"layers": part["num_hidden_layers"], "heads": part["num_attention_heads"]}
        for part in (vision, text)
    )
    patch = vision["patch_size"]
    images = [
        naive_towers.siglip_image(x.astype(np.float64), tensors, patch=patch, **of_vision)
        for x in inputs["image"]
    ]
    texts = [naive_towers.siglip_text(x, tensors, **of_text) for x in inputs["text"]]
    embeddings = (np.stack([x for x, _ in images]), np.stack(texts))
    maps = np.stack([x for _, x in images])
    return *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in embeddings), maps


def test_embeddings_logits_and_probabilities(published, model):
    inputs = random_inputs()
    image, text, pooling = naive_embeddings(published[1], inputs)
    output, maps = FORWARD(model, inputs)
    np.testing.assert_allclose(output["image_embeds"], image, **TOLERANCE)
    np.testing.assert_allclose(output["text_embeds"], text, **TOLERANCE)
    np.testing.assert_allclose(maps["vision/pooling"], pooling, **TOLERANCE)
    assert maps["vision"].shape == (2, 2, 2, 4, 4)
    scale, bias = (published[1][f"logit_{name}"][0] for name in ("scale", "bias"))
    logits = np.exp(scale) * image @ text.T + bias
    np.testing.assert_allclose(output["logits_per_image"], logits, **TOLERANCE)
    np.testing.assert_allclose(SCORE(model, inputs), np.diag(logits), **TOLERANCE)
    probabilities = jax.jit(lambda model, inputs: model.predict(inputs))(model, inputs)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), **TOLERANCE)


def test_a_text_sees_what_comes_after(model):
    inputs = random_inputs()
    later = {**inputs, "text": inputs["text"].copy()}
    later["text"][:, 6] = (later["text"][:, 6] + 1) % 12
    maps = [FORWARD(model, x)[1]["text"] for x in (inputs, later)]
    assert not np.allclose(maps[0][1][:, :, 0], maps[1][1][:, :, 0])


# ---- Explanations

TAPS = jax.jit(jaxrel.capture_with_grad(lambda m, x: m.score(x), ("vision", "vision/pooling")))


def by_hand(model, inputs, method):
    """Relevance of patches: maps and gradients of the encoder accumulated, then the pooling."""
    _, tags, grads = TAPS(model, {name: inputs[name] for name in ("image", "text")})
    maps, grad = (np.asarray(x["vision"], np.float64) for x in (tags, grads))
    pooling, of_pooling = (np.asarray(x["vision/pooling"], np.float64) for x in (tags, grads))
    rows = []
    for example in range(maps.shape[1]):
        tokens = maps.shape[-1]
        matrix = np.eye(tokens)
        for layer in range(len(maps)):
            product = np.maximum(maps[layer, example] * grad[layer, example], 0).mean(0)
            if method == "equal":
                matrix = matrix + product @ matrix
            elif method == "no_aggregation":
                matrix = product @ matrix
            else:  # rollout
                mixed = maps[layer, example].mean(0) + np.eye(tokens)
                matrix = mixed / mixed.sum(1, keepdims=True) @ matrix
        last = pooling[example].mean(0)
        if method != "rollout":
            last = np.maximum(pooling[example] * of_pooling[example], 0).mean(0)
        rows.append((last @ matrix)[0])
    return np.stack(rows)


def relevance(model, inputs, method, form="auto", **options):
    explain = attention.relevance(
        lambda model, inputs: model.score(inputs),
        method=method,
        attention=("vision", "text"),
        target_token={"vision": attention.Pooling("vision/pooling"), "text": 7},
        form=form,
        **options,
    )
    return jax.jit(explain)(model, inputs)


@pytest.fixture(scope="module")
def stacked(model):
    methods = ("equal", "weighted", "no_aggregation", "rollout", "raw", "grad_cam")
    return relevance(model, random_inputs(), methods)


@pytest.mark.parametrize("method", ["equal", "no_aggregation", "rollout"])
def test_relevance_is_read_through_the_pooling(model, stacked, method):
    expected = by_hand(model, random_inputs(), method)
    np.testing.assert_allclose(stacked[method]["vision"], expected, **TOLERANCE)


@pytest.mark.parametrize("method", ["equal", "weighted"])
def test_streamed_and_stacked_agree(model, stacked, method):
    streamed = relevance(model, random_inputs(), method, "streaming")
    for name in ("vision", "text"):
        np.testing.assert_allclose(streamed[name], stacked[method][name], **TOLERANCE)


def test_methods_of_the_last_layer_read_the_pooling(model, stacked):
    inputs = random_inputs()
    pooling, maps = (
        np.asarray(FORWARD(model, inputs)[1][name]) for name in ("vision/pooling", "vision")
    )
    np.testing.assert_allclose(stacked["raw"]["vision"], pooling.mean(1)[:, 0], **TOLERANCE)
    last = relevance(model, inputs, ("raw",), layers=[-1])["raw"]["vision"]
    maps = maps[-1].mean(1)
    expected = np.einsum("bk,bkj->bj", pooling.mean(1)[:, 0], maps)
    np.testing.assert_allclose(last, expected, **TOLERANCE)


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
ASKED = {"image": list(PIXELS), "text": ["A red CIRCLE", "blue"]}


@pytest.fixture(scope="module")
def by_method(model):
    """The explanations of two pairs by all methods."""
    methods = (*METHODS, "lrp", "cp_lrp", "input_x_gradient")
    found = jaxrel.explain(model, **ASKED, method=methods)
    return dict(zip(methods, found, strict=True))


def test_explain_has_all_methods(model, by_method):
    for explanation in by_method.values():
        assert explanation.image.shape == (2, 2, 2)
        assert [word for word, _ in explanation.words(0)] == ["a", "red", "circle"]
        assert explanation.pixels[0].shape == (20, 30, 3)  # all of it, resized
    inputs = model.pairs(model.prepare(image=ASKED["image"], text=["a red circle", "blue"]))
    expected = by_hand(model, inputs, "equal").reshape(2, 2, 2)
    np.testing.assert_allclose(by_method["equal"].image, expected, **TOLERANCE)
    coverage = {name: one.report["coverage"] for name, one in by_method.items()}
    assert all(one.method == name for name, one in by_method.items())
    # Two layers and the pooling of the image, three layers of the text.
    assert (coverage["equal"]["followed"], coverage["equal"]["layers"]) == (6, 6)
    assert (coverage["raw"]["followed"], coverage["raw"]["layers"]) == (2, 6)


def test_a_pooling_that_is_not_there(model):
    inputs = random_inputs()
    for tag, message in (
        ("pool", r"Pooling\('pool'\) needs one map with that tag, .* and there are 0"),
        ("vision", r"Pooling\('vision'\) needs one map"),
    ):
        explain = attention.relevance(
            lambda m, x: m.score(x), attention="vision", target_token=attention.Pooling(tag)
        )
        with pytest.raises(ValueError, match=message):
            explain(model, inputs)
    explain = attention.relevance(
        lambda m, x: m.score(x),
        attention="text",
        target_token=attention.Pooling("vision/pooling"),
    )
    with pytest.raises(
        ValueError, match=r"must be \[batch 2, heads, 1, tokens 8\], .* \(2, 2, 1, 4\)"
    ):
        explain(model, inputs)


# ---- Files


def test_round_trip(published, model, tmp_path):
    model.save_pretrained(tmp_path / "again")
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in published[1].items()
    }
    for name, value in published[1].items():
        np.testing.assert_array_equal(tensors[name], value)
    again = from_pretrained(tmp_path / "again")
    assert isinstance(again, SigLIP)
    assert again.config == model.config
    assert again.processor.images == model.processor.images


def test_defaults_are_those_of_the_published_configurations():
    sparse = {"text_config": {"vocab_size": 32000}, "vision_config": {"patch_size": 16}}
    assert SigLIPConfig.from_dict(sparse) == SigLIPConfig()


def test_preprocessing_without_a_crop(model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    want = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), np.float64) / 127.5 - 1
    np.testing.assert_allclose(model.processor.image(image)[0], want, rtol=1e-5, atol=1e-6)


def test_another_image_size(published, folder):
    for size, grid in ((32, (4, 4)), ((16, 32), (2, 4))):
        model = SigLIP.from_pretrained(folder, image_size=size)
        assert model.layout["vision"].grid == grid
        image = Image.new("RGB", (40, 50), (9, 200, 40))
        explanation = jaxrel.explain(model, image=image, text="red", method="raw")
        assert explanation.image.shape == (1, *grid)


def test_a_text_must_be_padded(model):
    inputs = random_inputs()
    with pytest.raises(ValueError, match=r"text must be padded to 8 tokens, .* got \[2, 5\]"):
        model(inputs | {"text": inputs["text"][:, :5]})


def change(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip2"}, "model_type 'siglip2', a NaFlex model .* is 'siglip'"),
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head is False, and .* true"),
        ({"vision_config": {"num_channels": 1}}, "num_channels must be 3, got 1"),
        ({"text_config": {"projection_size": 20}}, "embedded in 20 features .* images in 16"),
        ({"vision_config": {"hidden_act": "relu"}}, "unknown activation 'relu', known are"),
        ({"vision_config": {"patch_size": [8, 4]}}, "patch_size must be one integer"),
    ],
)
def test_what_is_not_supported_is_named(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_without_a_tokenizer_all_tokens_count(published):
    tensors = SigLIP.from_pretrained(published[0])
    bare = jax.tree.map(lambda x: x, tensors)
    bare.processor = type(bare.processor)()
    assert np.asarray(bare.content(random_inputs())["text"]).all()


def test_remat_and_bfloat16(published, model):
    inputs = random_inputs()
    again = SigLIP.from_pretrained(published[0])
    again.config = replace(again.config, remat=True)
    np.testing.assert_allclose(SCORE(again, inputs), SCORE(model, inputs), **TOLERANCE)
    half = SigLIP.from_pretrained(published[0], dtype="bfloat16")
    score = SCORE(half, inputs)
    assert score.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4% per operation, on cosines times exp of the scale.
    np.testing.assert_allclose(score, SCORE(model, inputs), atol=0.1)


@pytest.mark.devices(2)
def test_a_mesh_changes_nothing(model, by_method):
    """The probe and the row of relevance that begins at it are sharded as the examples are."""
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Explicit,))
    for methods in (("weighted",), ("equal", "rollout")):  # streamed, and stacked
        with jax.set_mesh(mesh):
            shared = jaxrel.explain(model, **ASKED, method=methods)
        for name, other in zip(methods, shared, strict=True):
            one = by_method[name]
            np.testing.assert_allclose(one.image, other.image, **TOLERANCE)
            np.testing.assert_allclose(one.text, other.text, **TOLERANCE)
