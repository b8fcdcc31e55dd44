"""Does fine-tuning make a captioner hallucinate less (`finetuning/1`)?

Captioners of Shapes that were fine-tuned in several modes (`jaxrel train finetune-shapes`) beside
their base checkpoints: what they hallucinate, what they leave out, and how like people's their
captions are. Several trainings with other seeds are repetitions, and modes are compared with the
control (`plain`: as many steps of the first training) on the same images and base checkpoints.

Whether LRP-inference makes captioners hallucinate less was first asked of captioners that learn all
from nothing. A second study comes closer to the conditions of Sun et al. 2022. Its plan was
written before it was run:

1. The encoder is trained elsewhere: it learns on scenes without bias to name the colour, shape and
   size at each position (`gridtd-shapes --split train --word-loss 0`).
2. Six captioners, three seeds with additive and three with multi-head attention, learn 192 scenes
   of `biased_train` by heart with this encoder, frozen, past their best CIDEr-D on `biased_val`:
   1,500 steps without dropout, where 512 or 1,024 scenes, or dropout, only made CIDEr-D rise more
   slowly. The same training at a quarter and at half of the steps shows that they are past it.
3. Each is fine-tuned for one epoch of the same scenes in the modes `lrp` and `plain`, which is the
   control: batches of 32, learning rate 5e-4 and 1e-4 in the encoder, Adam's decays 0.8 and 0.999,
   gradients bounded by 0.1, and the losses of both predictions with equal weights.
4. Greedy captions of 2,048 scenes of `biased_test`, `biased_val` and `test` are judged, with paired
   intervals over scenes and captioners. LRP-inference lowers hallucination if CHAIR_i on
   `biased_test` is lower than the control's and the interval of the difference excludes 0; it
   raises object words if their mAP is higher in the same sense; it costs fluency if CIDEr-D is
   lower in the same sense. Either direction is a result.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm, trange

from jaxrel.metrics.caption_scores import CiderD, bleu_counts, bleu_of_counts, tokenise
from jaxrel.metrics.frequent_words import mean_scores
from jaxrel.metrics.intervals import Statistic, interval, resampled, share
from jaxrel.models.captioner import Captioner
from jaxrel.models.checkpoint import find_folder
from jaxrel.train.data.shapes import Scene, Shapes
from jaxrel.train.evaluate.captioned_images import ShapesImages
from jaxrel.train.evaluate.captions import caption_counts, write_captions
from jaxrel.train.evaluate.record import save as save_result
from jaxrel.train.evaluate.tables import Table, by_row, check_protocol, difference
from jaxrel.train.evaluate.tables import markdown as tables_markdown
from jaxrel.train.loop.train import SETTINGS_FILE
from jaxrel.train.recipes.finetune import FinetuneShapes

PROTOCOL = "finetuning/1"
BASELINE, CONTROL = "baseline", "plain"
SPLITS = ("biased_test", "test")
# What runs that are compared need not have in common: what sets them apart, and their pace.
_OWN = ("model", "mode", "seed", "log_every", "checkpoint_every", "accumulate")
# What means nothing in other modes; where it is not the usual, the mode is named by it too.
_OF_MODE = ("mixing", "temperature", "weighed", "stop_words", "idf", "ends")


class Measure(NamedTuple):
    """What is measured: how it is called in a table, and what of it is better, if anything."""

    title: str
    better: str = "more"

    def __str__(self) -> str:
        return f"{self.title} ({self.better} is better)" if self.better else self.title


MEASURES = {
    "CHAIR_i": Measure("CHAIR_i", better="less"),
    "CHAIR_s": Measure("CHAIR_s", better="less"),
    "stated": Measure("stated objects that are true"),
    "mentioned": Measure("objects that are mentioned"),
    "mean_precision": Measure("mAP of frequent words"),
    "mean_recall": Measure("their mean recall"),
    "CIDEr-D": Measure("CIDEr-D"),
    "BLEU-4": Measure("BLEU-4"),
    "words": Measure("words per caption", better=""),
}

# What a plot has room for.
_DRAWN = ("CHAIR_i", "stated", "mean_precision", "mentioned", "CIDEr-D")

_DEFAULTS = dataclasses.asdict(FinetuneShapes())

# A base checkpoint and the seed of the fine-tuning.
Base = tuple[str, int]
Runs = dict[str, dict[Base, Path]]


def find_runs(folder: Path) -> Runs:
    """The models below a folder that `jaxrel train finetune-shapes` wrote, and their bases.

    Args:
      folder: with a folder per model.

    Returns:
      {mode: {(base checkpoint, seed): its folder}}, with the base checkpoints themselves as the
      mode "baseline"; each mode has the same bases and seeds. Variants of a mode are modes of
      their own, such as "lrp, mixing 0.0".

    Raises:
      FileNotFoundError: no such folder, no models in it, or a base checkpoint is gone.
      ValueError: a settings file cannot be read, two models have one mode, base and seed, a mode
        lacks what another has, or runs differ in other settings.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found: Runs = {}
    settings: dict[Path, dict[str, Any]] = {}
    for file in sorted(folder.glob(f"*/{SETTINGS_FILE}")):
        read = _read(file)
        if "mode" not in read:
            # Such as a base checkpoint.
            continue
        mode, base = _name(read), (read["model"], read["seed"])
        if (other := found.setdefault(mode, {}).get(base)) is not None:
            raise ValueError(
                f"{file.parent} and {other} are both fine-tuned from {base[0]!r} in mode {mode!r} "
                f"with seed {base[1]}; keep one of them here"
            )
        found[mode][base] = file.parent
        # What an older version did not ask for was as it is by default now.
        settings[file.parent] = {
            name: x for name, x in {**_DEFAULTS, **read}.items() if name not in (*_OWN, *_OF_MODE)
        }
    if not found:
        raise FileNotFoundError(
            f"{folder} has no fine-tuned models; make some with jaxrel train finetune-shapes "
            f"--model CAPTIONER --mode lrp --out {folder}/NAME"
        )
    _check_same(found, settings)
    bases = next(iter(found.values()))
    return {BASELINE: {base: find_folder(base[0]) for base in bases}, **found}


