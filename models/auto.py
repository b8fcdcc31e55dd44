"""Loading a model without knowing its class."""

import os
from typing import Any

from jaxrel.models import captioner, clip, clipmapper, dino, siglip
from jaxrel.models.checkpoint import CONFIG, find_folder, read_any_config

_CLASSES: dict[str, Any] = {
    captioner.MODEL_TYPE: captioner.Captioner,
    clip.MODEL_TYPE: clip.CLIP,
    clipmapper.MODEL_TYPE: clipmapper.CLIPMapper,
    siglip.MODEL_TYPE: siglip.SigLIP,
    **dict.fromkeys(dino.MODEL_TYPES, dino.DINO),
}


def from_pretrained(name_or_folder: str | os.PathLike, **options: Any) -> Any:
    """Load a model of the class that its config.json names; a folder of OpenCLIP as CLIP.

    Args:
      name_or_folder: a bundled model, a folder or a hub name.
      **options: of the class's own `from_pretrained`, such as dtype.

    Returns:
      The model.

    Raises:
      FileNotFoundError, OSError: see `CLIP.from_pretrained`.
      ValueError: see `CLIP.from_pretrained`; also a type of model that is not known.
    """
    folder = find_folder(name_or_folder)
    if clip.open_clip.is_one(folder):
        return clip.CLIP.from_pretrained(folder, **options)
    found = read_any_config(folder).get("model_type")
    if found == "siglip2":
        raise ValueError(
            f"{folder / CONFIG} has the model_type 'siglip2', a NaFlex model that reads images of "
            "any aspect; what is supported of SigLIP 2 is its models of a fixed image size, whose "
            "model_type is 'siglip', such as google/siglip2-base-patch16-224"
        )
    if found not in tuple(_CLASSES):
        raise ValueError(
            f"{folder / CONFIG} describes a model of type {found!r:.80}; known are "
            f"{', '.join(_CLASSES)}"
        )
    return _CLASSES[found].from_pretrained(folder, **options)
