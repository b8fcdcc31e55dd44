"""Reports: colours, overlays, the image and the page, and inputs at their extremes."""

import dataclasses
import itertools
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxrel import report
from jaxrel.explanations.result import Explanation
from jaxrel.flags import Flag
from jaxrel.report import colours, figures, fonts, texts
from jaxrel.report.heat import fit, flat, png, upsample
from jaxrel.report.panels import Column, Panel, columns, rows


def make(**changes):
    rng = np.random.default_rng(0)
    fields = dict(
        target=["a red circle", "a blue square"],
        score=[24.3125, -1.5],
        method="weighted",
        signed=True,
        image=rng.normal(size=(2, 4, 4)),
        text=rng.normal(size=(2, 5)),
        tokens=[["", "a", "red", "cir", "##cle"], ["", "a", "blue", "square", ""]],
        pixels=rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8),
        model="clip-shapes",
        settings="layers 0 to 3",
        report={"seconds": 0.5, "loss": {"bias": 0.25, "layers": [1, 2]}, "streaming": True},
    )
    return Explanation(**(fields | changes))


def bare(relevance, *, signed, **changes):
    """One example with a map and nothing else."""
    fields = dict(target=["x"], score=[1.0], method="m", signed=signed, image=[relevance])
    return Explanation(**(fields | changes))


def lightness(rgb):
    """CIE L*, 0 to 100."""
    y = colours.luminance(rgb)
    return 116 * np.cbrt(y) - 16 if y > 216 / 24389 else y * 24389 / 27


# Colours


def test_signed_colours_are_centred_on_zero():
    low, zero, high = colours.colour(np.array([-1.0, 0.0, 1.0]), signed=True)
    assert zero.tolist() == [247, 247, 247]
    assert low[2] > low[0]  # blue
    assert high[0] > high[2]  # red
    np.testing.assert_array_equal(colours.colour(np.array([-7.0, 9.0]), signed=True), [low, high])


def test_colour_tables_are_ordered_by_lightness():
    steps = np.diff([lightness(rgb) for rgb in colours.table(signed=False)])
    assert (steps < 0).all()
    # Evenly: rounding to 8 bits and the straight lines between anchors leave this spread.
    assert steps.min() > 2.5 * steps.mean()
    signed = np.array([lightness(rgb) for rgb in colours.table(signed=True)])
    assert (np.diff(signed[:128]) > 0).all()
    assert (np.diff(signed[127:]) < 0).all()
    # The two sides are equally strong, so that neither sign looks larger than it is.
    np.testing.assert_allclose(signed[:127], signed[:127:-1], atol=3)


@pytest.mark.parametrize("signed", [True, False])
def test_text_is_legible_on_every_colour(signed):
    for rgb in colours.table(signed=signed):
        dark, light = sorted(
            (colours.luminance(rgb), {"#000000": 0.0, "#ffffff": 1.0}[colours.ink(rgb)])
        )
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, 1.4.3


def test_normalise_survives_zero_and_extremes():
    assert colours.normalise(np.zeros(2), 0.0).tolist() == [0, 0]
    tiny = np.array([1e-45, -1e-45], np.float32)
    assert colours.normalise(tiny, colours.scale(tiny)).tolist() == [1, -1]
    huge = np.array([3e38, -1.5e38], np.float32)
    np.testing.assert_allclose(colours.normalise(huge, colours.scale(huge)), [1, -0.5], rtol=1e-6)


# Overlay


def test_upsampling_is_bilinear_between_pixel_centres():
    # Centres of the four results lie at -0.25, 0.25, 0.75 and 1.25 of the two pixels' grid;
    # beyond the first and last centre the value is held.
    result = upsample(np.array([[0.0, 1.0]]), 1, 4)
    np.testing.assert_allclose(result, [[0, 0.25, 0.75, 1]], atol=1e-7)  # float32
    np.testing.assert_allclose(upsample(np.ones((1, 1)), 3, 5), 1)
    rng = np.random.default_rng(0)
    fine = rng.normal(size=(8, 8)).astype(np.float32)
    np.testing.assert_allclose(upsample(fine, 8, 8), fine)


@pytest.mark.parametrize("shade", [0, 128, 255])
@pytest.mark.parametrize("signed", [True, False])
def test_heat_is_visible_on_any_background(shade, signed):
    image = np.full((40, 40, 3), shade, np.uint8)
    relevance = np.zeros((2, 2))
    relevance[0, 0] = 1
    drawn = report.overlay(image, relevance, signed=signed)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    # 20 steps of L* are far above the just noticeable difference, which is about 2.
    assert lightness(drawn[-1, -1]) - lightness(drawn[0, 0]) > 20


