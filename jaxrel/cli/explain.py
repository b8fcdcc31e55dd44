"""`jaxrel explain IMAGE`: a figure and a page of what made a score, an answer or a caption."""

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxrel.cli import options as shared
from jaxrel.files import free_names

Asked = Literal["text", "question", "caption"]

# What is asked of an image, the bundled model that does it when none is named, and the families
# of the models that can.
DEFAULT_MODELS = {"text": "clip-shapes", "question": "vqa-shapes", "caption": "caption-shapes"}
FAMILIES = {
    "text": ("UNIMODAL",),
    "question": ("BIMODAL",),
    "caption": ("BIMODAL", "WORD_BY_WORD"),
}
# The methods of each family, as the help lists them: help needs no JAX.
METHODS = {
    "UNIMODAL": (
        *("equal", "weighted", "raw", "rollout", "grad_cam", "no_aggregation"),
        *("equal_lrp", "partial_lrp", "token_tm", "legrad", "grad_eclip"),
        *("lrp", "cp_lrp", "input_x_gradient"),
    ),
    "BIMODAL": (
        *("equal", "weighted", "raw", "rollout", "grad_cam", "transformer_attribution"),
        *("equal_lrp", "partial_lrp", "lrp", "cp_lrp", "input_x_gradient"),
    ),
    "WORD_BY_WORD": (
        *("lrp", "gradient", "input_x_gradient", "guided_backprop"),
        *("grad_cam", "guided_grad_cam", "attention"),
    ),
}
DESCRIPTION = """\
Write OUT/explanation.png and OUT/explanation.html: which parts of an image and
which words of a sentence made the model's score of the two, its answer to a
question, or each word of its caption. Where these files exist, the new ones get a
number.
"""
METHODS_HELP = "methods:\n" + "\n".join(
    textwrap.fill(
        ", ".join(METHODS[family]),
        width=79,
        initial_indent=f"  {models:<17} ",
        subsequent_indent=" " * 20,
    )
    for models, family in (
        ("with --text", "UNIMODAL"),
        ("with a CLIPmapper", "BIMODAL"),
        ("with a Captioner", "WORD_BY_WORD"),
    )
)
EXAMPLES = """examples:
  jaxrel explain scene.png --text "a red circle"
  jaxrel explain *.png --text "a red circle" --method weighted,lrp --out maps
  jaxrel explain scene.png --question "what colour is the heart?"
  jaxrel explain scene.png --caption --model aoa-shapes --method all
  jaxrel explain scene.png --text "a dog" --model path/to/a/clip --json
"""


# What JSON tells of an example beside its relevance, where it is known.
TOLD = ("question", "familiarity", "unknown words", "notes")

# A figure as image, for print, or to be edited; and the page.
FORMATS = ("png", "html", "pdf", "svg")


def add(commands: Any) -> None:
    """Add the command."""
    explain = commands.add_parser(
        "explain",
        help="show which parts of an image and which words made the score",
        description=DESCRIPTION,
        epilog=f"{METHODS_HELP}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("image", nargs="+", type=shared.name, help="PNG, JPEG or another image")
    _add_asked(explain)
    _add_how(explain)
    output = explain.add_argument_group("output")
    shared.add_out(output)
    output.add_argument(
        "--format",
        default=",".join(FORMATS[:2]),
        help=f"what to write, with commas: {', '.join(FORMATS)} (default: png,html)",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of an earlier run (default: number the new ones, explanation-2.png)",
    )
    output.add_argument("--json", action="store_true", help="print the result as JSON")
    explain.set_defaults(run=run)


def _add_asked(explain: argparse.ArgumentParser) -> None:
    group = explain.add_argument_group("what is asked (one of the first three)")
    asked = group.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--text",
        action="append",
        metavar="SENTENCE",
        help="explain the similarity of image and sentence: one for all images, or one per "
        "image (repeat --text)",
    )
    asked.add_argument(
        "--question",
        action="append",
        metavar="QUESTION",
        help="answer a question, and explain the answer: one for all images, or one per image",
    )
    asked.add_argument(
        "--caption", action="store_true", help="write a caption, and explain each of its words"
    )
    group.add_argument("--answer", help="with --question: explain this answer, not the model's")


def _add_how(explain: argparse.ArgumentParser) -> None:
    how = explain.add_argument_group("model and method")
    how.add_argument(
        "--model",
        type=shared.name,
        help="a bundled model, a folder or a hub name (default: "
        + ", ".join(f"{name} for --{what}" for what, name in DEFAULT_MODELS.items())
        + ")",
    )
    how.add_argument(
        "--method",
        help="one or several of the methods below, with commas, or 'all' (default: weighted; with "
        "a Captioner lrp)",
    )
    how.add_argument(
        "--layers", type=shared.numbers, help="layers that count, such as 0,1 or --layers=-2,-1"
    )
    how.add_argument("--heads", type=shared.numbers, help="attention heads that count, such as 0,3")
    how.add_argument(
        "--importance",
        default="grad_value",
        help="how the weighted method measures importance (default: grad_value)",
    )


