"""`plan`: what `lrp` would do to a function, as a table, before anything is run."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxrel.propagation.assignment import Choice
from jaxrel.propagation.composites import as_composite
from jaxrel.propagation.lrp import as_places, prepare_call, traced_call
from jaxrel.propagation.operations import BatchNorm, Elementwise, Linear, Operation
from jaxrel.propagation.rules import Gradient, Rule


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation that carries relevance.

    Attributes:
      kind: see `jaxrel.op`.
      name: the primitive, or the primitives of an activation.
      paths: the parameters it reads.
      rule: its rule; None if none covers it.
      default: whether the rule is the kind's default, not a choice of the composite.
      bias: 'fused', 'separate', 'ignored', or '' where there is none.
      first: the first linear operation.
      layers: the layers that it stands for: '', '3' or '0-11'.
      where: the user's source line.
      note: what is special: a normalisation folded in, an input known to be >= 0, and so on.
    """

    kind: str
    name: str
    paths: tuple[str, ...]
    rule: Rule | None
    default: bool
    bias: str
    first: bool
    layers: str
    where: str
    note: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """The operations of a function and their rules; `str(plan)` is a table."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def uncovered(self) -> tuple[Row, ...]:
        """The operations that no rule covers."""
        return tuple(row for row in self.rows if row.rule is None)

    def __str__(self) -> str:
        heads = ("operation", "parameters", "rule", "bias", "layers", "note", "where")
        lines = [
            (
                row.kind,
                ", ".join(row.paths),
                "NONE" if row.rule is None else f"{row.rule}{' (default)' if row.default else ''}",
                row.bias,
                row.layers,
                "; ".join(part for part in ("first" if row.first else "", row.note) if part),
                row.where,
            )
            for row in self.rows
        ]
        return table(heads, lines)


def plan(
    fun: Callable, rules: Any, *, argnums: int | Sequence[int] | None = 0, at: Any = ()
) -> Callable:
    """Make a function return the plan of its LRP instead of its output.

    Nothing is computed: the function is traced. Operations that no rule covers are shown, where
    `jaxrel.lrp` would refuse them.

    Args:
      fun: see `jaxrel.lrp`.
      rules: a composite, a rule, or a list of (where, rule).
      argnums: what is explained.
      at: see `jaxrel.lrp`.

    Returns:
      A function `(*args) -> Plan`.

    Raises:
      TypeError, ValueError: as for `jaxrel.lrp`.
    """
    composite = as_composite(rules)
    at = as_places(at)

    def planned(*args) -> Plan:
        prepared = prepare_call(traced_call("plan", fun, args, argnums), composite, at, "show")
        return Plan(tuple(map(row_of, prepared.choices)))

    return planned


def row_of(choice: Choice) -> Row:
    """A choice, in words."""
    operation, rule = choice.operation, choice.rule
    return Row(
        kind=operation.kind,
        name=operation.name,
        paths=operation.paths,
        rule=rule,
        default=choice.entry is None and rule is not None,
        bias=_bias(operation, rule),
        first=operation.first,
        layers=_layers(operation),
        where=operation.where(),
        note=_note(choice),
    )


def _bias(operation: Operation, rule: Rule | None) -> str:
    if not isinstance(operation, Linear) or not operation.bias:
        return ""
    default = "separate" if isinstance(rule, Gradient) else "fused"
    return getattr(rule, "bias", default)


def _layers(operation: Operation) -> str:
    if operation.stack is None:
        return "" if operation.layer is None else str(operation.layer)
    start, stop, _ = operation.stack
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"


def _note(choice: Choice) -> str:
    operation, rule = choice.operation, choice.rule
    notes = []
    if isinstance(operation, Linear):
        if operation.folded and not isinstance(operation, BatchNorm):
            notes.append("normalisation folded in")
        if operation.nonneg:
            notes.append("x >= 0")
        if rule is not None and rule.direct and choice.probe is None:
            notes.append("not at an input: no relevance where x = 0")
    if isinstance(operation, Elementwise):
        notes.append(operation.name if len(operation.name) < 40 else operation.name[:37] + "...")
    return "; ".join(notes)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, those that are empty throughout left out."""
    keep = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    rows = [[heads[i] for i in keep], *([line[i] for i in keep] for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(keep))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