def test_overlay_keeps_the_image_visible_and_only_heat_coloured():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 4:] = (0, 255, 0)
    drawn = report.overlay(image, np.zeros((1, 1)), signed=True).astype(int)
    assert drawn[0, 7, 0] - drawn[0, 0, 0] > 10
    assert (np.ptp(drawn, axis=-1) == 0).all()  # no green: the image is grey


def test_overlay_scales_by_the_largest_absolute_value():
    image = np.full((2, 2, 3), 90, np.uint8)
    relevance = np.array([[-4.0, 0.0], [0.0, 2.0]])
    a = report.overlay(image, relevance, signed=True)
    b = report.overlay(image, 1000 * relevance, signed=True)
    np.testing.assert_array_equal(a, b)
    assert lightness(a[0, 0]) < lightness(a[1, 1]) < lightness(a[0, 1])


def test_a_map_without_image_is_drawn_flat():
    drawn = flat(np.array([[0.0, 1.0]]), 10, 20, signed=False)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 2


# Words on the figure


def test_long_text_wraps_within_the_width():
    font = fonts.choose("", 15)
    text = "a caption that is longer than one line " + "x" * 200
    lines = figures._wrap(text, font, 120)
    assert len(lines) > 5
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_letters_that_no_font_has_lose_their_accents(monkeypatch):
    monkeypatch.setattr(fonts, "_OTHERS", ())
    font = fonts.choose("Käse", 15)
    assert fonts.drawable("Käse naïve", font) == "Kase naive"
    assert fonts.drawable("日本", font) == "日本"


def test_clean_leaves_one_line_of_text():
    assert texts.clean(" a\n\tb  c ") == "a b c"
    assert texts.clean("a\x00b\x1b[31m\ud800") == "a\ufffdb\ufffd[31m\ufffd"
    assert texts.clean("круг 日本 🐕") == "круг 日本 🐕"


# The image


def test_image_has_a_row_per_example_and_a_column_per_method():
    one = make()
    both = [one, make(method="raw")]
    size = report.figure(one).size
    assert report.figure([one]).size == size
    # A column is a cell and a gap of 24 pixels.
    assert report.figure(both).width - size[0] == 320 + 24
    assert report.figure(both, cell=100).width - report.figure(one, cell=100).width == 100 + 24
    assert report.figure(one[0]).height < size[1] < 2 * report.figure(one[0]).height
    assert report.figure(both).mode == "RGB"


def test_nothing_is_drawn_in_the_margin():
    pixels = np.asarray(report.figure([make(), make(method="a long name " * 6)]))
    framed = np.ones(pixels.shape[:2], bool)
    framed[32:-32, 32:-32] = False
    assert (pixels[framed] == 255).all()


def test_small_images_keep_their_pixels_and_large_ones_are_reduced():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(small, 320), small.repeat(5, 0).repeat(5, 1))
    assert fit(np.zeros((480, 640, 3), np.uint8), 320).shape == (240, 320, 3)
    assert fit(np.zeros((3000, 2, 3), np.uint8), 320).shape == (320, 1, 3)
    assert fit(np.zeros((2, 3000, 3), np.uint8), 320).shape == (1, 320, 3)


def test_rendering_is_deterministic():
    explanations = [make(), make(method="raw")]
    assert png(report.figure(explanations)) == png(report.figure(explanations))
    assert report.page(explanations) == report.page(explanations)


@pytest.mark.parametrize(
    "explanation",
    [
        bare(np.zeros((4, 4)), signed=False),
        bare(np.zeros((4, 4)), signed=True),
        bare([[0.5]], signed=False),
        bare([[-1e-30]], signed=True),
        bare(np.ones((1, 500)), signed=False),
        bare(np.ones((3, 3)), signed=False, pixels=np.zeros((1, 8, 3000, 3), np.uint8)),
        bare(np.ones((3, 3)), signed=False, pixels=np.zeros((1, 3000, 8, 3), np.uint8)),
        bare(np.ones((3, 3)), signed=False, pixels=np.zeros((1, 1, 1, 3), np.uint8)),
        bare(np.ones((600, 600)), signed=False, pixels=np.zeros((1, 600, 600, 3), np.uint8)),
        bare([[3e38, -3e38]], signed=True),
        make(image=None),
        make(image=None, pixels=None),
        make(text=None, tokens=()),
        make(text=np.zeros((2, 3)), tokens=[["", "", ""], ["", "a", ""]]),
        make(text=np.ones((2, 40)), tokens=[[f"word{i}" for i in range(40)]] * 2),
        make(text=np.ones((2, 3)), tokens=[["x" * 300, "日本語", "🐕"], ["مرحبا", "é\x00", "\n"]]),
        make(target=["", "y" * 500], method="", model="", settings="", report={}),
        make(target=["\ud800 half", "<b>"], score=[1e30, -1e-30]),
    ],
)
def test_extremes_are_drawn(tmp_path, explanation):
    explanation.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width == 2 * 320 + 24 + 2 * 32
    explanation.save(tmp_path / "a.html")
    parse((tmp_path / "a.html").read_text(encoding="utf-8"))


