"""Plain Flax NNX modules and their weights."""

from jaxrel.models.auto import from_pretrained
from jaxrel.models.clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from jaxrel.models.clipmapper import (
    CLIPMapper,
    CLIPMapperCaption,
    CLIPMapperConfig,
    CLIPMapperVQA,
)
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.processor import Processor, image_processing
from jaxrel.models.tokenizer import word_tokenizer

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CLIPMapper",
    "CLIPMapperCaption",
    "CLIPMapperConfig",
    "CLIPMapperVQA",
    "Layout",
    "Processor",
    "Stream",
    "TextConfig",
    "VisionConfig",
    "from_pretrained",
    "image_processing",
    "word_tokenizer",
]
