"""Plain Flax NNX modules and their weights."""

from jaxrel.models.auto import from_pretrained
from jaxrel.models.captioner import Captioner, CaptionerConfig
from jaxrel.models.clip import (
    CLIP,
    CLIPConfig,
    CLIPResNet,
    CLIPResNetConfig,
    TextConfig,
    VisionConfig,
)
from jaxrel.models.clipmapper import (
    CLIPMapper,
    CLIPMapperCaption,
    CLIPMapperConfig,
    CLIPMapperVQA,
)
from jaxrel.models.dino import DINO, DINOConfig
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.preprocessing import image_processing
from jaxrel.models.processor import Processor
from jaxrel.models.siglip import SigLIP, SigLIPConfig, SigLIPTextConfig, SigLIPVisionConfig
from jaxrel.models.tokenizer import word_tokenizer
from jaxrel.models.vision import (
    VGG,
    ResNet,
    ResNetConfig,
    VGGConfig,
    imagenet_processing,
    load_encoder,
)

__all__ = [
    "CLIP",
    "DINO",
    "VGG",
    "CLIPConfig",
    "CLIPMapper",
    "CLIPMapperCaption",
    "CLIPMapperConfig",
    "CLIPMapperVQA",
    "CLIPResNet",
    "CLIPResNetConfig",
    "Captioner",
    "CaptionerConfig",
    "DINOConfig",
    "Layout",
    "Processor",
    "ResNet",
    "ResNetConfig",
    "SigLIP",
    "SigLIPConfig",
    "SigLIPTextConfig",
    "SigLIPVisionConfig",
    "Stream",
    "TextConfig",
    "VGGConfig",
    "VisionConfig",
    "from_pretrained",
    "image_processing",
    "imagenet_processing",
    "load_encoder",
    "word_tokenizer",
]
