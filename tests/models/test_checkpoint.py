"""Model folders: round trips, shards, resolution of names, and every way they can be broken."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxrel.models import (
    CLIP,
    word_tokenizer,
)
from jaxrel.models import checkpoint as weights_module
from jaxrel.models.checkpoint import find_folder
from jaxrel.models.clip import PARAMETERS
from tests.zoo.clips import SMALL, WORDS, small_clip


@pytest.fixture(scope="module")
def model():
    return small_clip()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A model folder to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same(model, other):
    leaves, other_leaves = jax.tree.leaves(model), jax.tree.leaves(other)
    assert len(leaves) == len(other_leaves) == len(PARAMETERS)
    return all(np.array_equal(a, b) for a, b in zip(leaves, other_leaves, strict=True))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, **changes):
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): v for name, v in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def shard(folder):
    """Split model.safetensors in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_round_trip(model, saved):
    loaded = CLIP.from_pretrained(saved)
    assert loaded.config == SMALL
    assert same(model, loaded)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    ours, theirs = (m.prepare(image=image, text="a red circle") for m in (model, loaded))
    np.testing.assert_array_equal(ours["image"], theirs["image"])
    np.testing.assert_array_equal(ours["text"], theirs["text"])
    assert loaded.tokens(theirs) == [["", "a", "red", "circle", "", "", "", ""]]


def test_tensor_names_and_layouts(model, saved):
    tensors = load_file(saved / "model.safetensors")
    assert len(tensors) == 14 + 16 * (2 + 3)
    kernel = model.vision.transformer.blocks.expand.kernel[...]
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    np.testing.assert_array_equal(tensors[name], kernel[1].T)
    patches = tensors["vision_model.embeddings.patch_embedding.weight"]
    assert patches.shape == (16, 3, 8, 8)
    np.testing.assert_array_equal(patches[5, 2], model.vision.patch_embedding.kernel[..., 2, 5])
    assert tensors["logit_scale"].shape == ()


def test_shards(model, folder):
    shard(folder)
    assert same(model, CLIP.from_pretrained(folder))


def test_half_precision_files_and_position_ids(model, folder):
    tensors = load_file(folder / "model.safetensors")
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    half["text_model.embeddings.position_ids"] = np.arange(8)[None]
    save_file(half, folder / "model.safetensors")
    loaded = CLIP.from_pretrained(folder)
    kernel = loaded.text.projection.kernel[...]
    assert kernel.dtype == np.float32
    # bfloat16 keeps 8 bits.
    np.testing.assert_allclose(kernel, model.text.projection.kernel[...], rtol=2**-8)


def test_another_image_size(model, saved):
    loaded = CLIP.from_pretrained(saved, image_size=32)
    assert loaded.config.vision.image_size == 32
    assert loaded.layout["vision"].grid == (4, 4)
    positions = loaded.vision.position_embedding[...]
    assert positions.shape == (17, 16)
    np.testing.assert_array_equal(positions[0], model.vision.position_embedding[0])
    inputs = loaded.prepare(image=Image.new("RGB", (40, 50)), text="red")
    assert inputs["image"].shape == (1, 32, 32, 3)


def test_old_preprocessing_file(folder):
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    loaded = CLIP.from_pretrained(folder)
    inputs = loaded.prepare(image=Image.new("RGB", (40, 50)), text="red")
    assert inputs["image"].shape == (1, 16, 16, 3)


def test_new_preprocessing_file(model, folder):
    new = {"image_processor": json.loads((folder / "preprocessor_config.json").read_text())}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps(new))
    image = Image.new("RGB", (40, 50), (9, 99, 200))
    expected = model.prepare(image=image, text="red")["image"]
    actual = CLIP.from_pretrained(folder).prepare(image=image, text="red")["image"]
    np.testing.assert_array_equal(actual, expected)


def test_a_folder_without_processor_loads_and_says_so_when_it_is_needed(model, folder):
    (folder / "tokenizer.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    loaded = CLIP.from_pretrained(folder)
    assert same(model, loaded)
    with pytest.raises(ValueError, match=r"no tokenizer: its folder holds no tokenizer.json"):
        loaded.prepare(image=Image.new("RGB", (16, 16)), text="red")


def test_saving_replaces_a_model_folder_and_keeps_its_other_files(model, folder):
    shard(folder)
    (folder / "README.md").write_text("model card")
    model.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= names
    assert not any("index" in name or "00001" in name for name in names)
    assert same(model, CLIP.from_pretrained(folder))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_into_an_empty_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "new" / "model")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert same(CLIP.from_pretrained(tmp_path / "empty"), model)


