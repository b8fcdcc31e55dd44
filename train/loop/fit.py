"""The training loop of all recipes: one compiled step, exact resume, and a log that reads as one.

A recipe brings a pure loss, parameters, an optimiser and a stream of batches; `fit` does the
rest. Stopped at any time, the same call resumes from the newest checkpoint and ends with the
parameters, bit by bit, that it would have had without the stop.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from tqdm.auto import tqdm

from jaxrel.train.loop.checkpoints import Checkpoints
from jaxrel.train.loop.optimiser import check_float32, named

# The host runs this many steps ahead of the device: it never keeps the device waiting, and
# batches do not pile up in the device's memory.
AHEAD = 4
RESERVED = ("step", "loss", "learning_rate", "seconds", "examples_per_second")

Batch = dict[str, Any]
Loss = Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]


def fit(
    loss: Loss,
    params: PyTree,
    optimiser: optax.GradientTransformation,
    data: Iterable[Batch],
    *,
    steps: int,
    key: Array,
    settings: Any,
    folder: str | os.PathLike,
    log: str | os.PathLike | None = None,
    log_every: int = 50,
    checkpoint_every: int = 1000,
    accumulate: int = 1,
    schedule: optax.Schedule | None = None,
    show: str | None = None,
    mesh: Mesh | None = None,
    name: str = "train",
) -> PyTree:
    """Train, or resume a training that was stopped.

    The batch is shared out over the devices and the parameters are on all of them. Step `n`
    (from 1) gets the key `fold_in(key, n)`, and with `accumulate` its micro-batch `i` gets
    `fold_in(fold_in(key, n), i)`. The mean of the micro-batches' losses and gradients is that of
    the whole batch when the loss is a mean over examples; a contrastive loss, which compares
    the examples of a batch, is another one then.

    The log has one JSON object per line: `step`; the means since the last line of `loss` and of
    the loss function's metrics (null where not finite); `learning_rate` if there is a schedule;
    `seconds` and `examples_per_second` since the last line. Lines that a stopped run wrote after
    its last checkpoint are dropped and written again; a training from the start empties the file.

    Nothing is saved between two checkpoints: a stop costs at most `checkpoint_every` steps.

    Args:
      loss: `loss(params, batch, key) -> (scalar, dict of scalars)`, pure and traceable.
      params: pytree of float32 arrays, such as `nnx.split(model, nnx.Param, ...)[1]`. It stays
        intact. To compute in bfloat16 is the model's concern.
      optimiser: such as `adamw`; its state must be float32 too.
      data: batches as `jaxrel.train.loop.batches.batches` gives them: a Grain dataset or its
        iterator, of dicts of arrays that share the first axis. An entry "id" stays on the host
        and names the examples in messages.
      steps: number of optimiser steps, in all.
      key: PRNG key of the run.
      settings: dataclass instance or mapping, JSON-able: what must be equal to resume.
      folder: of the checkpoints; for a model that will be in OUT, `OUT.checkpoints` by
        convention. Each checkpoint is a folder named by its step.
      log: JSON-lines file; by default train.jsonl in `folder`.
      log_every: steps between two lines of the log, and between two looks at the loss.
      checkpoint_every: steps between two checkpoints, a multiple of `log_every`. There is one
        more after the last step; the newest two are kept.
      accumulate: micro-batches per step; the memory of activations falls by this factor.
      schedule: of the learning rate, for the log alone.
      show: metric that the progress bar shows beside the loss.
      mesh: devices that share the batch; by default all.
      name: of the run in the progress bar and in messages.

    Returns:
      The parameters after the last step, with the structure of `params`.

    Raises:
      ValueError: a number is out of range; the batch cannot be shared out; parameters or
        optimiser state are not float32; the checkpoint in the folder has other settings or
        other arrays, or cannot be read; the data end early.
      TypeError: the data cannot be saved, or the loss returns something else than it should.
      FloatingPointError: the loss, the parameters or the optimiser's state are not finite; the
        last checkpoint is from before.
      OSError: a checkpoint or the log could not be written; earlier checkpoints are kept.
    """
    _check_numbers(name, steps, log_every, checkpoint_every, accumulate)
    iterator = iter(data)
    if not isinstance(iterator, grain.DatasetIterator):
        raise TypeError(
            f"{name}: data must be a Grain dataset or its iterator, whose place can be saved, got "
            f"{type(data).__name__}; make one with jaxrel.train.loop.batches.batches"
        )
    if mesh is None:
        mesh = Mesh(np.asarray(jax.devices()), ("data",))
    params, state, key = _on_devices(params, optimiser, key, mesh)
    step = _compiled_step(loss, optimiser, accumulate, mesh, show)
    folder = Path(folder).expanduser().resolve()
    log = folder / "train.jsonl" if log is None else Path(log).expanduser().resolve()

    with Checkpoints(folder, settings) as checkpoints:
        start, params, state = checkpoints.restore(params, state, iterator)
        if start > steps:
            raise ValueError(
                f"{name}: {folder} holds a run of {start} steps, more than steps={steps}; choose "
                "another folder, or delete that one"
            )
        _rewind(log, start)
        window: list[_Step] = []
        begun = time.perf_counter()
        with tqdm(total=steps, initial=start, desc=name, unit="step") as bar:
            for number in range(start + 1, steps + 1):
                ids, size, batch = _next(iterator, mesh, accumulate, number, steps)
                params, state, values = step(params, state, batch, key, number)
                window.append(_Step(number, ids, size, values))
                if len(window) > AHEAD:
                    jax.block_until_ready(window[-1 - AHEAD].values)
                bar.update()
                if number % log_every and number != steps:
                    continue
                line = _line(window, begun, schedule, name, checkpoints)
                _append(log, line)
                bar.set_postfix(_shown(line, "loss", show))
                if number % checkpoint_every == 0 or number == steps:
                    checkpoints.save(number, params, state, iterator)
                window, begun = [], time.perf_counter()
    return params


class _Step(NamedTuple):
    number: int
    ids: np.ndarray | None
    examples: int
    values: dict[str, Array]


def _check_numbers(
    name: str, steps: int, log_every: int, checkpoint_every: int, accumulate: int
) -> None:
    numbers = {
        "steps": steps,
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
        "accumulate": accumulate,
    }
    for what, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: {what} must be at least 1, got {number}")
    # Otherwise a resumed run would begin in the middle of a line's mean.
    if checkpoint_every % log_every:
        raise ValueError(
            f"{name}: checkpoint_every must be a multiple of log_every {log_every}, got "
            f"{checkpoint_every}"
        )


def _on_devices(
    params: PyTree, optimiser: optax.GradientTransformation, key: Array, mesh: Mesh
) -> tuple[PyTree, PyTree, Array]:
    """Copies of the parameters, the optimiser's first state and the key, on all devices."""
    check_float32(params, "params")
    everywhere = NamedSharding(mesh, PartitionSpec())
    # The step donates its arguments, and device_put may share memory with what it is given:
    # without a copy the step would delete the caller's arrays.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=everywhere)
    params = copy(jax.device_put(params, everywhere))
    state = jax.jit(optimiser.init, out_shardings=everywhere)(params)
    check_float32(state, "the optimiser's state", integers=True)
    return params, state, jax.device_put(key, everywhere)


