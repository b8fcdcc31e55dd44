"""Small models with random weights, written as they are published."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxrel.models import word_tokenizer
from tests.zoo.clips import WORDS

# The names of OpenCLIP for what the Hugging Face layout calls otherwise, in this order.
_OPEN_CLIP = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
)


def write_open_clip(hugging_face, folder, *, quick_gelu, prefix="", **settings):
    """Write what a folder in the Hugging Face layout holds in that of OpenCLIP."""
    folder.mkdir()
    theirs = load_file(hugging_face / "model.safetensors")
    tensors = {}
    for name, value in theirs.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = np.concatenate([theirs[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for old, new in _OPEN_CLIP:
            name = name.replace(old, new)
        if name.endswith(("visual.proj", "text_projection")):
            value = np.ascontiguousarray(value.T)
        if not name.startswith(("visual.", "logit_scale")):
            name = prefix + name
        tensors[name] = value
    save_file(tensors, folder / "open_clip_model.safetensors")
    config = json.loads((hugging_face / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    model = {
        "embed_dim": config["projection_dim"],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }
    model |= {"quick_gelu": True} if quick_gelu else {}
    model |= {"custom_text": True} if prefix else {}
    preprocessing = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    sections = {
        "vision": model["vision_cfg"],
        "text": model["text_cfg"],
        "model": model,
        "images": preprocessing,
    }
    for name, changes in settings.items():
        sections[name].update(changes)
    whole = {"model_cfg": model, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    return folder


def random_tensors(shapes, seed=0):
    """Tensors of these shapes, of a size that keeps values of order 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape) * (0.5 if len(shape) < 2 else 0.3)
        norm = name.endswith("weight") and len(shape) == 1
        tensors[name] = np.asarray(value + 1 if norm else value, np.float32)
    return tensors


def _linear(name, outputs, inputs, *, bias=True):
    found = {f"{name}.weight": (outputs, inputs)}
    return found | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# ---- SigLIP

SIGLIP = {
    "model_type": "siglip",
    "architectures": ["SiglipModel"],
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 8,
    },
    "text_config": {
        "model_type": "siglip_text_model",
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "vocab_size": 12,
        "max_position_embeddings": 8,
        "projection_size": 16,
    },
}
SIGLIP_IMAGES = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 16, "width": 16},
}


