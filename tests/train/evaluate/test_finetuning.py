"""What is found of fine-tuned captioners, and the intervals over images and base checkpoints."""

import json

import numpy as np
import pytest

from jaxrel import cli
from jaxrel.metrics import bootstrap, bootstrap_ratio
from jaxrel.metrics.caption_scores import (
    bleu,
    bleu_counts,
    bleu_of_counts,
    cider_d,
    tokenise,
)
from jaxrel.metrics.frequent_words import frequent_words, mean_scores
from jaxrel.metrics.intervals import interval, resampled, share
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.data.shapes.claims import facts
from jaxrel.train.evaluate import finetuning
from jaxrel.train.evaluate.captioned_images import ShapesImages
from jaxrel.train.evaluate.captions import write_captions
from jaxrel.train.evaluate.finetuning import MEASURES, evaluate, find_runs, markdown

CAPTIONS = [["a", "red", "circle"], ["a", "star"], ["a", "blue", "ring", "and", "a", "star"]]
REFERENCES = [
    [["a", "red", "circle"], ["one", "circle"]],
    [["a", "ring"]],
    [["a", "blue", "ring"]],
]


# Intervals.


def test_one_repetition_is_the_plain_bootstrap():
    rng = np.random.default_rng(1)
    part, whole = rng.integers(0, 3, 20), rng.integers(1, 4, 20)
    of_share = interval(resampled([share(part, whole)], 20))
    # The same draws, summed in another order.
    np.testing.assert_allclose(of_share, bootstrap_ratio(part, whole), rtol=1e-12)
    of_mean = interval(resampled([share(part, np.ones(20))], 20))
    np.testing.assert_allclose(of_mean, bootstrap(part), rtol=1e-12)


def test_repetitions_and_examples_are_both_resampled():
    """Against loops; repetitions are drawn after the examples."""
    values = np.random.default_rng(2).normal(size=(3, 5))
    found = resampled([share(one, np.ones(5)) for one in values], 5, seed=3, resamples=7)
    rng = np.random.default_rng(3)
    images, runs = rng.integers(0, 5, (7, 5)), rng.integers(0, 3, (7, 3))
    naive = [
        np.mean([values[run, rows].mean() for run in some])
        for rows, some in zip(images, runs, strict=True)
    ]
    # Sums of a few numbers in another order.
    np.testing.assert_allclose(found, [values.mean(), *naive], rtol=1e-12)


def test_repetitions_that_differ_widen_the_interval():
    same = [share(np.ones(9) * x, np.ones(9)) for x in (2, 2, 2)]
    other = [share(np.ones(9) * x, np.ones(9)) for x in (1, 2, 3)]
    assert interval(resampled(same, 9)) == (2, 2, 2)
    mean, low, high = interval(resampled(other, 9))
    assert (mean, low, high) == (2, 1, 3)  # 1 in 27 resamples has the lowest alone


def test_a_share_of_nothing_is_zero():
    assert resampled([share(np.zeros(2), np.zeros(2))], 2, resamples=3).tolist() == [0] * 4


def test_what_cannot_be_resampled_is_said():
    with pytest.raises(ValueError, match="expected repetitions and examples, got 0 and 5"):
        resampled([], 5)
    with pytest.raises(ValueError, match="expected repetitions and examples, got 1 and 0"):
        resampled([share(np.ones(1), np.ones(1))], 0)
    with pytest.raises(ValueError, match="a statistic is not finite"):
        resampled([share(np.array([np.nan]), np.ones(1))], 1)


def test_counts_of_bleu_and_of_words_add_up():
    """Images that count several times are as several images."""
    twice, weights = [0, 2, 2], np.array([[1.0], [0.0], [2.0]])
    captions, references = [CAPTIONS[i] for i in twice], [REFERENCES[i] for i in twice]
    counts = bleu_counts(CAPTIONS, REFERENCES)
    of_corpus = bleu(captions, references).corpus
    np.testing.assert_array_equal(bleu_of_counts(weights.T @ counts)[0], of_corpus)
    found = frequent_words(captions, references, ["red", "star", "ring"])
    means = [found.mean_precision.mean, found.mean_recall.mean, found.mean_f1.mean]
    scores = mean_scores(CAPTIONS, REFERENCES, ["red", "star", "ring"], weights)
    # Means of the same numbers in another order.
    np.testing.assert_allclose(scores[0], means, rtol=1e-12)


# Which models are compared.


def write(folder, **settings):
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings))


def test_runs_are_found_by_their_settings(tmp_path, begun):
    model = str(begun / "aoa")
    write(tmp_path / "one", mode="lrp", model=model, seed=0, steps=3, log_every=5)
    write(tmp_path / "two", mode="plain", model=model, seed=0, steps=3, log_every=7)
    write(tmp_path / "a-captioner", seed=0, steps=2000)
    write(tmp_path / "three", mode="lrp", model=model, seed=0, steps=3, mixing=0.0, weighed="both")
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == {
        "baseline": {(model, 0): begun / "aoa"},
        "lrp, mixing 0.0": {(model, 0): tmp_path / "three"},
        "lrp": {(model, 0): tmp_path / "one"},
        "plain": {(model, 0): tmp_path / "two"},
    }


