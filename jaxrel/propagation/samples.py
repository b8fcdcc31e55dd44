"""An elementwise function of one value, evaluated at a few numbers: is it an activation?"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.propagation.operations import run
from jaxrel.tracing.facts import is_elementwise
from jaxrel.tracing.graph import Atom, Constant, Node, Value, identity
from jaxrel.tracing.primitives import COMPARISONS, CUSTOM_JVP, MOVES, same_as
from jaxrel.tracing.repeats import wired

_POINTS = (-1e4, -5e3, -40, -20, -2, -0.5, 0, 0.5, 2, 20, 40, 5e3, 1e4)
_ZERO = _POINTS.index(0)


class Samples:
    """f at a few points, for two choices of the arrays in it whose values are not known."""

    def __init__(
        self,
        producers: Mapping[Value, Node],
        start: Value,
        out: Value,
        known: dict[Any, list[np.ndarray]] | None = None,
    ):
        """`known` are the values of functions evaluated before, which an equal one takes over."""
        self._producers, self._start, self._out = producers, start, out
        self._known = {} if known is None else known

    @functools.cached_property
    def keeps_zero(self) -> bool:
        """Whether f(0) = 0, up to rounding."""
        near = 8 * float(jnp.finfo(self._start.aval.dtype).eps)
        # Beside f(0) those at -0.5 and 0.5 give the size.
        around = slice(_ZERO - 1, _ZERO + 2)
        sizes = (np.abs(y[around]) for y in self._values)
        return all(near_by[1] <= near * min(np.nanmax(near_by), 1e30) for near_by in sizes)

    @functools.cached_property
    def is_activation(self) -> bool:
        """Whether relevance can pass f unchanged: f(0) = 0, or f squashes.

        What is not 0 at 0 may rise or fall from one limit to another, as a sigmoid does; a smooth
        ReLU or an exponential has more relevance near 0 than x can hold. What is huge near 0 is a
        mask.
        """
        near = slice(_POINTS.index(-2), _POINTS.index(2) + 1)
        if any(np.nanmax(np.abs(y[near])) > 1e6 for y in self._values):
            return False
        return self.keeps_zero or all(_gentle(y) and _is_flat(y) for y in self._computable)

    @functools.cached_property
    def is_gate(self) -> bool:
        """Whether f rises or falls between 0 and another limit, as a sigmoid does."""
        return all(map(_between_limits, self._computable))

    @property
    def _computable(self) -> list[np.ndarray]:
        """f without what is no number far from 0, where an exponential overflows."""
        return [y[(np.abs(_POINTS) < 100) | ~np.isnan(y)] for y in self._values]

    @functools.cached_property
    def _values(self) -> list[np.ndarray]:
        key = self._key()
        if key not in self._known:
            self._known[key] = self._computed()
        return self._known[key]

    def _key(self) -> Any:
        """What two functions have in common that are one; itself, if that cannot be told."""
        place: dict[Value, int] = {self._start: 0}
        parts: list[Any] = [self._start.aval.dtype]

        def read(atom: Atom) -> Any:
            if isinstance(atom, Constant):
                return identity(atom)
            if atom not in place:
                node = self._producers.get(atom)
                part: Any = (atom.aval.dtype,)
                if node is not None and _is_inside(node):
                    part = (_same(node), *map(read, node.ins))
                parts.append(part)
                place[atom] = len(place)
            return place[atom]

        parts.append(read(self._out))
        plain = all(part[0] is not None for part in parts[1:-1])
        return tuple(parts) if plain else self

    def _computed(self) -> list[np.ndarray]:
        with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
            # As one program: each operation by itself would be one to compile.
            return [np.asarray(y, np.float64) for y in jax.jit(self._evaluated)()]

    def _evaluated(self) -> list[Any]:
        found = []
        for number in (0.37, 1.3):
            filled: list[Atom] = []
            env: dict[Value, Any] = {self._start: jnp.asarray(_POINTS, self._start.aval.dtype)}
            fill = functools.partial(_filled, number=number, filled=filled)
            found.append(self._value(self._out, env, fill))
            if not filled:
                break
        return found

    def _value(self, atom: Atom, env: dict[Value, Any], fill: Callable[[Value], Any]) -> Any:
        if isinstance(atom, Constant):
            return atom.value
        if atom in env:
            return env[atom]
        node = self._producers.get(atom)
        if node is not None and _is_pointwise(node):
            ins = [self._value(one, env, fill) for one in node.ins]
            if any(np.shape(x) for x in ins):
                # Scalars beside arrays are there for some operations only.
                ins = [jnp.broadcast_to(jnp.asarray(x), (len(_POINTS),)) for x in ins]
            values = {
                one: x for one, x in zip(node.ins, ins, strict=True) if isinstance(one, Value)
            }
            env[atom] = run([node], values, opened=True)[atom]
        elif node is not None and node.name in MOVES and node.ins[0].shape == ():
            env[atom] = jnp.asarray(self._value(node.ins[0], env, fill))
        else:
            env[atom] = fill(atom)
        return env[atom]


def _same(node: Node) -> Any:
    """What operations have in common that are one function, whatever its derivative; or None."""
    if node.name not in CUSTOM_JVP:
        return same_as(node.equation)
    (body,) = node.bodies
    keys = [_same(inner) for inner in body.nodes]
    if body.constants or None in keys:
        return None
    form, place = wired(body.nodes, keys, lambda inner: inner.ins, body.ins)
    return form, *(place[a] if isinstance(a, Value) else identity(a) for a in body.outs)


def _is_pointwise(node: Node) -> bool:
    return is_elementwise(node) or node.name in COMPARISONS


def _is_inside(node: Node) -> bool:
    """Whether a node is part of the function, not one of the arrays that it reads."""
    return _is_pointwise(node) or (node.name in MOVES and node.ins[0].shape == ())


def _filled(value: Value, number: float, filled: list[Atom]) -> Any:
    filled.append(value)
    dtype = value.aval.dtype
    x = number < 1 if dtype.kind == "b" else number
    return jnp.full((len(_POINTS),), x, dtype)


def _gentle(y: np.ndarray) -> bool:
    """Whether y only rises or only falls, and grows at most in proportion to x."""
    if np.isnan(y).any() or not np.all(np.isfinite(y)):
        return False
    steps = np.diff(y)
    least = 1e-3 * np.max(np.abs(y))
    one_way = np.all(steps >= -least) or np.all(steps <= least)
    middle = y[len(y) // 2]
    ends = ((0, 1), (-1, -2))
    return bool(one_way) and all(
        abs(y[a] - middle) <= 2.05 * abs(y[b] - middle) + least for a, b in ends
    )


def _between_limits(y: np.ndarray) -> bool:
    if not _gentle(y):
        return False
    least = 1e-3 * np.max(np.abs(y))
    ends = sorted((abs(y[0]), abs(y[-1])))
    return bool(_is_flat(y) and ends[0] <= least < ends[1])


def _is_flat(y: np.ndarray) -> bool:
    """Whether y has a limit on both sides."""
    least = 1e-3 * np.nanmax(np.abs(y))
    return bool(abs(y[0] - y[1]) <= least and abs(y[-1] - y[-2]) <= least)
