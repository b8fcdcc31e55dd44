"""What made a result: the model's parameters and the versions of what ran it."""

import hashlib
import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

_PACKAGES = ("jaxrel", "jax", "jaxlib", "flax", "numpy", "transformers")


def model_digest(model: Any) -> str:
    """A digest of a model's parameters, in order, with their shapes and dtypes."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(model):
        if hasattr(leaf, "dtype") and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = np.asarray(leaf)
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    return {
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
