"""Small CLIPs: a random one, and the one whose values are stored, as a Hugging Face folder."""

import json

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from safetensors.numpy import save_file

from jaxrel.models import (
    CLIP,
    CLIPConfig,
    Processor,
    TextConfig,
    VisionConfig,
    image_processing,
    word_tokenizer,
)
from tests.paths import FIXTURES

GOLDEN = FIXTURES / "attention_clip.npz"
SMALL = CLIPConfig(
    vision=VisionConfig(width=16, layers=2, heads=2, mlp_width=32, image_size=16, patch_size=8),
    text=TextConfig(
        width=12, layers=3, heads=3, mlp_width=24, vocab_size=12, context=8, eos_token_id=3
    ),
    projection=10,
)
WORDS = ("a", "red", "blue", "circle", "square", "above")


def small_clip():
    """A model with values from NumPy, which needs no compilation."""
    processor = Processor(word_tokenizer(WORDS, 8), image_processing(16))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
        nnx.eval_shape(lambda: CLIP(SMALL, rngs=nnx.Rngs(0), processor=processor)),
    )


def write_golden_folder(golden, folder):
    """Write the reference model as a Hugging Face folder."""
    sizes = {k.removeprefix("config/"): int(v) for k, v in golden.items() if k[:7] == "config/"}
    config = {
        "model_type": "clip",
        "projection_dim": sizes["projection_dim"],
        "vision_config": {
            "hidden_size": sizes["vision_hidden_size"],
            "intermediate_size": 4 * sizes["vision_hidden_size"],
            "num_hidden_layers": sizes["vision_layers"],
            "num_attention_heads": sizes["vision_heads"],
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
        },
        "text_config": {
            "hidden_size": sizes["text_hidden_size"],
            "intermediate_size": 4 * sizes["text_hidden_size"],
            "num_hidden_layers": sizes["text_layers"],
            "num_attention_heads": sizes["text_heads"],
            "vocab_size": sizes["vocab_size"],
            "max_position_embeddings": sizes["context_length"],
            "eos_token_id": sizes["eos_token_id"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {k.removeprefix("state/"): v for k, v in golden.items() if k[:6] == "state/"}
    save_file(state, folder / "model.safetensors")
    return folder
