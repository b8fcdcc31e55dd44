"""The result class: what it accepts, what it refuses, and that it comes back from a file."""

import json
import os
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrel.explanations.result import Explanation
from jaxrel.flags import Flag
from tests.paths import FIXTURES

FLAG = Flag("circle", "mean", -0.25, 0.125, 0.75, "AUC 0.80")
TOKENS = (("", "a", "red", "cir", "##cle", ""), ("", "ein", "Käse", "", "", ""))


def make(**changes):
    fields = dict(
        target=("a red circle", "ein Käse"),
        score=[24.5, -1.0],
        method="weighted",
        signed=True,
        image=np.arange(-6, 6).reshape(2, 2, 3),
        text=[[9, 1, 2, 0.25, 0.5, 9], [9, -1, 3, 9, 9, 9]],
        tokens=TOKENS,
        pixels=(np.full((4, 6, 3), 7, np.uint8), np.zeros((5, 2, 3), np.uint8)),
        model="clip-shapes",
        settings="importance: grad_value",
        report={"seconds": 0.5, "layers": [0, 1], "loss": {"bias": -0.25}, "note": "ä <b>"},
    )
    return Explanation(**(fields | changes))


def assert_same(a, b):
    fields = ("target", "method", "signed", "tokens", "model", "settings", "report", "flags")
    for name in fields:
        assert getattr(a, name) == getattr(b, name)
    for name in ("score", "image", "text"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    assert (a.pixels is None) == (b.pixels is None)
    for x, y in zip(a.pixels or (), b.pixels or (), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_arrays_become_read_only_numpy_float32_copies():
    given = np.ones((1, 2, 2))
    explanation = Explanation(
        target=["x"], score=jnp.ones(1, jnp.bfloat16), method="m", signed=False, image=given
    )
    given[:] = 5
    assert explanation.image.dtype == explanation.score.dtype == np.float32
    assert explanation.image.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        explanation.image[0] = 0
    assert repr(explanation) == "Explanation(method='m', examples=1, image=2x2, signed=False)"
    assert "text=6 tokens" in repr(make())


def test_images_may_be_pil_or_one_array():
    shown = Image.new("RGB", (3, 2), "red")
    assert make(pixels=[shown, shown]).pixels[0].shape == (2, 3, 3)
    assert len(make(pixels=np.zeros((2, 4, 4, 3), np.uint8)).pixels) == 2


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"target": "cat"}, TypeError, "target must be a sequence of strings, got 'cat'"),
        ({"target": ()}, ValueError, "target is empty"),
        ({"score": [1.0]}, ValueError, r"score must have the shape \[2\].*got \[1\]"),
        ({"score": [1.0, np.nan]}, ValueError, "score holds NaN or infinity in example 1"),
        ({"image": None, "text": None, "tokens": ()}, ValueError, "neither image nor text"),
        ({"image": np.zeros((3, 2, 2))}, ValueError, r"image must have .*\[2, rows, columns\]"),
        ({"image": np.zeros((2, 2))}, ValueError, r"got \[2, 2\]"),
        ({"image": np.zeros((2, 0, 2))}, ValueError, r"got \[2, 0, 2\]"),
        ({"image": [[[0.0]], [[np.inf]]]}, ValueError, "image holds NaN .* in example 1; look"),
        ({"image": [[[1e300]], [[0.0]]]}, ValueError, "image holds NaN or infinity in example 0"),
        ({"text": np.full((2, 6), np.nan)}, ValueError, "text holds .* in example 0, 1"),
        ({"signed": False}, ValueError, r"image is negative in example 0 \(down to -6\)"),
        ({"signed": False, "image": None}, ValueError, "text is negative in example 1"),
        ({"text": None}, ValueError, "no text relevance"),
        ({"tokens": TOKENS[:1]}, ValueError, "text has 2 examples, tokens have 1"),
        ({"tokens": (("a",), ("b",))}, ValueError, "example 0 names 1; fill up"),
        ({"tokens": ("abcdef", "abcdef")}, TypeError, "tokens of an example must be"),
        ({"pixels": [np.zeros((2, 2, 3), np.uint8)]}, ValueError, "2 examples, but 1 images"),
        ({"pixels": np.zeros((2, 4, 4, 3))}, ValueError, "must be uint8 .* got float64"),
        ({"pixels": np.zeros((2, 4, 4), np.uint8)}, ValueError, r"\[4, 4\] for example 0"),
        ({"flags": [FLAG]}, ValueError, "2 examples, but 1 flags"),
        ({"report": {"a": object()}}, TypeError, "report must hold what JSON can"),
        ({"report": {"a": float("nan")}}, TypeError, "report must hold what JSON can"),
    ],
)
def test_refusals_say_what_is_wrong(changes, error, text):
    with pytest.raises(error, match=text):
        make(**changes)