def _read(file: Path) -> dict[str, Any]:
    """What a settings file holds; ValueError if that is no settings."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged: {error}; take its folder away or train again"
        ) from error
    lacking = [n for n in ("model", "seed") if not isinstance(read, dict) or n not in read]
    if lacking and (not isinstance(read, dict) or "mode" in read):
        raise ValueError(
            f"{file} lacks {' and '.join(lacking)}; expected what jaxrel train finetune-shapes "
            "writes"
        )
    return read


def _name(settings: Mapping[str, Any]) -> str:
    """The mode, and what of its own settings is not the usual."""
    changed = {n: settings[n] for n in _OF_MODE if settings.get(n, _DEFAULTS[n]) != _DEFAULTS[n]}
    return ", ".join([settings["mode"], *(f"{name} {x}" for name, x in changed.items())])


def _check_same(found: Runs, settings: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise ValueError unless all modes have the same bases, and runs the same settings."""
    every = {base for runs in found.values() for base in runs}
    for mode, runs in found.items():
        if lacking := sorted(every - set(runs)):
            model, seed = lacking[0]
            raise ValueError(
                f"mode {mode!r} has no model fine-tuned from {model!r} with seed {seed}, and other "
                f"modes do ({len(lacking)} are lacking); train it, or remove the others"
            )
    (first, expected), *others = settings.items()
    for folder, one in others:
        different = [name for name in {**one, **expected} if one.get(name) != expected.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{folder} had {name} {one.get(name)!r} and {first} {expected.get(name)!r}: modes "
                "are compared at equal settings"
            )


