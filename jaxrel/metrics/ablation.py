"""Does a caption depend on what its explanation names? Ablation of patches and of words.

After Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning for image captioning
models". Patches: the most relevant patches of the image are set to its mean colour, a new
caption is made, and the word's probability in it compared. Words: the most relevant words are
removed from the prefix, and the next word's probability compared. Each word is explained by a
map of its own. Nothing here knows a model: it gives the inputs to run, and sums up the drops in
probability, p(before) - p(after).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrel.metrics.correctness import check_maps
from jaxrel.metrics.intervals import group_sums, percentiles, times_drawn

# The paper's settings, for images of 224 x 224: 20 of 28 x 28 patches go, and 3 of the words
# that come before a word; words that have fewer than 6 before them are not asked about.
PATCH, PATCHES = 8, 20
WORDS, FIRST_WORD = 3, 6

MEASURES = ("disappeared", "share_there", "drop_there", "share_all", "drop_all")

Maps = Float[Array | np.ndarray, "*batch height width"]
Scores = Float[Array | np.ndarray, "*batch rows columns"]
# Shapes are told apart here so that a wrong one meets our own error.
Prefix = Int[Array | np.ndarray, "*batch length"]
Lengths = Int[Array | np.ndarray, "*prefixes"]
Cases = Mapping[str, Shaped[np.ndarray, "..."]]


class Prefixes(NamedTuple):
    """The first words of captions.

    Attributes:
      ids: the tokens, the start token first, then padding.
      lengths: how many of them are not padding, the start token among them.
    """

    ids: Int[Array, "*batch length"]
    lengths: Int[Array, "*batch"]


def patch_scores(maps: Maps, patch: int = PATCH) -> Float[Array, "*batch rows columns"]:
    """The sum of signed relevance in each patch.

    Args:
      maps: relevance per pixel, one map per word; of relevance per channel the mean.
      patch: height and width of a patch in pixels; static.

    Returns:
      Float32 (float64 for float64 maps).

    Raises:
      ValueError: patches do not divide the map, or a map is not finite (NaN under `jax.jit`).
    """
    *batch, height, width = maps.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"patch_scores: patches of {patch} x {patch} do not divide maps of {height} x {width}"
        )
    check_maps("patch_scores", maps)
    x = jnp.asarray(maps)
    cells = x.reshape(*batch, height // patch, patch, width // patch, patch)
    return cells.sum((-3, -1), dtype=jnp.promote_types(x.dtype, jnp.float32))


def patch_mask(scores: Scores, count: int = PATCHES) -> Bool[Array, "*batch rows columns"]:
    """The patches with the highest scores.

    Args:
      scores: as `patch_scores` gives them.
      count: how many; static. Of equal scores the patch that comes first is taken.

    Returns:
      True for the patches to ablate, exactly `count` in each map.

    Raises:
      ValueError: there are fewer patches, or scores are not finite (under `jax.jit` a mask of
        such scores means nothing).
    """
    _check_count("patch_mask", count, int(np.prod(scores.shape[-2:])))
    check_maps("patch_mask", scores)
    return _highest(jnp.asarray(scores).reshape(*scores.shape[:-2], -1), count).reshape(
        scores.shape
    )


def ablate(
    images: Float[Array | np.ndarray, "*batch height width channels"],
    mask: Shaped[Array | np.ndarray, "*masks rows columns"],
    value: int | float | Float[Array | np.ndarray, " channels"] = 0.0,
) -> Float[Array, "*batch height width channels"]:
    """Images whose patches under a mask have one colour; the images given stay as they are.

    Args:
      images: in the units of the model's input.
      mask: bool per patch; a mask per image, or one for all.
      value: the colour, or one number for all channels. In images normalised by mean and
        deviation, 0 is the mean colour.

    Raises:
      ValueError: the mask is not bool, is for another number of images, or does not divide
        the image.
    """
    *batch, height, width, _ = images.shape
    *given, rows, columns = mask.shape
    if given not in (batch, []) or not rows * columns or height % rows or width % columns:
        raise ValueError(
            f"ablate: a mask of {list(mask.shape)} does not fit images of {list(images.shape)}; "
            f"expected [{', '.join(map(str, [*batch, 'rows', 'columns']))}], or [rows, columns] "
            "for all, of patches that divide the images"
        )
    if mask.dtype != np.bool_:
        raise ValueError(f"ablate: the mask must be bool, True where to ablate, got {mask.dtype}")
    x = jnp.asarray(images)
    pixels = jnp.repeat(jnp.asarray(mask), height // rows, axis=-2)
    pixels = jnp.repeat(pixels, width // columns, axis=-1)[..., None]
    return jnp.where(pixels, jnp.asarray(value, x.dtype), x)


def ablated_prefixes(
    ids: Prefix,
    lengths: Lengths,
    relevance: Shaped[Array | np.ndarray, "*prefixes positions"],
    *,
    count: int = WORDS,
    pad: int = 0,
) -> Prefixes:
    """Prefixes without the words of highest signed relevance.

    The start token, at position 0, stays; the others close up. Of equal relevance the word that
    comes first goes. A prefix of fewer words loses them all.

    Args:
      ids: what comes before a word: the start token, words, padding.
      lengths: of each prefix, the start token among it; at least 1.
      relevance: of each token for the word that comes next; that of the start token and of
        padding is not used, and may be anything.
      count: how many words go; static.
      pad: the id to fill up with; static.

    Returns:
      The shorter prefixes, in arrays of the same shapes.

    Raises:
      ValueError: shapes do not fit, `count` is negative, or, where values can be looked at, a
        length leaves [1, positions] or the relevance of a word is not finite.
    """
    if ids.shape != relevance.shape or lengths.shape != ids.shape[:-1]:
        raise ValueError(
            f"ablated_prefixes: ids of {list(ids.shape)}, lengths of {list(lengths.shape)} and "
            f"relevance of {list(relevance.shape)}; expected [*batch, length], [*batch] and "
            "[*batch, length]"
        )
    _check_count("ablated_prefixes", count)
    _check_prefixes(lengths, relevance)
    return Prefixes(
        *_without(jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(relevance), count, pad)
    )


def ablation_summary(
    drops: Cases,
    *,
    there: Cases | None = None,
    image: Int[np.ndarray, " examples"] | None = None,
    baseline: str | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Drops in probability by method, with bootstrap 95% intervals over images.

    A case is a word that was asked about. After the ablation of patches the new caption may lack
    the word: it disappeared, and has no drop of its own. The measures:

    - `disappeared`: the share of cases in which the word disappeared.
    - `share_there`, `drop_there`: where the word is still there, the share of drops >= 0 and
      the mean drop.
    - `share_all`, `drop_all`: the same over all cases, as the reference implementation reports
      them: a word that disappeared is among the cases, but not among the shares, and its drop
      counts as 0. So a method that makes more words disappear looks worse here.

    Differences are paired: of the same cases, on the same resamples, which are those of
    `bootstrap`. Each interval holds for itself: nothing is corrected for how many are compared.

    Args:
      drops: per method, p(before) - p(after) of each case; that of a word that disappeared is
        not used, and may be anything.
      there: per method, bool: is the word still there? None where it always is, as in the
        ablation of words.
      image: the image of each case; those of one image are drawn together. None for an
        image per case.
      baseline: the method that others are compared with, such as "random"; None for none.
      seed: of the resampling.
      resamples: how many samples are drawn with replacement.

    Returns:
      What JSON can hold: `cases`, `images`, `baseline`, `methods`. Per method `there`, the
      number of such cases, each measure (`mean`, `low`, `high`) and, for all but the baseline,
      `difference`: each measure less the baseline's. A measure is None where no word is there.

    Raises:
      ValueError: no methods or no cases, shapes that differ, drops that are not finite, `there`
        that is not bool or of other methods, or an unknown baseline.
    """
    names = list(drops)
    values = {name: np.asarray(one, np.float64) for name, one in drops.items()}
    masks = {n: np.ones(values[n].shape, bool) for n in names} if there is None else dict(there)
    _check_cases(values, masks, baseline)
    drop = np.stack([np.where(masks[name], values[name], 0) for name in names])
    still = np.stack([masks[name] for name in names])
    cases = drop.shape[-1]
    if image is not None and image.shape != (cases,):
        raise ValueError(
            f"ablation_summary: images of {list(image.shape)} for {cases} cases; give one "
            "number per case"
        )
    groups, group = np.unique(np.arange(cases) if image is None else image, return_inverse=True)
    held = (drop >= 0) & still
    one = np.ones_like(drop)
    parts = group_sums(np.stack([~still, held, drop, held, drop]), group)
    wholes = group_sums(np.stack([one, still, still, one, one]), group)
    weights = times_drawn(np.random.default_rng(seed), len(groups), resamples)
    mean = _ratio(parts.sum(-1), wholes.sum(-1))
    drawn = _ratio(parts @ weights, wholes @ weights)
    methods: dict[str, Any] = {
        name: {"there": int(still[i].sum()), **_measures(mean[:, i], drawn[:, i])}
        for i, name in enumerate(names)
    }
    if baseline is not None:
        b = names.index(baseline)
        for i, name in enumerate(names):
            if i != b:
                less = _measures(mean[:, i] - mean[:, b], drawn[:, i] - drawn[:, b])
                methods[name]["difference"] = less
    return {"cases": cases, "images": len(groups), "baseline": baseline, "methods": methods}


