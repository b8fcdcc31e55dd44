"""A small model and its folder, which the commands are tried on."""

import pytest

from jaxrel.models import CLIP
from tests.zoo.clips import small_clip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    small_clip().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved):
    """As the commands load it: a program that was traced for one is that of the other."""
    return CLIP.from_pretrained(saved)
