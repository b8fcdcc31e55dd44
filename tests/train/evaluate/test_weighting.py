"""What the weights do: the variants against the equations, and the tables by hand."""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from jaxrel import attention, cli
from jaxrel.explanations.explain import token_relevance
from jaxrel.models import from_pretrained
from jaxrel.train.evaluate import weighting
from jaxrel.train.evaluate.weighting import PROTOCOL, VARIANTS, Weighed
from tests.zoo.clipmappers import TEXTS, answered, random_mapper
from tests.zoo.images import random_images


def tags_of(model):
    return [tag for block in model.layout.schedule for stage in block for _, tag in stage]


@pytest.fixture(scope="module")
def vqa(quick_compile):
    return random_mapper("vqa", layers=2)


@pytest.fixture(scope="module")
def questions(vqa):
    return answered(vqa.prepare(image=random_images(), text=TEXTS))


@pytest.fixture(scope="module")
def explained(vqa, questions):
    """Relevance by variant and the facts."""
    return weighting.relevance_by_variant(vqa, questions, tuple(VARIANTS), jax.random.key(0))


@pytest.fixture(scope="module")
def layers(vqa, questions):
    """The attention layers by tag, with their values."""
    captured = attention.value_and_layers(
        lambda model, inputs: model.score(inputs), vqa.layout.schedule
    )
    return jax.jit(captured)(vqa, questions)[1]


def assert_close(found, expected):
    # float32 through about 20 layers, in another program.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ---- the seam: layers as `bimodal_accumulation` takes them


def test_layers_make_the_weighted_method(vqa, questions, layers):
    blocks = [
        [{p: layers[tag] for p, tag in stage} for stage in block] for block in vqa.layout.schedule
    ]
    maps = attention.bimodal_accumulation(blocks, importance="grad_value", residual=False)
    target_token = vqa.target_tokens(questions)["text"]
    expected = token_relevance(vqa, questions, method=("weighted",))["weighted"]
    assert_close(attention.row(maps.ss, target_token), expected["text"])
    assert_close(attention.row(maps.sq, target_token), expected["vision"])


def test_layers_without_values(vqa, questions, layers):
    captured = attention.value_and_layers(
        lambda model, inputs: model.score(inputs), vqa.layout.schedule, values=False
    )
    score, found = jax.eval_shape(captured, vqa, questions)
    assert score.shape == (2,)
    for tag, one in found.items():
        assert [x is None for x in one] == [False, False, True, True, True]
        assert one.attn.shape == one.grad.shape == layers[tag].attn.shape
    unknown = attention.value_and_layers(lambda x: x.sum(-1), [[[("ss", "nowhere")]]])
    with pytest.raises(ValueError, match="the function tags nothing named 'nowhere'"):
        unknown(jnp.ones((2, 3)))


# ---- the variants


def test_equal_and_weighted_are_the_methods(vqa, questions, explained):
    expected = token_relevance(vqa, questions, method=("equal", "weighted"))
    for method, of_streams in expected.items():
        for stream, relevance in of_streams.items():
            assert_close(explained[0][method][stream], relevance)


def test_variants_differ(explained):
    """None is another one by a slip: but for the image, of which words see little."""
    maps = [np.asarray(one["vision"]) for one in explained[0].values()]
    for i, one in enumerate(maps):
        assert np.isfinite(one).all()
        for other in maps[:i]:
            assert np.abs(one - other).max() > 1e-4 * np.abs(one).max()


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


def test_every_kind_of_layer_is_in_one_place(vqa):
    places = (*weighting.VISION, *weighting.TEXT, *weighting.OWN, *weighting.CROSS)
    assert sorted(places) == sorted(tags_of(vqa))


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


def test_facts_by_hand(explained, layers):
    facts = explained[1]["weights"]
    assert set(facts) == set(layers)
    for tag, one in layers.items():
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
                # float32 sums; the two programs round the model's values differently.
                np.testing.assert_allclose(
                    facts[tag][name][b], value, rtol=1e-3, atol=1e-4, err_msg=f"{tag} {name}"
                )


