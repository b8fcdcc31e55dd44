"""A CLIPmapper for each task, and what it reads."""

import pytest

from jaxrel.models import CLIPMapperVQA
from tests.zoo.clipmappers import TEXTS, random_mapper
from tests.zoo.images import random_images


@pytest.fixture(scope="module")
def vqa():
    return random_mapper("vqa", layers=3)


@pytest.fixture(scope="module")
def caption():
    return random_mapper("caption", layers=2)


@pytest.fixture(scope="module", params=["vqa", "caption"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def inputs(vqa):
    return vqa.prepare(image=random_images(), text=TEXTS)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp(model.task) / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def half(vqa, tmp_path_factory):
    """Saved in float16, to compute in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    vqa.save_pretrained(folder, dtype="float16")
    return CLIPMapperVQA.from_pretrained(folder, dtype="bfloat16")
