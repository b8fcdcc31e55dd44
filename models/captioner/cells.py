"""Recurrent cells of captioners: the LSTM, and one step of each of the three captioners.

A cell begins with `start`, which computes what every step reads of the image, and is then
called once per word. Its gates, attention maps and sums are written as the explanation of Sun et
al. 2022 takes them apart: each linear map of [x; h] is one product with one bias, and so each
pre-activation is one sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxrel import tag
from jaxrel.models.captioner.config import CaptionerConfig

# The state of an LSTM: hidden and cell values, [batch, hidden] each.
LSTMState = tuple[Array, Array]


class Context(NamedTuple):
    """What every step reads of an image.

    Attributes:
      image: the whole image, part of each step's input.
      keys: keys of each position, for the attention scores.
      values: values of each position, which attention averages.
    """

    image: Float[Array, "batch width"]
    keys: Float[Array, "batch positions keys"]
    values: Float[Array, "batch positions hidden"]


class Read(NamedTuple):
    """What a step gives: the next word is predicted from the sum of the first two.

    Attributes:
      attended: values from attention, with the sentinel or behind the gate.
      hidden: hidden values of the last LSTM.
      maps: "attention" [batch, heads, positions], whose rows sum to 1, and of a cell with a
        sentinel its weight, "sentinel" [batch]; float32.
    """

    attended: Float[Array, "*batch hidden"]
    hidden: Float[Array, "*batch hidden"]
    maps: dict[str, Array]


def uniform(limit: float) -> Callable[..., Array]:
    """Initial values from -limit to limit."""

    def draw(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def linear(
    inputs: int,
    outputs: int,
    *,
    limit: float | None = None,
    use_bias: bool = True,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear map whose initial weights and biases are uniform within 1/sqrt(inputs)."""
    draw = uniform(inputs**-0.5 if limit is None else limit)
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=draw,
        bias_init=draw,
        use_bias=use_bias,
        dtype=dtype,
        rngs=rngs,
    )


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Drop values with probability `rate` and scale the others up; without a key, nothing."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class LSTM(nnx.Module):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    The gates i, f, g, o are one linear map of [x; h], in this order.

    Args:
      inputs: features of x.
      hidden: features of h and c.
      dtype: dtype of the computation; the cell's values are float32.
      rngs: keys for the initial parameters (stream "params").
    """

    def __init__(self, inputs: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.gates = linear(inputs + hidden, 4 * hidden, limit=hidden**-0.5, dtype=dtype, rngs=rngs)

    def zeros(self, batch: int) -> LSTMState:
        """Return the state before the first step."""
        shape = (batch, self.hidden)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, jnp.float32)

    def __call__(self, state: LSTMState, x: Float[Array, "batch inputs"]) -> LSTMState:
        """Return the next state."""
        hidden, cell = state
        gates = self.gates(jnp.concatenate([x, hidden], axis=-1))
        i, f, g, o = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(self.dtype), cell


class SentinelLSTM(nnx.Module):
    """An LSTM with a visual sentinel (Lu et al. 2017, eq. 9 and 10)."""

    def __init__(self, inputs: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.lstm = LSTM(inputs, hidden, dtype=dtype, rngs=rngs)
        self.gate = linear(inputs + hidden, hidden, limit=hidden**-0.5, dtype=dtype, rngs=rngs)

    def __call__(
        self, state: LSTMState, x: Float[Array, "batch inputs"]
    ) -> tuple[LSTMState, Float[Array, "batch hidden"]]:
        """Return the next state and the sentinel; its gate reads the hidden values before."""
        gate = jax.nn.sigmoid(self.gate(jnp.concatenate([x, state[0]], axis=-1)))
        state = self.lstm(state, x)
        return state, (gate * jnp.tanh(state[1])).astype(self.lstm.dtype)


def _mean_width(config: CaptionerConfig) -> int:
    """The width of the mean that `start` is given: regions are projected before it is taken."""
    return config.hidden if config.encoder is None else config.features


class AdaptiveAttention(nnx.Module):
    """Attention to the positions and to the sentinel (Lu et al. 2017, eq. 6 to 8 and 11 to 13).

    Position k has the score w tanh(W_v v_k + b + u) with u = W_g h, and its keys are
    W_v v_k + b. There are as many hidden units as positions. In the form "as coded", that of the
    reference implementation of Sun et al. 2022, the scores are w tanh(W_v v_k + b + u_k 1): one
    component of u is added to all units of one position. Weights that were trained with one form
    do not fit the other.
    """

    def __init__(self, config: CaptionerConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.form = config.attention
        positions, hidden = config.positions, config.hidden
        self.image = linear(hidden, positions, dtype=dtype, rngs=rngs)
        self.sentinel = linear(hidden, positions, dtype=dtype, rngs=rngs)
        self.hidden = linear(hidden, positions, use_bias=False, dtype=dtype, rngs=rngs)
        self.score = linear(positions, 1, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        context: Context,
        hidden: Float[Array, "batch hidden"],
        sentinel: Float[Array, "batch hidden"],
    ) -> tuple[Float[Array, "batch hidden"], dict[str, Array]]:
        """Return the mix of the positions' values and of the sentinel, and the maps."""
        u = self.hidden(hidden)
        beside = u[:, None, :] if self.form == "paper" else u[:, :, None]
        scores = self.score(jnp.tanh(context.keys + beside))[..., 0].astype(jnp.float32)
        of_sentinel = self.score(jnp.tanh(self.sentinel(sentinel) + u)).astype(jnp.float32)
        attention = tag(jax.nn.softmax(scores, axis=-1), "attention")
        both = jnp.concatenate([scores, of_sentinel], axis=-1)
        weight = tag(jax.nn.softmax(both, axis=-1)[:, -1], "sentinel")
        values = context.values
        found = jnp.einsum("bp,bph->bh", attention.astype(values.dtype), values)
        beta = weight[:, None].astype(values.dtype)
        mixed = beta * sentinel + (1 - beta) * found
        return mixed, {"attention": attention[:, None], "sentinel": weight}


