"""Decoding against plain Python on small random step functions."""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.models import decoding
from jaxrel.models.decoding import Format

PAD, START, END = 0, 1, 2
VOCABULARY = 7
FORM = Format(start=START, end=END, pad=PAD, context=7)
# Sums of at most six log-probabilities in float32.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def weights(seed, vocabulary=VOCABULARY):
    rng = np.random.default_rng(seed)
    shapes = {"carry": (4, 4), "words": (vocabulary, 4), "head": (4, vocabulary)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def network_step(w, bias):
    """A small recurrent network; start and padding are tempting."""
    tempting = jnp.zeros(len(w["words"])).at[jnp.array([PAD, START, END])].set([3, 3, bias])

    def step(state, ids):
        state = jnp.tanh(state @ w["carry"] + w["words"][ids])
        return state, 2 * state @ w["head"] + tempting

    return step


def run(way, first, *, seed=0, bias=0.0, form=FORM, vocabulary=VOCABULARY, key=None, **settings):
    """One compiled program for all networks of a size."""
    w = {name: jnp.asarray(x, jnp.float32) for name, x in weights(seed, vocabulary).items()}
    return compiled(way, w, jnp.float32(bias), first, key, form, tuple(settings.items()))


@functools.partial(jax.jit, static_argnames=("way", "form", "settings"))
def compiled(way, w, bias, first, key, form, settings):
    keys = () if key is None else (key,)
    return way(network_step(w, bias), first, form, *keys, **dict(settings))


greedy = functools.partial(run, decoding.greedy)
beam_search = functools.partial(run, decoding.beam_search)
sample = functools.partial(run, decoding.sample)


def images(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 4)), jnp.float32)


# ---- plain Python


class Network:
    """The same network for one caption, in float64."""

    def __init__(self, seed, first, bias=0.0, form=FORM, vocabulary=VOCABULARY):
        self.w, self.first, self.form = weights(seed, vocabulary), np.float64(first), form
        self.tempting = np.zeros(vocabulary)
        self.tempting[[PAD, START]], self.tempting[END] = 3, bias
        never = {form.pad, form.start, *form.never} - {form.end}
        self.words = [word for word in range(vocabulary) if word not in never]

    def log_p(self, caption):
        state = self.first
        for word in caption:
            state = np.tanh(state @ self.w["carry"] + self.w["words"][word])
        logits = 2 * state @ self.w["head"] + self.tempting
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    def following(self, caption):
        """The words that may come next, with their log-probabilities, the best first."""
        log_p = self.log_p(caption)
        only_end = len(caption) == self.form.context - 1
        words = [self.form.end] if only_end else self.words
        return sorted(((log_p[word], word) for word in words), reverse=True)

    def total(self, caption):
        """The log-probability of a caption, padding left out."""
        length = caption.index(self.form.end) + 1
        return sum(self.log_p(caption[:i])[caption[i]] for i in range(1, length))

    def finished(self, caption, total):
        log_p = self.log_p(caption[:-1])
        best = max(self.words, key=lambda word: log_p[word])
        ended = len(caption) < self.form.context or best == self.form.end
        return padded(caption, self.form), total, ended


def padded(caption, form):
    return [*caption, *[form.pad] * (form.context - len(caption))]


def plain_greedy(network):
    caption, total = [network.form.start], 0.0
    while len(caption) == 1 or caption[-1] != network.form.end:
        log_p, word = network.following(caption)[0]
        caption, total = [*caption, word], total + log_p
    return network.finished(caption, total)


def plain_beam(network, beams, exponent=None):
    """Finished captions are set aside, and the number of open ones shrinks."""
    form = network.form
    open_, aside = [(0.0, [form.start])], []
    for _ in range(1, form.context):
        grown = [
            (total + log_p, [*caption, word])
            for total, caption in open_
            for log_p, word in network.following(caption)
        ]
        grown = sorted(grown, key=lambda one: -one[0])[: beams - len(aside)]
        aside += [one for one in grown if one[1][-1] == form.end]
        open_ = [one for one in grown if one[1][-1] != form.end]

    def worth(one):
        length = len(one[1]) - 1
        return one[0] / (1 if exponent is None else ((5 + length) / 6) ** exponent)

    total, caption = max(aside, key=worth)
    return network.finished(caption, total)


