"""From images and sentences to a model's inputs, on the host."""

import hashlib
import json
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from jaxrel.images import rgb
from jaxrel.models import display
from jaxrel.models.checkpoint import some
from jaxrel.models.preprocessing import IMAGES, ImageProcessing, read_images
from jaxrel.models.tokenizer import TOKENIZER_FILES, quiet_transformers, read_tokenizer
from jaxrel.renamed import renamed

__all__ = ["Processor"]

# Where a tokenizer was loaded from, which changes nothing that it does.
_WHERE = ("name_or_path", "is_local", "local_files_only")


@dataclass(frozen=True, eq=False)
class Processor:
    """A model's own tokenizer and image preprocessing.

    It is compared by what it holds: a program that was compiled for a model serves another that
    was loaded from the same files.

    Args:
      tokenizer: a `transformers` tokenizer, or None when the model came without one.
      images: an `ImageProcessing`, a `transformers` image processor that works on PIL images,
        or None.
    """

    tokenizer: Any = None
    images: Any = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Processor):
            return NotImplemented
        return self is other or self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @cached_property
    def _content(self) -> str:
        """A digest of all that the tokenizer and the image preprocessing do."""
        fields = [type(self.tokenizer).__name__, type(self.images).__name__]
        if self.tokenizer is not None:
            given = sorted(self.tokenizer.init_kwargs.items())
            kept = [one for one in given if one[0] not in _WHERE and not one[0].endswith("_file")]
            fields += [self.tokenizer.backend_tokenizer.to_str(), str(kept)]
        if self.images is not None:
            fields.append(json.dumps(self.images.to_dict(), sort_keys=True, default=str))
        return hashlib.sha256("\0".join(fields).encode()).hexdigest()

    @classmethod
    def from_folder(
        cls, folder: Path, *, image_size: int | tuple[int, int] | None = None
    ) -> "Processor":
        """Read the tokenizer and the image preprocessing of a model folder.

        Args:
          folder: a folder in the Hugging Face layout; what it lacks is None in the result.
          image_size: resize and crop to this instead of the folder's number; see
            `ImageProcessing.for_size`.

        Raises:
          ValueError: a file is there and cannot be read.
        """
        return cls(read_tokenizer(folder), read_images(folder, image_size))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's and the image processor's files into `folder`."""
        with quiet_transformers():
            for part in (self.tokenizer, self.images):
                if part is not None:
                    part.save_pretrained(folder)

    def check_vocabulary(self, size: int, *, exact: bool = False) -> None:
        """Raise ValueError if the tokenizer, if there is one, is not that of a model.

        Args:
          size: the number of tokens of the model.
          exact: whether the tokenizer must have as many tokens; otherwise it may have fewer.
        """
        count = size if self.tokenizer is None else len(self.tokenizer)
        if count > size or (exact and count != size):
            ids = {} if self.tokenizer is None else self.tokenizer.get_vocab()
            beyond = sorted(token for token, index in ids.items() if index >= size)
            raise ValueError(
                f"the tokenizer has {count} tokens and the model {size}"
                + (f", which lacks {some(beyond)}" if beyond else "")
                + ": this is the tokenizer of another model, or its files were changed"
            )

    def image(
        self, image: Any, *, side: int | tuple[int, int] | None = None
    ) -> Float[np.ndarray, "batch height width 3"]:
        """Resize, crop and normalise images.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them. They are read
            as `jaxrel.images.read_image` reads files: upright, on white.
          side: pixels of a side of the square that the model reads, or (height, width).

        Returns:
          float32 images, NHWC, normalised as the model expects.

        Raises:
          TypeError: not an image.
          ValueError: no image, an array of another shape, an image whose colours are not sure, a
            model without preprocessing, or preprocessing that makes images of another size.
        """
        self._require_images()
        sides = (side, side) if isinstance(side, int) else side
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images or any(one is None for one in images):
            raise ValueError("no image: pass image= a PIL image, a uint8 array, or a list")
        # What fills up a batch, or goes with several texts, is the same image again.
        once = {id(one): one for one in images}
        values = self._pixels([_rgb(one) for one in once.values()], sides)
        place = {key: i for i, key in enumerate(once)}
        return values if len(once) == len(images) else values[[place[id(x)] for x in images]]

    def _pixels(
        self, images: list[Image.Image], sides: tuple[int, int] | None
    ) -> Float[np.ndarray, "batch height width 3"]:
        if isinstance(self.images, ImageProcessing):
            # Sizes that do not fit are told before memory is taken for them.
            _check_shapes({self.images.made(one.size) for one in images}, sides)
            return np.stack([self.images(one) for one in images])
        with quiet_transformers():
            found = [self.images([one], return_tensors="np")["pixel_values"][0] for one in images]
        _check_shapes({one.shape[1:] for one in found}, sides)
        return np.stack(found).astype(np.float32).transpose(0, 2, 3, 1)

    def seen(self, image: Any) -> Image.Image:
        """Return the part of an image that `image` keeps, at the image's own resolution.

        Args:
          image: a PIL image or a uint8 [height, width, 3] array.

        Raises:
          TypeError, ValueError: as for `image`.
        """
        self._require_images()
        steps = self.images
        if not isinstance(steps, ImageProcessing):
            steps = ImageProcessing.from_dict(steps.to_dict())
        return steps.seen(_rgb(image))

    def text(
        self, text: Any, context: int, *, unknown: str = "warn"
    ) -> Int[np.ndarray, "batch tokens"]:
        """Turn sentences into token ids, padded to `context`.

        Args:
          text: a sentence or a list of sentences.
          context: the number of tokens the model reads.
          unknown: what to do about unknown words: "warn", or "raise".

        Returns:
          int32 token ids.

        Raises:
          TypeError: not text.
          ValueError: no text, an empty one, one that is too long, one whose words are all
            unknown, one that contains a special token, or a model without tokenizer.

        Warns:
          UserWarning: some words are unknown.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"this model has no tokenizer: its folder holds no {TOKENIZER_FILES}; copy the "
                "tokenizer's files from the model's origin into the folder, or pass "
                "processor=Processor(tokenizer, ...) to the model"
            )
        texts = _texts(text)
        if self._pad is None:
            raise ValueError(
                "this model's tokenizer has neither a padding nor an end token; name them in its "
                "tokenizer_config.json, as pad_token and eos_token"
            )
        ids, spans = self._encoded(texts)
        for sentence, row in zip(texts, ids, strict=True):
            self._check(sentence, row, context)
        rows = zip(texts, ids, spans, strict=True)
        self._check_words(texts, [self._known_words(*row) for row in rows], unknown)
        padded = np.full((len(ids), context), self._pad, np.int32)
        for i, values in enumerate(ids):
            padded[i, : len(values)] = values
        return padded

    def spelling(self, text: Any, context: int, *, known: bool = False) -> dict[str, Any]:
        """Return how texts are displayed, where their ids alone do not tell.

        Unknown words keep their spelling, and what is written as one word is one.

        Args:
          text: what `text` was given.
          context: the number of tokens the model reads.
          known: as in `tokens`; unknown words are displayed, and marked.

        Returns:
          {"spelling": Unicode code points, int32 [batch, tokens, letters]}, to be kept beside the
          ids; or nothing.
        """
        texts = _texts(text)
        ids, spans = self._encoded(texts)
        added = {*self.tokenizer.get_added_vocab().values()} - {self._unknown}
        shown = self.tokens(ids, known=known)
        spelled = []
        for sentence, row, places, words in zip(texts, ids, spans, shown, strict=True):
            unknown = [i for i, index in enumerate(row) if index == self._unknown]
            if known:
                unknown = [i for i in unknown if display.is_word(sentence[slice(*places[i])])]
            alone = [i for i, index in enumerate(row) if index in added]
            spelled.append(display.spelled(words, sentence, places, unknown, alone))
        return {} if spelled == shown else {display.SPELLING: display.encode(spelled, context)}

    def tokens(
        self, ids: Int[np.ndarray, "batch tokens"] | Sequence[Sequence[int]], *, known: bool = False
    ) -> list[list[str]]:
        """Return one string to display per token; see `jaxrel.models.display`.

        Args:
          ids: token ids.
          known: whether unknown tokens are "" too, as special and padding tokens are.

        Raises:
          ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"this model has no tokenizer: its folder holds no {TOKENIZER_FILES}")
        lists: Any = ids.tolist() if isinstance(ids, np.ndarray) else ids
        rows = [display.strings(self.tokenizer, row, self.specials) for row in lists]
        hidden = self.tokenizer.unk_token if known else None
        return [["" if token == hidden else token for token in row] for row in rows]

    def shown(self, inputs: Mapping[str, Any], *, known: bool = False) -> list[list[str]]:
        """Return what `tokens` does, as the texts are spelled where the inputs say so.

        Args:
          inputs: "text", and what `spelling` returned.
          known: as in `tokens`.
        """
        if display.SPELLING in inputs:
            return display.decode(np.asarray(inputs[display.SPELLING]))
        return self.tokens(np.asarray(inputs["text"]), known=known)

    @property
    def _pad(self) -> int | None:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else end

    @property
    def specials(self) -> set[int]:
        """The ids of tokens that stand for no part of a text; none without a tokenizer."""
        if self.tokenizer is None:
            return set()
        t = self.tokenizer
        return {t.bos_token_id, t.eos_token_id, t.pad_token_id} - {None}

    @property
    def _unknown(self) -> int | None:
        """The id of unknown words; CLIP's tokenizer knows every byte, and names its end token."""
        unknown = self.tokenizer.unk_token_id
        return None if unknown in self.specials else unknown

    def _encoded(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Ids, and where the text of each token starts and stops."""
        with quiet_transformers():
            out = self.tokenizer(texts, return_offsets_mapping=True, verbose=False)
        return out["input_ids"], out["offset_mapping"]

    def _check(self, sentence: str, ids: list[int], context: int) -> None:
        content = [i for i in ids if i not in self.specials]
        if not content:
            raise ValueError(f"the text {_short(sentence)} holds no word; write what to look for")
        if len(ids) > context:
            raise ValueError(
                f"the text {_short(sentence)} has {len(ids)} tokens with its start and end token, "
                f"and this model reads at most {context}: shorten it by {len(ids) - context}"
            )
        inside = [i for i in ids[1:-1] if i in self.specials]
        if inside:
            name = self.tokenizer.convert_ids_to_tokens(inside[0])
            raise ValueError(
                f"the text {_short(sentence)} contains {name!r}, which is a special token of this "
                "model's tokenizer: take it out"
            )

    def _known_words(
        self, text: str, ids: list[int], spans: list[tuple[int, int]]
    ) -> dict[str, bool]:
        """Whether the tokenizer knows each word of a text."""
        words = [text[start:stop] for start, stop in spans]
        return {
            word: index != self._unknown
            for word, index in zip(words, ids, strict=True)
            if display.is_word(word)
        }

    def _check_words(
        self, texts: Sequence[str], known: Sequence[Mapping[str, bool]], unknown: str
    ) -> None:
        if self._unknown is None:
            return
        missing: dict[str, None] = {}
        for text, words in zip(texts, known, strict=True):
            here = [word for word, is_known in words.items() if not is_known]
            if here and unknown == "raise":
                raise ValueError(
                    f"this model does not know {', '.join(map(_short, here))} in the caption "
                    f"{_short(text)}; it knows {len(self.tokenizer)} tokens, see "
                    "model.processor.tokenizer.get_vocab()"
                )
            if not any(words.values()):
                raise ValueError(
                    f"this model knows none of the words of {_short(text)}; its vocabulary has "
                    f"{len(self.tokenizer)} tokens, such as {self._examples()}"
                )
            missing.update(dict.fromkeys(here))
        if missing:
            warnings.warn(
                f"this model does not know {', '.join(map(_short, missing))}; the text is read "
                "without the meaning of these words",
                UserWarning,
                stacklevel=5,  # the caller of the model's `prepare`
            )

    def _examples(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [token for token, _ in vocabulary if token.isalpha() and len(token) > 2]
        return ", ".join(words[:8])

    def _require_images(self) -> None:
        if self.images is None:
            raise ValueError(
                f"this model has no image preprocessing: its folder holds no {IMAGES}; "
                "copy that file from the model's origin into the folder, or pass "
                "processor=Processor(tokenizer, image_processing(size)) to the model"
            )


def _short(text: str) -> str:
    """A text in quotes, for a message."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if texts is None or (isinstance(texts, (list, tuple)) and not texts):
        raise ValueError("no text: pass text= a sentence or a list of sentences")
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise TypeError(f"text must be a string or a list of strings, got {text!r}")
    for sentence in texts:
        if not sentence.strip():
            raise ValueError(f"the text is empty: {sentence!r}; write what to look for")
    return [unicodedata.normalize("NFC", sentence) for sentence in texts]


def _check_shapes(shapes: set[tuple[int, ...]], sides: tuple[int, int] | None) -> None:
    """Raise ValueError unless images are of one shape, (height, width), and of `sides`."""
    if shapes == {sides} or (sides is None and len(shapes) == 1):
        return
    made = " and ".join(f"{width} x {height}" for height, width in sorted(shapes))
    wanted = "of one size, which a model needs"
    cure = ""
    if sides is not None:
        height, width = sides
        wanted = f"of {width} x {height}, which the model reads (image_size in config.json)"
        size = str(width) if height == width else f"height {height} and width {width}"
        cure = f": set size and crop_size there to {size}, and do_center_crop to true"
    raise ValueError(
        f"the image preprocessing ({IMAGES} in the model's folder) makes images of {made} pixels, "
        f"and not {wanted}{cure}"
    )


def _rgb(image: Any) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(
                f"an image array must be uint8 with values 0..255, got {image.dtype}; "
                "for values 0..1 pass (255 * x).round().astype('uint8')"
            )
        if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise ValueError(
                f"an image array must have shape [height, width, 3], got {list(image.shape)}; "
                "pass several images as a list"
            )
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"an image must be a PIL image or a uint8 array, got {type(image).__name__}; "
            "open a file with jaxrel.images.read_image or PIL.Image.open"
        )
    return rgb(image)


__getattr__ = renamed(
    __name__,
    {
        name: f"jaxrel.models.preprocessing.{name}"
        for name in ("IMAGENET_MEAN", "IMAGENET_STD", "image_processing", "imagenet_processing")
    },
)
