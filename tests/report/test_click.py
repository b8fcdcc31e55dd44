"""The page in a browser: every control, by mouse, keyboard and touch."""

import shutil

import numpy as np
import pytest

from jaxrel import report
from jaxrel.explanations.result import Explanation

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

WORDS = ["a", "red", "ring"]


def two_examples(method, scale):
    grid = np.zeros((2, 4, 4))
    grid[0, 0, 3], grid[0, 3, 0], grid[1, 1, 1] = 2.0, -1.0, 0.5
    return Explanation(
        target=["a red circle", "a star"],
        score=[3.0, 0.5],
        method=method,
        signed=True,
        image=scale * grid,
        text=[[0.1, 0.9], [0.2, -0.4]],
        tokens=[["red", "circle"], ["a", "star"]],
        pixels=np.full((2, 8, 8, 3), 200, np.uint8),
        report={"examples": [{"file": "<script>document.title='evil'</script>.png"}, {}]},
    )


def caption():
    told = [{"word": word, "position": i, "caption": 0} for i, word in enumerate(WORDS)]
    return Explanation(
        target=[" ".join([*WORDS[:i], f"[{word}]"]) for i, word in enumerate(WORDS)],
        score=[1.0, 2.0, 3.0],
        method="lrp",
        signed=True,
        image=np.arange(3 * 64 * 64).reshape(3, 64, 64) / 1000,
        text=np.arange(9).reshape(3, 3) / 10,
        tokens=[WORDS] * 3,
        pixels=np.zeros((3, 64, 64, 3), np.uint8),
        report={"examples": told},
    )


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Open explanations; the page may raise no error and load nothing."""
    contexts, trouble = [], []

    def opened(explanations, **options):
        file = tmp_path / "page.html"
        report.save(explanations, file)
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda one: trouble.append(one.text) if one.type == "error" else None)
        page.on("request", lambda request: trouble.append(request.url[:80]))
        page.goto(file.as_uri())
        trouble[:] = [one for one in trouble if not one.startswith(("file:", "data:image/"))]
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def pixel(page, place, index=0):
    """The colour of a map's canvas at a share of its width and height."""
    page.wait_for_timeout(150)  # maps are unpacked and drawn asynchronously
    script = """([index, x, y]) => {
      const canvas = document.querySelectorAll("canvas")[index];
      const at = [x * canvas.width, y * canvas.height].map(Math.floor);
      return [...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3);
    }"""
    return page.evaluate(script, [index, *place])


def test_methods_scale_sign_and_layout_are_chosen(opened):
    page = opened([two_examples("weighted", 1.0), two_examples("lrp", 0.1)])
    assert page.title() == "2 examples explained"
    assert page.locator(".still").first.is_hidden()
    assert page.locator("canvas").count() == 2
    # Each its own scale, as in the figure and without script.
    page.locator("[name=cells]").select_option("true")
    red = pixel(page, (0.9, 0.1))
    assert red == pixel(page, (0.4, 0.4), index=1) == [140, 16, 38]
    assert "Each map and each line of words has its own scale." in page.inner_text("header")
    # One scale for all: the second example's largest value is a quarter of the first's.
    page.locator("[name=scale]").select_option("common")
    assert pixel(page, (0.9, 0.1)) == red != pixel(page, (0.4, 0.4), index=1)
    assert "All maps of a method have one scale" in page.inner_text("header")
    page.locator("[name=scale]").select_option("own")
    # What speaks against is blue, and gone when only what speaks for is asked for.
    assert pixel(page, (0.1, 0.9))[2] > pixel(page, (0.1, 0.9))[0]
    page.locator("[name=sign]").select_option("for")
    assert pixel(page, (0.1, 0.9)) == [247, 247, 247]
    page.locator("[name=method]").select_option("1")
    assert page.locator(".live .ticks").first.inner_text().split()[-1] == "0.2"
    page.locator("[name=method]").select_option("all")
    assert page.locator("canvas").count() == 4
    page.locator("[name=layout]").select_option("beside")
    assert page.locator(".pair .stack").count() == 8
    page.locator("[name=layout]").select_option("over")
    page.locator("[name=opacity]").fill("20")
    assert page.locator("canvas").first.evaluate("canvas => canvas.style.opacity") == "0.2"


def test_values_are_told_on_hover_and_to_the_keyboard(opened):
    page = opened(two_examples("weighted", 1.0))
    map = page.locator(".map").first
    readout = page.locator("output").first
    box = map.bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    said = "row 1 of 4, column 4 of 4, upper right: 2 (100% of the largest)"
    assert said in readout.text_content()
    page.mouse.move(0, 0)
    map.focus()
    page.keyboard.press("ArrowLeft")
    assert "row 1 of 4, column 3 of 4, upper: 0 (0% of the largest)" in readout.text_content()
    assert map.get_attribute("role") == "application"
    label = "most relevant: upper right, word 'circle'"
    assert label in map.get_attribute("aria-label")
    assert label in page.locator("canvas").first.get_attribute("aria-label")
    assert page.locator("canvas").first.get_attribute("role") == "img"


