"""Small transformers that know nothing of jaxrel, in the ways that models are written."""

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax import numpy as jnp

import jaxrel

LAYERS, BATCH, TOKENS, WIDTH, HEADS = 2, 2, 5, 8, 2
_rng = np.random.default_rng(0)
X = _rng.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
WEIGHTS = _rng.normal(size=(6, WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5


class Block(nnx.Module):
    """A pre-LN layer made of Flax's own parts; nothing in it knows of jaxrel."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + nnx.gelu(self.mlp(x))


class Unrolled(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x[:, 0].sum(-1)


MODEL = Unrolled(nnx.Rngs(0))


def stacked_blocks():
    parts = [nnx.split(block) for block in MODEL.blocks]
    graph = parts[0][0]
    return graph, jax.tree.map(lambda *xs: jnp.stack(xs), *[state for _, state in parts])


def scanned(x, *, remat=False):
    graph, states = stacked_blocks()
    step = lambda x, state: (nnx.merge(graph, state)(x), None)
    x, _ = lax.scan(jax.checkpoint(step) if remat else step, x, states)
    return x[:, 0].sum(-1)


def attend(x, i, memory=None, name=None):
    """Single-head attention of its own weights; `memory` makes it cross-attention."""
    keys = x if memory is None else memory
    attn = jax.nn.softmax((x @ WEIGHTS[i]) @ keys.swapaxes(-1, -2))
    return (jaxrel.tag(attn, name) if name else attn) @ keys
