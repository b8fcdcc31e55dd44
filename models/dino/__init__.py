"""DINOv2 (Oquab et al. 2023), with registers (Darcet et al. 2024), and DINOv3 (2025)."""

from jaxrel.models.dino.config import MODEL_TYPES, DINOConfig
from jaxrel.models.dino.model import DINO

__all__ = ["DINO", "MODEL_TYPES", "DINOConfig"]
