"""Captioners as folders, and folders that are broken."""

import json
from dataclasses import replace

import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.models import Processor
from jaxrel.models.captioner import Captioner
from tests.errors import error
from tests.zoo.captioners import FORWARD, REGIONS, RESNET, TEXTS, captioner, flat, random_regions
from tests.zoo.images import random_images


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gridtd", {}),
        ("adaptive", {"encoder": RESNET, "attention": "as coded", "dropout": 0.25}),
        ("aoa", REGIONS),
    ],
)
def test_save_and_load(kind, changes, tmp_path):
    model = captioner(kind, **changes)
    model.save_pretrained(tmp_path / "model")
    loaded = Captioner.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert len(flat(model)) == len(flat(loaded))
    for path, variable in flat(loaded).items():
        assert type(variable) is type(flat(model)[path])
        np.testing.assert_array_equal(variable[...], flat(model)[path][...])
    np.testing.assert_array_equal(loaded.processor.text(TEXTS, 9), model.processor.text(TEXTS, 9))
    seen = random_images() if model.encoder is not None else random_regions()
    inputs = loaded.prepare(image=seen, text=TEXTS)
    again, _ = FORWARD(loaded, inputs)
    np.testing.assert_array_equal(again, FORWARD(model, inputs)[0])


def test_half_a_file(tmp_path):
    model = captioner("gridtd")
    model.save_pretrained(tmp_path / "half", dtype="float16")
    half = Captioner.from_pretrained(tmp_path / "half", dtype="bfloat16")
    assert half.config == replace(model.config, dtype="bfloat16")
    for path, value in flat(model).items():
        assert flat(half)[path].dtype == jnp.float32
        # float16 has 11 bits, and steps of 2^-24 near 0.
        np.testing.assert_allclose(flat(half)[path][...], value[...], rtol=2**-11, atol=2**-25)
    whole = tmp_path / "float32"
    model.save_pretrained(whole)
    size, half_size = (
        (folder / "model.safetensors").stat().st_size for folder in (whole, tmp_path / "half")
    )
    assert half_size < 0.7 * size


def test_a_folder_appears_as_a_whole(tmp_path, monkeypatch):
    model = captioner("gridtd")
    with error(r"dtype must be 'float32' or 'float16', got 'int8'"):
        model.save_pretrained(tmp_path / "model", dtype="int8")
    monkeypatch.setattr(Processor, "save", fails)
    with error(r"the disk is full", OSError):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with error(r"notes exists and is no model folder", FileExistsError):
        model.save_pretrained(tmp_path / "notes")


def fails(*_):
    raise OSError("the disk is full")


def test_folders_that_do_not_fit(tmp_path):
    folder = tmp_path / "model"
    captioner("gridtd").save_pretrained(folder)
    config = (folder / "config.json").read_text()

    def edited(edit):
        changed = json.loads(config)
        edit(changed)
        (folder / "config.json").write_text(json.dumps(changed))
        return folder

    with error(r"captioner_config must hold attention, .*; missing or unknown: hidden"):
        Captioner.from_pretrained(edited(lambda c: c["captioner_config"].pop("hidden")))
    with error(r"config.json: expected an object captioner_config"):
        Captioner.from_pretrained(edited(lambda c: c.pop("captioner_config")))
    with error(r"config.json: unknown type of encoder 'vit'"):
        Captioner.from_pretrained(edited(lambda c: c["encoder_config"].update(model_type="vit")))
    with error(r"describes a model of type 'clip', and this class loads 'captioner'"):
        Captioner.from_pretrained(edited(lambda c: c.update(model_type="clip")))
    with error(r"the tokenizer has 11 tokens and the model 12: this is the tokenizer of another"):
        Captioner.from_pretrained(edited(lambda c: c["captioner_config"].update(vocab_size=12)))
    with error(r"cell.attention.hidden.kernel has shape \[8, 16\], and config.json says \[8, 64\]"):
        Captioner.from_pretrained(edited(lambda c: c["captioner_config"].update(image_size=32)))
    with error(r"missing: cell.gate.bias"):
        Captioner.from_pretrained(edited(lambda c: c["captioner_config"].update(kind="aoa")))
    weights = edited(lambda c: None) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with error(r"model.safetensors .* is truncated or no safetensors file", OSError):
        Captioner.from_pretrained(folder)
