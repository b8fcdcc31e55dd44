"""The recipes that fine-tune a captioner, at a tiny size, in every mode."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrel import cli
from jaxrel.models import Processor, word_tokenizer
from jaxrel.models.captioner import Captioner
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.data.shapes.examples import CAPTIONS, caption_texts
from jaxrel.train.loop import fit as training
from jaxrel.train.loop import train as trainer
from jaxrel.train.loop.optimiser import warmup_cosine
from jaxrel.train.recipes import finetune
from jaxrel.train.recipes.finetune import FinetuneCoco, FinetuneFlickr30k, FinetuneShapes
from jaxrel.train.recipes.registry import RECIPES, find_recipe
from tests.paths import ROOT
from tests.zoo.captioners import REGIONS
from tests.zoo.captioners import captioner as random_captioner

pytestmark = pytest.mark.recipes

SMALL = {
    "scenes": 16,
    "steps": 4,
    "batch": 8,
    "learning_rate": 1e-2,
    "encoder_rate": 1.0,
    "warmup": 1,
    "log_every": 1,
    "checkpoint_every": 2,
}
MODES = ("plain", "lrp", "scst", "lrp-scst")
METRICS = {
    "plain": set(),
    "lrp": {"accuracy_reweighted", "loss_plain", "loss_reweighted"},
    "scst": {"cider", "cider_greedy"},
    "lrp-scst": {"cider", "cider_greedy"},
}


def settings(begun, mode, kind="aoa", **changes):
    return FinetuneShapes(model=str(begun / kind), mode=mode, **(SMALL | changes))


def parameters(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]


def killed(recipe, out):
    """Train in another process, which is killed at step 4, after the checkpoint of step 2."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.train.recipes.test_finetune",
            json.dumps(dataclasses.asdict(recipe)),
            out,
        ],
        cwd=ROOT,
        # As `quick_compile` here: other programs round otherwise.
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stderr=subprocess.PIPE,
    )
    log = out.with_name(f"{out.name}.checkpoints") / "train.jsonl"
    while not (log.exists() and '"step": 3' in log.read_text()):
        assert child.poll() is None, child.stderr.read().decode()
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()


def stuck(settings, out):
    """A training that stops for ever at step 4, where the log asks for the learning rate."""

    def rate(*args):
        usual = warmup_cosine(*args)
        wait = threading.Event().wait
        return lambda n: wait() if isinstance(n, int) and n > 2 else usual(n)

    trainer.warmup_cosine = rate
    finetune.train_shapes(FinetuneShapes(**json.loads(settings)), Path(out))


