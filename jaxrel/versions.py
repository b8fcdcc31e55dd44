"""Which versions of Python, JAX and Flax jaxrel runs on; refused or warned of before use.

Nothing here needs JAX, nor a Python as new as the one asked for.
"""

import importlib.util
import re
import sys
import warnings
from importlib import metadata

OLDEST_PYTHON = "3.11"
NEWEST_PYTHON = "3.13"
OLDEST_JAX = "0.10.2"
# The newest that is tested: the only place where it is written down.
NEWEST_JAX = "0.12"
# Flax uses parts of JAX that come and go: from each JAX, the oldest Flax that can be imported.
OLDEST_FLAX = {"0.10.2": "0.12.7", "0.11.1": "0.12.9", "0.11.2": "0.12.10"}


def release(version: str) -> tuple:
    """The numbers of a version: `(0, 13, 0)` of "0.13.0.dev20261101+abc"; `()` of no number."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found.group().split(".")) if found else ()


def problem(python: str, jax: str, flax: str) -> str:
    """What makes these versions unusable, and the cure; empty where they can be used."""
    if release(python) < release(OLDEST_PYTHON):
        return (
            f"jaxrel needs Python {OLDEST_PYTHON} or newer and is tested up to {NEWEST_PYTHON}; "
            f"found: {python}. Make an environment of such a Python and install jaxrel there: "
            f"python{NEWEST_PYTHON} -m venv .venv && .venv/bin/python -m pip install jaxrel"
        )
    if release(jax) < release(OLDEST_JAX):
        found = f"jaxrel runs on jax {OLDEST_JAX} to {NEWEST_JAX}; found: {jax}. "
        return found + _cure(OLDEST_JAX, OLDEST_FLAX[OLDEST_JAX])
    wanted = [flax for first, flax in OLDEST_FLAX.items() if release(first) <= release(jax)][-1]
    if release(flax) < release(wanted):
        return f"jax {jax} needs flax {wanted} or newer; found: {flax}. " + _cure(jax, wanted)
    return ""


def _cure(jax: str, flax: str) -> str:
    return (
        "Install what is wanted, then restart Python: python -m pip install --upgrade "
        f'"jax>={jax}" "flax>={flax}" (for a GPU or TPU with its extra, such as "jax[tpu]>={jax}")'
    )


def concern(jax: str) -> str:
    """What is uncertain about a JAX newer than all that were tested; empty for the others."""
    newest = release(NEWEST_JAX)
    if release(jax)[: len(newest)] <= newest:
        return ""
    return (
        f"jax {jax} is newer than {NEWEST_JAX}, the newest that jaxrel is tested with. "
        f"Where something fails, try the tested one: python -m pip install 'jax=={NEWEST_JAX}.*'"
    )


def check(python: str, jax: str, flax: str) -> None:
    """Refuse these versions, or warn of them at the line that imports jaxrel.

    Raises:
      ImportError: Python, JAX or Flax is too old; the message says what to do.
    """
    refused = problem(python, jax, flax)
    if refused:
        raise ImportError(refused)
    if concern(jax):
        warnings.warn(concern(jax), stacklevel=3)


def running() -> tuple:
    """The versions of Python, JAX and Flax that this process uses, or would."""
    return sys.version.split()[0], _version("jax"), _version("flax")


def _version(name: str) -> str:
    # What is loaded counts, though pip may have put another in its place since. What is not
    # loaded stays so: an old Flax cannot be imported beside a new JAX.
    if name in sys.modules:
        return sys.modules[name].__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # not by pip
        if importlib.util.find_spec(name) is None:
            return "not installed"
        return importlib.import_module(name).__version__
