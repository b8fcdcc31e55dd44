"""What the repository holds of a notebook; `make notebooks` runs them."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.paths import ROOT

NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_is_valid_and_runs_anywhere(notebook):
    nbformat.validate(notebook)
    # The kernel of whoever opens it, in whatever version.
    assert notebook.metadata.kernelspec.name == "python3"
    assert "version" not in notebook.metadata.language_info


def test_begins_with_a_title(notebook):
    assert notebook.cells[0].cell_type == "markdown"
    assert re.search(r"^# \S", notebook.cells[0].source, re.MULTILINE)


def test_holds_no_outputs(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not cell.metadata


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def first_cell():
    return code(nbformat.read(NOTEBOOKS[0], as_version=4))[0]


def test_installs_first_and_only_where_needed(notebook):
    first, *others = code(notebook)
    assert first == first_cell()
    assert 'find_spec("jaxrel")' in first
    for source in others:
        assert not re.search(r"^\s*[%!]|\bpip\b", source, re.MULTILINE)


@pytest.fixture
def functions():
    """The functions that the first cell defines, without what it does."""
    tree = ast.parse(first_cell())
    tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.FunctionDef)]
    defined: dict = {}
    exec(compile(tree, "first cell", "exec"), defined)
    return defined


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("jaxrel", "jaxrel[train,report,batch]"),
        ("jaxrel==0.1.0", "jaxrel[train,report,batch]==0.1.0"),
        (
            "git+https://host/jaxrel.git@v1",
            "jaxrel[train,report,batch] @ git+https://host/jaxrel.git@v1",
        ),
        ("https://host/jaxrel-1.whl", "jaxrel[train,report,batch] @ https://host/jaxrel-1.whl"),
        ("jaxrel-1-py3-none-any.whl", "jaxrel-1-py3-none-any.whl[train,report,batch]"),
        ("/folder/jaxrel", "/folder/jaxrel[train,report,batch]"),
        ("./jaxrel", "./jaxrel[train,report,batch]"),
    ],
)
def test_what_is_installed(functions, source, wanted):
    assert functions["requirement"](source) == wanted


@pytest.mark.parametrize(
    ("driver", "variables", "wanted"),
    [
        ("580.82.07", {}, "jax[cuda13]"),
        ("550.54.15", {}, "jax[cuda12]"),
        ("NVIDIA-SMI has failed", {}, "jax"),
        ("NVIDIA-SMI has failed", {"TPU_NAME": "local"}, "jax[tpu]"),
        ("", {"COLAB_TPU_ADDR": "10.0.0.2:8470"}, "jax[tpu]"),
    ],
)
def test_jax_is_for_the_accelerator(functions, driver, variables, wanted, tmp_path, monkeypatch):
    if Path("/dev/accel0").exists() or importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("what this machine has decides")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{driver}'\n", encoding="utf-8")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("TPU_NAME", "COLAB_TPU_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert functions["jax_requirement"]() == wanted


def test_a_jax_in_use_that_was_replaced_asks_for_a_restart():
    loaded = "import sys, types; sys.modules['jax'] = types.SimpleNamespace(__version__='0.7.2')"
    run = subprocess.run(
        [sys.executable, "-c", f"{loaded}\n{first_cell()}"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.strip() == (
        "Another jax was installed than the one in use: restart the runtime "
        "(Runtime > Restart session), then run this cell again."
    )


def test_names_no_folder_of_one_machine(notebook):
    for cell in notebook.cells:
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", cell.source)