def _highest(scores: Float[Array, "*batch places"], count: int) -> Bool[Array, "*batch places"]:
    """Exactly `count` places; of equal scores the first, since the sort is stable."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count


@functools.partial(jax.jit, static_argnames=("count", "pad"))
def _without(
    ids: Int[Array, "*batch length"],
    lengths: Int[Array, "*batch"],
    relevance: Shaped[Array, "*batch length"],
    count: int,
    pad: int,
) -> tuple[Int[Array, "*batch length"], Int[Array, "*batch"]]:
    place = jnp.arange(ids.shape[-1])
    real = place < lengths[..., None]
    word = real & (place > 0)
    kept = real & ~(word & _highest(jnp.where(word, relevance, -jnp.inf), count))
    # Kept tokens first, in their order: the sort is stable.
    order = jnp.argsort(~kept, axis=-1, stable=True)
    left = kept.sum(-1, dtype=lengths.dtype)
    closed = jnp.take_along_axis(ids, order, axis=-1)
    return jnp.where(place < left[..., None], closed, pad), left


def _ratio(
    part: Float[np.ndarray, "..."], whole: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """NaN where there is nothing to take a share of."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)


def _measures(
    means: Float[np.ndarray, " measures"], drawn: Float[np.ndarray, "measures resamples"]
) -> dict[str, dict[str, float] | None]:
    found: dict[str, dict[str, float] | None] = {}
    for name, mean, resampled in zip(MEASURES, means, drawn, strict=True):
        # A resample may have drawn no word that is still there; it says nothing of those.
        resampled = resampled[np.isfinite(resampled)]
        found[name] = None
        if np.isfinite(mean) and len(resampled):
            found[name] = percentiles(mean, resampled).at()._asdict()
    return found


