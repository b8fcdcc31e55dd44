"""What a wheel would hold: every package, and no import that runs downward-up."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"jaxrel": "jaxrel", "models": "jaxrel.models", "train": "jaxrel.train"}


def modules():
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            yield name, file


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            yield from [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_package_is_listed():
    found = {name for name, file in modules() if file.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


# Who may import whom, ground floor first; jaxrel.cli is the roof.
FLOORS = {
    "jaxrel.tracing": (),
    "jaxrel.lrp": ("jaxrel.tracing",),
    "jaxrel.attention": ("jaxrel.tracing", "jaxrel.lrp"),
    "jaxrel.gradients": ("jaxrel.tracing", "jaxrel.lrp"),
    "jaxrel.models": ("jaxrel.tag", "jaxrel.capture_with_grad"),
}


@pytest.mark.parametrize(("floor", "below"), FLOORS.items(), ids=FLOORS.keys())
def test_no_import_runs_downward_up(floor, below):
    allowed = (floor, *below)
    for name, file in modules():
        if name.startswith(floor):
            for target in imported(file):
                if target.startswith("jaxrel") and target != "jaxrel":
                    assert target.startswith(allowed), f"{name} imports {target}"


def test_the_library_knows_no_model():
    for name, file in modules():
        if not name.startswith(("jaxrel.models", "jaxrel.train", "jaxrel.cli")):
            for target in imported(file):
                assert not target.startswith(("jaxrel.models", "jaxrel.train")), name


def test_models_do_not_know_how_they_are_trained():
    for name, file in modules():
        if name.startswith("jaxrel.models"):
            assert not any(target.startswith("jaxrel.train") for target in imported(file)), name
