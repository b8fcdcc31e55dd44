"""What all models with a tokenizer and image preprocessing do alike."""

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from flax import nnx

from jaxrel.models.checkpoint import Parameter, save_model
from jaxrel.models.processor import Processor


class Model(nnx.Module):
    """A model with its own preprocessing, which is saved as a folder.

    Attributes:
      config: the sizes.
      processor: tokenizer and image preprocessing.
      parameter_table: where each parameter is in a file of weights; None: named by its path.
    """

    config: Any
    processor: Processor
    parameter_table: ClassVar[Sequence[Parameter] | None] = None

    def seen(self, image: Any) -> Any:
        """Return the part of an image that the model sees; `prepare` crops to the middle."""
        return self.processor.seen(image)

    def save_pretrained(self, folder: str | os.PathLike, *, dtype: str = "float32") -> None:
        """Write config.json, model.safetensors and the processor's files.

        The folder appears as a whole, or, when something fails, not at all.

        Args:
          folder: a new folder, or an older model folder, which is replaced.
          dtype: dtype of the file, "float32", or "float16" for half the size.

        Raises:
          FileExistsError: the folder exists and is no model folder.
          ValueError: another dtype.
        """
        save_model(self, folder, self.parameter_table, dtype=dtype)


M = TypeVar("M", bound=Model)


def empty(kind: Callable[..., M], config: Any, processor: Processor | None) -> M:
    """Make a model that has shapes instead of parameters, for `checkpoint.fill`."""
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), processor=processor))
