"""A small model and its folder, which the commands are tried on."""

import pytest

from tests.zoo.clips import small_clip


@pytest.fixture(scope="module")
def model():
    return small_clip()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    model.save_pretrained(folder)
    return folder