def check(found, expected):
    ids, log_probability, ended = zip(*expected, strict=True)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.log_probability, log_probability, **ROUNDING)
    np.testing.assert_array_equal(found.ended, ended)


# ---- greedy


@pytest.mark.parametrize(("bias", "ends"), [(2.0, "early"), (-100.0, "never"), (0.0, "some")])
def test_greedy(bias, ends):
    first = images(12)
    found = greedy(first, seed=1, bias=bias)
    check(found, [plain_greedy(Network(1, one, bias)) for one in first])
    assert (found.ids[:, 0] == START).all()
    assert ((found.ids == END).sum(-1) == 1).all()
    length = (np.asarray(found.ids) == END).argmax(-1)
    if ends == "never":
        assert (length == FORM.context - 1).all()
        assert not found.ended.any()
    else:
        assert (length < FORM.context - 1).any()
        assert found.ended.any()


def test_an_end_at_the_last_place_can_be_the_models_own():
    """After two words the end is certain; the context has room for just these, or for one."""

    def step(state, ids):
        count = state + 1
        words = jnp.arange(VOCABULARY)
        certain = 50.0 * ((count > 2)[:, None] & (words == END))
        return count, certain + 9.0 * (words == 4)

    for context, ended in ((5, True), (4, True), (3, False)):
        form = Format(START, END, PAD, context)
        for find in (decoding.greedy, functools.partial(decoding.beam_search, beams=1)):
            found = find(step, jnp.zeros(1), form)
            assert found.ids[0].tolist() == padded([*[START, 4, 4][: context - 1], END], form)
            assert found.ended.tolist() == [ended]


def test_words_that_are_never_written():
    form = Format(START, END, PAD, 7, never=(4, 6))
    first = images(6)
    assert np.isin([4, 6], greedy(first, seed=3).ids).any()
    found = greedy(first, seed=3, form=form)
    check(found, [plain_greedy(Network(3, one, form=form)) for one in first])
    for found in (
        sample(first, seed=3, form=form, key=jax.random.key(0)),
        beam_search(first, seed=3, form=form, beams=3),
    ):
        assert not np.isin([4, 6], found.ids).any()
        assert not np.isin([PAD, START], np.asarray(found.ids)[..., 1]).any()


def test_the_end_may_be_the_padding():
    first = images(5)
    found = greedy(first, seed=1, bias=1.0, form=Format(START, END, END, 7, never=(PAD,)))
    other = greedy(first, seed=1, bias=1.0)
    np.testing.assert_array_equal(found.ids, np.where(other.ids == PAD, END, other.ids))


# ---- beam search


@pytest.mark.parametrize(("beams", "exponent"), [(1, None), (2, 0.7), (3, None), (5, 1.5)])
def test_beam_search(beams, exponent):
    for seed, bias in ((0, 0.0), (1, 1.0), (2, -2.0)):
        first = images(8, seed)
        found = beam_search(first, seed=seed, bias=bias, beams=beams, length_penalty=exponent)
        networks = [Network(seed, one, bias) for one in first]
        check(found, [plain_beam(one, beams, exponent) for one in networks])
        if beams == 1:
            expected = greedy(first, seed=seed, bias=bias)
            jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_size_of_the_length_penalty_decides():
    """Two captions: the end at once, log-probability -log 2, or one word, `ratio` times that.

    Wu et al. 2016, eq. 14, with exponent 1: the longer wins below a ratio of (5 + 2) / (5 + 1).
    """

    def step(state, ids):
        count, ratio = state
        end = jnp.where(count == 0, 0.5, 0.5 ** (ratio - 1))[:, None]
        words = jnp.arange(VOCABULARY)
        likely = jnp.where(words == END, end, jnp.where(words == 4, 1 - end, 1e-9))
        return (count + 1, ratio), jnp.log(likely)

    ratio = jnp.array([1.15, 1.18])
    found = decoding.beam_search(step, (0 * ratio, ratio), FORM, beams=2, length_penalty=1.0)
    assert found.ids.tolist() == [padded([START, 4, END], FORM), padded([START, END], FORM)]
    np.testing.assert_allclose(found.log_probability, np.log(0.5) * np.array([1.15, 1]), **ROUNDING)