def _check_count(what: str, count: int, most: int | None = None) -> None:
    if count < 0 or (most is not None and count > most):
        raise ValueError(
            f"{what}: expected a count of 0 {'or more' if most is None else f'to {most}'}, "
            f"got {count}"
        )


def _check_prefixes(lengths: Lengths, relevance: Shaped[Array | np.ndarray, "..."]) -> None:
    if isinstance(lengths, jax.core.Tracer) or isinstance(relevance, jax.core.Tracer):
        return
    length, positions = np.asarray(lengths), relevance.shape[-1]
    if ((length < 1) | (length > positions)).any():
        raise ValueError(
            f"ablated_prefixes: lengths count the start token and lie from 1 to {positions}, got "
            f"{length.min()} to {length.max()}"
        )
    place = np.arange(positions)
    word = (place > 0) & (place < length[..., None])
    check_maps("ablated_prefixes: relevance", np.where(word, np.asarray(relevance), 0))


def _check_cases(
    drops: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray], baseline: str | None
) -> None:
    if not drops:
        raise ValueError("ablation_summary: expected drops per method, got no methods")
    if set(there) != set(drops):
        raise ValueError(
            f"ablation_summary: drops of {', '.join(sorted(drops))}, but `there` of "
            f"{', '.join(sorted(there))}; give the same methods"
        )
    shapes = {name: list(one.shape) for name, one in drops.items()}
    first = next(iter(drops.values()))
    if first.ndim != 1 or not first.size or any(d.shape != first.shape for d in drops.values()):
        raise ValueError(
            "ablation_summary: expected one drop per case, and at least one case, the same for "
            f"all methods, got {shapes}"
        )
    for name, mask in there.items():
        if mask.shape != first.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"ablation_summary: `there` of {name!r} must be bool of {list(first.shape)}, got "
                f"{mask.dtype} of {list(mask.shape)}"
            )
        check_maps(f"ablation_summary: drops of {name!r}", np.where(mask, drops[name], 0))
    if baseline is not None and baseline not in drops:
        raise ValueError(
            f"ablation_summary: baseline {baseline!r} is not among the methods {', '.join(drops)}"
        )
