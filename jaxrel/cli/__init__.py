"""The command line: `jaxrel explain | train | evaluate | doctor`.

What is wrong with the user's input is said in one line on standard error, with exit status 2;
`--debug` shows where it happened instead.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxrel.explanations.explain import METHODS, TWO_STREAM
from jaxrel.explanations.words import WORD_METHODS

# What is asked of an image, and the bundled model that does it when none is named.
DEFAULT_MODELS = {"text": "clip-shapes", "question": "vqa-shapes", "caption": "caption-shapes"}
# What is optional, and the extra that brings it.
EXTRAS = {
    "grain": "train",
    "optax": "train",
    "orbax-checkpoint": "train",
    "matplotlib": "report",
    "torch": "torch",
}
CORE = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: the command line; `sys.argv[1:]` by default.

    Returns:
      The exit status: 0, or 2 for input that cannot be used.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    with warnings.catch_warnings():
        # One line per warning, and only those meant for users.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"jaxrel\b")
        warnings.showwarning = _show_warning
        try:
            options = _parser().parse_args(given)
            options.command = shlex.join(["jaxrel", *given])
            options.run(options)
        except (ValueError, OSError, ArithmeticError) as error:
            if debug:
                raise
            print(f"jaxrel: error: {error}", file=sys.stderr)
            return 2
    return 0


def _show_warning(message: Any, *_args: Any, **_kwargs: Any) -> None:
    print(f"jaxrel: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxrel", description="Relevance explanations for JAX.")
    version = f"jaxrel {importlib.metadata.version('jaxrel')}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("--debug", action="store_true", help="show where an error happened")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_explain(commands)
    _add_train(commands)
    _add_evaluate(commands)
    doctor = commands.add_parser("doctor", help="print versions, devices and what is missing")
    doctor.set_defaults(run=_doctor)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
    return parser


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="show which parts of an image and which words made the score",
        description="Write OUT/explanation.png and OUT/explanation.html: which parts of an image "
        "and which words of a sentence made the model's score of the two, its answer to a "
        "question, or each word of its caption.",
    )
    explain.add_argument("image", nargs="+", help="PNG, JPEG or another image file")
    asked = explain.add_mutually_exclusive_group(required=True)
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
    explain.add_argument("--answer", help="with --question: explain this answer, not the model's")
    explain.add_argument(
        "--model",
        help="a bundled model, a folder or a hub name (default: "
        + ", ".join(f"{name} for --{what}" for what, name in DEFAULT_MODELS.items())
        + ")",
    )
    explain.add_argument(
        "--method",
        help=f"one or several, with commas, or 'all': {', '.join(METHODS)} (with --text); "
        f"{', '.join(TWO_STREAM)} (of a CLIPmapper); {', '.join(WORD_METHODS)} (of a Captioner) "
        "(default: weighted; of a Captioner lrp)",
    )
    explain.add_argument(
        "--layers", type=_numbers, help="layers that count, such as 0,1 or --layers=-2,-1"
    )
    explain.add_argument("--heads", type=_numbers, help="attention heads that count, such as 0,3")
    explain.add_argument(
        "--importance", default="grad_value", help="measure of the weighted method"
    )
    explain.add_argument("--out", default="out", type=Path, help="folder (default: out)")
    explain.add_argument("--json", action="store_true", help="print the result as JSON")
    explain.set_defaults(run=_explain)


def _add_train(commands: Any) -> None:
    from jaxrel.train.recipes.registry import RECIPES

    train = commands.add_parser("train", help="train a model with a recipe")
    recipes = train.add_subparsers(required=True, metavar="recipe", parser_class=_LateParser)
    for name in RECIPES:
        recipe = recipes.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        recipe.add_argument("--out", required=True, type=Path, help="the model's folder")
        recipe.set_defaults(run=_train, recipe=name)
        recipe.add_late = functools.partial(_add_settings, recipe, name)


class _LateParser(argparse.ArgumentParser):
    """A parser that gets options only when it is used: to know a recipe's, its module is imported.

    Attributes:
      add_late: adds those options.
    """

    add_late: Callable[[], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the options, and parse."""
        if self.add_late is not None:
            self.add_late()
        return super().parse_known_args(args, namespace)


