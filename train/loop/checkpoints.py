"""Checkpoints of a training: all or nothing on disk, and refused by a run that is another."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from jaxrel.train.loop.optimiser import named

KEPT = 2


class Checkpoints:
    """The checkpoints of one run in a folder, each a folder named by its step.

    A checkpoint is written to a temporary folder that is renamed when all is on disk (Orbax).
    What an interrupted one left is removed when the folder is opened. Close it, or use `with`.

    Args:
      folder: made if it is not there.
      settings: dataclass instance or mapping, JSON-able; what must be equal to resume.

    Raises:
      NotADirectoryError: the folder is a file.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; checkpoints need a folder")
        self.folder = folder
        self._settings = _as_json(settings)
        # `save` waits until all is written, so that a full disk is reported at its step.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self, step: int, params: PyTree, state: PyTree, iterator: grain.DatasetIterator
    ) -> None:
        """Write a checkpoint, then remove all but the newest two.

        Args:
          step: number of optimiser steps so far.
          params: parameters.
          state: the optimiser's.
          iterator: of the data, whose place is saved.

        Raises:
          OSError: it could not be written; earlier checkpoints are untouched.
        """
        arrays = _arrays(params, state)
        run = {"settings": self._settings, "arrays": _described(arrays)}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            data=grain.checkpoint.CheckpointSave(iterator),
            run=ocp.args.JsonSave(run),
        )
        try:
            self._manager.save(step, args=args)
        except (OSError, ValueError) as error:  # TensorStore tells of a full disk by a ValueError
            rest = "there was none before it"
            if self.latest is not None:
                rest = f"that of step {self.latest} is kept"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder}; {rest}. "
                f"Is the disk full? Make room and run the same again to go on. {error}"
            ) from error

    def restore(
        self, params: PyTree, state: PyTree, iterator: grain.DatasetIterator
    ) -> tuple[int, PyTree, PyTree]:
        """Read the newest checkpoint, if there is one.

        Args:
          params: what is returned if there is none; the structure, dtypes and devices otherwise.
          state: likewise.
          iterator: set to the place of the checkpoint.

        Returns:
          The step (0 if there is no checkpoint), the parameters and the optimiser's state.

        Raises:
          ValueError: the settings or the arrays differ, or the checkpoint cannot be read.
        """
        step = self.latest
        if step is None:
            return 0, params, state
        where = self.folder / str(step)
        arrays = _arrays(params, state)
        with _readable(where):
            args = ocp.args.Composite(run=ocp.args.JsonRestore())
            run = self._manager.restore(step, args=args).run
            saved = {name: run[name] for name in ("settings", "arrays")}
        for what, here in (("settings", self._settings), ("arrays", _described(arrays))):
            differing = _differences(saved[what], here)
            if differing:
                raise ValueError(
                    f"the checkpoint {where} has other {what}: {differing}; choose another folder, "
                    f"or delete {self.folder} to start over"
                )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
        )
        args = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(abstract),
            data=grain.checkpoint.CheckpointRestore(iterator),
        )
        with _readable(where):
            found = self._manager.restore(step, args=args).arrays
        structure = jax.tree.structure((params, state))
        return (step, *jax.tree.unflatten(structure, [found[name] for name in arrays]))


@contextlib.contextmanager
def _readable(where: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint {where} cannot be read; delete it to go on from the one before. "
            f"{error}"
        ) from error


def _as_json(settings: Any) -> dict[str, Any]:
    # Through JSON and back, so that a tuple equals the list that it is in a checkpoint.
    fields = dataclasses.is_dataclass(settings) and not isinstance(settings, type)
    plain = dataclasses.asdict(settings) if fields else dict(settings)
    return json.loads(json.dumps(plain, default=str))


def _arrays(params: PyTree, state: PyTree) -> dict[str, Array]:
    """The leaves of both by name, in the order of the tree (params, state)."""
    arrays = {f"params/{name}": leaf for name, leaf in named(params).items()}
    return arrays | {f"optimiser/{name}": leaf for name, leaf in named(state).items()}


def _described(arrays: Mapping[str, Array]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any], most: int = 8) -> str:
    """ "a is 1 there and 2 here, ...": nothing where all is equal."""

    def shown(side: Mapping[str, Any], name: str) -> str:
        return repr(side[name]) if name in side else "absent"

    names = [n for n in sorted({*saved, *here}) if shown(saved, n) != shown(here, n)]
    parts = [f"{n} is {shown(saved, n)} there and {shown(here, n)} here" for n in names[:most]]
    return ", ".join(parts + ([f"and {len(names) - most} more"] if len(names) > most else []))
