"""CLIPmappers as folders, parameters of other models, and what does not fit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel import models
from jaxrel.models import (
    CLIP,
    CLIPMapper,
    CLIPMapperCaption,
    CLIPMapperConfig,
    CLIPMapperVQA,
    Processor,
    word_tokenizer,
)
from tests.errors import error
from tests.zoo.clipmappers import (
    STAGE1,
    TEXTS,
    WORDS,
    processor,
    random_mapper,
    random_values,
    values,
)
from tests.zoo.images import random_images


def test_save_and_load(model, folder):
    loaded = models.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    for path, value in values(model).items():
        np.testing.assert_array_equal(values(loaded)[path][...], value[...])
    np.testing.assert_array_equal(loaded.processor.text(TEXTS, 9), model.processor.text(TEXTS, 9))
    image = random_images(1)
    np.testing.assert_array_equal(loaded.processor.image(image), model.processor.image(image))


def test_half_a_file(vqa, half):
    assert half.config == replace(vqa.config, clip=replace(STAGE1, dtype="bfloat16"))
    for path, value in values(vqa).items():
        assert values(half)[path].dtype == jnp.float32
        # float16 has 11 bits, and steps of 2^-24 near 0.
        np.testing.assert_allclose(values(half)[path][...], value[...], rtol=2**-11, atol=2**-25)


def test_stage_1_from_a_clip(vqa, tmp_path):
    text = replace(STAGE1.text, context=12)
    tokens = word_tokenizer(WORDS, 12)
    config = replace(STAGE1, text=text)
    clip = random_values(
        lambda: CLIP(config, rngs=nnx.Rngs(0), processor=Processor(tokens, processor().images)), 5
    )
    model = nnx.clone(vqa)
    model.init_from(clip)
    theirs, before = values(clip), values(vqa)
    context = ("text", "position_embedding")
    for path, value in values(model).items():
        expected = theirs[path][...] if path[0] in ("vision", "text") else before[path][...]
        np.testing.assert_array_equal(value[...], expected[:9] if path == context else expected)
    clip.save_pretrained(tmp_path / "clip")
    assert type(models.from_pretrained(tmp_path / "clip")) is CLIP
    narrow = replace(STAGE1, vision=replace(STAGE1.vision, mlp_width=8))
    other = random_values(lambda: CLIP(narrow, rngs=nnx.Rngs(0)))
    with error(r"init_from: vision/.* has shape \[2, 8, 16\] there"):
        model.init_from(other)
    taken = ("vision", "class_embedding")
    np.testing.assert_array_equal(values(model)[taken][...], values(clip)[taken][...])


def test_beginning_as_another_mapper(vqa, caption):
    """What both have in one size is taken: not the head, nor stacks of another depth."""
    model = nnx.clone(vqa)
    model.init_from(caption)
    theirs, before = values(caption), values(vqa)
    taken = set()
    for path, value in values(model).items():
        kept = np.array_equal(value[...], before[path][...])
        if not kept:
            np.testing.assert_array_equal(value[...], theirs[path][...])
            taken.add(path[:2])
    assert {("vision", "transformer"), ("mapper", "last"), ("text_in", "kernel")} <= taken
    assert not taken & {("head", "kernel"), ("mapper", "blocks")}


def test_configurations_that_do_not_fit():
    with error(r"mapper: task must be one of vqa, caption, got 'captions'"):
        CLIPMapperConfig(task="captions")
    with error(r"mapper: task 'vqa' with 0 answers; 'vqa' needs the answers"):
        CLIPMapperConfig(task="vqa")
    with error(r"mapper: task 'caption' with 1 answers; .* 'caption' has none"):
        CLIPMapperConfig(task="caption", answers=("yes",))
    with error(r"mapper: answers are repeated: no, yes$"):
        CLIPMapperConfig(answers=("yes", "no", "yes", "no", "two"))
    with error(r"mapper: width 10 is not a multiple of its 4 heads"):
        CLIPMapperConfig(answers=("yes",), width=10, heads=4)
    with error(r"mapper: layers must be a positive integer, got 0"):
        CLIPMapperConfig(answers=("yes",), layers=0)
    with error(r"mapper: unknown activation 'relu', known are quick_gelu, gelu"):
        CLIPMapperConfig(answers=("yes",), activation="relu")
    big = word_tokenizer([f"w{i}" for i in range(20)], 9)
    with error(r"the tokenizer has 24 tokens and the model 12"):
        random_mapper("caption", 1, processor=lambda: Processor(big))


def edited(folder, tmp_path, edit):
    """A copy of the model folder with another config.json."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    edit(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_folders_that_do_not_fit(model, folder, tmp_path):
    other = CLIPMapperCaption if model.task == "vqa" else CLIPMapperVQA
    with error(rf"holds a model for the task '{model.task}', and {other.__name__} does"):
        other.from_pretrained(folder)
    with error(r"describes a model of type 'clipmapper', and this class loads 'clip'"):
        CLIP.from_pretrained(folder)
    copy = edited(folder, tmp_path, lambda config: config["mapper_config"].pop("heads"))
    with error(r"config.json: mapper_config must hold activation, .*missing or unknown: heads"):
        CLIPMapper.from_pretrained(copy)
    for wrong in ("yes", [1, 2]):
        change = {"answers": wrong}
        copy = edited(folder, tmp_path, lambda x, change=change: x["mapper_config"].update(change))
        with error(r"config.json: mapper_config.answers must be a list of strings, got ['\[]"):
            CLIPMapper.from_pretrained(copy)
    copy = edited(folder, tmp_path, lambda config: config.pop("clip_config"))
    with error(r"config.json: expected objects clip_config and mapper_config"):
        CLIPMapper.from_pretrained(copy)
    copy = edited(folder, tmp_path, lambda config: config.update(model_type="bert"))
    with error(r"describes a model of type 'bert'; known are captioner, clip, clipmapper"):
        models.from_pretrained(copy)
    with error(r"no model folder 'nowhere'", FileNotFoundError):
        models.from_pretrained("nowhere")


