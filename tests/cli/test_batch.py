"""`jaxrel batch` and `jaxrel report` end to end."""

import json

import numpy as np
import pytest
from PIL import Image

import jaxrel
from jaxrel import cli
from jaxrel.cli.explain import METHODS
from jaxrel.report import html

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        pixels = rng.integers(0, 256, (20, 30 + i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def run(saved, tmp_path, capsys):
    """Run a command; returns (status, standard output, standard error)."""

    def run(*arguments):
        status = cli.main([str(x) for x in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def results(run, images, saved, tmp_path):
    """A job of two methods, whose fourth image is bad."""
    out = tmp_path / "results"
    status, said, progress = run(
        "batch", images, "--text", "a red circle", "--model", saved, "--method", "equal,rollout",
        "--out", out, "--shard-rows", 4, "--batch-size", 2, "--save-images", "every:3",
    )  # fmt: skip
    assert status == 0
    assert said == f"wrote 7 rows to {out}, 1 of them with an error (column 'error')\n"
    assert "7 rows in batches of 2, which take " in progress
    assert "7/7" in progress
    return out


def test_a_folder_of_images(results, images, model):
    frame = pandas.read_parquet(results)
    assert len(frame) == 6 * 2 + 1
    bad = frame[frame.id == "3.png"]
    assert "is not an image that can be read" in bad.error.item()
    seen = [Image.open(images / f"{i}.png") for i in (0, 1, 2, 4, 5, 6)]
    asked = {"text": "a red circle", "method": ["equal", "rollout"], "batch_size": 2}
    wanted = jaxrel.explain(model, image=seen, **asked)
    for one in wanted:
        rows = frame[frame.method == one.method]
        np.testing.assert_allclose(rows.score, one.score, rtol=1e-5)
        np.testing.assert_allclose(
            np.stack(rows.image_relevance), one.image.reshape(6, -1), rtol=1e-4, atol=1e-6
        )
    assert [*frame[frame.id == "0.png"].tokens.iloc[0]] == ["a", "red", "circle"]
    manifest = json.loads((results / "_manifest.json").read_text())
    assert manifest["settings"]["method"] == ["equal", "rollout"]
    assert manifest["provenance"]["command"].startswith("jaxrel batch ")
    assert manifest["provenance"]["versions"]["jaxrel"] == jaxrel.__version__
    assert sorted(x.name for x in (results / "_images").iterdir()) == ["0.png", "6.png"]


def test_drawings_of_like_names_are_apart(images, run, saved, tmp_path):
    (images / "1.jpg").write_bytes((images / "2.png").read_bytes())
    command = ("batch", images, "--text", "red", "--model", saved, "--method", "equal")
    options = ("--batch-size", 2, "--save-images", "1.jpg,1.png,1.jpg.png")
    assert run(*command, *options, "--out", tmp_path / "a")[0] == 0
    drawn = tmp_path / "a" / "_images"
    assert sorted(x.name for x in drawn.iterdir()) == ["1.jpg.png", "1.png"]
    (images / "1.jpg.png").write_bytes((images / "4.png").read_bytes())
    assert run(*command, *options, "--out", tmp_path / "b")[0] == 0
    drawn = tmp_path / "b" / "_images"
    assert sorted(x.name for x in drawn.iterdir()) == ["1.jpg.png", "1.jpg.png.png", "1.png.png"]


def test_it_goes_on_and_refuses_another_job(results, run, images, saved):
    command = ("batch", images, "--text", "a red circle", "--model", saved, "--out", results)
    same = ("--method", "equal,rollout", "--shard-rows", 4, "--batch-size", 2)
    (results / "part-00001.parquet").unlink()
    status, said, _ = run(*command, *same)
    held = "1 of them with an error (column 'error')\n"
    assert (status, said) == (0, f"wrote 3 rows to {results}, which has 7 now, {held}")
    status, _, error = run(*command, *same, "--images", images)
    assert f"another job: images was None and is '{images}'" in error
    assert len(pandas.read_parquet(results)) == 13
    status, said, _ = run(*command, *same)
    assert (status, said) == (0, f"nothing left to do: 7 rows in {results}, {held}")
    status, _, error = run(*command, "--method", "equal", "--shard-rows", 4)
    assert status == 2
    assert "another job: method was ['equal', 'rollout'] and is ['equal']" in error


def test_a_page_of_chosen_rows(results, run, tmp_path, monkeypatch):
    frame = pandas.read_parquet(results)
    best = frame[frame.method == "equal"].nlargest(2, "score")
    page = tmp_path / "page.html"
    status, said, _ = run(
        "report", results, "--where", f"score >= {best.score.min()}", "--order", "score desc",
        "--out", page,
    )  # fmt: skip
    assert (status, said) == (0, f"wrote 2 rows to {page}\n")
    text = page.read_text(encoding="utf-8")
    first, second = (f"{score:.5g}" for score in best.score)
    assert text.index(first) < text.index(second)
    figure = tmp_path / "x.png"
    status, said, _ = run("report", results, "--limit", 1, "--out", figure)
    assert (status, said) == (0, f"wrote 1 of 6 rows (--limit) to {figure}\n")
    with monkeypatch.context() as patch:
        patch.setattr(html, "MOST", 2)
        said = run("report", results, "--limit", 3, "--out", page)[1]
    some = "3 of 6 rows (--limit) of 3 inputs, of which the page shows 2,"
    assert said == f"wrote {some} to {page}\n"
    assert page.read_text(encoding="utf-8").count("<article") == 2
    status, _, error = run("report", results, "--where", "scroe > 1", "--out", page)
    assert status == 2
    assert "cannot be read as SQL over the columns id, row, image, text, target, score" in error
    assert run("report", results, "--where", "regexp_matches(id, '(')", "--out", page)[0] == 2
    status, _, error = run("report", results, "--where", "score > 1e9", "--out", page)
    assert (status, "no row of" in error) == (2, True)
    status, _, error = run("report", results, "--where", "error is not null", "--out", page)
    assert status == 2
    assert "has 'error is not null'; 1 with an error has it and has no picture: --errors" in error
    status, said, _ = run("report", results, "--errors")
    assert (status, said) == (0, f"3.png: {frame.error.dropna().item()}\n")
    assert run("report", results, "--errors", "--where", "id = '4.png'")[:2] == (0, "")
    (results / "part-00001.parquet").write_bytes(b"PAR1")
    status, _, error = run("report", results, "--out", page)
    assert status == 2
    assert "part-00001.parquet cannot be read" in error
    status, _, error = run("report", tmp_path, "--out", page)
    assert (status, "is no folder that `jaxrel batch` wrote" in error) == (2, True)


def test_help_lists_the_methods(capsys):
    with pytest.raises(SystemExit):
        cli.main(["batch", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    known = {name for methods in METHODS.values() for name in methods}
    listed = said.partition("methods: with --text")[2].partition("examples:")[0]
    assert known <= set(listed.replace(",", "").split())
    assert "draw every Nth row, or those of these ids" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "there is no such file or folder"),
        (("{images}",), "say with --text, --question or --caption"),
        (("{images}", "--text", "red", "--method", "lpr"), "unknown method 'lpr'"),
        (("{images}", "--text", "red", "--columns", "picture=x"), "there is no column 'picture'"),
        (("{images}", "--text", "red", "--batch-size", "0"), "a whole number from 1, got '0'"),
        (("{images}", "--text", "red", "--save-images", "every:x"), "a whole number from 1"),
        (("{images}", "--text", "red", "--resources", "TPU"), "expected NAME=NUMBER"),
        (("{images}", "--text", "red", "--out", "{images}"), "holds other files"),
        (("{images}", "--text", ""), "the text is empty: ''; is a variable not set?"),
        (("{images}", "--question", " "), "the text is empty: ' '; is a variable not set?"),
        (("{images}", "--text", "red", "--images", "nowhere"), "--images nowhere is no folder"),
        (("", "--text", "red"), "the name is empty; is a variable not set?"),
        (("{images}", "--text", "red", "--images", ""), "the name is empty"),
    ],
)
def test_bad_input_is_one_line(run, images, saved, tmp_path, arguments, message, capsys):
    given = [x.format(images=images) for x in arguments]
    extra = [] if "--out" in given else ["--out", tmp_path / "out"]
    model = [] if message.startswith("say") else ["--model", saved]
    try:
        status, said, error = run("batch", *given, *extra, *model)
    except SystemExit as end:  # argparse's own
        status, (said, error) = end.code, capsys.readouterr()
    assert (status, said) == (2, "")
    assert message in error
    assert len(error.splitlines()[-1]) > 20
    assert not (tmp_path / "out").exists()


def test_a_first_row_without_text_is_a_row_with_an_error(run, images, tmp_path):
    table, out = tmp_path / "x.csv", tmp_path / "out"
    table.write_text("image,text\n0.png,\n1.png,a red circle\n")
    assert run("batch", table, "--images", images, "--out", out)[0] == 0
    first, second = pandas.read_parquet(out).error
    assert "text" in first
    assert not isinstance(second, str)


def test_strict_stops_at_the_first_bad_image(run, images, saved, tmp_path):
    status, _, error = run(
        "batch", images, "--text", "red", "--model", saved, "--strict", "--out", tmp_path / "out"
    )
    assert status == 2
    assert "3.png is not an image that can be read" in error
