"""Rules of weighing: each by hand in plain loops, and the plan's judgement of made-up figures."""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention, cli
from jaxrel.explanations.explain import token_relevance
from jaxrel.metrics import perturbation
from jaxrel.models import from_pretrained
from jaxrel.train.evaluate import weighting
from jaxrel.train.evaluate.weighting import FAMILY, Rule
from tests.zoo.clipmappers import TEXTS, answered, random_mapper
from tests.zoo.images import random_images


@pytest.fixture(scope="module")
def vqa(quick_compile):
    return random_mapper("vqa", layers=1)


def random_layers(seed=0, layers=2, batch=2, query=5, key=4):
    """What is explained does not depend on the last two tokens of the second example."""
    rng = np.random.default_rng(seed)
    attn = rng.dirichlet(np.ones(key), (layers, batch, 3, query))
    before, after, value_grad = rng.normal(size=(3, layers, batch, query, 6))
    value_grad[:, 1, -2:] = 0
    arrays = (attn, rng.normal(size=attn.shape), before, after, value_grad)
    return attention.Layers(*(jnp.asarray(x, jnp.float32) for x in arrays))


def test_equal_and_weighted_are_the_methods(vqa):
    inputs = answered(vqa.prepare(image=random_images(), text=TEXTS))
    found = weighting.relevance_by_rule(vqa, inputs, ("equal", "grad_value, rest"))
    methods = {"equal": "equal", "weighted": "grad_value, rest"}
    for method, streams in token_relevance(vqa, inputs, method=tuple(methods)).items():
        for stream, relevance in streams.items():
            # float32 through about 10 layers, in another program.
            scale = np.abs(relevance).max()
            np.testing.assert_allclose(
                found[methods[method]][stream], relevance, rtol=0, atol=1e-5 * scale
            )


IMPORTANCE = {
    "grad_value": lambda x, g: sum(max(a * b, 0) for a, b in zip(x, g, strict=True)),
    "norm": lambda x, g: sum(a * a for a in x) ** 0.5,
    "abs_grad_value": lambda x, g: abs(sum(a * b for a, b in zip(x, g, strict=True))),
}


def plain_query_weight(kind, before, after, grad):
    total = before + after
    length, sum_length = (before @ before) ** 0.5, (total @ total) ** 0.5
    if kind == "none":
        return 1.0
    if kind == "length":
        return sum_length / length
    if kind == "turn":
        return 1 - before @ total / (length * sum_length)
    u, v = (IMPORTANCE[kind](x, grad) for x in (before, after))
    return 2 * v / (u + v) if u + v else 1.0


