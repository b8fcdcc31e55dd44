"""`jaxrel train RECIPE`: train a model."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jaxrel.cli import options as shared


def add(commands: Any) -> None:
    """Add the command, with a command of its own per recipe and an option per setting."""
    from jaxrel.train.recipes.settings import SETTINGS

    train = commands.add_parser("train", help="train a model with a recipe")
    recipes = train.add_subparsers(required=True, metavar="recipe")
    for name, settings in SETTINGS.items():
        recipe = recipes.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        recipe.add_argument("--out", required=True, type=Path, help="the model's folder")
        for field in dataclasses.fields(settings):
            flag = f"--{field.name.replace('_', '-')}"
            kind, meaning = type(field.default), field.metadata["help"]
            recipe.add_argument(flag, type=kind, default=field.default, help=meaning)
        recipe.set_defaults(run=run, recipe=name)


def run(options: argparse.Namespace) -> None:
    """Train."""
    from jaxrel.train.recipes.settings import SETTINGS

    kind = SETTINGS[options.recipe]
    settings = kind(**{f.name: getattr(options, f.name) for f in dataclasses.fields(kind)})
    shared.recipe(options.recipe).train(settings, options.out)
    print(f"wrote {options.out}")