def _compiled_step(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    accumulate: int,
    mesh: Mesh,
    show: str | None,
) -> Callable[..., tuple[PyTree, PyTree, dict[str, Array]]]:
    gradients = jax.value_and_grad(_checked(loss, show), has_aux=True)
    split = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))

    def micro_batches(x: Array) -> Array:
        # Every `accumulate`-th example, so that each device cuts up what it has already.
        x = x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, split)

    def accumulated(params: PyTree, batch: Batch, key: Array) -> tuple[Any, PyTree]:
        if accumulate == 1:
            return gradients(params, batch, key)

        def add(total: PyTree, micro: tuple[Batch, Array]) -> tuple[PyTree, Any]:
            part, index = micro
            values, grads = gradients(params, part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, grads), values

        inputs = (jax.tree.map(micro_batches, batch), jnp.arange(accumulate))
        total, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), inputs)
        mean = jax.tree.map(lambda x: x.mean(0), values)
        return mean, jax.tree.map(lambda x: x / accumulate, total)

    def step(
        params: PyTree, state: PyTree, batch: Batch, key: Array, number: Array | int
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        key = jax.random.fold_in(key, number)
        (value, metrics), grads = accumulated(params, batch, key)
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        values = {"loss": value, "finite": _finite((params, state)), **metrics}
        return params, state, values

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=everywhere)