def test_runs_that_cannot_be_compared_are_said(tmp_path, begun):
    model = str(begun / "aoa")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no fine-tuned models; .* finetune-shapes"):
        find_runs(tmp_path)
    write(tmp_path / "one", mode="lrp", model=model, seed=0, steps=3)
    write(tmp_path / "two", mode="lrp", model=model, seed=0, steps=3)
    with pytest.raises(ValueError, match=r"two and .*one are both fine-tuned .* keep one of them"):
        find_runs(tmp_path)
    (tmp_path / "two" / "settings.json").unlink()
    write(tmp_path / "three", mode="plain", model=model, seed=1, steps=3)
    with pytest.raises(ValueError, match=r"mode 'lrp' has no model fine-tuned from .* with seed 1"):
        find_runs(tmp_path)
    (tmp_path / "three" / "settings.json").unlink()
    write(tmp_path / "four", mode="plain", model=model, seed=0, steps=4)
    with pytest.raises(ValueError, match=r"one had steps 3 and .*four 4: .* at equal settings"):
        find_runs(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"settings.json is damaged: .*; take its folder away"),
        ("[]", r"settings.json lacks model and seed; expected what"),
        ('{"mode": "lrp", "model": "x"}', r"settings.json lacks seed; expected what"),
    ],
)
def test_settings_that_cannot_be_read_are_said(text, message, tmp_path):
    write(tmp_path / "one")
    (tmp_path / "one" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_runs(tmp_path)


def test_a_base_checkpoint_that_is_gone_is_said(tmp_path):
    write(tmp_path / "one", mode="lrp", model=str(tmp_path / "gone"), seed=0)
    with pytest.raises(FileNotFoundError, match="gone"):
        find_runs(tmp_path)


# The evaluation.


@pytest.fixture(scope="module")
def models(begun, tmp_path_factory):
    """A base checkpoint, and as fine-tuned from it: itself, and another captioner."""
    root = tmp_path_factory.mktemp("models")
    for mode, kind in (("plain", "gridtd"), ("lrp", "aoa")):
        folder = root / mode
        folder.mkdir()
        for file in (begun / kind).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        settings = {"mode": mode, "model": str(begun / "gridtd"), "seed": 0, "steps": 5}
        (folder / "settings.json").write_text(json.dumps(settings))
    return root


def test_the_control_that_is_its_base_does_not_differ_from_it(models):
    result = evaluate(models, splits=["test"], scenes=6, batch=4, resamples=20)
    assert result["modes"] == ["baseline", "plain", "lrp"]
    assert result["settings"] == {"steps": 5}
    found = result["splits"]["test"]
    for name in MEASURES:
        difference = found["plain"][name]["difference"]["baseline"]
        assert difference == {"mean": 0, "low": 0, "high": 0}
        assert found["plain"][name]["mean"] == found["baseline"][name]["mean"]
        assert found["lrp"][name]["by_repetition"] == [found["lrp"][name]["mean"]]
    assert "plain" in found["lrp"]["words"]["difference"]
    assert "baseline" not in found["baseline"]["words"]["difference"]


def test_measures_are_those_of_the_captions(models):
    """Against the metrics for whole captions, on the captions that the model writes."""
    result = evaluate(models, splits=["test"], scenes=6, batch=4, resamples=5)
    scenes = tuple(Shapes().scene("test", i) for i in range(6))
    model = finetuning.Captioner.from_pretrained(models / "lrp")
    captions = write_captions(model, scenes, batch=4)
    assert result["examples"]["test"]["lrp"] == captions[:5]
    found = result["splits"]["test"]["lrp"]
    words = [tokenise(caption) for caption in captions]
    images = ShapesImages(scenes)
    references = [images.references(i) for i in range(6)]
    often = frequent_words(
        [images.forms(one) for one in words],
        [[images.forms(one) for one in some] for some in references],
        images.frequent,
    )
    expected = {
        "words": np.mean([len(one) for one in words]),
        "BLEU-4": bleu(words, references).corpus[-1],
        "CIDEr-D": cider_d(words, references).corpus,
        "mean_precision": often.mean_precision.mean,
        "mean_recall": often.mean_recall.mean,
    }
    counts = facts(captions, scenes)
    for name, part, whole in (("stated", "true", "stated"), ("mentioned", "mentioned", "objects")):
        expected[name] = counts[part].sum() / max(counts[whole].sum(), 1)
    for name, value in expected.items():
        # The same sums of a few numbers, in another order.
        assert found[name]["mean"] == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_the_command_line(models, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["evaluate", "finetuning", "--models", str(models), "--split", "biased_test"]
    assert cli.main([*command, "--scenes", "5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "### biased_test\n\n5 scenes, 1 base checkpoints." in printed
    assert "| lrp | " in printed
    assert "### biased_test, difference to plain" in printed
    assert {file.name for file in out.iterdir()} == {
        "finetuning.json",
        "finetuning.md",
        "finetuning-biased_test.png",
    }
    read = json.loads((out / "finetuning.json").read_text())
    assert markdown(read, "biased_test") in (out / "finetuning.md").read_text()


def test_what_cannot_be_evaluated_is_said(models, tmp_path, capsys):
    with pytest.raises(ValueError, match="scenes must be at least 1, got 0"):
        evaluate(models, scenes=0)
    with pytest.raises(ValueError, match=r"expected .* 'finetuning/1', .* got protocol 'x'"):
        markdown({"protocol": "x"}, "test")
    with pytest.raises(ValueError, match="no split 'val'; the result has test"):
        markdown({"protocol": "finetuning/1", "splits": {"test": {}}}, "val")
    file = tmp_path / "file"
    file.write_text("")
    command = ["evaluate", "finetuning", "--models", str(models), "--out", str(file)]
    assert cli.main(command) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