@pytest.mark.parametrize("rule", FAMILY.values(), ids=FAMILY.keys())
def test_rules_by_hand(rule):
    """`a` and `b g Ā` of each layer and example, in float64 by plain loops."""
    layers = random_layers()
    attn, carried, moved, ones = weighting.weigh(layers, rule)
    assert (ones == 1).all()
    given = [np.asarray(x, np.float64) for x in layers]
    for layer, example in np.ndindex(*given[0].shape[:2]):
        one_attn, one_grad, before, after, grad = (x[layer, example] for x in given)
        abar = np.maximum(one_attn * one_grad, 0).mean(0)
        some = zip(before, after, grad, strict=True)
        b = np.array([plain_query_weight(rule.query, *x) for x in some])
        if rule.relative:
            b = b / np.mean([w for w, x in zip(b, grad, strict=True) if x.any()])
        g = np.ones(abar.shape[1])
        if rule.value != "none":
            c = abar.sum(0)
            s = c if rule.value == "values" else np.sqrt(c)
            g = s * c.sum() / (s * c).sum()
        a = np.ones_like(b) if rule.residual == "one" else 2 - b
        product = np.asarray(attn[layer, example], np.float64) * one_grad
        weighed = np.maximum(product, 0).mean(0) * np.asarray(moved)[layer, example]
        # float32 quotients of sums of some tens of numbers.
        np.testing.assert_allclose(weighed, b[:, None] * abar * g, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(carried[layer, example, :, 0], a, rtol=1e-4, atol=1e-5)


def test_values_keep_what_is_moved():
    abar = np.random.default_rng(0).uniform(size=(3, 5, 4))
    abar[2] = 0
    for root in (False, True):
        g = np.asarray(weighting.column_weights(jnp.asarray(abar), root=root))
        moved = (abar * g[:, None]).sum((1, 2))
        # float32 sums of twenty numbers
        np.testing.assert_allclose(moved, abar.sum((1, 2)), rtol=1e-5)
        assert (g[2] == 1).all()


def test_the_family_has_what_is_known():
    assert len(FAMILY) == 39
    assert FAMILY["equal"] == Rule()
    assert FAMILY["grad_value, rest"] == Rule("grad_value", residual="rest")
    assert FAMILY["turn relative, root values"] == Rule("turn", True, "root values")


def made_up(differences):
    """A result of one modality: {rule: ((mean, low, high) of negative, of positive)}."""
    interval = lambda x: dict(zip(("mean", "low", "high"), map(float, x), strict=True))
    methods = {
        name: {
            sign: {"auc": interval((0, 0, 0)), "difference": interval(x)}
            for sign, x in zip(perturbation.SIGNS, both, strict=True)
        }
        for name, both in differences.items()
    }
    return {
        "methods": {"equal": {}} | methods,
        "protocol": perturbation.PROTOCOL,
        "task": "vqa",
        "modality": "text",
        "examples": 3,
        "split": "val",
        "layers": 2,
    }


def test_the_judgement_by_hand():
    assert perturbation.SIGNS == ("negative", "positive")
    first = made_up(
        {
            "norm": ((3, 1, 5), (-2, -3, -1)),  # clearly better, twice
            "length": ((8, 7, 9), (1, -1, 3)),  # clearly better, and worse
            "turn": ((-2, -3, -1), (-90, -91, -89)),  # clearly worse, and much better
        }
    )
    second = made_up({name: ((0, 0, 0), (-1, -3, 1)) for name in ("norm", "length", "turn")})
    judged = weighting.judge([first, second])
    # Means over half the widths: of norm 3 / 2, 2 / 1, 0, and 1 / 2, by four.
    assert judged["norm"] == {"score": 1.0, "better": 3, "clearly worse": 0}
    assert judged["length"] == {"score": (8 - 0.5 + 0.5) / 4, "better": 2, "clearly worse": 0}
    assert judged["turn"]["clearly worse"] == 1
    assert judged["turn"]["score"] > judged["length"]["score"]
    assert weighting.ranked(judged) == ["length", "norm", "turn"]
    (table,) = weighting.tables([first, second])
    assert [line[0] for line in table.rows] == ["length", "norm", "turn"]
    assert table.rows[1][1:3] == ["**+3.00 [+1.00, +5.00]**", "**-2.00 [-3.00, -1.00]**"]
    assert table.rows[1][-3:] == ["3", "0", "+1.00"]
    with pytest.raises(ValueError, match=r"'perturbation/1', .* got protocol 'weighting/1'"):
        weighting.tables([{"protocol": "weighting/1"}])


def test_the_figures_are_those_of_the_values(monkeypatch):
    """On values that are made up: relevance is random, and the model always right."""
    model, some = from_pretrained("vqa-shapes"), ("length", "turn relative")

    def relevance(model, inputs, rules):
        rows, tokens = inputs["text"].shape
        text = jax.random.normal(jax.random.key(0), (len(rules), rows, tokens))
        return {name: {"text": one} for name, one in zip(rules, text, strict=True)}

    def program(graph, drawn, modality):
        shape = (len(perturbation.SIGNS), len(perturbation.STEPS))
        return lambda _, inputs, maps, removable: np.ones((len(maps), *shape, len(removable)))

    monkeypatch.setattr(weighting, "relevance_by_rule", relevance)
    monkeypatch.setattr(weighting, "sweep_program", program)
    result = weighting.evaluate(model, modality=("text",), rules=some, examples=3, batch=2)
    assert list(result) == ["text"]
    found = result["text"]
    assert list(found["methods"]) == ["equal", *some]
    assert {k: found[k] for k in ("modality", "split", "examples", "layers")} == {
        "modality": "text",
        "split": "val",
        "examples": 3,
        "layers": 2,
    }
    assert found["methods"]["length"]["negative"]["difference"]["mean"] == 0


def test_the_command_line(tmp_path, monkeypatch, capsys):
    asked = []

    def evaluate(model, **options):
        asked.append(options | {"task": model.task})
        return {"text": made_up({"norm": ((3, 1, 5), (-2, -3, -1))})}

    monkeypatch.setattr(weighting, "evaluate", evaluate)
    arguments = ["evaluate", "weighting", "--out", str(tmp_path)]
    kept = tmp_path / "kept"
    kept.mkdir()
    both = ["--model", "vqa-shapes,caption-shapes", "--record", str(kept)]
    assert cli.main([*arguments, *both, "--examples", "3", "--modality", "text"]) == 0
    assert [one.pop("task") for one in asked] == ["vqa", "caption"]
    expected = {"modality": ("text",), "rules": tuple(FAMILY), "split": "val"}
    assert asked[0] == asked[1] == expected | {"examples": 3, "batch": 32, "seed": 0}
    recorded = json.loads((kept / "weighting-val-2-layers.json").read_text())
    assert recorded["protocol"] == weighting.PROTOCOL
    assert list(recorded["result"]) == ["vqa-shapes, text", "caption-shapes, text"]
    assert "| norm | **+3.00" in (kept / "weighting-val-2-layers.md").read_text()
    chosen = ["--model", "vqa-shapes", "--rule", "grad_value, rest,norm relative, values"]
    assert cli.main([*arguments, *chosen]) == 0
    assert asked[-1]["rules"] == ("grad_value, rest", "norm relative, values")
    assert cli.main(["evaluate", "weighting", "--model", "clip-shapes"]) == 2
    assert "this test is made for CLIPmapper" in capsys.readouterr().err


def test_mappers_of_two_depths_are_refused(tmp_path, monkeypatch, capsys):
    deep, judged = tmp_path / "deep", []
    random_mapper("vqa", layers=3).save_pretrained(deep)
    monkeypatch.setattr(weighting, "evaluate", lambda *args, **options: judged.append(args))
    arguments = ["evaluate", "weighting", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--model", f"vqa-shapes,{deep}"]) == 2
    assert (
        "a table compares rules on mappers of one depth, got mappers of 2, 3 layers; judge each "
        "depth by itself" in capsys.readouterr().err
    )
    assert not judged


BAD = {
    "rule": ({"rules": ("magic",)}, "unknown rule 'magic'; there are equal, values,"),
    "modality": ({"modality": ("sound",)}, "unknown modality 'sound'; there are image, text"),
    "none": ({"modality": ()}, "no modality given"),
    "few": ({"examples": 0}, "examples and batch must be at least 1, got 0 and 32"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD.keys())
def test_errors(vqa, options, text):
    with pytest.raises(ValueError, match=text):
        weighting.evaluate(vqa, **options)