def test_enough_beams_find_the_most_probable_caption():
    """Two words and up to three places for them: 15 captions."""
    form, vocabulary = Format(START, END, PAD, 5), 5
    captions = [
        [START, *words, END]
        for length in range(4)
        for words in itertools.product((3, 4), repeat=length)
    ]
    assert len(captions) == 15
    first = images(20)
    better = 0
    for seed in range(3):
        sizes = {"seed": seed, "form": form, "vocabulary": vocabulary}
        found = beam_search(first, **sizes, beams=16)
        fewer = beam_search(first, **sizes, beams=1)
        for i, one in enumerate(first):
            network = Network(seed, one, form=form, vocabulary=vocabulary)
            totals = [network.total(caption) for caption in captions]
            assert found.ids[i].tolist() == padded(captions[int(np.argmax(totals))], form)
            np.testing.assert_allclose(found.log_probability[i], max(totals), **ROUNDING)
        better += int((found.log_probability > fewer.log_probability + 1e-4).sum())
    assert better > 5


def test_more_beams_than_words():
    found = beam_search(images(2), beams=20)
    check(found, [plain_beam(Network(0, one), 20) for one in images(2)])


# ---- sampling

COUNT = 4000


def first_words(**settings):
    """How often each word comes first, in captions of one image; and its distribution."""
    one = images(1)
    found = sample(jnp.repeat(one, COUNT, axis=0), seed=2, key=jax.random.key(3), **settings)
    network = Network(2, one[0])
    p = np.zeros(VOCABULARY)
    p[network.words] = np.exp(network.log_p([START]))[network.words]
    shares = np.bincount(np.asarray(found.ids)[:, 1], minlength=VOCABULARY) / COUNT
    return shares, p / p.sum()


def close(shares, p):
    # Five standard deviations of a share; the key is fixed.
    np.testing.assert_array_less(np.abs(shares - p), 5 * np.sqrt(p * (1 - p) / COUNT) + 1e-9)


def test_words_are_drawn_as_often_as_they_are_probable():
    shares, p = first_words()
    close(shares, p)
    assert (p > 0.02).sum() >= 3
    hot, p = first_words(temperature=2.0)
    root = np.sqrt(p)
    close(hot, root / root.sum())
    assert np.abs(hot - shares).max() > 0.05


def test_only_the_most_probable_words_are_drawn():
    shares, p = first_words(top_k=2)
    ordered = np.sort(p)[::-1]
    kept = np.where(p >= ordered[1], p, 0)
    close(shares, kept / kept.sum())
    for top_p, count in ((float(ordered[:2].sum() + 0.01), 3), (float(ordered[0] - 0.01), 1)):
        shares, _ = first_words(top_p=top_p)
        kept = np.where(p >= ordered[count - 1], p, 0)
        close(shares, kept / kept.sum())
    everything, _ = first_words(top_k=100, top_p=1.0)
    np.testing.assert_array_equal(everything, first_words()[0])


def test_a_key_decides_and_the_model_judges():
    first, key = images(5), jax.random.key(0)
    found = sample(first, seed=2, key=key)
    again = sample(first, seed=2, key=jax.random.split(key, 5))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert (found.ids != sample(first, seed=2, key=jax.random.key(1)).ids).any()
    cold = sample(first, seed=2, key=key, temperature=1e-4)
    jax.tree.map(np.testing.assert_array_equal, cold, greedy(first, seed=2))
    own = [Network(2, one).total(row) for one, row in zip(first, found.ids.tolist(), strict=True)]
    np.testing.assert_allclose(found.log_probability, own, **ROUNDING)


# ---- all of them

