"""Old names: each still works, warns, and is the new one."""

import importlib

import pytest

OLD = {
    "jaxrel.pictures.read_picture": "jaxrel.images.read_image",
    "jaxrel.explainer.METHODS": "jaxrel.explanations.explain.METHODS",
    "jaxrel.explanation.Explanation": "jaxrel.explanations.result.Explanation",
    "jaxrel.verdict.Verdict": "jaxrel.flags.Flag",
    "jaxrel.word_relevance.WORD_METHODS": "jaxrel.explanations.words.WORD_METHODS",
    "jaxrel.models.weights.PRETRAINED": "jaxrel.models.checkpoint.PRETRAINED",
    "jaxrel.metrics.hits": "jaxrel.metrics.localisation.pointing_game",
    "jaxrel.metrics.share_inside": "jaxrel.metrics.localisation.relevance_mass_accuracy",
    "jaxrel.metrics.perturbation.markdown": "jaxrel.train.evaluate.perturbation.markdown",
    "jaxrel.report.picture": "jaxrel.report.figure",
    "jaxrel.train.settings.FinetuneShapes": "jaxrel.train.recipes.finetune.FinetuneShapes",
}


def find(name):
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_old_names_warn_and_work(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        assert find(old) is find(new)


def test_other_names_are_missing():
    with pytest.raises(AttributeError, match="has no attribute 'photograph'"):
        find("jaxrel.report.photograph")
    with pytest.raises(AttributeError, match="has no attribute 'photograph'"):
        find("jaxrel.pictures.photograph")
