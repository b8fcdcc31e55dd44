"""Writing captions with any step function: greedy, by beam search, and by sampling.

A step function `(state, ids [rows]) -> (state, logits [rows, vocabulary])` reads one word per row.
The leaves of its state have the rows as their first axis; rows are captions that do not depend
on each other. Everything is pure and has static shapes, for `jax.jit`: one scan over the words
writes the captions of all images.

At the last place of a full context only the end is possible, and its probability counts like that
of any word. `Decoded.ended` is False for such captions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

State = Any
Step = Callable[[State, Int[Array, " rows"]], tuple[State, Float[Array, "rows vocabulary"]]]


@dataclass(frozen=True)
class Format:
    """How captions are written as ids.

    Args:
      start: the id at the start of each caption, which is not written again.
      end: the id that ends it.
      pad: the id after the end; it may be the end's.
      context: number of tokens of the longest caption, with start and end.
      never: more ids that are not written, such as that of unknown words.

    Raises:
      ValueError: there is no room for a word, or the end can never be written.
    """

    start: int
    end: int
    pad: int
    context: int
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.context < 3:
            raise ValueError(
                f"context is {self.context}: start, one word and end need at least 3 places"
            )
        if self.end in (self.start, *self.never):
            raise ValueError(
                f"the end {self.end} must be an id that may be written; start is {self.start}, "
                f"never {self.never}"
            )


class Decoded(NamedTuple):
    """Captions that were written.

    Attributes:
      ids: int32 token ids with start and end, padded.
      log_probability: float32; of the words and the end, given the image: a sum of log-softmax
        values over the whole vocabulary.
      ended: False where a caption ends only because the context was full, although another word
        was more probable.
    """

    ids: Int[Array, "*batch context"]
    log_probability: Float[Array, "*batch"]
    ended: Bool[Array, "*batch"]


def greedy(step: Step, state: State, form: Format) -> Decoded:
    """Write the most probable word at each step.

    Args:
      step: the step function.
      state: state before the first word, one row per caption.
      form: how captions are written.

    Returns:
      One caption per row of the state.
    """

    def choose(log_p: Array, keys: None) -> Array:
        return log_p.argmax(-1)

    return _word_by_word(step, state, form, choose, None)


def sample(
    step: Step,
    state: State,
    form: Format,
    key: Key[Array, "*rows"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Decoded:
    """Draw each word from the model's distribution.

    Args:
      step: the step function.
      state: state before the first word, one row per caption.
      form: how captions are written.
      key: one key, or one per row; a row's caption depends on its own key alone.
      temperature: divides the logits.
      top_k: draw only from this number of most probable words (Fan et al. 2018).
      top_p: draw only from the smallest set of most probable words whose probabilities sum to at
        least this (the nucleus, Holtzman et al. 2020); applied after `top_k`.

    Returns:
      One caption per row of the state. Its log-probability is the model's own, at temperature 1.

    Raises:
      ValueError: a setting is out of range, or there is another number of keys than rows.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; see greedy for 0")
    if top_k is not None:
        _check_count("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    rows = _rows(state)
    keys = key if key.ndim else jax.random.split(key, rows)
    if len(keys) != rows:
        raise ValueError(f"{len(keys)} keys for {rows} captions: give one key, or one for each")

    def choose(log_p: Array, keys: Array) -> Array:
        kept = _most_probable(log_p / temperature, top_k, top_p)
        return jax.vmap(jax.random.categorical)(keys, kept)

    each = jax.vmap(lambda key: jax.random.split(key, form.context - 1))(keys)
    return _word_by_word(step, state, form, choose, each.swapaxes(0, 1))


def beam_search(
    step: Step,
    state: State,
    form: Format,
    *,
    beams: int,
    length_penalty: float | None = None,
) -> Decoded:
    """Search for the most probable caption, with several open ones at a time.

    A caption that ends is set aside, and its place is not filled again: `beams` captions are open
    at first, and fewer later. The result is the best of those set aside.

    Args:
      step: the step function.
      state: state before the first word, one row per image; rows of `step` are then
        `image * beams + beam`.
      form: how captions are written.
      beams: number of captions that are open at first.
      length_penalty: the exponent of ((5 + length) / 6), which divides a caption's
        log-probability when the best is chosen (Wu et al. 2016, eq. 14); None: 0, as Sun et al.
        2022 have it.

    Returns:
      One caption per image.

    Raises:
      ValueError: `beams` is no positive integer.
    """
    _check_count("beams", beams)
    images = _rows(state)
    state = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), state)
    first_rows = jnp.arange(images)[:, None] * beams

    def extend(carry: Any, position: Array) -> Any:
        state, open_ = carry
        state, logits = step(state, open_.ids[..., position - 1].reshape(-1))
        log_p, own_end = _log_probabilities(logits.reshape(images, beams, -1), form, position)
        grow = jax.vmap(partial(_grow, position=position, form=form, exponent=length_penalty))
        open_, parents = grow(open_, log_p, own_end)
        taken = (first_rows + parents).reshape(-1)
        return (jax.tree.map(lambda x: x[taken], state), open_), None

    empty = jax.tree.map(lambda x: jnp.broadcast_to(x, (images, *x.shape)), _empty(form, beams))
    (_, open_), _ = jax.lax.scan(extend, (state, empty), jnp.arange(1, form.context))
    return open_.best


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _rows(state: State) -> int:
    return len(jax.tree.leaves(state)[0])


