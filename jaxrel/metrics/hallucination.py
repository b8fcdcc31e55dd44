"""Does a caption speak of what is not in the image?"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Chair(NamedTuple):
    """Hallucinated objects, over a corpus and per caption.

    Attributes:
      instances: CHAIR_i, the share of mentions that are hallucinated; NaN where no caption
        mentions an object.
      captions: CHAIR_s, the share of captions with at least one such mention.
      mentions: per caption, how many objects it mentions.
      hallucinated: per caption, how many of these are not there.
    """

    instances: float
    captions: float
    mentions: Int[np.ndarray, " captions"]
    hallucinated: Int[np.ndarray, " captions"]


def chair(mentioned: Sequence[Collection[str]], present: Sequence[Collection[str]]) -> Chair:
    """CHAIR (Rohrbach et al. 2018), "Object Hallucination in Image Captioning".

    Synonyms are the caller's: give both sides the same name for the same kind of object.

    Args:
      mentioned: the objects each caption mentions; in a list every repetition counts, as in the
        paper, in a set each object once.
      present: the objects in each caption's image, from annotations and reference captions.

    Returns:
      CHAIR_i, CHAIR_s and the counts per caption. Lower is better.

    Raises:
      ValueError: no captions, numbers that differ, or text in place of a collection.
    """
    if len(mentioned) != len(present) or not len(mentioned):
        raise ValueError(
            f"chair: {len(mentioned)} captions and {len(present)} images; expected one image "
            "per caption, and at least one"
        )
    for i, names in enumerate((*mentioned, *present)):
        if isinstance(names, str):
            what = "caption" if i < len(mentioned) else "image"
            raise ValueError(
                f"chair: the objects of {what} {i % len(mentioned)} are the text {names!r}; "
                "expected a set or list of names"
            )
    mentions = np.array([len(names) for names in mentioned])
    hallucinated = np.array(
        [
            sum(name not in there for name in names)
            for names, there in zip(mentioned, present, strict=True)
        ]
    )
    total = mentions.sum()
    share = float(hallucinated.sum() / total) if total else float("nan")
    return Chair(share, float((hallucinated > 0).mean()), mentions, hallucinated)
