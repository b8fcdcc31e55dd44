"""Composites: which rule goes where, and the presets of the literature.

A composite is an ordered list of (where, rule); the first entry that matches an operation, and
whose rule is for that kind of operation, decides. `Composite([...]) + preset()` puts one's own
entries first.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxrel.propagation.rules import (
    KINDS,
    AlphaBeta,
    BetaSmooth,
    Deconvnet,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Guided,
    Pass,
    Rule,
    SignalTakesAll,
    Stop,
    Uniform,
    ZAbsolute,
    ZBox,
    ZPlus,
    where_zero,
)


class Where:
    """A condition on an operation; combine conditions with `&`, `|` and `~`."""

    def __call__(self, operation: Any) -> bool:
        """Whether the operation is meant."""
        raise NotImplementedError

    def parts(self) -> tuple["Where", ...]:
        """The conditions this one is made of, itself first."""
        inner = [one for one in vars(self).values() if isinstance(one, Where)]
        return (self, *(part for one in inner for part in one.parts()))

    def __and__(self, other: "Where") -> "Where":
        return All(self, other)

    def __or__(self, other: "Where") -> "Where":
        return Any_(self, other)

    def __invert__(self) -> "Where":
        return Not(self)


@dataclasses.dataclass(frozen=True)
class All(Where):
    """Both conditions."""

    left: Where
    right: Where

    def __call__(self, operation: Any) -> bool:
        """See the class."""
        return self.left(operation) and self.right(operation)

    def __repr__(self) -> str:
        return f"({self.left} & {self.right})"


@dataclasses.dataclass(frozen=True)
class Any_(Where):
    """Either condition."""

    left: Where
    right: Where

    def __call__(self, operation: Any) -> bool:
        """See the class."""
        return self.left(operation) or self.right(operation)

    def __repr__(self) -> str:
        return f"({self.left} | {self.right})"


@dataclasses.dataclass(frozen=True)
class Not(Where):
    """The opposite of a condition."""

    condition: Where

    def __call__(self, operation: Any) -> bool:
        """See the class."""
        return not self.condition(operation)

    def __repr__(self) -> str:
        return f"~{self.condition}"


@dataclasses.dataclass(frozen=True)
class _Path(Where):
    pattern: str

    def __call__(self, operation: Any) -> bool:
        patterns = (self.pattern, self.pattern + "/*")
        return any(fnmatch.fnmatchcase(p, pattern) for p in operation.paths for pattern in patterns)

    def __repr__(self) -> str:
        return f"path({self.pattern!r})"


@dataclasses.dataclass(frozen=True)
class _Op(Where):
    names: tuple[str, ...]

    def __call__(self, operation: Any) -> bool:
        return operation.kind in self.names or operation.name in self.names

    def __repr__(self) -> str:
        return f"op({', '.join(map(repr, self.names))})"


@dataclasses.dataclass(frozen=True)
class _First(Where):
    def __call__(self, operation: Any) -> bool:
        return operation.first

    def __repr__(self) -> str:
        return "first()"


@dataclasses.dataclass(frozen=True)
class _Layer(Where):
    index: int | slice

    def __call__(self, operation: Any) -> bool:
        if operation.layer is None:
            return False
        return operation.layer in self.indices(operation.layers)

    def indices(self, length: int | None) -> range:
        """The layers meant, of so many; without their number, negative ones mean none."""
        if isinstance(self.index, slice):
            ends = (self.index.start, self.index.stop)
            if length is None and (ends[1] is None or any(end and end < 0 for end in ends)):
                length = 1 << 20 if not any(end and end < 0 for end in ends) else 0
            return range(*self.index.indices(length if length is not None else 1 << 20))
        start = self.index + (length or 0) if self.index < 0 else self.index
        return range(start, start + 1) if start >= 0 else range(0)

    def __repr__(self) -> str:
        return f"layer({self.index})"


@dataclasses.dataclass(frozen=True)
class _Everything(Where):
    def __call__(self, operation: Any) -> bool:
        return True

    def __repr__(self) -> str:
        return "everything()"


def path(pattern: Any) -> Where:
    """Operations that read a parameter whose path matches.

    Args:
      pattern: a glob over the leaf's path in its argument, joined with '/':
        'blocks/*/mlp/kernel'; '*' crosses '/'. The path of a module means all that is in it.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"path: expected a glob such as 'blocks/*/kernel', got {pattern!r}")
    return _Path(pattern)