@pytest.mark.parametrize("width", [390, 1200])
def test_telling_a_value_moves_nothing(opened, width):
    page = opened(caption(), viewport={"width": width, "height": 900})
    below = page.locator("section, details").first
    before = below.bounding_box()
    box = page.locator(".map").bounding_box()
    page.mouse.move(box["x"] + 0.99 * box["width"], box["y"] + 0.5 * box["height"])
    assert "row 33 of 64, column 64 of 64, right: " in page.locator("output").text_content()
    assert below.bounding_box() == before


def words_alone():
    return Explanation(
        target=["the first", "the second"],
        score=[1.0, 2.0],
        method="weighted",
        signed=False,
        text=[[0.1, 0.4], [0.2, 0.8]],
        tokens=[["red", "circle"]] * 2,
    )


@pytest.mark.parametrize("script", [True, False])
def test_words_alone_begin_at_the_left_and_have_a_scale(opened, script):
    page = opened(words_alone(), java_script_enabled=script)
    shown = page.locator(".live" if script else ".still").first
    left = page.locator("h1").bounding_box()["x"]
    assert shown.locator(".words").bounding_box()["x"] == left
    assert shown.locator(".bar").bounding_box()["x"] == left
    assert shown.locator(".ticks span").all_inner_texts() == ["0", "0.4"]
    opacity = shown.locator(".bar i").evaluate("bar => getComputedStyle(bar).opacity")
    assert opacity == "1"
    assert page.locator("[name=layout]").count() == 0


def test_one_rule_is_below_the_controls(opened):
    page = opened(two_examples("weighted", 1.0))
    widths = "one => getComputedStyle(one)"
    assert page.locator(".controls").evaluate(f"{widths}.borderBottomWidth") == "1px"
    rules = page.locator("article").evaluate_all(f"all => all.map({widths}.borderTopWidth)")
    assert rules == ["0px", "1px"]


def test_words_of_a_caption_are_buttons(opened):
    page = opened(caption())
    group = page.get_by_role("group", name="Words of the caption")
    buttons = group.get_by_role("button")
    assert buttons.all_inner_texts() == WORDS
    assert page.locator("canvas").count() == 1
    assert buttons.nth(0).get_attribute("aria-pressed") == "true"
    buttons.nth(2).click()
    assert buttons.nth(2).get_attribute("aria-pressed") == "true"
    assert buttons.nth(0).get_attribute("aria-pressed") == "false"
    assert "a red [ring]: score 3" in page.inner_text("article")
    assert page.get_by_role("listitem").all_inner_texts() == ["a 0.6", "red 0.7"]
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("listitem").all_inner_texts() == ["a 0.3"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_by_role("listitem").all_inner_texts() == ["a 0.6", "red 0.7"]


def test_on_a_small_touch_screen(opened):
    page = opened(caption(), viewport={"width": 360, "height": 700}, has_touch=True)
    page.get_by_role("button", name="ring").tap()
    assert page.get_by_role("listitem").count() == 2
    page.locator(".map").tap()
    assert "row 3" in page.locator("output").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    height = page.get_by_role("button", name="ring").bounding_box()["height"]
    assert height >= 24  # WCAG 2.2, 2.5.8


def test_without_script_maps_stand_still(opened):
    page = opened([caption(), two_examples("m", 1.0)][0], java_script_enabled=False)
    assert page.locator(".still svg[role=img]").count() == 1 + 3
    assert page.locator(".still svg[role=img]").nth(1).is_visible()
    assert page.locator(".live").is_hidden()


def test_text_of_users_runs_no_script(opened):
    page = opened(two_examples("<img src=x onerror=document.title='evil'>", 1.0))
    assert page.title() == "2 examples explained"
    assert "<script>document.title='evil'</script>.png" in page.locator(
        "article"
    ).first.inner_html().replace("&lt;", "<").replace("&gt;", ">")


def test_two_frames_of_a_notebook(browser):
    page = browser.new_page()
    page.set_content(caption()._repr_html_() + two_examples("m", 1.0)._repr_html_())
    first, second = page.frames[1:]
    first.get_by_role("button", name="ring").click()
    assert first.get_by_role("listitem").count() == 2
    assert second.locator("canvas").count() == 2
    page.wait_for_timeout(200)
    # The frame is as high as its page.
    height = page.locator("iframe").first.evaluate("frame => frame.offsetHeight")
    assert height == first.evaluate("document.querySelector('main').offsetHeight") + 24
    page.close()
