"""Tables of figures, and the machine they come from."""

import importlib.util
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """Figures under a title.

    Args:
      title: what was measured.
      note: how to read it, or nothing.
      rows: cells by column; None for none.
    """

    title: str
    note: str
    rows: Sequence[Mapping[str, Cell]]

    def markdown(self) -> str:
        """The table as Markdown."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
        lines += [[_text(row.get(column)) for column in columns] for row in self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"### {self.title}", self.note, body) if part) + "\n"


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:.0f}" if cell >= 100 else f"{cell:.2f}"


def targets(**met: bool) -> str:
    """What was aimed at, and whether it was met: `targets(time=True)`."""
    return ", ".join(f"{what} {'met' if yes else 'not met'}" for what, yes in met.items())


def hardware() -> str:
    """The machine and the versions, in one line."""
    parts = [f"{processor()}, {os.cpu_count()} cores"]
    if jax.default_backend() != "cpu":
        parts.append(f"{len(jax.devices())} x {jax.devices()[0].device_kind}")
    parts += [f"Python {platform.python_version()}", f"jax {jax.__version__}"]
    if importlib.util.find_spec("torch"):
        import torch

        parts.append(f"torch {torch.__version__} with {torch.get_num_threads()} threads")
    return "; ".join(parts)


def processor() -> str:
    """The processor's name."""
    # platform.processor() is empty on most Linux machines.
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
