"""How much of a model's attention a relevance follows: coverage is part of the result."""

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxrel.attention.maps import as_indices, indices, is_mask
from jaxrel.attention.methods import Method
from jaxrel.attention.stacks import Site, Stack


class Coverage(NamedTuple):
    """The layers of attention that a relevance follows, of all that a function has.

    Attributes:
      followed: how many layers' maps it is made of.
      layers: how many layers of attention there are; None if that cannot be told, as of a function
        that tags its maps and has others in a form that is not recognised.
      left_out: what is not followed, with its kind, its sizes and its source line.
    """

    followed: Any
    layers: int | None
    left_out: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """From 0 to 1; 1 where there is no attention at all, None if it cannot be told."""
        if self.layers is None:
            return None
        return self.followed / self.layers if self.layers else 1.0

    def __str__(self):
        rest = f"; left out: {'; '.join(self.left_out)}" if self.left_out else ""
        total = "an unknown number of" if self.layers is None else self.layers
        return f"{self.followed} of {total} layers of attention{rest}"


def of_stacks(
    method: Method,
    chosen: Sequence[Stack],
    found: Iterable[Stack],
    layers: Any,
    pooled: Mapping[str, Site] = types.MappingProxyType({}),
) -> Coverage:
    """What a method follows of a function's stacks.

    Args:
      method: a row of `methods.TABLE`.
      chosen: the stacks that are explained.
      found: all stacks of the function.
      layers: which layers are accumulated, as of `relevance`.
      pooled: by the names of stacks whose tokens an attention pools, its map.
    """
    names = {*(stack.name for stack in chosen), *(site.name for site in pooled.values())}
    others = [stack for stack in found if stack.name not in names]
    followed: Any = len(pooled)
    left_out = []
    for stack in chosen:
        some = layers[stack.name] if isinstance(layers, Mapping) else layers
        count = 1 if method.layers == "last" else _count(some, stack)
        if method.layers == "last" and some is None and stack.name in pooled:
            count = 0  # the pooling is the last layer
        followed += count
        if isinstance(count, int) and count < stack.layers:
            left_out.append(f"{stack.layers - count} layers of {stack}")
    total = len(pooled) + sum(stack.layers for stack in (*chosen, *others))
    return Coverage(followed, total, (*left_out, *map(str, others)))


def _count(layers: Any, stack: Stack) -> Any:
    """How many layers a choice names, by indices or by a bool array, which may be traced."""
    if is_mask(layers):
        return layers.sum() if isinstance(layers, jax.core.Tracer) else int(layers.sum())
    return len(indices(as_indices(layers, "layers"), stack.layers, "layers"))


def of_streams(method: Method, kinds: Sequence[str], left_out: Sequence[Site] | None) -> Coverage:
    """What a bimodal method follows of two streams.

    Args:
      method: a row of `methods.TABLE`.
      kinds: of every layer, "ss", "sq", "qq" or "qs".
      left_out: other attention that the function has; None if that cannot be told.
    """
    followed = len(kinds)
    if method.layers == "last":
        followed = len({"ss", "sq"} & {*kinds})
    elif method.name in ("rollout", "transformer_attribution"):
        # Each stream by itself, joined by the last attention from s to q.
        followed = sum(kind in ("ss", "qq") for kind in kinds) + ("sq" in kinds)
    names = [f"attention at {site.where}" for site in left_out or ()]
    if followed < len(kinds):
        names.insert(0, f"{len(kinds) - followed} layers that {method.name} does not read")
    if left_out is None:
        return Coverage(followed, None, tuple(names))
    rest = sum(Stack("", (site,)).layers for site in left_out)
    return Coverage(followed, len(kinds) + rest, tuple(names))
