"""A function of one's own as a model that `Explainer` and `jaxrel.explain` take."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionModel:
    """What `of_function` returns: it speaks the protocol `Explainable`."""

    fun: Any
    layout: Any = dataclasses.field(metadata={"static": True})
    preparation: Callable = dataclasses.field(metadata={"static": True})
    target_token: Any = dataclasses.field(metadata={"static": True})
    words: Callable | None = dataclasses.field(metadata={"static": True})
    kept: Callable | None = dataclasses.field(metadata={"static": True})

    def prepare(self, *, image: Any, text: Any) -> Mapping[str, Any]:
        """Images and sentences as the function's inputs."""
        return self.preparation(image, text)

    def pairs(self, inputs: Mapping[str, Any], target: Any = None) -> dict[str, Any]:
        """The inputs, with the targets as "target" where there are some."""
        extra = {} if target is None else {"target": np.asarray(target)}
        return {**inputs, **extra}

    def score(self, inputs: Mapping[str, Any]) -> Any:
        """What the function returns: the scalar to explain, one per row."""
        return self.fun(inputs)

    def describe(self, inputs: Mapping[str, Any]) -> list[str]:
        """Each row's target, if there are some."""
        rows = len(next(iter(inputs.values())))
        return [str(x) for x in inputs.get("target", ["score"] * rows)]

    def target_tokens(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """By stream, the token each row's score is read from."""
        given = self.target_token
        if callable(given):
            return given(inputs)
        rows = len(next(iter(inputs.values())))
        return {stream.name: np.full(rows, given) for stream in self.layout.streams}

    def content(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """By stream, which tokens stand for something."""
        if self.kept is not None:
            return self.kept(inputs)
        rows = len(next(iter(inputs.values())))
        return {
            s.name: np.tile(np.arange(s.tokens) >= s.prefix, (rows, 1)) for s in self.layout.streams
        }

    def tokens(self, inputs: Mapping[str, Any]) -> Sequence[Sequence[str]]:
        """By row, how to display the text's tokens: by their numbers, where nobody says."""
        if self.words is not None:
            return self.words(inputs)
        texts = [stream for stream in self.layout.streams if stream.modality == "text"]
        if not texts:
            return ()
        shown = [str(i) if i >= texts[0].prefix else "" for i in range(texts[0].tokens)]
        return [shown] * len(next(iter(inputs.values())))

    def seen(self, image: Any) -> Image.Image:
        """The whole image."""
        return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))


def of_function(
    fun: Callable,
    *,
    layout: Any,
    prepare: Callable,
    target_token: int | Callable = 0,
    tokens: Callable | None = None,
    content: Callable | None = None,
) -> FunctionModel:
    """Make a function one that `Explainer` and `jaxrel.explain` take as a model.

    Args:
      fun: `inputs -> [batch]`, the scalar to explain, one per row. An NNX or Equinox module, or a
        `jax.tree_util.Partial` of parameters, passes its parameters as data; what a plain function
        closes over becomes part of the compiled program.
      layout: a `jaxrel.models.Layout`. Its streams have the names of the attention maps: their
        tags, or what `jaxrel.attention.sites` lists.
      prepare: `(images, texts) -> inputs`, a dict of arrays with a row per example. Images are
        lists of what rows hold, PIL images for paths and bytes; texts are a list or None.
      target_token: the token that the score is read from, or `inputs -> {stream: [batch]}`.
      tokens: `inputs -> by row, a string per token` of the text; their numbers, by default.
      content: `inputs -> {stream: bool [batch, tokens]}`, the tokens that stand for something; by
        default all after the prefix of the stream.

    Returns:
      A model.
    """
    leaves = jax.tree.leaves(fun)
    if len(leaves) == 1 and leaves[0] is fun:
        fun = jax.tree_util.Partial(fun)
    return FunctionModel(fun, layout, prepare, target_token, tokens, content)
