"""The page: one file, escaped, small, with the numbers that were given."""

import base64
import hashlib
import io
import itertools
import json
import re
import zlib
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxrel import report
from jaxrel.explanations.result import Explanation
from jaxrel.flags import Flag
from jaxrel.report import encode, heat, places, texts
from jaxrel.report.panels import Column, Panel, columns, rows
from jaxrel.report.views import caption_words
from tests.report.explanations import make


def make_caption(words, shape=(64, 64), side=64, **changes):
    """A caption of random maps, explained word by word."""
    rng = np.random.default_rng(0)
    count = len(words)
    told = [
        {"word": word, "position": i, "caption": 0, "file": "photo.jpg"}
        for i, word in enumerate(words)
    ]
    # Noise is what compresses worst.
    fields = dict(
        target=[" ".join([*words[:i], f"[{word}]"]) for i, word in enumerate(words)],
        score=np.ones(count),
        method="lrp",
        signed=True,
        image=rng.normal(size=(count, *shape)),
        text=rng.normal(size=(count, count)),
        tokens=[list(words)] * count,
        pixels=[rng.integers(0, 256, (side, side, 3), dtype=np.uint8)] * count,
        report={"examples": told},
    )
    return Explanation(**(fields | changes))


class Page(HTMLParser):
    """Collects elements and text; every element must be closed in its place."""

    VOID = {"meta"}

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text, self.declaration = [], [], [], None

    def handle_decl(self, decl):
        self.declaration = decl

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"repeated attribute in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def parse(html):
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert page.declaration == "DOCTYPE html"
    return page


