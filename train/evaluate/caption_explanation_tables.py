"""What `captioner_evaluation` found, as tables and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrel.files import write_atomically
from jaxrel.metrics import Interval
from jaxrel.train.evaluate.caption_explanations import PROTOCOL

_CAPTION_MEASURES = {
    "CIDEr-D": "CIDEr-D (times 10)",
    "CHAIR_i": "CHAIR_i, share of things named that are not there",
    "CHAIR_s": "CHAIR_s, share of captions that name such a thing",
    "mean_precision": "frequent words: mean precision (mAP)",
    "mean_recall": "frequent words: mean recall",
    "mean_f1": "frequent words: mean F1",
}
_TABLE_STATISTICS = ("mean", "mean_abs", "mean_positive", "max")
_TABLE_THRESHOLDS = (0.0, 0.5, 0.9)


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result.

    Differences are bold where their interval excludes 0, for better or for worse.

    Args:
      result: of `evaluate`, or read back from JSON; its "model", if there, is named.

    Raises:
      ValueError: it is of another protocol.
    """
    check_protocol("markdown", result)
    split = f", split {result['split']}" if "split" in result else ""
    model = f" of {result['model']}" if "model" in result else ""
    beams = "greedy" if result["beams"] == 1 else f"{result['beams']} beams"
    parts = [
        f"# Explanations{model}, word by word\n",
        f"`{result['protocol']}`, {result['data']}{split}, {result['images']} images with the "
        f"model's own captions ({beams}). In brackets bootstrap 95% intervals over images; "
        "differences are paired, and bold where the interval excludes 0.\n",
        _quality_tables(result["captions"]),
        *_patch_tables(result),
        *_word_tables(result),
        _localisation_table(result["localisation"]),
        *_hallucination_tables(result["hallucination"]),
        "## The first captions\n",
        "\n".join(f"- {caption}" for caption in result["examples"]),
    ]
    return "\n".join(parts) + "\n"


def check_protocol(what: str, result: Mapping[str, Any]) -> None:
    """Raise ValueError, which says `what` was to be done, for a result of another protocol."""
    if (found := result.get("protocol")) != PROTOCOL:
        raise ValueError(
            f"{what}: expected a result of {PROTOCOL!r}, as evaluate returns it, got protocol "
            f"{found!r}"
        )


def _quality_tables(found: Mapping[str, Any]) -> str:
    rows = [[meaning, _cell(found[name])] for name, meaning in _CAPTION_MEASURES.items()]
    words = [
        [word, *(f"{one[name]:.3f}" for name in ("precision", "recall", "f1"))]
        for word, one in found["words"].items()
    ]
    return "\n".join(
        [
            "## Captions\n",
            _table(["measure", f"{found['mentions']} things named"], rows),
            _table(["frequent word", "precision", "recall", "F1"], words),
        ]
    )


def _patch_tables(result: Mapping[str, Any]) -> list[str]:
    settings = result["settings"]
    size, count = settings["patch_pixels"], settings["patches"]
    measures = {
        "disappeared": "share of words that disappeared",
        "drop_there": "drop in probability where still there",
    }
    about = (
        f"The {count} patches of {size} x {size} pixels with the highest relevance are set to the "
        "mean colour, and a new caption is written."
    )
    return _ablation_tables("Patches taken away", about, result["patches"], measures)


def _word_tables(result: Mapping[str, Any]) -> list[str]:
    settings = result["settings"]
    about = (
        f"The {settings['removed']} words with the highest relevance are taken away from the words "
        f"before; asked are words that have at least {settings['first_word']} before them."
    )
    measures = {"drop_all": "drop in probability", "share_all": "share of drops >= 0"}
    return _ablation_tables("Words taken away", about, result["words"], measures)


def _ablation_tables(
    title: str, about: str, found: Mapping[str, Any], measures: Mapping[str, str]
) -> list[str]:
    parts = [f"## {title}\n", f"{about}\n"]
    for group, one in found.items():
        if one is None:
            parts.append(f"No word to ask about ({group}).\n")
        else:
            parts.append(f"{group}, {_counted(one)}:\n")
            parts.append(_method_table(one["methods"], measures))
    return parts


def _localisation_table(found: Mapping[str, Any] | None) -> str:
    title = "## Localisation\n"
    if found is None:
        return f"{title}\nThe captions name no object whose place is known.\n"
    shown = [i for i, t in enumerate(found["thresholds"]) if t in _TABLE_THRESHOLDS]
    measures = {"pointing": "pointing game", "mass": "mass on the object"}
    measures |= {f"at {i}": f"correctness at {found['thresholds'][i]:g}" for i in shown}
    flat = {
        name: _flat(one, shown) | {"difference": {n: _flat(x, shown) for n, x in less.items()}}
        for name, one in found["methods"].items()
        for less in (one["difference"],)
    }
    about = (
        f"Words that stand for objects of the image, {_counted(found)}, each image counting "
        f"once; the objects cover {_cell(found['area'])} of it, which chance gives.\n"
    )
    return "\n".join([title, about, _method_table(flat, measures)])


def _flat(one: Mapping[str, Any], shown: Sequence[int]) -> dict[str, Any]:
    curve = one["correctness"]
    points = {f"at {i}": {name: values[i] for name, values in curve.items()} for i in shown}
    return {"pointing": one["pointing"], "mass": one["mass"], **points}


