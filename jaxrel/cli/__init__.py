"""The command line: `jaxrel explain | batch | report | train | evaluate | doctor`.

What is wrong with the user's input is said in one line on standard error, with exit status 2;
`--debug` shows where it happened instead.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: the command line; `sys.argv[1:]` by default.

    Returns:
      The exit status: 0, 2 for input that cannot be used, or 130 for an interrupt (Ctrl-C).
    """
    try:
        # Nothing is imported before an interrupt is caught.
        from jaxrel.cli.process import run

        return run(sys.argv[1:] if arguments is None else arguments, whole=arguments is None)
    except KeyboardInterrupt:
        print("jaxrel: interrupted", file=sys.stderr)
        return 130
