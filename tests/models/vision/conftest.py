"""An encoder of each kind."""

import pytest

from jaxrel.models.vision import encoder_from_tensors
from tests.zoo.encoders import TINY, tensors_of


@pytest.fixture(scope="module")
def loaded():
    """A model of each kind, with random weights."""
    return {name: encoder_from_tensors(TINY[name], tensors_of(name)) for name in TINY}
