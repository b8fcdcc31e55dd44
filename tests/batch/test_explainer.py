"""`Explainer`: rows of any form in, rows out; a bad row is a row with its error."""

import io

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image

import jaxrel
from jaxrel import attention
from jaxrel.batch import COLUMNS, Explainer, of_function
from jaxrel.models import Layout, Stream
from tests.zoo.captioners import captioner
from tests.zoo.clipmappers import random_mapper
from tests.zoo.clips import small_clip

TEXTS = ("a red circle", "blue square", "a circle above a square", "red", "a blue circle")


def images(count):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (20, 18, 3), np.uint8) for _ in range(count)]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def explainer(clip):
    return Explainer(clip, "equal", batch_size=2)


@pytest.fixture(scope="module")
def wanted(clip):
    return jaxrel.explain(clip, image=images(5), text=list(TEXTS), method="equal", batch_size=2)


def test_rows_are_those_of_explain(explainer, wanted):
    rows = explainer({"id": list("vwxyz"), "image": images(5), "text": TEXTS})
    assert tuple(rows) == COLUMNS
    assert rows["id"] == list("vwxyz")
    assert rows["text"] == list(TEXTS)
    assert rows["target"] == list(wanted.target)
    assert set(rows["error"]) == {None}
    np.testing.assert_array_equal(rows["score"], wanted.score)
    np.testing.assert_array_equal(rows["image_relevance"], wanted.image)
    for i, (tokens, relevance) in enumerate(
        zip(rows["tokens"], rows["text_relevance"], strict=True)
    ):
        assert list(zip(tokens, relevance, strict=True)) == wanted.words(i)


def test_forms(explainer, tmp_path):
    seen = images(3)
    path = tmp_path / "a.png"
    path.write_bytes(png(seen[0]))
    given = [str(path), png(seen[1]), {"bytes": png(seen[2]), "path": "c.png"}]
    rows = [{"image": a, "text": b, "other": 1} for a, b in zip(given, TEXTS, strict=False)]
    of_list = explainer(rows)
    assert [row["image"] for row in of_list] == [str(path), None, "c.png"]
    assert [row["id"] for row in of_list] == ["0", "1", "2"]
    plain = explainer({"image": seen, "text": TEXTS[:3]})
    np.testing.assert_array_equal([row["score"] for row in of_list], plain["score"])

    pandas, pa = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = explainer(pandas.DataFrame({"image": given[:2], "text": TEXTS[:2]}))
    assert isinstance(frame, pandas.DataFrame)
    np.testing.assert_array_equal(frame.score, plain["score"][:2])
    table = explainer(pa.table({"image": [png(x) for x in seen], "text": TEXTS[:3]}))
    assert table.schema.equals(jaxrel.batch.schema({(2, 2)}))
    np.testing.assert_array_equal(table["score"].to_numpy(), np.float32(plain["score"]))


def test_a_bad_row_stops_nothing(explainer, wanted):
    given = images(5)
    given[1] = b"no image"
    given[3] = None
    texts = [*TEXTS[:4], "word " * 50]
    rows = explainer({"image": given, "text": texts})
    assert rows["id"] == ["0", "1", "2", "3", "4"]
    assert [error is None for error in rows["error"]] == [True, False, True, False, False]
    assert "is not an image that can be read" in rows["error"][1]
    assert rows["error"][3] == "the row has no image"
    assert "at most 8" in rows["error"][4] or "knows none" in rows["error"][4]
    for i in (0, 2):
        np.testing.assert_allclose(rows["score"][i], wanted.score[i], rtol=1e-5)
        np.testing.assert_allclose(rows["image_relevance"][i], wanted.image[i], rtol=1e-4)
    assert rows["image_relevance"][1] is None
    with pytest.raises(ValueError, match="is not an image that can be read"):
        Explainer(explainer.model, "equal", batch_size=2, strict=True)(
            {"image": given, "text": texts}
        )


def test_relevance_that_is_not_finite_is_a_row_with_an_error(clip):
    class Broken:
        """The score of dark images is not a number."""

        layout = clip.layout

        def __getattr__(self, name):
            return getattr(clip, name)

        def score(self, inputs):
            dark = inputs["image"].mean((1, 2, 3)) < -0.9
            return clip.score(inputs) * jnp.where(dark, jnp.nan, 1)

    jax.tree_util.register_static(Broken)
    seen = images(3)
    seen[1] = np.zeros_like(seen[1])
    rows = Explainer(Broken(), "equal", batch_size=4)({"image": seen, "text": TEXTS[:3]})
    assert [error is None for error in rows["error"]] == [True, False, True]
    assert "NaN or infinity" in rows["error"][1]


def test_methods_and_words_follow_their_row():
    model = random_mapper("caption", layers=1)
    explainer = Explainer(model, ("equal", "rollout"), batch_size=2)
    texts = ["a red square", "red circle", "a"]
    rows = explainer({"image": images(3), "text": texts})
    counts = [3, 2, 1]
    assert rows["id"] == [str(i) for i, n in enumerate(counts) for _ in range(2 * n)]
    assert rows["method"] == [m for n in counts for m in ["equal"] * n + ["rollout"] * n]
    assert rows["row"] == [i for n in counts for _ in range(2) for i in range(n)]
    last = explainer({"image": images(3), "text": texts, "target": [2, 1, 1]})
    assert last["target"] == ["a [red]"] * 2 + ["[red]"] * 2 + ["[a]"] * 2


