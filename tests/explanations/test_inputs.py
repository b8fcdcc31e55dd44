"""What is told of each example, whatever the model."""

import types

import numpy as np
from PIL import Image

from jaxrel.explanations.examples import Batch, Rows
from jaxrel.explanations.inputs import examples
from jaxrel.images import read_image


class Model:
    layout = types.SimpleNamespace(schedule=())

    def tokens(self, inputs):
        return [["", "a", "ring"]] * len(inputs["text"])


def told(model, image, text, inputs, seen):
    rows = Rows(inputs, len(seen))
    score = np.zeros(len(seen))
    return examples(model, Batch(5, 1, image, text, None), rows, seen=seen, score=score)


def test_files_sentences_and_what_the_model_saw(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "scene.png")
    images = [read_image(tmp_path / "scene.png"), np.zeros((16, 16, 3), np.uint8)]
    seen = [np.zeros((30, 30, 3), np.uint8), images[1]]
    rows = {"image": np.zeros((2, 16, 16, 3)), "text": np.zeros((2, 3))}
    first, second = told(Model(), images, ["a ring", "a star"], rows, seen)
    assert first == {
        "file": "scene.png",
        "sentence": "a ring",
        "image": "40 x 30 pixels; the model saw the middle 30 x 30, as 16 x 16",
    }
    assert second == {
        "sentence": "a star",
        "image": "16 x 16 pixels; the model saw all of it, as 16 x 16",
    }
    # One text for all images; a model whose streams attend to each other is asked questions.
    model = Model()
    model.layout = types.SimpleNamespace(schedule=(1,))
    assert [one["question"] for one in told(model, images, "what?", rows, seen)] == ["what?"] * 2


def test_words_of_captions():
    rows = {
        "image": np.zeros((2, 4, 4, 3)),
        "text": np.zeros((2, 3)),
        "position": np.array([1, 2]),
        "example": np.array([0, 0]),
    }
    seen = [np.zeros((4, 4, 3), np.uint8)] * 2
    found = told(Model(), [seen[0]], None, rows, seen)
    assert [(one["word"], one["position"], one["caption"]) for one in found] == [
        ("a", 1, 5),
        ("ring", 2, 5),
    ]
    assert "question" not in found[0]


def test_what_the_model_tells_of_familiarity():
    class Knowing(Model):
        def familiarity(self, inputs, text, score):
            return [{"familiarity": {"distance": 9.0}, "unknown words": [], "notes": ["Odd."]}]

    seen = [np.zeros((4, 4, 3), np.uint8)]
    rows = {"image": np.zeros((1, 4, 4, 3)), "text": np.zeros((1, 3))}
    (found,) = told(Knowing(), [seen[0]], ["a"], rows, seen)
    assert found["familiarity"] == {"distance": 9.0}
    assert found["notes"] == ["Odd."]
    assert "unknown words" not in found
