"""What an entry of the zoo is: a model of another package, as small as that allows."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel import composites

BATCH = 2
CLASSES = 3


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its parameters and an input.

    `fun(params, x)` returns logits [batch, classes]. `x` holds images, tokens embedded or of
    integers, or the nodes of graphs; its first axis is the batch. `table` is, for integer tokens,
    the path in the parameters of what they look up.
    """

    fun: Callable[[Any, Any], Any]
    params: Any
    x: Any
    table: str | None = None


@dataclasses.dataclass(frozen=True)
class Attention:
    """What is known of a model's attention, by reading its source.

    Attributes:
      layers: how many layers the self-attention stack has.
      softmax: the function that computes the model's maps, as `module.name`.
      axes: the axes of the softmax's output; b, q and k are examples, queries and keys, all
        others are heads."""

    layers: int
    softmax: str = "jax.nn.softmax"
    axes: str = "bhqk"
    calls: tuple[int, ...] = ()
    others: int = 0
    dtype: str = "float64"


@dataclasses.dataclass(frozen=True)
class Slopes:
    """By which functions the model computes what CP-LRP holds constant, as `module.name`s.

    Attributes:
      constant: attention maps, gates, and what norms divide by.
      activations: what is f(x) / x times x.
      gate: what takes nothing of a product, see `rules.SignalTakesAll`.
    """

    constant: tuple[str, ...] = (
        "jax.nn.softmax",
        "jax.nn.sigmoid",
        "jax.lax.rsqrt",
        "jax.numpy.sqrt",
    )
    activations: tuple[str, ...] = (
        "jax.nn.relu",
        "jax.nn.gelu",
        "jax.nn.silu",
        "jax.nn.swish",
        "jax.nn.leaky_relu",
        "jax.nn.hard_silu",
        "jax.numpy.tanh",
    )
    gate: str = "activation"

    def plus(self, *names: str) -> "Slopes":
        """With more that is held constant: what are gates in some models."""
        others = tuple(name for name in self.activations if name not in names)
        return dataclasses.replace(self, constant=(*self.constant, *names), activations=others)

    def of(self, module: str) -> "Slopes":
        """For models that find all functions of `jax.nn` in another module too."""
        also = lambda names: [f"{module}.{n.split('.')[-1]}" for n in names if "jax.nn" in n]
        return Slopes(
            (*self.constant, *also(self.constant)), (*self.activations, *also(self.activations))
        )


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """One row of the table.

    Attributes:
      name: what the model is called.
      package: the distribution that it comes from.
      build: makes it, with random parameters.
      rules: the preset of `jaxrel.composites` that suits it.
      entries: what is put before the preset's own.
      attention: where its attention is; None for a model without.
      slopes: what CP-LRP holds constant in it; None where that cannot be told by functions.
      dtype: what it computes in.
      around: the context that the model must be built and called in.
    """

    name: str
    package: str
    build: Callable[[], Model]
    rules: str = "attn_lrp"
    entries: tuple = ()
    attention: Attention | None = None
    slopes: Slopes | None = Slopes()
    dtype: str = "float64"
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    @contextlib.contextmanager
    def world(self) -> Iterator[None]:
        """Where the model is built and looked at."""
        with jax.enable_x64(self.dtype == "float64"), self.around():
            yield

    @property
    def composite(self) -> composites.Composite:
        """The rules under which the model is explained."""
        return composites.Composite([*self.entries]) + getattr(composites, self.rules)()

    @property
    def version(self) -> str:
        """The version that is installed."""
        return importlib.metadata.version(self.package)

    @property
    def eps(self) -> float:
        """The rounding of one operation."""
        return float(jnp.finfo(self.dtype).eps)


def random_like(tree: Any, seed: int = 0) -> Any:
    """Parameters as they were made, with noise on all: none is zero, or the same as another."""
    rng, dtype = np.random.default_rng(seed), jnp.result_type(float)

    def noisy(path, leaf):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        values, name = np.asarray(leaf, np.float64), jax.tree_util.keystr(path)
        fan = max(values.shape[-1], values.size // values.shape[-1]) if values.ndim > 1 else 10
        noise = 0.3 * rng.normal(size=values.shape) / np.sqrt(fan)
        return jnp.asarray(values + (abs(noise) if "var" in name else noise), dtype)

    return jax.tree_util.tree_map_with_path(noisy, tree)


def normal(*shape: int, seed: int = 1) -> Any:
    """Random input."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def tokens(words: int, length: int) -> Any:
    """Random tokens, in each example all different; none is 0, as padding may be."""
    rng = np.random.default_rng(0)
    return jnp.asarray([rng.permutation(np.arange(1, words))[:length] for _ in range(BATCH)])
