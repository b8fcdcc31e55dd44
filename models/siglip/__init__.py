"""SigLIP and SigLIP 2: image and text towers trained with a sigmoid loss (Zhai et al. 2023)."""

from jaxrel.models.siglip.config import (
    MODEL_TYPE,
    SigLIPConfig,
    SigLIPTextConfig,
    SigLIPVisionConfig,
)
from jaxrel.models.siglip.model import SigLIP
from jaxrel.models.siglip.towers import AttentionPooling, SigLIPVisionTower

__all__ = [
    "MODEL_TYPE",
    "AttentionPooling",
    "SigLIP",
    "SigLIPConfig",
    "SigLIPTextConfig",
    "SigLIPVisionConfig",
    "SigLIPVisionTower",
]
