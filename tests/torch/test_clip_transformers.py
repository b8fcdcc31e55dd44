"""CLIP agrees with the transformers implementation on random weights."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrel
from jaxrel.models import CLIP

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

TINY = {
    "projection_dim": 10,
    "vision_config": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 20,
        "patch_size": 8,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 30,
        "vocab_size": 50,
        "max_position_embeddings": 9,
        "eos_token_id": 49,
        "hidden_act": "gelu",
    },
}
# ViT-B/32, but for the depth.
BASE = {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 2}}
# The text configuration of checkpoints saved before 2023 ends texts with 2.
OLD = TINY | {"text_config": TINY["text_config"] | {"eos_token_id": 2}}


def reference(config, folder, *, safe=True):
    """A torch model with random weights, saved in `folder`."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(**config)
    config._attn_implementation = "eager"
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        # Fresh biases and norms are 0 and 1, which would hide a swap of names.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return model


def random_inputs(config, batch, size):
    rng = np.random.default_rng(0)
    text, high = config.text_config, config.text_config.vocab_size - 1
    ids = rng.integers(3, high, (batch, text.max_position_embeddings))
    for row in range(batch):
        ids[row, 3 + row :] = high
    image = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    return {"image": image, "text": ids.astype(np.int32)}


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(inputs["text"], dtype=torch.int64),
            pixel_values=torch.tensor(inputs["image"].transpose(0, 3, 1, 2)),
            **kwargs,
        )


@pytest.mark.parametrize("config", [TINY, OLD, BASE], ids=["tiny", "old", "base"])
def test_agrees_with_transformers(config, tmp_path):
    model = reference(config, tmp_path)
    inputs = random_inputs(model.config, 2, model.config.vision_config.image_size)
    expected = run(model, inputs, output_attentions=True, output_hidden_states=True)

    def forward(ours, inputs):
        return jaxrel.capture(lambda x: ours(x, return_attention=True))(inputs)

    (output, attention), tags = jax.jit(forward)(CLIP.from_pretrained(tmp_path), inputs)
    # Float32 on both sides; the two frameworks add in different orders, through two or three
    # layers on values of order 1 to 10.
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        np.testing.assert_allclose(output[name], expected[name].numpy(), **tolerance)
    for name in ("vision", "text"):
        theirs = expected[f"{name}_model_output"]
        maps = np.stack([layer.numpy() for layer in theirs.attentions])
        np.testing.assert_allclose(attention[name], maps, **tolerance)
        # Their list ends with the output of the last layer, ours with its input.
        hidden = np.stack([layer.numpy() for layer in theirs.hidden_states[:-1]])
        np.testing.assert_allclose(tags[f"{name}/before"], hidden, **tolerance)


@pytest.mark.parametrize("size", [40, 11], ids=["larger", "smaller"])
def test_interpolated_positions_agree(size, tmp_path):
    model = reference(TINY, tmp_path)
    inputs = random_inputs(model.config, 2, size)
    expected = run(model, inputs, interpolate_pos_encoding=True)
    ours = CLIP.from_pretrained(tmp_path, image_size=size)
    actual = jax.jit(CLIP.__call__)(ours, inputs)["logits_per_image"]
    np.testing.assert_allclose(actual, expected.logits_per_image.numpy(), rtol=1e-5, atol=1e-5)


def test_pickled_weights_when_allowed(tmp_path):
    reference(TINY, tmp_path / "pickled", safe=False)
    reference(TINY, tmp_path / "safe")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickled checkpoint"):
        CLIP.from_pretrained(tmp_path / "pickled")
    pickled = CLIP.from_pretrained(tmp_path / "pickled", allow_pickle=True)
    safe = CLIP.from_pretrained(tmp_path / "safe")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(pickled), jax.tree.leaves(safe))


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_a_pickle_that_runs_code_is_refused_even_then(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference(TINY, tmp_path / "model", safe=False)
    torch.save({"logit_scale": Harmful()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot be read as plain weights"):
        CLIP.from_pretrained(tmp_path / "model", allow_pickle=True)
    assert not (tmp_path / "harm").exists()


def test_what_we_save_transformers_loads(tmp_path):
    model = reference(TINY, tmp_path / "theirs")
    CLIP.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    load = transformers.CLIPModel.from_pretrained
    again = load(tmp_path / "ours", attn_implementation="eager").eval()
    inputs = random_inputs(model.config, 2, 20)
    expected, actual = (run(m, inputs).logits_per_image.numpy() for m in (model, again))
    np.testing.assert_array_equal(actual, expected)
