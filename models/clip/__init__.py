"""CLIP: an image tower and a text tower with one embedding space (Radford et al. 2021)."""

from jaxrel.models.clip.config import MODEL_TYPE, CLIPConfig, TextConfig, VisionConfig
from jaxrel.models.clip.hugging_face import PARAMETERS
from jaxrel.models.clip.model import CLIP, CLIPResNet
from jaxrel.models.clip.resnet import CLIPResNetConfig, ResNetTower, ResNetTowerConfig
from jaxrel.models.clip.tokens import end_of_text
from jaxrel.models.clip.towers import TextTower, VisionTower
from jaxrel.models.patches import interpolate_positions

__all__ = [
    "CLIP",
    "MODEL_TYPE",
    "PARAMETERS",
    "CLIPConfig",
    "CLIPResNet",
    "CLIPResNetConfig",
    "ResNetTower",
    "ResNetTowerConfig",
    "TextConfig",
    "TextTower",
    "VisionConfig",
    "VisionTower",
    "end_of_text",
    "interpolate_positions",
]
