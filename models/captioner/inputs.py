"""What captioners check of their inputs."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxrel.models.captioner.config import CaptionerConfig
from jaxrel.models.captions import check_one_caption_each
from jaxrel.models.inputs import Inputs, check_floats, check_held, check_text


def check_inputs(inputs: Inputs, config: CaptionerConfig) -> None:
    """Raise an error if these are no images (or features) and captions of a captioner.

    Raises:
      ValueError: an input is missing or has a wrong shape, features are not finite, an id is none
        of the vocabulary, or there are other numbers of images and captions.
      TypeError: an input has a wrong dtype.
    """
    check_seen(inputs, config)
    check_held(inputs, "text")
    text = inputs["text"]
    check_text(text, config.context)
    # A traced value cannot be looked at; an id out of range would give NaN there.
    if not isinstance(text, jax.core.Tracer):
        ids = np.asarray(text)
        outside = (ids < 0) | (ids >= config.vocab_size)
        if outside.any():
            raise ValueError(
                f"text holds the id {int(ids[outside][0])}, and this model has the ids 0 to "
                f"{config.vocab_size - 1}: another tokenizer made it"
            )
    check_one_caption_each(
        len(inputs["features"] if "features" in inputs else inputs["image"]), len(text)
    )
    if inputs.get("heads") is not None:
        _check_heads(inputs["heads"], len(text), config)


def check_seen(inputs: Inputs, config: CaptionerConfig) -> None:
    """Check the images or features of the inputs as `check_inputs` does."""
    held = [name for name in ("image", "features") if name in inputs]
    wanted = "features" if config.encoder is None else "image (or features)"
    if len(held) != 1 or (config.encoder is None and held == ["image"]):
        raise ValueError(
            f"inputs must hold {wanted}, and hold {' and '.join(held) or 'neither'}. Make "
            "them with model.prepare(image=..., text=...)"
        )
    if held == ["image"]:
        check_floats("image", inputs["image"], (config.image_size, config.image_size, 3))
        return
    x, shape = inputs["features"], (config.positions, config.features)
    check_floats("features", x, shape, what="finite floats")
    if not isinstance(x, jax.core.Tracer):
        _check_finite(np.asarray(x, np.float32))


def region_features(
    image: Any, config: CaptionerConfig
) -> Float[np.ndarray, "batch regions features"]:
    """Return the features of regions as a batch, float32.

    Args:
      image: [regions, features], a batch of them, or a list.
      config: the sizes.

    Raises:
      ValueError: no features, features of another shape, or values that are not finite.
    """
    number, width = config.positions, config.features
    expected = f"[{number}, {width}] for each image: {number} regions of {width} features"
    if image is None or (isinstance(image, list | tuple) and not image):
        raise ValueError(f"no features: pass image= those of the regions, {expected}")
    given = image if isinstance(image, list | tuple) else [image]
    arrays = [np.asarray(one) for one in given]
    if not isinstance(image, list | tuple) and arrays[0].ndim == 3:
        arrays = list(arrays[0])
    for i, one in enumerate(arrays):
        if one.shape != (number, width) or one.dtype.kind not in "fiu":
            raise ValueError(
                f"the features of image {i} are {one.dtype} {list(one.shape)}, and this "
                f"model reads floats {expected} (zeros where there are fewer)"
            )
    features = np.stack(arrays).astype(np.float32)
    _check_finite(features)
    return features


def _check_heads(heads: Any, captions: int, config: CaptionerConfig) -> None:
    expected = (captions, config.heads)
    if config.kind != "aoa":
        raise ValueError(
            f"inputs hold heads to choose, and a captioner of kind {config.kind!r} has one; leave "
            "them out"
        )
    if heads.dtype != bool or heads.shape != expected:
        raise ValueError(
            f"heads must be bool {list(expected)}, got {heads.dtype} {list(heads.shape)}"
        )


def _check_finite(features: np.ndarray) -> None:
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))
    if wrong.size:
        bad = int((~np.isfinite(features[wrong[0]])).sum())
        raise ValueError(
            f"the features of image {wrong[0]} have {bad} values that are NaN or infinite; "
            "extract them again"
        )
