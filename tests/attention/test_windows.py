"""Attention in windows, rows and chunks, held to the block-diagonal map of all tokens, by hand."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxrel import attention

BATCH, SIDE, WIDTH, HEADS = 2, 4, 6, 2
TOKENS = SIDE * SIDE
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, TOKENS, WIDTH))
W = RNG.normal(size=(8, WIDTH, WIDTH)) * 0.5
ROW, COLUMN = np.divmod(np.arange(TOKENS), SIDE)
# float64 rounding of two ways to compute one function.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def heads_apart(x):
    return jnp.moveaxis(x.reshape(*x.shape[:-1], HEADS, -1), -2, -3)


def attend(h, i, bias=0.0):
    """Attention within the last axis but one, whatever stands before it."""
    q, k, v = (heads_apart(h @ w) for w in W[i : i + 3])
    attn = jax.nn.softmax(q @ k.swapaxes(-1, -2) + bias)
    return jnp.moveaxis(attn @ v, -3, -2).reshape(h.shape) @ W[i + 3]


def grid(x):
    return x.reshape(-1, SIDE, SIDE, WIDTH)


def windows(h, size):
    """A grid [batch, rows, columns, width] as [batch * windows, tokens, width], as Swin does."""
    b, rows, columns, width = h.shape
    h = h.reshape(b, rows // size, size, columns // size, size, width)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size * size, width)


def windows_back(h, size, side):
    h = h.reshape(-1, side // size, side // size, size, size, WIDTH)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, WIDTH)


def swin(x, i, shift=0):
    h = jnp.roll(grid(x), (-shift, -shift), (1, 2))
    bias = 0.0
    if shift:
        # What the shift brings together from two sides of the image does not attend.
        cell = np.digitize(np.arange(SIDE), [SIDE - 2, SIDE - shift])
        cell = windows((cell[:, None] * 3 + cell)[None, ..., None] * np.ones(WIDTH), 2)[..., 0]
        bias = np.where(cell[:, :, None] == cell[:, None], 0, -1e9)[:, None]
        bias = np.tile(bias, (len(h), 1, 1, 1))
    h = windows_back(attend(windows(h, 2), i, bias), 2, SIDE)
    return jnp.roll(h, (shift, shift), (1, 2)).reshape(x.shape)


def padded(x, i):
    h = jnp.pad(grid(x), ((0, 0), (0, 2), (0, 2), (0, 0)))
    seen = jnp.pad(jnp.ones((1, SIDE, SIDE, WIDTH)), ((0, 0), (0, 2), (0, 2), (0, 0)))
    seen = jnp.tile(windows(seen, 3)[..., 0], (len(h), 1))
    h = attend(windows(h, 3), i, jnp.where(seen[:, None, None] == 1, 0, -1e9))
    return windows_back(h, 3, 6)[:, :SIDE, :SIDE].reshape(x.shape)


def in_a_row(x, i):
    """Windows of 4 of a sequence on an axis of their own, not folded with the examples."""
    return attend(x.reshape(-1, 4, 4, WIDTH), i).reshape(x.shape)


def shifted_in_a_row(x, i):
    return jnp.roll(in_a_row(jnp.roll(x, -3, 1), i), 3, 1)


def rows(x, i):
    return attend(grid(x).reshape(-1, SIDE, WIDTH), i).reshape(x.shape)


def columns(x, i):
    return attend(grid(x).swapaxes(1, 2), i).swapaxes(1, 2).reshape(x.shape)


def strided(x, i):
    """Every other token of the grid, as MaxViT's grid attention has it."""
    h = grid(x).reshape(-1, 2, 2, 2, 2, WIDTH).transpose(0, 2, 4, 1, 3, 5)
    h = attend(h.reshape(-1, 4, 4, WIDTH), i).reshape(-1, 2, 2, 2, 2, WIDTH)
    return h.transpose(0, 3, 1, 4, 2, 5).reshape(x.shape)


def one_by_one(x, i):
    h = jnp.moveaxis(x.reshape(-1, 4, 4, WIDTH), 1, 0)
    return jnp.moveaxis(lax.map(lambda h: attend(h, i), h), 0, 1).reshape(x.shape)


def chunks_of_queries(x, i):
    q, k, v = (heads_apart(x @ w) for w in W[i : i + 3])
    q = jnp.moveaxis(q.reshape(*q.shape[:2], 4, 4, -1), 2, 0)
    out = lax.map(lambda q: jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v, q)
    out = jnp.moveaxis(out, 0, 2).reshape(*k.shape)
    return jnp.moveaxis(out, 1, 2).reshape(x.shape) @ W[i + 3]


def turned(x, i):
    return jnp.roll(attend(jnp.roll(x, 5, 1), i), -5, 1)


