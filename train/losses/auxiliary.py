"""What a model learns beside its task: to name the object in each patch, to find what is asked.

A linear layer, which is thrown away after training, reads the names and places of objects from the
image's tokens. It makes the image tower tell objects apart many times sooner than answers or
words do.
"""

import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel.train.data.shapes.patches import NAMES, PHRASES


class PatchNames(nnx.Module):
    """What each patch shows, and where it is, read from normalised tokens by one linear layer.

    Args:
      features: of a token.
      grid: (rows, columns) of patches.
      rngs: for the initial parameters.
    """

    def __init__(self, features: int, grid: tuple[int, int], *, rngs: nnx.Rngs) -> None:
        self.head = nnx.Linear(features, sum(map(len, NAMES)) + 3, rngs=rngs)
        self.grid = grid

    def loss(
        self,
        tokens: Float[Array, "batch tokens features"],
        shown: Int[Array, "batch patches 3"],
    ) -> Float[Array, ""]:
        """Mean cross-entropy of colour, shape and size where there is an object, and of whether.

        Added is the mean Huber loss of the row and the column.

        Args:
          tokens: of the image, normalised, the class token first.
          shown: indices of colour, shape and size; -1 where a patch shows the background.
        """
        logits = self.head(tokens[:, 1:]).astype(jnp.float32)
        *names, rest = jnp.split(logits, np.cumsum([len(v) for v in NAMES]), axis=-1)
        there, place = rest[..., :1], rest[..., 1:]
        shown = shown.astype(jnp.int32)
        covered = shown[..., 0] >= 0
        entropy = optax.softmax_cross_entropy_with_integer_labels
        wrong = sum(entropy(name, shown[..., i].clip(0)) for i, name in enumerate(names))
        background = optax.sigmoid_binary_cross_entropy(there[..., 0], covered.astype(jnp.float32))
        named = jnp.where(covered, wrong, 0).sum() / jnp.maximum(covered.sum(), 1)
        index = jnp.arange(shown.shape[1])
        placed = jnp.stack([index // self.grid[1], index % self.grid[1]], axis=-1)
        wrong_place = optax.huber_loss(place, jnp.broadcast_to(placed, place.shape))
        return named + background.mean() + wrong_place.mean()


class Asked(nnx.Module):
    """What a question asks about: which patches show it, and where it lies."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Linear(features, PHRASES, rngs=rngs)
        self.places = nnx.Linear(features, 2 * PHRASES, rngs=rngs)

    def place_loss(
        self,
        token: Float[Array, "batch features"],
        place: Float[Array, "batch phrases 2"],
    ) -> Float[Array, ""]:
        """Mean Huber loss of the places of single objects, in sides of a patch.

        Args:
          token: that the answer is read from, normalised.
          place: (x, y) of what each phrase stands for; -1 where that is not one object.
        """
        found = self.places(token).astype(jnp.float32).reshape(place.shape)
        there = place >= 0
        wrong = optax.huber_loss(found, place.astype(jnp.float32))
        return jnp.where(there, wrong, 0).sum() / jnp.maximum(there.sum(), 1)

    def patch_loss(
        self,
        tokens: Float[Array, "batch tokens features"],
        asked: Bool[Array, "batch patches phrases"],
        counted: Bool[Array, " batch"],
    ) -> Float[Array, ""]:
        """Mean binary cross-entropy of the patches asked about plus that of all others.

        Args:
          tokens: of the image, for one question each, the class token first.
          asked: whether a patch shows what the first phrase of the question stands for, and the
            second.
          counted: which questions count.
        """
        logits = self.patches(tokens[:, 1:]).astype(jnp.float32)
        wrong = optax.sigmoid_binary_cross_entropy(logits, asked.astype(jnp.float32))

        def mean(of: Array) -> Array:
            of = of & counted[:, None, None]
            return jnp.where(of, wrong, 0).sum() / jnp.maximum(of.sum(), 1)

        return mean(asked) + mean(~asked)
