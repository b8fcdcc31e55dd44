"""What the repository holds of a notebook; `make notebooks` runs them."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
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


def test_installs_first_and_only_where_needed(notebook):
    first, *others = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert 'find_spec("jaxrel") is None' in first
    assert not any(re.search(r"^\s*[%!]", source, re.MULTILINE) for source in others)


def test_names_no_folder_of_one_machine(notebook):
    for cell in notebook.cells:
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", cell.source)
