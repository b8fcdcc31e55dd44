"""The table of all methods: what it is made of, by hand or on the bundled models, and its marks."""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import cli
from jaxrel.explanations.explain import token_relevance
from jaxrel.models import from_pretrained
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.evaluate import methods, pair_examples, sanity, weighting
from jaxrel.train.evaluate.located_examples import Located, located_examples
from tests.zoo.clipmappers import TEXTS, answered, random_mapper
from tests.zoo.clips import small_clip
from tests.zoo.images import random_images

DRAWN = {"data_seed": 0, "split": "test"}


@pytest.fixture(scope="module")
def clip():
    return from_pretrained("clip-shapes")


@pytest.fixture(scope="module")
def mapper(quick_compile):
    return random_mapper("vqa", layers=1)


def test_columns_by_hand():
    values = np.array([[1.0, 2, 3, 4], [1, 1, 4, 4], [9, 9, 9, 8], [9, 9, 9, 9]])
    found = methods.figure(values, ["a", "b", "c", "d"], "x", "y", higher=True)
    assert found["methods"]["a"]["mean"] == 2.5
    assert found["methods"]["d"] == {"mean": 9, "low": 9, "high": 9}
    # Of the difference -1/4 a resample without the last example makes 0.
    assert (found["best"], found["as good"]) == ("d", ["c"])
    found = methods.figure(values, ["a", "b", "c", "d"], "x", "y", higher=False)
    assert (found["best"], found["as good"], found["better"]) == ("a", ["b"], "lower")


MEASURED = {"mean": 12.34, "low": -0.01, "high": 25.0}


def made_up():
    one = {"measure": "right answers", "better": "higher", "examples": 3}
    first = {"equal": MEASURED, "raw": MEASURED, "token_tm": MEASURED}
    return {
        "protocol": methods.PROTOCOL,
        "models": {"vqa-shapes": "vqa", "clip-shapes": "clip"},
        "methods": ["random", "equal", "raw", "token_tm"],
        "split": "test",
        "examples": 3,
        "located": 2,
        "figures": [
            {"title": "questions, words -", "methods": first, "best": "raw", "as good": ["equal"]}
            | one,
            {"title": "CLIP, pointing game", "methods": {}, "best": "", "as good": []} | one,
        ],
        "costs": {"vqa-shapes": {"equal": 1.234, "raw": 0.5}, "clip-shapes": {"token_tm": 2.0}},
    }


def test_the_table():
    (table,) = methods.tables(made_up())
    heads = "method|questions, words -|CLIP, pointing game|passes|FLOPs, questions|FLOPs, CLIP"
    assert table.columns == heads.split("|")
    shown = "12.3 [0.0, 25.0]"
    assert table.rows == [
        ["random", "-", "-", "none", "-", "-"],
        ["equal", f"{shown} †", "-", "forward + gradient", "1.23", "-"],
        ["raw", f"**{shown}**", "-", "forward", "0.50", "-"],
        ["token_tm", shown, "-", "forward + gradient", "-", "2.00"],
    ]
    assert "split `test`: 3 examples for each perturbation test, 2 for localisation" in table.note
    assert "times 100, under the curve of the right answers; - is" in table.note
    with pytest.raises(ValueError, match=r"'methods/1', .* got protocol 'methods/0'"):
        methods.tables({"protocol": "methods/0"})


def test_which_methods_explain_which_models(mapper):
    kinds = {"mapper": mapper, "clip": small_clip()}
    alone = {
        name: {one for one in methods.METHODS if methods.explains(model, one)}
        for name, model in kinds.items()
    }
    assert alone["mapper"] | alone["clip"] == {*methods.METHODS}
    assert alone["mapper"] - alone["clip"] == {"transformer_attribution", "weighted, root values"}
    encoder = {"no_aggregation", "token_tm", "legrad", "grad_eclip"}
    assert alone["clip"] - alone["mapper"] == encoder


def test_relevance_is_in_the_order_of_the_methods(mapper):
    inputs = answered(mapper.prepare(image=random_images(), text=TEXTS))
    asked = ("weighted, root values", "raw", "weighted, norm", "random")
    by_rule, raw, norm, random = methods.relevance(mapper, inputs, asked, jax.random.key(3))
    rule = "grad_value, root values"
    wanted = weighting.relevance_by_rule(mapper, inputs, (rule,))[rule]
    np.testing.assert_array_equal(by_rule["vision"], wanted["vision"])
    for found, name in ((raw, "raw"), (norm, "weighted")):
        wanted = token_relevance(mapper, inputs, method=(name,), importance="norm")[name]
        np.testing.assert_array_equal(found["text"], wanted["text"])
    assert random["vision"].shape == raw["vision"].shape


