"""How good an explanation or a caption is, and how sure we are of it."""

from jaxrel.metrics import caption_scores, faithfulness, perturbation, randomisation
from jaxrel.metrics.caption_scores import CiderD, bleu, cider_d, rouge_l, tokenise
from jaxrel.metrics.detector import Detector
from jaxrel.metrics.hallucination import Chair, chair
from jaxrel.metrics.intervals import (
    Interval,
    Intervals,
    bootstrap,
    bootstrap_many,
    bootstrap_ratio,
)
from jaxrel.metrics.localisation import chance, pointing_game, relevance_mass_accuracy
from jaxrel.renamed import renamed

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
    "caption_scores",
    "chair",
    "chance",
    "cider_d",
    "faithfulness",
    "perturbation",
    "pointing_game",
    "randomisation",
    "relevance_mass_accuracy",
    "rouge_l",
    "tokenise",
]

__getattr__ = renamed(
    __name__,
    {
        "hits": "jaxrel.metrics.localisation.pointing_game",
        "share_inside": "jaxrel.metrics.localisation.relevance_mass_accuracy",
    },
)
