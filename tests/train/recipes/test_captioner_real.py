"""The recipes of captioners on COCO and Flickr30k, on tiny files in the true formats."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from safetensors.numpy import save_file

from jaxrel import cli
from jaxrel.models.processor import Processor
from jaxrel.models.tokenizer import word_tokenizer
from jaxrel.models.vision import IMAGENET_MEAN, IMAGENET_STD, imagenet_processing
from jaxrel.train.data import coco, flickr30k
from jaxrel.train.recipes import captioner_real
from jaxrel.train.recipes.captioner import new_config
from jaxrel.train.recipes.captioner_real import AoACoco, AoAFlickr30k, GridTDCoco, GridTDFlickr30k
from jaxrel.train.recipes.registry import find_recipe
from tests.train.folders import Repeated

pytestmark = pytest.mark.recipes

SMALL = {
    "steps": 4,
    "batch": 8,
    "learning_rate": 1e-2,
    "warmup": 1,
    "encoder": "4,6",
    "image_size": 8,
    "embed": 8,
    "hidden": 8,
    "dropout": 0.1,
    "context": 8,
    "at_least": 1,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "dtype": "float32",
}
ALL = {
    "gridtd-coco": GridTDCoco,
    "aoa-coco": AoACoco,
    "gridtd-flickr30k": GridTDFlickr30k,
    "aoa-flickr30k": AoAFlickr30k,
}


@pytest.fixture
def weights(tmp_path):
    """The weights of a tiny VGG in torchvision's layout, with a classifier."""
    rng = np.random.default_rng(0)
    shapes = {"features.0": (4, 3, 3, 3), "features.3": (6, 4, 3, 3), "classifier.0": (2, 6)}
    tensors = {}
    for name, shape in shapes.items():
        # Exact in half precision, in which the model is written.
        tensors[f"{name}.weight"] = rng.integers(-8, 9, shape).astype(np.float32) / 16
        tensors[f"{name}.bias"] = np.full(shape[0], 0.125, np.float32)
    save_file(tensors, tmp_path / "vgg.safetensors")
    return tmp_path / "vgg.safetensors"


@pytest.fixture
def enough(monkeypatch):
    """Eight devices want eight examples, and the tiny files have four."""
    train = captioner_real.train_model
    monkeypatch.setattr(
        captioner_real,
        "train_model",
        lambda recipe, folder, parts, loss, source, **more: train(
            recipe, folder, parts, loss, Repeated(source), **more
        ),
    )


def settings(name, folder, **changes):
    heads = {"heads": 2} if name.startswith("aoa") else {}
    return ALL[name](data=folder, **(SMALL | heads | changes))


@pytest.mark.parametrize(
    ("name", "rate", "split"), [("gridtd-coco", 0.0, "test"), ("aoa-flickr30k", 0.2, "val")]
)
def test_training_and_evaluation(name, rate, split, folders, weights, enough, tmp_path):
    recipe = settings(name, folders, encoder_weights=str(weights), encoder_rate=rate)
    out = tmp_path / "model"
    model = find_recipe(name).train(recipe, out)
    assert (model.config.kind, model.config.grid) == (recipe.kind, (4, 4))
    log = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert ALL[name](**json.loads((out / "settings.json").read_text())) == recipe
    # The encoder is frozen, or moved by four steps of Adam: the first with a rate of 0, the
    # others with at most 0.2 times 0.01, and rounded to half precision.
    bias = np.asarray(model.encoder.stages[0][0].bias[...])
    assert (bias != 0.125).any() == (rate > 0)
    np.testing.assert_allclose(bias, 0.125, atol=0.007)
    found = find_recipe(name).evaluate(model, data=folders, split=split, scenes=4, batch=2)
    assert (found["protocol"], found["images"]) == (f"captioner-{recipe.dataset}/1", 1)
    assert np.isfinite(found["CIDEr-D"]["mean"])


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_reads_its_data(name, folders, monkeypatch, tmp_path):
    """Up to the training, which is the same for all."""
    called = []

    def keep(recipe, folder, parts, loss, source, **more):
        called.append((source, more))
        return parts["model"]

    monkeypatch.setattr(captioner_real, "train_model", keep)
    recipe = settings(name, folders, encoder_weights="", encoder_rate=1.0)
    model = find_recipe(name).train(recipe, tmp_path / "model")
    assert model.config.kind == name.split("-")[0]
    ((source, more),) = called
    assert len(source) == 4
    assert more == {"name": name}
    assert recipe.optimiser()["factors"] == {"model/encoder": 1.0}


