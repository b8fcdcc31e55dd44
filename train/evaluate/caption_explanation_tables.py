"""What `caption_explanations` found, as tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrel.train.evaluate.caption_explanations import PROTOCOL
from jaxrel.train.evaluate.record import save as save_result
from jaxrel.train.evaluate.tables import Table, by_row, cell, check_protocol, difference
from jaxrel.train.evaluate.tables import markdown as tables_markdown

_CAPTION_MEASURES = {
    "CIDEr-D": "CIDEr-D (times 10)",
    "CHAIR_i": "CHAIR_i, share of named things that are not there",
    "CHAIR_s": "CHAIR_s, share of captions that name such a thing",
    "mean_precision": "frequent words: mean precision (mAP)",
    "mean_recall": "frequent words: mean recall",
    "mean_f1": "frequent words: mean F1",
}
_LOCALISED = {"pointing": "pointing game", "mass": "relevance mass accuracy"}
_TABLE_STATISTICS = ("mean", "mean_abs", "mean_positive", "max")
_TABLE_THRESHOLDS = (0.0, 0.5, 0.9)


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result, under a title, and its first captions.

    Args:
      result: of `evaluate`, or read back from JSON; its "model", if there, is named.

    Raises:
      ValueError: it is of another protocol.
    """
    check_protocol("markdown", result, PROTOCOL)
    split = f", split {result['split']}" if "split" in result else ""
    model = f" of {result['model']}" if "model" in result else ""
    beams = "greedy" if result["beams"] == 1 else f"{result['beams']} beams"
    parts = [
        f"# Explanations{model}, word by word\n",
        f"`{result['protocol']}`, {result['data']}{split}, {result['images']} images with the "
        f"model's own captions ({beams}). In brackets bootstrap 95% intervals over images; "
        "differences are paired, and bold where the interval excludes 0.\n",
        tables_markdown(tables(result)),
        "### The first captions\n",
        "\n".join(f"- {caption}" for caption in result["examples"]),
    ]
    return "\n".join(parts) + "\n"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """How good the captions are, and what was found of their explanations.

    Args:
      result: of `evaluate`, or read back from JSON.

    Raises:
      ValueError: it is of another protocol.
    """
    check_protocol("tables", result, PROTOCOL)
    return [
        *_caption_tables(result["captions"]),
        *_patch_tables(result),
        *_word_tables(result),
        _localisation_table(result["localisation"]),
        *_hallucination_tables(result["hallucination"]),
    ]


def _caption_tables(found: Mapping[str, Any]) -> list[Table]:
    measures = [
        [meaning, cell(found[name], nothing="none")] for name, meaning in _CAPTION_MEASURES.items()
    ]
    words = [
        [word, *(f"{one[name]:.3f}" for name in ("precision", "recall", "f1"))]
        for word, one in found["words"].items()
    ]
    return [
        Table("Captions", "", ["measure", f"{found['mentions']} named things"], measures),
        Table("Frequent words", "", ["word", "precision", "recall", "F1"], words),
    ]


def _patch_tables(result: Mapping[str, Any]) -> list[Table]:
    settings = result["settings"]
    size, count = settings["patch_pixels"], settings["patches"]
    measures = {
        "disappeared": "share of words that disappeared",
        "drop_there": "drop in probability where still there",
    }
    about = (
        f"The {count} patches of {size} x {size} pixels with the highest relevance are set to the "
        "mean colour, and the caption is regenerated."
    )
    return _ablation_tables("Removed patches", about, result["patches"], measures)


def _word_tables(result: Mapping[str, Any]) -> list[Table]:
    settings = result["settings"]
    about = (
        f"Of the preceding words the {settings['removed']} with the highest relevance are removed; "
        f"words with fewer than {settings['first_word']} before them are left out."
    )
    measures = {"drop_all": "drop in probability", "share_all": "share of drops >= 0"}
    return _ablation_tables("Removed words", about, result["words"], measures)


def _ablation_tables(
    title: str, about: str, found: Mapping[str, Any], measures: Mapping[str, str]
) -> list[Table]:
    return [
        Table(f"{title} ({group})", f"No word to ask about ({group}).")
        if one is None
        else _method_table(
            f"{title} ({group})", f"{about} {_counted(one)}.", one["methods"], measures
        )
        for group, one in found.items()
    ]


