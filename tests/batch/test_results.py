"""What `jaxrel report` draws of a job is what `jaxrel explain` draws of the same inputs."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import jaxrel
from jaxrel import report
from jaxrel.batch import Explainer
from jaxrel.batch.results import explanations, find_rows
from jaxrel.flags import Flag
from jaxrel.images import read_image
from tests.zoo.captioners import captioner
from tests.zoo.clipmappers import random_mapper
from tests.zoo.clips import small_clip

pytest.importorskip("duckdb")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("a.png", "b.png", "c.png")
GIVEN = pa.schema([(name, pa.string()) for name in ("id", "image", "text")])


@pytest.fixture
def files(tmp_path):
    # The random captioners have something to say of this one.
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    for name in NAMES:
        Image.fromarray(pixels).save(tmp_path / name)
    return [tmp_path / name for name in NAMES]


def write(folder, model, files, **options):
    """A job in two parts and batches of one."""
    text = options.pop("text", None)
    explainer = Explainer(model, batch_size=1, **options)
    for part in (0, 2):
        rows = [
            {"id": file.name, "image": str(file), "text": text} for file in files[part : part + 2]
        ]
        found = explainer(pa.Table.from_pylist(rows, GIVEN))
        pq.write_table(found, folder / f"part-{part}.parquet")


def shown(found):
    """The headings and views of a page, and the numbers that its script draws."""
    html = report.page(found)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return re.findall(r"<article.*?</article>", html, re.S), json.loads(data)


CASES = {
    "gridtd": (lambda: captioner("gridtd"), ("gradient", "grad_cam"), "a red circle a"),
    "aoa": (lambda: captioner("aoa"), ("gradient", "attention"), None),
    "captions": (lambda: random_mapper("caption", layers=1), ("rollout", "equal"), "red circle a"),
    "answers": (lambda: random_mapper("vqa", layers=1), ("equal",), "a red square"),
    "similarity": (small_clip, ("equal",), "a red circle"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_of_a_job_is_that_of_explain(case, files, tmp_path):
    make, methods, text = CASES[case]
    model = make()
    write(tmp_path, model, files, method=methods, text=text)
    rows = find_rows(tmp_path, "true", order="id, row", limit=100).rows
    articles, data = shown(explanations(rows, model, name="mine"))
    wanted = jaxrel.explain(
        model,
        image=[read_image(str(file)) for file in files],
        text=None if text is None else [text] * len(files),
        method=methods,
        batch_size=1,
        name="mine",
    )
    wanted_articles, wanted_data = shown(wanted)
    assert len(articles) == len(files)
    assert data == wanted_data
    assert articles == wanted_articles
    # What is said of a method is said once.
    drawn = explanations(rows, model, name="mine")
    assert [one.report["coverage"] for one in drawn] == [one.report["coverage"] for one in wanted]


def test_a_limit_cuts_no_caption(tmp_path):
    """Three captions of four words, explained by two methods."""
    rows = [
        {"id": f"{caption}.png", "row": word, "method": method, "score": 4.0 * word + caption}
        for caption in range(3)
        for method in ("lrp", "gradient")
        for word in range(4)
    ]
    pq.write_table(
        pa.Table.from_pylist([row | {"error": None} for row in rows]), tmp_path / "part-0.parquet"
    )

    def found(limit, order="id, row", where="true"):
        chosen = find_rows(tmp_path, where, order=order, limit=limit)
        words = [(row["id"][0], row["row"]) for row in chosen.rows if row["method"] == "gradient"]
        assert len(words) == chosen.shown
        assert len(chosen.rows) == 2 * chosen.shown
        assert chosen.rows[0]["method"] == "lrp"
        return words, chosen.total

    every = [(caption, word) for caption in "012" for word in range(4)]
    assert found(100) == found(12) == found(9) == (every, 12)
    assert found(5) == found(8) == (every[:8], 12)
    assert found(1) == found(4) == (every[:4], 12)
    # The words of a caption are not together here.
    assert found(2, "score desc") == ([("2", 3), ("1", 3)], 12)
    # Rows that are alike keep the order of ids and words.
    assert found(2, "method", "score > 8")[0] == [("0", 3), ("1", 2), ("1", 3)]
    assert found(1, "id desc") == ([("2", word) for word in range(4)], 12)


class EverySecond:
    """A detector that flags a word, finds nothing at the next, and does not judge the third."""

    def flags(self, method, words, maps):
        values = [0.1 + len(method) / 100, 0.75]
        judged = [
            Flag(word, "mean", values[i % 3], 0.5, 0.25, "on <three> images") if i % 3 < 2 else None
            for i, word in enumerate(words)
        ]
        assert len(maps) == len(judged)
        return judged


def test_flagged_words_are_flagged_in_the_page_of_a_job(files, tmp_path):
    model, methods = captioner("gridtd"), ("gradient", "grad_cam")
    options = {"detector": EverySecond(), "method": methods}
    write(tmp_path, model, files, text="a red circle a", **options)
    rows = find_rows(tmp_path, "true", order="id, row", limit=100).rows
    found = explanations(rows, model, name="mine")
    images = [read_image(str(file)) for file in files]
    wanted = jaxrel.explain(
        model, image=images, text=["a red circle a"] * 3, batch_size=1, name="mine", **options
    )
    assert [one.flags for one in found] == [one.flags for one in wanted]
    assert [flag and flag.flagged for flag in found[0].flags[:4]] == [True, False, None, True]
    assert shown(found) == shown(wanted)
    assert "on &lt;three&gt; images" in shown(found)[0][0]
    elsewhere = [row | {"id": f"sub/{row['id']}"} for row in rows]
    (first, *_), _ = shown(explanations(elsewhere, model, name="mine"))
    assert '<p class="muted" id="input0">sub/a.png</p>' in first
    held = rows[0]["flag"]
    assert (held["word"], held["value"], held["flagged"]) == ("a", 0.1 + 8 / 100, True)
    chosen = find_rows(tmp_path, "flag.flagged", order="id, row", limit=100)
    assert (chosen.shown, chosen.total) == (6, 6)
    assert [row["row"] for row in chosen.rows if row["method"] == "gradient"] == [0, 3] * 3


def older(table):
    """As tables were once: the report counts the tokens that are left out, such as the start."""
    reports = []
    for row in table.to_pylist():
        told = json.loads(row["report"])
        told["examples"]["position"] = row["position"] + 1
        reports.append(json.dumps(told))
    place = table.column_names.index("report")
    return table.set_column(place, "report", [reports]).drop_columns(["position", "flag"])


def test_an_older_job_is_drawn_alike(files, tmp_path):
    model = random_mapper("caption", layers=1)
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir(), old.mkdir()
    write(new, model, files, method="equal", text="a red a")
    for part in new.iterdir():
        pq.write_table(older(pq.read_table(part)), old / part.name)
    pages = []
    for folder in (new, old):
        rows = find_rows(folder, "true", order="id, row", limit=100).rows
        pages.append(shown(explanations(rows, model, name="mine")))
    assert pages[0] == pages[1]
    caption = [(one["word"], one["row"]) for one in pages[0][1]["views"][0]["caption"]]
    assert caption == [("a", 0), ("red", 1), ("a", 2)]
    # One that was begun by an older version, and ended by this one.
    (old / "part-2.parquet").write_bytes((new / "part-2.parquet").read_bytes())
    rows = find_rows(old, "true", order="id, row", limit=100).rows
    assert shown(explanations(rows, model, name="mine")) == pages[0]
