"""What all models with a tokenizer and image preprocessing do alike."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from flax import nnx

from jaxrel.models.checkpoint import Parameter, save_model
from jaxrel.models.familiarity import Familiarity
from jaxrel.models.processor import Processor


class Model(nnx.Module):
    """A model with its own preprocessing, which is saved as a folder.

    Attributes:
      config: the sizes.
      processor: tokenizer and image preprocessing.
      parameter_table: where each parameter is in a file of weights; None: named by its path.
      familiar: what images like those of the training look like; None where that is not known.
        `save_pretrained` does not write it, since a model may have learned more in between.
    """

    config: Any
    processor: Processor
    parameter_table: ClassVar[Sequence[Parameter] | None] = None
    familiar: Familiarity | None = None

    def seen(self, image: Any) -> Any:
        """Return the part of an image that the model sees; `prepare` crops to the middle."""
        return self.processor.seen(image)

    def familiarity(
        self, inputs: Mapping[str, Any], text: Sequence[str], score: Any
    ) -> list[dict[str, Any]]:
        """Return how far each input is from what the model was trained on.

        Args:
          inputs: one row per score, as `pairs` returns them.
          text: by row, the text as it was given; "" where the model wrote it.
          score: by row.

        Returns:
          By row, what is known of "familiarity" (numbers), "unknown words" and "notes", which
          say in words what is unusual.
        """
        found: list[dict[str, Any]] = []
        distance = self._distance(inputs, len(text))
        for sentence, far, value in zip(text, distance, np.asarray(score), strict=True):
            unknown = self._unknown_words(sentence)
            numbers: dict[str, Any] = {}
            notes: list[str] = []
            if self.familiar is not None and far is not None:
                numbers, notes = self.familiar.told(far, float(value))
            if unknown:
                notes.append(f"The model does not know {', '.join(map(repr, unknown))}.")
            found.append({"familiarity": numbers, "unknown words": unknown, "notes": notes})
        return found

    def _distance(self, inputs: Mapping[str, Any], rows: int) -> list[float | None]:
        """By row, how far its image is from what is familiar; None where that is not known."""
        if self.familiar is None or "image" not in inputs:
            return [None] * rows
        image = np.asarray(inputs["image"])
        # The words of a caption share an image, which is measured once.
        which = np.asarray(inputs.get("example", np.arange(rows)))
        _, first, back = np.unique(which, return_index=True, return_inverse=True)
        return self.familiar.distance(image[first])[back].tolist()

    def _unknown_words(self, text: str) -> list[str]:
        tokenizer = self.processor.tokenizer
        unknown = None if tokenizer is None else tokenizer.unk_token_id
        # CLIP's byte-level tokenizer knows every byte, and names its end token as unknown.
        if not text or unknown in {None, tokenizer.eos_token_id, tokenizer.pad_token_id}:
            return []
        read = tokenizer(text, return_offsets_mapping=True, verbose=False)
        spans = zip(read["input_ids"], read["offset_mapping"], strict=True)
        words = [text[start:stop] for index, (start, stop) in spans if index == unknown]
        return [word for word in dict.fromkeys(words) if any(map(str.isalnum, word))]

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
