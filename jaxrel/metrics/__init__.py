"""How good an explanation or a caption is, and how sure we are of it."""

from jaxrel.metrics import captions, perturbation, randomisation
from jaxrel.metrics.captions import CiderD, bleu, cider_d, rouge_l, tokenise
from jaxrel.metrics.detector import Detector
from jaxrel.metrics.hallucination import Chair, chair
from jaxrel.metrics.localisation import chance, hits, share_inside
from jaxrel.metrics.statistics import (
    Interval,
    Intervals,
    bootstrap,
    bootstrap_many,
    bootstrap_ratio,
)

__all__ = [
    "Chair",
    "CiderD",
    "Detector",
    "Interval",
    "Intervals",
    "bleu",
    "bootstrap",
    "bootstrap_many",
    "bootstrap_ratio",
    "captions",
    "chair",
    "chance",
    "cider_d",
    "hits",
    "perturbation",
    "randomisation",
    "rouge_l",
    "share_inside",
    "tokenise",
]
