"""Models of other people's packages, by the name that `python -m tests.zoo` knows them by."""

import importlib
import importlib.util
import warnings

from tests.zoo.packages.exhibit import Exhibit

# The modules beside this one, and what each needs.
MODULES = {
    "with_equinox": ("eqx_zoo", "equimo"),
    "with_flax": ("flaxmodels", "mamba2_jax", "nanodl"),
    "with_haiku": ("haiku", "jraph"),
    "with_keras": ("keras",),
}


def missing() -> list[str]:
    """The packages that are not installed."""
    names = [name for needed in MODULES.values() for name in needed]
    return [name for name in names if importlib.util.find_spec(name) is None]


def load() -> dict[str, Exhibit]:
    """All exhibits, by package and name."""
    found: list[Exhibit] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages, about JAX's newer versions
        for module in MODULES:
            found += importlib.import_module(f"{__name__}.{module}").EXHIBITS
    return {f"{exhibit.package}: {exhibit.name}": exhibit for exhibit in found}