def _add_settings(parser: argparse.ArgumentParser, name: str) -> None:
    for field in dataclasses.fields(_recipe(name).settings):
        flag = f"--{field.name.replace('_', '-')}"
        kind, meaning = type(field.default), field.metadata["help"]
        parser.add_argument(flag, type=kind, default=field.default, help=meaning)


def _add_evaluate(commands: Any) -> None:
    from jaxrel.train.recipes.registry import RECIPES, is_real

    evaluate = commands.add_parser("evaluate", help="judge a model or methods on held-out data")
    judged = evaluate.add_subparsers(required=True, metavar="what")
    for name in RECIPES:
        recipe = judged.add_parser(name, help=f"a model made by `jaxrel train {name}`")
        real = is_real(name)
        recipe.add_argument("--model", default=None if real else name, required=real)
        if real:
            recipe.add_argument("--data", required=True, help="folder of the data set")
        recipe.add_argument("--split", help="split of the data set, other than the usual one")
        recipe.add_argument("--scenes", type=int, default=2048, help="how many (default: 2048)")
        if not real:
            recipe.add_argument(
                "--card", action="store_true", help="write the model's README.md too"
            )
        recipe.set_defaults(run=_evaluate, recipe=name, data=None, card=False)
    tests = {
        "perturbation": (_perturbation, 2048, "remove tokens by their relevance, watch the model"),
        "weighting": (_weighting, 512, "take the weights of weighted accumulation apart"),
        "sanity": (_sanity, 128, "randomise parameters, watch the relevance"),
    }
    for name, (run, examples, meaning) in tests.items():
        test = judged.add_parser(name, help=f"judge methods: {meaning}")
        test.add_argument("--model", default="vqa-shapes", help="a CLIPmapper: name or folder")
        split = "val" if name == "weighting" else "test"
        test.add_argument("--split", default=split, help=f"split of Shapes (default: {split})")
        test.add_argument(
            "--examples", type=int, default=examples, help=f"how many (default: {examples})"
        )
        if name != "weighting":
            test.add_argument(
                "--method",
                default="all",
                help="one or several, with commas (weighted:norm for a measure; default: all)",
            )
        else:
            test.add_argument(
                "--variant",
                default="all",
                help="one or several, with commas, those of a name written ':' (default: all)",
            )
        test.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
        test.add_argument("--out", default="out", type=Path, help="folder (default: out)")
        test.set_defaults(run=run)
        if name != "sanity":
            test.add_argument("--batch", type=int, default=32, help="at a time (default: 32)")
            test.add_argument(
                "--modality",
                default="image,text",
                help="whose tokens are removed (default: image,text)",
            )
        if name == "perturbation":
            test.add_argument(
                "--regenerated",
                type=int,
                default=512,
                help="number of captions that are regenerated; 0 for none (default: 512)",
            )

    captioner = judged.add_parser(
        "captioner",
        help="judge explanations of captions: remove, locate, and tell what is not there",
    )
    captioner.add_argument("--model", required=True, help="a Captioner: name or folder")
    captioner.add_argument("--data", help="folder of COCO or Flickr30k (default: Shapes)")
    captioner.add_argument("--split", help="split of the data set, other than the usual one")
    captioner.add_argument("--scenes", type=int, default=512, help="how many (default: 512)")
    captioner.add_argument(
        "--method", default="all", help="one or several, with commas (default: all)"
    )
    captioner.add_argument("--batch", type=int, default=16, help="at a time (default: 16)")
    captioner.add_argument("--beams", type=int, default=1, help="1 is greedy (default: 1)")
    captioner.add_argument("--seed", type=int, default=0, help="of 'random' (default: 0)")
    captioner.add_argument(
        "--detector",
        action="store_true",
        help="keep what tells hallucinated words in the model's folder, where `jaxrel explain "
        "--caption` finds it and flags words by it",
    )
    captioner.add_argument("--out", default="out", type=Path, help="folder (default: out)")
    captioner.set_defaults(run=_captioner)

    finetuning = judged.add_parser(
        "finetuning", help="compare fine-tuned captioners of Shapes, by mode, with the control"
    )
    finetuning.add_argument(
        "--models",
        required=True,
        type=Path,
        help="folder with the models of `jaxrel train finetune-shapes`, a folder each",
    )
    finetuning.add_argument(
        "--split",
        default="biased_test,test",
        help="splits of Shapes, with commas (default: biased_test,test)",
    )
    finetuning.add_argument(
        "--scenes", type=int, default=2048, help="how many of each split (default: 2048)"
    )
    finetuning.add_argument("--out", default="out", type=Path, help="folder (default: out)")
    finetuning.set_defaults(run=_finetuning)
    for name, test in judged.choices.items():
        test.add_argument(
            "--record",
            nargs="?",
            const="",
            metavar="FOLDER",
            help="keep the result in a folder, as JSON and Markdown (default: train/results)",
        )
        test.set_defaults(judged=name)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas, such as 0,1 or -1, got {text!r}"
        ) from None


