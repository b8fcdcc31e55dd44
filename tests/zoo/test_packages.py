"""Models of other people's packages, unmodified: `python -m pytest -m zoo` in an environment with them."""

import functools

import jax
import pytest

from jaxrel import attention
from tests.zoo.packages import EXHIBITS
from tests.zoo.packages.checks import CHECKS, Case, tolerance
from tests.zoo.packages.table import methods

pytestmark = pytest.mark.zoo


@functools.cache
def case(name):
    with jax.enable_x64(EXHIBITS[name].dtype == "float64"):
        return Case(EXHIBITS[name])
