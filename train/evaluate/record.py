"""Results on disk: what an evaluation found, as JSON and as Markdown that is made from it.

`jaxrel evaluate ... --record` keeps results in train/results, a JSON file for each evaluation of a
model. Its Markdown, and the folder's README.md, are what `markdown` and `index` make of it.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrel.files import write_atomically
from jaxrel.train.evaluate.tables import Table, grid

FOLDER = Path(__file__).parents[1] / "results"
VERSIONED = ("jaxrel", "jax", "flax", "numpy")


def save(result: Mapping[str, Any], text: str, stem: Path) -> list[Path]:
    """Write a result as JSON, and its tables as Markdown.

    Args:
      result: what JSON can hold.
      text: Markdown.
      stem: the files without their suffixes; a missing folder is made.

    Returns:
      The files.

    Raises:
      ValueError: a number is not finite.
      OSError: a file cannot be written there.
    """
    data = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md")]
    for file, content in zip(files, (data, text), strict=True):
        write_atomically(file, content.encode())
    return files


def record(
    name: str,
    protocol: str,
    tables: Sequence[Table],
    *,
    command: str,
    result: Mapping[str, Any] | None = None,
    folder: Path = FOLDER,
) -> list[Path]:
    """Keep what an evaluation found beside the others; one of the same name is replaced.

    The notes of the one before are kept: people write them, and look at them again.

    Args:
      name: of the files, such as "perturbation-vqa-shapes".
      protocol: of the evaluation, with its version.
      tables: what is shown of it.
      command: the command line that made it.
      result: all of it.
      folder: where to.

    Returns:
      The JSON file, its Markdown, and the folder's README.md.

    Raises:
      ValueError: two tables have one title, or a number is not finite.
      OSError: no such folder, or a file cannot be written there.
    """
    titles = [table.title for table in tables]
    if len(set(titles)) < len(titles):
        raise ValueError(f"record: tables need titles of their own, got {', '.join(titles)}")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder} for --record; name one, or run it in a checkout"
        )
    before = folder / f"{name}.json"
    notes = json.loads(before.read_bytes())["notes"] if before.exists() else ""
    found = {
        "protocol": protocol,
        "command": command,
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            **{one: importlib.metadata.version(one) for one in VERSIONED},
        },
        "date": datetime.date.today().isoformat(),
        "notes": notes,
        "tables": [table._asdict() for table in tables],
        "result": result,
    }
    files = save(found, markdown(name, found), folder / name)
    readme = folder / "README.md"
    write_atomically(readme, index(read(folder)).encode())
    return [*files, readme]


def read(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """All that was recorded, by name."""
    return {file.stem: json.loads(file.read_bytes()) for file in sorted(folder.glob("*.json"))}


def markdown(name: str, found: Mapping[str, Any]) -> str:
    """The page of a record.

    Args:
      name: of its file.
      found: its JSON.
    """
    versions = ", ".join(f"{one} {number}" for one, number in found["versions"].items())
    made = ", ".join(filter(None, (found["hardware"], versions, found["date"])))
    command = "".join(f"$ {line}\n" for line in found["command"].splitlines())
    parts = [
        f"# {name}\n",
        f"Protocol `{found['protocol']}`; {made}. Intervals are bootstrap 95% intervals.\n",
        f"```console\n{command}```\n",
        *(Table(**table).markdown() for table in found["tables"]),
        *([f"## Notes\n\n{found['notes'].strip()}\n"] if found["notes"] else []),
    ]
    return "\n".join(parts)


def index(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The README.md of the folder.

    Args:
      records: as `read` returns them.
    """
    rows = [
        [
            f"[{name}]({name}.md)",
            f"`{one['protocol']}`",
            "; ".join(t["title"] for t in one["tables"]),
        ]
        for name, one in records.items()
    ]
    about = (
        "What `jaxrel evaluate` found. With `--record` the command writes a JSON file, and the "
        "Markdown from it. Only `notes` in the JSON are written by people."
    )
    return f"# Results\n\n{about}\n\n{grid(['results', 'protocol', 'tables'], rows)}"


def hardware() -> str:
    """The processor, its cores, and the accelerators in words."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    processor = named[1].strip() if named else platform.processor() or platform.machine()
    devices = [one.device_kind for one in jax.devices() if one.platform != "cpu"]
    accelerators = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
    return f"{processor}, {os.cpu_count()} cores, {accelerators or 'no accelerator'}"