def diverge(monkeypatch):
    """Let the parameters get out of hand after the checkpoint of step 2, in the same program."""
    compiled = training._compiled_step

    def wild(*args):
        step = compiled(*args)

        def run(params, state, batch, key, number):
            if number > 2:
                infinite = lambda x: jax.device_put(np.full(x.shape, np.inf, x.dtype), x.sharding)
                params = jax.tree.map(infinite, params)
            return step(params, state, batch, key, number)

        return run

    monkeypatch.setattr(training, "_compiled_step", wild)


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_training_goes_on_as_if_it_had_not_been(mode, begun, tmp_path, monkeypatch):
    """Stopped by a loss that is not finite, in one mode by a kill before."""
    rate = 1.0 if mode == "lrp-scst" else 0.0
    recipe, out = settings(begun, mode, encoder_rate=rate), tmp_path / "model"
    whole = finetune.train_shapes(recipe, out)
    before = Captioner.from_pretrained(recipe.model)
    for part in ("head", "embedding", "encoder"):
        pairs = zip(
            parameters(getattr(whole, part)), parameters(getattr(before, part)), strict=True
        )
        # The file is in half precision.
        moved = [(x != y.astype(np.float16)).any() for x, y in pairs]
        assert all(moved) if part != "encoder" or rate else not any(moved)

    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert METRICS[mode] | {"loss", "accuracy", "learning_rate"} <= set(lines[0])
    assert FinetuneShapes(**json.loads((out / "settings.json").read_text())) == recipe
    assert not (tmp_path / "model.checkpoints").exists()

    again = tmp_path / "stopped"
    if mode == "lrp-scst":
        killed(recipe, again)
        assert (tmp_path / "stopped.checkpoints" / "2").is_dir()
    message = r"at step [34] \(its examples: \d+, .*\)\. The checkpoint of step 2 is kept"
    with monkeypatch.context() as patch:
        diverge(patch)
        with pytest.raises(FloatingPointError, match=message):
            finetune.train_shapes(recipe, again)
    assert not again.exists()
    assert (tmp_path / "stopped.checkpoints" / "2").is_dir()
    resumed = finetune.train_shapes(recipe, again)
    for x, y in zip(parameters(resumed), parameters(whole), strict=True):
        np.testing.assert_array_equal(x, y)
    read = [json.loads(line) for line in (again / "train.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in read] == [x["loss"] for x in lines]


def test_the_command_line(begun, tmp_path, capsys):
    """Training with parts of batches and in half precision, and the card."""
    out, model = str(tmp_path / "model"), begun / "gridtd"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags += ["--batch=16", "--accumulate=2", "--encoder-rate=0", "--dtype=bfloat16", "--dropout=0"]
    flags += ["--stop-words=a,the", "--mixing=0.25", "--temperature=2", "--steps=2"]
    command = ["train", "finetune-shapes", "--out", out, "--model", str(model), *flags]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert Captioner.from_pretrained(out).config.kind == "gridtd"
    judge = ["evaluate", "finetune-shapes", "--model", out, "--scenes", "3", "--card"]
    assert cli.main(judge) == 0
    assert list(json.loads(capsys.readouterr().out)["splits"]) == ["biased_test", "test"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "jaxrel train finetune-shapes --steps 2 --batch 16" in card
    assert f" --model {model} --mixing 0.25 --temperature 2.0" in card
    assert "fine-tuned with LRP-inference (Sun et al. 2022)." in card
    assert "| CIDEr-D (times 10) | " in card


def test_examples_know_their_scene_and_the_reward_all_its_captions(begun, tmp_path, monkeypatch):
    made = []

    def keep(recipe, folder, parts, loss, source, **more):
        made.append((source, more))
        return parts["model"]

    def reward(references, tokens, form, *, idf, ends):
        made.append((references, tokens, form, idf, ends))

    monkeypatch.setattr(finetune, "train_model", keep)
    monkeypatch.setattr(finetune, "CiderReward", reward)
    recipe = settings(begun, "scst", idf="batch", ends="neither")
    model = finetune.train_shapes(recipe, tmp_path / "model")
    (references, tokens, form, *options), (source, more) = made
    assert options == ["batch", "neither"]
    assert form == model.caption_format()
    assert tokens[:5] == ["<pad>", "<unk>", "<start>", "<end>", "a"]
    scenes = [Shapes().scene("biased_train", i) for i in range(16)]
    assert references == [[text.split() for text in caption_texts(scene)] for scene in scenes]
    assert len(source) == 16 * CAPTIONS
    example = source[16 + 3]
    assert example["references"] == 3
    np.testing.assert_array_equal(example["image"], scenes[3].image)
    assert more == {"name": "finetune-shapes"}
    assert recipe.optimiser()["factors"] == {"model/encoder": 1.0}


# ---- real data


@pytest.mark.parametrize(
    ("name", "kind"), [("coco", FinetuneCoco), ("flickr30k", FinetuneFlickr30k)]
)
def test_real_data(name, kind, folders, tmp_path, monkeypatch):
    """Up to the training, which is the same for all."""
    begun = nnx.clone(random_captioner("gridtd"))
    words = word_tokenizer(("a", "dog", "no", "0", "it", "runs", "2"), 9)
    begun.processor = Processor(words, begun.processor.images)
    begun.save_pretrained(tmp_path / "begun")
    made, reward = [], finetune.CiderReward

    def keep(recipe, folder, parts, loss, source, **more):
        made.append((parts, loss, source, more))
        return parts["model"]

    def keep_reward(references, *args, **options):
        made.append(references)
        return reward(references, *args, **options)

    monkeypatch.setattr(finetune, "train_model", keep)
    monkeypatch.setattr(finetune, "CiderReward", keep_reward)
    recipe = kind(data=folders, model=str(tmp_path / "begun"), mode="scst", dtype="float32")
    find_recipe(f"finetune-{name}").train(recipe, tmp_path / "model")
    references, (parts, loss, source, more) = made
    assert more == {"name": f"finetune-{name}"}
    assert (recipe.optimiser()["factors"], recipe.workers) == ({"model/encoder": 0.0}, 8)
    examples = [source[i] for i in range(len(source))]
    for example in examples:
        (caption,) = parts["model"].sentences(example["text"][None])
        assert caption.split() in references[example["references"]]
    if name == "coco":
        batch = {key: np.stack([x[key] for x in examples]) for key in ("image", "references")}
        value, metrics = jax.jit(loss)(parts, batch, jax.random.key(0))
        assert np.isfinite(value)
        assert set(metrics) == {"accuracy", "cider", "cider_greedy"}


# ---- what is wrong


BAD = {
    "mode must be one of plain, lrp, scst, lrp-scst, got 'cider'": {"mode": "cider"},
    "mixing must be from 0 to 1, got 1.5": {"mixing": 1.5},
    "temperature must be positive, got 0": {"temperature": 0.0},
    "weighed must be one of both, attended, hidden, got 'all'": {"weighed": "all"},
    "idf must be one of corpus, batch, got 'val'": {"idf": "val"},
    "ends must be one of both, references, neither, got 'none'": {"ends": "none"},
    "dropout must be one of 0, 1, got 2": {"dropout": 2},
    "dtype must be one of float32, bfloat16, got 'half'": {"dtype": "half"},
    "clamp must be positive": {"clamp": 0.0},
    "encoder_rate must be 0 or more, got -1": {"encoder_rate": -1.0},
    "model is empty; name the captioner to fine-tune with --model": {"model": ""},
    "batch 64 is more than the 8 scenes": {"scenes": 8},
    "full must be from 0 to 1, got 2": {"full": 2.0},
    "steps must be at least 1, got 0": {"steps": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(message):
    with pytest.raises(ValueError, match=message):
        FinetuneShapes(**BAD[message])


def test_real_data_must_be_named():
    with pytest.raises(ValueError, match="name the folder of the data set with --data"):
        FinetuneCoco(model="x")
    with pytest.raises(ValueError, match="model is empty"):
        FinetuneFlickr30k(data="x")


def test_what_is_wrong_is_said_before_any_work(begun, tmp_path, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("the scenes are drawn already")

    monkeypatch.setattr(finetune, "CaptionExamples", never)
    out = tmp_path / "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    recipe = settings(begun, "lrp")
    with pytest.raises(FileExistsError):
        finetune.train_shapes(recipe, tmp_path / "mine")
    random_captioner("gridtd").save_pretrained(tmp_path / "other")
    random_captioner("gridtd", **REGIONS).save_pretrained(tmp_path / "regions")
    for name, kind, message in (
        (tmp_path / "none", FileNotFoundError, "none"),
        ("clip-shapes", ValueError, "captioner"),
        (tmp_path / "other", ValueError, r"no captioner of Shapes: its images have 16 pixels"),
        (tmp_path / "regions", ValueError, "reads features of regions"),
    ):
        with pytest.raises(kind, match=message):
            finetune.train_shapes(dataclasses.replace(recipe, model=str(name)), out)
    assert cli.main(["train", "finetune-shapes", "--out", str(out), "--mode", "cider"]) == 2
    assert "mode must be one of plain, lrp, scst, lrp-scst" in capsys.readouterr().err
    assert not out.exists()


def test_modes_and_defaults_are_those_of_the_recipes():
    assert {"finetune-shapes", "finetune-coco", "finetune-flickr30k"} <= set(RECIPES)
    recipe = FinetuneShapes()
    assert (recipe.mode, recipe.mixing, recipe.temperature) == ("lrp", 0.5, 1.0)
    assert (recipe.idf, recipe.ends) == ("corpus", "both")


if __name__ == "__main__":
    stuck(*sys.argv[1:])
