"""The optimiser of the recipes: AdamW, a learning rate per part, and the names of parameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax import numpy as jnp
from jaxtyping import PyTree


def warmup_cosine(learning_rate: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """A learning rate that rises from 0 in a line, and falls to 0 as a cosine.

    Args:
      learning_rate: the highest.
      steps: number of steps in all.
      warmup: steps until the highest, at most half of all.

    Raises:
      ValueError: a number is out of range.
    """
    if steps < 1 or warmup < 0 or not 0 < learning_rate < math.inf:
        raise ValueError(
            "learning_rate must be positive, steps at least 1 and warmup at least 0, got "
            f"{learning_rate}, {steps} and {warmup}"
        )
    warmup = min(warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    clamp: float = math.inf,
    b1: float = 0.9,
    b2: float = 0.999,
    factors: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) with a learning rate per part of the model.

    Only matrices decay: arrays of two or more axes that are not named "bias" or "scale", since
    in layers stacked for a scan these have two axes as well.

    Args:
      learning_rate: a number or a schedule, such as `warmup_cosine`.
      weight_decay: of matrices, times the learning rate.
      clip: largest norm of the gradient of all that is trained; None for none.
      clamp: largest size of each component of the gradient, before `clip`; inf for none.
      b1: decay of the first moment.
      b2: decay of the second moment.
      factors: of the learning rate, by the beginning of the parameters' path: {"clip": 0.1}
        or {"clip/text": 0.0}. The longest that fits counts; 0 freezes, without optimiser state.

    Raises:
      ValueError: a factor is negative or not finite, the clamp is not positive, or, when the
        optimiser is initialised, no parameter is where a factor points.
    """
    if not clamp > 0:
        raise ValueError(f"clamp must be positive, got {clamp}")
    given = dict(factors or {})
    for prefix, value in given.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"the factor of {prefix!r} must be 0 or more, got {value}")

    def factor(name: str) -> float:
        fitting = [prefix for prefix in given if f"{name}/".startswith(f"{prefix}/")]
        return given[max(fitting, key=len)] if fitting else 1.0

    def each(function: Callable[[str, Any], Any]) -> Callable[[PyTree], PyTree]:
        return lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, x: function(leaf_name(path), x), tree
        )

    def decays(name: str, x: Any) -> bool:
        return x.ndim > 1 and name.split("/")[-1] not in ("bias", "scale") and factor(name) > 0

    scaled = each(lambda name, x: x * factor(name))
    chain = optax.chain(
        # First of all, so that what is frozen does not count in the norm and XLA can leave out
        # its backward pass.
        optax.masked(optax.set_to_zero(), each(lambda name, x: factor(name) == 0)),
        _bounded(clip, clamp),
        optax.masked(optax.scale_by_adam(b1=b1, b2=b2), each(lambda name, x: factor(name) > 0)),
        optax.add_decayed_weights(weight_decay, mask=each(decays)),
        optax.stateless(lambda updates, params: scaled(updates)),
        optax.scale_by_learning_rate(learning_rate),
    )

    def init(params: PyTree) -> Any:
        names = list(named(params))
        for prefix in given:
            if not any(f"{name}/".startswith(f"{prefix}/") for name in names):
                tops = ", ".join(sorted({name.split("/")[0] for name in names}))
                raise ValueError(
                    f"no parameter is in {prefix!r}, which has a factor of the learning rate; the "
                    f"model's parts are {tops}"
                )
        return chain.init(params)

    return optax.GradientTransformation(init, chain.update)


def _bounded(clip: float | None, clamp: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.identity() if clamp == math.inf else optax.clip(clamp),
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
    )


def leaf_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf, "clip/text/projection/kernel": an nnx.Variable adds nothing to it."""
    variable = jax.tree_util.GetAttrKey("value")
    path = tuple(part for part in path if part != variable)
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their name, in the tree's order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_float32(tree: PyTree, what: str, integers: bool = False) -> None:
    """Refuse leaves that an optimiser should not train.

    Args:
      tree: of arrays.
      what: they are, for the message.
      integers: True lets integers pass: an optimiser's counts.

    Raises:
      ValueError: a leaf has another dtype.
    """
    for name, leaf in named(tree).items():
        dtype = jnp.result_type(leaf)
        if dtype == jnp.float32 or (integers and jnp.issubdtype(dtype, jnp.integer)):
            continue
        raise ValueError(
            f"{what} must be float32 (bfloat16 is for the computation alone), but {name} is "
            f"{dtype}; split off what is not trained, with nnx.split(model, nnx.Param, ...)"
        )