def siglip_shapes(config=SIGLIP):
    """Names and shapes as in the published files of google/siglip-base-patch16-224."""
    shapes = {"logit_scale": (1,), "logit_bias": (1,)}
    for part, name in (("vision_config", "vision_model"), ("text_config", "text_model")):
        sizes = config[part]
        width, hidden = sizes["hidden_size"], sizes["intermediate_size"]
        for layer in range(sizes["num_hidden_layers"]):
            block = f"{name}.encoder.layers.{layer}"
            for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= _linear(f"{block}.self_attn.{linear}", width, width)
            shapes |= _linear(f"{block}.mlp.fc1", hidden, width)
            shapes |= _linear(f"{block}.mlp.fc2", width, hidden)
            shapes |= _norm(f"{block}.layer_norm1", width) | _norm(f"{block}.layer_norm2", width)
    sizes = config["vision_config"]
    width, hidden, side = sizes["hidden_size"], sizes["intermediate_size"], sizes["patch_size"]
    embeddings, head = "vision_model.embeddings", "vision_model.head"
    shapes |= {
        f"{embeddings}.patch_embedding.weight": (width, 3, side, side),
        f"{embeddings}.patch_embedding.bias": (width,),
        f"{embeddings}.position_embedding.weight": ((sizes["image_size"] // side) ** 2, width),
        f"{head}.probe": (1, 1, width),
        f"{head}.attention.in_proj_weight": (3 * width, width),
        f"{head}.attention.in_proj_bias": (3 * width,),
        **_linear(f"{head}.attention.out_proj", width, width),
        **_norm(f"{head}.layernorm", width),
        **_linear(f"{head}.mlp.fc1", hidden, width),
        **_linear(f"{head}.mlp.fc2", width, hidden),
        **_norm("vision_model.post_layernorm", width),
    }
    sizes = config["text_config"]
    width = sizes["hidden_size"]
    return shapes | {
        "text_model.embeddings.token_embedding.weight": (sizes["vocab_size"], width),
        "text_model.embeddings.position_embedding.weight": (
            sizes["max_position_embeddings"],
            width,
        ),
        **_norm("text_model.final_layer_norm", width),
        **_linear("text_model.head", sizes["projection_size"], width),
    }


def write_siglip(folder, config=SIGLIP):
    """Write a random SigLIP, and return its tensors."""
    folder.mkdir(exist_ok=True)
    tensors = random_tensors(siglip_shapes(config))
    write(folder, config, tensors, SIGLIP_IMAGES)
    word_tokenizer(WORDS, config["text_config"]["max_position_embeddings"]).save_pretrained(folder)
    return tensors


def write(folder, config, tensors, images=None):
    """Write a folder in the Hugging Face layout."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    if images is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(images))


# ---- DINO

_DINO = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
DINO = {
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 3, **_DINO},
    "swiglu": {"model_type": "dinov2", "mlp_ratio": 4, "use_swiglu_ffn": True, **_DINO},
    "registers": {
        "model_type": "dinov2_with_registers",
        "mlp_ratio": 3,
        "num_register_tokens": 3,
        **_DINO,
    },
    "dinov3": {
        "model_type": "dinov3_vit",
        "intermediate_size": 20,
        "num_register_tokens": 4,
        **_DINO,
    },
    "dinov3 gated": {
        "model_type": "dinov3_vit",
        "intermediate_size": 20,
        "num_register_tokens": 4,
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "query_bias": False,
        "value_bias": False,
        **_DINO,
    },
}
DINOV2_IMAGES = {
    "crop_size": {"height": 16, "width": 16},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 18},
}
DINOV3_IMAGES = {
    "crop_size": None,
    "do_center_crop": None,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 16, "width": 16},
}


def dino_shapes(config):
    """Names and shapes as in the published files of facebook/dinov2-base and dinov3-vits16."""
    v3 = config["model_type"] == "dinov3_vit"
    width, side = config["hidden_size"], config["patch_size"]
    patches = "embeddings.patch_embeddings" + ("" if v3 else ".projection")
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, 1, width) if v3 else (1, width),
        f"{patches}.weight": (width, 3, side, side),
        f"{patches}.bias": (width,),
        **_norm("norm" if v3 else "layernorm", width),
    }
    if not v3:
        tokens = 1 + (config["image_size"] // side) ** 2
        shapes["embeddings.position_embeddings"] = (1, tokens, width)
    if config.get("num_register_tokens"):
        shapes["embeddings.register_tokens"] = (1, config["num_register_tokens"], width)
    for layer in range(config["num_hidden_layers"]):
        shapes |= _dino_layer(config, f"layer.{layer}" if v3 else f"encoder.layer.{layer}", v3)
    return shapes


def _dino_layer(config, block, v3):
    width = config["hidden_size"]
    shapes = {f"{block}.layer_scale{i}.lambda1": (width,) for i in (1, 2)}
    shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
    if v3:
        hidden = config["intermediate_size"]
        for name, usual in (("query", True), ("key", False), ("value", True)):
            bias = config.get(f"{name}_bias", usual)
            shapes |= _linear(f"{block}.attention.{name[0]}_proj", width, width, bias=bias)
        shapes |= _linear(f"{block}.attention.o_proj", width, width)
        for name in ("up_proj", *(["gate_proj"] if config.get("use_gated_mlp") else [])):
            shapes |= _linear(f"{block}.mlp.{name}", hidden, width)
        return shapes | _linear(f"{block}.mlp.down_proj", width, hidden)
    for name in ("query", "key", "value"):
        shapes |= _linear(f"{block}.attention.attention.{name}", width, width)
    shapes |= _linear(f"{block}.attention.output.dense", width, width)
    hidden = config["mlp_ratio"] * width
    if config.get("use_swiglu_ffn"):
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        shapes |= _linear(f"{block}.mlp.weights_in", 2 * hidden, width)
        return shapes | _linear(f"{block}.mlp.weights_out", width, hidden)
    shapes |= _linear(f"{block}.mlp.fc1", hidden, width)
    return shapes | _linear(f"{block}.mlp.fc2", width, hidden)


def write_dino(folder, config, *, images=True):
    """Write a random DINO, and return its tensors."""
    tensors = random_tensors(dino_shapes(config))
    v3 = config["model_type"] == "dinov3_vit"
    write(folder, config, tensors, (DINOV3_IMAGES if v3 else DINOV2_IMAGES) if images else None)
    return tensors


# ---- CLIP with a ResNet

RESNET = {
    "model_cfg": {
        "embed_dim": 10,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 64,
            "layers": [2, 1, 3, 1],
            "width": 4,
            "head_width": 32,
            "patch_size": None,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 12, "width": 12, "heads": 3, "layers": 2},
    },
    "preprocess_cfg": {"resize_mode": "shortest", "interpolation": "bicubic"},
}


def resnet_shapes(config=RESNET):
    """Names and shapes as in the published files of OpenAI's RN50 in the layout of OpenCLIP."""
    model = config["model_cfg"]
    vision, text, embed = model["vision_cfg"], model["text_cfg"], model["embed_dim"]
    shapes = {"logit_scale": (), "text_projection": (text["width"], embed)}

    def conv_norm(conv, norm, inputs, outputs, side):
        shapes[f"visual.{conv}.weight"] = (outputs, inputs, side, side)
        statistics = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"visual.{norm}.{name}": (outputs,) for name in statistics})
        shapes[f"visual.{norm}.num_batches_tracked"] = ()

    stem = vision["width"]
    for i, (a, b) in enumerate(((3, stem // 2), (stem // 2, stem // 2), (stem // 2, stem)), 1):
        conv_norm(f"conv{i}", f"bn{i}", a, b, 3)
    inputs = stem
    for stage, depth in enumerate(vision["layers"], 1):
        width = stem * 2 ** (stage - 1)
        for block in range(depth):
            name = f"layer{stage}.{block}"
            for i, (a, b, side) in enumerate(
                ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)), 1
            ):
                conv_norm(f"{name}.conv{i}", f"{name}.bn{i}", a, b, side)
            if block == 0:
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", inputs, 4 * width, 1)
            inputs = 4 * width
    positions = 1 + (vision["image_size"] // 32) ** 2
    shapes["visual.attnpool.positional_embedding"] = (positions, inputs)
    for name in ("q_proj", "k_proj", "v_proj"):
        shapes |= _linear(f"visual.attnpool.{name}", inputs, inputs)
    shapes |= _linear("visual.attnpool.c_proj", embed, inputs)
    width = text["width"]
    shapes |= {
        "token_embedding.weight": (text["vocab_size"], width),
        "positional_embedding": (text["context_length"], width),
        **_norm("ln_final", width),
    }
    for layer in range(text["layers"]):
        block = f"transformer.resblocks.{layer}"
        shapes |= _linear(f"{block}.attn.out_proj", width, width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width)}
        shapes |= {f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}.mlp.c_fc", 4 * width, width)
        shapes |= _linear(f"{block}.mlp.c_proj", width, 4 * width)
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
    return shapes


def write_clip_resnet(folder, config=RESNET):
    """Write a random CLIP with a ResNet in the layout of OpenCLIP, and return its tensors."""
    folder.mkdir(exist_ok=True)
    tensors = random_tensors(resnet_shapes(config))
    for name in tensors:
        if name.endswith("running_var"):
            tensors[name] = np.abs(tensors[name]) + 1
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7, np.int64)
        if "visual." in name and tensors[name].ndim == 4:
            fan = np.prod(tensors[name].shape[1:])
            tensors[name] = (tensors[name] / 0.3 * np.sqrt(2 / fan)).astype(np.float32)
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    word_tokenizer(WORDS, config["model_cfg"]["text_cfg"]["context_length"]).save_pretrained(folder)
    return tensors
