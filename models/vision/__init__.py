"""Convolutional image encoders: VGG (Simonyan and Zisserman 2015) and ResNet (He et al. 2016).

They end where a captioner reads them, with a grid of features and no classifier: VGG at the
ReLU of its last convolution, before the last pooling, and ResNet at its last stage.
"""

from jaxrel.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, imagenet_processing
from jaxrel.models.vision.config import (
    PRESETS,
    EncoderConfig,
    ResNetConfig,
    VGGConfig,
    encoder_config,
)
from jaxrel.models.vision.encoders import VGG, Encoder, ResNet, check_images, make_encoder
from jaxrel.models.vision.layouts import encoder_from_tensors, load_encoder

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRESETS",
    "VGG",
    "Encoder",
    "EncoderConfig",
    "ResNet",
    "ResNetConfig",
    "VGGConfig",
    "check_images",
    "encoder_config",
    "encoder_from_tensors",
    "imagenet_processing",
    "load_encoder",
    "make_encoder",
]
