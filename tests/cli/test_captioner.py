"""The command line with a captioner that a user trained."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxrel import cli
from tests.zoo.captioners import captioner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "captioner"
    captioner("aoa").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scene(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def test_explain_every_word(folder, scene, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["explain", scene, "--caption", "--model", folder, "--json", "--out", str(out)]
    assert cli.main([*arguments, "--method", "lrp,attention", "--heads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["explanations"]
    assert [one["method"] for one in found] == ["lrp", "attention"]
    words = [example["target"] for example in found[0]["examples"]]
    assert all(word.endswith("]") for word in words)
    assert np.shape(found[0]["examples"][0]["image"]) == (16, 16)
    assert np.shape(found[1]["examples"][0]["image"]) == (4, 4)
    assert sorted(file.name for file in out.iterdir()) == ["explanation.html", "explanation.png"]


def test_lrp_is_the_usual_method(folder, scene, tmp_path, capsys):
    arguments = ["explain", scene, "--caption", "--model", folder, "--json"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (one,) = json.loads(capsys.readouterr().out)["explanations"]
    assert one["method"] == "lrp"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--caption", "--method", "weighted"], "unknown method 'weighted'"),
        (["--caption", "--method", "magic"], "unknown method 'magic'"),
        (["--caption", "--layers", "0"], "Captioner has one layer of attention"),
        (["--caption", "--heads", "7"], "there is no head 7; the model has heads 0 to 1"),
        (["--question", "what is red?"], "is made for --caption, not for --question"),
    ],
)
def test_what_cannot_be(arguments, text, folder, scene, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["explain", scene, *arguments, "--model", folder, "--out", str(out)]
    assert cli.main(command) == 2
    assert text in capsys.readouterr().err
    assert not out.exists()


def test_evaluate_another_model(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["evaluate", "captioner", "--model", "vqa-shapes", "--out", str(out)]) == 2
    assert "this test is made for Captioner" in capsys.readouterr().err
    assert not out.exists()