def op(*names: Any) -> Where:
    """Operations of a kind, or of a primitive's name.

    The kinds: 'dense' and 'conv' (linear maps of one value that carries relevance), 'matmul' and
    'product' (of two), 'add', 'mean', 'max_pool', 'activation', 'softmax', 'logsumexp', 'norm', and
    'batch_norm' (constants that scale and shift the features of a linear map, as of batch
    normalisation with stored statistics: part of the linear map unless an entry names it). Other
    operations are named by their JAX primitive, op('fft'), and those of complex values that real
    ones have too with 'complex_' before it: op('complex_mul').
    """
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"op: expected names such as 'conv', got {names}")
    return _Op(names)


def first() -> Where:
    """Linear operations with no other linear operation between them and what is explained."""
    return _First()


def layer(index: Any) -> Where:
    """Operations of one layer, or of a slice of them.

    In a scan over stacked parameters, the position in the stack. Elsewhere the first number in
    the path of a parameter that the operation reads: 'blocks/3/mlp/kernel' or 'block_3/kernel';
    there, negative numbers mean nothing.
    """
    if isinstance(index, bool) or not isinstance(index, int | slice):
        raise TypeError(f"layer: expected an int or a slice, got {index!r}")
    return _Layer(index)


def everything() -> Where:
    """Every operation."""
    return _Everything()


Entry = tuple[Where | Callable[[Any], bool], Rule]


@dataclasses.dataclass(frozen=True)
class Composite:
    """An ordered list of (where, rule): the first match decides.

    `where` may also be any function that takes an operation
    (`jaxrel.propagation.operations.Operation`) and says whether it is meant. Such a function does
    not cut a scan over layers; only `layer` does.

    An entry matches an operation if its condition does and its rule is for that kind of
    operation: `(everything(), Epsilon())` says nothing of activations. What no entry matches
    keeps its default: Pass for activations, Uniform for products of two values, constant
    statistics (Stop) for normalisations, the derivative for a softmax, for a logsumexp (that is
    its softmax) and for whatever adds, moves or selects. Linear maps and unknown operations have
    no default, nor has a function like exp that is no activation: see `jaxrel.lrp`.

    Raises:
      TypeError: an entry is not a pair of a condition and a rule.
      ValueError: a rule is not defined for any of the kinds that its condition names.
    """

    entries: tuple[Entry, ...]

    def __init__(self, entries: Iterable[Any] = ()) -> None:
        checked = tuple(_checked(i, entry) for i, entry in enumerate(entries))
        object.__setattr__(self, "entries", checked)

    def __add__(self, other: "Composite") -> "Composite":
        """Both composites' entries, these first."""
        return Composite(self.entries + other.entries)

    def choose(self, operation: Any) -> tuple[int | None, Rule | None]:
        """The entry that decides, by index, and its rule; or the kind's default, or nothing."""
        for index, (where, rule) in enumerate(self.entries):
            named = operation.kind in kinds_named(where)
            if rule.covers(operation.kind, named) and where(operation):
                return index, rule
        return None, DEFAULTS.get(operation.kind)

    def names(self, operation: Any) -> bool:
        """Whether the entry that decides names the operation's kind."""
        index, _ = self.choose(operation)
        return index is not None and operation.kind in kinds_named(self.entries[index][0])

    def cuts(self, length: int) -> set[int]:
        """Where a stack of layers must be cut so that each part has one rule per operation."""
        bounds: set[int] = set()
        for where in self._parts():
            if isinstance(where, _Layer):
                indices = where.indices(length)
                for i in indices:
                    bounds |= {i, i + 1} if indices.step != 1 else set()
                bounds |= {indices.start, indices.stop}
        return {bound for bound in bounds if 0 < bound < length}

    @property
    def mentions_first(self) -> bool:
        """Whether some entry depends on an operation being the first."""
        return any(isinstance(where, _First) for where in self._parts())

    def _parts(self) -> list[Where]:
        return [p for w, _ in self.entries if isinstance(w, Where) for p in w.parts()]


