"""A hook of mkdocs: pages load nothing from elsewhere, and can be read and searched from disk."""

import re
from typing import Any

from mkdocs.utils import get_relative_url

SHIM = "https://unpkg.com/iframe-worker/shim"


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Drop the loader of MathJax, as formulas are MathML, and take the search's shim from here."""
    output = re.sub(
        r"<script data-mkdocs-jupyter-mathjax=.*?</script>", "", output, flags=re.DOTALL
    )
    return output.replace(SHIM, get_relative_url("worker.js", page.url))


def on_post_template(output: str, **_: Any) -> str:
    """The same on the page for what is not found."""
    return output.replace(SHIM, "worker.js")
