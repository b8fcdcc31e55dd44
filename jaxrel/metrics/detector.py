"""Telling words of captions that are likely hallucinated by their maps.

`jaxrel evaluate captioner` measures which statistic of a word's map tells words that are true of
the image from those that are not (`jaxrel.metrics.word_statistics`). A `Detector` keeps the
statistic and the threshold in the model's folder, with how well they did on held-out images, and
`jaxrel.explain` and `jaxrel explain --caption` flag words by it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxrel.files import write_atomically
from jaxrel.flags import Flag
from jaxrel.metrics.intervals import Interval
from jaxrel.metrics.word_statistics import check_statistic, map_statistic
from jaxrel.renamed import renamed_attribute

PROTOCOL = "hallucination/1"
FILE = "hallucination.json"


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A statistic of maps by one method that tells words, and how well it did on held-out words.

    Attributes:
      statistic: a name of `map_statistics`.
      threshold: a word with less is flagged.
      auc: the area under the ROC curve of true against hallucinated words.
      sensitivity: the share of true words that are not flagged.
      specificity: the share of hallucinated words that are flagged.
      precision: the share of flagged words that are hallucinated.
      images: how many images the held-out words are of.

    Raises:
      ValueError: an unknown statistic.
    """

    statistic: str
    threshold: float
    auc: Interval
    sensitivity: Interval
    specificity: Interval
    precision: Interval
    images: int

    def __post_init__(self) -> None:
        check_statistic(self.statistic)


@dataclasses.dataclass(frozen=True)
class WordGroup:
    """Words that are judged alike.

    Attributes:
      words: in all their forms; no others are judged.
      hallucinated: the share of all such words that were hallucinated where it was measured.
      methods: by the method whose maps are looked at.
    """

    words: tuple[str, ...]
    hallucinated: float
    methods: Mapping[str, Criterion]


@dataclasses.dataclass(frozen=True)
class Detector:
    """What tells hallucinated words of one captioner, by group of words and method.

    It holds for captions that the model writes itself, on images such as it was measured on.

    Attributes:
      weights: the `fingerprint` of the model that it was measured on.
      data: the name of the data set.
      split: of the data set; "" where there is none.
      images: how many: a half to choose statistics and thresholds on, the other to judge them.
      groups: by name.
    """

    weights: str
    data: str
    split: str
    images: int
    groups: Mapping[str, WordGroup]

    def flags(
        self,
        method: str,
        words: Sequence[str],
        maps: Float[Array | np.ndarray, "words height width"],
    ) -> tuple[Flag | None, ...]:
        """Judge words by their maps.

        Args:
          method: whose maps they are.
          words: of captions, as they are written.
          maps: a map per word, in the image's pixels (`jaxrel.explanations.words.in_pixels`).

        Returns:
          A flag per word, None for a word that this detector is not made for; empty if it is
          not made for the method or for any of the words.
        """
        found: list[Flag | None] = [None] * len(words)
        for group in self.groups.values():
            judged = [i for i, word in enumerate(words) if word in group.words]
            if judged and (criterion := group.methods.get(method)):
                values = np.asarray(map_statistic(maps, criterion.statistic))
                for i in judged:
                    found[i] = self._flag(words[i], float(values[i]), criterion, group)
        return tuple(found) if any(found) else ()

    def _flag(self, word: str, value: float, by: Criterion, group: WordGroup) -> Flag:
        mean, low, high = by.auc
        split = f", split {self.split}" if self.split else ""
        evidence = (
            f"{group.hallucinated:.0%} of all such words; AUC {mean:.2f} [{low:.2f}, {high:.2f}], "
            f"on {by.images} held-out images of {self.data}{split}"
        )
        return Flag(word, by.statistic, value, by.threshold, by.precision.mean, evidence)

    verdicts = renamed_attribute("verdicts", "flags")

    def to_dict(self) -> dict[str, Any]:
        """The content of a file, which `from_dict` reads."""
        return {"protocol": PROTOCOL, **_plain(self)}

    @classmethod
    def from_dict(cls, content: Any) -> "Detector":
        """Read what `to_dict` wrote.

        Raises:
          ValueError: another protocol, an entry that is missing, unknown or of a wrong type, or
            an unknown statistic.
        """
        found = content.get("protocol") if isinstance(content, dict) else None
        if found != PROTOCOL:
            raise ValueError(f"expected protocol {PROTOCOL!r}, got {found!r}")
        entries = _entries(cls, {k: x for k, x in content.items() if k != "protocol"})
        groups = {name: _group(one) for name, one in _object("groups", entries["groups"]).items()}
        return cls(**{**entries, "groups": groups})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write it into a model's folder, and return the file; one that is there is replaced.

        Raises:
          OSError: the file cannot be written there.
        """
        path = Path(folder) / FILE
        write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any) -> "Detector | None":
        """Read the detector of a model's folder; None where there is none.

        Args:
          folder: the folder.
          model: the model that was read from there.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is damaged, of another protocol, or was made for other weights.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return None
        try:
            detector = cls.from_dict(json.loads(path.read_bytes()))
            if (found := fingerprint(model)) != detector.weights:
                raise ValueError(
                    f"it was measured on a model with the weights {detector.weights}, and these "
                    f"are {found}"
                )
        except ValueError as error:
            raise ValueError(
                f"{path} does not tell which words this model hallucinates: {error}. Delete the "
                f"file, or measure again: jaxrel evaluate captioner --model {folder} --detector"
            ) from error
        return detector


def fingerprint(model: Any) -> str:
    """A short text that other parameters would not have; the same for a copy in float16."""
    digest = hashlib.sha256()
    for parameter in jax.tree.leaves(model):
        # What is beyond float16 becomes infinite, which a copy in float16 could not be.
        with np.errstate(over="ignore"):
            digest.update(np.asarray(parameter, np.float32).astype(np.float16).tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Dataclasses and intervals as what JSON holds."""
    if isinstance(value, Interval):
        return value._asdict()
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _group(content: Any) -> WordGroup:
    entries = _entries(WordGroup, content)
    words = entries["words"]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"words must be a list of words, got {words!r}")
    methods = _object("methods", entries["methods"])
    return WordGroup(
        tuple(words),
        entries["hallucinated"],
        {name: _criterion(one) for name, one in methods.items()},
    )


def _criterion(content: Any) -> Criterion:
    entries = _entries(Criterion, content)
    for field in dataclasses.fields(Criterion):
        if field.type is Interval:
            parts = _object(field.name, entries[field.name])
            if set(parts) != {*Interval._fields} or not all(map(_is_number, parts.values())):
                raise ValueError(
                    f"{field.name} must hold the numbers {', '.join(Interval._fields)}, got {parts}"
                )
            entries[field.name] = Interval(**parts)
    return Criterion(**entries)


def _entries(cls: Any, content: Any) -> dict[str, Any]:
    """The entries of an object, after a look at their names and at the types of plain ones."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    entries = _object(cls.__name__, content)
    if set(entries) != set(fields):
        raise ValueError(
            f"{cls.__name__} must hold {', '.join(fields)}; missing or unknown: "
            f"{', '.join(sorted(set(entries) ^ set(fields)))}"
        )
    for name, kind in fields.items():
        value = entries[name]
        if kind is float and not _is_number(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        if kind is float:
            entries[name] = float(value)
        if kind in (int, str) and type(value) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return entries


def _object(name: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be an object, got {content!r}")
    return dict(content)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value))
