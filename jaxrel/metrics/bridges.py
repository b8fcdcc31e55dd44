"""Maps in, the metrics of other packages out: Quantus and captum, which need PyTorch.

Metrics that need only a model's output, and maps that are computed already, do not need the
model in PyTorch: `torch_module` wraps a JAX function, and no gradient goes through it. Install the
packages that you use: `pip install quantus captum`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Images = Float[Array | np.ndarray, "batch height width channels"]
Maps = Float[Array | np.ndarray, "maps rows columns"]


def torch_module(fun: Callable[[Array], Array], *, channels_first: bool = True) -> Any:
    """A JAX function as a `torch.nn.Module`, for metrics that call a model.

    Args:
      fun: from inputs `[batch, ...]` to an array, such as logits `[batch, classes]`.
      channels_first: whether inputs come as PyTorch has images, `[batch, channels, height, width]`,
        and `fun` takes them with channels last.

    Returns:
      The module, on the CPU, in evaluation mode; its outputs have no gradient.

    Raises:
      ModuleNotFoundError: torch is not installed.
    """
    import torch

    class Function(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            given = np.asarray(x.detach().cpu())
            images = np.moveaxis(given, 1, -1) if channels_first else given
            return torch.from_numpy(np.array(jax.device_get(fun(jnp.asarray(images)))))

    return Function().eval()


def quantus_scores(
    metric: Any,
    fun: Callable[[Array], Array],
    images: Images,
    targets: Int[Array | np.ndarray, " batch"],
    relevance: Maps,
    masks: Bool[Array | np.ndarray, "batch height width"] | None = None,
    **options: Any,
) -> np.ndarray:
    """Score maps of images by a metric of Quantus.

    Args:
      metric: an instance, such as `quantus.PixelFlipping(features_in_step=64)`.
      fun: the logits of images, `[batch, height, width, channels]` to `[batch, classes]`.
      images: that are explained.
      targets: the class that each map explains.
      relevance: one map per image, whose cells divide it; each is repeated over its pixels.
      masks: of the objects, for metrics of localisation.
      **options: of the metric's call, such as `explain_func` for those that explain again.

    Returns:
      What the metric gives, one entry per image.

    Raises:
      ModuleNotFoundError: torch is not installed.
      ValueError: maps do not fit the images.
    """
    (batch, height, width, _), (maps, rows, columns) = images.shape, relevance.shape
    if maps != batch or height % rows or width % columns:
        raise ValueError(
            f"quantus_scores: maps {relevance.shape} do not divide images {images.shape}; give one "
            "map per image, of pixels or of patches that tile it"
        )
    cells = np.asarray(relevance, np.float32)
    pixels = cells.repeat(height // rows, 1).repeat(width // columns, 2)[:, None]
    given = {} if masks is None else {"s_batch": np.asarray(masks)[:, None]}
    scores = metric(
        model=torch_module(fun),
        x_batch=np.moveaxis(np.asarray(images), -1, 1),
        y_batch=np.asarray(targets),
        a_batch=pixels,
        channel_first=True,
        **given,
        **options,
    )
    return np.asarray(scores)
