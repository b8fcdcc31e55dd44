"""How good an explanation is, and how sure we are of it."""

from jaxrel.metrics.localisation import chance, hits, share_inside
from jaxrel.metrics.statistics import Interval, bootstrap

__all__ = ["Interval", "bootstrap", "chance", "hits", "share_inside"]
