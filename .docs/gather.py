"""The pages of the site and the source that its reference reads, gathered in one folder.

README and the packages' READMEs keep their places, so their links work. Notebooks are taken as
`make notebooks` executed them, where it did.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("jaxrel", "models", "train")


def main(out: Path) -> None:
    """Fill OUT/pages and OUT/source."""
    pages, source = out / "pages", out / "source"
    for folder in (pages, source):
        shutil.rmtree(folder, ignore_errors=True)
    readmes = [page for room in ROOMS for page in (ROOT / room).rglob("*.md")]
    folders = ("colab/images", "tests/benchmarks/images")
    images = [image for folder in folders for image in (ROOT / folder).glob("*.png")]
    tables = [ROOT / f"tests/{folder}/README.md" for folder in ("benchmarks", "zoo")]
    benchmarks = ROOT / "tests/benchmarks"
    linked = [*benchmarks.glob("*.json"), *benchmarks.glob("images/*.svg")]
    for file in (ROOT / "README.md", *tables, *linked, *readmes, *images):
        copy(file, pages / file.relative_to(ROOT))
    shutil.copytree(ROOT / ".docs/api", pages / "api")
    for name in ("site.css", "worker.js"):
        copy(ROOT / ".docs" / name, pages / name)
    for notebook in (ROOT / "colab").glob("*.ipynb"):
        page = pages / "colab" / notebook.name
        page.parent.mkdir(exist_ok=True)
        page.write_text(json.dumps(readable(notebook, out / notebook.name)), encoding="utf-8")
    # The three rooms as they are installed.
    for room, place in zip(ROOMS, ("jaxrel", "jaxrel/models", "jaxrel/train"), strict=True):
        for file in (ROOT / room).rglob("*.py"):
            copy(file, source / place / file.relative_to(ROOT / room))


def copy(file: Path, place: Path) -> None:
    """Copy a file, and make its folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, place)


def readable(notebook: Path, executed: Path) -> dict:
    """Return a notebook as a page: executed, if it was, and with formulas that need no script."""
    found = json.loads(notebook.read_text(encoding="utf-8"))
    sources = [cell["source"] for cell in found["cells"]]
    ran = json.loads(executed.read_text(encoding="utf-8")) if executed.is_file() else {"cells": []}
    if [cell["source"] for cell in ran["cells"]] == sources:
        found = ran
    else:
        print(f"colab/{notebook.name} is shown without outputs: run `make notebooks` first")
    for cell in found["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = mathml("".join(cell["source"]))
        else:  # progress bars go to stderr
            cell["outputs"] = [out for out in cell["outputs"] if out.get("name") != "stderr"]
    install = next(cell for cell in found["cells"] if cell["cell_type"] == "code")
    install["metadata"]["tags"] = ["install"]
    return found


def mathml(text: str) -> str:
    """Replace TeX between dollars by MathML, which browsers draw by themselves."""
    text = re.sub(r"\$\$(.+?)\$\$", lambda tex: convert(tex[1], display="block"), text, flags=re.S)
    return re.sub(r"\$([^$\n]+)\$", lambda tex: convert(tex[1]), text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
