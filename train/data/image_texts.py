"""Images and their texts as the arrays that a model trains on."""

import warnings
from collections.abc import Sequence

import numpy as np

from jaxrel.models.processor import Processor
from jaxrel.models.tokenizer import quiet_transformers
from jaxrel.train.data.files import ImageSource
from jaxrel.train.loop.batches import Example


class ImageTexts:
    """Every text of every image: the image, read and prepared when asked for, and token ids.

    Words that the model does not know are no fault: in large data sets there are many.

    Args:
      source: the images.
      texts: of each image.
      processor: the model's.
      context: tokens that the model reads; longer texts are left out with one warning.
      kind: what the texts are, for the warning: "captions".

    Attributes:
      images: the index in `source` of each example's image.
    """

    def __init__(
        self,
        source: ImageSource,
        texts: Sequence[Sequence[str]],
        processor: Processor,
        context: int,
        kind: str = "captions",
    ) -> None:
        tokenizer = processor.tokenizer
        with quiet_transformers():
            written = [text for several in texts for text in several]
            rows = tokenizer(written, verbose=False)["input_ids"]
        fits = np.array([len(row) <= context for row in rows], bool)
        if not fits.all():
            warnings.warn(
                f"{(~fits).sum()} of {len(fits)} {kind} have more than {context} tokens and are "
                "left out; a larger context keeps them",
                UserWarning,
                stacklevel=2,
            )
        pad = tokenizer.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        self.text = np.full((fits.sum(), context), pad, np.int32)
        for ids, row in zip(self.text, np.flatnonzero(fits), strict=True):
            ids[: len(rows[row])] = rows[row]
        self.images = np.repeat(np.arange(len(texts)), [len(several) for several in texts])[fits]
        self.source, self._processor = source, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        record = self.source[self.images[index]]
        return {
            "id": np.int64(record["id"]),
            "image": self._processor.image(record["image"])[0],
            "text": self.text[index],
        }
