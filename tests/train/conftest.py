"""Data sets and captioners on disk, which many tests of training begin with."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh

from jaxrel.train.loop import train as trainer
from jaxrel.train.recipes import captioner_shapes
from jaxrel.train.recipes.captioner_shapes import AoAShapes, GridTDShapes
from tests.train.folders import (
    ANNOTATIONS,
    ANNOTATIONS_FILE,
    CAPTIONS,
    INSTANCES,
    QUESTIONS,
    QUESTIONS_FILE,
    karpathy,
    write_image,
    write_json,
)


@pytest.fixture(scope="module")
def one_device():
    """Train on one device; the recipes of real data share their batches among several."""
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", functools.partial(trainer.fit, mesh=mesh))
        yield


@pytest.fixture
def coco_folder(tmp_path):
    write_json(tmp_path / "annotations/captions_val2017.json", CAPTIONS)
    write_json(tmp_path / "annotations/instances_val2017.json", INSTANCES)
    for i, image in enumerate(CAPTIONS["images"]):
        write_image(tmp_path / "val2017" / image["file_name"], grey=50 * i, quality=100)
    split = karpathy("train", "val", "restval", "test", "val")
    write_json(tmp_path / "dataset_coco.json", split)
    for image in split["images"]:
        write_image(tmp_path / image["filepath"] / image["filename"])
    return tmp_path


@pytest.fixture
def flickr_folder(tmp_path):
    split = karpathy("train", "val", "train", coco=False)
    write_json(tmp_path / "dataset_flickr30k.json", split)
    for image in split["images"]:
        write_image(tmp_path / "flickr30k-images" / image["filename"])
    return tmp_path


@pytest.fixture
def vqa_folder(tmp_path):
    write_json(tmp_path / QUESTIONS_FILE, QUESTIONS)
    write_json(tmp_path / ANNOTATIONS_FILE, ANNOTATIONS)
    for image in (9, 42):
        write_image(tmp_path / f"val2014/COCO_val2014_{image:012d}.jpg", grey=image)
    return tmp_path


@pytest.fixture
def folders(coco_folder, flickr_folder):
    # Both fixtures write into the same temporary folder.
    assert coco_folder == flickr_folder
    return str(coco_folder)


@pytest.fixture(scope="module")
def begun(quick_compile, tmp_path_factory):
    """By kind, the folder of a captioner to begin as, with values that need no compilation."""
    sizes = {"scenes": 16, "encoder": "4,4,4,4", "embed": 6, "hidden": 8, "batch": 8}
    root = tmp_path_factory.mktemp("begun")
    rng = np.random.default_rng(0)
    for recipe in (GridTDShapes(**sizes), AoAShapes(**sizes, heads=2)):
        model = nnx.eval_shape(lambda recipe=recipe: captioner_shapes.new_model(recipe))
        filled = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model)
        filled.save_pretrained(root / recipe.kind)
    return root