WAYS = {
    "greedy": greedy,
    "beam": functools.partial(beam_search, beams=3, length_penalty=1.0),
    "sample": functools.partial(sample, top_k=4, top_p=0.9),
}


@pytest.mark.parametrize("way", WAYS)
def test_batch_is_one_by_one_and_jit_is_eager(way):
    form, first = Format(START, END, PAD, 4), images(3)
    keys = jax.random.split(jax.random.key(7), 3)
    write = functools.partial(WAYS[way], seed=6, form=form)

    def rows(some):
        return write(first[some], **({"key": keys[some]} if way == "sample" else {}))

    found = rows(slice(None))
    singles = [rows(slice(i, i + 1)) for i in range(3)]
    others = [jax.tree.map(lambda *x: jnp.concatenate(x), *singles)]
    with jax.disable_jit():
        others.append(rows(slice(None)))
    for other in others:
        np.testing.assert_array_equal(other.ids, found.ids)
        np.testing.assert_allclose(other.log_probability, found.log_probability, **ROUNDING)
        np.testing.assert_array_equal(other.ended, found.ended)


def test_states_are_any_tree():
    """Each beam keeps its own state when beams change places."""
    w = {name: jnp.asarray(x, jnp.float32) for name, x in weights(0).items()}

    def step(state, ids):
        new, _ = network_step(w, 0.0)(state["h"], ids)
        words = jax.lax.dynamic_update_index_in_dim(
            state["words"], ids[:, None], state["place"][0], axis=1
        )
        # Nothing but the words that were read leads to the logits.
        seen = jnp.take(w["words"], words, axis=0).sum((1, 2))
        state = {"h": new, "words": words, "place": state["place"] + 1}
        return state, seen[:, None] * jnp.sin(jnp.arange(VOCABULARY) * seen[:, None])

    first = images(3)
    state = {"h": first, "words": jnp.zeros((3, 7), jnp.int32), "place": jnp.zeros(3, jnp.int32)}
    found = decoding.beam_search(step, state, FORM, beams=3)

    def total(row):
        end = row.index(END)
        log_p = 0.0
        for place in range(end):
            words = np.zeros(7, int)
            words[: place + 1] = row[: place + 1]
            seen = np.float32(weights(0)["words"].astype(np.float32)[words].sum())
            logits = np.float64(seen * np.sin(np.arange(VOCABULARY) * seen))
            log_p += logits[row[place + 1]] - np.log(np.exp(logits).sum())
        return log_p

    own = [total(row) for row in found.ids.tolist()]
    # float32 sines of numbers of order 30.
    np.testing.assert_allclose(found.log_probability, own, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Format(1, 2, 0, 2), r"context is 2: start, one word and end need at least 3"),
        (lambda: Format(1, 1, 0, 5), r"the end 1 must be an id that may be written; start is 1"),
        (lambda: Format(1, 2, 0, 5, (2,)), r"the end 2 must be .* never \(2,\)"),
        (lambda: beam_search(ROWS, beams=0), r"beams must be a positive integer, got 0"),
        (lambda: beam_search(ROWS, beams=-1), r"beams must be a positive integer, got -1"),
        (lambda: sample(ROWS, key=KEY, temperature=0.0), r"above 0, got 0.0; see greedy for 0"),
        (lambda: sample(ROWS, key=KEY, temperature=float("nan")), r"must be above 0, got nan"),
        (lambda: sample(ROWS, key=KEY, top_k=0), r"top_k must be a positive integer, got 0"),
        (lambda: sample(ROWS, key=KEY, top_p=0.0), r"top_p must be above 0 and at most 1, got 0"),
        (lambda: sample(ROWS, key=KEY, top_p=1.5), r"top_p must be .* at most 1, got 1.5"),
        (
            lambda: sample(ROWS, key=jax.random.split(KEY, 3)),
            r"3 keys for 2 captions: give one key, or one for each",
        ),
    ],
)
def test_settings_that_do_not_fit(call, match):
    with pytest.raises(ValueError, match=match):
        call()


ROWS = np.zeros((2, 4), np.float32)
KEY = jax.random.key(0)
