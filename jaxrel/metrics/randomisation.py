"""Sanity check by parameter randomisation (Adebayo et al. 2018, "Sanity Checks for Saliency Maps").

An explanation of what a model learned must change when the model forgets it. Parameters are
randomised group by group from the output to the input, and the maps compared with the first:

    groups = {"head": ["head"], "layer 3": ["encoder/layers[3]"], "layer 2": ["encoder/layers[2]"]}
    randomised = cascade(params, groups, jax.random.key(0))
    agreement(maps(params), ((name, maps(one)) for name, one in randomised))

where `maps(params)` returns a dict of maps by method.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from jaxrel.metrics.intervals import Interval, bootstrap

# A leaf of the parameters: its number in the tree, and an entry of its leading axis or all.
Part = tuple[int, int | None]

# Shapes that differ are told apart here so that they meet our own error.
Maps = Float[Array | np.ndarray, "batch tokens"]
OtherMaps = Float[Array | np.ndarray, "others positions"]
Valid = Bool[Array | np.ndarray, "examples places"]


def cascade(
    params: PyTree, groups: Mapping[str, Sequence[str]], key: PRNGKeyArray
) -> Iterator[tuple[str, PyTree]]:
    """Randomise parameters group by group, each on top of those before it.

    A tensor is randomised by shuffling its own values. It keeps their distribution, and so the
    scale of what the model computes, and no initialiser need be known; a tensor whose values are
    all equal (fresh biases, for one) stays as it is.

    Args:
      params: a pytree of parameters. Leaves that are not floating (counters, keys) never change.
      groups: by name, from the output to the input, the paths of the parameters in it: a leaf's
        path, or that of a branch, with "/" between names ("vision/head"). "encoder/layers[3]"
        means entry 3 of the leading axis of every leaf below encoder/layers, for layers that
        are stacked.
      key: of the shuffling; each tensor of each group has a key of its own.

    Returns:
      An iterator of (name of the group, parameters with this and all earlier groups shuffled).

    Raises:
      ValueError: no groups, a group without paths, a path that no floating parameter has, or an
        entry that does not exist. It is raised by the call, not by the iterator.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): i
        for i, (path, _) in enumerate(leaves)
    }
    values = [leaf for _, leaf in leaves]
    floating = {path: i for path, i in named.items() if _is_floating(values[i])}
    if not groups or not all(groups.values()):
        raise ValueError(f"cascade: expected paths of parameters by group, got {dict(groups)}")
    parts = {
        name: [
            part
            for path in ([paths] if isinstance(paths, str) else paths)
            for part in _find(name, path, floating, values)
        ]
        for name, paths in groups.items()
    }

    def steps() -> Iterator[tuple[str, PyTree]]:
        current = list(values)
        for number, (name, chosen) in enumerate(parts.items()):
            group_key = jax.random.fold_in(key, number)
            for part_key, (i, entry) in zip(
                jax.random.split(group_key, len(chosen)), chosen, strict=True
            ):
                current[i] = _shuffle(part_key, jnp.asarray(current[i]), entry)
            yield name, jax.tree.unflatten(tree, current)

    return steps()


def rank_correlation(
    a: Maps, b: OtherMaps, *, valid: Valid | None = None
) -> Float[Array, " batch"]:
    """Spearman's rank correlation of two maps over the tokens of each example.

    Pearson's correlation of the ranks; equal values share the mean of their ranks. A map that is
    constant has no order to agree with, and its correlation is 0. So a method that always
    returns constant maps scores like one that reacts to the parameters: look at the maps too.

    Args:
      a: maps; give absolute values to compare magnitudes only.
      b: maps of the same examples.
      valid: False for tokens to leave out, such as padding, whose equal zeros would count as
        agreement; None for all tokens.

    Returns:
      From -1 to 1, in float32 (float64 for float64 maps). Under `jax.jit`, NaN for maps that
      are not finite.

    Raises:
      ValueError: the shapes differ, or values are not finite.
    """
    shapes = [list(one.shape) for one in (a, b, valid) if one is not None]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"rank_correlation: maps of {shapes[0]} and {shapes[1]}"
            + (f", valid of {shapes[2]}" if shapes[2:] else "")
            + "; give [batch, tokens] of the same tokens"
        )
    counted = jnp.ones(a.shape, bool) if valid is None else jnp.asarray(valid)
    found, finite = _spearman(jnp.asarray(a), jnp.asarray(b), counted)
    if not isinstance(finite, jax.core.Tracer) and not finite.all():
        raise ValueError(
            f"rank_correlation: {int((~finite).sum())} of {len(finite)} pairs of maps are not "
            f"finite, first at example {int(finite.argmin())}"
        )
    return found


def agreement(
    original: Mapping[str, Maps],
    randomised: Iterable[tuple[str, Mapping[str, Maps]]],
    *,
    valid: Valid | None = None,
) -> dict[str, dict[str, Interval]]:
    """How far maps of randomised parameters still agree with the maps of the model.

    Args:
      original: maps by method.
      randomised: (group, maps by method) as the cascade goes; consumed one by one, so that
        maps may be computed on the way.
      valid: as in `rank_correlation`.

    Returns:
      {group: {method: mean rank correlation with its bootstrap 95% interval over examples}}.

    Raises:
      ValueError: a group's methods are not those of `original`, or as `rank_correlation`.
    """
    table = {}
    for group, maps in randomised:
        if set(maps) != set(original):
            raise ValueError(
                f"agreement: group {group!r} has maps of {', '.join(sorted(maps))}, the original "
                f"of {', '.join(sorted(original))}; give the same methods"
            )
        table[group] = {
            method: bootstrap(np.asarray(rank_correlation(one, maps[method], valid=valid)))
            for method, one in original.items()
        }
    return table


