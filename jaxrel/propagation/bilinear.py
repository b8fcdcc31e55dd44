"""Any operation that is linear in its input and in its weight: what a rule works with."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array


class Bilinear:
    """z = op(x, w): a matrix product, an einsum, a convolution, at either operand position.

    Attributes:
      nonneg: x is known to be >= 0 (it comes from a ReLU, say), which halves the work of rules
        that treat signs apart.
      relu_after: only a ReLU reads the output, so no relevance comes back to z < 0.
      present: 1 where x holds the input, 0 where a constant was put in, such as zeros around an
        image; None if x holds nothing else.
    """

    def __init__(
        self,
        function: Callable[[Array, Array], Array],
        x: Any,
        *,
        transposable: Callable[[Array, Array], Array] | None = None,
        nonneg: bool = False,
        relu_after: bool = False,
        present: Any = None,
    ) -> None:
        """`function` without its bias; `x` an array or a ShapeDtypeStruct of the input.

        `transposable` is the same function in a form that is cheaper to transpose.
        """
        self._function = function
        self._transposable = transposable or function
        # Itself, for its type: an array's sharding is part of that.
        self._x = x
        self.nonneg = nonneg
        self.relu_after = relu_after
        self.present = present

    def __call__(self, x: Array, w: Array) -> Array:
        """The operation, without its bias."""
        return self._function(x, w)

    def T(self, w: Array, s: Array) -> Array:
        """The transpose in x: sum_j w_ij s_j, in the shape of x."""
        dtypes = []

        def function(x: Array) -> Array:
            z = self._transposable(x, w)
            dtypes.append(z.dtype)
            return z

        transpose = jax.linear_transpose(function, self._x)
        return transpose(s.astype(dtypes[0]))[0]

    def ones(self, x: Array) -> Array:
        """1 at every place of x that holds the input, 0 at constants beside it."""
        return jnp.ones_like(x) if self.present is None else self.present.astype(x.dtype)

    def swapped(self, w: Any) -> "Bilinear":
        """The same operation read the other way: the weight is the input, x the weight."""
        return Bilinear(lambda w, x: self._function(x, w), w)
