"""The tests' world is stricter than a user's: types are checked, warnings are errors."""

import gc
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the tests' time went to compiling the same program again: JAX knows a program in memory
# by its Python function, and tests make new functions of the same text. On disk it knows the
# text. The folder starts empty in every run, so no run depends on another; each worker has its
# own, as one would read what another is still writing. Processes that tests start share it.
PROGRAMS = tempfile.TemporaryDirectory(prefix="jaxrel-test-programs-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"  # whatever the file system

from beartype import BeartypeConf
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

# Every call is checked. In `tracing`, which is called thousands of times for a model and names no
# shapes, beartype checks alone: jaxtyping's search for shapes took most of a trace's time.
beartype_package("jaxrel.tracing", conf=BeartypeConf(claw_is_pep526=False))
PARTS = {path.stem for path in (Path(__file__).parents[1] / "jaxrel").glob("[a-z]*")} - {"tracing"}
install_import_hook([f"jaxrel.{part}" for part in (*PARTS, "models", "train")], "beartype.beartype")

import jax
import pytest


def pytest_unconfigure():
    """Remove the compiled programs of this run."""
    PROGRAMS.cleanup()


@pytest.fixture
def x64():
    """Compute in float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """A PRNG key."""
    return jax.random.key(0)


@pytest.fixture(scope="module")
def quick_compile():
    """Compile without optimising, where XLA takes longer over a program than the program runs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Free the compiled programs of each file.

    Each holds several memory maps, of which a process may have 65530 (vm.max_map_count): with the
    programs of all files, the compiler's next request for memory would end the process.
    """
    yield
    jax.clear_caches()
    gc.collect()