def test_zero_relevance_says_so():
    assert texts.ticks(0.0, signed=True) == ["0 everywhere"]
    assert texts.ticks(0.0342, signed=True) == ["-0.0342", "0", "0.0342"]
    assert texts.ticks(2.0, signed=False) == ["0", "2"]
    assert "0 everywhere" in report.page(bare(np.zeros((2, 2)), signed=False))


def test_a_report_draws_whatever_has_a_column():
    panel = Panel("mine", "x", 1.0, signed=False, map=np.ones((1, 2)), words=[("a", 0.5)])

    class Mine:
        def column(self):
            return Column((panel,), model="my model", report={"seconds": 2.0})

    same = bare([[1.0, 1.0]], signed=False, method="mine", text=[[0.5]], tokens=[["a"]])
    same = dataclasses.replace(same, model="my model", report={"seconds": 2.0})
    assert report.page(Mine()) == report.page([Mine()]) == report.page(same)
    assert png(report.figure(Mine())) == png(report.figure(same))


# The page


class Page(HTMLParser):
    """Collects elements and text; every element must be closed in its place."""

    VOID = {"meta", "img"}

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


def test_page_is_one_self_contained_file():
    html = report.page([make(), make(method="raw", signed=True)])
    page = parse(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for attrs in (attrs for _, attrs in page.elements):
        assert not {"href", "onload", "onclick", "onerror", "srcset"} & set(attrs)
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    for reference in ("http:", "https:", "url(", "@import"):
        assert reference not in html
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("meta")[0] == {"charset": "utf-8"}
    assert len(page.all("title")) == len(page.all("h1")) == len(page.all("main")) == 1


def test_page_shows_everything():
    page = parse(report.page([make(), make(method="raw")], title="My report"))
    text = " ".join(page.text)
    for expected in (
        *("My report", "clip-shapes", "weighted", "raw", "a red circle", "a blue square"),
        *("score 24.312", "score -1.5", "circle", "seconds", "0.5", "loss.bias", "0.25"),
        *("loss.layers", "[1, 2]", "settings", "layers 0 to 3", "streaming", "yes"),
        *("Each map has its own scale", "Red speaks for the target"),
    ):
        assert expected in text
    # Two examples, each as the input and under two methods.
    images = page.all("img")
    assert len(images) == 2 * 3
    assert all(image["alt"] and image["width"] == "320" for image in images)
    assert len({image["alt"] for image in images}) == 6
    words = [span for span in page.all("span") if span.get("class") == "word"]
    assert len(words) == 2 * (3 + 3)
    value = make().words(0)[1][1]
    assert words[1]["title"] == f"{value:.3g}"
    assert re.fullmatch(r"background:#[0-9a-f]{6};color:#(000000|ffffff)", words[1]["style"])


def test_headings_descend_without_gaps():
    levels = [
        int(tag[1])
        for tag, _ in parse(report.page(make())).elements
        if tag[0] + "1" == "h1" and tag[1:].isdigit()
    ]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_user_text_is_escaped_everywhere():
    evil = "\"'><script>alert(1)</script>&amp;"
    explanation = make(
        target=[evil, evil],
        tokens=[[evil] * 5] * 2,
        method=evil,
        model=evil,
        settings=evil,
        report={evil: evil, "nested": {evil: [evil]}},
    )
    for html in (report.page(explanation, title=evil), report.fragment(explanation)):
        assert "<script" not in html
    page = parse(report.page(explanation, title=evil))
    assert evil in page.text
    assert evil in page.all("img")[0]["alt"]


def test_unsigned_page_has_no_legend_of_signs():
    html = report.page(bare([[1.0]], signed=False))
    assert "Red speaks" not in html
    assert "Report" not in html  # nothing to report, no empty table


def test_scores_are_told_by_method_where_they_differ():
    same = [make(), make(method="raw")]
    assert texts.score(rows(columns(same))[0]) == "24.312"
    other = [make(), make(method="raw", score=[25.0, 0.0])]
    assert texts.score(rows(columns(other))[0]) == "24.312 (weighted), 25 (raw)"


def test_fragment_shows_the_first_examples_of_many():
    count = 20
    many = Explanation(
        target=[f"target {i:02d}" for i in range(count)],
        score=np.zeros(count),
        method="m",
        signed=False,
        image=np.ones((count, 1, 1)),
    )
    html = report.fragment(many)
    assert "target 07" in html
    assert "target 08" not in html
    assert "The first 8 of 20 examples" in html
    assert "The first" not in report.fragment(many[:8])


# Words that are flagged


def judged(value, **changes):
    """The word of the first example is judged."""
    flag = Flag("<circle>", "mean", value, 0.5, 0.75, "AUC 0.80 & more")
    return make(target=["a red [<circle>]", "a [blue]"], flags=[flag, None], **changes)


def test_page_marks_flagged_words_and_says_why():
    flagged, sure = judged(0.25), judged(0.75, method="raw")
    html = report.page([sure, flagged])
    parse(html)
    assert html.count("<mark>") == 1
    assert "<h2>a red <mark>[&lt;circle&gt;]</mark></h2>" in html
    assert (
        '<p class="flag flagged">likely hallucinated: mean of the map 0.25, below 0.5 '
        "(75% of the words below it were hallucinated, AUC 0.80 &amp; more)</p>" in html
    )
    assert '<p class="flag muted">not flagged: mean of the map 0.75, at least 0.5</p>' in html
    assert "<mark>" not in report.page(sure)
    assert 'class="flag' not in report.page(make())


def test_a_flagged_target_in_other_words_is_marked_whole():
    one = make(flags=[Flag("circle", "mean", 0.25, 0.5, 1.0, ""), None])
    first, second = rows(columns(one))
    assert texts.target(first) == ("", "a red circle")
    assert texts.target(second) == ("a blue square", "")
    assert "<h2><mark>a red circle</mark></h2>" in report.page(one)


def underlined(explanations):
    """Where the figure has the colour of flagged words."""
    return (np.asarray(report.figure(explanations)) == figures._FLAGGED).all(-1)


def test_image_underlines_flagged_words_and_says_why():
    sure, flagged = judged(0.75), judged(0.25)
    assert not underlined(make()).any()
    assert not underlined(sure).any()
    assert report.figure(sure).height > report.figure(make(target=sure.target)).height
    red = underlined(flagged)
    first, second = red[:, : 32 + 320], red[:, 32 + 320 + 24 :]
    assert second.any()
    # Below "[<circle>]" and not below the preceding words; two pixels thick.
    font = fonts.choose("", 15)
    rows, columns = np.nonzero(first)
    assert len(set(rows)) == 2
    assert columns.min() == 32 + round(font.getlength("a red "))
    end = 32 + font.getlength("a red [<circle>]")
    # A dash is four pixels long, and a gap three.
    assert end - 8 < columns.max() <= end + 1


def test_a_flagged_word_that_is_wider_than_a_line_is_drawn():
    word = "x" * 300
    flag = Flag(word, "mean", 0.0, 1.0, 1.0, "y" * 300)
    one = make(target=[f"a [{word}]", "b"], flags=[flag, None])
    pixels = np.asarray(report.figure(one, cell=80))
    framed = np.ones(pixels.shape[:2], bool)
    framed[32:-32, 32:-32] = False
    assert (pixels[framed] == 255).all()


# What cannot stand side by side


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"target": ["a", "b"]}, "target"),
        ({"tokens": [["a"] * 5] * 2}, "tokens"),
        ({"pixels": np.zeros((2, 64, 64, 3), np.uint8)}, "images"),
        ({"pixels": np.zeros((2, 9, 9, 3), np.uint8)}, "images"),
    ],
)
def test_explanations_of_other_inputs_are_refused(changes, what):
    other = make(method="raw", **changes)
    for draw in (report.figure, report.page, report.fragment):
        with pytest.raises(ValueError, match=f"'weighted' and 'raw' differ in {what}"):
            draw([make(), other])


def test_methods_of_one_modality_stand_beside_those_of_both():
    image_only = make(method="grad_cam", text=None, tokens=(), pixels=None)
    text_only = make(method="text", image=None, pixels=None)
    page = parse(report.page([image_only, text_only, make()]))
    assert len(page.all("img")) == 2 * 3


def test_empty_lists_and_narrow_cells_are_refused():
    for draw in (report.figure, report.page, report.fragment):
        with pytest.raises(ValueError, match="at least one explanation, got an empty list"):
            draw([])
    with pytest.raises(ValueError, match="cell is 20 pixels; words need at least 80"):
        report.figure(make(), cell=20)


def test_save_refuses_other_suffixes_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"the suffix is '\.pdf'; use \.png .* or \.html"):
        report.save(make(), tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="at least one"):
        report.save([], tmp_path / "new" / "a.png")
    assert os.listdir(tmp_path) == []


def test_save_writes_several_side_by_side(tmp_path):
    explanations = [make(), make(method="raw")]
    report.save(explanations, tmp_path / "a.PNG")
    report.save(explanations, str(tmp_path / "a.html"))
    assert (tmp_path / "a.PNG").read_bytes() == png(report.figure(explanations))
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == report.page(explanations)