def test_answers_by_row():
    model = random_mapper("vqa", layers=1)
    answers = model.config.answers
    rows = {"image": images(3), "text": ["a red square"] * 3, "target": [answers[1], None, "cow"]}
    found = Explainer(model, "equal", batch_size=2)(rows)
    assert found["target"][0].startswith(answers[1])
    assert found["error"][:2] == [None, None]
    assert "this model has no answer 'cow'" in found["error"][2]
    mine = jaxrel.explain(model, image=images(3)[1], text="a red square", method="equal")
    assert found["target"][1] == mine.target[0]


def test_a_captioner_writes_its_captions():
    model = captioner("gridtd")
    first, second = (
        np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8) for i in range(2)
    )
    rows = Explainer(model, "grad_cam", batch_size=2)({"image": [first, second, first]})
    # This random model has nothing to say of the second image.
    assert rows["error"] == [None, "the caption of image 0 has no words", None]
    rows = Explainer(model, "grad_cam", batch_size=2)({"image": [first, first]})
    wanted = jaxrel.explain(model, image=[first, first], method="grad_cam", batch_size=2)
    assert rows["target"] == list(wanted.target)
    np.testing.assert_array_equal(rows["image_relevance"], wanted.image)


@pytest.mark.devices(8)
def test_a_mesh_changes_nothing(clip, wanted):
    mesh = jax.make_mesh((4,), ("data",))
    shared = Explainer(clip, "equal", batch_size=4, mesh=mesh)
    rows = shared({"image": images(5), "text": TEXTS})
    np.testing.assert_allclose(rows["score"], wanted.score, rtol=1e-5)
    np.testing.assert_allclose(rows["image_relevance"], wanted.image, rtol=1e-4, atol=1e-6)


def test_a_function_of_ones_own():
    """One head over four pixels of grey; the relevance is that of `attention.relevance`."""

    def prepare(seen, _texts):
        grey = np.stack([np.asarray(one, np.float32).mean(-1)[:2, :2].ravel() for one in seen])
        return {"x": np.stack([grey / 256, 1 - grey / 256], -1)}

    layout = Layout((Stream("pixels", "image", 4, (2, 2), prefix=0),))

    def heads(inputs):
        x = inputs["x"]
        attn = jaxrel.tag(jax.nn.softmax(x @ x.mT, -1)[:, None], "pixels")
        return (attn @ x[:, None])[:, 0, 0].sum(-1)

    model = of_function(heads, layout=layout, prepare=prepare)
    seen = images(3)
    rows = Explainer(model, "equal", batch_size=2)({"image": seen})
    inputs = prepare(seen, None)
    score, found = attention.value_and_relevance(heads, method="equal", attention="pixels")(inputs)
    np.testing.assert_allclose(rows["score"], score, rtol=1e-6)
    maps = np.stack(rows["image_relevance"]).reshape(3, 4)
    np.testing.assert_allclose(maps, found, rtol=1e-6)


def test_tables_of_a_job_have_one_schema(explainer):
    """Also where no row could be explained, and where methods have maps of two sizes."""
    pa = pytest.importorskip("pyarrow")
    bad = explainer(pa.table({"image": [b"no image"], "text": ["red"]}))
    good = explainer(pa.table({"image": [png(images(1)[0])], "text": ["red"]}))
    assert bad.schema.equals(good.schema, check_metadata=True)
    assert bad["image_relevance"].to_pylist() == [None]

    model = captioner("gridtd")
    seen = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    both = Explainer(model, ("gradient", "grad_cam"), batch_size=1)
    table = both(pa.table({"image": [png(seen)]}))
    assert both.shapes == {(16, 16), model.layout.streams[0].grid}
    assert table.schema.equals(jaxrel.batch.schema(both.shapes))
    for one in jaxrel.explain(model, image=seen, method=("gradient", "grad_cam")):
        maps = [r["image_relevance"] for r in table.to_pylist() if r["method"] == one.method]
        np.testing.assert_array_equal(np.float32(maps), one.image.reshape(len(one), -1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"image": [], "text": []}, "there are no rows"),
        ({"picture": [1]}, "need a column 'image'.*they have picture"),
        ({"image": [1, 2], "text": ["a"]}, "columns differ in length"),
        ("a.png", "a dict of columns, a list of dicts"),
    ],
)
def test_rows_of_another_form(explainer, rows, message):
    with pytest.raises((TypeError, ValueError), match=message):
        explainer(rows)


def test_bad_settings_are_refused_at_once(clip):
    with pytest.raises(ValueError, match="unknown method 'lpr'"):
        Explainer(clip, "lpr")
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        Explainer(clip, batch_size=0)
    rows = {"image": images(1), "text": ["red"], "target": [0]}
    (error,) = Explainer(clip, "equal", batch_size=1)(rows)["error"]
    assert "compares each image with the text of its row" in error
