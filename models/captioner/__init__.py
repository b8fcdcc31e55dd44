"""Captioners with attention: an image's features, and recurrent cells that read them.

Three kinds, as Sun et al. 2022 ("Explain and improve: LRP-inference fine-tuning for image
captioning models") explain them: "adaptive", one LSTM with a visual sentinel (Lu et al. 2017);
"gridtd", their Ada-LSTM, with a second LSTM for language; and "aoa", their MH-FC, with
multi-head attention behind a gate (Huang et al. 2019). The image comes as a grid of features
of a VGG or a ResNet, or as features of regions (bottom-up attention, Anderson et al. 2018).
"""

from jaxrel.models.captioner.config import MODEL_TYPE, CaptionerConfig
from jaxrel.models.captioner.model import Captioner
from jaxrel.models.captioner.reference import reference_order

__all__ = ["MODEL_TYPE", "Captioner", "CaptionerConfig", "reference_order"]
