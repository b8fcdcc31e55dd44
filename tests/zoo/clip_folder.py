"""The CLIP whose values are stored, as a folder of Hugging Face."""

import json

from safetensors.numpy import save_file

from tests.paths import FIXTURES

GOLDEN = FIXTURES / "attention_clip.npz"


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