DEFAULTS: dict[str, Rule] = {
    "activation": Pass(),
    "product": Uniform(),
    "matmul": Uniform(),
    "softmax": Gradient(),
    "logsumexp": Gradient(),
    "norm": Stop(),
    "add": Gradient(),
    "mean": Gradient(),
    "max_pool": Gradient(),
}


def as_composite(rules: Any) -> Composite:
    """A composite, a rule for everything, or a list of entries, as a composite."""
    if isinstance(rules, Composite):
        return rules
    if isinstance(rules, Rule):
        return Composite([(everything(), rules)])
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        return Composite(rules)
    raise TypeError(
        "rules must be a Composite (see jaxrel.composites), a rule such as jaxrel.rules.Epsilon(), "
        f"or a list of (where, rule); got {rules!r}"
    )


def specific(where: Any) -> bool:
    """Whether a condition names a path or a layer, and so is wrong if it matches nothing."""
    parts = where.parts() if isinstance(where, Where) else ()
    return any(
        isinstance(part, _Path | _Layer) or (isinstance(part, _Op) and not KINDS & {*part.names})
        for part in parts
    )


def kinds_named(where: Any) -> frozenset[str]:
    """The kinds of operation that a condition names."""
    parts = where.parts() if isinstance(where, Where) else ()
    return frozenset(name for part in parts if isinstance(part, _Op) for name in part.names)


def _checked(index: int, entry: Any) -> Entry:
    if not (isinstance(entry, tuple | list) and len(entry) == 2):
        raise TypeError(f"Composite: entry {index} must be a pair (where, rule), got {entry!r}")
    where, rule = entry
    if not callable(where):
        raise TypeError(
            f"Composite: entry {index} begins with {where!r}; expected a condition such as "
            "jaxrel.path('blocks/*'), jaxrel.op('conv') or jaxrel.everything()"
        )
    if not isinstance(rule, Rule):
        hint = f"; did you mean {rule.__name__}()?" if isinstance(rule, type) else ""
        raise TypeError(f"Composite: entry {index} ends with {rule!r}; expected a rule{hint}")
    if isinstance(where, _Op) and {*where.names} <= KINDS:
        wrong = [name for name in where.names if not rule.covers(name, True)]
        if wrong:
            kinds = ", ".join(sorted(rule.kinds | rule.also))
            raise ValueError(
                f"Composite: entry {index} uses {rule} on {wrong[0]!r}; it is for {kinds}"
            )
    return where, rule


def epsilon_plus(epsilon: float = 1e-6, stabiliser: float = 1e-6) -> Composite:
    """ZPlus for convolutions, Epsilon for dense layers, sums and means."""
    return Composite([(op("conv"), ZPlus(stabiliser)), *_epsilon(epsilon, stabiliser)])


def epsilon_plus_flat(epsilon: float = 1e-6, stabiliser: float = 1e-6) -> Composite:
    """As `epsilon_plus`, with Flat for the first linear operation."""
    flat = Composite([(first() & op("conv", "dense"), Flat(stabiliser))])
    return flat + epsilon_plus(epsilon, stabiliser)


def epsilon_alpha2_beta1(epsilon: float = 1e-6, stabiliser: float = 1e-6) -> Composite:
    """AlphaBeta(2, 1) for convolutions, Epsilon for dense layers, sums and means."""
    conv = AlphaBeta(2.0, 1.0, stabiliser)
    return Composite([(op("conv"), conv), *_epsilon(epsilon, stabiliser)])