def _log_probabilities(
    logits: Float[Array, "*rows vocabulary"], form: Format, position: Array
) -> tuple[Float[Array, "*rows vocabulary"], Bool[Array, "*rows"]]:
    """Log-probabilities, -inf for words that may not be written; and whether an end is free.

    An end is the model's own, and not that of a full context, where no word is more probable.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    words = jnp.arange(log_p.shape[-1])
    end, last = words == form.end, position == form.context - 1
    never = jnp.isin(words, jnp.array([form.start, form.pad, *form.never])) & ~end
    free = jnp.where(never, -jnp.inf, log_p)
    own = ~last | (free.argmax(-1) == form.end)
    return jnp.where(last & ~end, -jnp.inf, free), own


def _most_probable(
    log_p: Float[Array, "rows vocabulary"], top_k: int | None, top_p: float | None
) -> Float[Array, "rows vocabulary"]:
    """Log-probabilities, -inf for words that are not among the most probable."""
    if top_k is not None:
        lowest = jax.lax.top_k(log_p, min(top_k, log_p.shape[-1]))[0][..., -1:]
        log_p = jnp.where(log_p < lowest, -jnp.inf, log_p)
    if top_p is not None:
        ordered = jnp.sort(jax.nn.softmax(log_p), descending=True)
        before = jnp.cumsum(ordered, -1) - ordered
        lowest = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        log_p = jnp.where(jax.nn.softmax(log_p) < lowest, -jnp.inf, log_p)
    return log_p


def _word_by_word(
    step: Step, state: State, form: Format, choose: Callable[[Array, Any], Array], keys: Any
) -> Decoded:
    """Write one caption per row, with each word chosen from the log-probabilities."""
    rows = _rows(state)

    def write(carry: Any, now: Any) -> Any:
        state, word, done, total, ended = carry
        position, keys = now
        state, logits = step(state, word)
        log_p, own_end = _log_probabilities(logits, form, position)
        chosen = choose(log_p, keys).astype(jnp.int32)
        of_chosen = jnp.take_along_axis(log_p, chosen[:, None], axis=1)[:, 0]
        total += jnp.where(done, 0, of_chosen)
        ended |= ~done & (chosen == form.end) & own_end
        word = jnp.where(done, form.pad, chosen)
        return (state, word, done | (chosen == form.end), total, ended), word

    first = jnp.full(rows, form.start, jnp.int32)
    no = jnp.zeros(rows, bool)
    before = (state, first, no, jnp.zeros(rows), no)
    places = jnp.arange(1, form.context)
    (*_, total, ended), words = jax.lax.scan(write, before, (places, keys))
    return Decoded(jnp.concatenate([first[None], words]).T, total, ended)


class _Beams(NamedTuple):
    """The captions of one image: those that are open, and the best one set aside.

    The log-probability of a closed beam is -inf. `open` is the number of beams that may be open.
    """

    ids: Array
    log_probability: Array
    open: Array
    best: Decoded
    best_score: Array


def _empty(form: Format, beams: int) -> _Beams:
    """One open caption without words: several equal beams would find the same captions."""
    ids = jnp.full((beams, form.context), form.pad, jnp.int32).at[:, 0].set(form.start)
    log_probability = jnp.full(beams, -jnp.inf).at[0].set(0)
    best = Decoded(ids[0], jnp.array(-jnp.inf), jnp.array(False))
    return _Beams(ids, log_probability, jnp.array(beams), best, jnp.array(-jnp.inf))


def _grow(
    open_: _Beams,
    log_p: Float[Array, "beams vocabulary"],
    own_end: Bool[Array, " beams"],
    *,
    position: Array,
    form: Format,
    exponent: float | None,
) -> tuple[_Beams, Int[Array, " beams"]]:
    """Add one word to the beams; return them, and the beam that each comes from."""
    beams, vocabulary = log_p.shape
    total, best = jax.lax.top_k((open_.log_probability[:, None] + log_p).ravel(), beams)
    parent, word = best // vocabulary, best % vocabulary
    kept = (jnp.arange(beams) < open_.open) & (total > -jnp.inf)
    ids = open_.ids[parent].at[:, position].set(word)
    aside = kept & (word == form.end)
    length = 1.0 if exponent is None else ((5 + position) / 6) ** exponent
    of_aside = jnp.where(aside, total / length, -jnp.inf)
    top = of_aside.argmax()
    candidate = Decoded(ids[top], total[top], own_end[parent[top]])
    better = of_aside[top] > open_.best_score
    grown = _Beams(
        ids,
        jnp.where(kept & ~aside, total, -jnp.inf),
        open_.open - aside.sum(),
        jax.tree.map(lambda new, old: jnp.where(better, new, old), candidate, open_.best),
        jnp.maximum(of_aside[top], open_.best_score),
    )
    return grown, parent
