"""What a wheel would hold: every package."""

import tomllib

from tests.paths import ROOT

FOLDERS = {"jaxrel": "jaxrel", "models": "jaxrel.models", "train": "jaxrel.train"}


def test_every_package_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        ".".join([package, *file.relative_to(ROOT / folder).parent.parts])
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found
