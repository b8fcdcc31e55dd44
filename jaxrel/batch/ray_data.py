"""The engine for many machines: Ray Data places, feeds and restarts actors that explain shards.

A row of the dataset is a shard that the folder lacks; an actor holds the model, explains the
shard's inputs and writes its file, as the embedded engine does. So a job goes on after any end of
either engine, and what Ray does twice (a worker that was lost) is written once. The input and the
output folder must be reachable from all machines under the same name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm

from jaxrel.batch.embedded import Draw, explain_shard
from jaxrel.batch.explainer import Explainer
from jaxrel.batch.folder import Folder
from jaxrel.batch.sources import Source
from jaxrel.explanations.tables import required


class _Worker:
    """An actor: the model, loaded once, and its shards."""

    def __init__(
        self,
        make_explainer: Callable[[], Explainer],
        open_source: Callable[[], Source],
        folder: Folder,
        options: Mapping[str, Any],
    ) -> None:
        self.explainer = make_explainer()
        self.source = open_source()
        self.folder = folder
        self.options = options

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        shards = [int(shard) for shard in batch["shard"]]
        errors = [
            explain_shard(self.explainer, self.source, self.folder, shard, **self.options)
            for shard in shards
        ]
        return {"shard": shards, "errors": errors}


def run(
    make_explainer: Callable[[], Explainer],
    open_source: Callable[[], Source],
    folder: Folder,
    *,
    precision: str = "float32",
    threads: int = 2,
    draw: Draw | None = None,
    address: str | None = None,
    actors: int = 1,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
) -> int:
    """Explain the rows of a source that a folder lacks, on Ray Data.

    Args:
      make_explainer: makes what explains them, in every actor; it is pickled.
      open_source: opens the rows, in every actor.
      folder: where to; it is open.
      precision, threads, draw: as of `embedded.run`, of every actor; `draw` is pickled.
      address: of a Ray cluster; None: Ray runs on this machine.
      actors: how many, each with its own model.
      num_cpus, num_gpus, resources: what Ray reserves for an actor, such as {"TPU": 4}.

    Returns:
      How many rows have an error, of those explained now.

    Raises:
      ModuleNotFoundError: Ray is missing.
      RuntimeError: an actor failed in a way that trying again does not mend.
    """
    options = {"precision": precision, "threads": threads, "draw": draw}
    ray = required("ray", extra="ray")
    data = required("ray.data", extra="ray")
    missing = folder.missing()
    if not missing:
        return 0
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    reserved = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": dict(resources or {})}
    shards = data.from_items([{"shard": i} for i in missing], override_num_blocks=len(missing))
    explained = shards.map_batches(
        _Worker,
        fn_constructor_args=(make_explainer, open_source, folder, options),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(actors, len(missing))),
        **{name: value for name, value in reserved.items() if value},
    )
    sizes = {i: stop - start for i in missing for start, stop in [folder.inputs(i)]}
    errors = 0
    with tqdm(total=folder.rows, initial=folder.rows - sum(sizes.values()), unit="row") as bar:
        for row in explained.iter_rows():
            bar.update(sizes[row["shard"]])
            errors += row["errors"]
    return errors
