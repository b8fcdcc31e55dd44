"""`jaxrel train RECIPE`: train a model."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxrel.cli import options as shared

EXAMPLES = """examples:
  jaxrel train clip-shapes --out model
  jaxrel train gridtd-shapes --out model --steps 2000
  jaxrel train vqa-v2 --data path/to/vqa --out model
"""


def add(commands: Any) -> None:
    """Add the command, with a command of its own per recipe and an option per setting."""
    from jaxrel.train.recipes.registry import MEANINGS, RECIPES

    train = commands.add_parser(
        "train",
        help="train a model with a recipe",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipes = train.add_subparsers(
        title="recipes",
        description="each lists its settings: jaxrel train RECIPE --help",
        required=True,
        metavar="recipe",
        parser_class=_LateParser,
    )
    for name in RECIPES:
        recipe = recipes.add_parser(
            name,
            help=MEANINGS[name],
            description=MEANINGS[name],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        recipe.add_argument("--out", required=True, type=shared.folder, help="the model's folder")
        recipe.set_defaults(run=run, recipe=name)
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
    for field in dataclasses.fields(shared.recipe(name).settings):
        flag = f"--{field.name.replace('_', '-')}"
        kind, meaning = type(field.default), field.metadata["help"]
        parser.add_argument(flag, type=kind, default=field.default, help=meaning)


def run(options: argparse.Namespace) -> None:
    """Train."""
    recipe = shared.recipe(options.recipe)
    names = [field.name for field in dataclasses.fields(recipe.settings)]
    recipe.train(recipe.settings(**{name: getattr(options, name) for name in names}), options.out)
    print(f"wrote {options.out}")
