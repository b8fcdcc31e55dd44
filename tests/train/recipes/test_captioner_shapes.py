"""The recipes gridtd-shapes and aoa-shapes at a tiny size, and what all captioners share."""

import dataclasses
import json
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel import cli
from jaxrel.models.captioner import Captioner
from jaxrel.models.vision import PRESETS, ResNetConfig, VGGConfig
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.data.shapes.examples import CaptionExamples, caption_texts, normalise
from jaxrel.train.evaluate import captions
from jaxrel.train.loop import fit as training
from jaxrel.train.loop import train as trainer
from jaxrel.train.loop.optimiser import adamw
from jaxrel.train.losses.captions import caption_loss
from jaxrel.train.recipes import captioner_shapes
from jaxrel.train.recipes.captioner import (
    new_config,
    read_encoder,
)
from jaxrel.train.recipes.captioner_shapes import AoAShapes, GridTDShapes
from jaxrel.train.recipes.registry import RECIPES, find_recipe, is_real

pytestmark = [pytest.mark.recipes, pytest.mark.usefixtures("one_device")]

SMALL = {
    "scenes": 32,
    "steps": 4,
    "batch": 16,
    "learning_rate": 1e-2,
    "warmup": 1,
    "encoder": "4,4,8,8,8",
    "embed": 8,
    "hidden": 16,
    "log_every": 2,
    "checkpoint_every": 2,
}
KINDS = {"gridtd": GridTDShapes(**SMALL), "aoa": AoAShapes(**SMALL, heads=2)}


@pytest.fixture(scope="module")
def made(quick_compile, tmp_path_factory):
    """By kind, a trained model and its folder."""
    root = tmp_path_factory.mktemp("runs")
    return {
        kind: (captioner_shapes.train(recipe, root / kind), root / kind)
        for kind, recipe in KINDS.items()
    }


@pytest.fixture(scope="module")
def examples():
    """Sixteen scenes as the recipe trains on them, and the untrained model."""
    model = captioner_shapes.new_model(dataclasses.replace(KINDS["gridtd"], scenes=16))
    recipe = KINDS["gridtd"]
    source = CaptionExamples(recipe, recipe.split, model.processor, recipe.context, (4, 4))
    return source, model


