"""The command line: `jaxrel explain | batch | report | train | evaluate | doctor`.

What is wrong with the user's input is said in one line on standard error, with exit status 2;
`--debug` shows where it happened instead.
"""

import argparse
import importlib.metadata
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jaxrel.cli import batch, doctor, evaluate, explain, report, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: the command line; `sys.argv[1:]` by default.

    Returns:
      The exit status: 0, or 2 for input that cannot be used.
    """
    given = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        # One line per warning, and only those meant for users.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"jaxrel\b")
        warnings.showwarning = _show_warning
        try:
            options = _parser().parse_args(given)
            options.command = shlex.join(["jaxrel", *given])
            options.run(options)
        except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as error:
            if "--debug" in given:
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
    for command in (explain, batch, report, train, evaluate, doctor):
        command.add(commands)
    for added in commands.choices.values():
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
    return parser
