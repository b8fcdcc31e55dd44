"""The recipes vqa-shapes and caption-shapes, and the tests of their models, at a tiny size."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import cli, metrics
from jaxrel.metrics.caption_scores import CiderD, tokenise
from jaxrel.models import CLIPMapperCaption, CLIPMapperVQA
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.data.shapes.patches import NAMES, shown_by_patch
from jaxrel.train.evaluate import captions, mapper_examples, perturbation, sanity, tables
from jaxrel.train.evaluate import vqa as answering
from jaxrel.train.recipes import caption_shapes, clip_shapes, vqa_shapes
from jaxrel.train.recipes.caption_shapes import CaptionShapes
from jaxrel.train.recipes.clip_shapes import ClipShapes
from jaxrel.train.recipes.vqa_shapes import VqaShapes
from tests.zoo.clipmappers import random_values

pytestmark = [pytest.mark.recipes, pytest.mark.usefixtures("one_device")]

SMALL = {
    "scenes": 32,
    "steps": 4,
    "batch": 16,
    "warmup": 2,
    "width": 16,
    "heads": 2,
    "mlp_width": 16,
    "log_every": 2,
    "checkpoint_every": 2,
}
METHODS = ("random", "raw", "equal", "weighted, norm")


@pytest.fixture(scope="module")
def stage1(quick_compile, tmp_path_factory):
    recipe = ClipShapes(
        width=16, vision_layers=1, text_layers=1, heads=2, patch_size=16, projection=8
    )
    folder = tmp_path_factory.mktemp("stage1") / "clip"
    random_values(lambda: clip_shapes.new_model(recipe), scale=0.1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vqa(stage1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vqa"
    return vqa_shapes.train(VqaShapes(stage1=stage1, **SMALL), folder), folder


@pytest.fixture(scope="module")
def captioner(stage1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "caption"
    recipe = CaptionShapes(stage1=stage1, layers=1, **SMALL)
    return caption_shapes.train(recipe, folder), folder


@pytest.mark.parametrize(
    ("made", "kind", "settings"),
    [("vqa", CLIPMapperVQA, VqaShapes), ("captioner", CLIPMapperCaption, CaptionShapes)],
)
def test_training_writes_a_model_its_settings_and_a_log(made, kind, settings, request):
    model, folder = request.getfixturevalue(made)
    assert isinstance(model, kind)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    written = settings(**json.loads((folder / "settings.json").read_text()))
    assert (written.steps, written.width) == (4, 16)
    assert not folder.with_name(f"{folder.name}.checkpoints").exists()


def test_patches_show_the_object_that_covers_them(stage1):
    scene = next(s for i in range(99) if len((s := Shapes().scene("train", i)).objects) == 1)
    shown = shown_by_patch(scene, (8, 8)).reshape(8, 8, 3)
    cover = scene.masks[0].reshape(8, 8, 8, 8).mean(axis=(1, 3))
    np.testing.assert_array_equal(shown[..., 0] >= 0, cover >= 0.15)
    colours = {NAMES[0][i] for i in shown[..., 0].ravel() if i >= 0}
    assert colours == {scene.objects[0].colour}


def test_questions_that_a_scene_lacks_have_no_answer(vqa):
    model, _ = vqa
    examples = vqa_shapes.examples(VqaShapes(**SMALL), model)
    for i in range(16):
        questions = Shapes().scene("train", i).questions
        answers = examples[i]["answer"]
        assert [model.config.answers[a] for a in answers if a >= 0] == [
            question.answer for question in questions
        ]


def test_vqa_evaluation_and_card(vqa):
    model, folder = vqa
    result = answering.evaluate(model, scenes=12, located=0, batch=8)
    json.dumps(result)
    accuracy = result["accuracy"]["all"]["mean"]
    assert result["questions"] == sum(len(Shapes().scene("test", i).questions) for i in range(12))
    assert 0 <= accuracy <= 1
    card = vqa_shapes.card(folder, result)
    assert f"| all | {accuracy:.3f}" in card
    assert "--scenes 32" in card


def test_accuracy_is_that_of_the_answers(vqa, monkeypatch):
    model, _ = vqa
    monkeypatch.setattr(answering, "best_answers", lambda model, inputs: np.zeros(8, int))
    result = answering.evaluate(model, scenes=12, located=0, batch=8)
    truth = [q.answer for i in range(12) for q in Shapes().scene("test", i).questions]
    share = truth.count(model.config.answers[0]) / len(truth)
    assert result["accuracy"]["all"]["mean"] == pytest.approx(share)


def test_caption_evaluation_and_card(captioner):
    model, folder = captioner
    result = captions.evaluate(model, scenes=10, batch=8)
    json.dumps(result)
    assert len(result["examples"]) == 5
    assert "CIDEr-D" in caption_shapes.card(folder, result)


def test_true_captions_are_found_true(captioner, monkeypatch):
    model, _ = captioner
    scenes = [Shapes().scene("test", i) for i in range(8)]
    texts = [scene.captions[0].text for scene in scenes]
    monkeypatch.setattr(CLIPMapperCaption, "predict", lambda self, inputs: texts)
    result = captions.evaluate(model, scenes=8, batch=8)
    assert [found["mean"] for found in result["truth"].values()] == [1] * len(result["truth"])
    # A reference among the five has all their n-grams.
    assert result["CIDEr-D"]["mean"] > 2


def own_scores(model, count):
    """CIDEr-D of the model's own captions, from all patches."""
    drawn, _ = mapper_examples.caption_examples(
        model, data_seed=0, split="test", count=count, seed=0, batch=4
    )
    assert len(drawn.references) == count
    ids = drawn.inputs["text"].astype(np.float32)
    return perturbation.caption_scores(model, ids[None, None, None], drawn.references)[0, 0, 0]