def smoothed(
    explain: Callable[[Array], Array], key: PRNGKeyArray, *, noise: float = 0.15, samples: int = 50
) -> Callable[[Array], Array]:
    """An explanation as the mean over noisy inputs, whose randomisation test is less noisy.

    The smooth form of the test (Hedström et al. 2023, "Sanity Checks Revisited", sMPRT): smooth
    the maps before and after `cascade`, with the same key, and compare them as ever.

    Args:
      explain: from inputs `[batch, ...]` to maps.
      key: of the noise.
      noise: its standard deviation, as a share of each example's range of values.
      samples: how many noisy inputs.

    Returns:
      A function of the same kind.

    Raises:
      ValueError: fewer than one sample.
    """
    if samples < 1:
        raise ValueError(f"smoothed: samples must be at least 1, got {samples}")

    def explained(x):
        axes = tuple(range(1, x.ndim))
        spread = noise * (x.max(axes, keepdims=True) - x.min(axes, keepdims=True))

        def one(total, key):
            return total + explain(x + spread * jax.random.normal(key, x.shape, x.dtype)), None

        out = jax.eval_shape(explain, x)
        start = jnp.zeros(out.shape, out.dtype)
        return jax.lax.scan(one, start, jax.random.split(key, samples))[0] / samples

    return explained


def entropy(maps: Maps, *, bins: int = 100) -> Float[Array, " batch"]:
    """The entropy of the distribution of a map's values, in nats, by a histogram over its range."""
    x = jnp.asarray(maps)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    place = jnp.floor((x - low) / jnp.where(high == low, 1, high - low) * bins)
    which = jnp.minimum(place, bins - 1).astype(jnp.int32)
    share = jax.nn.one_hot(which, bins, dtype=x.dtype).mean(-2)
    return jax.scipy.special.entr(share).sum(-1)


def complexity_rise(
    before: Maps, after: OtherMaps, *, bins: int = 100
) -> Float[Array, " examples"]:
    """How much more complex maps become where all parameters are randomised, as a share.

    The efficient form of the test (Hedström et al. 2023, eMPRT): `(e(after) - e(before)) /
    e(before)` with `entropy` for e. It needs one randomised model in the place of one per layer,
    and no similarity of maps. What reacts to the parameters rises.

    Args:
      before: maps of the model.
      after: maps of the last step of `cascade`.
      bins: of the histograms.

    Returns:
      0 where both have no entropy; higher is better.

    Raises:
      ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"complexity_rise: maps of {list(before.shape)} and {list(after.shape)}; give maps of "
            "the same examples"
        )
    old, new = entropy(before, bins=bins), entropy(after, bins=bins)
    return jnp.where(old == new, 0, (new - old) / old)


@jax.jit
def _spearman(a: Array, b: Array, counted: Array) -> tuple[Array, Array]:
    """The correlation, and whether the maps are finite."""
    x, y = _centred_ranks(a, counted), _centred_ranks(b, counted)
    both = jnp.sqrt((x**2).sum(-1)) * jnp.sqrt((y**2).sum(-1))
    found = jnp.clip((x * y).sum(-1) / jnp.where(both > 0, both, 1), -1, 1)
    finite = ((jnp.isfinite(a) & jnp.isfinite(b)) | ~counted).all(-1)
    return jnp.where(finite, found, jnp.nan), finite


def _centred_ranks(
    x: Float[Array, "batch tokens"], counted: Bool[Array, "batch tokens"]
) -> Float[Array, "batch tokens"]:
    """Ranks less the mean rank, ties at the mean of theirs; 0 where not counted."""
    ordered = jnp.sort(jnp.where(counted, x, jnp.inf), axis=-1)
    below, up_to = (
        jax.vmap(lambda row, of, side=side: jnp.searchsorted(row, of, side=side))(ordered, x)
        for side in ("left", "right")
    )
    # Twice the rank counted from 0, less twice the mean of the ranks 0 .. n-1: whole numbers.
    twice = below + up_to - counted.sum(-1, keepdims=True)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.where(counted, twice.astype(dtype) / 2, 0)


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _shuffle(key: PRNGKeyArray, x: Array, entry: int | None) -> Array:
    if entry is not None:
        return x.at[entry].set(_shuffle(key, x[entry], None))
    return jax.random.permutation(key, x.ravel()).reshape(x.shape)


def _find(group: str, asked: str, paths: Mapping[str, int], values: Sequence[Any]) -> list[Part]:
    """The parameters that a path of a group means."""
    stacked = re.fullmatch(r"(.*)\[(\d+)\]", asked)
    path, entry = (stacked[1], int(stacked[2])) if stacked else (asked, None)
    found = [i for name, i in paths.items() if path and _below(name, path)]
    if not found:
        raise ValueError(
            f"cascade: group {group!r}: no floating parameter at {asked!r}; there are "
            f"{', '.join(_nearest(path, paths))}"
        )
    for i in found:
        shape = values[i].shape
        if entry is not None and entry >= (shape[0] if shape else 0):
            raise ValueError(
                f"cascade: group {group!r}: {asked!r} asks for entry {entry} of the leading axis "
                f"of parameters, one of which has shape {list(shape)}"
            )
    return [(i, entry) for i in found]


def _below(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}/")


def _nearest(path: str, names: Iterable[str]) -> list[str]:
    """What exists beside the first part of a path that does not exist."""
    parts = path.split("/")
    for depth in reversed(range(len(parts))):
        parent = "/".join(parts[:depth])
        if beside := {
            "/".join(name.split("/")[: depth + 1])
            for name in names
            if _below(name, parent) and name != parent
        }:
            return sorted(beside)
    return ["none at all"]
