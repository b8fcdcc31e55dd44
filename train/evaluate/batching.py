"""Batches of one size, since each size compiles a program of its own."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int
from tqdm.auto import trange


def equal_batches(
    count: int, batch: int, desc: str, *, leave: bool = True
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Numbers of examples, batch by batch; the last batch begins again with the first ones.

    Cut what the batches give to `count`.

    Args:
      count: how many examples.
      batch: how many at a time.
      desc: what is done, for the progress bar.
      leave: whether the bar stays.
    """
    for start in trange(0, count, batch, desc=desc, unit="batch", leave=leave):
        yield np.arange(start, start + batch) % count
