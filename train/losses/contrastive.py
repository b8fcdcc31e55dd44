"""CLIP's loss (Radford et al. 2021): every image finds its caption, and every caption its image."""

import optax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrel.models.clip import CLIP


def contrastive_loss(
    model: CLIP,
    image: Float[Array, "batch height width 3"],
    text: Int[Array, "batch tokens"],
) -> Float[Array, ""]:
    """Mean of two cross-entropies: of finding the caption, and of finding the image.

    Args:
      model: a CLIP.
      image: normalised, as the model reads it.
      text: the caption of each image; all others of the batch are wrong for it.
    """
    logits = model({"image": image, "text": text})["logits_per_image"]
    labels = jnp.arange(len(logits))
    losses = optax.softmax_cross_entropy_with_integer_labels
    return (losses(logits, labels).mean() + losses(logits.T, labels).mean()) / 2