@pytest.fixture
def three_steps(monkeypatch):
    """Fewer steps: patches that are left out need a program for each."""
    for name in ("sweep", "sweep_indices", "summary"):
        short = functools.partial(getattr(metrics.perturbation, name), steps=(0.0, 0.5, 1.0))
        monkeypatch.setattr(metrics.perturbation, name, short)


@pytest.mark.parametrize(("made", "methods"), [("vqa", METHODS[:3]), ("captioner", METHODS)])
def test_perturbation(made, methods, request, tmp_path, three_steps):
    model, _ = request.getfixturevalue(made)
    result = perturbation.evaluate(model, methods=methods, examples=5, regenerated=2, batch=4)
    again = ["image-cider"] if made == "captioner" else []
    assert list(result) == ["image", "text", *again]
    for name, summary in result.items():
        assert summary["examples"] == (2 if name in again else 5)
        assert summary["modality"] == name.removesuffix("-cider")
        assert set(summary["methods"]) == set(methods)
        for one in summary["methods"].values():
            # Nothing is removed at first, and everything at last: all methods agree there.
            means = [one[sign]["curve"]["mean"] for sign in ("negative", "positive")]
            assert means[0][0] == means[1][0]
            assert means[0][-1] == pytest.approx(means[1][-1], rel=1e-5)
    if again:
        curve = result[perturbation.REGENERATED]["methods"]["random"]["positive"]["curve"]["mean"]
        assert curve[0] == pytest.approx(own_scores(model, 5)[:2].mean())
    files = perturbation.save(result, tmp_path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert {file.name for file in files} == {
        f"perturbation-{model.task}-{name}.{suffix}"
        for name in result
        for suffix in ("json", "md", "png")
    }


def test_regenerated_captions_are_scored_one_by_one(captioner):
    model, _ = captioner
    captions = [[one.text for one in Shapes().scene("test", i).captions] for i in range(4)]
    references = [[tokenise(text) for text in texts] for texts in captions]
    # Of the first two scenes: their own captions, each other's, and none.
    texts = [captions[i][j] for i in (0, 1) for j in (0, 1)]
    ids = np.asarray(model.prepare(image=[Shapes().scene("test", 0).image] * 4, text=texts)["text"])
    numbers = [[0, 2], [3, 1]]
    written = ids[np.array(numbers)].astype(np.float32)
    written = np.concatenate([written, np.full_like(written[:1], np.nan)])
    found = perturbation.caption_scores(model, written[:, None, None], references)[:, 0, 0]
    cider = CiderD.from_references(references)
    # The tokenizer knows no commas; `tokenise` has none either.
    expected = [cider.score([tokenise(texts[n]) for n in row], references[:2]) for row in numbers]
    np.testing.assert_allclose(found[:2], expected, rtol=1e-12)
    assert found[0].min() > 1 > found[1].max()
    assert np.isnan(found[2]).all()


def test_perturbation_measures_what_it_says(captioner):
    """With nothing removed: the greedy word is the most probable; captions as the model has it."""
    model, _ = captioner
    whole, words = mapper_examples.caption_examples(
        model, data_seed=0, split="test", count=4, seed=0, batch=4
    )
    inputs = {k: jnp.asarray(words.inputs[k]) for k in ("image", "text")}

    @jax.jit
    def outputs(model, inputs):
        mapped, _ = model.map(model.encode_image(inputs["image"])[0], inputs["text"])
        return mapped, model(inputs), model.log_probability(inputs)

    mapped, logits, log_probability = outputs(model, inputs)
    logits = np.asarray(logits, np.float64)
    found = np.asarray(jax.jit(words.measured)(model, mapped, words.inputs))
    for i, position in enumerate(words.inputs["position"]):
        row = logits[i, position - 1]
        want = row.max() - np.log(np.exp(row).sum())
        np.testing.assert_allclose(found[i], want, rtol=1e-4)
        assert not words.removable["text"][i, position - 1 :].any()
    captions = jax.jit(whole.measured)(model, mapped, whole.inputs)
    np.testing.assert_allclose(captions, log_probability, rtol=1e-5)
    assert [*whole.removable, *words.removable] == ["image", "text"]


def test_sanity(vqa):
    model, _ = vqa
    result = sanity.evaluate(model, methods=("raw", "equal"), examples=4)
    assert list(result["image"]) == list(sanity.groups(model))
    # The raw maps of attention know nothing of the head.
    assert result["image"]["head"]["raw"]["mean"] == pytest.approx(1)
    assert "| equal |" in tables.markdown(sanity.tables(result))


BAD = {
    "method": ({"methods": ("magic",)}, "unknown method 'magic'; there are random, raw"),
    "modality": ({"modality": ("sound",)}, "unknown modality 'sound'; there are image, text"),
    "none": ({"modality": ()}, "no modality given"),
    "few": ({"examples": 0}, "examples and batch must be at least 1, got 0 and 32"),
    "again": ({"regenerated": -1}, "regenerated must be at least 0, got -1"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD.keys())
def test_bad_perturbation(vqa, options, text):
    with pytest.raises(ValueError, match=text):
        perturbation.evaluate(vqa[0], **options)


def test_bad_settings(stage1, vqa, tmp_path):
    with pytest.raises(ValueError, match="batch 8 is more than the 4 scenes"):
        VqaShapes(scenes=4, batch=8)
    with pytest.raises(ValueError, match="checkpoint_every must be a multiple of log_every 30"):
        VqaShapes(log_every=30)
    with pytest.raises(ValueError, match="learning_rate must be positive, got -1"):
        VqaShapes(learning_rate=-1.0)
    with pytest.raises(ValueError, match="context must be at least 32 for the longest captions"):
        CaptionShapes(context=20)
    with pytest.raises(ValueError, match="full must be from 0 to 1, got 2"):
        CaptionShapes(full=2.0)
    recipe = VqaShapes(stage1=stage1, **SMALL)
    with pytest.raises(ValueError, match="context 99 is more than the 34 tokens"):
        vqa_shapes.train(dataclasses.replace(recipe, context=99), tmp_path / "new")
    captions = CaptionShapes(stage1=str(vqa[1]), **SMALL)
    with pytest.raises(ValueError, match="context 34 is more than the 20 tokens"):
        caption_shapes.train(captions, tmp_path / "new")
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        vqa_shapes.train(recipe, tmp_path / "file")


def test_the_command_line_refuses_other_models(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", "sanity", "--model", str(tmp_path / "none"), "--out", str(out)]
    assert cli.main(arguments) == 2
    assert "no model folder" in capsys.readouterr().err
    assert cli.main(["evaluate", "perturbation", "--model", "clip-shapes", "--out", str(out)]) == 2
    assert "'clip-shapes' is a CLIP; this test is made for CLIPmapper" in capsys.readouterr().err
