"""The Python of README and of the packages' READMEs runs as it stands, and explains something."""

import importlib
import re

import jax
import numpy as np
import pytest

import jaxrel
from tests.paths import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted(p for room in ("jaxrel", "models", "train") for p in (ROOT / room).rglob("README.md")),
    ROOT / "tests/benchmarks/README.md",
]


def name(page):
    return str(page.relative_to(ROOT))


def blocks():
    for page in PAGES:
        found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for i, code in enumerate(found):
            yield pytest.param(name(page), code, id=f"{name(page)}:{i}")


def numbers(value):
    """The arrays of what a block explained."""
    if isinstance(value, jaxrel.Explanation):
        value = [value.image, value.text]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(value)]


def check_explained(names):
    """A block must name what it computed, and none of that may be zero or not finite."""
    explained = [n for n in names if re.fullmatch("relevance|explanation|by_.*|place|logits", n)]
    assert explained, "no name of the block holds what it computed"
    for found in explained:
        arrays = numbers(names[found])
        assert arrays, f"{found} is empty"
        for array in arrays:
            assert np.isfinite(array).all(), f"{found} is not finite"
            assert array.any(), f"{found} is zero"


@pytest.mark.parametrize(("page", "code"), list(blocks()))
def test_python_blocks_explain(page, code, tmp_path, monkeypatch):
    (tmp_path / "train").symlink_to(ROOT / "train")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(code, page, "exec"), names)
    check_explained(names)


@pytest.mark.parametrize("value", [np.zeros(3), np.full(3, np.nan), [], {"text": np.zeros(2)}])
def test_nothing_is_no_explanation(value):
    with pytest.raises(AssertionError):
        check_explained({"relevance": value})
    with pytest.raises(AssertionError):
        check_explained({"x": np.ones(3)})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_images_exist(page):
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{name(page)} links to {link}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_exist(page):
    for path in re.findall(r"`(jaxrel(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        found, tried = jaxrel, "jaxrel"
        for part in path.split(".")[1:]:
            tried = f"{tried}.{part}"
            if not hasattr(found, part):
                importlib.import_module(tried)
            found = getattr(found, part)


def test_readme_is_read_in_ten_minutes():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
