"""From an evaluation of explanations of captions to what tells hallucinated words."""

from collections.abc import Mapping
from typing import Any

from jaxrel.explanations.words import WORD_METHODS
from jaxrel.metrics import Interval
from jaxrel.metrics.detector import Criterion, Detector, WordGroup
from jaxrel.train.evaluate.caption_explanations import PROTOCOL
from jaxrel.train.evaluate.tables import check_protocol


def detector(result: Mapping[str, Any]) -> Detector:
    """Keep what was "chosen" of each explanation that tells words well enough to mark them.

    On held-out images, the interval of the area under the ROC curve must lie above 0.5, and words
    below the threshold must be hallucinated at least twice as often as all. Others would flag
    words with hardly a reason.

    Args:
      result: of `caption_explanations.evaluate`, or read back from JSON.

    Raises:
      ValueError: a result of another protocol or of an older version, or no explanation tells
        the words of any group.
    """
    check_protocol("detector", result, PROTOCOL)
    if "weights" not in result or "vocabulary" not in result:
        raise ValueError(
            "detector: this result does not say which weights and words it is of; an older jaxrel "
            "wrote it. Run jaxrel evaluate captioner again"
        )
    groups = {}
    for group, found in result["hallucination"].items():
        if found is not None:
            usual = found["hallucinated"] / (found["true"] + found["hallucinated"])
            if methods := _criteria(found["methods"], usual):
                groups[group] = WordGroup(tuple(result["vocabulary"][group]), usual, methods)
    if not groups:
        raise ValueError(
            "detector: no explanation tells hallucinated words from true ones well enough "
            f"on the held-out half of {result['images']} images, so no word can be flagged "
            "by one; try more images (--scenes) or other methods (--method)"
        )
    return Detector(
        weights=result["weights"],
        data=result["data"],
        split=result.get("split", ""),
        images=result["images"],
        groups=groups,
    )


def _criteria(methods: Mapping[str, Any], usual: float) -> dict[str, Criterion]:
    """By method, where it is an explanation and tells words well enough."""
    found = {name: one["chosen"] for name, one in methods.items() if name in WORD_METHODS}
    return {
        name: Criterion(
            statistic=chosen["statistic"],
            threshold=chosen["threshold"],
            auc=Interval(**chosen["auc"]),
            sensitivity=Interval(**chosen["sensitivity"]),
            specificity=Interval(**chosen["specificity"]),
            precision=Interval(**chosen["precision"]),
            images=chosen["images"],
        )
        for name, chosen in found.items()
        if chosen is not None
        and chosen["auc"]["low"] > 0.5
        and chosen["precision"] is not None
        and chosen["precision"]["mean"] >= 2 * usual
    }
