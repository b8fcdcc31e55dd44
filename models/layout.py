"""What the axes of a model's attention maps mean."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stream:
    """One sequence of tokens that runs through a model.

    Args:
      name: the name of the stream's attention maps, as in `attention["vision"]`.
      modality: what the content tokens stand for.
      tokens: the number of tokens, special tokens included.
      grid: (rows, columns) of the content tokens of an image, row by row; None for text.
      prefix: the number of special tokens before the content.
      pooling: where the score is read from what an attention with a query of its own pools of the
        tokens, the tag of its map, [batch, heads, 1, tokens]; "" where it is read from a token.
      features: where an image is read by convolutions, and its tokens are its pixels, the tag of
        the last feature maps, [batch, rows, columns, channels]; "" where tokens attend.
    """

    name: str
    modality: Literal["image", "text"]
    tokens: int
    grid: tuple[int, int] | None = None
    prefix: int = 1
    pooling: str = ""
    features: str = ""


@dataclass(frozen=True)
class Layout:
    """The streams of a model, and how they attend.

    Args:
      streams: the streams.
      schedule: for two streams that attend to each other, in the terms of
        `jaxrel.attention.bimodal_accumulation`: tags of attention maps in the place of `Layers`.
        Stream s holds the target token. Empty where every stream attends to itself alone.
      by_word: whether `jaxrel.explain` explains captions word by word in the image's pixels, with
        one forward pass per caption: see `jaxrel.explanations.words.Captions`.
      target: what `target=` is of `jaxrel.explain`: the index of the "text" that each image is
        compared with, one of each "example" (such as its answer), or the "words" that are
        explained of every caption.
    """

    streams: tuple[Stream, ...]
    schedule: tuple[tuple[tuple[tuple[str, str], ...], ...], ...] = ()
    by_word: bool = False
    target: Literal["text", "example", "words"] = "example"

    def __getitem__(self, name: str) -> Stream:
        """Return the stream called `name`; KeyError names the streams there are."""
        for stream in self.streams:
            if stream.name == name:
                return stream
        raise KeyError(
            f"no stream {name!r}; this model has {', '.join(s.name for s in self.streams)}"
        )
