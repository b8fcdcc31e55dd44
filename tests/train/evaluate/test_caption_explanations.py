"""`captioner/1`: explanations whose truth is known, naive references, and real data's words."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image

from jaxrel.metrics import pointing_game, relevance_mass_accuracy
from jaxrel.metrics.correctness import correctness
from jaxrel.metrics.words import COCO_FREQUENT
from jaxrel.report import plots
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.evaluate import caption_explanations, explained_words
from jaxrel.train.evaluate.caption_explanation_tables import markdown, save
from jaxrel.train.evaluate.caption_explanations import (
    METHODS,
    RANDOM,
    WORDS_EXPLAINED,
    Settings,
    evaluate,
)
from jaxrel.train.evaluate.captioned_images import STOP, ShapesImages, Word, open_images
from tests.train.folders import (
    CAPTIONS,
    INSTANCES,
    karpathy,
    write_image,
    write_json,
)
from tests.zoo.lights import CONTEXT, QUICK, SIDE, Lights, captioner, judge_lights


@pytest.fixture(scope="module")
def lights(quick_compile):
    return judge_lights(batch=8)


def test_relevance_that_is_the_object_is_perfectly_localised(lights):
    found = lights["localisation"]
    true = found["methods"]["lrp"]
    for one in (true["pointing"], true["mass"]):
        assert (one["mean"], one["low"], one["high"]) == pytest.approx((1, 1, 1))
    # Also where the threshold leaves only the largest values: the rectangle has one brightness.
    assert true["correctness"]["mean"] == pytest.approx([1] * 10)
    none = found["methods"]["gradient"]
    assert none["mass"]["mean"] == 0
    assert none["pointing"]["mean"] < 0.2
    attention = found["methods"]["attention"]
    assert attention["mass"]["mean"] == pytest.approx(found["area"]["mean"], rel=1e-5)
    less = true["difference"]["attention"]
    assert less["mass"]["mean"] == pytest.approx(1 - found["area"]["mean"], rel=1e-5)
    assert found["images"] == 20


def test_relevance_that_is_higher_for_true_words_tells_them(lights):
    found = lights["hallucination"]["thing"]
    methods = found["methods"]
    for statistic in ("mean", "max", "mean_positive"):
        # Rectangles have different sizes, so that means overlap; their brightness does not.
        area = methods["lrp"]["auc"][statistic]["mean"]
        assert area == 1 if statistic != "mean" else area > 0.5
    chosen = methods["lrp"]["chosen"]
    # The light is 128 of 255 in the others.
    assert 0.51 < chosen["threshold"] <= 1
    shares = ("auc", "sensitivity", "specificity", "precision")
    assert [chosen[x]["mean"] for x in shares] == [1, 1, 1, 1]
    assert chosen["images"] == 10
    assert methods["lrp"]["difference"]["attention"]["auc"]["max"]["mean"] == 0.5
    assert methods["lrp"]["difference"]["attention"]["chosen"]["low"] > 0
    assert methods["attention"]["auc"]["mean"]["mean"] == 0.5
    assert methods["attention"]["difference"] == {}
    assert methods["1 - sentinel"]["auc"].keys() == {"1 - sentinel"}
    assert 0 <= methods["probability"]["chosen"]["auc"]["mean"] <= 1


def test_random_relevance_is_at_chance(lights):
    place = lights["localisation"]
    found, area = place["methods"][RANDOM], place["area"]["mean"]
    # Each word's map points to a pixel of its own: within four deviations of a binomial share.
    deviation = (area * (1 - area) / place["cases"]) ** 0.5
    assert abs(found["pointing"]["mean"] - area) < 4 * deviation
    # 1024 pixels in each of some hundred maps.
    assert found["mass"]["mean"] == pytest.approx(area, rel=0.02)
    told = lights["hallucination"]["thing"]
    # The deviation of an area by chance (Mann and Whitney 1947).
    true, false = told["true"], told["hallucinated"]
    deviation = ((true + false + 1) / (12 * true * false)) ** 0.5
    assert abs(told["methods"][RANDOM]["auc"]["mean"]["mean"] - 0.5) < 4 * deviation


def test_things_named_are_hallucinated_as_the_images_say(lights):
    found = lights["captions"]
    # 10 of 20 images are dim.
    assert found["CHAIR_s"]["mean"] == 0.5
    assert found["words"].keys() == {"a", "star"}
    json.dumps(lights, allow_nan=False)


# ---- the pieces, against naive ones


def random_maps(*shape):
    return np.random.default_rng(0).normal(size=(*shape, SIDE, SIDE)).astype(np.float32)


def test_shares_on_objects_are_those_of_the_metrics():
    maps, images = random_maps(2, 3, 4), Lights(3)
    masks = images.masks_of.copy()
    masks[:, 1] = np.roll(masks[:, 0], 9, axis=-1)
    named = np.zeros((3, 4, 2), bool)
    named[:, :2, 0] = named[:, 1:, 1] = True
    found = explained_words.on_objects(*map(jnp.asarray, (maps, named, masks)), QUICK)
    for m, i, w in np.ndindex(2, 3, 4):
        objects = masks[i] & named[i, w, :, None, None]
        union = objects.any(0)[None]
        one = maps[m, i, w]
        # float32 sums of 1024 values.
        assert found["mass"][i, w, m] == pytest.approx(
            relevance_mass_accuracy(one[None], union)[0], rel=1e-4
        )
        assert bool(found["pointing"][i, w, m]) == pointing_game(one[None], union)[0]
        np.testing.assert_allclose(
            found["correctness"][i, w, m], correctness(one[..., None], objects), rtol=1e-4
        )
        assert found["area"][i, w] == pytest.approx(union.mean())


@pytest.fixture(scope="module")
def inputs():
    images = [Shapes(size=SIDE).scene("test", i).image for i in range(2)]
    texts = ["a small red circle above a blue star", "two rings and a cross"]
    return captioner().prepare(image=images, text=texts)


POSITIONS = jnp.array([[8, 4, 0], [5, 1, 3]])
FORWARD = jax.jit(lambda model, inputs: jax.nn.softmax(model(inputs)))
WRITE = jax.jit(lambda model, image: model.generate(image))


def padded(ids):
    return jnp.array([[*ids, *[0] * (CONTEXT - len(ids))]])


def test_words_are_taken_away_as_a_person_would(inputs):
    model = captioner()
    relevance = np.random.default_rng(0).normal(size=(2, 2, 3, CONTEXT)).astype(np.float32)
    taken = jax.jit(functools.partial(explained_words.without_words, settings=QUICK))
    features = jax.jit(lambda model, image: model.encode(image))(model, inputs["image"])
    found = taken(model, features, inputs["text"], POSITIONS, relevance)
    text = np.asarray(inputs["text"])
    for b, w, m in np.ndindex(2, 3, 2):
        position = int(POSITIONS[b, w])
        if position:
            places = sorted(range(1, position), key=lambda k: -relevance[m, b, w, k])
            kept = [text[b, k] for k in range(position) if k not in places[:3]]
            one = {"features": features[b : b + 1], "text": padded(kept)}
            expected = float(FORWARD(model, one)[0, len(kept) - 1, text[b, position]])
            # float32 in a batch of another size.
            assert found[b, w, m] == pytest.approx(expected, rel=1e-4)


def test_patches_are_taken_away_as_a_person_would(inputs):
    model, maps = captioner(), random_maps(2, 2, 3)
    settings = Settings(patch=1 / 4, area=5 / 16)
    assert settings.patches(SIDE) == (8, 5)
    taken = functools.partial(explained_words.without_patches, settings=settings, beams=1)
    found = jax.jit(taken)(model, inputs, POSITIONS, maps)
    for b, w, m in np.ndindex(2, 3, 2):
        position = int(POSITIONS[b, w])
        if position:
            cells = maps[m, b, w].reshape(4, 8, 4, 8).sum((1, 3))
            image = np.array(inputs["image"][b])
            for k in np.argsort(-cells, axis=None)[:5]:
                row, column = np.unravel_index(k, cells.shape)
                image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
            seen, word = jnp.asarray(image)[None], inputs["text"][b, position]
            ids = np.asarray(WRITE(model, seen))[0]
            assert bool(found["there"][b, w, m]) == (word in ids)
            if word in ids:
                first = ids.tolist().index(word)
                found_there = FORWARD(model, {"image": seen, "text": padded(ids)})
                expected = float(found_there[0, first - 1, word])
                assert found["without_patches"][b, w, m] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("side", "patch", "count"), [(224, 8, 20), (448, 16, 20), (64, 2, 26), (32, 1, 26)]
)
def test_patches_are_the_papers_share_of_the_image(side, patch, count):
    assert Settings().patches(side) == (patch, count)
    # 20 of 28 x 28 patches, to one patch.
    assert count * patch**2 / side**2 == pytest.approx(20 / 784, abs=(patch / side) ** 2)


# ---- whole runs


@pytest.fixture(scope="module")
def every_method(quick_compile):
    return evaluate(captioner(), scenes=6, batch=4, words=4, data_seed=3, settings=QUICK)


def test_all_methods_are_judged(every_method):
    result = every_method
    assert (result["protocol"], result["data"], result["split"]) == (
        "captioner/1",
        "Shapes",
        "biased_test",
    )
    assert (result["images"], result["data_seed"]) == (6, 3)
    assert set(result["patches"]) == set(result["hallucination"]) == {"shape", "colour"}
    assert set(result["words"]) == {"shape", "colour", STOP}
    assert result["settings"]["patch_pixels"] == 1
    for section, methods in (("patches", METHODS), ("words", WORDS_EXPLAINED)):
        judged = [one for one in result[section].values() if one]
        assert judged
        for one in judged:
            assert set(one["methods"]) == set(methods)
            assert set(one["methods"]["lrp"]["difference"]) <= {RANDOM, "attention"}
    patches = next(one for one in result["patches"].values() if one)
    assert set(patches["methods"]["lrp"]["difference"]) == {RANDOM, "attention"}
    assert 0 <= patches["methods"]["lrp"]["disappeared"]["mean"] <= 1
    json.dumps(result, allow_nan=False)


def test_files(lights, every_method, tmp_path):
    files = save({**lights, "model": "my-model"}, tmp_path / "new")
    names = [file.name.removeprefix("captioner-lights") for file in files]
    assert names == [
        ".json",
        ".md",
        "-patches.png",
        "-words.png",
        "-pointing.png",
        "-hallucination.png",
        "-correctness.png",
    ]
    read = json.loads(files[0].read_text())
    text = files[1].read_text()
    assert text == markdown(read)
    assert "# Explanations of my-model" in text
    assert "| lrp | 1.000 [1.000, 1.000] |" in text
    for file in files[2:]:
        image = np.asarray(Image.open(file).convert("RGB"))
        assert image.std() > 10
    assert "biased_test" in markdown(every_method)


def test_the_size_of_a_batch_does_not_matter(lights):
    runs = [jax.tree_util.tree_leaves_with_path(run) for run in (lights, judge_lights(batch=11))]
    pairs = [
        (first, second)
        for (path, first), (_, second) in zip(*runs, strict=True)
        # Whether a drop of about 0 is at least 0 is a matter of rounding.
        if isinstance(first, float) and "share_" not in jax.tree_util.keystr(path)
    ]
    assert len(pairs) > 500
    # float32 in batches of other sizes.
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-3, atol=1e-5)


def captions_are(patch, captions):
    """Let the model write these captions."""

    def write(model, images, batch, beams):
        given = [captions[i % len(captions)] for i in range(len(images))]
        return model.processor.text(given, CONTEXT), [one.split() for one in given]

    patch.setattr(caption_explanations, "caption_images", write)


def test_captions_that_name_nothing_leave_nothing_to_judge(monkeypatch, tmp_path):
    captions_are(monkeypatch, ["there is a large object"])
    result = evaluate(captioner(), scenes=3, settings=QUICK)
    assert result["localisation"] is None
    assert result["patches"] == result["hallucination"] == {"shape": None, "colour": None}
    assert result["words"] == {"shape": None, "colour": None, STOP: None}
    assert result["captions"]["CHAIR_i"] is None
    assert result["captions"]["mentions"] == 0
    text = markdown(result)
    assert "The captions name no object whose place is known." in text
    assert "No word to ask about (shape)." in text
    assert "No area (shape): it needs true and hallucinated words." in text
    assert [file.suffix for file in save(result, tmp_path)] == [".json", ".md"]


def test_true_captions_of_shapes_hallucinate_nothing(monkeypatch):
    scenes = [Shapes(size=SIDE).scene("biased_test", i) for i in range(8)]
    texts = [min((c.text.replace(",", "") for c in s.captions), key=len) for s in scenes]
    captions_are(monkeypatch, texts)
    result = evaluate(captioner(), scenes=8, methods=(RANDOM,), words=2, settings=QUICK)
    assert result["captions"]["CHAIR_s"]["mean"] == 0
    assert result["captions"]["mentions"] == result["localisation"]["cases"] > 0
    assert result["hallucination"] == {"shape": None, "colour": None}
    # CIDEr-D sees that each caption is one of the references.
    assert result["captions"]["CIDEr-D"]["mean"] > 1


# ---- what words mean


def scene_of(*objects):
    scene = next(s for i in range(99) if len((s := Shapes().scene("test", i)).objects) == 4)
    changed = zip(scene.objects, objects, strict=False)
    return replace(scene, objects=tuple(replace(a, **b) for a, b in changed))


SCENE = scene_of(
    {"shape": "circle", "colour": "red", "size": "large"},
    {"shape": "circle", "colour": "blue", "size": "small"},
    {"shape": "star", "colour": "red", "size": "small"},
)


@pytest.mark.parametrize(
    ("caption", "expected"),
    {
        "a red circle": [("colour", "red", True, ()), ("shape", "circle", True, (0,))],
        "two circles": [("shape", "circle", True, (0, 1))],
        "a ring and a small star": [("shape", "ring", False, ()), ("shape", "star", True, (2,))],
        # There are blue things and stars, but no blue star: the shape is there.
        "a blue star": [("colour", "blue", False, ()), ("shape", "star", True, ())],
        "a blue object above it": [("colour", "blue", True, ())],
        # What is said ends at "and"; of two colours the last counts.
        "a red and a green blue circle": [
            ("colour", "blue", True, ()),
            ("shape", "circle", True, (1,)),
        ],
        "no circle": [],
        " circle  a": [("shape", "circle", True, (0, 1))],
    }.items(),
)
def test_words_about_shapes(caption, expected):
    words = caption.split(" ")
    found = ShapesImages((SCENE,)).words(0, words)
    assert [(one.group, one.name, one.true, one.objects) for one in found] == expected
    for one in found:
        assert words[one.position - 1] in (one.name, f"{one.name}s")


def test_masks_of_shapes_are_filled_up():
    masks = ShapesImages((SCENE,)).masks(0)
    assert masks.shape == (5, 64, 64)
    np.testing.assert_array_equal(masks.any((1, 2)), [True] * 3 + [False] * 2)


@pytest.fixture
def coco(tmp_path):
    write_json(tmp_path / "annotations/captions_val2017.json", CAPTIONS)
    write_json(tmp_path / "annotations/instances_val2017.json", INSTANCES)
    for i, image in enumerate(CAPTIONS["images"]):
        write_image(tmp_path / "val2017" / image["file_name"], grey=50 * i)
    return tmp_path


REAL = ("a", "woman", "man", "bear", "bears", "chair", "dog", "with", "tree", "and")


def test_words_about_coco(coco):
    images = open_images(captioner(words=REAL, side=16), str(coco), split=None, scenes=9)
    assert (len(images), images.name, images.frequent) == (3, "COCO", COCO_FREQUENT)
    # The first image has a chair and people; its captions a woman, a room and chairs.
    caption = "a man with a bear and chair".split()
    assert images.words(0, caption) == [
        Word(2, "person", "object", True, (1,)),
        Word(5, "bear", "object", False, ()),
        Word(7, "chair", "object", True, (0,)),
    ]
    masks = images.masks(0)
    # The middle of 12 x 8 pixels, from column 2, is seen at twice its size: the chair's box, from
    # 1.5 to 4.5 and from 2 to 6.25, ends at column 5 and row 12.
    expected = np.zeros((16, 16), bool)
    expected[4:12, :5] = True
    np.testing.assert_array_equal(masks[0], expected)
    assert masks[1].all()
    assert not images.masks(2).any()
    # A bedroom without boxes.
    assert images.words(2, ["chair"]) == [Word(1, "chair", "object", False, ())]
    # In the references as a plural, and without a box that is seen.
    record = images.annotated[139]
    record["boxes"][0] = [0, 0, 1, 8]
    images = replace(images)
    assert images.words(0, ["chair"]) == [Word(1, "chair", "object", True, ())]


def test_coco_is_judged(coco, monkeypatch, tmp_path):
    captions_are(monkeypatch, ["a woman and a bear and a dog", "a man with a bear"])
    model = captioner(words=REAL, side=16)
    result = evaluate(
        model, data=str(coco), scenes=3, methods=(RANDOM,), words=3, beams=2, settings=QUICK
    )
    assert (result["split"], result["images"]) == ("val2017", 3)
    assert "data_seed" not in result
    assert result["localisation"]["cases"] == 2
    # Two of eight things are there.
    assert result["captions"]["CHAIR_i"]["mean"] == pytest.approx(6 / 8)
    assert result["hallucination"]["object"]["true"] == 2
    assert save(result, tmp_path / "out")[0].name == "captioner-coco.json"
    assert "3 images with the model's own captions (2 beams)" in markdown(result)


def test_karpathys_splits_have_the_boxes_of_the_official_ones(coco):
    split = karpathy("val", "test")
    write_json(coco / "dataset_coco.json", split)
    for image in split["images"]:
        write_image(coco / image["filepath"] / image["filename"])
    number = {**INSTANCES["images"][0], "id": 501}
    box = {**INSTANCES["annotations"][0], "image_id": 501}
    document = {**INSTANCES, "images": [number], "annotations": [box]}
    write_json(coco / "annotations/instances_val2014.json", document)
    model = captioner(words=REAL, side=16)
    images = open_images(model, str(coco), split="test", scenes=9)
    assert len(images) == 1
    assert [w.name for w in images.words(0, ["dog", "chair"]) if w.true] == ["dog", "chair"]


def test_flickr30k_has_words_and_no_boxes(tmp_path):
    split = karpathy("test", "test", coco=False)
    write_json(tmp_path / "dataset_flickr30k.json", split)
    for image in split["images"]:
        write_image(tmp_path / "flickr30k-images" / image["filename"])
    images = open_images(captioner(words=REAL, side=16), str(tmp_path), split=None, scenes=9)
    assert (len(images), images.name, len(images.frequent)) == (2, "Flickr30k", 20)
    assert images.words(1, ["dogs", "man"]) == [
        Word(1, "dog", "object", True, ()),
        Word(2, "person", "object", False, ()),
    ]
    assert images.masks(1).shape == (1, 16, 16)
    assert images.image(0).shape == (8, 12, 3)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenes": 0}, "captioner: scenes must be at least 1, got 0"),
        ({"batch": 0}, "captioner: batch must be at least 1, got 0"),
        ({"words": -1}, "captioner: words must be at least 1, got -1"),
        ({"beams": 0}, "captioner: beams must be at least 1, got 0"),
        ({"methods": ("lrp", "rollout")}, "unknown method 'rollout'; there are lrp, gradient"),
        ({"methods": ()}, "no method given; there are"),
        ({"split": "dev"}, "split is 'dev'; expected one of"),
    ],
)
def test_bad_input_fails_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(captioner(), **options)


def test_a_model_of_regions_has_no_maps():
    model = captioner(encoder=None, regions=(4, 6))
    with pytest.raises(ValueError, match="reads features of regions and not images"):
        evaluate(model)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions_val2017\.json"):
        evaluate(captioner(), data=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0.0}, "patch must be a share, got 0.0"),
        ({"area": 1.0}, "area must be a share, got 1.0"),
        ({"removed": 0}, "removed must be at least 1, got 0"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_results_and_plots_of_something_else(tmp_path):
    for use in (markdown, lambda result: save(result, tmp_path)):
        with pytest.raises(ValueError, match=r"'captioner/1', .* got protocol 'perturbation/1'"):
            use({"protocol": "perturbation/1"})
    with pytest.raises(ValueError, match=r"cannot save bars as 'a.pdf': .* ends in \.png"):
        plots.bars({"a": {}}, "a.pdf")
    with pytest.raises(ValueError, match="bars: there is nothing to draw"):
        plots.bars({}, "a.png")
    with pytest.raises(ValueError, match="lines: there is nothing to draw"):
        plots.lines({}, [0.0], "a.png", x="", y="")