def _localisation_table(found: Mapping[str, Any] | None) -> Table:
    title = "Localisation"
    if found is None:
        return Table(title, "The captions name no object whose place is known.")
    shown = [i for i, t in enumerate(found["thresholds"]) if t in _TABLE_THRESHOLDS]
    measures = _LOCALISED | {f"at {i}": f"correctness at {found['thresholds'][i]:g}" for i in shown}
    flat = {
        name: _flat(one, shown) | {"difference": {n: _flat(x, shown) for n, x in less.items()}}
        for name, one in found["methods"].items()
        for less in (one["difference"],)
    }
    about = (
        f"Words that stand for objects of the image, {_counted(found)}, each image counting "
        f"once; the objects cover {cell(found['area'])} of it, which chance gives."
    )
    return _method_table(title, about, flat, measures)


def _flat(one: Mapping[str, Any], shown: Sequence[int]) -> dict[str, Any]:
    curve = one["correctness"]
    points = {f"at {i}": {name: values[i] for name, values in curve.items()} for i in shown}
    return {**{name: one[name] for name in _LOCALISED}, **points}


def _hallucination_tables(found: Mapping[str, Any]) -> list[Table]:
    tables = []
    for group, one in found.items():
        title = f"Hallucination ({group})"
        if one is None:
            about = f"No area ({group}): it needs true and hallucinated words."
            tables.append(Table(title, about))
            continue
        about = (
            f"{one['true']} true and {one['hallucinated']} hallucinated words in {one['images']} "
            "images: the area under the ROC curve by statistic of the map."
        )
        rows = {
            name: method["auc"]
            for name, method in one["methods"].items()
            if set(_TABLE_STATISTICS) & set(method["auc"])
        }
        shown = {name: name for name in _TABLE_STATISTICS}
        tables.append(by_row(title, about, "method", rows, shown))
        tables.append(_chosen_table(f"{title}, chosen statistic", one["methods"]))
    return tables


def _chosen_table(title: str, methods: Mapping[str, Any]) -> Table:
    if any(one["chosen"] is None for one in methods.values()):
        return Table(title, "Too few words to choose a statistic on half of the images.")
    head = ["method", "statistic", "AUC", "difference to attention", "sensitivity", "specificity"]
    rows = []
    for name, one in methods.items():
        chosen, less = one["chosen"], one["difference"].get("attention", {})
        cells = [cell(chosen["auc"]), difference(less.get("chosen"))]
        cells += [cell(chosen["sensitivity"]), cell(chosen["specificity"])]
        rows.append([name, chosen["statistic"], *cells])
    about = "Statistic and threshold are chosen on half of the images and judged on the others."
    return Table(title, about, head, rows)


def _counted(found: Mapping[str, Any]) -> str:
    return f"{found['cases']} words in {found['images']} images"


def _method_table(
    title: str, about: str, methods: Mapping[str, Any], measures: Mapping[str, str]
) -> Table:
    """A row per method; each measure, and its differences from the baselines."""
    baselines = list(dict.fromkeys(b for one in methods.values() for b in one["difference"]))
    less = [f"difference to {baseline}" for baseline in baselines]
    rows = []
    for name, one in methods.items():
        row = [name]
        for measure in measures:
            found = [one["difference"].get(baseline, {}).get(measure) for baseline in baselines]
            row += [cell(one[measure], nothing="none"), *map(difference, found)]
        rows.append(row)
    return Table(
        title, about, ["method", *(x for head in measures.values() for x in (head, *less))], rows
    )


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

    check_protocol("save", result, PROTOCOL)
    stem = f"captioner-{result['data'].lower()}"
    files = save_result(result, markdown(result), folder / stem)
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

    patches = drawn(
        "patches", {"disappeared": "words that disappeared", "drop_there": "drop where there"}
    )
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
        for key, title in _LOCALISED.items():
            place[title] = {name: one[key] for name, one in found["methods"].items()}
            chance[title] = found["area"]["mean"]
    return {
        "patches": (patches, {}),
        "words": (words, {}),
        "pointing": (place, chance),
        "hallucination": (told, dict.fromkeys(told, 0.5)),
    }
