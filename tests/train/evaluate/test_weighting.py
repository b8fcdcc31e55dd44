"""What the weights do: the variants against the equations, and the tables by hand.

The study is finished; these tests guard its numbers until its code goes.
"""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from jaxrel import attention, cli
from jaxrel.explanations.explain import token_relevance
from jaxrel.metrics import perturbation
from jaxrel.models import from_pretrained
from jaxrel.train.evaluate import weighting
from jaxrel.train.evaluate.tables import markdown
from jaxrel.train.evaluate.weighting import PROTOCOL, Weighed
from tests.zoo.clipmappers import TEXTS, answered, random_mapper
from tests.zoo.images import random_images


def tags_of(model):
    return [tag for block in model.layout.schedule for stage in block for _, tag in stage]


@pytest.fixture(scope="module")
def vqa(quick_compile):
    return random_mapper("vqa", layers=1)


@pytest.fixture(scope="module")
def questions(vqa):
    return answered(vqa.prepare(image=random_images(), text=TEXTS))


# Attention layers that are made up: the text's in the order in which they run.
TEXT_LAYERS = ("text", "text_single", "text_to_image", "text_self")
SCHEDULE = [
    [[("ss", "text")]],
    [[("ss", "text_single")], [("sq", "text_to_image")], [("ss", "text_self")]],
]
ORDER = [("text", 0), ("text", 1), *((tag, i) for i in range(2) for tag in TEXT_LAYERS[1:])]


@pytest.fixture(scope="module")
def layers(quick_compile):
    """Two layers of each kind; what is explained does not depend on some tokens."""
    rng, found = np.random.default_rng(0), {}
    for tag in TEXT_LAYERS:
        keys = 6 if tag == "text_to_image" else 5
        attn = rng.dirichlet(np.ones(keys), (2, 2, 3, 5))
        grad = rng.normal(size=(2, 2, 3, 5, keys))
        grad[1, 0, :, 2] = -1  # this layer moves nothing to the target token
        before, after, value_grad = rng.normal(size=(3, 2, 2, 5, 4))
        value_grad[:, 1, 3:] = 0
        arrays = (attn, grad, before, after, value_grad)
        found[tag] = attention.Layers(*(jnp.asarray(x, jnp.float32) for x in arrays))
    return found


def assert_close(found, expected):
    # float32 through about 10 layers, in another program.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_layers_without_values(vqa, questions):
    captured = [
        attention.value_and_layers(
            lambda model, inputs: model.score(inputs), vqa.layout.schedule, values=values
        )
        for values in (True, False)
    ]
    whole, (score, found) = (jax.eval_shape(one, vqa, questions) for one in captured)
    assert score.shape == (2,)
    for tag, one in found.items():
        assert [x is None for x in one] == [False, False, True, True, True]
        assert one.attn.shape == one.grad.shape == whole[1][tag].attn.shape
    unknown = attention.value_and_layers(lambda x: x.sum(-1), [[[("ss", "nowhere")]]])
    with pytest.raises(ValueError, match="the function tags nothing named 'nowhere'"):
        unknown(jnp.ones((2, 3)))


# ---- the variants


def test_equal_and_weighted_are_the_methods(vqa, questions):
    methods = ("equal", "weighted")
    found, facts = weighting.relevance_by_variant(vqa, questions, methods, jax.random.key(0))
    for method, of_streams in token_relevance(vqa, questions, method=methods).items():
        for stream, relevance in of_streams.items():
            assert_close(found[method][stream], relevance)
    assert set(facts["weights"]) == set(tags_of(vqa))
    assert set(facts["target_token"]) == {"text", "text_single", "text_self"}


def random_weighed(seed=0, layers=3, batch=2, query=5, key=4):
    """Of the second example the last two tokens do not count, as if they were padding."""
    rng = np.random.default_rng(seed)
    shape = (layers, batch, 2, query, key)
    counted = np.ones((layers, batch, query), bool)
    counted[:, 1, -2:] = False
    beta = np.where(counted, rng.uniform(0, 2, counted.shape), 1).astype(np.float32)
    attn = rng.dirichlet(np.ones(key), shape[:-1]).astype(np.float32)
    grad = rng.normal(size=shape).astype(np.float32)
    return Weighed(*map(jnp.asarray, (attn, grad, 2 - beta, beta, counted)))


