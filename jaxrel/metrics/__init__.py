"""How good an explanation is, and how sure we are of it."""

from jaxrel.metrics import perturbation, randomisation
from jaxrel.metrics.localisation import chance, hits, share_inside
from jaxrel.metrics.statistics import Interval, Intervals, bootstrap, bootstrap_many

__all__ = [
    "Interval",
    "Intervals",
    "bootstrap",
    "bootstrap_many",
    "chance",
    "hits",
    "perturbation",
    "randomisation",
    "share_inside",
]
