"""The embedded engine: one machine, threads that read ahead, one compiled program."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    done = folder.rows - sum(b - a for a, b in map(folder.inputs, missing))
    errors = 0
    bar = tqdm(total=folder.rows, initial=done, unit="row", disable=not missing)
    with bar, ThreadPoolExecutor(threads) as pool:
        ahead = _ahead(
            pool, explainer.prepare, _batches(explainer, source, folder, missing), threads
        )
        for shard in missing:
            parts, start, stop = [], *folder.inputs(shard)
            while start < stop:
                loaded = next(ahead)
                found, columns = explainer.results(loaded)
                if draw is not None:
                    draw(found, loaded, start)
                parts.append(columns)
                start += len(loaded.rows)
                bar.update(len(loaded.rows))
            whole = stacked(parts)
            folder.write(shard, whole, precision=precision)
            errors += sum(error is not None for error in whole["error"])
    return errors


def _batches(
    explainer: Explainer, source: Source, folder: Folder, shards: Iterable[int]
) -> Iterator[list]:
    """The rows of these shards in batches; none is of two shards."""
    for shard in shards:
        yield from explainer.split(source.read(*folder.inputs(shard)))


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
