"""The recipe clip-shapes, at a size that trains in seconds."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrel.models import CLIP
from jaxrel.train.recipes import clip_shapes
from jaxrel.train.recipes.clip_shapes import ClipShapes

pytestmark = pytest.mark.recipes

SMALL = ClipShapes(
    scenes=64,
    steps=6,
    batch=16,
    width=16,
    vision_layers=1,
    text_layers=1,
    heads=2,
    patch_size=16,
    projection=8,
    log_every=2,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "model"
    return clip_shapes.train(SMALL, folder), folder


def test_training_writes_a_model_its_settings_and_a_log(trained):
    model, folder = trained
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert ClipShapes(**json.loads((folder / "settings.json").read_text())) == SMALL
    loaded = CLIP.from_pretrained(folder)
    inputs = loaded.prepare(image=np.zeros((64, 64, 3), np.uint8), text="a red circle")
    np.testing.assert_array_equal(
        jax.jit(CLIP.score)(loaded, inputs), jax.jit(CLIP.score)(model, inputs)
    )


def test_training_is_reproducible(trained, tmp_path):
    again = clip_shapes.train(SMALL, tmp_path / "again")
    for one, other in zip(jax.tree.leaves(trained[0]), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pixels_are_normalised_as_the_processor_does(trained):
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    want = trained[0].processor.image(list(image))
    # The processor divides by 255, then by 0.5: float32 rounding.
    np.testing.assert_allclose(clip_shapes.normalise(jax.numpy.asarray(image)), want, atol=1e-6)


def test_evaluation_and_card(trained):
    model, folder = trained
    result = clip_shapes.evaluate(model, scenes=128, among=32)
    assert json.loads(json.dumps(result)) == result
    for interval in (result["retrieval"]["caption"], result["localisation"]["chance"]):
        assert 0 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1
    # An untrained model retrieves by chance, 1 in 32; an eighth would be a leak.
    assert result["retrieval"]["caption"]["mean"] < 1 / 8
    card = clip_shapes.card(folder, result)
    assert "jaxrel train clip-shapes --steps 6 --batch 16 --log-every 2 --scenes 64" in card
    assert "| weighted | " in card


def test_evaluation_needs_whole_groups(trained):
    with pytest.raises(ValueError, match="scenes must be a multiple of 32, got 40"):
        clip_shapes.evaluate(trained[0], scenes=40)


def test_a_loss_that_is_not_finite_stops_and_writes_nothing(tmp_path):
    wild = dataclasses.replace(SMALL, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"the loss is \S+ at step \d; nothing was writ"):
        clip_shapes.train(wild, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": 0}, "steps must be"),
        ({"batch": 65}, "more than the 64"),
        ({"full": 2.0}, "0 to 1"),
    ],
)
def test_settings_out_of_range(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SMALL, **change)
