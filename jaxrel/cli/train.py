"""`jaxrel train RECIPE`: train a model."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jaxrel.cli import options as shared


class _RecipeParser(argparse.ArgumentParser):
    """A recipe's command; its module, which has the settings, is imported when it is used."""

    recipe = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add an option per setting, and parse."""
        for field in dataclasses.fields(shared.recipe(self.recipe).settings):
            flag = f"--{field.name.replace('_', '-')}"
            kind, meaning = type(field.default), field.metadata["help"]
            self.add_argument(flag, type=kind, default=field.default, help=meaning)
        return super().parse_known_args(args, namespace)


def add(commands: Any) -> None:
    """Add the command, with a command of its own per recipe and an option per setting."""
    from jaxrel.train.recipes.registry import RECIPES

    train = commands.add_parser("train", help="train a model with a recipe")
    recipes = train.add_subparsers(required=True, metavar="recipe", parser_class=_RecipeParser)
    for name in RECIPES:
        parser = recipes.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        parser.recipe = name
        parser.add_argument("--out", required=True, type=Path, help="the model's folder")
        parser.set_defaults(run=run, recipe=name)


def run(options: argparse.Namespace) -> None:
    """Train."""
    recipe = shared.recipe(options.recipe)
    names = [field.name for field in dataclasses.fields(recipe.settings)]
    recipe.train(recipe.settings(**{name: getattr(options, name) for name in names}), options.out)
    print(f"wrote {options.out}")
