"""What an entry of the zoo is, and random values for its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

BATCH = 2
CLASSES = 4

Family = Literal["rectifier", "attention", "recurrent"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with parameters and an input.

    `fun(params, x)` returns logits [batch, classes]. `family` says which composites suit it,
    `conserves` that no bias takes relevance from it. `forms` are other spellings of the same
    function of the same numbers: a name to (fun, params). `computes` is the dtype of the
    computation where it is not that of the input.
    """

    fun: Callable[[Any, Any], Any]
    params: Any
    x: Any
    family: Family
    conserves: bool = False
    forms: dict[str, tuple[Callable, Any]] = dataclasses.field(default_factory=dict)
    computes: Any = None

    @property
    def dtype(self):
        """The dtype that rounding errors come from."""
        return jnp.dtype(self.computes or self.x.dtype)


def generator(key):
    """NumPy's generator for a JAX key: random values without a compilation per shape."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def normal(rng, shape, dtype):
    return jnp.asarray(rng.normal(size=shape), dtype)


def filled(build, key, dtype, *, biased=True):
    """Build a module without running its initialisers, with random values for its parameters."""
    return with_random_values(nnx.eval_shape(build), key, dtype, biased=biased)


def with_random_values(module, key, dtype, *, biased=True):
    """Replace all parameters, the same for each dtype up to rounding.

    Without `biased`, all that adds a constant is zero: biases and running means.
    """
    rng = generator(key)
    offset = 0.1 if biased else 0.0

    def value(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        noise = rng.normal(size=leaf.shape)
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        name = names[-2] if names[-1] == "value" else names[-1]
        if name in ("bias", "mean"):
            return jnp.asarray(offset * noise, dtype)
        if name == "scale":
            return jnp.asarray(1 + 0.1 * noise, dtype)
        if name == "var":
            return jnp.asarray(rng.uniform(1, 3, leaf.shape), dtype)
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(noise * np.sqrt(2 / fan_in), dtype)

    return jax.tree_util.tree_map_with_path(value, module)


def call(module, x):
    """Apply a module: the `fun` of most cases."""
    return module(x)


def call_merged(module, x):
    """Apply a module that changes its own state: a copy made at the caller's trace level."""
    return jax.tree.map(lambda leaf: leaf, module)(x)
