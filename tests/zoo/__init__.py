"""Small random models of many architectures, on which LRP is proven."""

from tests.zoo import other, recurrent, transformers, vision
from tests.zoo.case import Case

ZOO = {**vision.ZOO, **transformers.ZOO, **recurrent.ZOO, **other.ZOO}
BIAS_FREE = {
    **vision.BIAS_FREE,
    **transformers.BIAS_FREE,
    **recurrent.BIAS_FREE,
    **other.BIAS_FREE,
}

__all__ = ["BIAS_FREE", "ZOO", "Case"]
