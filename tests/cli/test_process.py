"""What every command is run in: help, streams, interrupts, errors, and compiled programs."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxrel import cli
from jaxrel.cli import doctor, explain, options, process
from jaxrel.cli.streams import Output
from jaxrel.explanations import methods
from jaxrel.train.recipes import registry

# ---- help


def python(code, **settings):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, **settings)


def test_help_needs_no_jax():
    code = (
        "import contextlib, sys\n"
        "from jaxrel import cli\n"
        "for command in ([], ['explain'], ['train'], ['evaluate'], ['doctor']):\n"
        "    with contextlib.suppress(SystemExit): cli.main([*command, '--help'])\n"
        "heavy = {'jax', 'flax', 'numpy', 'PIL', 'transformers', 'matplotlib'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    done = python(code, text=True)
    assert done.stderr == ""
    for line in ("  clip-shapes +a small CLIP", "examples:", "model and method:"):
        assert re.search(line, done.stdout)


def test_help_lists_what_there_is():
    for family, names in explain.METHODS.items():
        assert names == getattr(methods, family).methods
    assert {*registry.MEANINGS} == {*registry.RECIPES}
    assert {methods.UNIMODAL.usual, methods.BIMODAL.usual} == {"weighted"}
    assert methods.WORD_BY_WORD.usual == "lrp"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("equal, weighted, norm,raw", ("equal", "weighted, norm", "raw")),
        ("weighted:norm,equal", ("weighted, norm", "equal")),
        ("weighted, other", ("weighted", "other")),
        ("all", ("equal", "weighted", "weighted, norm", "raw")),
        (" , ", ()),
    ],
)
def test_names_that_hold_commas(text, names):
    assert options.names(text, ("equal", "weighted", "weighted, norm", "raw")) == names


# ---- streams


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(encoding):
    written = io.BytesIO()
    output = Output(io.TextIOWrapper(written, encoding))
    print("猫é\udce9!", file=output, flush=True)
    shown = written.getvalue().decode(encoding)
    assert shown in ("\\u732bé\\udce9!\n", "\\u732b\\xe9\\udce9!\n", "猫é\\udce9!\n")
    assert output.encoding == encoding


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        output = Output(stream)
        for _ in range(3):
            print("x" * 100_000, file=output, flush=True)


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "jaxrel.cli", "doctor"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "jaxrel: error: the standard output is not whole (No space left on device): make room, or "
        "send it elsewhere\n"
    )


def test_no_stream_at_all():
    print("x", file=Output(None), flush=True)


def test_help_into_a_pipe_that_is_closed():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jaxrel.cli", "explain", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# ---- Ctrl-C


def interrupted(run, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run", run)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli.main(["doctor"]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capsys.readouterr().err == "jaxrel: interrupted\n"


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    interrupted(lambda _: signal.raise_signal(signal.SIGINT), monkeypatch, capsys)


def test_an_interrupt_that_becomes_another_error(monkeypatch, capsys):
    def run(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("INTERNAL: the callback failed") from None

    interrupted(run, monkeypatch, capsys)


def test_an_interrupt_inside_a_finaliser(monkeypatch, capsys):
    class Final:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def run(_):
        one = Final()
        del one
        for _ in range(1000):
            time.sleep(0.01)

    interrupted(run, monkeypatch, capsys)


def test_an_interrupt_of_an_import():
    code = (
        "import os, signal, sys, threading\n"
        "from jaxrel import cli\n"
        "stop = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Timer(0.2, stop).start()\n"
        "sys.argv = ['jaxrel', 'evaluate', 'clip-shapes']\n"
        "sys.exit(cli.main())\n"
    )
    done = python(code, text=True)
    assert (done.returncode, done.stderr) == (130, "jaxrel: interrupted\n")


# ---- errors


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_no_device_is_one_sentence(error, monkeypatch, capsys):
    def devices():
        message = "Unable to initialize backend 'x': no such file. (set JAX_PLATFORMS='' to)"
        raise error(message)

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "x")
    assert cli.main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert "bundled models: " in printed.out
    assert printed.err == (
        "jaxrel: error: JAX has no device for JAX_PLATFORMS=x (no such file): unset it or set "
        "JAX_PLATFORMS=cpu, or install JAX for that device, such as 'jax[cuda13]' or 'jax[tpu]'\n"
    )


def test_other_errors_are_not_hidden(monkeypatch):
    def run(_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(doctor, "run", run)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["doctor"])


def test_an_error_of_several_lines_is_one(monkeypatch, capsys):
    def run(_):
        raise ValueError("this\n  and that")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "jaxrel: error: this and that\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "a.png", "--text", "a", "--model", ""],
        ["explain", "a.png", "--text", "a", "--out", ""],
        ["explain", "", "--text", "a"],
        ["train", "clip-shapes", "--out", " "],
        ["evaluate", "clip-shapes", "--model", ""],
        ["evaluate", "captioner", "--model", ""],
        ["evaluate", "finetuning", "--models", ""],
    ],
)
def test_empty_names_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "the name is empty; is a variable not set?" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--text", "--question"])
def test_text_that_is_not_utf8_is_refused(option, capsys):
    assert cli.main(["explain", "a.png", option, os.fsdecode(b"a caf\xe9")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxrel: error: the text 'a caf\\\\udce9' is not UTF-8 (character 6)")


def test_names_of_files_are_printable():
    assert options.printable(os.fsdecode(b"lat\xe9")) == "lat\\udce9"
    assert options.printable("a\x1b[31m\r\n\x9bé猫👩‍👧") == "a\\x1b[31m\\r\\n\\x9bé猫👩‍👧"


def test_no_name_moves_the_cursor_of_a_terminal(capsys):
    assert cli.main(["explain", "a\x1b[31m.png", "--text", "a"]) == 2
    assert capsys.readouterr().err.startswith("jaxrel: error: a\\x1b[31m.png: there is no such")


# ---- compiled programs

VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The environment of a user."""
    changed = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    changed |= {"HOME": str(tmp_path / "home")}
    changed.pop("XDG_CACHE_HOME", None)
    monkeypatch.setattr(os, "environ", changed)
    return changed


def test_programs_are_kept_in_the_users_cache(environment, tmp_path, monkeypatch):
    process.keep_programs()
    folder = tmp_path / "home/.cache/jaxrel/programs"
    kept = Path(environment["JAX_COMPILATION_CACHE_DIR"])
    # A folder per kind of processor: homes are shared by machines.
    assert kept.parent == folder
    assert kept.is_dir()
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    process.keep_programs()
    moved = Path(environment["JAX_COMPILATION_CACHE_DIR"])
    assert moved == tmp_path / "cache/jaxrel/programs" / kept.name


def test_the_user_chooses_where_programs_are_kept(environment, tmp_path, monkeypatch):
    environment["JAX_COMPILATION_CACHE_DIR"] = "mine"
    process.keep_programs()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "mine"
    del environment["JAX_COMPILATION_CACHE_DIR"]
    monkeypatch.setattr(doctor, "run", lambda _: None)
    assert cli.main(["doctor", "--no-cache"]) == 0
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
    assert cli.main(["doctor"]) == 0
    assert "JAX_COMPILATION_CACHE_DIR" in environment


def test_programs_that_cannot_be_kept_are_not(environment, tmp_path):
    (tmp_path / "home").write_text("no folder")
    process.keep_programs()
    with contextlib.suppress(KeyError):
        del environment["HOME"]
    environment["XDG_CACHE_HOME"] = "/dev/null"
    process.keep_programs()
    assert not {*VARIABLES} & {*environment}