def test_the_vocabulary_is_in_the_order_of_the_captions(folders):
    records = coco.karpathy_captions(folders, "train+restval").records
    assert captioner_real.build_vocabulary(records, 1) == ("a", "dog", "no", "0", "it", "runs", "2")
    assert captioner_real.build_vocabulary(records, 2) == ("a", "dog", "no", "it", "runs")
    with pytest.raises(ValueError, match="no word occurs 3 times in the captions, of 7 different"):
        captioner_real.build_vocabulary(records, 3)


def test_words_have_no_punctuation():
    record = {"tokens": (("A", "t-shirt", "&", "caf\u00e9"), ("!",), ("so", "_"))}
    assert captioner_real.caption_words(record) == [["a", "t", "shirt", "caf\u00e9"], ["so"]]


@pytest.mark.parametrize("warned", [False, True])
def test_examples(folders, warned):
    source = flickr30k.captions(folders, "train")
    processor = Processor(word_tokenizer(("it", "dog", "no"), 6), imagenet_processing(8))
    context = 5 if warned else 6
    if warned:
        # "a dog no 0" and its ends have six tokens.
        with pytest.warns(UserWarning, match="2 of 4 captions have more than 5 tokens"):
            examples = captioner_real.examples(source, processor, context)
        assert len(examples) == 2
        assert examples[1]["id"] == 2
        return
    examples = captioner_real.examples(source, processor, context)
    assert len(examples) == 4
    # Rare words are <unk>, without a warning.
    assert examples[0]["text"].tolist() == [2, 1, 5, 6, 1, 3]
    assert examples[3]["text"].tolist() == [2, 4, 1, 3, 0, 0]
    # All of an image of 12 x 8 equal pixels, resized to a square.
    want = (np.asarray(source[0]["image"])[:1, :1] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert examples[0]["image"].shape == (8, 8, 3)
    np.testing.assert_allclose(examples[0]["image"], np.broadcast_to(want, (8, 8, 3)), atol=1e-5)


def test_the_model_prepares_images_as_examples_do(folders):
    recipe = settings("gridtd-coco", folders, encoder_weights="", encoder_rate=1.0)
    source = coco.karpathy_captions(folders, "train+restval")
    vocabulary = captioner_real.build_vocabulary(source.records, 1)
    model = captioner_real.new_model(recipe, new_config(recipe), vocabulary)
    example = captioner_real.examples(source, model.processor, recipe.context)[1]
    inputs = model.prepare(image=source[0]["image"], text="it runs")
    np.testing.assert_array_equal(inputs["image"][0], example["image"])
    np.testing.assert_array_equal(inputs["text"][0], example["text"])


def test_the_computation_of_a_loaded_encoder_has_the_dtype(folders, weights):
    changes = {"encoder_weights": str(weights), "dtype": "bfloat16"}
    recipe = settings("gridtd-coco", folders, **changes)
    model = captioner_real.new_model(recipe, new_config(recipe), ("a",))
    assert model.encode(jnp.zeros((1, 8, 8, 3))).dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in nnx.to_flat_state(nnx.state(model)).leaves)


BAD = {
    "name the folder of the data set with --data": {"data": ""},
    "missing must be one of error, skip, got 'ask'": {"missing": "ask"},
    "at_least must be at least 1, got 0": {"at_least": 0},
    "an encoder would be frozen that has learnt nothing": {"encoder_weights": ""},
    "checkpoint_every must be a multiple of log_every 3": {"log_every": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(message):
    with pytest.raises(ValueError, match=message):
        GridTDCoco(**({"data": "x"} | BAD[message]))


def test_what_is_wrong_is_said_before_any_work(folders, weights, tmp_path, capsys):
    recipe = settings("gridtd-coco", folders, encoder_weights=str(weights))
    for change, kind, message in (
        ({"encoder": "vgg"}, ValueError, "encoder must be one of vgg11"),
        ({"image_size": 1}, ValueError, "too small"),
        ({"data": str(tmp_path / "no")}, FileNotFoundError, "COCO"),
        ({"split": "all"}, ValueError, "split is 'all'"),
        ({"encoder_weights": str(tmp_path / "no.safetensors")}, FileNotFoundError, "no file"),
        ({"encoder": "4,7"}, ValueError, "the tensor features.3"),
    ):
        with pytest.raises(kind, match=message):
            captioner_real.train(dataclasses.replace(recipe, **change), tmp_path / "new")
    assert not list(tmp_path.glob("new*"))
    assert cli.main(["train", "aoa-flickr30k", "--out", str(tmp_path / "new")]) == 2
    assert "name the folder of the data set with --data" in capsys.readouterr().err
