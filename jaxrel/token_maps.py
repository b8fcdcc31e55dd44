"""Token activation maps: where a decoder that reads an image's tokens is moved to say a word.

They need no gradient. A decoder whose sequence holds the image's tokens gives logits at each of
these too, and the map of a word is its logit there, less what the preceding words explain.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Shaped


def token_activation(
    logits: Float[Array | np.ndarray, "batch tokens vocabulary"],
    ids: Shaped[Array | np.ndarray, "texts positions"],
    *,
    image: Sequence[int],
    words: Sequence[int],
    prompt: Sequence[int] = (),
    grid: tuple[int, int],
    window: int = 3,
) -> Float[Array, "batch words rows columns"]:
    """A map of the image for each word that a decoder wrote, from one forward pass.

    Li, Wang, Ding, Wang and Li, ICCV 2025, "Token Activation Map to Visually Explain Multimodal
    LLMs", in the form of their release. `a_i(w)` is the positive part of the logit of word w at
    token i; over the image's tokens it is the map `M_w`. Preceding words interfere by
    `I = sum_j a_j(w) M_j / sum_j a_j(w)`, without those that are the same word; `a_j` is read where
    a written word is predicted, and at a prompt's word itself. What is left,
    `max(M_w - s I, 0)` with `s = <M_w, I> / <I, I>` of least squares, goes through `rank_gaussian`.
    The release lets the most probable next word stand for the prompt's first; here it is itself.

    It is defined for decoders that read images as tokens among the words, such as LLaVA. Where the
    image is another stream (CLIPmapper) or is attended to (captioners), its tokens have no logits.

    Args:
      logits: of the next token after each token, of texts as they were written (teacher forcing).
      ids: the tokens; those of an image may be anything.
      image: positions of the image's tokens, row by row.
      words: positions of the words that are explained, in ascending order, all after the image.
      prompt: positions of words before these.
      grid: rows and columns of the image's tokens, each at least `window // 2 + 1`.
      window: side of the filter's window, odd; 1 leaves the filter out.

    Returns:
      Maps of 0 or more, in the logits' dtype.

    Raises:
      ValueError: shapes or positions that do not fit, or a window that does not.
    """
    rows, columns = grid
    _check(logits.shape, ids.shape, image, words, prompt, grid, window)
    logits, ids = jnp.asarray(logits), jnp.asarray(ids)
    texts = np.asarray((*prompt, *words))
    read = np.asarray((*prompt, *(word - 1 for word in words)))
    said = ids[:, texts]
    active = jnp.maximum(jnp.take_along_axis(logits, said[:, None], axis=-1), 0)
    maps = active[:, np.asarray(image)].mT
    # [batch, word, preceding word]
    weights = jnp.where(said[:, :, None] != said[:, None], active[:, read].mT, 0)
    weights = jnp.tril(weights, -1)
    weights = weights / _nonzero(weights.sum(-1, keepdims=True))
    explained = jnp.matmul(weights, maps, precision="highest")
    scale = (maps * explained).sum(-1, keepdims=True)
    scale = scale / _nonzero(jnp.square(explained).sum(-1, keepdims=True))
    left = jnp.maximum(maps - scale * explained, 0)[:, len(prompt) :]
    return rank_gaussian(left.reshape(*left.shape[:2], rows, columns), window)


def rank_gaussian(
    maps: Float[Array | np.ndarray, "*batch rows columns"], window: int = 3
) -> Float[Array, "*batch rows columns"]:
    """The rank Gaussian filter of token activation maps, against single high values.

    Each value becomes the mean of its window's values, by rank, weighted by a Gaussian around the
    median; its deviation, in ranks, is that of the values over their mean. Beyond the edges the
    map is reflected.

    Args:
      maps: values of 0 or more.
      window: side of the window, odd.
    """
    maps = jnp.asarray(maps)
    half = window // 2
    padded = jnp.pad(maps, [(0, 0)] * (maps.ndim - 2) + [(half, half)] * 2, mode="reflect")
    rows, columns = maps.shape[-2:]
    shifted = [
        padded[..., i : i + rows, j : j + columns] for i in range(window) for j in range(window)
    ]
    ranked = jnp.sort(jnp.stack(shifted, axis=-1), axis=-1)
    mean = ranked.mean(axis=-1, keepdims=True)
    deviation = ranked.std(axis=-1, keepdims=True) / _nonzero(mean)
    place = jnp.arange(window**2, dtype=maps.dtype) - window**2 // 2
    weights = jax.nn.softmax(-jnp.square(place / _nonzero(deviation)) / 2, axis=-1)
    # Equal values have no deviation, and any weights give them back.
    return (ranked * weights).sum(axis=-1)


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def _check(
    logits: tuple[int, ...],
    ids: tuple[int, ...],
    image: Sequence[int],
    words: Sequence[int],
    prompt: Sequence[int],
    grid: tuple[int, int],
    window: int,
) -> None:
    rows, columns = grid
    if ids != logits[:2]:
        raise ValueError(
            f"token_activation: ids of shape {list(ids)} and logits of {list(logits)}; give an id "
            "for each token that has logits"
        )
    if len(image) != rows * columns:
        raise ValueError(
            f"token_activation: {len(image)} tokens of the image, and a grid of {rows} x "
            f"{columns}; give the rows and columns of these tokens as grid"
        )
    order = [*prompt, *words]
    outside = [at for at in (*image, *order) if not 0 <= at < logits[1]]
    if not words or outside or order != sorted(set(order)) or min(words) <= max(image, default=-1):
        raise ValueError(
            f"token_activation: the prompt's and the words' positions must ascend below "
            f"{logits[1]}, the number of tokens, and words come after the image; got prompt "
            f"{list(prompt)}, words {list(words)}, image to {max(image, default=-1)}"
        )
    if window < 1 or window % 2 == 0 or min(grid) <= window // 2:
        raise ValueError(
            f"token_activation: window must be odd, and less than twice a side of the grid; got "
            f"{window} for {rows} x {columns}"
        )