KEY = jax.random.key(0)


def test_only_some_kinds_of_layers():
    one = random_weighed()
    change = weighting.only("vision", "text")
    assert change("text", one, KEY) is one
    assert weighting.without("text")("text_self", one, KEY) is one
    assert (weighting.without("text")("text", one, KEY).beta == 1).all()
    elsewhere = change("text_self", one, KEY)
    assert (elsewhere.beta == 1).all()
    assert (elsewhere.alpha == 1).all()
    assert elsewhere.attn is one.attn


def test_every_kind_of_layer_is_in_one_place():
    places = (*weighting.VISION, *weighting.TEXT, *weighting.OWN, *weighting.CROSS)
    assert sorted(places) == sorted(tags_of(from_pretrained("vqa-shapes")))


def test_the_balance_of_layers_and_of_tokens():
    one = random_weighed()
    means = weighting.layer_means("text", one, KEY)
    tokens = weighting.over_layer_means("text", one, KEY)
    for layer, example in np.ndindex(3, 2):
        kept = slice(0, 5 - 2 * example)
        alpha, beta = (np.asarray(w[layer, example, kept], np.float64) for w in one[2:4])
        # float32 sums and quotients of five numbers of order 1.
        close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5)
        close(means.beta[layer, example, kept], np.full_like(beta, beta.mean()))
        close(means.alpha[layer, example, kept], np.full_like(beta, 2 - beta.mean()))
        shares = alpha / alpha.mean(), beta / beta.mean()
        close(tokens.beta[layer, example, kept], 2 * shares[1] / sum(shares))
        close(tokens.alpha[layer, example, kept], 2 * shares[0] / sum(shares))
    nothing = one._replace(counted=jnp.zeros_like(one.counted), beta=0 * one.beta)
    assert (weighting.layer_means("text", nothing, KEY).beta == 1).all()


def test_shuffled_weights_are_the_same_weights():
    one = random_weighed()
    found = weighting.shuffled("text", one, KEY)
    counted = np.asarray(one.counted)
    for example in range(2):
        old, new = (np.asarray(x.beta)[:, example][counted[:, example]] for x in (one, found))
        assert sorted(old) == sorted(new)
        assert (old != new).any()
    assert (np.asarray(found.beta)[~counted] == 1).all()
    np.testing.assert_array_equal(found.alpha, 2 - found.beta)
    orders = [np.argsort(np.asarray(found.beta)[:, i, :3].ravel()).tolist() for i in range(2)]
    assert orders[0] != orders[1]


def test_exchanged_weights():
    one = random_weighed()
    found = weighting.exchanged("text", one, KEY)
    assert (found.alpha == one.beta).all()
    assert (found.beta == one.alpha).all()


def abar(layers, layer, example):
    product = np.asarray(layers.attn[layer, example], np.float64) * np.asarray(
        layers.grad[layer, example], np.float64
    )
    return np.maximum(product, 0).mean(0)


def test_what_is_moved_alone_is_weighted():
    one = random_weighed()
    found = weighting.moved("text", one, KEY)
    assert (found.alpha == 1).all()
    assert (found.beta == 1).all()
    for layer, example in np.ndindex(3, 2):
        beta = np.asarray(one.beta[layer, example], np.float64)
        expected = beta[:, None] * abar(one, layer, example)
        # float32 products
        np.testing.assert_allclose(abar(found, layer, example), expected, rtol=1e-6)
    assert weighting.inside("text_self", one, KEY) is one
    np.testing.assert_array_equal(weighting.inside("image_to_text", one, KEY).attn, found.attn)


def test_values_of_keys_by_hand():
    one = random_weighed()
    found = weighting.key_values("text", one, KEY)
    assert (found.beta == 1).all()
    for layer, example in np.ndindex(3, 2):
        before, after = (abar(x, layer, example) for x in (one, found))
        of_keys = before.sum(0)
        gamma = of_keys * of_keys.sum() / (of_keys**2).sum()
        # float32 sums of ten products
        np.testing.assert_allclose(after, before * gamma, rtol=1e-5)
        np.testing.assert_allclose(after.sum(), before.sum(), rtol=1e-5)
    still = weighting.key_values("text", one._replace(grad=0 * one.grad), KEY)
    np.testing.assert_array_equal(still.attn, one.attn)