def test_clip_chooses(clip):
    count, among = 4, 2
    of_images, of_captions = pair_examples.pair_examples(clip, **DRAWN, count=count, among=among)
    data = Shapes(seed=0)
    scenes = [data.scene("test", i) for i in range(count)]
    every = clip.prepare(
        image=[scene.image for scene in scenes], text=[s.captions[0].text for s in scenes]
    )
    logits = np.asarray(clip(every)["logits_per_image"])
    image, text = np.asarray(every["image"]), np.asarray(every["text"])
    for i in range(count):
        group = range(i - i % among, i - i % among + among)
        caption = max(group, key=lambda j: logits[i, j])
        chosen = max(group, key=lambda j: logits[j, i])
        np.testing.assert_array_equal(of_images.inputs["image"][i], image[i])
        np.testing.assert_array_equal(of_images.inputs["text"][i], text[caption])
        np.testing.assert_array_equal(of_captions.inputs["image"][i], image[chosen])
        np.testing.assert_array_equal(of_captions.inputs["text"][i], text[i])
    assert of_images.removable["image"].sum() == count * (clip.config.vision.tokens - 1)
    words = [len(s.captions[0].text.replace(",", " ,").split()) for s in scenes]
    assert of_captions.removable["text"].sum(1).tolist() == words
    with pytest.raises(ValueError, match=r"must be a multiple of 2, .* got 3"):
        pair_examples.pair_examples(clip, **DRAWN, count=3, among=2)