def numbers(html):
    """The numbers for the script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found[1])


def values(map):
    """A map as the script reads it."""
    data = zlib.decompress(base64.b64decode(map["data"]))
    if map["bits"] == 32:
        return np.frombuffer(data, "<f4").reshape(map["shape"])
    return np.frombuffer(data, np.int8).reshape(map["shape"]) * (map["limit"] / 127)


def test_page_is_one_file_that_allows_its_own_script_and_style_alone():
    html = report.page([make(), make(method="raw", signed=True)])
    page = parse(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "iframe", "object", "embed", "base", "form", "img"}
    for attrs in (attrs for _, attrs in page.elements):
        assert not any(name.startswith("on") for name in attrs)
        assert not {"style", "src", "srcset", "xlink:href"} & set(attrs)
        assert re.match(r"#pale\d+$|data:image/(png|jpeg);base64,", attrs.get("href", "#pale0"))
    for reference in ("http:", "https:", "url(", "@import", "eval(", "innerHTML"):
        assert reference not in html
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy["content"]
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("meta")[0] == {"charset": "utf-8"}
    assert len(page.all("title")) == len(page.all("h1")) == len(page.all("main")) == 1


def test_page_shows_everything_without_its_script():
    page = parse(report.page([make(), make(method="raw")], title="My report"))
    text = " ".join(page.text)
    for expected in (
        *("My report", "clip-shapes", "weighted", "raw", "a red circle", "a blue square"),
        *("score 24.312", "score -1.5", "circle", "seconds", "0.5", "loss.bias", "0.25"),
        *("loss.layers", "[1, 2]", "settings", "layers 0 to 3", "streaming", "yes"),
        "Red speaks for the target; blue, hatched, speaks against it.",
        "Each map and each line of words has its own scale.",
    ):
        assert expected in text
    # Two examples, each as the input and under two methods; the image is there once as it is and
    # once as it is below the heat.
    figures = [svg for svg in page.all("svg") if svg["role"] == "img"]
    assert len(figures) == 2 * 3
    assert len({svg["aria-label"] for svg in figures}) == 6
    names = [image["id"] for image in page.all("image") if "id" in image]
    assert names == ["pale0", "photo0", "pale1", "photo1"]
    assert len(page.all("use")) == 2 * 2
    words = [span for span in page.all("span") if span.get("class", "").startswith("word ")]
    assert len(words) == 2 * (3 + 3)
    assert all(re.fullmatch(r"word s-?\d+( against)?", span["class"]) for span in words)


def test_numbers_are_those_that_were_given():
    one = make()
    data = numbers(report.page(one))
    assert data["methods"] == [{"name": "weighted", "signed": True}]
    for i, view in enumerate(data["views"]):
        ((panel,),) = [row["panels"] for row in view["rows"]]
        np.testing.assert_array_equal(values(panel["map"]), one.image[i])
        assert panel["words"] == [list(pair) for pair in one.words(i)]
        assert panel["map"]["limit"] == np.abs(one.image[i]).max()
    # Maps of pixels are rounded: to a 254th of the largest value.
    caption = make_caption(["a", "ring"])
    for row, given in zip(
        numbers(report.page(caption))["views"][0]["rows"], caption.image, strict=True
    ):
        map = row["panels"][0]["map"]
        assert map["shape"] == map["own"] == [64, 64]
        atol = 0.51 * np.abs(given).max() / 127
        np.testing.assert_allclose(values(map), given, rtol=0, atol=atol)


def test_maps_lie_over_the_image_that_the_figure_draws_below_them():
    one = make()
    images = {image.get("id"): image["href"] for image in parse(report.page(one)).all("image")}
    for i, pixels in enumerate(one.pixels):
        data = base64.b64decode(images[f"pale{i}"].removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(data)) as sent:
            np.testing.assert_array_equal(np.asarray(sent), np.round(255 * heat.pale(pixels)))


def test_a_caption_is_one_view_with_its_words_and_one_image():
    flags = [None, Flag("ring", "mean", 0.25, 0.5, 0.33, "AUC 0.7"), None]
    html = report.page(make_caption(["a", "ring", "alone"], flags=flags))
    (view,) = numbers(html)["views"]
    assert view["caption"] == [
        {"word": "a", "row": 0, "flagged": False},
        {"word": "ring", "row": 1, "flagged": True},
        {"word": "alone", "row": 2, "flagged": False},
    ]
    # The words before each, and no others.
    before = [[word for word, _ in row["panels"][0]["words"]] for row in view["rows"]]
    assert before == [[], ["a"], ["a", "ring"]]
    page = parse(html)
    assert len(page.all("article")) == 1
    assert len([image for image in page.all("image") if "id" in image]) == 2
    assert len(page.all("use")) == 3
    assert "A caption explained word by word in photo.jpg" in page.text


def test_some_words_of_a_caption_and_pieces_of_words():
    words = ["a", "cir", "##cle", "here"]
    one = make_caption(words)
    every = caption_words([(panel,) for panel in one.column().panels])
    assert every == [("a", 0, False), ("cir", 1, False), ("cle", 2, False), ("here", 3, False)]
    last = caption_words([(panel,) for panel in one[3:].column().panels])
    assert last == [("a", None, False), ("circle", None, False), ("here", 0, False)]


@pytest.mark.parametrize(
    ("words", "shape", "side", "methods", "limit"),
    [
        (17, (64, 64), 64, 1, 300_000),
        (17, (64, 64), 64, 5, 300_000),
        (15, (224, 224), 640, 1, 1_500_000),
        (15, (224, 224), 640, 3, 1_500_000),
        (15, (14, 14), 640, 2, 1_500_000),
    ],
)
def test_a_page_is_small(words, shape, side, methods, limit):
    base = make_caption([f"word{i}" for i in range(words)], shape, side)
    several = [Explanation(**{**vars(base), "method": f"method {i}"}) for i in range(methods)]
    html = report.page(several)
    assert len(html.encode()) <= limit
    map = numbers(html)["views"][0]["rows"][0]["panels"][0]["map"]
    assert map["own"] == list(shape)
    # What is averaged keeps most of its size, and one method of pixels all of it.
    assert map["shape"][0] >= (shape[0] if methods == 1 else shape[0] / 2.5)


def test_maps_of_one_view_may_have_several_sizes():
    sent = encode.maps([np.ones((64, 64)), None, np.ones((8, 8))])
    assert [one and one["own"] for one in sent] == [[64, 64], None, [8, 8]]


def test_averaged_maps_keep_their_means():
    noise = [np.random.default_rng(i).normal(size=(64, 64)) for i in range(40)]
    for sent, given in zip(encode.maps(noise), noise, strict=True):
        assert sent["shape"] < sent["own"]
        # Rounding to 8 bits.
        np.testing.assert_allclose(values(sent).mean(), given.mean(), atol=1e-3)


def test_headings_descend_without_gaps():
    levels = [int(tag[1]) for tag, _ in parse(report.page(make())).elements if tag in ("h1", "h2")]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


EVIL = "\"'><script>alert(1)</script>&amp;"


def test_user_text_is_escaped_everywhere():
    told = {"file": EVIL, "question": EVIL, "notes": [EVIL], EVIL: EVIL}
    explanation = make(
        target=[EVIL, EVIL],
        tokens=[[EVIL] * 5] * 2,
        method=EVIL,
        model=EVIL,
        settings=EVIL,
        report={EVIL: EVIL, "nested": {EVIL: [EVIL]}, "examples": [told, told]},
        flags=[Flag(EVIL, EVIL, 0.0, 1.0, 0.5, EVIL), None],
    )
    caption = make_caption([EVIL, "x"])
    for one in (explanation, caption):
        html = report.page(one)
        assert html.count("<script") == 2
        assert "alert(1)</script>" not in html
        assert any(EVIL in text for text in parse(html).text)
        frame = report.fragment(one)
        assert "<script" not in frame
        (content,) = re.findall(r'srcdoc="([^"]*)"', frame)
        assert unescape(content).count("<script") == 2
    parsed = parse(report.page(explanation, title=EVIL))
    assert EVIL in parsed.text
    assert any(EVIL in svg["aria-label"] for svg in parsed.all("svg"))
    words = numbers(report.page(explanation))["views"][0]["rows"][0]["panels"][0]["words"]
    assert words[0][0] == EVIL
    assert "<script" not in report.drawing(explanation)


def test_page_says_what_it_is_of():
    about = [{"file": "a.png", "sentence": "a red circle", "notes": ["This image is odd."]}]
    one = make(report={"examples": about * 2})
    title = "Relevance for “a red circle” in a.png by clip-shapes"
    assert texts.title([one[0].column()]) == title
    assert texts.title([one.column()]) == "2 examples explained by clip-shapes"
    asked = make(report={"examples": [{"question": "what is red?"}] * 2})[0]
    said = "Why the answer to “what is red?” is a red circle by clip-shapes"
    assert texts.title([asked.column()]) == said
    page = parse(report.page(one[0]))
    assert page.text.count(title) == 2  # title and heading
    assert "This image is odd." in page.text
    assert {"dt", "dd", "details"} <= {tag for tag, _ in page.elements}


def test_each_of_several_inputs_is_named():
    told = [{"file": "a<b>.png"}, {"file": "b.png", "id": "sub/b.png"}]
    html = report.page(make(report={"examples": told}))
    assert '<p class="muted" id="input0">a&lt;b&gt;.png · score 24.312</p>' in html
    assert '<p class="muted" id="input1">sub/b.png · score -1.5</p>' in html
    assert [article["aria-labelledby"] for article in parse(html).all("article")] == [
        "target0 input0",
        "target1 input1",
    ]
    told = [{"file": "b.png", "id": "<37>"}, {"id": "38"}]
    html = report.page(make(report={"examples": told}))
    assert '<p class="muted" id="input0">b.png · id &lt;37&gt; · score 24.312</p>' in html
    assert '<p class="muted" id="input1">id 38 · score -1.5</p>' in html
    # The title names the file of one input.
    assert '<p class="muted" id="input0">score 24.312</p>' in report.page(make()[0])
    one = make_caption(["a", "ring"])
    assert "input0" not in report.page(one)
    second = {
        **vars(one),
        "report": {
            "examples": [
                {**told, "file": "other.jpg", "caption": 1} for told in one.report["examples"]
            ]
        },
    }
    html = report.page(Explanation.concatenate([one, Explanation(**second)]))
    assert '<h2 id="target0">a ring</h2>\n<p class="muted" id="input0">photo.jpg</p>' in html
    assert '<h2 id="target1">a ring</h2>\n<p class="muted" id="input1">other.jpg</p>' in html


def test_page_and_figure_say_against_what():
    about = {"file": "a.png", "sentence": "a red circle", "against": "a blue square"}
    one = make(report={"examples": [about, {}]})
    contrast = "a red circle, against a blue square"
    assert [row[0].target for row in rows(columns(one))] == [contrast, "a blue square"]
    assert one.target[0] == "a red circle"
    title = f"Relevance for “{contrast}” in a.png by clip-shapes"
    assert texts.title([one[0].column()]) == title
    assert f'<h2 id="target0">{contrast}</h2>' in report.page(one)
    assert contrast in report.drawing(one, cell=800)
    with pytest.raises(ValueError, match="differ in target"):
        report.page([one, make(method="raw")])


def test_page_says_how_much_relevance_arrives():
    found = {"output": 10.0, "input": 6.0, "bias": 3.0, "stabiliser": 0.25, "rule": 0.75}
    one = make(method="lrp", report={"relevance": found, "rules": {"dense: Epsilon()": 4}})
    (said,) = texts.balance([one.column()])
    assert said == (
        "lrp: of the relevance 10 of all scores, 6 (60%) arrives at the image and the words; "
        "biases (constants that the model adds) take 3, stabilisers (small numbers that keep a "
        "rule from dividing by zero) take 0.25, rules (which may hand on less than they get, or "
        "more if negative) take 0.75. Every operation on the way has a rule: 4 x dense: Epsilon()."
    )
    assert said in parse(report.page(one)).text
    assert "handed back from operation to operation" in report.page(one)
    assert texts.balance([make().column()]) == []


def test_numbers_of_the_table_have_four_digits():
    nested = [1 / 3, [20000 / 3, {"a": -1e-7 / 3}], "word", True, None, 123456]
    one = make(report={"list": nested, "number": 2 / 3, "whole": 123456})
    cells = dict(texts.table([one.column()]))
    (told,) = cells["list"]
    assert told == '[0.3333, [6667.0, {"a": -3.333e-08}], "word", true, null, 123456]'
    assert (cells["number"], cells["whole"]) == (["0.6667"], ["123456"])
    assert "All numbers, to 4 digits" in report.page(one)
    assert one.report["list"][0] == 1 / 3  # kept in full


def test_where_relevance_lies_is_said():
    relevance = np.zeros((6, 6))
    relevance[0, 5] = 2
    panel = Panel("m", "x", 1.0, signed=True, map=relevance, words=[("a", 0.1), ("red", 0.7)])
    assert places.summary(panel) == "most relevant: upper right, word 'red'"
    against = Panel("m", "x", 1.0, signed=True, map=-relevance, words=[("a", -0.1)])
    assert places.summary(against) == ("most relevant: upper right (against), word 'a' (against)")
    nothing = Panel("m", "x", 1.0, signed=True, map=np.zeros((3, 3)))
    assert places.summary(nothing) == "no relevance anywhere"
    found = [places.place(np.eye(9)[i].reshape(3, 3)) for i in range(9)]
    assert found == [
        *("upper left", "upper", "upper right", "left", "centre", "right"),
        *("lower left", "lower", "lower right"),
    ]
    # One pixel says little: of large maps it is where most lies.
    large = np.zeros((64, 64))
    large[40:, :20] = 0.5
    large[2, 60] = 1.0
    assert places.place(large) == "lower left"


def test_unsigned_page_has_no_legend_of_signs():
    plain = Explanation(target=["x"], score=[1.0], method="m", signed=False, image=[[[1.0]]])
    html = report.page(plain)
    assert "Red speaks" not in html
    assert "<h2>Report" not in html  # nothing to report, no empty table
    zero = Explanation(target=["x"], score=[1.0], method="m", signed=False, image=[[[0.0]]])
    assert "0 everywhere" in report.page(zero)


def many(count):
    return Explanation(
        target=[f"target {i:02d}" for i in range(count)],
        score=np.zeros(count),
        method="m",
        signed=False,
        image=np.ones((count, 1, 1)),
    )


def test_a_page_holds_the_first_100_examples_and_a_notebook_8():
    html = report.page(many(110))
    assert "target 99" in html
    assert "target 100" not in html
    assert "the first 100 of 110 examples" in html
    assert "jaxrel batch" in html
    assert "the first" not in report.page(many(100))
    html = report.fragment(many(20))
    assert "target 07" in html
    assert "target 08" not in html
    assert "the first 8 of 20 examples" in html


def test_methods_of_one_name_are_told_apart_by_their_settings():
    html = report.page([make(settings="layers 0"), make(settings="layers 1")])
    names = [method["name"] for method in numbers(html)["methods"]]
    assert names == ["weighted (layers 0)", "weighted (layers 1)"]


def test_page_marks_flagged_words_and_says_why():
    flag = Flag("<circle>", "mean", 0.25, 0.5, 0.75, "AUC 0.80 & more")
    flagged = make(target=["a red [<circle>]", "a [blue]"], flags=[flag, None])
    html = report.page(flagged)
    parse(html)
    assert html.count("<mark>") == 1
    assert '<h2 id="target0">a red <mark>[&lt;circle&gt;]</mark></h2>' in html
    assert (
        '<p class="flag">25% of words flagged like this one are true of the image, and 75% are '
        "not (AUC 0.80 &amp; more); flagged by the mean of the map 0.25, below 0.5</p>" in html
    )
    sure = make(
        target=["a red [<circle>]", "a [blue]"],
        flags=[Flag("<circle>", "mean", 0.75, 0.5, 0.75, ""), None],
    )
    assert "<mark>" not in report.page(sure)
    said = '<p class="muted">not flagged: mean of the map 0.75, at least 0.5</p>'
    assert said in report.page(sure)


def test_methods_of_one_modality_stand_beside_those_of_both():
    image_only = make(method="grad_cam", text=None, tokens=(), pixels=None)
    text_only = make(method="text", image=None, pixels=None)
    page = parse(report.page([image_only, text_only, make()]))
    assert len([svg for svg in page.all("svg") if svg["role"] == "img"]) == 2 * 3
    html = report.page([image_only[0], text_only[0], make()[0]])
    ((first, second, _),) = [row["panels"] for row in numbers(html)["views"][0]["rows"]]
    assert first["words"] == []
    assert second["map"] is None


def test_a_report_draws_whatever_has_a_column():
    panel = Panel("mine", "x", 1.0, signed=False, map=np.ones((1, 2)), words=[("a", 0.5)])

    class Mine:
        def column(self):
            return Column((panel,), model="my model")

    assert "my model" in report.page(Mine())
    assert rows(columns(Mine())) == [(panel,)]
