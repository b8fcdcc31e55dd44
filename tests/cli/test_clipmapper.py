"""The command line with CLIPmapper: questions and captions, and one clear line for bad input."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxrel import cli
from jaxrel.models import (
    CLIPConfig,
    CLIPMapperCaption,
    CLIPMapperConfig,
    CLIPMapperVQA,
    Processor,
    TextConfig,
    VisionConfig,
    image_processing,
    word_tokenizer,
)
from tests.zoo.clipmappers import random_values

WORDS = ("circle", "colour", "is", "red", "the", "what")
CLIP = CLIPConfig(
    vision=VisionConfig(8, 1, 2, 8, image_size=16, patch_size=8),
    text=TextConfig(8, 1, 2, 8, vocab_size=10, context=9, eos_token_id=3),
    projection=4,
)
SIZES = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 8}


def save(kind, folder, **config):
    config = CLIPMapperConfig(task=kind.task, clip=CLIP, **SIZES, **config)
    processor = Processor(word_tokenizer(WORDS, 9), image_processing(16))
    model = random_values(lambda: kind(config, rngs=nnx.Rngs(0), processor=processor), scale=0.3)
    if kind is CLIPMapperCaption:
        # Random captions of some length: the end is the least probable word.
        model.head.bias[...] = model.head.bias[...].at[3].set(-9.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "vqa": save(CLIPMapperVQA, root / "vqa", answers=("red", "blue", "no")),
        "caption": save(CLIPMapperCaption, root / "caption"),
    }


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return paths


@pytest.fixture
def run(folders, tmp_path, capsys):
    """Run `jaxrel explain`; returns (status, standard output, standard error)."""

    def run(model, *arguments):
        where = ["--model", str(folders.get(model, model)), "--out", str(tmp_path / "out")]
        try:
            status = cli.main(["explain", *map(str, arguments), *where])
        except SystemExit as exit:  # argparse
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_a_question(run, images, tmp_path):
    asked = ("--question", "what colour is the circle?", "--method", "weighted,raw", "--json")
    status, printed, _ = run("vqa", images[0], *asked)
    assert status == 0
    for one in json.loads(printed)["explanations"]:
        (example,) = one["examples"]
        assert example["target"].split()[0] in ("red", "blue", "no")
        assert np.shape(example["image"]) == (2, 2)
        words = [word for word, _ in example["words"]]
        assert words[:5] == ["what", "colour", "is", "the", "circle"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "explanation.html",
        "explanation.png",
    ]


def test_an_answer_of_the_users(run, images):
    asked = ("--question", "what colour is the circle", "--answer", "no", "--method", "raw")
    status, printed, _ = run("vqa", *images, *asked)
    assert status == 0
    lines = printed.splitlines()
    assert lines[0].startswith(f"{images[0]}, no (")
    assert lines[1].startswith(f"{images[1]}, no (")


def test_captions_are_explained_word_by_word(run, images):
    status, printed, _ = run("caption", *images, "--caption", "--method", "raw", "--json")
    assert status == 0
    examples = json.loads(printed)["explanations"][0]["examples"]
    for path in images:
        targets = [one["target"] for one in examples if one["file"] == str(path)]
        # Each target is the caption so far, with its last word in brackets.
        caption = targets[-1].replace("[", "").replace("]", "").split()
        assert len(targets) == len(caption)
        for i, target in enumerate(targets):
            assert target.split() == [*caption[:i], f"[{caption[i]}]"]


BAD = {
    "unknown answer": (
        "vqa",
        ("--question", "what is red", "--answer", "purple"),
        "this model has no answer 'purple'; it has 3 answers: red, blue, no",
    ),
    "answer without question": ("caption", ("--caption", "--answer", "red"), "--answer goes with"),
    "question for a captioner": (
        "caption",
        ("--question", "what is red"),
        "is made for --caption, not for --question",
    ),
    "text for a model of questions": ("vqa", ("--text", "red"), "is made for --question"),
    "two at once": ("vqa", ("--question", "what", "--caption"), "not allowed with argument"),
    "nothing asked": ("vqa", (), "one of the arguments --text --question --caption is required"),
    "long question": (
        "vqa",
        ("--question", "what is the colour is the colour is the"),
        "this model reads at most 9: shorten it by 2",
    ),
    "unknown words": ("vqa", ("--question", "qui vive"), "knows none of the words"),
    "one-stream method": (
        "vqa",
        ("--question", "what", "--method", "no_aggregation"),
        "unknown method 'no_aggregation'; there are equal, weighted",
    ),
    "layers": (
        "vqa",
        ("--question", "what", "--layers", "0"),
        "in CLIPMapperVQA they attend to each other, and all maps count",
    ),
    "no such model": ("nowhere", ("--caption",), "no model folder 'nowhere'"),
}


@pytest.mark.parametrize(("model", "options", "text"), BAD.values(), ids=BAD.keys())
def test_bad_options(run, images, tmp_path, model, options, text):
    status, printed, errors = run(model, images[0], *options)
    assert (status, printed) == (2, "")
    assert "Traceback" not in errors
    assert text in errors
    assert not (tmp_path / "out").exists()
