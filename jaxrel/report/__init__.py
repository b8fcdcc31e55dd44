"""Explanations as a figure, or as one HTML page that needs no other file."""

import os
from pathlib import Path

from jaxrel.files import write_atomically
from jaxrel.renamed import renamed
from jaxrel.report.figures import drawing, figure, pages
from jaxrel.report.heat import overlay, png
from jaxrel.report.html import fragment, page
from jaxrel.report.panels import Explanations

__all__ = ["drawing", "figure", "fragment", "overlay", "page", "pages", "save"]

__getattr__ = renamed(__name__, {"picture": "jaxrel.report.figure"})


def save(explanations: Explanations, path: str | os.PathLike[str]) -> None:
    """Write explanations of the same inputs side by side, as .png, .pdf, .svg or .html.

    The file appears complete or not at all; one that is there is replaced. A missing folder is
    made.

    Args:
      explanations: one, or several of the same inputs (one per method).
      path: where to; the suffix says what.

    Raises:
      ValueError: another suffix, no explanations, or explanations of different inputs.
      OSError: the file cannot be written there.
    """
    match suffix := Path(path).suffix.lower():
        case ".png":
            data = png(figure(explanations))
        case ".pdf":
            data = pages(explanations)
        case ".svg":
            data = drawing(explanations).encode()
        case ".html":
            data = page(explanations).encode()
        case _:
            raise ValueError(
                f"cannot save a report as {str(path)!r}: the suffix is {suffix!r}; "
                "use .png (image), .pdf or .svg (for print) or .html (page)"
            )
    write_atomically(path, data)
