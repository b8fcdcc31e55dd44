"""The fields of an explanation as one .npz file, and back."""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrel.flags import Flag

# Written into every file, so that a later layout can be told from this one. Format 1 called the
# images pictures, and the flags verdicts.
FORMAT = 2
_HEADER = "jaxrel_explanation"
_ARRAYS = ("score", "image", "text")


def encode(fields: Mapping[str, Any]) -> bytes:
    """The bytes of an .npz file, by the fields of an `Explanation`: equal fields, equal bytes."""
    header = {"format": FORMAT, **fields}
    arrays = {name: header.pop(name) for name in _ARRAYS}
    images = header.pop("pixels")
    header["pixels"] = None if images is None else len(images)
    header["flags"] = [flag and dataclasses.asdict(flag) for flag in fields["flags"]]
    arrays |= {f"pixels_{i}": image for i, image in enumerate(images or ())}
    arrays[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    buffer = io.BytesIO()
    held = {name: array for name, array in arrays.items() if array is not None}
    np.savez_compressed(buffer, **held)
    return buffer.getvalue()


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that `encode` made.

    Raises:
      OSError: there is no such file, or it cannot be read.
      ValueError: the file is damaged, cut short, or is no explanation.
    """
    data = path.read_bytes()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    # Damage shows as an error of zipfile, zlib, struct or NumPy, depending on the byte it hits.
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, cut short, or not an .npz file; save the explanation again "
            f"({type(error).__name__})"
        ) from error
    if _HEADER not in arrays:
        held = ", ".join(sorted(arrays)[:5]) or "nothing"
        raise ValueError(f"{path} is an .npz file but no saved explanation; it holds: {held}")
    return arrays


def decode(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields that `encode` was given, also in format 1.

    Raises:
      AttributeError, KeyError, TypeError, ValueError: an entry is missing, unknown or of a wrong
        kind.
    """
    fields = json.loads(arrays[_HEADER].tobytes())
    version = fields.pop("format")
    if version not in (1, FORMAT):
        raise ValueError(f"format {version} is not known here; this is format {FORMAT}")
    image = "pixels"
    if version == 1:
        image = "picture"
        fields["pixels"] = fields.pop("pictures")
        fields["flags"] = fields.pop("verdicts", ())
    if (count := fields["pixels"]) is not None:
        fields["pixels"] = tuple(arrays[f"{image}_{i}"] for i in range(count))
    fields["flags"] = [None if flag is None else Flag(**flag) for flag in fields["flags"]]
    return fields | {"score": arrays["score"]} | {x: arrays.get(x) for x in ("image", "text")}