def parameters(model):
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize("kind", KINDS)
def test_training_writes_a_model_its_settings_and_a_log(made, kind):
    model, folder = made[kind]
    assert (model.config.kind, model.config.grid) == (kind, (4, 4))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"accuracy", "patches", "learning_rate"} <= set(lines[0])
    written = find_recipe(f"{kind}-shapes").settings(
        **json.loads((folder / "settings.json").read_text())
    )
    assert written == KINDS[kind]
    assert not folder.with_name(f"{folder.name}.checkpoints").exists()
    # What is thrown away is not in the file, and the file is in half precision.
    size = sum(x.size for x in parameters(model))
    assert 2 * size < (folder / "model.safetensors").stat().st_size < 2 * size + 10_000
    for one, other in zip(
        parameters(model), parameters(Captioner.from_pretrained(folder)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, np.asarray(one).astype(np.float16))


def test_a_stopped_training_goes_on_as_if_it_had_not_been(made, tmp_path, monkeypatch, capsys):
    """By the command line, which takes its settings from options."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ["train", "gridtd-shapes", "--out", str(tmp_path / "model"), *flags]
    append = training._append

    def stop(log, line):
        append(log, line)
        if line["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_append", stop)
    assert cli.main(command) == 130
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(training, "_append", append)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'model'}\n"
    got = Captioner.from_pretrained(tmp_path / "model")
    for one, other in zip(parameters(got), parameters(made["gridtd"][0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_encoder_is_trained_alone_and_taken_over_frozen(made, quick_compile, tmp_path):
    """Naming alone moves the encoder and not the decoder; a frozen encoder stays as it was."""
    start = captioner_shapes.new_model(KINDS["gridtd"])
    alone = dataclasses.replace(KINDS["gridtd"], split="train", word_loss=0.0)
    named = captioner_shapes.train(alone, tmp_path / "named")
    half = jax.tree.map(lambda x: x.astype(np.float16), nnx.state(start, nnx.Param))
    changed = jax.tree.map(
        lambda one, other: bool((one != other).any()), half, nnx.state(named, nnx.Param)
    )
    assert all(jax.tree.leaves(changed["encoder"]))
    del changed["encoder"]
    assert not any(jax.tree.leaves(changed))
    taken = dataclasses.replace(
        KINDS["gridtd"], encoder_of=str(tmp_path / "named"), encoder_rate=0.0, patch_loss=0.0
    )
    model = captioner_shapes.train(taken, tmp_path / "taken")
    for one, other in zip(parameters(model.encoder), parameters(named.encoder), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(
        (one != other).any()
        for one, other in zip(parameters(model), parameters(named), strict=True)
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"word_loss": 0.0, "patch_loss": 0.0},
            "word_loss is 0, patch_loss 0.0 and encoder_rate 1.0: nothing would be trained; give "
            "--word-loss 1, or --patch-loss 1 with --encoder-rate 1 to train the encoder alone",
        ),
        (
            {"encoder_rate": 0.0},
            "encoder_rate is 0 and encoder_of empty: an encoder would be frozen that has learnt "
            "nothing. Name a captioner with --encoder-of, or train it with --encoder-rate 1",
        ),
    ],
)
def test_what_would_train_nothing_is_refused(changed, message):
    with pytest.raises(ValueError, match="nothing") as error:
        dataclasses.replace(KINDS["gridtd"], **changed)
    assert str(error.value) == message


def test_an_encoder_of_other_sizes_is_refused(made, tmp_path):
    _, folder = made["gridtd"]
    other = dataclasses.replace(KINDS["aoa"], encoder="4,4,8,8,4", encoder_of=str(folder))
    with pytest.raises(ValueError, match="give the same sizes with --encoder"):
        captioner_shapes.train(other, tmp_path / "model")


def test_pixels_are_normalised_as_the_processor_does(made):
    model, _ = made["aoa"]
    scenes = [Shapes().scene("biased_train", i) for i in range(2)]
    images = [scene.image for scene in scenes]
    found = normalise(jnp.asarray(np.stack(images)))
    prepared = model.prepare(image=images, text=caption_texts(scenes[0])[:2])
    # The processor divides by 255, then by 0.5: float32 rounding.
    np.testing.assert_allclose(found, prepared["image"], atol=1e-6)


def test_examples_are_what_the_model_reads(examples):
    source, model = examples
    example, scene = source[35], Shapes().scene("biased_train", 3)
    assert len(source) == 5 * 32
    np.testing.assert_array_equal(example["image"], scene.image)
    assert example["shown"].shape == (16, 3)
    # `full` is 1: only captions that name every object.
    texts = caption_texts(scene)[:2]
    ids = [np.asarray(model.prepare(image=scene.image, text=t)["text"])[0] for t in texts]
    assert example["text"].tolist() in [row.tolist() for row in ids]


def test_captions_lose_their_punctuation_and_no_word_is_unknown(examples):
    source, model = examples
    texts = [c for i in range(32) for c in Shapes().scene("biased_train", i).captions]
    assert any("," in caption.text for caption in texts)
    unknown = model.processor.tokenizer.unk_token_id
    assert not any(unknown in source[i]["text"] for i in range(32))


def test_the_loss_counts_words_and_ends_and_no_padding(examples):
    source, model = examples
    text = np.stack([source[i]["text"] for i in range(4)]).astype(np.int32)
    image = np.stack([source[i]["image"] for i in range(4)])
    features = model.encode(normalise(jnp.asarray(image)))
    found, metrics = caption_loss(model, features, jnp.asarray(text))
    logits = np.asarray(model({"features": features, "text": text}), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    of_words, right = [], []
    for row, ids in zip(logs, text, strict=True):
        for i in range(1, ids.tolist().index(model.processor.tokenizer.eos_token_id) + 1):
            of_words.append(-row[i - 1, ids[i]])
            right.append(row[i - 1].argmax() == ids[i])
    # float32 logits in another program.
    np.testing.assert_allclose(found, np.mean(of_words), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


def test_dropout_is_that_of_the_key(examples):
    source, model = examples
    batch = {name: jnp.asarray(value)[None] for name, value in source[0].items() if name != "id"}
    features = model.encode(normalise(batch["image"]))
    loss = jax.jit(lambda key: caption_loss(model, features, batch["text"], key)[0])
    losses = [loss(jax.random.key(i)) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_statistics_of_normalisation_are_not_trained(examples, tmp_path, monkeypatch):
    def fit(loss, params, *_, folder, **__):
        folder.mkdir()
        (folder / "train.jsonl").write_text("")
        return jax.tree.map(lambda x: x + 1, params)

    monkeypatch.setattr(trainer, "fit", fit)
    recipe, untrained = KINDS["gridtd"], examples[1]
    encoder = ResNetConfig("basic", (1, 1), (4, 8), 4)
    config = dataclasses.replace(untrained.config, encoder=encoder)
    model = Captioner(config, rngs=nnx.Rngs(0), processor=untrained.processor)
    model.encoder.stem.norm.mean.set_value(jnp.full(4, 0.25))
    found = trainer.train_model(
        recipe, tmp_path / "model", {"model": model}, caption_loss, examples[0], name="test"
    )
    norm = found.encoder.stem.norm
    np.testing.assert_array_equal(norm.mean[...], 0.25)
    np.testing.assert_array_equal(norm.scale[...], 2)


@pytest.mark.parametrize("clamp", [0.1, math.inf])
def test_gradients_are_clamped_by_component(clamp):
    params = {"a": np.zeros(3, np.float32)}
    found, plain = adamw(0.5, clip=None, clamp=clamp, b1=0.8), optax.adam(0.5, b1=0.8)
    state, expected_state = found.init(params), plain.init(params)
    # Adam's first step forgets the size of the gradient; the second compares it with the first.
    for grads in ([3.0, -0.05, -9.0], [0.03, -0.0005, -0.09]):
        grads = np.array(grads, np.float32)
        bounded = {"a": np.clip(grads, -clamp, clamp)}
        updates, state = found.update({"a": grads}, state, params)
        expected, expected_state = plain.update(bounded, expected_state, params)
        # The same arithmetic, in another order.
        np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-6)


def test_a_clamp_is_positive():
    with pytest.raises(ValueError, match=r"clamp must be positive, got 0\.0"):
        adamw(0.1, clamp=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_card(made, kind):
    model, folder = made[kind]
    recipe = find_recipe(f"{kind}-shapes")
    assert isinstance(model, recipe.model)
    result = recipe.evaluate(model, scenes=10)
    assert json.loads(json.dumps(result)) == result
    assert list(result["splits"]) == ["biased_test", "test"]
    card = recipe.card(folder, result)
    assert f"jaxrel train {kind}-shapes --steps 4 --batch 16" in card
    assert "| share of | `biased_test` | `test` |" in card
    assert "| captions that state such an object | " in card
    assert "| CIDEr-D (times 10) | " in card
    assert ("Ada-LSTM" in card) == (kind == "gridtd")


def test_the_command_line_writes_the_card(made, capsys):
    _, folder = made["aoa"]
    flags = ["--model", str(folder), "--split", "val", "--scenes", "3", "--card"]
    assert cli.main(["evaluate", "aoa-shapes", *flags]) == 0
    assert list(json.loads(capsys.readouterr().out)["splits"]) == ["val", "test"]
    assert "| share of | `val` | `test` |" in (folder / "README.md").read_text()


def test_hallucinations_are_counted(made, monkeypatch):
    model, _ = made["gridtd"]
    scenes = [Shapes().scene("biased_test", i) for i in range(8)]
    absent = [
        next(s for s in ("star", "ring", "heart") if s not in {o.shape for o in scene.objects})
        for scene in scenes
    ]
    # One true object, and in half of the captions one whose shape is nowhere.
    texts = [
        f"a {scene.objects[0].colour} {scene.objects[0].shape}" + f" and a red {shape}" * (i % 2)
        for i, (scene, shape) in enumerate(zip(scenes, absent, strict=True))
    ]
    monkeypatch.setattr(Captioner, "predict", lambda self, inputs: texts)
    result = captions.evaluate(model, split="biased_test", scenes=8, batch=8)
    shares = [found["mean"] for found in result["hallucination"].values()]
    assert shares == pytest.approx([1 / 3, 1 / 2, 1 / 3, 1 / 2])
    assert result["truth"]["stated objects that are true"]["mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_settings(name):
    fields = dataclasses.fields(find_recipe(name).settings)
    assert {"seed", "steps", "batch", "learning_rate"} <= {field.name for field in fields}
    assert all(field.metadata["help"] for field in fields)
    assert is_real(name) == ("data" in {field.name for field in fields})


def test_sizes_of_encoders():
    assert read_encoder("vgg16") == PRESETS["vgg16"]
    assert read_encoder("16,32-32") == VGGConfig(((16,), (32, 32)))
    for text in ("", "vgg", "16,,32", "16-x", "0,4"):
        with pytest.raises(ValueError, match=f"a pooling is, such as 32-32,64-64; got '{text}'"):
            read_encoder(text)
    # The model that ships must stay below 6 MB in half precision.
    for recipe in (GridTDShapes(), AoAShapes()):
        model = nnx.eval_shape(lambda recipe=recipe: captioner_shapes.new_model(recipe))
        assert 2 * sum(math.prod(x.shape) for x in parameters(model)) < 6e6
        assert new_config(recipe, image_size=64).grid == (8, 8)


BAD = {
    "context must be at least 31 for the longest captions of Shapes, got 20": {"context": 20},
    "clamp must be positive": {"clamp": 0.0},
    "b1 must be from 0 to below 1, got 1": {"b1": 1.0},
    "batch 64 is more than the 8 scenes": {"scenes": 8},
    "patch_loss must be 0 or more, got -1": {"patch_loss": -1.0},
    "full must be from 0 to 1, got 2": {"full": 2.0},
    "steps must be at least 1, got 0": {"steps": 0},
    "warmup must be 0 or more, got -1": {"warmup": -1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(message):
    with pytest.raises(ValueError, match=message):
        AoAShapes(**BAD[message])


def test_what_is_wrong_is_said_before_any_work(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the scenes are drawn already")

    monkeypatch.setattr(captioner_shapes, "CaptionExamples", never)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        captioner_shapes.train(KINDS["gridtd"], tmp_path / "file")
    for change, message in (
        ({"encoder": "vgg"}, "encoder must be one of vgg11"),
        ({"encoder": "4,4,4,4,4,4,4,4"}, "an image of 64 x 64 pixels is too small"),
        ({"attention": "mine"}, "attention must be one of paper, as coded"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            captioner_shapes.train(dataclasses.replace(KINDS["gridtd"], **change), tmp_path / "new")
    with pytest.raises(ValueError, match="hidden 16 is not a multiple of its 3 heads"):
        captioner_shapes.train(dataclasses.replace(KINDS["aoa"], heads=3), tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_another_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Shapes: split is 'tests'; expected one of train"):
        captioner_shapes.train(
            dataclasses.replace(KINDS["gridtd"], split="tests"), tmp_path / "new"
        )