def test_weights_at_the_target_token_by_hand(vqa, questions, explained, layers):
    # The order in which the text's layers run.
    order = [("text", 0), ("text", 1)]
    mapper = ("text_single", "text_to_image", "text_self")
    order += [(tag, i) for i in range(2) for tag in mapper]
    weights = {tag: attention.layer_weights(*layers[tag][2:], "grad_value") for tag, _ in order}
    found = explained[1]["target_token"]
    assert set(found) == {"text", "text_single", "text_self"}
    for b, token in enumerate(np.asarray(vqa.target_tokens(questions)["text"])):
        alphas = [np.asarray(weights[tag][0][i, b], np.float64) for tag, i in order]
        for place, (tag, i) in enumerate(order):
            if tag not in found:
                continue
            beta = float(weights[tag][1][i, b, token])
            moved = abar(layers[tag], i, b)[token]
            kept, left = np.prod(alphas[:place], axis=0), np.prod(alphas[place + 1 :], axis=0)
            left = 1 if place + 1 == len(order) else left[token]
            # Products of eight float32 numbers, of which the two programs differ in rounding.
            np.testing.assert_allclose(found[tag]["beta"][i, b], beta, rtol=1e-3)
            direct = found[tag]["direct"][i, b]
            if moved.any():
                share = (moved * kept).sum() / moved.sum()
                np.testing.assert_allclose(direct, beta * left * share, rtol=1e-3)
            else:
                assert np.isnan(direct)


def test_where_little_is_moved_a_layer_alone_is_nearly_all(vqa, questions, layers, explained):
    small = {tag: x._replace(attn=1e-4 * x.attn) for tag, x in layers.items()}
    blocks = [
        [{p: small[tag] for p, tag in stage} for stage in block] for block in vqa.layout.schedule
    ]
    maps = attention.bimodal_accumulation(blocks, importance="grad_value", residual=False)
    for b, token in enumerate(np.asarray(vqa.target_tokens(questions)["text"])):
        expected = sum(
            np.nan_to_num(explained[1]["target_token"][tag]["direct"][i, b])
            * abar(small[tag], i, b)[token]
            for tag in ("text", "text_single", "text_self")
            for i in range(2)
        )
        # What two layers move one after the other is about 1e-4 of it.
        np.testing.assert_allclose(maps.ss[b, token].sum(), expected.sum(), rtol=1e-2)


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


SOME = ("weighted", "only stage 1, text", "shuffled", "weighted, not normalised")


@pytest.mark.parametrize(
    ("name", "modality"), [("vqa-shapes", "text"), ("caption-shapes", "image")]
)
def test_evaluate(name, modality, tmp_path):
    model = from_pretrained(name)
    result = weighting.evaluate(model, modality=(modality,), variants=SOME, examples=3, batch=2)
    assert list(result) == [modality]
    files = weighting.save(result, tmp_path)
    stem = f"weighting-{model.task}-{modality}"
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert {file.name for file in files} == {f"{stem}.json", f"{stem}.md"}
    found = result[modality]
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == found
    assert {k: found[k] for k in ("protocol", "modality", "split", "examples")} == {
        "protocol": PROTOCOL,
        "modality": modality,
        "split": "val",
        "examples": 3,
    }
    assert list(found["weights"]) == tags_of(model)
    assert list(found["perturbation"]["methods"]) == ["equal", *SOME]
    assert list(found["maps"]) == list(SOME)
    assert found["perturbation"]["examples"] == 3
    for facts in found["weights"].values():
        assert 0 <= facts["beta"]["mean"] <= 2
    text = weighting.markdown(found)
    assert text == (tmp_path / f"{stem}.md").read_text()
    for row in ("| vision |", "| text_self 2 |", "| only stage 1, text |", "| equal |"):
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
    "variant": ({"variants": ("magic",)}, "unknown variant 'magic'; there are equal; weighted;"),
    "modality": ({"modality": ("sound",)}, "unknown modality 'sound'; there are image; text"),
    "none": ({"modality": ()}, "no modality given"),
    "few": ({"examples": 0}, "examples and batch must be at least 1, got 0 and 32"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD.keys())
def test_errors(vqa, options, text):
    with pytest.raises(ValueError, match=text):
        weighting.evaluate(vqa, **options)


def test_tables_of_another_protocol():
    with pytest.raises(ValueError, match=r"'weighting/1', .* got protocol 'perturbation/1'"):
        weighting.markdown({"protocol": "perturbation/1"})
