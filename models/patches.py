"""Images in patches: their grid, and the positions of patches, interpolated or as rotations."""

from collections.abc import Callable

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.models.sizes import check_sizes, is_size

# Pixels of a side of a square image, or (height, width).
ImageSize = int | tuple[int, int]


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    return image_size if isinstance(image_size, tuple) else (image_size, image_size)


class Patched:
    """What the sizes of a tower that reads an image in patches say of them."""

    image_size: ImageSize
    patch_size: int

    def check_patches(self, part: str) -> None:
        """Raise ValueError if the sizes of the image and the patches are not such; see `sizes`."""
        check_sizes(part, self, ["patch_size"])
        size = self.image_size
        if not is_size(size) and not (
            isinstance(size, tuple) and len(size) == 2 and all(map(is_size, size))
        ):
            raise ValueError(
                f"{part}: image_size must be a positive integer, or (height, width), got {size!r}"
            )
        if min(self.sides) < self.patch_size:
            raise ValueError(
                f"{part}: image_size {size} is smaller than one patch of {self.patch_size} pixels"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of the image, in pixels."""
        return sides(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches; pixels beyond the last whole patch are not read."""
        height, width = self.sides
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """The number of patches."""
        rows, columns = self.grid
        return rows * columns


def interpolate_positions(
    positions: Float[np.ndarray, "*one tokens width"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    prefix: int = 1,
    antialias: bool = False,
) -> Float[np.ndarray, "*one new_tokens width"]:
    """Interpolate a position embedding to another grid of patches.

    Bicubic convolution (Keys 1981) at cell centres with the border repeated, as PyTorch's
    `interpolate(mode="bicubic", align_corners=False)`: with a = -0.75, or with `antialias` with
    a = -0.5 and, where there are fewer patches than before, a kernel that is as much wider.

    Args:
      positions: embeddings of the tokens before the patches, and of the patches row by row.
      grid: (rows, columns) of the patches.
      new_grid: (rows, columns) wanted.
      prefix: the number of tokens before the patches.
      antialias: whether fewer patches are averages of more.
    """
    *one, _, width = positions.shape
    weights = _antialiased if antialias else _bicubic
    rows, columns = (weights(old, new) for old, new in zip(grid, new_grid, strict=True))
    patches = positions[..., prefix:, :].reshape(*one, *grid, width)
    patches = np.einsum("ir,jc,...rcw->...ijw", rows, columns, patches)
    patches = patches.reshape(*one, -1, width).astype(positions.dtype)
    return np.concatenate([positions[..., :prefix, :], patches], axis=-2)


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """The kernel of bicubic convolution (Keys 1981, eq. 15, with `a` for -1/2)."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def _bicubic(old: int, new: int) -> np.ndarray:
    """The [new, old] matrix that interpolates a row of `old` cells to `new` cells."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-1, 3)
    matrix = np.zeros((new, old))
    cells = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new)[:, None], cells), _keys(centre[:, None] - taps, -0.75))
    return matrix


def _antialiased(old: int, new: int) -> np.ndarray:
    """As `_bicubic`, with what is beyond the border left out and rows that sum to 1."""
    scale = old / new
    wider = max(scale, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * scale
    cells = np.arange(old)
    matrix = _keys((cells + 0.5 - centre) / wider, -0.5)
    # PyTorch takes the cells from int(centre - support + 1/2) to int(centre + support + 1/2).
    first, last = (np.trunc(centre + side * 2 * wider + 0.5) for side in (-1, 1))
    matrix = np.where((cells >= first) & (cells < last), matrix, 0)
    return matrix / matrix.sum(1, keepdims=True)


def rotary(grid: tuple[int, int], features: int, theta: float) -> Callable[[Array], Array]:
    """Return the rotation of patches' queries and keys by where they are, as DINOv3 has it.

    A rotary position embedding (Su et al. 2021) of two axes: the centres of the patches go from
    -1 to 1 along each axis, and a quarter of the features turns by 2 pi y theta^(-4 i / features),
    the next by the same of x, each with the feature half of all features away. Tokens before the
    patches are not turned.

    Args:
      grid: (rows, columns) of the patches.
      features: of each head; divisible by 4.
      theta: the base of the frequencies.

    Returns:
      A function of [batch, tokens, heads, features], which returns the same shape.
    """
    centres = [2 * (np.arange(count) + 0.5) / count - 1 for count in grid]
    places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
    frequencies = theta ** -np.arange(0, 1, 4 / features)
    angles = 2 * np.pi * places[:, :, None] * frequencies
    angles = np.tile(angles.reshape(len(places), -1), 2)[:, None]
    cosine, sine = np.cos(angles), np.sin(angles)

    def rotate(x: Array) -> Array:
        before, patches = x[:, : -len(places)], x[:, -len(places) :]
        first, second = jnp.split(patches, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
        patches = patches * cosine.astype(x.dtype) + turned * sine.astype(x.dtype)
        return jnp.concatenate([before, patches], axis=1)

    return rotate