def test_clip_without_tokens(clip, monkeypatch):
    """With all tokens it is as right as it was; without any, it chooses one for all."""
    monkeypatch.setattr(
        methods,
        "relevance",
        lambda model, inputs, names, key: [
            {s.name: jnp.ones((len(inputs["text"]), s.tokens)) for s in model.layout.streams}
        ],
    )
    # The first value, and twice the last.
    monkeypatch.setattr(methods, "auc", lambda values: values[:, :, 0] + 2 * values[:, :, -1])
    for drawn in pair_examples.pair_examples(clip, **DRAWN, count=8, among=4):
        (modality,) = drawn.removable
        chosen = clip({name: drawn.inputs[name] for name in ("image", "text")})
        mine = np.asarray(chosen["image_embeds" if modality == "image" else "text_embeds"])
        groups = zip(np.split(mine, 2), np.split(drawn.inputs["others"], 2), strict=True)
        choices = np.array([(own @ others.T).argmax(-1) for own, others in groups])
        found = methods.perturbed(clip, drawn, modality, ["equal"], batch=4, seed=0)
        np.testing.assert_array_equal(found[0, 0] % 2, (choices == np.arange(4)).ravel())
        assert (found // 2).reshape(4, 4).sum(-1).tolist() == [1] * 4


def test_located_phrases(clip):
    found = located_examples(clip, **DRAWN, count=3, seed=0, batch=2)
    assert found.masks.shape == (3, 64, 64)
    assert {len(x) for x in found.inputs.values()} == {3}
    for words, mask in zip(clip.tokens(found.inputs), found.masks, strict=True):
        article, *_ = (word for word in words if word)
        assert article in ("a", "an")
        assert 0 < mask.mean() < 0.5


def test_located_answers():
    model = from_pretrained("vqa-shapes")
    found = located_examples(model, **DRAWN, count=3, seed=0, batch=2)
    assert found.inputs["answer"].shape == (3,)
    for row, question, mask in zip(
        found.inputs["image"], model.tokens(found.inputs), found.masks, strict=True
    ):
        assert {"colour", "shape", "big", "size", "small"} & {*question}
        # The object stands out from what is around it.
        assert np.abs(row[mask].mean(0) - row[~mask].mean(0)).max() > 0.1


def test_located_nouns():
    model = from_pretrained("caption-shapes")
    found = located_examples(model, **DRAWN, count=3, seed=0, batch=2)
    data = Shapes(seed=0)
    images = [data.scene("test", i) for i in range(4)]
    for i, (row, position) in enumerate(
        zip(model.tokens(found.inputs), found.inputs["position"], strict=True)
    ):
        scene = next(
            scene
            for scene in images
            if np.array_equal(
                model.prepare(image=[scene.image], text="a circle")["image"][0],
                found.inputs["image"][i],
            )
        )
        named = [j for j, thing in enumerate(scene.objects) if thing.shape in row[position]]
        assert named, row
        covered = [scene.masks[j][found.masks[i]].any() for j in named]
        assert any(covered)
        assert found.masks[i].sum() <= scene.masks[named].any(0).sum()


def test_too_few_examples(mapper, monkeypatch):
    monkeypatch.setattr("jaxrel.train.evaluate.located_examples._questions", lambda *_: iter(()))
    with pytest.raises(ValueError, match=r"in 32 scenes there are 0 examples .* it is not trained"):
        located_examples(mapper, **DRAWN, count=3, seed=0, batch=2)


def test_localisation_by_hand(clip, monkeypatch):
    rows, columns = clip.config.vision.grid
    inside = np.zeros((2, rows, columns))
    inside[0, 0, 0], inside[0, 1, 1], inside[0, 2, 2] = 3, 1, -5
    inside[1, 0, 1] = 1
    masks = np.zeros((2, 64, 64), bool)
    masks[:, : 64 // rows, : 64 // columns] = True
    vision = np.concatenate([np.full((2, 1), 9.0), inside.reshape(2, -1)], axis=1)
    given = lambda model, inputs, names, key: [{"vision": vision[inputs["row"]]}]
    monkeypatch.setattr(methods, "relevance", given)
    located = Located({"row": np.arange(2)}, masks)
    shares, hits = methods.localised(clip, located, ["equal"], batch=32, seed=0)
    assert shares.tolist() == [[75, 0]]
    assert hits.tolist() == [[100, 0]]


def test_costs():
    model = small_clip()
    inputs = model.prepare(image=random_images(), text=["a red circle", "a blue square"])
    found = methods.costs(model, inputs, ("random", "raw", "equal", "legrad"))
    assert list(found) == ["raw", "equal", "legrad"]
    assert 1 < found["equal"] < found["equal"] + found["legrad"]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    asked = []

    def evaluate(models, **options):
        asked.append({"models": list(models), **options})
        return made_up()

    monkeypatch.setattr(methods, "evaluate", evaluate)
    kept = tmp_path / "kept"
    kept.mkdir()
    arguments = ["--models", "vqa-shapes,clip-shapes", "--method", "equal,weighted:norm"]
    out = ["--out", str(tmp_path / "out"), "--record", str(kept), "--examples", "64"]
    assert cli.main(["evaluate", "methods", *arguments, *out]) == 0
    assert asked == [
        {
            "models": ["vqa-shapes", "clip-shapes"],
            "methods": ("equal", "weighted, norm"),
            "split": "test",
            "examples": 64,
            "located": 512,
            "batch": 32,
            "seed": 0,
        }
    ]
    assert "| raw | **12.3 [0.0, 25.0]**" in capsys.readouterr().out
    assert json.loads((kept / "methods.json").read_text())["protocol"] == methods.PROTOCOL
    assert (tmp_path / "out" / "methods.md").is_file()


BAD = {
    "method": ({"methods": ("magic",)}, "unknown method 'magic'; there are random, raw"),
    "few": ({"examples": 0}, "examples and batch must be at least 1, got 0 and 32"),
    "none located": ({"located": 0}, "localisation: examples and batch must be .* got 0 and 32"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD.keys())
def test_errors(mapper, options, text):
    with pytest.raises(ValueError, match=text):
        methods.evaluate({"a": mapper}, **options)


def test_models_of_a_kind(mapper):
    with pytest.raises(ValueError, match="got a, b of the kinds vqa, vqa"):
        methods.evaluate({"a": mapper, "b": mapper})
    with pytest.raises(ValueError, match="b is a dict; methods are judged on CLIPmappers and on"):
        methods.evaluate({"a": mapper, "b": {}})


def test_clip_forgets(clip):
    """Parameters of each group are CLIP's, and raw attention sees all but the projections."""
    result = sanity.evaluate(clip, methods=("raw",), examples=2)
    names = list(sanity.groups(clip))
    assert names[0] == "projections"
    assert names[1:3] == ["image layer 3", "text layer 1"]
    assert names[-1] == "embeddings"
    assert list(result["image"]) == list(result["text"]) == names
    assert result["image"]["projections"]["raw"]["mean"] == pytest.approx(1)
    assert result["image"]["embeddings"]["raw"]["mean"] < 0.9
    assert [table.title for table in sanity.tables(result)] == ["CLIP, patches", "CLIP, words"]
