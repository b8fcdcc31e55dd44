"""What is explained, example by example: images, texts and targets in batches of one size.

A program is compiled for each size of a batch. So the last batch is filled up with repetitions of
its last example, and lists of any length go through the same program.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

# Where no size is asked for: batches of so many, and short lists in the next power of two.
USUAL_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some examples: as `model.prepare` and `model.pairs` take them.

    The first `count` are asked for, and `start` is the number of the first; the others fill up.
    """

    start: int
    count: int
    image: Any
    text: Any
    target: Any
    against: Any = None


def by_example(model: Any, image: Any, text: Any, target: Any) -> Mapping[str, Any]:
    """Images, texts and targets: as lists, with an entry per example, or one thing for all.

    The model says how they go together (`model.examples`, which checks them too). One that does
    not is given image i with text i, and one image (or text) with all texts (or images); as many
    targets as examples are one for each.

    Raises:
      ValueError: the numbers do not fit.
    """
    if hasattr(model, "examples"):
        return model.examples(image=image, text=text, target=target)
    images, texts = (list(x) if isinstance(x, list | tuple) else [x] for x in (image, text))
    count = max(len(images), len(texts))
    if {len(images), len(texts)} - {1, count}:
        raise ValueError(
            f"{len(images)} images and {len(texts)} texts make no pairs: give as many images as "
            "texts, one image, or one text"
        )
    if isinstance(target, list) and len(target) != count:
        target = tuple(target)
    whole = {"image": images, "text": texts}
    lists = {name: x * count if len(x) == 1 else x for name, x in whole.items()}
    return lists | {"text": None if text is None else lists["text"], "target": target}


def size_of_batches(count: int, batch_size: int | None) -> int:
    """The size of the batches that so many examples are explained in.

    Raises:
      ValueError: a size below 1.
    """
    if batch_size is not None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        return batch_size
    return min(USUAL_SIZE, 1 << max(count - 1, 0).bit_length())


def count_of(examples: Mapping[str, Any]) -> int:
    """The number of examples that `by_example` found."""
    return max((len(x) for x in examples.values() if isinstance(x, list)), default=1)


def batches(examples: Mapping[str, Any], size: int) -> Iterator[Batch]:
    """The examples in batches of one size, the last one filled up."""
    whole = count_of(examples)
    for start in range(0, whole, size):
        count = min(size, whole - start)
        part = {
            name: _filled(x[start : start + count], size) if isinstance(x, list) else x
            for name, x in examples.items()
        }
        yield Batch(start, count, **part)


def _filled(entries: list, size: int) -> list:
    return entries + entries[-1:] * (size - len(entries))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A model's inputs, one row per example to explain: `count` of them, and others to fill up."""

    inputs: dict[str, Any]
    count: int

    @property
    def asked(self) -> np.ndarray:
        """Which rows are asked for, bool [rows]."""
        rows = len(next(iter(self.inputs.values())))
        return np.arange(rows) < self.count


def rows_of(inputs: Mapping[str, Any], count: int, size: int) -> Iterator[Rows]:
    """The rows of the first `count` examples, in batches of one size.

    Args:
      inputs: as `model.pairs` returns them; the rows of an example follow those of the one
        before.
      count: how many examples are asked for.
      size: rows of a batch.
    """
    if "example" in inputs:
        count = int((np.asarray(inputs["example"]) < count).sum())
    rows = len(next(iter(inputs.values())))
    if rows == size:
        yield Rows(dict(inputs), count)
        return
    host = jax.device_get(dict(inputs))
    for start in range(0, count, size):
        part = min(size, count - start)
        chosen = np.minimum(np.arange(start, start + size), start + part - 1)
        yield Rows({name: np.asarray(x)[chosen] for name, x in host.items()}, part)
