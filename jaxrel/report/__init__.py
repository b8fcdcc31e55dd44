"""Explanations as an image, or as one HTML page that needs no other file."""

import os
from pathlib import Path

from jaxrel.files import write_atomically
from jaxrel.renamed import renamed
from jaxrel.report.figures import figure
from jaxrel.report.heat import overlay, png
from jaxrel.report.html import fragment, page
from jaxrel.report.panels import Explanations

__all__ = ["figure", "fragment", "overlay", "page", "save"]

__getattr__ = renamed(__name__, {"picture": "jaxrel.report.figure"})


def save(explanations: Explanations, path: str | os.PathLike[str]) -> None:
    """Write explanations of the same inputs side by side, as .png or .html.

    The file appears complete or not at all. A missing folder is made.

    Args:
      explanations: one, or several of the same inputs (one per method).
      path: where to; the suffix says what.

    Raises:
      ValueError: another suffix, no explanations, or explanations of different inputs.
      OSError: the file cannot be written there.
    """
    match suffix := Path(path).suffix.lower():
        case ".png":
            write_atomically(path, png(figure(explanations)))
        case ".html":
            write_atomically(path, page(explanations).encode())
        case _:
            raise ValueError(
                f"cannot save a report as {str(path)!r}: the suffix is {suffix!r}; "
                "use .png (image) or .html (page)"
            )
