"""OpenCLIP's own layout: what it says is what the Hugging Face layout says of the same model."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import jaxrel
from jaxrel.models import CLIP, CLIPMapperVQA, CLIPResNet, from_pretrained
from tests.models.published import write_open_clip
from tests.zoo.clips import small_clip


def saved_clip(folder, activation):
    """A small CLIP in the Hugging Face layout whose texts end at their highest id."""
    model = small_clip()
    vision, text = (
        replace(one, activation=activation, **more)
        for one, more in ((model.config.vision, {}), (model.config.text, {"eos_token_id": 2}))
    )
    model.config = replace(model.config, vision=vision, text=text)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def folders(request, tmp_path_factory):
    """The same model in both layouts."""
    root = tmp_path_factory.mktemp("folders")
    theirs = saved_clip(root / "hugging-face", request.param)
    ours = write_open_clip(theirs, root / "open-clip", quick_gelu=request.param == "quick_gelu")
    return theirs, ours


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder with other settings."""
    theirs = saved_clip(tmp_path / "hugging-face", "gelu")

    def make(name="open-clip", **settings):
        return write_open_clip(theirs, tmp_path / name, quick_gelu=False, **settings)

    return make


def random_inputs():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 11, (3, 8)).astype(np.int32)
    text[:, 4] = 11
    return {"image": rng.normal(size=(2, 16, 16, 3)).astype(np.float32), "text": text}


def test_both_layouts_are_one_model(folders):
    theirs, ours = (CLIP.from_pretrained(folder) for folder in folders)
    assert ours.config == replace(theirs.config, logit_scale=ours.config.logit_scale)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))
    run = jax.jit(lambda model, inputs: model(inputs)["logits_per_image"])
    outputs = [run(model, random_inputs()) for model in (ours, theirs)]
    np.testing.assert_array_equal(*outputs)
    assert isinstance(from_pretrained(folders[1]), CLIP)


def test_the_activation_is_read(folder):
    assert CLIP.from_pretrained(folder("a")).config.vision.activation == "gelu"
    quick = CLIP.from_pretrained(folder("b", model={"quick_gelu": True})).config
    assert (quick.vision.activation, quick.text.activation) == ("quick_gelu", "quick_gelu")


def test_a_text_tower_of_its_own(folder):
    """`custom_text` puts "text." before the names of the text tower."""
    plain, custom = (CLIP.from_pretrained(folder(f"p{p}", prefix=p)) for p in ("", "text."))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(plain), jax.tree.leaves(custom))


def test_the_hugging_face_layout_comes_first(folders, tmp_path):
    theirs, ours = folders
    both = shutil.copytree(theirs, tmp_path / "both")
    for path in ours.iterdir():
        shutil.copy(path, both)
    assert (
        CLIP.from_pretrained(both).config.logit_scale
        == CLIP.from_pretrained(theirs).config.logit_scale
    )
    # Beside OpenCLIP's files there may be timm's image tower.
    (both / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    leaves = [jax.tree.leaves(CLIP.from_pretrained(folder)) for folder in (both, ours)]
    jax.tree.map(np.testing.assert_array_equal, *leaves)


def test_another_model_of_transformers_beside_it_comes_first(folders, tmp_path):
    theirs, ours = folders
    both = shutil.copytree(theirs, tmp_path / "both")
    shutil.copy(ours / "open_clip_config.json", both)
    (both / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="a model of type 'siglip', and this class loads 'clip'"):
        CLIP.from_pretrained(both)


def test_a_subclass_loads_itself_and_no_other_tower(folders):
    class Mine(CLIP):
        pass

    for folder in folders:
        assert type(Mine.from_pretrained(folder)) is Mine
    with pytest.raises(ValueError, match="holds a CLIP with a ViT, and this class, CLIPResNet"):
        CLIPResNet.from_pretrained(folders[1])


def test_preprocessing(folder):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    shortest = CLIP.from_pretrained(folder("a")).processor
    want = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC), np.float64)[:, 4:20] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    np.testing.assert_allclose(
        shortest.image(image)[0], (want - mean) / std, rtol=1e-5, atol=1e-6
    )  # float32
    images = {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3}
    squash = CLIP.from_pretrained(folder("b", images=images | {"std": [0.5] * 3})).processor
    want = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float64) / 127.5 - 1
    np.testing.assert_allclose(squash.image(image)[0], want, rtol=1e-5, atol=1e-6)  # float32


