"""What the settings of all recipes share: one field per command-line option, and their checks."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from jaxrel.train.loop.train import read_settings

# What a number may be, in the words of the message that refuses another.
_RANGES: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda x: x >= 1,
    "0 or more": lambda x: 0 <= x < math.inf,
    "positive": lambda x: 0 < x < math.inf,
    "positive (inf: no bound)": lambda x: x > 0,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "from 0 to below 1": lambda x: 0 <= x < 1,
}


def setting(default: Any, meaning: str, allowed: str | tuple[Any, ...] = "") -> Any:
    """A field of settings.

    Args:
      default: its value.
      meaning: help text of the command-line option.
      allowed: a range, such as "at least 1", or all values; "" allows any.
    """
    return dataclasses.field(default=default, metadata={"help": meaning, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all recipes have in common.

    A subclass that gives a field another default keeps the field's help text and range:
    `steps: int = 3_500`.

    Raises:
      ValueError: a setting is out of range.
    """

    # The fewest tokens that hold the texts of Shapes, and what the longest of them are.
    least_context: ClassVar[tuple[int, str]] = (0, "")

    seed: int = setting(0, "seed of the parameters, of what is drawn and of the order of examples")
    steps: int = setting(3_000, "number of optimiser steps", "at least 1")
    batch: int = setting(32, "images per step", "at least 1")
    learning_rate: float = setting(
        1e-3, "highest learning rate; it falls to 0 as a cosine", "positive"
    )
    warmup: int = setting(100, "steps until the highest learning rate", "0 or more")
    log_every: int = setting(50, "steps between two lines of the log", "at least 1")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        inherited = [base for base in cls.__mro__[:0:-1] if dataclasses.is_dataclass(base)]
        for old in (field for base in inherited for field in dataclasses.fields(base)):
            new = vars(cls).get(old.name, old)
            if not isinstance(new, dataclasses.Field):
                setattr(cls, old.name, dataclasses.field(default=new, metadata=old.metadata))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), field.metadata["allowed"])
        values = dataclasses.asdict(self)
        for name, whole in (("checkpoint_every", "log_every"), ("batch", "accumulate")):
            if values.get(name, 0) % values.get(whole, 1):
                raise ValueError(
                    f"{name} must be a multiple of {whole} {values[whole]}, got {values[name]}"
                )
        if self.batch > values.get("scenes", math.inf):
            raise ValueError(f"batch {self.batch} is more than the {values['scenes']} scenes")
        least, texts = self.least_context
        if least and values["context"] < least:
            raise ValueError(
                f"context must be at least {least} for the longest {texts} of Shapes, got "
                f"{values['context']}"
            )
        if not values.get("data", "none is needed"):
            raise ValueError("data is empty; name the folder of the data set with --data")


def _check(name: str, value: Any, allowed: str | tuple[Any, ...]) -> None:
    if isinstance(allowed, tuple) and value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    if isinstance(allowed, str) and allowed and not _RANGES[allowed](value):
        raise ValueError(f"{name} must be {allowed}, got {value}")


@dataclasses.dataclass(frozen=True)
class Training(Settings):
    """What all recipes have in common that train with `jaxrel.train.loop`."""

    accumulate: int = setting(
        1, "parts of the batch, computed one after the other to save memory", "at least 1"
    )
    dtype: str = setting(
        "float32", "precision of the computation: float32 or bfloat16", ("float32", "bfloat16")
    )
    checkpoint_every: int = setting(250, "steps between two checkpoints", "at least 1")

    def optimiser(self) -> dict[str, Any]:
        """Options of `jaxrel.train.loop.optimiser.adamw`."""
        return {}


@dataclasses.dataclass(frozen=True)
class OnShapes:
    """The settings of recipes on Shapes."""

    data_seed: int = setting(0, "seed of the Shapes data set")
    scenes: int = setting(50_000, "training scenes, drawn once and kept in memory", "at least 1")


@dataclasses.dataclass(frozen=True)
class OnImages:
    """The settings of recipes on a data set of photographs."""

    data: str = setting("", "folder of the data set, as downloaded and unpacked")
    split: str = setting("train", "split to train on")
    missing: str = setting(
        "error", "what to do with missing images: error or skip", ("error", "skip")
    )
    corrupt: str = setting(
        "error", "what to do with damaged images: error or skip", ("error", "skip")
    )
    workers: int = setting(8, "processes that read images; 0 reads in threads")


def write_card(template: str, folder: Path, default: Any, **found: Any) -> str:
    """A model card: a template with the settings, `flags` (those that were changed), and findings.

    Args:
      template: for `str.format`.
      folder: as the recipe wrote it.
      default: the recipe's default settings.
      **found: what else the template names.

    Raises:
      FileNotFoundError: the folder has no settings.json.
    """
    settings = read_settings(folder)
    return template.format(**settings | {"flags": changed_flags(default, settings)} | found)


def changed_flags(default: Any, settings: dict[str, Any]) -> str:
    """The command-line options that turn the default settings into these."""
    usual = dataclasses.asdict(default)
    changed = {name: value for name, value in settings.items() if value != usual.get(name)}
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
