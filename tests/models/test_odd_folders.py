"""Model folders as people have them: what they lack, and values of other types."""

import json
import shlex
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxrel.models import CLIP, CLIPConfig, CLIPMapperConfig, Processor, from_pretrained
from jaxrel.models.checkpoint import read_file
from tests.zoo.clips import SMALL, small_clip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    small_clip().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


# ---- config.json

VISION, TEXT = "vision_config", "text_config"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection_dim": None}, "projection_dim must be a positive integer, got None"),
        ({"projection_dim": "10"}, "projection_dim must be a positive integer, got '10'"),
        ({"logit_scale_init_value": None}, "logit_scale_init_value must be a number, got None"),
        ({"logit_scale_init_value": [1]}, r"logit_scale_init_value must be a number, got \[1\]"),
        ({VISION: []}, r"vision_config must be an object, got \[\]"),
        ({TEXT: "clip"}, "text_config must be an object, got 'clip'"),
        ({f"{TEXT}_dict": [1]}, r"text_config_dict must be an object, got \[1\]"),
        ({VISION: {"hidden_size": "16"}}, "vision_config.hidden_size must be a positive integer"),
        ({TEXT: {"num_hidden_layers": 1.5}}, "text_config.num_hidden_layers .* got 1.5"),
        ({TEXT: {"vocab_size": True}}, "text_config.vocab_size must be .* got True"),
        ({TEXT: {"hidden_act": ["gelu"]}}, "text_config.hidden_act must be a name"),
        ({TEXT: {"layer_norm_eps": "1e-5"}}, "text_config.layer_norm_eps must be a number"),
        ({TEXT: {"layer_norm_eps": -1e-5}}, "text: layer_norm_eps must be 0 or more, got -1e-05"),
        ({TEXT: {"eos_token_id": None}}, "text_config.eos_token_id must be one integer, got None"),
        ({TEXT: {"eos_token_id": [[1]]}}, r"eos_token_id must be one integer, got \[\[1\]\]"),
        ({VISION: {"image_size": {}}}, "vision_config.image_size must be one integer, got {}"),
        ({VISION: {"num_channels": [3]}}, r"num_channels must be 3, got \[3\]"),
    ],
)
def test_values_of_other_types_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig.from_dict(SMALL.to_dict() | changes)