def epsilon_alpha2_beta1_flat(epsilon: float = 1e-6, stabiliser: float = 1e-6) -> Composite:
    """As `epsilon_alpha2_beta1`, with Flat for the first linear operation."""
    flat = Composite([(first() & op("conv", "dense"), Flat(stabiliser))])
    return flat + epsilon_alpha2_beta1(epsilon, stabiliser)


def epsilon_gamma_box(
    low: Any,
    high: Any,
    *,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    stabiliser: float = 1e-6,
) -> Composite:
    """ZBox for the first convolution, Gamma for the others, Epsilon for the rest.

    Args:
      low: the least value an input can have, in the units the convolution sees.
      high: the greatest.
      epsilon: the Epsilon rule's amount.
      gamma: the Gamma rule's factor.
      stabiliser: the other rules' amount.
    """
    box = (first() & op("conv"), ZBox(low, high, stabiliser))
    conv = (op("conv"), Gamma(gamma, stabiliser))
    return Composite([box, conv, *_epsilon(epsilon, stabiliser)])


def excitation_backprop(stabiliser: float = 1e-6) -> Composite:
    """ZPlus for all linear maps, shares by value in sums and means (Zhang et al. 2016).

    Activations keep their derivative. For the rule as the paper has it, without bias and
    negative inputs, use `rules.ExcitationBackprop` in the place of ZPlus.
    """
    return Composite(
        [
            (op("conv", "dense"), ZPlus(stabiliser)),
            (op("activation"), Gradient()),
            (op("add", "mean"), Epsilon(stabiliser)),
        ]
    )


def attn_lrp(epsilon: float = 1e-6) -> Composite:
    """AttnLRP (Achtibat et al. 2024): for transformers, attention included.

    Epsilon for linear maps, the derivative for the softmax (its Taylor expansion, eq. 13), half
    for each factor of a product (eq. 14), Pass for activations, constant standard deviations.
    The softmax step does not conserve relevance.
    """
    return Composite(
        [
            (op("softmax"), Gradient()),
            (op("matmul", "product"), Uniform()),
            (everything(), Epsilon(epsilon)),
        ]
    )


def cp_lrp(epsilon: float = 1e-6) -> Composite:
    """CP-LRP (Ali et al. 2022): attention maps, gates and standard deviations are constants.

    Without biases the relevance of the input sums to the output exactly.
    """
    return Composite(
        [
            (op("softmax"), Stop()),
            (op("product"), SignalTakesAll("activation")),
            (op("matmul"), Uniform()),
            (everything(), Epsilon(epsilon)),
        ]
    )


def captioning(epsilon: float = 0.01) -> Composite:
    """For captioners and other recurrent networks with a convolutional encoder (Sun et al. 2022).

    alpha 1, beta 0 without bias for convolutions, ZAbsolute for batch normalisation, Epsilon for
    all other linear maps, sums (residual ones too) and means; gates and attention maps are
    constants.
    """
    return Composite(
        [
            (op("conv"), AlphaBeta(1.0, 0.0, where_zero(1e-7), bias="ignored")),
            (op("batch_norm"), ZAbsolute(0.0)),
            (op("softmax"), Stop()),
            (op("product"), SignalTakesAll("sigmoid")),
            (op("dense", "add", "mean"), Epsilon(epsilon)),
        ]
    )


def guided_backprop() -> Composite:
    """Guided at activations, the derivative elsewhere; see `jaxrel.gradients.guided_backprop`."""
    return Composite([(op("activation"), Guided()), (everything(), Gradient())])


def deconvnet() -> Composite:
    """Deconvnet at activations and the derivative elsewhere."""
    return Composite([(op("activation"), Deconvnet()), (everything(), Gradient())])


def beta_smooth(beta: float = 10.0) -> Composite:
    """BetaSmooth at activations and the derivative elsewhere."""
    return Composite([(op("activation"), BetaSmooth(beta)), (everything(), Gradient())])


def _epsilon(epsilon: float, stabiliser: float) -> list[Entry]:
    return [(op("dense"), Epsilon(epsilon)), (op("add", "mean"), Epsilon(stabiliser))]
