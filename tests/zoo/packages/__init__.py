"""Models of other people's packages, by the name that `python -m tests.zoo` knows them by."""

import importlib

from tests.zoo.packages.exhibit import Exhibit

MODULES = ("with_haiku",)


def load() -> dict[str, Exhibit]:
    """All exhibits; what is not installed is an error."""
    found = [importlib.import_module(f"{__name__}.{module}").EXHIBITS for module in MODULES]
    return {exhibit.name: exhibit for exhibits in found for exhibit in exhibits}