def test_report_is_what_json_gives_back():
    report = {"x": np.float32(0.5), "y": jnp.arange(2), "z": (1, 2)}
    assert make(report=report).report == {"x": 0.5, "y": [0, 1], "z": [1, 2]}


def test_words_merge_subwords_and_drop_specials():
    explanation = make()
    assert explanation.words(0) == [("a", 1.0), ("red", 2.0), ("circle", 0.75)]
    assert explanation.words() == [explanation.words(0), [("ein", -1.0), ("Käse", 3.0)]]
    assert explanation.words(-1) == explanation.words(1)
    assert make(text=None, tokens=()).words() == [[], []]
    with pytest.raises(IndexError, match="no example 2; there are 2"):
        explanation.words(2)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["##ing", "a"], ["ing", "a"]),
        (["a", "", "##b"], ["a", "b"]),
        # A piece of a character; without the piece that shows it, there is nothing to show.
        (["a", "##", "##b"], ["ab"]),
        (["##", "##"], ["\ufffd"]),
        # Written by the user: it begins a word.
        (["a", "\\##", "b"], ["a", "##", "b"]),
        (["\\\\##a"], ["\\##a"]),
        (["a", "##b", "##c"], ["abc"]),
        (["", ""], []),
    ],
)
def test_words_at_odd_places(tokens, words):
    one = Explanation(
        target=["x"],
        score=[0],
        method="m",
        signed=False,
        text=np.ones((1, len(tokens))),
        tokens=[tokens],
    )
    assert [word for word, _ in one.words(0)] == words
    # Special tokens are dropped, and nothing else.
    assert sum(relevance for _, relevance in one.words(0)) == sum(map(bool, tokens))


def test_indexing_gives_one_example():
    explanation = make()
    assert len(explanation) == 2
    second = explanation[-1]
    assert len(second) == 1
    assert second.target == ("ein Käse",)
    np.testing.assert_array_equal(second.image[0], explanation.image[1])
    assert second.pixels[0].shape == (5, 2, 3)
    assert second.words(0) == explanation.words(1)
    assert [one.target[0] for one in explanation] == list(explanation.target)
    with pytest.raises(IndexError, match="no example 2"):
        explanation[2]
    assert_same(explanation[:2], explanation)
    assert_same(explanation[1:], explanation[np.int64(1)])
    with pytest.raises(ValueError, match="target is empty"):
        explanation[2:]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pixels": None},
        {"text": None, "tokens": ()},
        {"image": None, "pixels": None},
        {"flags": [None, FLAG]},
    ],
)
def test_npz_round_trip_is_exact(tmp_path, changes):
    explanation = make(**changes)
    path = tmp_path / "new" / "folder" / "one.NPZ"
    explanation.save(path)
    assert_same(explanation, Explanation.load(path))
    assert os.listdir(path.parent) == ["one.NPZ"]
    content = path.read_bytes()
    explanation.save(path)
    assert path.read_bytes() == content


def test_flags_go_with_their_examples():
    one = make(flags=[FLAG, None])
    assert (one[0].flags, one[1].flags) == ((FLAG,), ())
    assert make(flags=[None, None]).flags == make().flags == ()


def test_files_of_an_older_version_load():
    # `make(flags=[None, FLAG])`, saved when images were called pictures, and flags verdicts.
    old = Explanation.load(FIXTURES / "explanation_format_1.npz")
    assert_same(old, make(flags=[None, FLAG]))


def test_old_names_of_fields_work_and_warn():
    images = [np.zeros((2, 2, 3), np.uint8)]
    fields = {"target": ["x"], "score": [1.0], "method": "m", "signed": True, "image": [[[1.0]]]}
    for old, new, value in (("pictures", "pixels", images), ("verdicts", "flags", [FLAG])):
        with pytest.warns(DeprecationWarning, match=f"the argument {old} is now {new}"):
            one = Explanation(**fields, **{old: value})
        with pytest.warns(DeprecationWarning, match=f"Explanation.{old} is now Explanation.{new}"):
            assert getattr(one, old) is getattr(one, new)
        assert len(getattr(one, new)) == 1
    with pytest.warns(DeprecationWarning, match=r"Flag\.doubted is now Flag\.flagged"):
        assert FLAG.doubted is FLAG.flagged is True


