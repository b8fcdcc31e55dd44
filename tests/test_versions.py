"""What runs, what is refused and what is warned of; and that the project's files agree."""

import subprocess
import sys
import tomllib

import pytest

from jaxrel import versions
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    ("python", "jax", "flax"),
    [
        ("3.11.7", "0.10.2", "0.12.7"),
        ("3.12.1", "0.11.0", "0.12.8"),
        ("3.13.0", "0.12.0.1", "0.12.12"),
        ("3.14.0rc1", "0.13.0.dev20261101+abc", "0.13.0"),
        ("3.13.0+", "0.10.3.dev1", "0.12.12"),
    ],
)
def test_these_run(python, jax, flax):
    assert versions.problem(python, jax, flax) == ""


@pytest.mark.parametrize(
    ("running", "message"),
    [
        (
            ("3.10.13", "0.6.2", "0.10.0"),
            "jaxrel needs Python 3.11 or newer and is tested up to 3.13; found: 3.10.13. Make an "
            "environment of such a Python and install jaxrel there: python3.13 -m venv .venv && "
            ".venv/bin/python -m pip install jaxrel",
        ),
        (
            ("3.12.1", "0.7.2", "0.12.12"),
            "jaxrel runs on jax 0.10.2 to 0.12; found: 0.7.2. Install what is wanted, then "
            'restart Python: python -m pip install --upgrade "jax>=0.10.2" "flax>=0.12.7" '
            '(for a GPU or TPU with its extra, such as "jax[tpu]>=0.10.2")',
        ),
        (
            ("3.13.0", "0.12.0.1", "0.12.8"),
            "jax 0.12.0.1 needs flax 0.12.10 or newer; found: 0.12.8. Install what is "
            "wanted, then restart Python: python -m pip install --upgrade "
            '"jax>=0.12.0.1" "flax>=0.12.10" '
            '(for a GPU or TPU with its extra, such as "jax[tpu]>=0.12.0.1")',
        ),
    ],
    ids=["python", "jax", "flax"],
)
def test_these_are_refused(running, message):
    assert versions.problem(*running) == message


@pytest.mark.parametrize("jax", ["0.10.1", "0.10.0rc2", "not installed"])
def test_an_old_or_nameless_jax_is_refused(jax):
    assert f"found: {jax}. " in versions.problem("3.11.7", jax, "0.12.8")


@pytest.mark.parametrize("jax", ["0.10.2", "0.12.0.1", "0.12.9", "0.12.3.dev20261127+abc"])
def test_no_concern_up_to_the_newest_tested(jax):
    assert versions.concern(jax) == ""


def test_concern_about_a_newer_jax_names_both():
    assert versions.concern("0.13.0.dev20261101+abc") == (
        "jax 0.13.0.dev20261101+abc is newer than 0.12, the newest that jaxrel is tested with. "
        "Where something fails, try the tested one: python -m pip install 'jax==0.12.*'"
    )
    assert versions.concern("1.0")


def test_pyproject_agrees():
    bounds = PROJECT["dependencies"]
    assert PROJECT["requires-python"] == f">={versions.OLDEST_PYTHON}"
    assert f"jax>={versions.OLDEST_JAX}" in bounds
    assert f"flax>={versions.OLDEST_FLAX[versions.OLDEST_JAX]}" in bounds
    for python in (versions.OLDEST_PYTHON, versions.NEWEST_PYTHON):
        assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def python_with(folder, jax, code, source="raise RuntimeError('imported')"):
    """Run code where pip seems to have installed that JAX, of that source."""
    (folder / f"jax-{jax}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: jax\nVersion: {jax}\n"
    (folder / f"jax-{jax}.dist-info/METADATA").write_text(metadata, encoding="utf-8")
    (folder / "jax.py").write_text(source, encoding="utf-8")
    # The folder first, or the real one's metadata would be found before it.
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_refuses_an_old_jax_before_importing_it(tmp_path):
    run = python_with(tmp_path, "0.7.2", "import jaxrel")
    assert run.returncode == 1
    message = versions.problem("3.13", "0.7.2", "0.12.12")
    assert run.stderr.splitlines()[-1] == f"ImportError: {message}"


def test_a_loaded_jax_counts_and_not_what_pip_put_in_its_place(tmp_path):
    run = python_with(tmp_path, "0.12.0", "import jax; import jaxrel", "__version__ = '0.7.2'")
    assert "ImportError: jaxrel runs on jax 0.10.2 to 0.12; found: 0.7.2. " in run.stderr


def test_import_warns_of_a_newer_jax():
    # Importing runs this once in a process.
    with pytest.warns(UserWarning, match="jax 0.13.0 is newer than 0.12") as found:
        versions.check("3.13.0", "0.13.0", "0.13.0")
    assert len(found) == 1


def test_the_running_versions_are_strings_with_numbers():
    assert all(versions.release(version) for version in versions.running())
