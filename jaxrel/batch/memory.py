"""How much memory a batch takes, by XLA's analysis of its program, and how much there is."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrel.batch.explainer import Explainer, Loaded
from jaxrel.explanations.explain import way

# Of what is free: the images that are read ahead and the results need some too.
_SHARE = 0.7
# What a machine gains from larger batches, and tries first.
_FIRST = {"cpu": 32}
_FIRST_ON_DEVICE = 256


class Fit(NamedTuple):
    """A size of batches, the bytes that one takes, and the bytes that are free; 0: not known."""

    batch_size: int
    needed: int
    free: int

    def __str__(self) -> str:
        size = f"batches of {self.batch_size}"
        if not self.needed:
            return size
        free = f" of {_readable(self.free)} that are free" if self.free else ""
        return f"{size}, which take {_readable(self.needed)}{free}"


def fit(explainer: Explainer, loaded: Loaded, batch_size: int | None = None) -> Fit:
    """The size of batches that fits into memory.

    Args:
      explainer: what explains them; its own size is not used.
      loaded: some prepared rows, whose shapes all others have.
      batch_size: the size that was asked for, which is only measured.

    Returns:
      The size: by default the largest that fits of 32, 16, ... on a CPU and of 256, 128, ... on
      an accelerator.
    """
    free = free_bytes()
    size = batch_size or _FIRST.get(jax.default_backend(), _FIRST_ON_DEVICE)
    needed = bytes_needed(explainer, loaded, size)
    while batch_size is None and size > 1 and free and needed > _SHARE * free:
        size //= 2
        needed = bytes_needed(explainer, loaded, size)
    return Fit(size, needed, free)


def bytes_needed(explainer: Explainer, loaded: Loaded, batch_size: int) -> int:
    """The bytes that the program for a batch of this size takes, model included."""
    if loaded.batch is None:
        return 0
    model, prepared = explainer.model, loaded.prepared
    rows = model.pairs(prepared, loaded.batch.target)

    def shapes(tree: Any) -> Any:
        def sized(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, *np.shape(x)[1:]), x.dtype)

        return jax.tree.map(sized, dict(tree))

    lowered = way(model).program(model, shapes(prepared), shapes(rows), explainer.request)
    found = lowered.compile().memory_analysis()
    if found is None:
        return 0
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(found, part) for part in parts)


def free_bytes() -> int:
    """The memory that is free: of the first device, or of the machine; 0 where it is not known."""
    (device, *_) = jax.local_devices()
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pages = "SC_AVPHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in os.sysconf_names else 0


def _readable(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
