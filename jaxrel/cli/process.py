"""What every command is run in: its streams, its warnings, its errors, and Ctrl-C."""

import _thread
import argparse
import contextlib
import gc
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxrel.cli import batch, doctor, evaluate, explain, report, train
from jaxrel.cli.options import printable
from jaxrel.cli.streams import Output

EXAMPLES = """examples:
  jaxrel explain scene.png --text "a red circle"
  jaxrel explain scene.png --question "what colour is the heart?"
  jaxrel explain scene.png --caption --method weighted,equal
  jaxrel batch photos/ --text "a dog" --out results
  jaxrel train clip-shapes --out model
  jaxrel evaluate captioner --model gridtd-shapes
"""


def run(given: Sequence[str], *, whole: bool) -> int:
    """Run a command line.

    Args:
      given: the arguments.
      whole: whether the process is for this command alone, and ends after it.

    Returns:
      The exit status.

    Raises:
      KeyboardInterrupt: Ctrl-C, whatever the code that it hit has made of it.
    """
    if whole:
        # Imports and traces make many objects that stay: looking through them takes a tenth of
        # the time until the first map.
        gc.set_threshold(100_000, 50, 100)
    output, errors = Output(sys.stdout), Output(sys.stderr)
    with (
        _interrupts(whole) as interrupted,
        _one_line_warnings(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            _run(given)
        except Exception as error:
            # Such as an error of the compiler's, of a callback that was interrupted.
            if interrupted:
                raise KeyboardInterrupt from None
            said = _said(error)
            if "--debug" in given or not said:
                raise
            print(f"jaxrel: error: {said}", file=sys.stderr)
            return 2
        finally:
            output.flush()
            errors.flush()
        if output.failure is not None:
            print(
                f"jaxrel: error: the standard output is not whole ({output.failure.strerror}): "
                "make room, or send it elsewhere",
                file=sys.stderr,
                flush=True,
            )
            return 2
    return 0


def _run(given: Sequence[str]) -> None:
    options = _parser().parse_args(given)
    options.command = shlex.join(["jaxrel", *given])
    if options.cache:
        keep_programs()
    options.run(options)


def _said(error: Exception) -> str:
    """An error of the user's input in one line; "" for one of another kind."""
    line = printable(" ".join(part.strip() for part in str(error).splitlines()))
    if isinstance(error, ValueError | OSError | ArithmeticError | ImportError):
        return line
    return _no_device()


def _no_device() -> str:
    """What is wrong where JAX has no device; "" where it has one."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for an accelerator without plugin
        reason = str(error).split(" (set JAX_PLATFORMS")[0].split("': ", 1)[-1].rstrip(".")
    else:
        return ""
    names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
    asked = " and ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
    return (
        f"JAX has no device for {asked or 'its default platforms'}"
        + (f" ({reason})" if reason else "")
        + ": unset it or set JAX_PLATFORMS=cpu, or install JAX for that device, such as "
        "'jax[cuda13]' or 'jax[tpu]'"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrel",
        description="Relevance explanations for JAX.",
        epilog=EXAMPLES + "\njaxrel COMMAND --help lists what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument("--debug", action="store_true", help="show where an error happened")
    parser.set_defaults(cache=True)
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for command in (explain, batch, report, train, evaluate, doctor):
        command.add(commands)
    for added in commands.choices.values():
        added.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show where an error happened",
        )
        added.add_argument(
            "--no-cache",
            dest="cache",
            action="store_false",
            default=argparse.SUPPRESS,
            help="compile everything anew, and keep nothing of it",
        )
    return parser


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"jaxrel {importlib.metadata.version('jaxrel')}")
        parser.exit()


def keep_programs() -> None:
    """Let JAX keep compiled programs in the user's cache folder, unless the user says otherwise.

    JAX reads these variables when it is imported.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = base if base.is_absolute() else Path.home() / ".cache"
        folder = base / "jaxrel" / "programs" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # no such place, or no home
        usable = False
    if not usable:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # Many small programs take as long as a large one.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _machine() -> str:
    """A name of this kind of processor: a program of another may use instructions it lacks."""
    import platform
    import zlib

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        able = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, ValueError, StopIteration):
        able = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(able.encode()):08x}"


@contextlib.contextmanager
def _interrupts(whole: bool) -> Iterator[list[int]]:
    """Catch Ctrl-C wherever it hits; yields a list that is not empty once it did."""
    found: list[int] = []
    # In another thread, or where the shell has it ignored, nothing is to be caught.
    try:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual:
            signal.signal(signal.SIGINT, lambda _, frame: _interrupt(found, whole and frame))
    except ValueError:
        usual = False
    hook = sys.unraisablehook
    sys.unraisablehook = lambda seen: _unraisable(seen, hook)
    try:
        yield found
    finally:
        sys.unraisablehook = hook
        if usual:
            # What is left of the process has nothing to lose and nothing to say.
            after = signal.SIG_IGN if whole else signal.default_int_handler
            signal.signal(signal.SIGINT, after)


def _interrupt(found: list[int], frame: Any) -> None:
    found.append(signal.SIGINT)
    while frame:
        if "importlib" in frame.f_code.co_filename:
            # An exception inside the import of a C++ module can abort the process, with its own
            # message. Nothing has been begun that would have to be undone.
            print("jaxrel: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _unraisable(seen: Any, hook: Any) -> None:
    """An interrupt inside a finaliser or another callback is lost there: repeat it outside."""
    if isinstance(seen.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        hook(seen)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """One line per warning, and only those meant for users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"jaxrel\b")
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Any, *_args: Any, **_kwargs: Any) -> None:
    print(f"jaxrel: warning: {printable(str(message))}", file=sys.stderr)