def run(options: argparse.Namespace) -> None:
    """Explain, and write the figure and the page."""
    from jaxrel import explain, report
    from jaxrel.attention.methods import check_methods
    from jaxrel.explanations.methods import WORD_BY_WORD, family
    from jaxrel.metrics.detector import Detector
    from jaxrel.models.checkpoint import find_folder

    asked: Asked = "question" if options.question else "caption" if options.caption else "text"
    images, texts, named = _check(options, asked)
    options.model = options.model or DEFAULT_MODELS[asked]
    model = shared.load(options.model)
    check_asked(model, asked, options.model)
    kind = family(model)
    usual = kind.methods if options.method == "all" else (kind.usual,)
    by_word = kind is WORD_BY_WORD
    explanations = explain(
        model,
        image=images,
        text=texts,
        target=options.answer,
        method=check_methods(usual if named is None else named, kind.methods, "method"),
        layers=options.layers,
        heads=options.heads,
        importance=options.importance,
        name=shared.printable(options.model),
        detector=Detector.load(find_folder(options.model), model) if by_word else None,
    )
    files = _files(options)
    for file in files:
        report.save(explanations, file)
    if options.json:
        print(_json(_as_json(options, explanations, files)))
    else:
        _print(options, explanations)
        print(shared.printable("wrote " + " and ".join(map(str, files))))


def _check(options: argparse.Namespace, asked: Asked) -> tuple[list, list[str] | None, Any]:
    """The images, the texts and the methods that are named, before a model is loaded."""
    from jaxrel.attention.methods import check_methods
    from jaxrel.images import read_images

    texts = options.text or options.question
    for text in (*(texts or ()), *([options.answer] if options.answer else ())):
        shared.sentence(text)
    known = tuple(dict.fromkeys(name for kind in FAMILIES[asked] for name in METHODS[kind]))
    named = None if options.method in (None, "all") else shared.names(options.method, known)
    if named is not None:
        check_methods(named, known, "method")
    if options.answer is not None and asked != "question":
        raise ValueError("--answer goes with --question")
    images = read_images(options.image)
    if texts and len(texts) > 1 and len(images) > 1 and len(texts) != len(images):
        raise ValueError(
            f"{len(images)} images and {len(texts)} {asked}s: give one --{asked} for all "
            "images, or one for each"
        )
    shared.check_out(options.out)
    _files(options)
    return images, texts, named


def _files(options: argparse.Namespace) -> list[Path]:
    """The files to write; ValueError for a format that is not known."""
    formats = dict.fromkeys(shared.names(options.format))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(
            f"--format: unknown format {', '.join(map(repr, unknown)) or '(none given)'}; "
            f"there are {', '.join(FORMATS)}"
        )
    suffixes = [f".{name}" for name in formats]
    if options.overwrite:
        return [options.out / f"explanation{suffix}" for suffix in suffixes]
    return free_names(options.out, "explanation", suffixes)


def check_asked(model: Any, asked: Asked, name: str) -> None:
    """Raise ValueError unless the model does what is asked for."""
    does = {"vqa": "question", "caption": "caption"}.get(getattr(model, "task", ""), "text")
    if does != asked:
        raise ValueError(f"the model {name!r} is made for --{does}, not for --{asked}")


def _print(options: argparse.Namespace, explanations: Sequence[Any]) -> None:
    first = explanations[0]
    told: set[tuple[str, str]] = set()
    for i, target in enumerate(first.target):
        file = _file(options, first, i)
        print(shared.printable(f"{file}, {target}: score {first.score[i]:.2f}"))
        # What holds for an image is said once, and not of each word of its caption.
        notes = first.report["examples"][i].get("notes", ())
        for note in notes:
            if (file, note) not in told:
                told.add((file, note))
                print(f"  note: {note}")
        for one in explanations:
            if one.flags and one.flags[i] is not None:
                print(f"  {one.method}: {one.flags[i]}")


def _file(options: argparse.Namespace, explanation: Any, row: int) -> str:
    """The image file that a row of an explanation is about."""
    images = options.image
    if "example" in explanation.report:
        return images[explanation.report["example"][row]]
    return images[row] if len(images) > 1 else images[0]


def _json(value: Any, indent: str = "") -> str:
    """JSON in lines; a list of numbers or strings, such as a row of a matrix, is one of them."""
    inner = f"{indent}  "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(name)}: {_json(one, inner)}" for name, one in value.items()]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        lines = [_json(one, inner) for one in value]
        return "[\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}]"
    return json.dumps(value)


def _shortest(values: Any) -> Any:
    """A list of numbers, or one, as the shortest decimals that float32 reads as the same."""
    import numpy as np

    return np.asarray(values, np.float32).astype(str).astype(float).tolist()


def _as_json(options: argparse.Namespace, explanations: Sequence, files: list[Path]) -> dict:
    return {
        "model": options.model,
        "files": [str(file) for file in files],
        "explanations": [
            {
                "method": one.method,
                "settings": one.settings,
                "examples": [_example(options, one, i) for i in range(len(one))],
            }
            for one in explanations
        ],
    }


def _example(options: argparse.Namespace, explanation: Any, row: int) -> dict[str, Any]:
    file = _file(options, explanation, row)
    found = {
        "file": file,
        "picture": file,  # the old name, for one version
        "target": explanation.target[row],
        "score": _shortest(explanation.score[row]),
        "image": _shortest(explanation.image[row]),
        "words": [[word, _shortest(value)] for word, value in explanation.words(row)],
    }
    told = explanation.report["examples"][row]
    found |= {name.replace(" ", "_"): told[name] for name in TOLD if name in told}
    # Nothing is said of words where none is judged.
    if explanation.flags:
        flag = explanation.flags[row]
        fields = {} if flag is None else dataclasses.asdict(flag)
        found["flag"] = flag and fields | {"flagged": flag.flagged}
        found["verdict"] = flag and fields | {"doubted": flag.flagged}  # the old names
    return found
