"""Reports: colours, overlays, the image and the page, and inputs at their extremes."""

import dataclasses
import os
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from jaxrel import report
from jaxrel.explanations.result import Explanation
from jaxrel.flags import Flag
from jaxrel.report import colours, figures, fonts, texts
from jaxrel.report.heat import bar, fit, flat, pale, png, upsample
from jaxrel.report.panels import Column, Panel, columns, rows, views
from tests.paths import ROOT
from tests.report.explanations import make


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


def test_the_image_below_the_heat_shows_what_is_only_of_another_colour():
    with Image.open(ROOT / "train/data/samples/red-circle.png") as drawn:
        image = np.asarray(drawn.convert("RGB"))
    heart, circle, ring, slate = (38, 80), (120, 80), (136, 159), (182, 19)
    luma = image @ np.array([0.299, 0.587, 0.114]) / 255
    assert np.ptp([luma[at] for at in (circle, ring, slate)]) < 0.04
    grey = pale(image)
    for thing in (heart, circle, ring):
        assert grey[thing] - grey[slate] > 0.3  # of 0.65
    # Brightness gives the side: what is brighter than the median colour is drawn brighter.
    two = np.zeros((3, 3, 3), np.uint8)
    two[0, 0], two[0, 1] = 255, (0, 0, 128)
    assert pale(two)[0, 0] == pytest.approx(1)
    np.testing.assert_allclose(pale(two)[1:], pale(two).min())


def test_noise_below_the_heat_stays_noise():
    image = np.full((40, 40, 3), 90, np.uint8)
    assert (pale(image) == 0.35 + 0.65 / 2).all()
    image[::2, ::2] = 92
    assert 0 < np.ptp(pale(image)) < 0.65 * (2 / 255) / 0.25 * 1.01


def test_overlay_scales_by_the_largest_absolute_value():
    image = np.full((2, 2, 3), 90, np.uint8)
    relevance = np.array([[-4.0, 0.0], [0.0, 2.0]])
    a = report.overlay(image, relevance, signed=True)
    b = report.overlay(image, 1000 * relevance, signed=True)
    np.testing.assert_array_equal(a, b)
    assert lightness(a[0, 0]) < lightness(a[1, 1]) < lightness(a[0, 1])


def test_what_is_negative_is_hatched_and_nothing_else():
    image = np.full((40, 40, 3), 128, np.uint8)
    relevance = np.array([[-1.0, 1.0]])
    drawn = report.overlay(image, relevance, signed=True)
    # Within a column all values are one: lines are what differs.
    assert np.ptp(drawn[:, 0].astype(int), axis=0).min() > 20
    assert np.ptp(drawn[:, -1].astype(int), axis=0).max() == 0
    strip = bar(200, image, signed=True)
    assert np.ptp(strip[:, 0].astype(int), axis=0).min() > 20
    # The colours at the ends are those that the map is drawn with.
    np.testing.assert_array_equal(strip[0, -1], drawn[0, -1])


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


def test_many_methods_wrap_into_lines_as_wide_as_a_page():
    several = [make(method=f"method {i}") for i in range(7)]
    drawn = report.figure(several)
    assert drawn.width == 4 * (320 + 24) - 24 + 2 * 32
    assert drawn.height > 1.8 * report.figure(several[:3]).height


def a_caption(count=3):
    """A caption of so many words, explained word by word."""
    words = [f"word{i}" for i in range(count)]
    told = [{"word": word, "position": i, "caption": 0} for i, word in enumerate(words)]
    return make(
        target=[" ".join([*words[:i], f"[{word}]"]) for i, word in enumerate(words)],
        score=np.ones(count),
        image=np.ones((count, 4, 4)),
        text=np.ones((count, count)),
        tokens=[words] * count,
        pixels=[np.zeros((8, 8, 3), np.uint8)] * count,
        report={"examples": told},
    )


def test_a_caption_is_drawn_once_with_a_small_map_per_word():
    one = a_caption()
    (view,) = views(columns(one))
    assert [row[0].word for row in view] == ["word0", "word1", "word2"]
    assert [len(row[0].words) for row in view] == [0, 1, 2]
    drawn = report.drawing(one)
    assert drawn.count("<image") == 1 + 3
    assert report.figure(a_caption(20)).height < 2 * report.figure(a_caption(10)).height


