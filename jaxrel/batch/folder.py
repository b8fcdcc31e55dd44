"""The folder of a job's results: a manifest, and shards of rows that appear complete or not at all.

    _manifest.json         what was asked, of which rows, by which model and versions
    part-00000.parquet     the rows of the first `shard_rows` inputs; and so on
    _images/               the figures that were asked for

A shard holds the same inputs whenever and by whomever it is written. So a job that was killed goes
on with the shards that are not there, and no row is lost or there twice.
"""

import dataclasses
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrel.explanations.tables import Columns, parquet, required
from jaxrel.files import write_atomically

FORMAT = 1
MANIFEST = "_manifest.json"


@dataclasses.dataclass(frozen=True)
class Folder:
    """The results of a job.

    Attributes:
      path: the folder.
      rows: how many inputs there are.
      shard_rows: inputs of a shard.
      settings: what was asked, and of which inputs: a job with others is another job.
      provenance: what made the results: versions, the model's digest, the command.
    """

    path: Path
    rows: int
    shard_rows: int
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def shards(self) -> int:
        """How many shards the whole job has."""
        return -(-self.rows // self.shard_rows)

    def part(self, shard: int) -> Path:
        """The file of a shard."""
        return self.path / f"part-{shard:05d}.parquet"

    def inputs(self, shard: int) -> tuple[int, int]:
        """The first input of a shard, and the one after its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [i for i in range(self.shards) if not self.part(i).exists()]

    def errors(self) -> int:
        """How many rows of the shards that are there have an error."""
        read = required("pyarrow.parquet").read_table
        parts = [self.part(i) for i in range(self.shards) if self.part(i).exists()]
        columns = [read(part, columns=["error"]).column(0) for part in parts]
        return sum(len(column) - column.null_count for column in columns)

    def open(self) -> None:
        """Begin the job in a new folder, or go on in that of a job that was interrupted.

        Raises:
          ValueError: the folder holds another job, or other files.
          OSError: it cannot be written.
        """
        manifest = self.path / MANIFEST
        if not manifest.exists():
            others = [x.name for x in self.path.iterdir()] if self.path.is_dir() else []
            if [name for name in others if not _temporary(name)]:
                raise ValueError(
                    f"{self.path} holds other files ({sorted(others)[0]}) and no job of "
                    "`jaxrel batch`: name a new folder with --out"
                )
            self._write(manifest, (json.dumps(self._manifest(), indent=2) + "\n").encode())
            return
        _check_same(self.path, read_manifest(self.path), self._manifest())
        for left in self.path.glob("*.tmp"):
            left.unlink(missing_ok=True)

    def write(self, shard: int, found: Columns, **options: Any) -> None:
        """Write a shard; options as of `explanations.tables.table`.

        Raises:
          OSError: it cannot be written; what is there stays.
        """
        metadata = {"jaxrel": json.dumps(self._manifest())}
        self._write(self.part(shard), parquet(found, metadata=metadata, **options))

    def _manifest(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
        }

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            done = self.shards - len(self.missing())
            raise OSError(
                error.errno,
                f"the disk is full; {done} of {self.shards} parts are complete in {self.path} and "
                "can be read. Make room, and give the same command again: it goes on from there",
            ) from error


def _temporary(name: str) -> bool:
    return name.startswith(".jaxrel-") and name.endswith(".tmp")


def read_manifest(path: Path) -> dict[str, Any]:
    """What a job says of itself.

    Raises:
      ValueError: the folder holds no job, or its manifest is damaged or of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no JSON object")
        kinds = {"rows": int, "shard_rows": int, "settings": dict, "provenance": dict}
        lost = [name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)]
        if manifest.get("format") == FORMAT and lost:
            raise ValueError(f"it lacks {', '.join(lost)}")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} holds no {MANIFEST}: it is no folder that `jaxrel batch` wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({error}); name a new folder") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path / MANIFEST} has another format than {FORMAT}: name a new folder")
    return manifest


def _check_same(path: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError where a job is not the one that the folder holds."""
    before, after = ({**x["settings"], "shard_rows": x["shard_rows"]} for x in (there, now))
    names = dict.fromkeys([*before, *after])
    changed = [name for name in names if before.get(name) != after.get(name)]
    if changed:
        what = "; ".join(f"{n} was {before.get(n)!r} and is {after.get(n)!r}" for n in changed)
        digests = {
            "inputs": f"the rows (a digest; {there['rows']} rows then, {now['rows']} now)",
            "model_digest": "the model's weights",
        }
        others = " and ".join(digests[name] for name in digests if name in changed)
        raise ValueError(
            f"{path} holds another job: {what}. Give the command that is in its {MANIFEST} to go "
            + (f"on, once {others} are as they were, " if others else "on, ")
            + "or name a new folder with --out"
        )