def _checked(loss: Loss, show: str | None) -> Loss:
    """The loss, which says at tracing if it does not return what `fit` expects."""

    def checked(params: PyTree, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        result = loss(params, batch, key)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise TypeError(f"loss must return (scalar, dict of scalars), got {type(result)}")
        value, metrics = result
        for name, x in {"its value": value, **metrics}.items():
            if jnp.shape(x):
                raise TypeError(f"loss must return scalars, but {name} has shape {jnp.shape(x)}")
        taken = [name for name in metrics if name in (*RESERVED, "finite")]
        if taken:
            raise ValueError(f"metrics of the loss cannot be named {', '.join(taken)}")
        if show is not None and show not in metrics:
            raise ValueError(f"show must be one of the metrics {sorted(metrics)}, got {show!r}")
        return jnp.asarray(value, jnp.float32), metrics

    return checked


def _finite(tree: PyTree) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _next(
    iterator: grain.DatasetIterator, mesh: Mesh, accumulate: int, number: int, steps: int
) -> tuple[np.ndarray | None, int, Batch]:
    """The next batch's ids, its size over all processes, and its arrays on the devices."""
    try:
        batch = dict(next(iterator))
    except StopIteration:
        raise ValueError(
            f"the data ended before step {number} of {steps}; train with "
            "batches(..., repeat=True) or fewer steps"
        ) from None
    ids = batch.pop("id", None)
    shapes = {name: np.shape(x) for name, x in named(batch).items()}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"the arrays of a batch must share their first axis, got {shapes}")
    ((size,),) = sizes
    devices = len(mesh.local_devices)
    if size % (devices * accumulate):
        raise ValueError(
            f"a batch of {size} examples cannot be shared out at step {number}: it must be a "
            f"multiple of {devices * accumulate} ({devices} devices x accumulate {accumulate})"
        )
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    put = jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)
    return ids, size * mesh.size // devices, put


def _line(
    window: list[_Step],
    begun: float,
    schedule: optax.Schedule | None,
    name: str,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """A line of the log: means since the last line, the learning rate, and the speed."""
    line = _means(window, name, checkpoints)
    if schedule is not None:
        # The optimiser counts from 0.
        line["learning_rate"] = float(schedule(window[-1].number - 1))
    line["seconds"] = time.perf_counter() - begun
    line["examples_per_second"] = sum(s.examples for s in window) / line["seconds"]
    return line


def _means(window: list[_Step], name: str, checkpoints: Checkpoints) -> dict[str, Any]:
    """The first entries of a line of the log.

    Raises:
      FloatingPointError: a step was not finite.
    """
    values = jax.device_get([step.values for step in window])
    for step, found in zip(window, values, strict=True):
        if np.isfinite(found["loss"]) and found["finite"]:
            continue
        what = f"the loss is {found['loss']}"
        if np.isfinite(found["loss"]):
            what = "the parameters or the optimiser's state are no longer finite"
        examples = "" if step.ids is None else f" (its examples: {_listed(step.ids)})"
        kept = "There is no checkpoint yet"
        if checkpoints.latest is not None:
            kept = f"The checkpoint of step {checkpoints.latest} is kept in {checkpoints.folder}"
        raise FloatingPointError(
            f"{name}: {what} at step {step.number}{examples}. {kept}. The run is deterministic and "
            "would end so again: look at those examples, or try a lower learning rate, a longer "
            "warm-up, stronger clipping or float32, in another folder"
        )
    line: dict[str, Any] = {"step": window[-1].number}
    for metric in values[0]:
        if metric != "finite":
            mean = float(np.mean([found[metric] for found in values], dtype=np.float64))
            line[metric] = mean if math.isfinite(mean) else None
    return line


def _shown(line: dict[str, Any], *metrics: str | None) -> dict[str, str]:
    values = {metric: line[metric] for metric in metrics if metric is not None}
    return {metric: f"{x:.4g}" for metric, x in values.items() if x is not None}


def _listed(ids: np.ndarray, most: int = 256) -> str:
    flat = np.asarray(ids).reshape(-1).tolist()
    more = f" and {len(flat) - most} more" if len(flat) > most else ""
    return ", ".join(map(str, flat[:most])) + more


def _rewind(log: Path, step: int) -> None:
    """Drop what was logged after a step, and the half line that a killed run may have left."""
    if jax.process_index():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, LookupError, TypeError):
            break
        kept.append(line + "\n")
    new = log.with_name(log.name + ".new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(log)


def _append(log: Path, line: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
