"""Old names: they work for one version, and warn."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`, which finds names that have moved.

    Args:
      module: its `__name__`.
      names: by old name, the new one with its module; `"*"` stands for all others, which keep
        their name.

    Returns:
      A function of an old name. It warns, naming the new one.
    """

    def find(name: str) -> Any:
        new = names.get(name) or (f"{names['*']}.{name}" if "*" in names else "")
        if not new or name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, attribute = new.rpartition(".")
        found = getattr(importlib.import_module(home), attribute)
        warnings.warn(f"{module}.{name} is now {new}", DeprecationWarning, stacklevel=2)
        return found

    return find
