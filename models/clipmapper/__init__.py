"""CLIPmapper: CLIP's encoders, then a mapper over both streams (Huang et al. 2023).

Stage 1 turns an image into patch tokens and a text into word tokens, with the two towers of a
CLIP model. Stage 2, the mapper, has single-modality self-attention and cross-modality
co-attention in every layer. Two models are made of it: one answers questions, one captions.
"""

from jaxrel.models.clipmapper.caption import CLIPMapperCaption
from jaxrel.models.clipmapper.config import MODEL_TYPE, CLIPMapperConfig
from jaxrel.models.clipmapper.model import CLIPMapper
from jaxrel.models.clipmapper.vqa import CLIPMapperVQA

__all__ = ["MODEL_TYPE", "CLIPMapper", "CLIPMapperCaption", "CLIPMapperConfig", "CLIPMapperVQA"]