def test_npz_needs_no_pickle(tmp_path):
    make().save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_load_refuses_what_is_no_explanation(tmp_path):
    def refused(name, error, text):
        with pytest.raises(error, match=text) as caught:
            Explanation.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)

    refused("missing.npz", FileNotFoundError, "there is no such file")
    refused("image.png", ValueError, "loaded from the .npz file")
    (tmp_path / "folder.npz").mkdir()
    refused("folder.npz", IsADirectoryError, "is a folder")

    make().save(tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    for i, size in enumerate((0, 1, 100, len(good) // 2, len(good) - 1)):
        (tmp_path / f"cut{i}.npz").write_bytes(good[:size])
        refused(f"cut{i}.npz", ValueError, "damaged, cut short, or not an .npz")
    (tmp_path / "flipped.npz").write_bytes(good[:60] + bytes(20) + good[80:])
    refused("flipped.npz", ValueError, "damaged, cut short, or not an .npz")
    (tmp_path / "text.npz").write_text("hello, this is a text file")
    refused("text.npz", ValueError, "damaged, cut short, or not an .npz")

    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    refused("array.npz", ValueError, "damaged, cut short, or not an .npz")
    np.savez(tmp_path / "foreign.npz", weights=np.zeros(3), bias=np.zeros(1))
    refused("foreign.npz", ValueError, "no saved explanation; it holds: bias, weights")
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    refused("pickled.npz", ValueError, "damaged, cut short, or not an .npz")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("readme.txt", "hello")
    refused("zip.npz", ValueError, "no saved explanation; it holds: readme.txt")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda header, arrays: header.update(format=99), "format 99 is not known here"),
        (lambda header, arrays: header.pop("format"), "not a usable explanation"),
        (lambda header, arrays: header.pop("target"), "not a usable explanation.*target"),
        (lambda header, arrays: header.update(pixels=3), "not a usable .*pixels_2"),
        (lambda header, arrays: header.update(flags=[{}, None]), "not a usable .*word"),
        (lambda header, arrays: arrays.pop("score"), "not a usable .*score"),
        (lambda header, arrays: arrays.update(score=np.zeros(5)), "score must have the shape"),
    ],
)
def test_load_refuses_inconsistent_content(tmp_path, edit, text):
    path = tmp_path / "a.npz"
    make().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["jaxrel_explanation"].tobytes())
    edit(header, arrays)
    arrays["jaxrel_explanation"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=text):
        Explanation.load(path)


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".html"])
def test_save_draws_by_suffix(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    make().save(path)
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<svg", ".html": b"<!DOCTYPE html>"}[
        suffix
    ]
    assert path.read_bytes().startswith(start)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.npz.gz"])
def test_save_names_the_three_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"use \.png .*\.pdf .*\.html .*\.npz"):
        make().save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_writing_leaves_nothing_behind_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(b"before")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make().save(path)
    assert os.listdir(tmp_path) == ["a.npz"]
    assert path.read_bytes() == b"before"


def test_show_returns_an_image_outside_notebooks(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert isinstance(make().show(), Image.Image)


def test_show_displays_in_a_notebook(monkeypatch):
    displayed = []
    ipython = types.ModuleType("IPython")
    display = types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    display.display = displayed.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert make().show() is None
    assert isinstance(displayed[0], Explanation)  # its page, by _repr_html_
    # IPython in a terminal has a shell without a kernel: nothing is displayed there.
    ipython.get_ipython = lambda: types.SimpleNamespace()
    assert isinstance(make().show(), Image.Image)
    assert len(displayed) == 1


def test_notebook_html_is_the_page_in_a_frame_of_its_own():
    html = make()._repr_html_()
    assert html.startswith('<div class="jaxrel"><iframe title="')
    assert "<html" not in html
    assert "&lt;html" in html
    assert "weighted" in html


def test_what_is_told_of_examples_goes_with_them():
    one = make(report={"examples": [{"file": "a.png"}, {"file": "b.png"}], "seconds": 1.0})
    assert one[1].report == {"examples": [{"file": "b.png"}], "seconds": 1.0}
    assert one[1].column().panels[0].about == (("file", "b.png"),)
    with pytest.raises(ValueError, match=r"report\['examples'\] must be a list of 2 dictionaries"):
        make(report={"examples": [{}]})
