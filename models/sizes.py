"""How the sizes of all models are checked, written to a config.json and read from it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxrel.models.checkpoint import CONFIG


def is_size(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def check_numbers(part: str, config: Any, names: Iterable[str]) -> None:
    """Raise ValueError if one of these fields is no finite number; arguments as `check_sizes`."""
    for name in names:
        if not is_number(value := getattr(config, name)):
            raise ValueError(f"{part}: {name} must be a number, got {value!r:.80}")


def check_sizes(part: str, config: Any, names: Iterable[str]) -> None:
    """Raise ValueError if one of these fields is no positive integer.

    Args:
      part: the part of the model that the sizes are of, for the message.
      config: what has the fields.
      names: names of the fields.
    """
    for name in names:
        value = getattr(config, name)
        if not is_size(value):
            raise ValueError(f"{part}: {name} must be a positive integer, got {value!r:.80}")


def check_heads(part: str, name: str, width: int, heads: int) -> None:
    """Raise ValueError if the heads do not divide the width, which the config calls `name`."""
    if width % heads:
        raise ValueError(f"{part}: {name} {width} is not a multiple of its {heads} heads")


def check_choice(part: str, name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError if the value of a field is not among those that are known."""
    if value not in tuple(known):  # which a list or an object may be compared with
        raise ValueError(f"{part}: {name} must be one of {', '.join(known)}, got {value!r:.80}")


def check_keys(what: str, found: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError if a section of a config.json lacks a key or has an unknown one."""
    found, known = set(found), set(known)
    if found != known:
        raise ValueError(
            f"{CONFIG}: {what} must hold {', '.join(sorted(known))}; missing or unknown: "
            f"{', '.join(sorted(found ^ known))}"
        )


_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def check_types(what: str, kind: Any, section: Mapping[str, Any]) -> None:
    """Raise ValueError if a value of a section has another type than the default of its field.

    Args:
      what: the section of the config.json, for the message.
      kind: a class of a config; fields whose default is no number, name or truth are not checked.
      section: values by field.
    """
    for field in dataclasses.fields(kind):
        wanted, value = type(field.default), section.get(field.name)
        if field.name not in section or wanted not in _TYPES:
            continue
        if type(value) is not wanted and not (wanted is float and is_number(value)):
            raise ValueError(
                f"{CONFIG}: {what}.{field.name} must be {_TYPES[wanted]}, got {value!r:.80}"
            )


def field_names(config: Any, *, without: Iterable[str] = ()) -> list[str]:
    """Return the names of a config's fields, of a class or an instance."""
    return [field.name for field in dataclasses.fields(config) if field.name not in without]


def to_json(config: Any, *, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return a config's fields for a config.json, with lists where they have tuples."""
    return {name: _lists(getattr(config, name)) for name in field_names(config, without=without)}


def from_json(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `to_json` wrote, with tuples where JSON has lists."""
    return {name: _tuples(value) for name, value in section.items()}


def _lists(value: Any) -> Any:
    return list(map(_lists, value)) if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
