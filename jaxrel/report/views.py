"""What the page's script draws: every view's numbers, as JSON inside the page."""

import json
from collections.abc import Sequence
from typing import Any

from jaxrel.report import colours, encode, heat, texts
from jaxrel.report.panels import Column, Panel, Row, named, shown_image
from jaxrel.report.places import summary


def caption_words(view: Sequence[Row]) -> list[tuple[str, int | None, bool]]:
    """The words of a caption in their order.

    Args:
      view: rows of one caption, which explain some or all of its words.

    Returns:
      (The word, the row that explains it or None, whether it is flagged by any method). A word
      of several tokens that are explained apart has an entry for each.
    """
    longest = max(view, key=lambda row: len(_before(row)))
    place: dict[int, list[tuple[str, int, bool]]] = {}
    for index, row in enumerate(view):
        word = row[0].word
        at = len(_before(row)) - word.startswith("##")
        flagged = any(panel.flagged for panel in row)
        place.setdefault(at, []).append((word.removeprefix("##"), index, flagged))
    count = max(len(_before(longest)), max(place) + 1)
    plain: list[tuple[str, int | None, bool]] = [(word, None, False) for word in _before(longest)]
    found: list[tuple[str, int | None, bool]] = []
    for at in range(count):
        found += place.get(at) or [plain[at]]
    return found


def _before(row: Row) -> list[str]:
    """The words before the explained one, by the first method that tells."""
    return next(([word for word, _ in panel.words] for panel in row if panel.words), [])


def as_json(columns: Sequence[Column], views: Sequence[Sequence[Row]]) -> str:
    """The numbers of views, to stand in a `script` element."""
    data = {
        "methods": [
            {"name": texts.clean(name), "signed": any(panel.signed for panel in column.panels)}
            for name, column in zip(named(columns), columns, strict=True)
        ],
        "colours": {"signed": colours.anchors(signed=True), "unsigned": colours.anchors()},
        "hatchedBelow": heat.HATCHED_BELOW,
        "opacity": heat.OPACITY,
        "scales": {"own": texts.OWN_SCALE, "common": texts.ONE_SCALE},
        "views": [_view(view) for view in views],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Inside `script` only "<" could end or begin an element.
    return text.replace("<", "\\u003c")


def _view(view: Sequence[Row]) -> dict[str, Any]:
    shown = shown_image(view[0])
    maps = iter(encode.maps([panel.map for row in view for panel in row]))
    return {
        "grey": 0.7 if shown is None else round(heat.mean_pale(shown), 3),
        "size": None if shown is None else [shown.shape[1], shown.shape[0]],
        "caption": [
            {"word": texts.clean(word), "row": row, "flagged": flagged}
            for word, row, flagged in (caption_words(view) if _is_caption(view) else ())
        ],
        "rows": [
            {
                "said": f"{texts.clean(row[0].target)}: score {texts.score(row)}",
                "panels": [_panel(panel, next(maps)) for panel in row],
            }
            for row in view
        ],
    }


def _is_caption(view: Sequence[Row]) -> bool:
    return view[0][0].caption is not None


def _panel(panel: Panel, map: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "map": map,
        "words": [[texts.clean(word), value] for word, value in panel.words],
        "said": summary(panel),
        "flag": texts.clean(panel.flag),
        "flagged": bool(panel.flagged),
        "signed": panel.signed,
    }