def test_an_architecture_of_another_type_is_refused(folder):
    for config in ({"model_type": ["clip"]}, {"model_type": {}}):
        (folder / "config.json").write_text(json.dumps(config))
        for load in (from_pretrained, CLIP.from_pretrained):
            with pytest.raises(ValueError, match="describes a model of type"):
                load(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not valid JSON"):
        from_pretrained(folder)


def test_a_mapper_of_another_type_is_refused():
    config = CLIPMapperConfig(answers=("a", "b")).to_dict()
    for change, message in (
        ({"several": "yes"}, "several must be true or false, got 'yes'"),
        ({"activation": []}, r"mapper_config.activation must be a name, got \[\]"),
        ({"task": {}}, "mapper_config.task must be a name, got {}"),
        ({"layers": "6"}, "mapper_config.layers must be a whole number, got '6'"),
        ({"layer_norm_eps": None}, "mapper_config.layer_norm_eps must be a number, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            CLIPMapperConfig.from_dict(config | {"mapper_config": config["mapper_config"] | change})


def test_the_second_copy_of_a_section_wins_with_its_defaults():
    # As transformers' CLIPConfig: {**text_config, **CLIPTextConfig(**text_config_dict).to_dict()}.
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {f"{name}_config": {**sizes, "hidden_act": "gelu"} for name in ("text", "vision")}
    assert CLIPConfig.from_dict(config).text.activation == "gelu"
    twice = CLIPConfig.from_dict(config | {"text_config_dict": sizes, "vision_config_dict": {}})
    assert (twice.text.width, twice.text.activation) == (64, "quick_gelu")
    assert twice.vision == CLIPConfig().vision
    none = CLIPConfig.from_dict(config | {"text_config_dict": None})
    assert none.text.activation == "gelu"


# ---- weights


def write_tensor(path, dtype, size=1):
    head = json.dumps({"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(4 * size))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_weights_of_8_bits_are_refused(folder, tmp_path, dtype):
    write_tensor(folder / "model.safetensors", dtype)
    message = f"the tensor x has dtype {dtype}; quantised weights cannot be loaded, use a float32"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(folder)


def test_a_dtype_of_the_future_is_refused(folder):
    write_tensor(folder / "model.safetensors", "F3")
    message = "has a dtype that the installed safetensors does not know .*F3.*; use a float32"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "flax_model.msgpack"])
def test_weights_under_another_name_are_named(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    message = (
        rf"has no weights: neither model.safetensors nor .* \(what is there is neither: {name}"
    )
    with pytest.raises(FileNotFoundError, match=message):
        CLIP.from_pretrained(folder)
    (folder / name).unlink()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is neither: model.safetensors\)"):
        CLIP.from_pretrained(folder)


@pytest.mark.parametrize(("dtype", "size"), [("BF16", 2), ("F16", 2), ("F64", 8), ("I64", 8)])
def test_other_weights_are_read(tmp_path, dtype, size):
    write_tensor(tmp_path / "a.safetensors", dtype, size)
    assert read_file(tmp_path / "a.safetensors")["x"].itemsize == size


def test_an_index_of_another_type_is_refused(folder):
    (folder / "model.safetensors").unlink()
    for where in ({"a": 1}, {"a": ["b"]}, [1], {}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        with pytest.raises(ValueError, match="has no 'weight_map' from tensor names to files"):
            CLIP.from_pretrained(folder)


def test_a_folder_of_openclip_without_its_settings_is_recognised(folder):
    (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    message = r"is in the layout of OpenCLIP .* reads, from open_clip_config.json and open_clip_mod"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_a_pickle_comes_with_a_command_that_converts_it(folder):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"python -c .*weights_only=True") as caught:
        CLIP.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder / "pytorch_model.bin") in message
    assert "training_args" not in message
    command = shlex.split(message.split("where torch is installed: ")[1].split(" (or read")[0])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "command", "exec")


# ---- tokenizers


def test_a_tokenizer_file_suffices(folder):
    whole = CLIP.from_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    alone = CLIP.from_pretrained(folder)
    ids = [one.processor.text(["a red circle", "a"], 8) for one in (whole, alone)]
    np.testing.assert_array_equal(*ids)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(whole.processor.tokenizer, name) == getattr(alone.processor.tokenizer, name)


def test_the_old_end_of_text_and_an_added_token(folder):
    tokenizer = Processor.from_folder(folder).tokenizer
    tokenizer.add_tokens(["<my-cat>"])
    images = Processor.from_folder(folder).images
    text = replace(SMALL.text, vocab_size=len(tokenizer), eos_token_id=2)
    config = replace(SMALL, text=text)
    model = nnx.eval_shape(
        lambda: CLIP(config, rngs=nnx.Rngs(0), processor=Processor(tokenizer, images))
    )
    message = "eos_token_id 2, .* '<my-cat>' was added .* set eos_token_id of text_config to 3"
    with pytest.raises(ValueError, match=message):
        model.prepare(image=Image.new("RGB", (16, 16)), text="a <my-cat>")


def test_settings_of_a_tokenizer_that_do_not_name_its_tokens(folder):
    path = folder / "tokenizer_config.json"
    path.write_text('{"a": 1}')
    tokenizer = CLIP.from_pretrained(folder).processor.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<start>", "<end>")
    path.write_text('{"model_max_length": "8"}')
    message = r"the tokenizer in .* cannot be read .* again: tokenizer.json and tokenizer_config"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        Processor(tokenizer).text("a", 8)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_file_of_a_tokenizer_that_is_broken_is_named(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is not valid JSON .*; fetch the file again"):
        CLIP.from_pretrained(folder)


@pytest.mark.parametrize("eos_token_id", [2, 3])
def test_a_tokenizer_that_puts_nothing_around_a_text(folder, eos_token_id):
    def change(name, changes):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    text = json.loads((folder / "config.json").read_text())[TEXT]
    change("config.json", {TEXT: text | {"eos_token_id": eos_token_id}})
    change("tokenizer.json", {"post_processor": None})
    message = "puts no bos_token, '<start>', around a text"
    for changes in ({}, {"eos_token": None}):
        change("tokenizer_config.json", changes)
        with pytest.raises(ValueError, match=message):
            CLIP.from_pretrained(folder).prepare(image=Image.new("RGB", (16, 16)), text="a")


def test_tokens_that_the_model_lacks_are_named(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": ["<a>", "<b>", "<c>"]})
    )
    with pytest.raises(ValueError, match=r"the model 12, which lacks <c>: .* were changed"):
        CLIP.from_pretrained(folder)


def test_long_texts_are_short_in_messages(folder):
    processor = Processor.from_folder(folder)
    for text in ("x" * 10_000, "a " * 10_000):
        with pytest.raises(ValueError, match=r"x\.\.\.'|a \.\.\.'") as caught:
            processor.text(text, 8)
        assert len(str(caught.value)) < 300
