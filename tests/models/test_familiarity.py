"""How familiar an image is: held-out scenes are, photographs and noise are not."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxrel.models import CLIP, Captioner, from_pretrained
from jaxrel.models.checkpoint import PRETRAINED, bundled
from jaxrel.models.familiarity import FILE, fit, read_familiarity, statistics
from jaxrel.train.data.shapes import Shapes


@pytest.fixture(scope="module")
def model():
    return CLIP.from_pretrained("clip-shapes")


def distance(model, images):
    return model.familiar.distance(model.processor.image(images))


def photograph(seed, grey=False):
    """What photographs are like: brightness varies as 1 over the frequency, and colours with it."""
    rng = np.random.default_rng(seed)
    away = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(96)))
    away[0, 0] = 1
    waves = rng.normal(size=(3, 96, 96)) + 1j * rng.normal(size=(3, 96, 96))
    light, *tints = np.fft.ifft2(waves / away).real
    pixels = light[..., None] + (0 if grey else 0.5 * np.stack([*tints, light], axis=-1))
    pixels = np.broadcast_to((pixels - pixels.min()) / np.ptp(pixels), (96, 96, 3))
    return Image.fromarray((255 * pixels).astype(np.uint8))


@pytest.mark.parametrize("size", [64, 128])
def test_held_out_scenes_are_familiar(model, size):
    # None of these were measured: another seed.
    shapes = Shapes(seed=7, size=size)
    found = distance(model, [shapes.scene("test", i).image for i in range(256)])
    assert (found > model.familiar.usual).mean() <= 0.02


def test_photographs_and_noise_are_not(model):
    rng = np.random.default_rng(0)
    odd = [photograph(i, grey=i % 2 == 0) for i in range(8)]
    odd += [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))]
    odd += [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")]
    found = distance(model, odd)
    assert (found > model.familiar.usual).all(), found.round(2)


def test_every_bundled_model_knows_what_is_familiar():
    for name in bundled():
        found = read_familiarity(PRETRAINED / name)
        assert found is not None
        assert (found.data, found.scenes, found.share) == ("Shapes", 2048, 0.995)
        assert 1 < found.usual < 2
        assert 10 < found.score < 50


def test_what_is_told(model):
    text = ["a red astronaut smiling", ""]
    scene = Shapes().scene("test", 0).image
    inputs = {"image": model.processor.image([photograph(0), scene])}
    odd, known = model.familiarity(inputs, text, [1.0, 99.0])
    assert odd["familiarity"]["unlike"] is True
    assert odd["unknown words"] == ["astronaut", "smiling"]
    unlike, unknown = odd["notes"]
    assert unlike.startswith(
        "This image is unlike those the model was trained on (Shapes): the distance of its "
        "colours and edges is "
    )
    assert "99.5% of 2048 held-out images are below 1.7" in unlike
    assert unknown == "The model does not know 'astronaut', 'smiling'."
    assert known["familiarity"]["unlike"] is False
    assert known["unknown words"] == []
    (high,) = known["notes"]
    assert high.startswith("The score 99.0 is higher than that of any of 2048 held-out images")
    json.dumps([odd, known])


def test_words_of_a_caption_share_their_image(model, monkeypatch):
    measured = []
    monkeypatch.setattr(
        type(model.familiar), "distance", lambda _, x: measured.append(len(x)) or np.zeros(len(x))
    )
    inputs = {"image": np.zeros((5, 64, 64, 3), np.float32), "example": np.array([0, 0, 0, 1, 1])}
    assert len(model.familiarity(inputs, [""] * 5, np.zeros(5))) == 5
    assert measured == [2]


def test_a_model_that_was_not_measured_says_nothing(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    other = CLIP.from_pretrained(tmp_path / "model")
    assert other.familiar is None
    inputs = {"image": np.zeros((1, 64, 64, 3), np.float32)}
    (told,) = other.familiarity(inputs, ["a red circle"], [1.0])
    assert told == {"familiarity": {}, "unknown words": [], "notes": []}
    assert CLIP.from_pretrained("clip-shapes", image_size=32).familiar is None


def test_it_is_read_as_it_was_written(tmp_path, model):
    model.familiar.save(tmp_path)
    again = read_familiarity(tmp_path)
    images = model.processor.image([photograph(1)])
    assert again.distance(images) == model.familiar.distance(images)
    assert vars(again) == vars(model.familiar)
    assert read_familiarity(tmp_path / "none") is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.update(protocol="familiarity/9"),
        lambda content: content.pop("mean"),
        lambda content: content.update(extra=1),
        lambda content: content["whitening"].pop(),
    ],
)
def test_a_damaged_file_is_named(tmp_path, spoil):
    content = json.loads((PRETRAINED / "clip-shapes" / FILE).read_text())
    spoil(content)
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{FILE} does not tell which images are familiar"):
        read_familiarity(tmp_path)


def test_distances_are_mahalanobis(model):
    """Against the textbook's formula, with the covariance's inverse, in float64."""
    rng = np.random.default_rng(0)
    shapes = Shapes(seed=3)
    known, held_out = (
        model.processor.image([shapes.scene(split, i).image for i in range(100)])
        for split in ("val", "test")
    )
    found = fit(
        known, held_out, rng.normal(size=4), data="d", pixel_mean=[0.5] * 3, pixel_std=[0.5] * 3
    )
    measured = statistics(known * 0.5 + 0.5)
    scale = measured.std(0) + 1e-6
    inverse = np.linalg.inv(np.cov((measured / scale).T) + 0.01 * np.eye(len(scale)))
    away = (statistics(held_out * 0.5 + 0.5) - measured.mean(0)) / scale
    expected = np.sqrt(np.einsum("ij,jk,ik->i", away, inverse, away) / len(scale))
    # The file keeps four digits of each number.
    np.testing.assert_allclose(found.distance(held_out), expected, rtol=0.02)
    assert np.mean(expected > found.usual) == pytest.approx(0.01, abs=0.011)


def test_captioners_know_too():
    assert Captioner.from_pretrained("gridtd-shapes").familiar is not None
    assert from_pretrained("vqa-shapes").familiar is not None