def evaluate(
    folder: Path,
    *,
    splits: Sequence[str] = SPLITS,
    scenes: int = 2048,
    batch: int = 64,
    data_seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Judge the greedy captions of all models below a folder.

    Args:
      folder: see `find_runs`.
      splits: of Shapes; on "biased_test" what goes together in training never does.
      scenes: how many of each split.
      batch: images at a time.
      data_seed: of the Shapes data set.
      resamples: of the bootstrap, over images and base checkpoints.

    Returns:
      What JSON can hold: `protocol`, the settings, and `splits`: by split and mode each of
      `MEASURES` with its interval, its value by repetition, and its difference from the control
      and from the baseline.

    Raises:
      FileNotFoundError, ValueError: see `find_runs`; also no scenes, or an unknown split.
    """
    if scenes < 1:
        raise ValueError(f"finetuning: scenes must be at least 1, got {scenes}")
    runs = find_runs(folder)
    modes = sorted(runs, key=_order)
    drawn = {split: _draw(data_seed, split, scenes) for split in dict.fromkeys(splits)}
    judged: dict[str, dict[str, list[dict[str, Statistic]]]] = {
        split: {mode: [] for mode in modes} for split in drawn
    }
    cider = {split: _cider(some) for split, some in drawn.items()}
    examples: dict[str, dict[str, list[str]]] = {split: {} for split in drawn}
    total = sum(map(len, runs.values()))
    with tqdm(total=total, desc="models", unit="model") as bar:
        for mode in modes:
            for base in sorted(runs[mode]):
                model = Captioner.from_pretrained(runs[mode][base])
                for split, some in drawn.items():
                    captions = write_captions(model, some, batch=batch)
                    judged[split][mode].append(_measured(captions, some, cider[split]))
                    examples[split].setdefault(mode, captions[:5])
                bar.update()
    return {
        "protocol": PROTOCOL,
        "data": "Shapes",
        "data_seed": data_seed,
        "scenes": scenes,
        "modes": modes,
        "beginnings": [
            {"model": str(model), "seed": seed} for model, seed in sorted(runs[modes[0]])
        ],
        "settings": _settings(next(iter(runs[modes[-1]].values()))),
        "versions": {"jaxrel": version("jaxrel"), "jax": jax.__version__},
        "splits": {
            split: _summary(by_mode, scenes, resamples) for split, by_mode in judged.items()
        },
        "examples": examples,
    }


def _order(mode: str) -> tuple[int, str]:
    known = (BASELINE, CONTROL, "lrp", "scst", "lrp-scst")
    plain = mode.split(",")[0]
    return (known.index(plain) if plain in known else len(known), mode)


def _settings(folder: Path) -> dict[str, Any]:
    read = _read(folder / SETTINGS_FILE)
    return {name: x for name, x in read.items() if name not in (*_OWN, *_OF_MODE)}


def _draw(data_seed: int, split: str, scenes: int) -> tuple[Scene, ...]:
    data = Shapes(seed=data_seed)
    return tuple(data.scene(split, i) for i in trange(scenes, desc="drawing", leave=False))


def _references(scenes: Sequence[Scene]) -> list[list[list[str]]]:
    return [[tokenise(caption.text) for caption in scene.captions] for scene in scenes]


def _cider(scenes: Sequence[Scene]) -> tuple[CiderD, list[list[Any]]]:
    """The scorer, and the weighed references: they are the same for all models."""
    references = _references(scenes)
    cider = CiderD.from_references(references)
    return cider, [[cider.weigh(one) for one in some] for some in references]


def _measured(
    captions: Sequence[str], scenes: tuple[Scene, ...], cider: tuple[CiderD, list[list[Any]]]
) -> dict[str, Statistic]:
    """`MEASURES` of one model, each as a function of how often images count."""
    images, counts = ShapesImages(scenes), caption_counts(captions, scenes)
    words = [tokenise(caption) for caption in captions]
    references = _references(scenes)
    every = np.ones(len(scenes))
    scorer, weighed = cider
    n_grams = bleu_counts(words, references)
    by_word = functools.partial(
        mean_scores,
        [images.forms(one) for one in words],
        [[images.forms(one) for one in some] for some in references],
        images.frequent,
    )
    return {
        "CHAIR_i": share(counts["no_such_shape"], counts["shapes"]),
        "CHAIR_s": share(counts["hallucinates_shape"], every),
        "stated": share(counts["true"], counts["stated"]),
        "mentioned": share(counts["mentioned"], counts["objects"]),
        "mean_precision": lambda weights: by_word(weights)[:, 0],
        "mean_recall": lambda weights: by_word(weights)[:, 1],
        "CIDEr-D": share(np.asarray(scorer.score(words, weighed)), every),
        "BLEU-4": lambda weights: bleu_of_counts(weights.T @ n_grams)[:, -1],
        "words": share(np.array([len(one) for one in words]), every),
    }


def _summary(
    by_mode: Mapping[str, Sequence[Mapping[str, Statistic]]], scenes: int, resamples: int
) -> dict[str, Any]:
    """By mode and measure: the interval, the values by repetition, and the differences."""
    once = np.ones((scenes, 1))
    draws = {
        mode: {
            name: resampled([one[name] for one in runs], scenes, resamples=resamples)
            for name in MEASURES
        }
        for mode, runs in by_mode.items()
    }
    return {
        mode: {
            name: {
                **interval(draws[mode][name])._asdict(),
                "by_repetition": [float(one[name](once)[0]) for one in by_mode[mode]],
                "difference": {
                    other: interval(draws[mode][name] - draws[other][name])._asdict()
                    for other in (CONTROL, BASELINE)
                    if other in draws and other != mode
                },
            }
            for name in MEASURES
        }
        for mode in by_mode
    }


def tables(result: Mapping[str, Any], *splits: str) -> list[Table]:
    """Two tables of a split: the measures by mode, and the differences to the control.

    Args:
      result: of `evaluate`, or read back from JSON.
      splits: of the result; all by default.

    Raises:
      ValueError: it is of another protocol, or has no such split.
    """
    check_protocol("finetuning", result, PROTOCOL)
    if unknown := [split for split in splits if split not in result["splits"]]:
        raise ValueError(
            f"finetuning: no split {unknown[0]!r}; the result has {', '.join(result['splits'])}"
        )
    note = f"{result['scenes']} scenes, {len(result['beginnings'])} base checkpoints."
    heads = {name: str(one) for name, one in MEASURES.items()}
    found = []
    for split in splits or result["splits"]:
        modes = result["splits"][split]
        found.append(by_row(split, note, "mode", modes, heads))
        if CONTROL in modes:
            rows = [
                [mode, *(difference(x["difference"][CONTROL]) for x in one.values())]
                for mode, one in modes.items()
                if mode != CONTROL
            ]
            title = f"{split}, difference to {CONTROL}"
            found.append(Table(title, note, ["mode", *heads.values()], rows))
    return found


def markdown(result: Mapping[str, Any], *splits: str) -> str:
    """`tables` as text; arguments and errors are theirs."""
    return tables_markdown(tables(result, *splits))


def save(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a result: JSON, the Markdown tables, and a plot of each split.

    Args:
      result: of `evaluate`.
      folder: made if it is not there.

    Returns:
      The files.

    Raises:
      ImportError: matplotlib is not installed (extra `report`); JSON and tables are written.
      ValueError: a result of another protocol.
      OSError: a file cannot be written there.
    """
    from jaxrel.report import plots

    files = save_result(result, markdown(result), folder / "finetuning")
    for split, found in result["splits"].items():
        files.append(folder / f"finetuning-{split}.png")
        note = (
            f"{PROTOCOL}, Shapes {split}, {result['scenes']} scenes, "
            f"{len(result['beginnings'])} base checkpoints; 95% intervals over both"
        )
        plots.bars(_panels(found), files[-1], note=note)
    return files


def _panels(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What to draw: differences to the control, since bases differ by more than modes do."""
    compared = CONTROL in found
    panels = {}
    for name in _DRAWN:
        title, better = MEASURES[name]
        less = f", difference to {CONTROL}" if compared else ""
        panels[f"{title}{less}\n({better} is better)"] = {
            mode: one[name]["difference"][CONTROL] if compared else one[name]
            for mode, one in found.items()
            if not compared or mode != CONTROL
        }
    return panels
