"""A captioner of each kind, and what it reads."""

import pytest

from tests.zoo.captioners import TEXTS, captioner
from tests.zoo.images import random_images


@pytest.fixture(scope="module", params=["adaptive", "gridtd", "aoa"])
def model(request):
    return captioner(request.param)


@pytest.fixture(scope="module")
def inputs(model):
    return model.prepare(image=random_images(), text=TEXTS)
