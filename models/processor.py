"""From images and sentences to a model's inputs, on the host."""

import hashlib
import json
import os
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

TOKENIZER_FILES = "tokenizer.json (or vocab.json and merges.txt)"
IMAGE_FILES = "preprocessor_config.json"

# Of the images that the published encoders were trained on, for each channel in 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import or call transformers without its advice to install PyTorch, which is not needed."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass(frozen=True, eq=False)
class Processor:
    """A model's own tokenizer and image preprocessing.

    It is compared by what it holds: a program that was compiled for a model serves another that
    was loaded from the same files.

    Args:
      tokenizer: a `transformers` tokenizer, or None when the model came without one.
      images: a `transformers` image processor that works on PIL images, or None.
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
            fields += [self.tokenizer.backend_tokenizer.to_str(), str(self.tokenizer.init_kwargs)]
        if self.images is not None:
            fields.append(json.dumps(self.images.to_dict(), sort_keys=True, default=str))
        return hashlib.sha256("\0".join(fields).encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: Path, *, image_size: int | None = None) -> "Processor":
        """Read the tokenizer and the image preprocessing of a model folder.

        Args:
          folder: a folder in the Hugging Face layout; what it lacks is None in the result.
          image_size: resize and crop to this many pixels instead of the folder's number.

        Raises:
          ValueError: a file is there and cannot be read.
        """
        return cls(_read_tokenizer(folder), _read_images(folder, image_size))

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
            raise ValueError(
                f"the tokenizer has {count} tokens and the model {size}: this is the tokenizer of "
                "another model"
            )

    def image(self, image: Any) -> Float[np.ndarray, "batch height width 3"]:
        """Resize, crop and normalise images.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them.

        Returns:
          float32 images, NHWC, normalised as the model expects.

        Raises:
          TypeError: not an image.
          ValueError: no image, an array of another shape, an image of another depth than
            8 bits, or a model without preprocessing.
        """
        self._require_images()
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if image is None or not images:
            raise ValueError("no image: pass image= a PIL image, a uint8 array, or a list")
        # What fills up a batch, or goes with several texts, is the same image again.
        once = {id(one): one for one in images}
        with quiet_transformers():
            out = self.images([_rgb(one) for one in once.values()], return_tensors="np")
        place = {key: i for i, key in enumerate(once)}
        values = np.asarray(out["pixel_values"], np.float32).transpose(0, 2, 3, 1)
        return values if len(once) == len(images) else values[[place[id(x)] for x in images]]

    def seen(self, image: Any) -> Image.Image:
        """Return the part of an image that `image` keeps, at the image's own resolution.

        Args:
          image: a PIL image or a uint8 [height, width, 3] array.

        Raises:
          TypeError, ValueError: as for `image`.
        """
        self._require_images()
        image = _rgb(image)
        width, height = image.size
        side = getattr(self.images.size, "shortest_edge", None)
        if not (self.images.do_resize and self.images.do_center_crop and side):
            return image
        # The shortest side becomes `side` pixels, of which the crop keeps the middle.
        scale = min(width, height) / side
        kept = [
            min(side_length, round(crop * scale))
            for side_length, crop in (
                (width, self.images.crop_size.width),
                (height, self.images.crop_size.height),
            )
        ]
        left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
        return image.crop((left, top, left + kept[0], top + kept[1]))

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
        with quiet_transformers():
            out = self.tokenizer(texts, return_offsets_mapping=True, verbose=False)
        ids = out["input_ids"]
        for sentence, row in zip(texts, ids, strict=True):
            self._check(sentence, row, context)
        rows = zip(texts, ids, out["offset_mapping"], strict=True)
        self._check_words(texts, [self._known_words(*row) for row in rows], unknown)
        padded = np.full((len(ids), context), self._pad, np.int32)
        for row, values in zip(padded, ids, strict=True):
            row[: len(values)] = values
        return padded

    def tokens(
        self, ids: Int[np.ndarray, "batch tokens"], *, known: bool = False
    ) -> list[list[str]]:
        """Return one string to display per token; "##" starts a token that continues a word.

        Args:
          ids: token ids.
          known: whether unknown tokens are "" too, as special and padding tokens are.

        Raises:
          ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"this model has no tokenizer: its folder holds no {TOKENIZER_FILES}")
        rows = [self._row_tokens(row) for row in ids.tolist()]
        hidden = self.tokenizer.unk_token if known else None
        return [["" if token == hidden else token for token in row] for row in rows]

    @property
    def _pad(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else end

    @property
    def _specials(self) -> set[int]:
        t = self.tokenizer
        return {t.bos_token_id, t.eos_token_id, t.pad_token_id} - {None}

    def _check(self, sentence: str, ids: list[int], context: int) -> None:
        content = [i for i in ids if i not in self._specials]
        if not content:
            raise ValueError(f"the text {sentence!r} holds no word; write what to look for")
        if len(ids) > context:
            raise ValueError(
                f"the text {sentence[:60]!r} has {len(ids)} tokens with its start and end token, "
                f"and this model reads at most {context}: shorten it by {len(ids) - context}"
            )
        inside = [i for i in ids[1:-1] if i in self._specials]
        if inside:
            name = self.tokenizer.convert_ids_to_tokens(inside[0])
            raise ValueError(
                f"the text {sentence!r} contains {name!r}, which is a special token of this "
                "model's tokenizer: take it out"
            )

    def _known_words(
        self, text: str, ids: list[int], spans: list[tuple[int, int]]
    ) -> dict[str, bool]:
        """Whether the tokenizer knows each word of a text; a word holds a letter or a digit."""
        words = [text[start:stop] for start, stop in spans]
        return {
            word: index != self.tokenizer.unk_token_id
            for word, index in zip(words, ids, strict=True)
            if any(map(str.isalnum, word))
        }

    def _check_words(
        self, texts: Sequence[str], known: Sequence[Mapping[str, bool]], unknown: str
    ) -> None:
        # CLIP's byte-level tokenizer knows every byte, and names its end token as unknown.
        if self.tokenizer.unk_token_id in {None, *self._specials}:
            return
        missing: dict[str, None] = {}
        for text, words in zip(texts, known, strict=True):
            here = [word for word, is_known in words.items() if not is_known]
            if here and unknown == "raise":
                raise ValueError(
                    f"this model does not know {', '.join(map(repr, here))} in the caption "
                    f"{text!r}; it knows {len(self.tokenizer)} tokens, see "
                    "model.processor.tokenizer.get_vocab()"
                )
            if not any(words.values()):
                raise ValueError(
                    f"this model knows none of the words of {text!r}; its vocabulary has "
                    f"{len(self.tokenizer)} tokens, such as {self._examples()}"
                )
            missing.update(dict.fromkeys(here))
        if missing:
            warnings.warn(
                f"this model does not know {', '.join(map(repr, missing))}; the text is read "
                "without the meaning of these words",
                UserWarning,
                stacklevel=5,  # the caller of the model's `prepare`
            )

    def _examples(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [token for token, _ in vocabulary if token.isalpha() and len(token) > 2]
        return ", ".join(words[:8])

    def _row_tokens(self, ids: list[int]) -> list[str]:
        suffix = getattr(self.tokenizer.backend_tokenizer.model, "end_of_word_suffix", None)
        row: list[str] = []
        word: list[str] = []
        for index, token in zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True):
            special = index in self._specials
            if not special:
                word.append(token.removesuffix(suffix) if suffix else token)
            if special or not suffix or token.endswith(suffix):
                row += self._show(word)
                word = []
            if special:
                row.append("")
        return row + self._show(word)

    def _require_images(self) -> None:
        if self.images is None:
            raise ValueError(
                f"this model has no image preprocessing: its folder holds no {IMAGE_FILES}; "
                "copy that file from the model's origin into the folder, or pass "
                "processor=Processor(tokenizer, image_processing(size)) to the model"
            )

    def _show(self, word: list[str]) -> list[str]:
        """One string per piece of a word; a character made of several pieces is in the first."""
        decoder = self.tokenizer.backend_tokenizer.decoder
        decode = decoder.decode if decoder is not None else "".join
        starts = []
        for i in range(len(word)):
            before = decode(word[:i])
            # U+FFFD at the end: a character that the piece before has begun.
            whole = before.rstrip("\ufffd")
            starts.append(len(whole) + (whole != before))
        ends = [*starts[1:], None]
        shown = [decode(word)[a:b] for a, b in zip(starts, ends, strict=True)] if word else []
        return [text if i == 0 else f"##{text}" for i, text in enumerate(shown)]


def image_processing(
    image_size: int,
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> Any:
    """Image preprocessing for a new model: shortest side to `image_size`, crop, normalise.

    Args:
      image_size: pixels of a side of the square the model sees.
      mean: taken from each channel, of values in 0..1.
      std: divides each channel.

    Returns:
      A `transformers` image processor for PIL images.
    """
    return _image_processor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
    )


def imagenet_processing(image_size: int = 224) -> Any:
    """Image preprocessing of encoders trained on ImageNet, as captioners use it.

    The whole image is resized to a square, without keeping the aspect, and normalised (Sun et
    al. 2022); `image_processing` crops instead.

    Args:
      image_size: pixels of a side of the square the model sees.

    Returns:
      A `transformers` image processor for PIL images, for `Processor`.
    """
    return _image_processor(
        size={"height": image_size, "width": image_size},
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )


def _image_processor(**fields: Any) -> Any:
    with quiet_transformers():
        try:
            from transformers.models.clip import image_processing_pil_clip as pil

            return pil.CLIPImageProcessorPil(**fields)
        except ImportError:
            # Older releases of transformers have one class, which works on PIL.
            from transformers.models.clip import image_processing_clip as clip

            return clip.CLIPImageProcessor(**fields)


def _read_images(folder: Path, image_size: int | None) -> Any:
    fields: Any = None
    # transformers 5 writes one file for the whole processor, older ones a file for images.
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
            if name == "processor_config.json":
                fields = fields.get("image_processor")
            break
    if fields is None:
        return None
    kinds = ("image_processor_type", "feature_extractor_type", "processor_class")
    fields = {key: value for key, value in fields.items() if key not in kinds}
    if image_size is not None:
        fields["size"] = {"shortest_edge": image_size}
        fields["crop_size"] = {"height": image_size, "width": image_size}
    return _image_processor(**fields)


def _read_tokenizer(folder: Path) -> Any:
    with quiet_transformers():
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast as Tokenizer
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            from transformers import CLIPTokenizer as Tokenizer
        else:
            return None
        try:
            return Tokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(
                f"the tokenizer in {folder} cannot be read ({error}); fetch {TOKENIZER_FILES} again"
            ) from error


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
            "open a file with PIL.Image.open"
        )
    if image.mode[0] in "IF":
        raise ValueError(
            f"the image has mode {image.mode} (more than 8 bits a channel), whose range is "
            "not known here; convert it to 8 bits first"
        )
    # A palette with transparency converts without a warning only by way of RGBA.
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
