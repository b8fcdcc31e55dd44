"""The tokens of CLIP's two streams, for all models that have its towers."""

import functools
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxrel.models.clip.config import CLIPConfig, TextConfig
from jaxrel.models.inputs import words_before
from jaxrel.models.processor import Processor


def end_of_text(
    text: Int[Array | np.ndarray, "batch tokens"], eos_token_id: int
) -> Int[Array, " batch"]:
    """Return the position of each text's end token.

    Args:
      text: token ids.
      eos_token_id: the end token; its first occurrence counts, since padding may use it too.
        2 stands in old Hugging Face configurations for "the highest id" of each text.
    """
    text = jnp.asarray(text)
    return jnp.argmax(text if eos_token_id == 2 else text == eos_token_id, axis=-1)


def token_ids(processor: Processor, text: Any, config: TextConfig) -> Int[Array, "batch tokens"]:
    """Turn texts into token ids.

    Args:
      processor: the model's.
      text: a text or a list of texts.
      config: sizes of the text tower.

    Raises:
      TypeError, ValueError: see `Processor.text`; also a tokenizer that ends texts with another
        id than the one the model looks for.
    """
    ids, tokenizer = processor.text(text, config.context), processor.tokenizer
    _check_ends(ids, tokenizer)
    found = tokenizer.eos_token_id
    last = np.asarray(end_of_text(ids, config.eos_token_id))
    at_end = ids[np.arange(len(ids)), last]
    if config.eos_token_id == 2 and (at_end > found).any():
        token = tokenizer.convert_ids_to_tokens(int(at_end.max()))
        raise ValueError(
            "config.json has the eos_token_id 2, which says that a text ends at its highest id, "
            f"and the token {token!r} was added to the tokenizer above its end, {found}: set "
            f"eos_token_id of text_config to {found} (in Python, TextConfig(eos_token_id={found}))"
        )
    if (at_end != found).any():
        raise ValueError(
            f"the tokenizer ends a text with the id {found}, and the model looks for the id "
            f"{config.eos_token_id} (eos_token_id of text_config in config.json): this is the "
            "tokenizer of another model, or that id is wrong"
        )
    return jnp.asarray(ids)


def _check_ends(ids: Int[np.ndarray, "batch tokens"], tokenizer: Any) -> None:
    """Raise ValueError unless texts have a start token and an end token."""
    there = {"bos_token": ids[:, 0] == tokenizer.bos_token_id}
    there["eos_token"] = (ids == tokenizer.eos_token_id).any(-1)
    for name, found in there.items():
        if not found.all():
            raise ValueError(
                f"this model's tokenizer puts no {name}, {getattr(tokenizer, name)!r}, around a "
                "text, which the model needs: post_processor in tokenizer.json says what it puts "
                "there; copy the tokenizer's files from the model's origin"
            )


def content(config: CLIPConfig, image: Any, text: Any) -> dict[str, Bool[Array, "batch tokens"]]:
    """Return where the tokens are that stand for something: patches, and words.

    Args:
      config: sizes of the model.
      image: [batch, ...], for the size of the batch.
      text: token ids.
    """
    sizes = (len(image), config.vision.tokens)
    return _content(jnp.asarray(text), vision=sizes, eos_token_id=config.text.eos_token_id)


# One program, since each operation of its own would be compiled.
@functools.partial(jax.jit, static_argnames=("vision", "eos_token_id"))
def _content(text: Array, *, vision: tuple[int, int], eos_token_id: int) -> dict[str, Array]:
    return {
        "vision": jnp.broadcast_to(jnp.arange(vision[1]) >= 1, vision),
        "text": words_before(text, end_of_text(text, eos_token_id)),
    }
