"""Old names of modules, functions and arguments: they work for one version, and warn."""

import functools
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


def renamed_keywords(**names: str) -> Callable[[Callable], Callable]:
    """A decorator of functions some of whose keyword arguments have a new name.

    Args:
      **names: by old name, the new one.

    Returns:
      The decorator. The function it returns passes an old keyword on under the new name and
      warns. It raises TypeError where both are given.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def accepting(*args: Any, **keywords: Any) -> Any:
            for old in names.keys() & keywords.keys():
                new = names[old]
                if new in keywords:
                    raise TypeError(f"{function.__name__}: {old} is now {new}; give only {new}")
                text = f"{function.__name__}: the argument {old} is now {new}"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return accepting

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """A property of a class with the old name of an attribute or a method: it warns."""

    def find(self: Any) -> Any:
        name = type(self).__name__
        warnings.warn(f"{name}.{old} is now {name}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    return property(find, doc=f"The old name of `{new}`, for one version.")
