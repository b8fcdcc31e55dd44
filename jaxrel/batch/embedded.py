"""The embedded engine: one machine, threads that read ahead, one compiled program."""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm.auto import tqdm

from jaxrel.batch.explainer import Explainer, Loaded
from jaxrel.batch.folder import Folder
from jaxrel.batch.sources import Source
from jaxrel.explanations.result import Explanation
from jaxrel.explanations.tables import stacked

# What is drawn of a batch: explanations by method, and the number of its first row.
Draw = Callable[[Sequence[Explanation], Loaded, int], None]


def run(
    explainer: Explainer,
    source: Source,
    folder: Folder,
    *,
    precision: str = "float32",
    threads: int = 2,
    draw: Draw | None = None,
) -> int:
    """Explain the rows of a source that a folder lacks.

    Args:
      explainer: what explains them.
      source: the rows.
      folder: where to; it is open.
      precision: of the image's relevance in the files, "float32" or "float16".
      threads: how many read and prepare images while the device works.
      draw: called with every batch.

    Returns:
      How many rows have an error, of those explained now.

    Raises:
      OSError: the results cannot be written.
    """
    missing = folder.missing()
    done = folder.rows - sum(stop - start for start, stop in map(folder.inputs, missing))
    with tqdm(total=folder.rows, initial=done, unit="row", disable=not missing) as bar:
        shard = functools.partial(
            explain_shard,
            explainer,
            source,
            folder,
            precision=precision,
            threads=threads,
            draw=draw,
            advance=bar.update,
        )
        return sum(map(shard, missing))


def explain_shard(
    explainer: Explainer,
    source: Source,
    folder: Folder,
    shard: int,
    *,
    precision: str = "float32",
    threads: int = 2,
    draw: Draw | None = None,
    advance: Callable[[int], Any] = int,
) -> int:
    """Explain the rows of one shard and write it; returns how many have an error.

    Args:
      explainer, source, folder, precision, threads, draw: as of `run`.
      shard: its number.
      advance: called with the number of rows of every batch.
    """
    start, stop = folder.inputs(shard)
    parts = []
    with ThreadPoolExecutor(threads) as pool:
        batches = explainer.split(source.read(start, stop))
        for loaded in _ahead(pool, explainer.prepare, batches, threads):
            found, columns = explainer.results(loaded)
            if draw is not None:
                draw(found, loaded, start)
            parts.append(columns)
            start += len(loaded.rows)
            advance(len(loaded.rows))
    whole = stacked(parts)
    folder.write(shard, whole, shapes=explainer.shapes, precision=precision)
    return sum(error is not None for error in whole["error"])


def _ahead(
    pool: ThreadPoolExecutor, prepare: Callable, batches: Iterator[Any], threads: int
) -> Iterator[Loaded]:
    """Prepared batches in order, some of them ahead."""
    waiting: collections.deque = collections.deque()
    for batch in batches:
        waiting.append(pool.submit(prepare, batch))
        if len(waiting) > threads + 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
