"""The README's Python runs as it stands, on the bundled model."""

import re

import pytest

from tests.paths import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    (tmp_path / "train").symlink_to(ROOT / "train")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_links_and_images_exist():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT)
    assert links
    for link in links:
        assert (ROOT / link).exists(), f"README links to {link}, which is not there"
