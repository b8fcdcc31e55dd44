"""Models of other packages, unmodified; `.ci/run` has an environment with all of them."""

import pytest

from jaxrel import attention
from tests.zoo.packages import load, missing
from tests.zoo.packages.checks import CHECKS, Case, applies, tolerance
from tests.zoo.packages.table import layers_found, methods

ABSENT = missing()
EXHIBITS = {} if ABSENT else load()
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),  # the packages' own
    pytest.mark.skipif(bool(ABSENT), reason=f"the zoo needs {', '.join(ABSENT)}"),
]


def test_the_zoo_is_large():
    assert len(EXHIBITS) >= 15


@pytest.mark.parametrize("name", EXHIBITS)
def test_model(name):
    exhibit = EXHIBITS[name]
    with exhibit.world():
        case = Case(exhibit)
        checks = [check for check in CHECKS if applies(exhibit, check)]
        found = {check: CHECKS[check](case) for check in checks}
        wrong = {c: f for c, f in found.items() if not f <= tolerance(exhibit, c)}
        assert not wrong, found
        if exhibit.attention is not None:
            known = exhibit.attention
            assert layers_found(case) == known.layers + known.others
            assert tuple(methods(case)) == attention.METHODS