def _explain(options: argparse.Namespace) -> None:
    from jaxrel import explain, report
    from jaxrel.attention.transformation import check_methods
    from jaxrel.images import read_images
    from jaxrel.metrics import Detector
    from jaxrel.models import Captioner
    from jaxrel.models.checkpoint import find_folder

    asked = "question" if options.question else "caption" if options.caption else "text"
    known = METHODS if asked == "text" else TWO_STREAM
    if asked == "caption":
        known = tuple(dict.fromkeys((*TWO_STREAM, *WORD_METHODS)))
    named = None if options.method in (None, "all") else _names(options.method)
    if named is not None:
        check_methods(named, known, "method")
    if options.answer is not None and asked != "question":
        raise ValueError("--answer goes with --question")
    images = read_images(options.image)
    texts = options.text or options.question
    if texts and len(texts) > 1 and len(images) > 1 and len(texts) != len(images):
        raise ValueError(
            f"{len(images)} images and {len(texts)} {asked}s: give one --{asked} for all "
            "images, or one for each"
        )
    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out {options.out} is a file; name a folder")
    options.model = options.model or DEFAULT_MODELS[asked]
    model = _load(options.model)
    _check_asked(model, asked, options.model)
    if isinstance(model, Captioner):
        known = WORD_METHODS
    elif asked == "caption":
        known = TWO_STREAM
    usual = known if options.method == "all" else ("lrp" if known is WORD_METHODS else "weighted",)
    methods = check_methods(usual if named is None else named, known, "method")
    detector = None
    if isinstance(model, Captioner):
        detector = Detector.load(find_folder(options.model), model)
    explanations = explain(
        model,
        image=images,
        text=texts,
        target=options.answer,
        method=methods,
        layers=options.layers,
        heads=options.heads,
        importance=options.importance,
        name=str(options.model),
        detector=detector,
    )
    files = [options.out / f"explanation{suffix}" for suffix in (".png", ".html")]
    for file in files:
        report.save(explanations, file)
    if options.json:
        print(json.dumps(_as_json(options, explanations, files), indent=2))
        return
    for i, target in enumerate(explanations[0].target):
        name = _name(options, explanations[0], i)
        print(f"{name}, {target}: score {explanations[0].score[i]:.2f}")
        for one in explanations:
            if one.flags and one.flags[i] is not None:
                print(f"  {one.method}: {one.flags[i]}")
    print("wrote " + " and ".join(map(str, files)))


def _name(options: argparse.Namespace, explanation: Any, row: int) -> str:
    """The image that a row of an explanation is about."""
    images = options.image
    if "example" in explanation.report:
        return images[explanation.report["example"][row]]
    return images[row] if len(images) > 1 else images[0]


def _load(name: str) -> Any:
    from jaxrel.models import from_pretrained

    return from_pretrained(name)


def _check_asked(model: Any, asked: str, name: str) -> None:
    """Raise ValueError unless the model does what is asked for."""
    does = {"vqa": "question", "caption": "caption"}.get(getattr(model, "task", ""), "text")
    if does != asked:
        raise ValueError(f"the model {name!r} is made for --{does}, not for --{asked}")