def test_saving_does_not_replace_what_is_no_model(model, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(FileExistsError, match=r"exists and is no model folder .* a new folder"):
            model.save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_save_leaves_nothing_new(model, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(weights_module, "save_file", fail)
    for target in (folder, folder.parent / "other"):
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def break_nan(folder):
    value = np.ones((24, 12), np.float32)
    value[3, 4] = np.nan
    edit_tensors(folder, text_model__encoder__layers__2__mlp__fc1__weight=value)


def break_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_shard_missing(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def break_shard_content(folder):
    shard(folder)
    save_file({"logit_scale": np.ones((), np.float32)}, folder / "model-00002-of-00002.safetensors")


def break_shard_path(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../secret.safetensors"}}))


def break_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


PROJECTION = "text_projection__weight"
BROKEN = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        FileNotFoundError,
        "has no config.json; a model folder holds config.json and model.safetensors",
    ),
    "config is not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ValueError,
        r"config.json is not valid JSON \(.*fetch the file again",
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ValueError,
        "must hold a JSON object, got list",
    ),
    "another architecture": (
        lambda f: edit_config(f, model_type="siglip"),
        ValueError,
        "a model of type 'siglip', and this class loads 'clip'",
    ),
    "unsupported channels": (
        lambda f: edit_config(f, vision_config={"num_channels": 4}),
        ValueError,
        "num_channels must be 3, got 4",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        FileNotFoundError,
        "has no weights: neither model.safetensors nor model.safetensors.index.json; fetch",
    ),
    "truncated": (break_truncate, OSError, "is truncated or no safetensors file .*fetch it again"),
    "empty file": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        OSError,
        r"model.safetensors \(0 bytes\) is truncated",
    ),
    "missing shard": (
        break_shard_missing,
        FileNotFoundError,
        "lacks 1 of the 2 shards .*: model-00002-of-00002.safetensors; fetch them",
    ),
    "wrong shard": (break_shard_content, ValueError, "names tensors that its shards do not hold"),
    "shard elsewhere": (break_shard_path, ValueError, "names a file outside its folder: '../sec"),
    "missing tensor": (
        lambda f: edit_tensors(f, **{PROJECTION: None}),
        ValueError,
        r"1 tensors are missing: text_projection.weight\. Check that config.json and the weights",
    ),
    "unexpected tensor": (
        lambda f: edit_tensors(f, head__bias=np.zeros(3, np.float32)),
        ValueError,
        "1 tensors are unexpected: head.bias",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, **{PROJECTION: np.zeros((10, 11), np.float32)}),
        ValueError,
        r"text_projection.weight has shape \[10, 11\], and config.json says \[10, 12\]",
    ),
    "quantised": (
        lambda f: edit_tensors(f, **{PROJECTION: np.zeros((10, 12), np.int8)}),
        ValueError,
        "text_projection.weight has dtype int8; quantised weights cannot be loaded",
    ),
    "NaN": (
        break_nan,
        ValueError,
        "text_model.encoder.layers.2.mlp.fc1.weight has 1 values of 288 that are NaN or infinite",
    ),
    "pickled": (
        break_pickle,
        ValueError,
        "pytorch_model.bin is a pickled checkpoint.*save_pretrained.*allow_pickle=True",
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ValueError,
        "the tokenizer in .* cannot be read .* again",
    ),
    "broken preprocessing": (
        lambda f: (f / "preprocessor_config.json").write_text("{"),
        ValueError,
        "preprocessor_config.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused(folder, case):
    damage, error, message = BROKEN[case]
    damage(folder)
    with pytest.raises(error, match=message):
        CLIP.from_pretrained(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    word_tokenizer([*WORDS, "one", "two", "three"], 8).save_pretrained(folder)
    with pytest.raises(
        ValueError, match="the tokenizer has 13 tokens and the model 12, which lacks three"
    ):
        CLIP.from_pretrained(folder)


def test_allowed_pickles_need_torch(folder, monkeypatch):
    break_pickle(folder)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ImportError, match="needs torch, which is not installed: pip install"):
        CLIP.from_pretrained(folder, allow_pickle=True)


def test_bundled_names_come_first(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "clip-tiny")
    monkeypatch.setattr(weights_module, "PRETRAINED", tmp_path)
    assert find_folder("clip-tiny") == tmp_path / "clip-tiny"
    with pytest.raises(FileNotFoundError, match="'clip-tony'; bundled models: clip-tiny"):
        find_folder("clip-tony")


@pytest.mark.parametrize("name", ["./nowhere", "~/no/where", "/no/where", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"no model folder '{name}'; bundled models: "):
        find_folder(name)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(NotADirectoryError, match="is a file; pass the folder that holds"):
        find_folder(folder / "model.safetensors")
    break_pickle(folder)
    with pytest.raises(NotADirectoryError, match="Convert it once where torch is installed"):
        find_folder(folder / "pytorch_model.bin")


def test_hub_names(saved, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert CLIP.from_pretrained("owner/clip").config == SMALL
    assert asked == [("owner/clip", ["*.json", "*.txt", "*.safetensors"])]


def test_hub_without_a_network(monkeypatch):
    def offline(name, allow_patterns):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    message = (
        "'owner/clip' is no folder here and could not be fetched .*Name or service not known.*"
    )
    with pytest.raises(OSError, match=message + "hf download owner/clip .* pass FOLDER; bundled"):
        CLIP.from_pretrained("owner/clip")


def test_a_config_of_another_depth_does_not_fit(folder):
    config = replace(SMALL, text=replace(SMALL.text, layers=2)).to_dict()
    edit_config(folder, **config)
    message = r"16 tensors are unexpected: text_model.encoder.layers.2.* and 11 more"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(folder)


def test_saving_in_half_precision(model, tmp_path):
    model.save_pretrained(tmp_path / "half", dtype="float16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float16")}
    loaded = CLIP.from_pretrained(tmp_path / "half").text.projection.kernel[...]
    # float16 keeps 11 bits.
    np.testing.assert_allclose(loaded, model.text.projection.kernel[...], rtol=2**-11, atol=2**-25)
