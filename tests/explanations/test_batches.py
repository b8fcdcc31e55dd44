"""Many examples: in batches of one size, with one program, as each by itself."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image

import jaxrel
from jaxrel import Explanation
from jaxrel.explanations.examples import batches, size_of_batches
from jaxrel.models import Processor
from tests.zoo.clipmappers import random_mapper
from tests.zoo.clips import small_clip

TEXTS = ("a red circle", "blue square", "a circle above a square", "red", "a blue circle")


def images(count):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (20, 18, 3), np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture
def programs():
    """How many programs JAX has lowered since; each number of rows would be another."""
    found = []

    def listen(event, _seconds, **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.clear_event_listeners()


def one_by_one(model, seen, texts, target=(), size=1, **options):
    targets = target or [None] * len(seen)
    parts = [
        jaxrel.explain(model, image=a, text=b, target=c, batch_size=size, **options)
        for a, b, c in zip(seen, texts, targets, strict=True)
    ]
    return [list(part) for part in zip(*parts, strict=True)]


def assert_alike(together, alone):
    """float32 of programs of two sizes, whose sums are in another order."""
    of_text = [one.text for one in alone]
    np.testing.assert_allclose(
        together.score, [one.score[0] for one in alone], rtol=1e-5, atol=1e-6
    )
    for found, parts in ((together.image, [x.image for x in alone]), (together.text, of_text)):
        wanted = np.concatenate(parts)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_a_batch_is_each_by_itself(clip):
    methods = ("weighted", "rollout")
    seen = images(5)
    together = jaxrel.explain(clip, image=seen, text=list(TEXTS), method=methods, batch_size=2)
    for found, alone in zip(together, one_by_one(clip, seen, TEXTS, method=methods), strict=True):
        assert len(found) == 5
        assert found.tokens == sum((one.tokens for one in alone), ())
        assert found.target == sum((one.target for one in alone), ())
        assert_alike(found, alone)


def test_the_account_of_lrp_counts_each_example_once(clip):
    seen, texts = images(4), list(TEXTS[:4])
    full = jaxrel.explain(clip, image=seen, text=texts, method="lrp", batch_size=4)
    filled = jaxrel.explain(clip, image=seen, text=texts, method="lrp", batch_size=3)
    assert filled.report["rules"] == full.report["rules"]
    assert filled.report["coverage"] == full.report["coverage"]
    account = full.report["relevance"]
    np.testing.assert_allclose(account["output"], full.score.sum(), rtol=1e-5)
    scale = np.abs(list(account.values())).max()
    for name, value in account.items():
        # Sums in float32 of four examples: a fifth would be a quarter of them.
        np.testing.assert_allclose(filled.report["relevance"][name], value, atol=1e-4 * scale)


def test_nothing_is_compiled_again(clip, programs):
    def run(model, count, **options):
        seen = images(count)
        return jaxrel.explain(model, image=seen, text="a red circle", batch_size=2, **options)

    run(clip, 2)
    first = len(programs)
    assert first
    run(clip, 3)
    run(clip, 7)
    run(small_clip(), 5)  # another object of the same values, processor and all
    assert len(programs) == first


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_rows_of_mappers(task):
    model = random_mapper(task, layers=1)
    seen = images(3)
    answers = model.config.answers[:3]
    asked = ["a red square", "a", "red circle"]
    target = answers if task == "vqa" else ()
    options = {"method": ("equal",)}
    (together,) = jaxrel.explain(
        model, image=seen, text=asked, target=target or None, batch_size=2, **options
    )
    # Each fills a batch of the same size.
    (alone,) = one_by_one(model, seen, asked, target, size=2, **options)
    assert together.target == sum((one.target for one in alone), ())
    assert_alike(
        together,
        [one[i] for one in alone for i in range(len(one))],
    )
    if task == "caption":
        counts = [len(one) for one in alone]
        assert together.report["example"] == list(
            itertools.chain.from_iterable([i] * n for i, n in enumerate(counts))
        )


def test_one_of_either_goes_with_all(clip):
    (image,) = images(1)
    many = jaxrel.explain(clip, image=image, text=list(TEXTS), method="equal", batch_size=2)
    assert [one.target[0] for one in many] == [*TEXTS]
    assert len(many.pixels) == 5
    chosen = jaxrel.explain(
        clip, image=images(3), text=list(TEXTS), target=[4, 0, 2], method="equal", batch_size=2
    )
    assert chosen.target == tuple(TEXTS[i] for i in (4, 0, 2))


@pytest.mark.parametrize(
    ("count", "asked", "size"), [(1, None, 1), (3, None, 4), (33, None, 32), (1, 8, 8), (9, 4, 4)]
)
def test_sizes(count, asked, size):
    assert size_of_batches(count, asked) == size


def test_the_last_batch_is_filled_up():
    parts = list(batches({"image": [1, 2, 3], "text": "x", "target": None}, 2))
    assert [part.image for part in parts] == [[1, 2], [3, 3]]
    assert [(part.start, part.count, part.text) for part in parts] == [(0, 2, "x"), (2, 1, "x")]


def test_bad_sizes_and_numbers(clip):
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        jaxrel.explain(clip, image=images(1), text="red", batch_size=0)
    with pytest.raises(ValueError, match="3 images and 2 texts make no pairs: give as many"):
        jaxrel.explain(clip, image=images(3), text=["red", "blue"])
    with pytest.raises(ValueError, match="target 5 names no text: there are 2"):
        jaxrel.explain(clip, image=images(1), text=["red", "blue"], target=5)


def test_a_bad_answer_is_refused_before_any_image_is_read():
    model = random_mapper("vqa", layers=1)
    unread = object()  # not an image: reading it would raise a TypeError
    answers = [model.config.answers[0]] * 40 + ["platypus"]
    with pytest.raises(ValueError, match="this model has no answer 'platypus'"):
        jaxrel.explain(model, image=[unread] * 41, text="a red square", target=answers)


def test_coverage_is_that_of_each_batch(clip):
    found = jaxrel.explain(clip, image=images(5), text="red", method="equal", batch_size=2)
    assert found.report["coverage"]["share"] == 1.0


def test_taken_apart_and_put_together(clip):
    whole = jaxrel.explain(clip, image=images(4), text="a red circle", method="lrp")
    again = Explanation.concatenate([whole[:1], whole[1:4]])
    np.testing.assert_array_equal(again.image, whole.image)
    np.testing.assert_array_equal(again.text, whole.text)
    assert (again.tokens, again.target, len(again.pixels)) == (whole.tokens, whole.target, 4)
    assert again.report["vision"] == whole.report["vision"]
    assert whole[2].report["vision"]["tokens"] == whole.report["vision"]["tokens"][2:3]
    others = jaxrel.explain(clip, image=images(1), text="red", method="equal", batch_size=2)
    with pytest.raises(ValueError, match="method is 'lrp' and 'equal'"):
        Explanation.concatenate([whole, others])
    with pytest.raises(ValueError, match="there is no explanation; give at least one"):
        Explanation.concatenate([])


def test_processors_are_equal_by_what_they_hold(clip):
    other = small_clip().processor
    assert clip.processor == other
    assert hash(clip.processor) == hash(other)
    assert clip.processor != Processor(clip.processor.tokenizer, None)
    assert clip.processor != Processor(None, clip.processor.images)


def test_a_tidy_table(clip):
    pytest.importorskip("pandas")
    found = jaxrel.explain(clip, image=images(2), text=list(TEXTS[:2]), method="equal")
    frame = found.to_dataframe()
    assert [*frame.columns] == (
        "example target score method modality token position row column relevance".split()
    )
    assert len(frame) == 2 * 4 + 3 + 2
    patches = frame[(frame.example == 1) & (frame.modality == "image")]
    np.testing.assert_array_equal(patches.relevance, found.image[1].ravel())
    assert patches[["row", "column"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    words = frame[(frame.example == 0) & (frame.modality == "text")]
    assert list(zip(words.token, words.relevance, strict=True)) == found.words(0)
    assert words.row.isna().all()
    assert set(frame.method) == {"equal"}


def test_a_parquet_file_is_read_by_others(clip, tmp_path):
    pandas = pytest.importorskip("pandas")
    found = jaxrel.explain(clip, image=images(2), text=list(TEXTS[:2]), method="equal")
    found.save(tmp_path / "x.parquet")
    frame = pandas.read_parquet(tmp_path / "x.parquet")
    np.testing.assert_array_equal(frame.score, found.score)
    np.testing.assert_array_equal(np.stack(frame.image_relevance), found.image.reshape(2, 4))
    assert [list(x) for x in frame.tokens] == [["a", "red", "circle"], ["blue", "square"]]
    np.testing.assert_array_equal(frame.text_relevance[1], found.text[1, 1:3])
    duckdb = pytest.importorskip("duckdb")
    (row,) = duckdb.sql(
        f"select tokens[3], image_relevance[4] from '{tmp_path}/x.parquet' where id = '0'"
    ).fetchall()
    assert row == ("circle", found.image[0, 1, 1])
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(tmp_path / "x.parquet")
    np.testing.assert_array_equal(table["image_relevance"][0].to_numpy(), found.image[0].ravel())


def test_a_choice_of_layers_and_heads_compiles_nothing_again(clip, programs):
    def run(layers, heads=None):
        options = {"method": ("weighted", "grad_cam"), "layers": layers, "heads": heads}
        return jaxrel.explain(clip, image=images(2), text="a red circle", **options)

    last, _ = run([-1])
    first = len(programs)
    both, _ = run([0, 1])
    run([0])
    assert len(programs) == first
    assert not np.allclose(last.image, both.image)
    with pytest.raises(ValueError, match="layers: 2 does not exist; there are 2 layers, 0 to 1"):
        run([2])
    with pytest.raises(ValueError, match="selects none"):
        run([])
