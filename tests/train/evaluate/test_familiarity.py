"""What is familiar to a bundled model, measured on few scenes, and by the command."""

import jax
import numpy as np
import pytest

from jaxrel import cli
from jaxrel.models import CLIP
from jaxrel.models.familiarity import read_familiarity
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.evaluate.familiarity import measure


def test_the_command_measures_and_keeps_it(tmp_path, capsys):
    model = CLIP.from_pretrained("clip-shapes")
    model.save_pretrained(tmp_path / "model")
    command = ["evaluate", "clip-shapes", "--model", str(tmp_path / "model"), "--familiarity"]
    assert cli.main([*command, "--scenes", "128"]) == 0
    printed = capsys.readouterr().out
    found = read_familiarity(tmp_path / "model")
    assert f"99.5% of 128 held-out scenes are nearer than {found.usual}" in printed
    # The highest score is that of one of the scenes with its caption.
    scenes = [Shapes(size=64).scene("test", i) for i in range(64)]
    scenes += [Shapes(size=256).scene("test", 64 + i) for i in range(64)]
    inputs = model.prepare(
        image=[scene.image for scene in scenes], text=[scene.captions[0].text for scene in scenes]
    )
    assert found.score == pytest.approx(float(np.max(jax.jit(CLIP.score)(model, inputs))), rel=1e-3)
    assert CLIP.from_pretrained(tmp_path / "model").familiar is not None


def test_too_few_scenes_are_refused():
    with pytest.raises(ValueError, match="at least 4 scenes, got 2"):
        measure(None, pixel_mean=[0.5] * 3, pixel_std=[0.5] * 3, scenes=2)
