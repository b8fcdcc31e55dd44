"""The CLIP whose values are stored, and what it reads."""

import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.models import CLIP
from tests.zoo.clips import GOLDEN, write_golden_folder


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden_folder(golden, tmp_path_factory):
    return write_golden_folder(golden, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def reference(golden_folder):
    return CLIP.from_pretrained(golden_folder)


@pytest.fixture(scope="module")
def reference_inputs(golden):
    image = golden["pixel_values"].transpose(0, 2, 3, 1)
    return {"image": jnp.asarray(image), "text": jnp.asarray(golden["input_ids"], jnp.int32)}