def test_images_that_are_not_square(folder):
    squash = {"resize_mode": "squash"}
    model = CLIP.from_pretrained(folder(images=squash), image_size=(16, 24))
    assert model.layout["vision"].grid == (2, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    pixels = model.processor.image(image, side=model.config.vision.sides)
    assert pixels.shape == (1, 16, 24, 3)
    score = model.score({"image": pixels, "text": random_inputs()["text"][:1]})
    assert np.isfinite(score).all()


def test_explain(folders):
    theirs, ours = folders
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(theirs / name, ours)
    model = CLIP.from_pretrained(ours)
    # These weights end texts at the highest id, and the tokenizer with another.
    text = replace(model.config.text, eos_token_id=3)
    model.config = replace(model.config, text=text)
    image = Image.new("RGB", (20, 30), (200, 30, 90))
    explanation = jaxrel.explain(model, image=image, text="a red circle", method="weighted")
    assert explanation.image.shape == (1, 2, 2)
    assert explanation.report["coverage"]["share"] == 1
    assert [word for word, _ in explanation.words(0)] == ["a", "red", "circle"]


def test_what_we_save_is_the_hugging_face_layout(folders, tmp_path):
    model = CLIP.from_pretrained(folders[1])
    model.save_pretrained(tmp_path / "saved")
    again = CLIP.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(model), jax.tree.leaves(again))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vision": {"timm_model_name": "vit_base_patch16_siglip_224"}},
            "vision_cfg.timm_model_name is 'vit_base_.*', and what is supported is that it is left",
        ),
        (
            {"vision": {"pool_type": "avg"}},
            "vision_cfg.pool_type is 'avg', and what is supported is 'tok'",
        ),
        ({"vision": {"no_ln_pre": True}}, "vision_cfg.no_ln_pre is True"),
        (
            {"vision": {"patch_size": [8, 8]}},
            r"vision_cfg.patch_size must be a positive integer, got \[8, 8\]",
        ),
        ({"vision": {"mlp_ratio": "4"}}, "vision_cfg.mlp_ratio must be a positive number, got '4'"),
        (
            {"text": {"pool_type": "last"}},
            "text_cfg.pool_type is 'last', and what is supported is 'argmax'",
        ),
        ({"text": {"hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name is 'roberta-base'"),
        ({"text": {"no_causal_mask": True}}, "text_cfg.no_causal_mask is True"),
        ({"model": {"init_logit_bias": -10}}, "model_cfg.init_logit_bias is -10"),
        ({"model": {"multimodal_cfg": {"width": 4}}}, "model_cfg.multimodal_cfg is {'width': 4}"),
        (
            {"model": {"embed_dim": None}},
            "model_cfg.embed_dim must be a positive integer, got None",
        ),
        ({"model": {"text_cfg": None}}, "model_cfg.text_cfg must be an object, got None"),
        (
            {"images": {"resize_mode": "longest"}},
            "preprocess_cfg.resize_mode is 'longest', .* supported is 'shortest' or 'squash'",
        ),
        ({"images": {"interpolation": "random"}}, "preprocess_cfg.interpolation is 'random'"),
        (
            {"images": {"size": [16, 24]}},
            "what is supported of images that are not square is 'squash'",
        ),
        ({"images": {"mean": "a"}}, "image_mean must be three numbers"),
    ],
)
def test_what_is_not_supported_is_named(folder, settings, message):
    with pytest.raises(ValueError, match=rf"open_clip_config.json: .*{message}"):
        CLIP.from_pretrained(folder(**settings))


def test_weights_of_another_model(folder):
    text = {"layers": 2}
    message = "not those of the model that open_clip_config.json describes. 12 tensors are unexp"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(folder(text=text))


def test_pickled_and_missing_weights(folder):
    broken = folder()
    (broken / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*open_clip_model.safetensors"):
        CLIP.from_pretrained(broken)
    (broken / "open_clip_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"open_clip_pytorch_model.bin is a pickled checkpoint"):
        CLIP.from_pretrained(broken)


def test_other_classes_say_which_reads_it(folder):
    with pytest.raises(ValueError, match=r"layout of OpenCLIP .* only CLIP.from_pretrained reads"):
        CLIPMapperVQA.from_pretrained(folder())


def test_damaged_settings(folder):
    broken = folder()
    (broken / "open_clip_config.json").write_text(json.dumps({"model_cfg": []}))
    with pytest.raises(ValueError, match=r"open_clip_config.json: model_cfg must be an object"):
        from_pretrained(broken)
