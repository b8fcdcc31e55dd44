"""`Explainer`: rows in, rows out, whatever runs it."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxrel.attention.methods import check_methods
from jaxrel.batch.rows import Row, as_rows, given_of, image_of
from jaxrel.explanations.examples import Batch, batches, size_of_batches
from jaxrel.explanations.explain import explain_prepared, way
from jaxrel.explanations.methods import Request, family
from jaxrel.explanations.result import Explanation
from jaxrel.explanations.tables import Columns, columns, example_of, failed, stacked

# What bad input raises: that row alone is lost, and the others go on.
BAD = (ValueError, TypeError, OSError, ArithmeticError)


class Loaded(NamedTuple):
    """Rows of a batch that are read and prepared, and what was wrong with the others.

    Attributes:
      rows: all of them.
      good: numbers of those that can be explained.
      errors: by number, why a row cannot.
      batch: the examples of the good rows, filled up.
      prepared: what the model made of them; None where none is good.
    """

    rows: list[Row]
    good: list[int]
    errors: dict[int, str]
    batch: Batch | None
    prepared: Any


class Explainer:
    """A pure function from rows of images and texts to rows of relevance.

    It is what every engine calls: a loop, `Dataset.map_batches` of Ray, `datasets.map` with
    `batched=True`, `mapInPandas` of Spark. Rows of any number go through programs of one size;
    one that cannot be read or explained becomes a row with an error and stops nothing.

    Args:
      model: what speaks the protocol `jaxrel.explanations.explain.Explainable`, such as
        `jaxrel.models.CLIP`; or, with `jaxrel.batch.of_function`, a function of your own.
      method: as in `jaxrel.explain`.
      batch_size: how many rows are explained together.
      mesh: a `jax.sharding.Mesh`; a batch is shared among the devices of its first axis, also
        where they belong to several processes (`jax.distributed`), each of which is then called
        with the same rows.
      layers, heads, sinks, importance, lrp, detector: as in `jaxrel.explain`.
      name: the model's name, for the record.
      strict: raise the first error of a row instead of returning it.

    Raises:
      ValueError: bad method, layers, heads, measure or size.
    """

    def __init__(
        self,
        model: Any,
        method: str | Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        mesh: Any = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        sinks: Any = None,
        importance: str = "grad_value",
        lrp: Any = None,
        detector: Any = None,
        name: str = "",
        strict: bool = False,
    ) -> None:
        kind = family(model)
        methods = check_methods(kind.usual if method is None else method, kind.methods, "method")
        self.model = model
        self.request = Request(methods, layers, heads, importance, lrp, detector, sinks)
        self.batch_size = size_of_batches(1, batch_size)
        self.mesh = mesh
        self.name = name
        self.strict = strict
        self._target = getattr(model.layout, "target", "example")
        way(model).check(model, self.request)

    @functools.cached_property
    def shapes(self) -> set[tuple[int, ...]]:
        """Rows and columns of the image's relevance, of all methods."""
        return way(self.model).map_shapes(self.model, self.request.methods)

    def __call__(self, rows: Any) -> Any:
        """Explain rows.

        Args:
          rows: a dict of columns, a list of dicts, a `pyarrow.Table` or a pandas DataFrame, with
            the columns "image" (a path, the bytes of a file, a PIL image, a uint8 `[height,
            width, 3]` array, or {"bytes", "path"}), "text" where the model reads one, and
            optionally "id" and "target". Other columns are not used.

        Returns:
          Rows in the same form, with the columns `jaxrel.batch.COLUMNS`: one per row, method and,
          of captions, word. A row with an "error" has no relevance.

        Raises:
          TypeError, ValueError: the rows are none of these, or lack a column.
        """
        given, back = as_rows(rows, lambda: self.shapes)
        loaded = map(self.prepare, self.split(given))
        return back(stacked([self.results(part)[1] for part in loaded]))

    def split(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """The rows in batches: at most `batch_size` of them, all with a text and target or none."""
        for _, group in itertools.groupby(rows, self._kind):
            while part := list(itertools.islice(group, self.batch_size)):
                yield part

    def _kind(self, row: Row) -> Any:
        """What must be the same of all rows of a batch."""
        target = row["target"] if self._target == "words" else row["target"] is None
        return row["text"] is None, target

    def prepare(self, rows: Sequence[Row]) -> Loaded:
        """Read and prepare the rows of a batch; threads may do so ahead of the device."""
        images: dict[int, Any] = {}
        errors: dict[int, str] = {}
        for i, row in enumerate(rows):
            with self._noted(errors, i):
                images[i] = image_of(row["image"])
                self.model.seen(images[i])
        try:
            batch, prepared = self._prepared(rows, images)
        except BAD:
            # Something is wrong with one of them: find out with which.
            for i, image in images.items():
                with self._noted(errors, i):
                    self._prepared(rows, {i: image})
            images = {i: image for i, image in images.items() if i not in errors}
            batch, prepared = self._prepared(rows, images)
        return Loaded([*rows], [*images], errors, batch, prepared)

    def _prepared(self, rows: Sequence[Row], images: Mapping[int, Any]) -> tuple[Any, Any]:
        """Some rows as a whole batch, filled up, and what the model makes of it."""
        if not images:
            return None, None
        texts, targets = ([rows[i][name] for i in images] for name in ("text", "target"))
        if self._target == "text" and targets[0] is not None:
            raise ValueError(
                f"the row has the target {targets[0]!r}, and this model compares each image with "
                "the text of its row: leave the target out"
            )
        lists = {
            "image": list(images.values()),
            "text": None if texts[0] is None else texts,
            "target": targets if self._target == "example" and targets[0] is not None else None,
        }
        (batch,) = batches(lists, self.batch_size)
        if self._target == "words":
            batch = dataclasses.replace(batch, target=targets[0])
        prepared = self.model.prepare(image=batch.image, text=batch.text)
        if batch.target is not None:
            self.model.pairs(prepared, batch.target)
        return batch, prepared

    def results(self, loaded: Loaded) -> tuple[list[Explanation], Columns]:
        """The explanations of the good rows of a batch, by method, and the table of all rows.

        Where the relevance of a row is not finite there are no explanations of the batch, but the
        table has those of its other rows.
        """
        try:
            found = self._explanations(loaded)
        except BAD as error:
            if self.strict:
                raise
            if len(loaded.rows) == 1:
                lost = loaded._replace(good=[], errors={0: str(error)})
                return [], self._table([], lost)
            # The relevance of one of them is not finite: find out of which.
            parts = [self.results(self.prepare([row])) for row in loaded.rows]
            return [], stacked([table for _, table in parts])
        return found, self._table(found, loaded)

    def _explanations(self, loaded: Loaded) -> list[Explanation]:
        if loaded.batch is None:
            return []
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return explain_prepared(
                self.model, loaded.prepared, loaded.batch, self.request, name=self.name
            )

    def _table(self, found: Sequence[Explanation], loaded: Loaded) -> Columns:
        """The table of a batch: its rows in order, and of each the methods in order."""
        names = given_of(loaded.rows)
        good = [loaded.rows[i]["id"] for i in loaded.good]
        given = [names[i] for i in loaded.good]
        parts = [columns(one, ids=good, given=given) for one in found]
        place = [loaded.good[i] for one in found for i in example_of(one)]
        for i, error in loaded.errors.items():
            parts.append(failed(loaded.rows[i]["id"], names[i], error))
            place.append(i)
        order = sorted(range(len(place)), key=place.__getitem__)
        return {name: [x[i] for i in order] for name, x in stacked(parts).items()}

    @contextlib.contextmanager
    def _noted(self, errors: dict[int, str], row: int) -> Iterator[None]:
        """Note what is wrong with a row, or raise it where the explainer is strict."""
        try:
            yield
        except BAD as error:
            if self.strict:
                raise
            errors[row] = str(error)