def test_weights_that_do_not_fit(vqa, tmp_path):
    folder = tmp_path / "model"
    vqa.save_pretrained(folder)
    copy = edited(folder, tmp_path, lambda config: config["mapper_config"].update(mlp_width=8))
    with error(
        r"mapper\.blocks\.image_self\.contract\.kernel has shape \[2, 24, 16\], .*\[2, 8, 16\]"
    ):
        CLIPMapper.from_pretrained(copy)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with error(r"model.safetensors .* is truncated or no safetensors file", OSError):
        CLIPMapper.from_pretrained(folder)
    with error(r"dtype must be 'float32' or 'float16', got 'int8'"):
        vqa.save_pretrained(tmp_path / "small", dtype="int8")
    assert not (tmp_path / "small").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with error(r"notes exists and is no model folder", FileExistsError):
        vqa.save_pretrained(tmp_path / "notes")


@pytest.mark.parametrize(
    ("wrong", "match", "kind"),
    [
        ({"image": None}, r"inputs lack image; they hold text\. Make them with", ValueError),
        ({"image": np.zeros((2, 16, 16, 3), np.uint8)}, r"normalised floats, got uint8", TypeError),
        ({"image": np.zeros((2, 8, 8, 3), np.float32)}, r"\[batch, 16, 16, 3\], got", ValueError),
        ({"image": np.zeros((3, 16, 16, 3), np.float32)}, r"3 images and 2 texts", ValueError),
        ({"text": np.zeros((2, 10), np.int32)}, r"at most 9 tokens, got \[2, 10\]", ValueError),
        ({"text": np.zeros((2, 9), np.float32)}, r"integer token ids, got float32", TypeError),
        ({"image_keep": np.ones((2, 4), bool)}, r"image_keep must be bool \[2, 5\]", ValueError),
        ({"text_keep": np.ones((2, 9))}, r"text_keep .*, got float64 \[2, 9\]", ValueError),
    ],
)
def test_inputs_that_do_not_fit(model, inputs, wrong, match, kind):
    given = {name: x for name, x in {**inputs, **wrong}.items() if x is not None}
    with error(match, kind):
        model(given)