def test_a_rows_weight_is_lost_when_rows_are_normalised():
    """Of one layer of stage 1 nothing is left of beta in the other stream: eq. 8 and 9."""
    rng = np.random.default_rng(0)

    def layers(query, key, beta):
        shape = (1, 2, 2, query, key)
        attn, grad = (
            jnp.asarray(x, jnp.float32)
            for x in (rng.dirichlet(np.ones(key), shape[:-1]), rng.normal(size=shape))
        )
        beta = jnp.broadcast_to(jnp.asarray(beta, jnp.float32), (1, 2, query))
        return weighting._given(grad, attn, 2 - beta, beta)

    def image(beta, normalise=True):
        nonlocal rng
        rng = np.random.default_rng(0)
        blocks = [[{"qq": layers(4, 4, beta)}], [{"sq": layers(3, 4, np.ones(3))}]]
        first = lambda value, grad: value[..., 0]
        return attention.bimodal_accumulation(blocks, importance=first, normalise=normalise).sq

    beta = rng.uniform(0.1, 1.9, 4)
    assert_close(image(beta), image(np.ones(4)))
    plain = image(np.ones(4), normalise=False)
    assert np.abs(image(beta, normalise=False) - plain).max() > 0.01 * np.abs(plain).max()


# ---- the tables


def test_facts_by_hand(layers):
    for tag, one in layers.items():
        facts = weighting._facts(weighting._weigh(one), one)
        _, beta = attention.layer_weights(*one[2:], "grad_value")
        for b in range(2):
            rows, sizes, moved = [], [], []
            for i in range(len(beta)):
                counted = np.asarray(one.value_grad[i, b] != 0).any(-1)
                rows.append(np.asarray(beta[i, b], np.float64)[counted])
                product = np.asarray(one.after[i, b] * one.value_grad[i, b], np.float64)
                sizes.extend(np.maximum(product, 0).sum(-1)[counted])
                moved.extend(abar(one, i, b).sum(-1)[counted])
            means = [row.mean() for row in rows]
            expected = {
                "beta": np.mean(means),
                "layers": np.std(means),
                "tokens": np.sqrt(np.mean([row.var() for row in rows])),
                "moved": np.mean(moved),
                "agreement": stats.spearmanr(sizes, moved).statistic,
            }
            for name, value in expected.items():
                # float32 sums of some tens of numbers.
                np.testing.assert_allclose(
                    facts[name][b], value, rtol=1e-5, atol=1e-6, err_msg=f"{tag} {name}"
                )


def test_weights_at_the_target_token_by_hand(layers):
    weights = {tag: attention.layer_weights(*layers[tag][2:], "grad_value") for tag in layers}
    weighed = {tag: weighting._weigh(one) for tag, one in layers.items()}
    found = weighting._at_target(weighed, SCHEDULE, jnp.array([2, 1]))
    assert set(found) == {"text", "text_single", "text_self"}
    moved_nothing = 0
    for b, token in enumerate((2, 1)):
        alphas = [np.asarray(weights[tag][0][i, b], np.float64) for tag, i in ORDER]
        for place, (tag, i) in enumerate(ORDER):
            if tag not in found:
                continue
            beta = float(weights[tag][1][i, b, token])
            moved = abar(layers[tag], i, b)[token]
            kept, left = np.prod(alphas[:place], axis=0), np.prod(alphas[place + 1 :], axis=0)
            left = 1 if place + 1 == len(ORDER) else left[token]
            # Products of eight float32 numbers.
            np.testing.assert_allclose(found[tag]["beta"][i, b], beta, rtol=1e-5)
            direct = found[tag]["direct"][i, b]
            if moved.any():
                share = (moved * kept).sum() / moved.sum()
                np.testing.assert_allclose(direct, beta * left * share, rtol=1e-5)
            else:
                moved_nothing += 1
                assert np.isnan(direct)
    assert moved_nothing == 3


