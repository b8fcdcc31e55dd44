"""From examples to batches: a Grain pipeline in a fixed order, whose place can be saved."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import absl.flags
import grain
import jax
import numpy as np

# A batch or two in advance hides the reading behind the step; more would only fill the memory.
READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

Example = dict[str, Any]
T = TypeVar("T")


@runtime_checkable
class Source(Protocol):
    """Examples by index: each a dict of arrays that have one shape and dtype in all examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def batches(
    source: Source,
    *,
    batch: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    drop_remainder: bool = True,
    shard: tuple[int, int] | None = None,
    transform: Callable[[Example], Example] | None = None,
    workers: int = 0,
) -> grain.IterDataset:
    """Batches of a source, for `jaxrel.train.loop.fit` or for an evaluation.

    The order depends on `seed` alone: every epoch is another permutation of all examples, and
    the shards of one step together hold the same examples however many there are. With
    `drop_remainder` an epoch ends with its last full batch.

    Args:
      source: `len(source)` examples, `source[i]` a dict of NumPy arrays. An entry "id" names
        the example in messages of `fit`.
      batch: examples per step, in all shards together.
      seed: of the order, from 0 to 2**32 - 1.
      shuffle: False keeps the order of the source.
      repeat: False ends after one pass, for evaluations.
      drop_remainder: False also gives the last, smaller batch of an epoch; jit compiles
        again for it.
      shard: (index, count) of this process; by default `jax.process_index()` and
        `jax.process_count()`.
      transform: applied to each example, in the thread or process that reads it.
      workers: processes that read; 0 reads in two threads of this process, which is right for
        examples in memory. With workers, source and transform are pickled.

    Returns:
      `iter()` of it gives dicts of arrays [batch / count, ...], and has `get_state` and
      `set_state`.

    Raises:
      ValueError: the batch is larger than the source or does not divide by the shards; the
        source is empty; the shard, the seed or the number of workers is out of range.
    """
    index, count = shard or (jax.process_index(), jax.process_count())
    examples = len(source)
    if not 0 <= index < count:
        raise ValueError(f"shard must be (index, count) with 0 <= index < count, got {shard}")
    if batch < 1 or batch % count:
        raise ValueError(
            f"batch must be a positive multiple of the {count} shards (processes), got {batch}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if not examples or (drop_remainder and examples < batch):
        raise ValueError(
            f"the source has {examples} examples, fewer than one batch of {batch}; give more "
            "examples, a smaller batch or drop_remainder=False"
            if examples
            else f"the source is empty: {type(source).__name__} has no examples"
        )
    data = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        data = data.shuffle()
    used = examples - examples % batch if drop_remainder else examples
    # Sharding follows shuffling: the shards of a step are a batch of the one common order.
    data = data[:used][index::count]
    if transform is not None:
        data = data.map(transform)
    data = data.batch(batch // count, drop_remainder=drop_remainder)
    if repeat:
        data = data.repeat()
    stream = data.to_iter_dataset(READING)
    if workers:
        # Grain's workers look at absl's flags, which only programs of absl's own kind parse.
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return stream


class Arrays:
    """A source whose examples are the rows of arrays in memory, with their index as "id".

    Args:
      arrays: by name, all with the same first axis.

    Raises:
      ValueError: there is no array, or the first axes differ.
    """

    def __init__(self, **arrays: np.ndarray) -> None:
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays must have one common length, got {lengths}")
        self._arrays = arrays
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return {"id": np.int64(index), **{name: a[index] for name, a in self._arrays.items()}}
