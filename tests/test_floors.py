"""The house: who may import whom, and what no module may do."""

import ast
import importlib
import pkgutil

import pytest

import jaxrel
from tests.paths import ROOT

FOLDERS = {"jaxrel": "jaxrel", "models": "jaxrel.models", "train": "jaxrel.train"}

# What each room may import besides itself, ground floor first.
CORE = ("jaxrel.tracing", "jaxrel.versions")
RELEVANCE = (*CORE, "jaxrel.propagation")
ROOT_FILES = ("jaxrel.images", "jaxrel.files", "jaxrel.flags", "jaxrel.renamed")
EXPLAIN = (*RELEVANCE, "jaxrel.attention", "jaxrel.gradients", *ROOT_FILES)
OLD_NAMES = ("explainer", "explanation", "pictures", "verdict", "word_relevance")
FLOORS = {
    "jaxrel.versions": (),
    "jaxrel.files": (),
    "jaxrel.renamed": (),
    "jaxrel.flags": ("jaxrel.renamed",),
    **{f"jaxrel.{name}": ("jaxrel.renamed",) for name in OLD_NAMES},
    "jaxrel.images": ("jaxrel.files",),
    "jaxrel.tracing": CORE,
    "jaxrel.propagation": CORE,
    "jaxrel.attention": (*RELEVANCE, "jaxrel.renamed"),
    "jaxrel.gradients": RELEVANCE,
    "jaxrel.contrasts": (),
    "jaxrel.pairwise": (*RELEVANCE, "jaxrel.gradients"),
    "jaxrel.token_maps": (),
    "jaxrel.report": ("jaxrel.files", "jaxrel.renamed"),
    "jaxrel.explanations": (*EXPLAIN, "jaxrel.report"),
    "jaxrel.metrics": (*EXPLAIN, "jaxrel.report", "jaxrel.renamed"),
    "jaxrel.batch": (*EXPLAIN, "jaxrel.explanations", "jaxrel.report"),
    # Images are read and files written alike, whoever does it.
    "jaxrel.models": (
        "jaxrel.tag",
        "jaxrel.capture_with_grad",
        "jaxrel.contrast",
        "jaxrel.images",
        "jaxrel.files",
        "jaxrel.renamed",
    ),
}


def modules():
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), file


MODULES = dict(modules())
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imports(tree):
    """What a module imports, as (module, name or None)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def imported(name):
    """The modules of jaxrel that a module imports, and the names it takes from jaxrel itself."""
    for module, part in imports(TREES[name]):
        whole = module if part is None else f"{module}.{part}"
        if module.split(".")[0] == "jaxrel":
            yield whole if whole in MODULES or module == "jaxrel" else module


def inside(name, rooms):
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize(("room", "below"), FLOORS.items(), ids=FLOORS.keys())
def test_nothing_is_imported_from_above(room, below):
    for name in MODULES:
        if inside(name, [room]):
            for target in imported(name):
                assert target == "jaxrel" or inside(target, (room, *below)), (name, target)


def test_every_room_has_a_floor():
    rooms = {".".join(name.split(".")[:2]) for name in MODULES} - {"jaxrel"}
    # The roof, and what uses all: the command line and training.
    assert rooms == {*FLOORS, "jaxrel.cli", "jaxrel.train"}


def test_the_library_imports_no_model():
    for name in MODULES:
        if not inside(name, ("jaxrel.models", "jaxrel.train", "jaxrel.cli")):
            assert not any(inside(t, ("jaxrel.models", "jaxrel.train")) for t in imported(name))


def test_no_import_runs_in_a_circle():
    state = {}

    def visit(name, path):
        assert state.get(name) != "open", f"a circle: {[*path, name]}"
        if name not in state:
            state[name] = "open"
            for target in sorted(set(imported(name)) & MODULES.keys() - {name, "jaxrel"}):
                visit(target, [*path, name])
            state[name] = "done"

    for name in MODULES:
        visit(name, [])


def test_no_private_name_is_imported():
    for name, tree in TREES.items():
        for module, part in imports(tree):
            private = part and part.startswith("_") and not part.startswith("__")
            assert not (private and module.startswith("jaxrel")), (name, part)


def test_no_function_hides_a_module():
    packages = [jaxrel, *(importlib.import_module(name) for name in MODULES if is_package(name))]
    for package in packages:
        for part in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{part.name}")
            found = getattr(package, part.name)
            assert found is module, f"{package.__name__}.{part.name} is not the module"


def is_package(name):
    return MODULES[name].name == "__init__.py"


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 600
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= 60, f"{name}.{node.name}"


def code_lines(function):
    """Lines of a function but those of its signature's docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring
