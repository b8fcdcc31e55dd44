"""Image and text towers agree with the implementations that publish them, on random weights."""

import copy
import json

import jax
import numpy as np
import pytest

from jaxrel.models import CLIP, DINO, SigLIP

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

# Float32 on both sides; the frameworks add in different orders, through two or three layers on
# values of order 1 to 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def randomised(model):
    """The model with values of order 1 where fresh ones are 0 or 1, which would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # The noise of a wide layer is smaller, or a deep one would amplify every rounding.
            inputs = parameter[0].numel() if parameter.ndim in (2, 4) else 1
            parameter.add_(0.1 * min(1, (32 / inputs) ** 0.5) * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn_like(buffer))
            if buffer_name.endswith("running_var"):
                buffer.mul_(1 + 0.5 * torch.rand_like(buffer))
    return model.eval()


def channels_first(image):
    return torch.tensor(image.transpose(0, 3, 1, 2))


def random_image(size, batch=2):
    return np.random.default_rng(0).normal(size=(batch, *size, 3)).astype(np.float32)


# ---- OpenCLIP

VISION = {"image_size": 24, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 9, "vocab_size": 50, "width": 24, "heads": 3, "layers": 2}


def write_open_clip(folder, vision=VISION, image_size=None, **model_cfg):
    """A random model of OpenCLIP, saved in `folder`."""
    open_clip = pytest.importorskip("open_clip")
    config = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT, **model_cfg}
    custom = config.pop("custom_text", False)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    torch.manual_seed(0)
    model = randomised(kind(**config))
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config |= {"custom_text": True} if custom else {}
    settings = {"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return model


def random_text(batch=3):
    text = np.random.default_rng(1).integers(1, 48, (batch, 9)).astype(np.int32)
    text[:, 5] = 49
    text[:, 6:] = 0
    return text


def check_open_clip(model, ours, image):
    text = random_text()
    # In float64, since a random ResNet may amplify the rounding of float32, its own and ours.
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        theirs = [
            model.encode_image(channels_first(image).double(), normalize=True),
            model.encode_text(torch.tensor(text, dtype=torch.int64), normalize=True),
        ]
        logits = model.logit_scale.exp() * theirs[0] @ theirs[1].T
    output = jax.jit(CLIP.__call__)(ours, {"image": image, "text": text})
    for name, expected in zip(
        ("image_embeds", "text_embeds", "logits_per_image"), (*theirs, logits), strict=True
    ):
        np.testing.assert_allclose(output[name], expected.numpy(), **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip(quick_gelu, custom_text, tmp_path):
    model = write_open_clip(tmp_path, quick_gelu=quick_gelu, custom_text=custom_text)
    check_open_clip(model, CLIP.from_pretrained(tmp_path), random_image((24, 24)))


def test_open_clip_of_images_that_are_not_square(tmp_path):
    model = write_open_clip(tmp_path, VISION | {"image_size": [16, 40]})
    check_open_clip(model, CLIP.from_pretrained(tmp_path), random_image((16, 40)))


@pytest.mark.parametrize("size", [40, 16, (16, 48)], ids=["larger", "smaller", "wide"])
def test_open_clip_for_another_image_size(size, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    state = write_open_clip(tmp_path).state_dict()
    vision = VISION | {"image_size": size}
    model = open_clip.CLIP(embed_dim=20, vision_cfg=vision, text_cfg=TEXT).eval()
    open_clip.model.resize_pos_embed(state, model, antialias=True)
    model.load_state_dict(state)
    ours = CLIP.from_pretrained(tmp_path, image_size=size)
    check_open_clip(model, ours, random_image(ours.config.vision.sides))


@pytest.mark.parametrize("name", ["tiny", "RN50"])
def test_resnet_of_open_clip(name, tmp_path):
    tiny = {"image_size": 64, "layers": [2, 1, 3, 1], "width": 8, "head_width": 32}
    vision = tiny if name == "tiny" else {**tiny, "layers": [3, 4, 6, 3], "width": 64}
    model = write_open_clip(tmp_path, vision, quick_gelu=True)
    check_open_clip(model, CLIP.from_pretrained(tmp_path), random_image((64, 64)))


def test_preprocessing_of_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from PIL import Image

    write_open_clip(tmp_path)
    path = tmp_path / "open_clip_config.json"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 31, 3), np.uint8))
    for mode in ("shortest", "squash"):
        settings = json.loads(path.read_text())
        settings["preprocess_cfg"] = {"resize_mode": mode, "interpolation": "bicubic"}
        path.write_text(json.dumps(settings))
        theirs = open_clip.image_transform(24, is_train=False, resize_mode=mode)(image)
        ours = CLIP.from_pretrained(tmp_path).processor.image(image)[0]
        # Both resize with Pillow to whole numbers; then float32.
        np.testing.assert_allclose(ours, theirs.numpy().transpose(1, 2, 0), **TOLERANCE)


# ---- SigLIP

SIGLIP = {
    "vision_config": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 24,
        "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 30,
        "vocab_size": 50,
        "max_position_embeddings": 9,
        "projection_size": 24,
    },
}


def siglip(folder):
    torch.manual_seed(0)
    config = transformers.SiglipConfig(**SIGLIP)
    config._attn_implementation = "eager"
    model = randomised(transformers.SiglipModel(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("size", [None, 40, (16, 40)], ids=["native", "larger", "wide"])
def test_siglip(size, tmp_path):
    model = siglip(tmp_path)
    ours = SigLIP.from_pretrained(tmp_path, image_size=size)
    image, text = random_image(ours.config.vision.sides), random_text()
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(text, dtype=torch.int64),
            pixel_values=channels_first(image),
            interpolate_pos_encoding=size is not None,
            output_attentions=True,
        )
    run = jax.jit(SigLIP.__call__, static_argnames="return_attention")
    output, maps = run(ours, {"image": image, "text": text}, return_attention=True)
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        np.testing.assert_allclose(output[name], expected[name].numpy(), **TOLERANCE, err_msg=name)
    for name in ("vision", "text"):
        theirs = np.stack([x.numpy() for x in expected[f"{name}_model_output"].attentions])
        np.testing.assert_allclose(maps[name], theirs, **TOLERANCE, err_msg=name)


def test_siglip_that_we_save_transformers_loads(tmp_path):
    model = siglip(tmp_path / "theirs")
    SigLIP.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = transformers.SiglipModel.from_pretrained(tmp_path / "ours").state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


# ---- DINO

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 24,
    "patch_size": 4,
}
DINOS = {
    "dinov2": ("Dinov2", {"mlp_ratio": 2}),
    "swiglu": ("Dinov2", {"mlp_ratio": 4, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegisters", {"mlp_ratio": 2, "num_register_tokens": 3}),
    "dinov3": ("DINOv3ViT", {"intermediate_size": 40, "num_register_tokens": 4}),
    "dinov3 gated": (
        "DINOv3ViT",
        {
            "intermediate_size": 40,
            "num_register_tokens": 4,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "query_bias": False,
            "value_bias": False,
        },
    ),
}


def dino(name, folder):
    kind, more = DINOS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    config._attn_implementation = "eager"
    model = randomised(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "size", [24, 16, 40, (16, 40)], ids=["native", "smaller", "larger", "wide"]
)
@pytest.mark.parametrize("name", DINOS)
def test_dino(name, size, tmp_path):
    model = dino(name, tmp_path)
    ours = DINO.from_pretrained(tmp_path, image_size=size)
    image = random_image(ours.config.sides)
    with torch.no_grad():
        expected = model(channels_first(image), output_attentions=True)
    run = jax.jit(DINO.__call__, static_argnames="return_attention")
    output, maps = run(ours, {"image": image}, return_attention=True)
    for part in ("last_hidden_state", "pooler_output"):
        np.testing.assert_allclose(output[part], expected[part].numpy(), **TOLERANCE, err_msg=part)
    theirs = np.stack([x.numpy() for x in expected.attentions])
    np.testing.assert_allclose(maps["vision"], theirs, **TOLERANCE)


@pytest.mark.parametrize("name", DINOS)
def test_dino_that_we_save_transformers_loads(name, tmp_path):
    model = dino(name, tmp_path / "theirs")
    DINO.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").state_dict()
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