def _as_json(options: argparse.Namespace, explanations: Sequence, files: list[Path]) -> dict:
    return {
        "model": options.model,
        "files": [str(file) for file in files],
        "explanations": [
            {
                "method": one.method,
                "settings": one.settings,
                "examples": [
                    {
                        "file": _name(options, one, i),
                        "picture": _name(options, one, i),  # the old name, for one version
                        "target": one.target[i],
                        "score": float(one.score[i]),
                        "image": one.image[i].tolist(),
                        "words": one.words(i),
                    }
                    | _flag_as_json(one, i)
                    for i in range(len(one))
                ],
            }
            for one in explanations
        ],
    }


def _flag_as_json(explanation: Any, row: int) -> dict[str, Any]:
    """What an explanation says of its word; nothing where it judges no words."""
    if not explanation.flags:
        return {}
    flag = explanation.flags[row]
    judged = flag and dataclasses.asdict(flag) | {"flagged": flag.flagged}
    return {"flag": judged}


def _recipe(name: str) -> Any:
    missing = [name for name in ("grain", "optax", "orbax") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"recipes need {', '.join(missing)}: pip install 'jaxrel[train]'")
    from jaxrel.train.recipes.registry import find_recipe

    return find_recipe(name)


def _train(options: argparse.Namespace) -> None:
    recipe = _recipe(options.recipe)
    names = [field.name for field in dataclasses.fields(recipe.settings)]
    recipe.train(recipe.settings(**{name: getattr(options, name) for name in names}), options.out)
    print(f"wrote {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    recipe = _recipe(options.recipe)
    from jaxrel.models.checkpoint import find_folder

    folder = find_folder(options.model)
    if options.card and not (folder / "settings.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no settings.json, which a model card quotes; it is written by "
            f"jaxrel train {options.recipe}"
        )
    chosen = {name: getattr(options, name) for name in ("data", "split", "scenes")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    model = _load(options.model)
    if not isinstance(model, recipe.model):
        raise ValueError(
            f"{options.model!r} is a {type(model).__name__}, and {options.recipe} judges a "
            f"{recipe.model.__name__}"
        )
    result = recipe.evaluate(model, **chosen)
    print(json.dumps({"model": options.model, **result}, indent=2))
    if options.card:
        (folder / "README.md").write_text(recipe.card(folder, result), encoding="utf-8")
    from jaxrel.train.evaluate.tables import all_tables

    _record(options, result["protocol"], (recipe.tables or all_tables)(result), result)


def _record(options: argparse.Namespace, protocol: str, tables: Sequence, result: Any) -> None:
    """Keep a result if `--record` asks for it."""
    if options.record is None:
        return
    from jaxrel.train.evaluate import record

    name = "-".join(dict.fromkeys((options.judged, Path(getattr(options, "model", "")).name)))
    files = record.record(
        name.rstrip("-"),
        protocol,
        tables,
        command=options.command,
        result=result,
        folder=Path(options.record) if options.record else record.FOLDER,
    )
    print("recorded " + ", ".join(map(str, files)))


def _mapper(options: argparse.Namespace) -> Any:
    """The CLIPmapper to test; ValueError for another model or an unusable --out."""
    from jaxrel.models import CLIPMapper

    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out {options.out} is a file; name a folder")
    model = _load(options.model)
    if not isinstance(model, CLIPMapper):
        raise ValueError(
            f"{options.model!r} is a {type(model).__name__}; this test is made for CLIPmapper"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    return model


def _names(text: str, every: Sequence[str] = ()) -> tuple[str, ...]:
    """Names between commas; 'all' are `every`. A measure's comma is written ':'."""
    if text == "all" and every:
        return tuple(every)
    return tuple(name.strip().replace(":", ", ") for name in text.split(",") if name.strip())


def _perturbation(options: argparse.Namespace) -> None:
    _require_report()
    from jaxrel.train.evaluate import perturbation, tables

    result = perturbation.evaluate(
        _mapper(options),
        modality=_names(options.modality),
        methods=_names(options.method, perturbation.METHODS),
        split=options.split,
        examples=options.examples,
        regenerated=options.regenerated,
        batch=options.batch,
        seed=options.seed,
    )
    result = {name: {"model": options.model, **summary} for name, summary in result.items()}
    files = perturbation.save(result, options.out)
    found = [table for summary in result.values() for table in perturbation.tables(summary)]
    print(tables.markdown(found))
    print("wrote " + ", ".join(map(str, files)))
    _record(options, perturbation.PROTOCOL, found, result)


def _weighting(options: argparse.Namespace) -> None:
    from jaxrel.train.evaluate import tables, weighting

    result = weighting.evaluate(
        _mapper(options),
        modality=_names(options.modality),
        variants=_names(options.variant, tuple(weighting.VARIANTS)),
        split=options.split,
        examples=options.examples,
        batch=options.batch,
        seed=options.seed,
    )
    result = {name: {"model": options.model, **found} for name, found in result.items()}
    files = weighting.save(result, options.out)
    found = [table for one in result.values() for table in weighting.tables(one)]
    print(tables.markdown(found))
    print("wrote " + ", ".join(map(str, files)))
    _record(options, weighting.PROTOCOL, found, result)


def _sanity(options: argparse.Namespace) -> None:
    from jaxrel.train.evaluate import sanity, tables

    result = sanity.evaluate(
        _mapper(options),
        methods=_names(options.method, sanity.METHODS),
        split=options.split,
        examples=options.examples,
        seed=options.seed,
    )
    result = {"model": options.model, **result}
    files = sanity.save(result, options.out)
    found = sanity.tables(result)
    print(tables.markdown(found))
    print("wrote " + ", ".join(map(str, files)))
    _record(options, sanity.PROTOCOL, found, result)


def _captioner(options: argparse.Namespace) -> None:
    _require_report()
    from jaxrel.models.captioner import Captioner
    from jaxrel.models.checkpoint import find_folder
    from jaxrel.train.evaluate import caption_explanation_tables, caption_explanations
    from jaxrel.train.evaluate.detector import detector

    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out {options.out} is a file; name a folder")
    model = _load(options.model)
    if not isinstance(model, Captioner):
        raise ValueError(
            f"{options.model!r} is a {type(model).__name__}; this test is made for Captioner"
        )
    methods = _names(options.method, caption_explanations.METHODS)
    if options.detector and not {*methods} & {*WORD_METHODS}:
        raise ValueError(
            f"--detector needs an explanation to tell words by, and --method is {options.method}; "
            f"there are {', '.join(WORD_METHODS)}"
        )
    result = caption_explanations.evaluate(
        model,
        data=options.data,
        split=options.split,
        methods=methods,
        scenes=options.scenes,
        batch=options.batch,
        beams=options.beams,
        seed=options.seed,
    )
    result = {"model": options.model, **result}
    files = caption_explanation_tables.save(result, options.out)
    print(caption_explanation_tables.markdown(result))
    print("wrote " + ", ".join(map(str, files)))
    found = caption_explanation_tables.tables(result)
    _record(options, caption_explanations.PROTOCOL, found, result)
    if options.detector:
        print(f"wrote {detector(result).save(find_folder(options.model))}")


def _finetuning(options: argparse.Namespace) -> None:
    _require_report()
    from jaxrel.train.evaluate import finetuning

    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out {options.out} is a file; name a folder")
    result = finetuning.evaluate(
        options.models, splits=_names(options.split), scenes=options.scenes
    )
    files = finetuning.save(result, options.out)
    print(finetuning.markdown(result))
    print("wrote " + ", ".join(map(str, files)))
    _record(options, finetuning.PROTOCOL, finetuning.tables(result), result)


def _require_report() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the curves need matplotlib: pip install 'jaxrel[report]'")


def _doctor(options: argparse.Namespace) -> None:
    import jax

    from jaxrel.models.checkpoint import bundled

    print(f"jaxrel {importlib.metadata.version('jaxrel')}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in (*CORE, *EXTRAS):
        print(f"{package} {_version(package)}")
    devices = ", ".join(f"{device.device_kind} ({device.platform})" for device in jax.devices())
    print(f"devices: {devices}")
    print(f"bundled models: {', '.join(bundled()) or 'none'}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        extra = EXTRAS.get(package)
        how = f"jaxrel[{extra}]" if extra else package
        return f"is missing: pip install '{how}'"


if __name__ == "__main__":
    sys.exit(main())