def _hallucination_tables(found: Mapping[str, Any]) -> list[str]:
    parts = ["## Hallucination\n"]
    for group, one in found.items():
        if one is None:
            parts.append(f"No area ({group}): it needs true and hallucinated words.\n")
            continue
        parts.append(
            f"{group}, {one['true']} true and {one['hallucinated']} hallucinated words in "
            f"{one['images']} images. The area under the ROC curve by statistic of the map:\n"
        )
        head = ["method", *_TABLE_STATISTICS]
        rows = [
            [name, *(_cell(method["auc"].get(statistic)) for statistic in _TABLE_STATISTICS)]
            for name, method in one["methods"].items()
            if set(_TABLE_STATISTICS) & set(method["auc"])
        ]
        parts += [_table(head, rows), _chosen_table(one["methods"])]
    return parts


def _chosen_table(methods: Mapping[str, Any]) -> str:
    if any(one["chosen"] is None for one in methods.values()):
        return "Too few words to choose a statistic on half of the images.\n"
    head = ["method", "statistic", "AUC", "less attention's", "sensitivity", "specificity"]
    rows = []
    for name, one in methods.items():
        chosen, less = one["chosen"], one["difference"].get("attention", {})
        cells = [_cell(chosen["auc"]), _difference(less.get("chosen"))]
        cells += [_cell(chosen["sensitivity"]), _cell(chosen["specificity"])]
        rows.append([name, chosen["statistic"], *cells])
    about = "The statistic and threshold chosen on half of the images, judged on the others:\n"
    return f"{about}\n{_table(head, rows)}"


def _counted(found: Mapping[str, Any]) -> str:
    return f"{found['cases']} words in {found['images']} images"


def _method_table(methods: Mapping[str, Any], measures: Mapping[str, str]) -> str:
    """A row per method; each measure, and its differences from the baselines."""
    baselines = list(dict.fromkeys(b for one in methods.values() for b in one["difference"]))
    less = [f"less {baseline}'s" for baseline in baselines]
    head = ["method"]
    for title in measures.values():
        head += [title, *less]
    rows = []
    for name, one in methods.items():
        row = [name]
        for measure in measures:
            found = [one["difference"].get(baseline, {}).get(measure) for baseline in baselines]
            row += [_cell(one[measure]), *map(_difference, found)]
        rows.append(row)
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(one: Mapping[str, float] | None) -> str:
    return "none" if one is None else str(Interval(**one))


def _difference(one: Mapping[str, float] | None) -> str:
    if one is None:
        return ""
    mean, low, high = Interval(**one)
    text = f"{mean:+z.3f} [{low:+z.3f}, {high:+z.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def save(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a result: JSON, Markdown tables, and a plot of each measure that has words.

    Args:
      result: of `evaluate`, or with a "model" beside the settings.
      folder: made if it is not there.

    Returns:
      The files.

    Raises:
      ImportError: matplotlib is not installed (extra `report`); JSON and tables are written.
      ValueError: a result of another protocol.
      OSError: a file cannot be written there.
    """
    from jaxrel.report import plots

    check_protocol("save", result)
    stem = f"captioner-{result['data'].lower()}"
    data = json.dumps(result, indent=1, allow_nan=False).encode()
    files = [folder / f"{stem}.json", folder / f"{stem}.md"]
    for file, content in zip(files, (data, markdown(result).encode()), strict=True):
        write_atomically(file, content)
    note = f"{PROTOCOL}, {result['data']}, {result['images']} images; bootstrap 95% intervals"
    for name, (panels, bases) in _panels(result).items():
        if panels:
            files.append(folder / f"{stem}-{name}.png")
            start = "; bars begin at chance" if bases else ""
            plots.bars(panels, files[-1], bases=bases, note=note + start)
    if (found := result["localisation"]) is not None:
        files.append(folder / f"{stem}-correctness.png")
        correctness = {name: one["correctness"] for name, one in found["methods"].items()}
        plots.lines(
            {"Relevance on the object that the word names": correctness},
            found["thresholds"],
            files[-1],
            x="threshold, as a share of the map's largest value",
            y="share of what is above it, on the object",
            reference=("size of the object", found["area"]["mean"]),
            note=note,
        )
    return files


def _panels(result: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """What to draw as bars: by file, panels and where their bars begin."""

    def drawn(section: str, measures: Mapping[str, str]) -> dict[str, Any]:
        return {
            f"{title} ({group})": {name: one[key] for name, one in found["methods"].items()}
            for key, title in measures.items()
            for group, found in result[section].items()
            if found is not None
        }

    patches = drawn("patches", {"disappeared": "words gone", "drop_there": "drop where there"})
    words = drawn("words", {"drop_all": "drop in probability"})
    told = {
        f"area under the ROC ({group})": {
            name: one["chosen"] and one["chosen"]["auc"] for name, one in found["methods"].items()
        }
        for group, found in result["hallucination"].items()
        if found is not None and all(one["chosen"] for one in found["methods"].values())
    }
    place, chance = {}, {}
    if (found := result["localisation"]) is not None:
        for key, title in (("pointing", "pointing game"), ("mass", "mass on the object")):
            place[title] = {name: one[key] for name, one in found["methods"].items()}
            chance[title] = found["area"]["mean"]
    return {
        "patches": (patches, {}),
        "words": (words, {}),
        "pointing": (place, chance),
        "hallucination": (told, dict.fromkeys(told, 0.5)),
    }