class AdaptiveCell(nnx.Module):
    """Adaptive attention after one LSTM (Lu et al. 2017).

    Args:
      config: the sizes of the captioner.
      dtype: dtype of the computation.
      rngs: keys for the initial parameters (stream "params").
    """

    def __init__(self, config: CaptionerConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        embed, hidden = config.embed, config.hidden
        self.image = linear(_mean_width(config), embed, dtype=dtype, rngs=rngs)
        self.lstm = SentinelLSTM(2 * embed, hidden, dtype=dtype, rngs=rngs)
        self.attention = AdaptiveAttention(config, dtype=dtype, rngs=rngs)

    def start(
        self, values: Float[Array, "batch positions hidden"], mean: Float[Array, "batch width"]
    ) -> tuple[Context, LSTMState]:
        """Return what every step reads, and the state before the first.

        Args:
          values: the projected features of each position.
          mean: mean of the features over the positions.
        """
        context = Context(jax.nn.relu(self.image(mean)), self.attention.image(values), values)
        return context, self.lstm.lstm.zeros(len(values))

    def __call__(
        self,
        context: Context,
        state: LSTMState,
        word: Float[Array, "batch embed"],
        key: PRNGKeyArray | None = None,
    ) -> tuple[LSTMState, Read]:
        """Read one word; there is no dropout inside, and no key is needed."""
        x = jnp.concatenate([word, context.image], axis=-1)
        state, sentinel = self.lstm(state, x)
        attended, maps = self.attention(context, state[0], sentinel)
        return state, Read(attended, state[0], maps)


class GridTDCell(nnx.Module):
    """Adaptive attention between two LSTMs, top-down ("Ada-LSTM" of Sun et al. 2022).

    The order of the LSTMs is that of Anderson et al. 2018. Arguments as of `AdaptiveCell`.
    """

    def __init__(self, config: CaptionerConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        embed, hidden = config.embed, config.hidden
        self.image = linear(_mean_width(config), embed, dtype=dtype, rngs=rngs)
        self.lstm = SentinelLSTM(hidden + 2 * embed, hidden, dtype=dtype, rngs=rngs)
        self.attention = AdaptiveAttention(config, dtype=dtype, rngs=rngs)
        self.language = LSTM(2 * hidden, hidden, dtype=dtype, rngs=rngs)

    def start(
        self, values: Float[Array, "batch positions hidden"], mean: Float[Array, "batch width"]
    ) -> tuple[Context, tuple[LSTMState, LSTMState]]:
        """See `AdaptiveCell.start`."""
        context = Context(jax.nn.relu(self.image(mean)), self.attention.image(values), values)
        return context, (self.lstm.lstm.zeros(len(values)), self.language.zeros(len(values)))

    def __call__(
        self,
        context: Context,
        state: tuple[LSTMState, LSTMState],
        word: Float[Array, "batch embed"],
        key: PRNGKeyArray | None = None,
    ) -> tuple[tuple[LSTMState, LSTMState], Read]:
        """Read one word; there is no dropout inside, and no key is needed."""
        first, second = state
        x = jnp.concatenate([second[0], context.image, word], axis=-1)
        first, sentinel = self.lstm(first, x)
        attended, maps = self.attention(context, first[0], sentinel)
        second = self.language(second, jnp.concatenate([attended, first[0]], axis=-1))
        return (first, second), Read(attended, second[0], maps)


class AoACell(nnx.Module):
    """Multi-head attention behind an attention-on-attention gate, after one LSTM.

    It is "MH-FC" of Sun et al. 2022; the gate is that of Huang et al. 2019, with a linear map of
    the attended values alone. Arguments as of `AdaptiveCell`.
    """

    def __init__(self, config: CaptionerConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        hidden = config.hidden
        self.lstm = LSTM(config.embed + hidden, hidden, dtype=dtype, rngs=rngs)
        self.query = linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.key = linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.value = linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.out = linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.gate = linear(hidden, hidden, dtype=dtype, rngs=rngs)

    def start(
        self,
        values: Float[Array, "batch positions hidden"],
        mean: Float[Array, "batch hidden"],
        heads: Bool[Array, "batch heads"] | None = None,
    ) -> tuple[Context, LSTMState]:
        """See `AdaptiveCell.start`; `mean` is that of `values`.

        Args:
          values: the projected features of each position.
          mean: their mean over the positions.
          heads: those whose values have a gradient or relevance; None: all.
        """
        projected = self.value(values)
        if heads is not None:
            by_head = projected.reshape(*projected.shape[:-1], self.heads, -1)
            chosen = jnp.where(heads[:, None, :, None], by_head, jax.lax.stop_gradient(by_head))
            projected = chosen.reshape(projected.shape)
        return Context(mean, self.key(values), projected), self.lstm.zeros(len(values))

    def __call__(
        self,
        context: Context,
        state: LSTMState,
        word: Float[Array, "batch embed"],
        key: PRNGKeyArray | None = None,
    ) -> tuple[LSTMState, Read]:
        """Read one word; with a key, attention has dropout."""
        state = self.lstm(state, jnp.concatenate([word, context.image], axis=-1))
        query, keys, values = (
            x.reshape(*x.shape[:-1], self.heads, -1)
            for x in (self.query(state[0]), context.keys, context.values)
        )
        scores = jnp.einsum("bkd,bpkd->bkp", query, keys, preferred_element_type=jnp.float32)
        maps = tag(jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1), "attention")
        kept = dropout(maps, self.attention_dropout, key).astype(values.dtype)
        found = jnp.einsum("bkp,bpkd->bkd", kept, values).reshape(len(word), -1)
        attended = jax.nn.sigmoid(self.gate(state[0])) * self.out(found)
        return state, Read(attended, state[0], {"attention": maps})


CELLS: dict[str, type[AdaptiveCell | GridTDCell | AoACell]] = {
    "adaptive": AdaptiveCell,
    "gridtd": GridTDCell,
    "aoa": AoACell,
}
