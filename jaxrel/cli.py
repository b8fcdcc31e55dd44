"""The command line: `jaxrel explain | train | evaluate | doctor`.

What is wrong with the user's input is said in one line on standard error, with exit status 2;
`--debug` shows where it happened instead.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrel.explainer import METHODS

DEFAULT_MODEL = "clip-shapes"
# What is optional, and the extra that brings it.
EXTRAS = {
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
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        # One line per warning, and only those meant for users.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"jaxrel\b")
        warnings.showwarning = _show_warning
        try:
            options.run(options)
        except (ValueError, OSError, ArithmeticError) as error:
            if options.debug:
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
        help="show which parts of a picture and which words made the score",
        description="Write OUT/explanation.png and OUT/explanation.html: which parts of a picture "
        "and which words of a sentence made the model's score of the two.",
    )
    explain.add_argument("picture", nargs="+", help="PNG, JPEG or another picture file")
    explain.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="SENTENCE",
        help="one for all pictures, or one per picture (repeat --text)",
    )
    explain.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"a bundled model, a folder or a hub name (default: {DEFAULT_MODEL})",
    )
    explain.add_argument(
        "--method",
        default="weighted",
        help=f"one or several, with commas, or 'all': {', '.join(METHODS)} (default: weighted)",
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
    from jaxrel.train.settings import SETTINGS

    train = commands.add_parser("train", help="train a model with a recipe")
    recipes = train.add_subparsers(required=True, metavar="recipe")
    for name, settings in SETTINGS.items():
        recipe = recipes.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        recipe.add_argument("--out", required=True, type=Path, help="the model's folder")
        for field in dataclasses.fields(settings):
            flag = f"--{field.name.replace('_', '-')}"
            kind, meaning = type(field.default), field.metadata["help"]
            recipe.add_argument(flag, type=kind, default=field.default, help=meaning)
        recipe.set_defaults(run=_train, recipe=name)


def _add_evaluate(commands: Any) -> None:
    from jaxrel.train.settings import SETTINGS

    evaluate = commands.add_parser("evaluate", help="judge a model on held-out data")
    evaluate.add_argument("recipe", choices=SETTINGS, help="what the model was trained with")
    evaluate.add_argument("--model", default=DEFAULT_MODEL, help="bundled name or folder")
    evaluate.add_argument("--split", default="test", help="split of the data set")
    evaluate.add_argument("--scenes", type=int, default=2048, help="how many examples")
    evaluate.add_argument("--card", action="store_true", help="write the model's README.md too")
    evaluate.set_defaults(run=_evaluate)


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
    from jaxrel.pictures import read_pictures

    named = METHODS if options.method == "all" else options.method.split(",")
    methods = check_methods([name.strip() for name in named if name.strip()], METHODS, "method")
    pictures = read_pictures(options.picture)
    texts = options.text
    if len(texts) > 1 and len(pictures) > 1 and len(texts) != len(pictures):
        raise ValueError(
            f"{len(pictures)} pictures and {len(texts)} texts: give one --text for all pictures, "
            "or one for each"
        )
    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out {options.out} is a file; name a folder")
    explanations = explain(
        _load(options.model),
        image=pictures,
        text=texts,
        method=methods,
        layers=options.layers,
        heads=options.heads,
        importance=options.importance,
        name=str(options.model),
    )
    files = [options.out / f"explanation{suffix}" for suffix in (".png", ".html")]
    for file in files:
        report.save(explanations, file)
    if options.json:
        print(json.dumps(_as_json(options, explanations, files), indent=2))
        return
    for i, target in enumerate(explanations[0].target):
        print(f"{_name(options, i)}, {target}: score {explanations[0].score[i]:.2f}")
    print("wrote " + " and ".join(map(str, files)))


def _name(options: argparse.Namespace, example: int) -> str:
    pictures = options.picture
    return pictures[example] if len(pictures) > 1 else pictures[0]


def _load(name: str) -> Any:
    from jaxrel.models import CLIP

    return CLIP.from_pretrained(name)


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
                        "picture": _name(options, i),
                        "target": one.target[i],
                        "score": float(one.score[i]),
                        "image": one.image[i].tolist(),
                        "words": one.words(i),
                    }
                    for i in range(len(one))
                ],
            }
            for one in explanations
        ],
    }


def _recipe(name: str) -> Any:
    if importlib.util.find_spec("optax") is None:
        raise ValueError("recipes need optax: pip install 'jaxrel[train]'")
    from jaxrel.train.recipes import RECIPES

    return RECIPES[name]


def _train(options: argparse.Namespace) -> None:
    from jaxrel.train.settings import SETTINGS

    kind = SETTINGS[options.recipe]
    settings = kind(**{f.name: getattr(options, f.name) for f in dataclasses.fields(kind)})
    _recipe(options.recipe).train(settings, options.out)
    print(f"wrote {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    recipe = _recipe(options.recipe)
    from jaxrel.models.weights import find_folder

    folder = find_folder(options.model)
    if options.card and not (folder / "settings.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no settings.json, which a model card quotes; it is written by "
            f"jaxrel train {options.recipe}"
        )
    result = recipe.evaluate(_load(options.model), split=options.split, scenes=options.scenes)
    if options.card:
        (folder / "README.md").write_text(recipe.card(folder, result), encoding="utf-8")
    print(json.dumps({"model": options.model, **result}, indent=2))


def _doctor(options: argparse.Namespace) -> None:
    import jax

    from jaxrel.models.weights import bundled

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