def test_more_than_24_examples_are_an_overview():
    def many(count):
        return bare(
            np.ones((2, 2)),
            signed=False,
            target=["x"] * count,
            score=np.ones(count),
            image=np.ones((count, 2, 2)),
        )

    assert "jaxrel batch" not in report.drawing(many(24))
    drawn = report.drawing(many(25))
    assert "An overview of 25 examples, by m." in drawn
    assert "jaxrel batch explains many images" in drawn
    assert drawn.count("<image") == 25
    assert report.drawing(many(241)).count("<image") == 240


def test_a_pdf_has_pages_of_the_shape_of_a4():
    one = report.pages(make())
    assert one.startswith(b"%PDF-")
    assert one.count(b"/Type /Page\n") == 1
    several = report.pages([make(method=f"method {i}") for i in range(15)])
    assert several.count(b"/Type /Page\n") == 3
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", one)
    width, height = map(float, box.groups())
    assert width == pytest.approx(8.27 * 72, rel=0.01)
    assert height == pytest.approx(11.69 * 72, rel=0.01)


def test_letters_that_no_font_draws_are_named(monkeypatch):
    monkeypatch.setattr(fonts, "_OTHERS", ())
    one = make(target=["a 日", "a blue square"])
    assert "No font on this machine draws 日" in report.drawing(one)
    assert "No font" not in report.drawing(make())


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
    explanation.save(tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert int(root.get("width")) == drawn.width
    assert report.page(explanation).startswith("<!DOCTYPE html>")


def test_zero_relevance_says_so():
    assert texts.ticks(0.0, signed=True) == ["0 everywhere"]
    assert texts.ticks(0.0342, signed=True) == ["-0.0342", "0", "0.0342"]
    assert texts.ticks(2.0, signed=False) == ["0", "2"]


def test_a_report_draws_whatever_has_a_column():
    panel = Panel("mine", "x", 1.0, signed=False, map=np.ones((1, 2)), words=[("a", 0.5)])

    class Mine:
        def column(self):
            return Column((panel,), model="my model", report={"seconds": 2.0})

    same = bare([[1.0, 1.0]], signed=False, method="mine", text=[[0.5]], tokens=[["a"]])
    same = dataclasses.replace(same, model="my model", report={"seconds": 2.0})
    assert report.page(Mine()) == report.page([Mine()]) == report.page(same)
    assert png(report.figure(Mine())) == png(report.figure(same))


def test_scores_are_told_by_method_where_they_differ():
    same = [make(), make(method="raw")]
    assert texts.score(rows(columns(same))[0]) == "24.312"
    other = [make(), make(method="raw", score=[25.0, 0.0])]
    assert texts.score(rows(columns(other))[0]) == "24.312 (weighted), 25 (raw)"


# Words that are flagged


def judged(value, **changes):
    """The word of the first example is judged."""
    flag = Flag("<circle>", "mean", value, 0.5, 0.75, "AUC 0.80 & more")
    return make(target=["a red [<circle>]", "a [blue]"], flags=[flag, None], **changes)


def test_a_flagged_target_in_other_words_is_marked_whole():
    one = make(flags=[Flag("circle", "mean", 0.25, 0.5, 1.0, ""), None])
    first, second = rows(columns(one))
    assert texts.target(first) == ("", "a red circle")
    assert texts.target(second) == ("a blue square", "")


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


def test_empty_lists_and_narrow_cells_are_refused():
    for draw in (report.figure, report.page, report.fragment):
        with pytest.raises(ValueError, match="at least one explanation, got an empty list"):
            draw([])
    with pytest.raises(ValueError, match="cell is 20 pixels; words need at least 80"):
        report.figure(make(), cell=20)


def test_save_refuses_other_suffixes_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"the suffix is '\.gif'; use \.png .* or \.html"):
        report.save(make(), tmp_path / "a.gif")
    with pytest.raises(ValueError, match="at least one"):
        report.save([], tmp_path / "new" / "a.png")
    assert os.listdir(tmp_path) == []


def test_save_writes_several_side_by_side(tmp_path):
    explanations = [make(), make(method="raw")]
    report.save(explanations, tmp_path / "a.PNG")
    report.save(explanations, str(tmp_path / "a.html"))
    assert (tmp_path / "a.PNG").read_bytes() == png(report.figure(explanations))
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == report.page(explanations)
