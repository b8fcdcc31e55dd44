"""Results as tables: what is shown of numbers and their intervals, and Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrel.metrics import Interval

Measured = Mapping[str, float] | None


class Table(NamedTuple):
    """A table of a result.

    Attributes:
      title: no other table of the result has it.
      note: what was measured, on what; Markdown.
      columns: their heads; without columns, the note says what there is none of.
      rows: the cells as they are shown.
    """

    title: str
    note: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def markdown(self) -> str:
        """The table under its title and note."""
        lines = grid(self.columns, self.rows) if self.columns else ""
        return "\n".join(
            f"{part.rstrip()}\n" for part in (f"### {self.title}", self.note, lines) if part
        )


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Heads and cells as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)


def markdown(tables: Sequence[Table]) -> str:
    """Tables, one after the other."""
    return "\n".join(table.markdown() for table in tables)


def cell(measured: Measured, nothing: str = "") -> str:
    """A mean with its interval.

    Args:
      measured: `mean`, `low` and `high`.
      nothing: what is shown of None.
    """
    return nothing if measured is None else str(_interval(measured))


def difference(measured: Measured, digits: int = 3) -> str:
    """A difference with its interval, bold where that excludes 0, for better or for worse.

    Args:
      measured: as in `cell`; of None nothing is shown.
      digits: after the point.
    """
    if measured is None:
        return ""
    mean, low, high = _interval(measured)
    shown = [f"{number:+z.{digits}f}" for number in (mean, low, high)]
    text = f"{shown[0]} [{shown[1]}, {shown[2]}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def by_row(
    title: str, note: str, head: str, rows: Mapping[str, Mapping[str, Measured]], shown: Any = None
) -> Table:
    """A table of measures by name.

    Args:
      title, note: see `Table`.
      head: what the rows are, such as "method".
      rows: by name, measures by name, the same in each.
      shown: titles of measures by name; by default all, under their own names.
    """
    names = list(next(iter(rows.values()))) if shown is None else list(shown)
    heads = names if shown is None else list(shown.values())
    cells = [[row, *(cell(measures.get(one)) for one in names)] for row, measures in rows.items()]
    return Table(title, note, [head, *heads], cells)


def all_tables(result: Mapping[str, Any], title: str = "") -> list[Table]:
    """Tables of a result that has none of its own: all intervals, by where they are in it.

    Args:
      result: numbers with `mean`, `low` and `high` somewhere in it.
      title: of the result.
    """
    rows = [[name, str(_interval(one))] for name, one in result.items() if _is_measured(one)]
    parts = {name: one for name, one in result.items() if isinstance(one, Mapping)}
    return [
        *([Table(title or "Measures", "", ["", "mean [95% interval]"], rows)] if rows else []),
        *(
            table
            for name, part in parts.items()
            if not _is_measured(part)
            for table in all_tables(part, f"{title}, {name}" if title else name)
        ),
    ]


def check_protocol(what: str, result: Mapping[str, Any], protocol: str) -> None:
    """Raise ValueError for a result of another protocol.

    Args:
      what: was to be done, for the message.
      result: of an evaluation, or read back from JSON.
      protocol: that is expected.
    """
    if (found := result.get("protocol")) != protocol:
        raise ValueError(
            f"{what}: expected a result of {protocol!r}, as evaluate returns it, got protocol "
            f"{found!r}"
        )


def _is_measured(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) >= {"mean", "low", "high"}


def _interval(measured: Mapping[str, Any]) -> Interval:
    return Interval(*(measured[name] for name in Interval._fields))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