def test_likeness_by_hand():
    removable = np.array([[True] * 8 + [False] * 2, [True] * 3 + [False] * 7])
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 2, 10)).astype(np.float32)
    maps[:, 0, 8:] = 9  # not removable: in no top quarter
    maps[0, 0, :8] = [8, 7, 6, 5, 4, 3, 2, 1]
    maps[1, 0, :8] = [8, 1, 6, 5, 4, 3, 2, 7]
    correlation, top = weighting._likeness(jnp.asarray(maps), jnp.asarray(removable))
    # Squared differences of ranks: 36 twice, of 8 tokens: 1 - 6 * 72 / (8 * 63).
    np.testing.assert_allclose(correlation[1, 0], 1 - 432 / 504, rtol=1e-5)
    np.testing.assert_allclose(correlation[0], 1, rtol=1e-6)
    np.testing.assert_array_equal(top[:, 0], [1, 0.5])
    # A quarter of three tokens is none.
    assert np.isnan(top[:, 1]).all()


def test_the_tables_are_those_of_the_values(monkeypatch, tmp_path):
    """On values that are made up: relevance is random, and the model always right."""
    model, some = from_pretrained("vqa-shapes"), ("weighted", "shuffled")

    def relevance(model, inputs, variants, key):
        rows, tokens = inputs["text"].shape
        text = jax.random.normal(key, (len(variants), rows, tokens))
        weights = dict.fromkeys(weighting.FACTS, jnp.ones(rows))
        at_target = dict.fromkeys(weighting.AT_TARGET, jnp.ones((1, rows)))
        facts = {
            "weights": dict.fromkeys(tags_of(model), weights),
            "target_token": {"text": at_target},
        }
        return {name: {"text": one} for name, one in zip(variants, text, strict=True)}, facts

    def program(graph, drawn, modality):
        shape = (len(perturbation.SIGNS), len(perturbation.STEPS))
        return lambda _, inputs, maps, removable: np.ones((len(maps), *shape, len(removable)))

    monkeypatch.setattr(weighting, "relevance_by_variant", relevance)
    monkeypatch.setattr(weighting, "sweep_program", program)
    result = weighting.evaluate(model, modality=("text",), variants=some, examples=3, batch=2)
    assert list(result) == ["text"]
    found = result["text"]
    files = weighting.save(result, tmp_path)
    assert [file.name for file in files] == ["weighting-vqa-text.json", "weighting-vqa-text.md"]
    assert json.loads(files[0].read_text()) == found
    assert {k: found[k] for k in ("protocol", "modality", "split", "examples")} == {
        "protocol": PROTOCOL,
        "modality": "text",
        "split": "val",
        "examples": 3,
    }
    assert list(found["weights"]) == tags_of(model)
    assert list(found["perturbation"]["methods"]) == ["equal", *some]
    assert list(found["maps"]) == list(some)
    text = files[1].read_text()
    assert text == markdown(weighting.tables(found))
    for row in ("| vision | 1.000", "| text 1 | 1.000", "| shuffled |", "| equal |"):
        assert row in text


def test_the_command_line(tmp_path, monkeypatch, capsys):
    asked = {}

    def evaluate(model, **options):
        asked.update(options, task=model.task)
        return {}

    monkeypatch.setattr(weighting, "evaluate", evaluate)
    arguments = ["evaluate", "weighting", "--model", "vqa-shapes", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--examples", "3", "--modality", "text"]) == 0
    assert asked.pop("variants") == tuple(weighting.VARIANTS)
    assert asked == {
        "task": "vqa",
        "modality": ("text",),
        "split": "val",
        "examples": 3,
        "batch": 32,
        "seed": 0,
    }
    assert cli.main([*arguments, "--variant", "only stage 1:image,key values"]) == 0
    assert asked["variants"] == ("only stage 1, image", "key values")
    assert cli.main(["evaluate", "weighting", "--model", "clip-shapes"]) == 2
    assert "this test is made for CLIPmapper" in capsys.readouterr().err


BAD = {
    "variant": ({"variants": ("magic",)}, "unknown variant 'magic'; there are equal, weighted,"),
    "modality": ({"modality": ("sound",)}, "unknown modality 'sound'; there are image, text"),
    "none": ({"modality": ()}, "no modality given"),
    "few": ({"examples": 0}, "examples and batch must be at least 1, got 0 and 32"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD.keys())
def test_errors(vqa, options, text):
    with pytest.raises(ValueError, match=text):
        weighting.evaluate(vqa, **options)


def test_tables_of_another_protocol():
    with pytest.raises(ValueError, match=r"'weighting/1', .* got protocol 'perturbation/1'"):
        weighting.tables({"protocol": "perturbation/1"})