def turned_keys(x, i):
    q, k, v = (heads_apart(x @ w) for w in W[i : i + 3])
    k, v = (jnp.concatenate([z[:, :, 5:], z[:, :, :5]], 2) for z in (k, v))
    out = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
    return jnp.moveaxis(out, 1, 2).reshape(x.shape) @ W[i + 3]


def reversed_order(x, i):
    return attend(x[:, ::-1], i)[:, ::-1]


ORDER = np.random.default_rng(1).permutation(TOKENS)


def picked(x, i):
    """Windows of tokens that constant indices pick."""
    h = attend(x[:, ORDER.reshape(4, 4)], i)
    return h.reshape(x.shape)[:, np.argsort(ORDER)]


def taken(x, i):
    h = attend(jnp.take(x, jnp.asarray(ORDER), axis=1), i)
    return jnp.take(h, np.argsort(ORDER), axis=1)


def whole(x, i):
    return attend(x, i)


def alike(*groups):
    return np.all([group[:, None] == group for group in groups], 0)


# Each way of attending, with which token sees which.
SEEN = {
    swin: alike(ROW // 2, COLUMN // 2),
    padded: alike(ROW // 3, COLUMN // 3),
    in_a_row: alike(np.arange(TOKENS) // 4),
    shifted_in_a_row: alike((np.arange(TOKENS) - 3) % TOKENS // 4),
    rows: alike(ROW),
    columns: alike(COLUMN),
    strided: alike(ROW % 2, COLUMN % 2),
    one_by_one: alike(np.arange(TOKENS) // 4),
    chunks_of_queries: alike(),
    turned: alike(),
    turned_keys: alike(),
    reversed_order: alike(),
    picked: np.argsort(ORDER)[:, None] // 4 == np.argsort(ORDER) // 4,
    taken: alike(),
    whole: alike(),
}
SEEN = {one: seen & np.ones((TOKENS, TOKENS), bool) for one, seen in SEEN.items()}


def shifted_swin(x, i):
    return swin(x, i, shift=1)


# Shifted by one, with nothing wrapped around: cells of 1, 2 and 1 rows and columns.
SEEN[shifted_swin] = alike((ROW + 1) // 2, (COLUMN + 1) // 2)


def model_of(kinds):
    def model(x):
        for layer, attends in enumerate(kinds):
            x = x + attends(x, 4 * layer)
            x = x + jnp.tanh(x)
        return x[:, 5].sum(-1)

    return model


@functools.cache
def maps_by_hand(kinds):
    """From masked attention over all tokens: maps and values, and the gradients by them."""
    masks = [np.where(SEEN[one], 0, -np.inf) for one in kinds]

    def run(maps_zero, sums_zero):
        x, kept = jnp.asarray(X), []
        for layer, mask in enumerate(masks):
            i = 4 * layer
            q, k, v = (heads_apart(x @ w) for w in W[i : i + 3])
            attn = jax.nn.softmax(q @ k.swapaxes(-1, -2) + mask) + maps_zero[layer]
            after = jnp.moveaxis(attn @ v, 1, 2).reshape(x.shape) @ W[i + 3]
            kept.append((attn, x, after))
            x = x + after + sums_zero[layer]
            x = x + jnp.tanh(x)
        return x[:, 5].sum(), kept

    zeros = np.zeros((2, BATCH, HEADS, TOKENS, TOKENS)), np.zeros((2, *X.shape))
    _, kept = run(*zeros)
    return kept, *jax.grad(lambda *z: run(*z)[0], (0, 1))(*zeros)


def by_hand(kinds, method):
    """Relevance of all tokens for all."""
    kept, map_grads, sum_grads = maps_by_hand(kinds)
    result = np.tile(np.eye(TOKENS), (BATCH, 1, 1))
    for (attn, before, after), grad, at_sum in zip(kept, map_grads, sum_grads, strict=True):
        moved = np.maximum(attn * grad, 0).mean(1)
        u, v = (np.maximum(np.asarray(z * at_sum), 0).sum(-1)[..., None] for z in (before, after))
        if method == "equal":
            result = result + moved @ result
        elif method == "weighted":
            # The weights of a token that nothing is read from are 1.
            u, v = (np.where(u + v == 0, 1, z) for z in (u, v))
            result = (2 * u * result + 2 * v * (moved @ result)) / (u + v)
        elif method == "rollout":
            mixed = np.asarray(attn).mean(1) + np.eye(TOKENS)
            result = mixed / mixed.sum(-1, keepdims=True) @ result
        elif method == "raw":
            result = np.asarray(attn).mean(1)
        else:
            result = moved @ result
    return result


PAIRS = [
    (swin, shifted_swin),
    (padded, whole),
    (in_a_row, shifted_in_a_row),
    (rows, columns),
    (strided, swin),
    (one_by_one, whole),
    (chunks_of_queries, rows),
    (turned, turned_keys),
    (whole, reversed_order),
    (picked, taken),
]
NAMES = ["+".join(one.__name__ for one in pair) for pair in PAIRS]


@pytest.mark.parametrize("kinds", PAIRS, ids=NAMES)
def test_relevance_in_windows_is_that_of_all_tokens(kinds):
    (stack,) = attention.sites(model_of(kinds))(X)
    assert stack.is_self
    assert stack.sites[0].shape == (BATCH, HEADS, TOKENS, TOKENS)
    methods = ("equal", "weighted", "rollout", "raw", "no_aggregation")
    explain = attention.relevance(model_of(kinds), method=methods, target_token=None)
    got = jax.jit(explain)(X)
    for method in methods:
        np.testing.assert_allclose(got[method], by_hand(kinds, method), **CLOSE)


@pytest.mark.parametrize("kinds", PAIRS, ids=NAMES)
def test_windows_stream(kinds):
    """One row of it, carried along in the backward pass where no window is in a loop."""
    in_loop = bool({one_by_one, chunks_of_queries} & {*kinds})
    explain = attention.relevance(
        model_of(kinds), target_token=5, form="auto" if in_loop else "streaming"
    )
    np.testing.assert_allclose(jax.jit(explain)(X), by_hand(kinds, "weighted")[:, 5], **CLOSE)


@pytest.mark.parametrize("kinds", PAIRS[:1] + PAIRS[3:4] + PAIRS[7:8])
def test_windows_of_one_example(kinds):
    """Without a batch, and with a batch of one, each example has the relevance it has in two."""
    want = by_hand(kinds, "equal")[:, 5]
    model = model_of(kinds)
    alone = attention.relevance(lambda x: model(x[None])[0], method="equal", target_token=5)
    one = attention.relevance(model, method="equal", target_token=5)
    np.testing.assert_allclose(jax.jit(alone)(X[0])[0], want[0], **CLOSE)
    np.testing.assert_allclose(jax.jit(one)(X[1:])[0], want[1], **CLOSE)


def rolled_by_data(x, i):
    """Which tokens share a window is known when it runs."""
    shift = jnp.argmax(x[0, 0])
    return jnp.roll(in_a_row(jnp.roll(x, -shift, 1), i), shift, 1)


def sorted_by_data(x, i):
    order = jnp.argsort(x[0, :, 0])
    return attend(x[:, order], i)[:, jnp.argsort(order)]


def keys_of_two_windows(x, i):
    h = x.reshape(-1, 4, 4, WIDTH)
    before = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], 1)
    keys = jnp.concatenate([before, h], 2)
    q, k, v = (heads_apart(z @ w) for z, w in zip((h, keys, keys), W[i:], strict=False))
    out = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
    return jnp.moveaxis(out, -3, -2).reshape(x.shape) @ W[i + 3]


@pytest.mark.parametrize("attends", [rolled_by_data, sorted_by_data, keys_of_two_windows])
def test_windows_that_are_not_known_are_refused(attends):
    model = model_of([attends])
    for fun, x in ((model, X), (lambda x: model(x[None])[0], X[0])):
        with pytest.raises((NotImplementedError, ValueError)) as error:
            attention.relevance(fun, method="equal")(x)
        told = str(error.value)
        assert "which tokens these are is not known" in told or "no self-attention" in told, told


def test_a_stack_in_windows_says_so():
    (stack,) = attention.sites(model_of((swin, shifted_swin)))(X)
    assert "self-attention in windows, layers 2, batch 2, heads 2, queries 16, keys 16" in str(
        stack
    )


def test_heads_folded_with_examples():
    def folded(x):
        q, k, v = (heads_apart(x @ w).reshape(-1, TOKENS, WIDTH // HEADS) for w in W[:3])
        out = (jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v).reshape(-1, HEADS, TOKENS, 3)
        return (x + jnp.moveaxis(out, 1, 2).reshape(x.shape) @ W[3])[:, 5].sum(-1)

    got, want = (
        jax.jit(attention.relevance(fun, target_token=5))(X)
        for fun in (folded, lambda x: (x + whole(x, 0))[:, 5].sum(-1))
    )
    np.testing.assert_allclose(got, want, **CLOSE)


def test_a_stream_with_its_channels_first():
    def model(x):
        h = x.swapaxes(1, 2)
        h = h + whole(h.swapaxes(1, 2), 0).swapaxes(1, 2)
        return h[:, :, 5].sum(-1)

    got, want = (
        jax.jit(attention.relevance(fun, method="equal", target_token=5))(X)
        for fun in (model, lambda x: (x + whole(x, 0))[:, 5].sum(-1))
    )
    np.testing.assert_allclose(got, want, **CLOSE)
