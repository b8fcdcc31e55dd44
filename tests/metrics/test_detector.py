"""Flagged words: what an evaluation chose is kept, checked, and applied to the same maps."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image

import jaxrel
from jaxrel import cli
from jaxrel.flags import Flag
from jaxrel.metrics import Detector, Interval
from jaxrel.metrics.detector import FILE, Criterion, WordGroup, fingerprint
from jaxrel.metrics.word_statistics import map_statistic, map_statistics
from jaxrel.models import CLIP
from jaxrel.models.captioner import Captioner
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.evaluate import caption_explanations, explained_words
from jaxrel.train.evaluate.captioned_images import ShapesImages
from jaxrel.train.evaluate.detector import detector
from tests.zoo.captioners import TEXTS, captioner
from tests.zoo.images import random_images
from tests.zoo.lights import QUICK, Lights, judge_lights
from tests.zoo.lights import captioner as captioner_of_lights

WHOLE = Interval(0.8, 0.7, 0.9)


def criterion(statistic="mean", threshold=0.5, **changes):
    fields = {name: WHOLE for name in ("auc", "sensitivity", "specificity", "precision")}
    return Criterion(statistic, threshold, **{**fields, "images": 64, **changes})


def made(methods=None, weights="0123", words=("circle", "square"), **changes):
    group = WordGroup(words, 0.25, {"lrp": criterion()} if methods is None else methods)
    fields = {"data": "Shapes", "split": "biased_test", "images": 128, "groups": {"shape": group}}
    return Detector(**{**fields, "weights": weights, **changes})


# ---- flags


def test_words_of_the_group_with_less_are_flagged():
    maps = np.array([[[0.0, 0.5]], [[0.5, 0.5]], [[9, 9]], [[0, 0]]], np.float32)
    found = made().flags("lrp", ["circle", "square", "a", "circle"], maps)
    assert [one and (one.word, one.value, one.flagged) for one in found] == [
        ("circle", 0.25, True),
        # The threshold itself is said to be true, as in `best_threshold`.
        ("square", 0.5, False),
        None,
        ("circle", 0.0, True),
    ]
    assert str(found[0]) == (
        "20% of words flagged like this one are true of the image, and 80% are not (25% of all "
        "such words; AUC 0.80 [0.70, 0.90], on 64 held-out images of Shapes, split biased_test); "
        "flagged by the mean of the map 0.25, below 0.5"
    )
    assert str(replace(found[0], precision=0.39)).startswith("61% of words flagged like this one")
    assert str(found[1]) == "not flagged: mean of the map 0.5, at least 0.5"
    assert "of Shapes);" in str(made(split="").flags("lrp", ["circle"], maps[:1])[0])


def test_nothing_is_said_of_other_words_and_by_other_methods():
    maps = np.zeros((1, 2, 2), np.float32)
    assert made().flags("lrp", ["a"], maps) == ()
    assert made().flags("attention", ["circle"], maps) == ()
    with pytest.warns(DeprecationWarning, match=r"Detector\.verdicts is now Detector\.flags"):
        assert made().verdicts("lrp", ["a"], maps) == ()


def test_groups_are_judged_each_by_its_own():
    groups = {
        "shape": WordGroup(("circle",), 0.1, {"lrp": criterion("quantile 0.25", 1.0)}),
        "colour": WordGroup(("red",), 0.2, {"lrp": criterion("max", 3.0)}),
    }
    maps = np.arange(5, dtype=np.float32).reshape(1, 1, 5).repeat(2, 0)
    found = made(groups=groups).flags("lrp", ["red", "circle"], maps)
    assert [(one.statistic, one.value) for one in found] == [("max", 4), ("quantile 0.25", 1)]


def test_one_statistic_is_that_of_all():
    maps = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    every = map_statistics(maps)
    for name in ("mean", "max", "quantile 0", "quantile 0.37"):
        np.testing.assert_array_equal(map_statistic(maps, name), every[name])


@pytest.mark.parametrize("name", ["median", "quantile 1.5", "quantile 0.50", "0.5", "quantile x"])
def test_unknown_statistics(name):
    with pytest.raises(ValueError, match=f"no statistic '{name}' of maps; there are mean, .*0.95"):
        criterion(name)


def test_a_flag_needs_numbers():
    with pytest.raises(ValueError, match=r"numbers must be finite, got \(0\.0, nan, 0\.5\)"):
        Flag("a", "mean", 0.0, float("nan"), 0.5, "")


# ---- the file


def test_a_detector_comes_back_from_its_file(tmp_path):
    model = captioner("aoa")
    one = made(weights=fingerprint(model))
    path = one.save(tmp_path)
    assert path == tmp_path / FILE
    assert Detector.load(tmp_path, model) == one
    assert Detector.load(tmp_path / "empty", model) is None


def test_a_copy_in_half_precision_has_the_same_detector(tmp_path):
    model = captioner("aoa")
    for dtype in ("float32", "float16"):
        model.save_pretrained(tmp_path / dtype, dtype=dtype)
        assert fingerprint(Captioner.from_pretrained(tmp_path / dtype)) == fingerprint(model)
    changed = jax.tree.map(lambda x: 1.01 * x, model)
    assert fingerprint(changed) != fingerprint(model)


def test_new_weights_in_the_folder_are_told(tmp_path):
    model, folder = captioner("aoa"), tmp_path / "model"
    model.save_pretrained(folder)
    made(weights=fingerprint(model)).save(folder)
    # Other files of a model folder are kept when it is replaced.
    changed = jax.tree.map(lambda x: 1.01 * x, model)
    changed.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"a model with the weights .* and these are") as caught:
        Detector.load(folder, changed)
    assert str(folder / FILE) in str(caught.value)
    assert f"jaxrel evaluate captioner --model {folder} --detector" in str(caught.value)


def edited(edit):
    content = made().to_dict()
    edit(content)
    return json.dumps(content)


def lrp_of(content):
    return content["groups"]["shape"]["methods"]["lrp"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected protocol 'hallucination/1', got None"),
        (edited(lambda x: x.update(protocol="captioner/1")), "got 'captioner/1'"),
        (edited(lambda x: x.pop("data")), "missing or unknown: data"),
        (edited(lambda x: x.update(more=1)), "missing or unknown: more"),
        (edited(lambda x: x.update(images="9")), "images must be of type int, got '9'"),
        (edited(lambda x: x.update(groups=[])), r"groups must be an object, got \[\]"),
        (edited(lambda x: x["groups"]["shape"].update(words="ab")), "a list of words, got 'ab'"),
        (edited(lambda x: lrp_of(x).update(threshold=None)), "threshold must be a finite number"),
        (edited(lambda x: lrp_of(x).update(statistic="median")), "no statistic 'median'"),
        (
            edited(lambda x: lrp_of(x)["auc"].pop("low")),
            "auc must hold the numbers mean, low, high",
        ),
        (edited(lambda x: None), "weights 0123, and these are"),
    ],
)
def test_a_file_that_is_no_detector(content, text, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=text) as caught:
        Detector.load(tmp_path, captioner("aoa"))
    assert f"{tmp_path / FILE} does not tell which words this model hallucinates" in str(
        caught.value
    )
    assert "Delete the file, or measure again: jaxrel evaluate captioner" in str(caught.value)


# ---- from an evaluation


@pytest.fixture(scope="module")
def lights(quick_compile):
    return judge_lights(batch=10)


def test_what_an_evaluation_chose_is_kept(lights):
    one = detector(lights)
    assert (one.data, one.split, one.images) == ("Lights", "", 20)
    group = one.groups["thing"]
    # The light itself tells; the same map everywhere and chance do not.
    assert "lrp" in group.methods
    assert not {"attention", "random", "probability", "1 - sentinel"} & set(group.methods)
    chosen = lights["hallucination"]["thing"]["methods"]["lrp"]["chosen"]
    assert group.methods["lrp"].threshold == chosen["threshold"]
    assert group.methods["lrp"].auc == Interval(**chosen["auc"])
    assert "circle" in group.words
    thing = lights["hallucination"]["thing"]
    usual = thing["hallucinated"] / (thing["true"] + thing["hallucinated"])
    assert group.hallucinated == usual
    for name, one_method in thing["methods"].items():
        found = one_method["chosen"]
        if name in group.methods:
            assert found["auc"]["low"] > 0.5
            assert found["precision"]["mean"] >= 2 * usual
    # Read back from the evaluation's file, and from its own.
    read = detector(json.loads(json.dumps({**lights, "split": "dev"})))
    assert read == replace(one, split="dev")
    assert Detector.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_results_that_make_no_detector(lights):
    with pytest.raises(ValueError, match=r"'captioner/1', .* got protocol None"):
        detector({})
    old = {name: x for name, x in lights.items() if name != "weights"}
    with pytest.raises(ValueError, match=r"an older jaxrel wrote it. Run .* again"):
        detector(old)
    for nothing in (None, {**lights["hallucination"]["thing"], "methods": {}}):
        with pytest.raises(ValueError, match=r"well enough on the held-out half of 20"):
            detector({**lights, "hallucination": {"thing": nothing}})


def test_words_that_are_judged_are_those_that_are_asked_about():
    images = ShapesImages(tuple(Shapes(size=32).scene("test", i) for i in range(20)))
    found = {
        (word.group, caption[word.position - 1])
        for i in range(20)
        for caption in images.references(i)
        for word in images.words(i, caption)
    }
    assert ("shape", "crosses") in found or ("shape", "circles") in found
    for group, word in found:
        assert word in images.vocabulary(group)
    assert not {*images.vocabulary("shape")} & {*images.vocabulary("colour")}


# ---- explain


def judged_model(threshold, method="lrp", **changes):
    model = captioner("adaptive")
    methods = {method: criterion("mean_abs", threshold)}
    return model, made(methods, weights=fingerprint(model), **changes)


def test_explain_judges_the_words():
    model, low = judged_model(0.0)

    def ask(**options):
        asked = {"image": random_images(), "text": TEXTS, "method": ["attention", "lrp"]}
        return jaxrel.explain(model, **asked, **options)

    methods = ask(detector=low)
    (_, without), (_, sure), (_, unsure) = ask(), methods, ask(detector=judged_model(1e9)[1])
    assert without.flags == ()
    np.testing.assert_array_equal(sure.image, without.image)
    words = ["a", "small", "red", "circle", "above", "a", "blue", "square"]
    assert [one and one.word for one in sure.flags] == [
        word if word in ("circle", "square") else None for word in words
    ]
    assert not any(one.flagged for one in sure.flags if one)
    assert all(one.flagged for one in unsure.flags if one)
    # A map in pixels is judged as it is; float32 sums in another order.
    value = sure.flags[3].value
    assert value == pytest.approx(np.abs(without.image[3]).mean(), rel=1e-5)
    assert [bool(one.flags) for one in methods] == [False, True]


def test_the_statistics_are_those_of_the_evaluation():
    model, _ = judged_model(0.0)
    asked = {"image": random_images(1)[0], "text": TEXTS[0]}
    inputs, positions = model.prepare(**asked), jnp.array([[4, 0]])
    keys = jax.random.split(jax.random.key(0), 1)
    methods = ("lrp", "attention", "grad_cam")
    maps, _ = explained_words.relevance_of_words(model, inputs, positions, keys, methods)
    for statistic in ("mean", "max", "quantile 0.9"):
        one = made({name: criterion(statistic) for name in methods})
        explained = jaxrel.explain(model, **asked, method=methods, detector=one)
        for found, of_name in zip(explained, maps[:, 0, 0], strict=True):
            statistics = map_statistics(of_name, quantiles=QUICK.quantiles)
            # float32 in a program of another size.
            expected = pytest.approx(float(statistics[statistic]), rel=1e-4, abs=1e-6)
            assert found.flags[3].value == expected


def test_a_grid_is_judged_in_the_images_pixels():
    model = captioner("adaptive")
    asked = {"image": random_images(1)[0], "text": TEXTS[0], "method": "attention"}
    found = jaxrel.explain(model, **asked, detector=made({"attention": criterion("max")}))
    side = model.config.image_size
    resized = jax.image.resize(found.image[3], (side, side), "bilinear")
    assert found.image.shape[1:] == model.config.grid
    assert found.flags[3].value == pytest.approx(float(resized.max()), rel=1e-5)


def test_other_heads_or_rules_are_not_judged():
    model, one = captioner("aoa"), made()
    ask = functools.partial(jaxrel.explain, model, image=random_images(), text=TEXTS, detector=one)
    assert ask().flags
    assert ask(heads=[0]).flags == ()
    assert ask(lrp=jaxrel.composites.captioning()).flags == ()


def test_models_without_maps_of_words():
    clip = CLIP.from_pretrained("clip-shapes")
    with pytest.raises(ValueError, match=r"detector judges words of captions .* CLIP does not"):
        jaxrel.explain(clip, image=random_images(1)[0], text="a circle", detector=made())


# ---- the command line


@pytest.fixture(scope="module")
def folder(quick_compile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "captioner"
    captioner_of_lights().save_pretrained(folder)
    return folder


def run_evaluate(folder, out, *options):
    command = ["evaluate", "captioner", "--model", str(folder), "--detector", "--out", str(out)]
    return cli.main([*command, *options])


def test_evaluate_and_explain(lights, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(caption_explanations, "evaluate", lambda model, **_: lights)
    assert run_evaluate(folder, tmp_path / "result") == 0
    assert f"wrote {folder / FILE}" in capsys.readouterr().out

    image = str(tmp_path / "image.png")
    Image.fromarray(Lights(1).image(0)).save(image)
    command = ["explain", image, "--caption", "--model", str(folder)]
    command += ["--method", "lrp,attention", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "  lrp: " in text
    assert "  attention: " not in text
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["explanations"]
    flags = [example["flag"] for example in found[0]["examples"]]
    assert all(one is None or one["flagged"] == (one["value"] < one["threshold"]) for one in flags)
    said = "% of words flagged like this one"
    assert text.count(said) == sum(one["flagged"] for one in flags if one)
    assert text.count("not flagged: ") == sum(not one["flagged"] for one in flags if one)
    old = [example["verdict"] for example in found[0]["examples"]]
    assert [one and one["doubted"] for one in old] == [one and one["flagged"] for one in flags]
    assert not {"flag", "verdict"} & set(found[1]["examples"][0])
    page = (tmp_path / "out/explanation.html").read_text()
    # In the figures without script, and in the numbers of the one with it.
    assert page.count(said) == 2 * text.count(said)

    (folder / FILE).write_text("{")
    assert cli.main(command) == 2
    assert f"error: {folder / FILE} does not tell which words" in capsys.readouterr().err
    (folder / FILE).unlink()
    assert cli.main([*command, "--json"]) == 0
    assert '"flag"' not in capsys.readouterr().out


def test_evaluate_that_cannot_make_a_detector(lights, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "result"
    assert run_evaluate(folder, out, "--method", "random") == 2
    assert "--detector needs an explanation to tell words by, and --method is random" in (
        capsys.readouterr().err
    )
    assert not out.exists()
    chance = {**lights, "hallucination": {"thing": None}}
    monkeypatch.setattr(caption_explanations, "evaluate", lambda model, **_: chance)
    assert run_evaluate(folder, out) == 2
    assert "well enough" in capsys.readouterr().err
    # What was measured is kept.
    assert (out / "captioner-lights.json").is_file()
    assert not (folder / FILE).exists()
