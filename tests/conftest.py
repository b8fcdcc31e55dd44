"""The tests' world is stricter than a user's: types are checked, warnings are errors."""

import contextlib
import gc
import importlib.util
import os
import signal
import tempfile
from pathlib import Path

# A shell that starts the tests in the background has Ctrl-C ignored, which they and the processes
# that they start would inherit.
with contextlib.suppress(ValueError):  # outside of the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)

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

from jaxtyping import install_import_hook

# A borrowed machine may lack beartype; the tests then run with types unchecked, and say so.
TYPES_CHECKED = importlib.util.find_spec("beartype") is not None
JAXREL = Path(__file__).parents[1] / "jaxrel"
# These make thousands of functions for a model and name no shapes, so that beartype checks alone:
# jaxtyping's search for shapes took most of a trace's time.
QUICK = ("jaxrel.tracing", "jaxrel.propagation.steps", "jaxrel.propagation.conservation")


def _modules() -> list[str]:
    """The modules of the package, without those in `QUICK`."""
    files = (path.relative_to(JAXREL.parent).with_suffix("") for path in JAXREL.rglob("[a-z]*.py"))
    return [name for file in files if not (name := ".".join(file.parts)).startswith(QUICK)]


if TYPES_CHECKED:
    from beartype import BeartypeConf
    from beartype.claw import beartype_packages

    beartype_packages(QUICK, conf=BeartypeConf(claw_is_pep526=False))
    install_import_hook([*_modules(), "jaxrel.models", "jaxrel.train"], "beartype.beartype")

import jax
import pytest

# Traces make many objects that live on; to look through them for garbage again and again takes a
# twentieth of the tests' time.
gc.set_threshold(100_000, 20, 50)


def pytest_report_header():
    """Where the tests run, and whether types are checked."""
    checked = "checked" if TYPES_CHECKED else "not checked (beartype is not installed)"
    return f"jax {jax.__version__} on {jax.default_backend()}; types are {checked}"


def pytest_collection_finish():
    """Take what was imported and collected, which lives on, out of what is searched for garbage.

    Each file ends with such a search, see `_forget_programs`.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Skip what needs more devices than there are: `@pytest.mark.devices(8)`."""
    needed = max((mark.args[0] for mark in item.iter_markers("devices")), default=1)
    if jax.device_count() < needed:
        pytest.skip(f"needs {needed} devices, there are {jax.device_count()}")


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


@pytest.fixture(scope="module", autouse=True)
def quick_compile(request):
    """Compile without optimising: XLA takes longer over these programs than they run.

    Files with `pytestmark = pytest.mark.optimised` are compiled as users' programs are.
    """
    quick = request.node.get_closest_marker("optimised") is None
    jax.config.update("jax_disable_most_optimizations", quick)
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
