"""Relevance of two streams from a schedule, all its methods, and `explain` on CLIPmapper."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import attention
from jaxrel.attention import TWO_STREAM_METHODS, Layers, two_streams
from jaxrel.attention.bimodal_methods import BY_LRP
from tests.zoo.clipmappers import TEXTS, answered, random_mapper
from tests.zoo.images import random_images

# ---- the equations, written out for one example in float64


def abar(layers, i, b):
    product = np.asarray(layers.attn[i, b], np.float64) * np.asarray(layers.grad[i, b], np.float64)
    return np.maximum(product, 0).mean(0)


def branch_weights(layers, i, b, importance):
    """Spec of the weighted rule, section 3: "grad_value"; 1 and 1 for equal accumulation."""
    if importance is None:
        return 1.0, 1.0
    before, after, grad = (np.asarray(x[i, b], np.float64) for x in layers[2:])
    u, v = (np.maximum(x * grad, 0).sum(-1, keepdims=True) for x in (before, after))
    total = np.where(u + v == 0, 1, u + v)
    return np.where(u + v == 0, 1, 2 * u / total), np.where(u + v == 0, 1, 2 * v / total)


def rbar(r, kept):
    moved = r - kept
    total = moved.sum(-1, keepdims=True)
    return np.divide(moved, total, out=np.zeros_like(moved), where=total > 0) + np.eye(len(r))


def by_loop(schedule, b, importance=None, residual=True):
    """Equations 5 to 11 over a schedule; `kept` is the diagonal that residuals carry."""
    size = {}
    for stage in (stage for block in schedule for stage in block):
        for pair, layers in stage.items():
            size[pair[0]], size[pair[1]] = layers.attn.shape[-2:]
    r = {x + y: np.eye(size[x]) * (x == y) for x in "sq" for y in "sq"}
    r |= {x + y: np.zeros((size[x], size[y])) for x, y in ("sq", "qs")}
    kept = {x: np.eye(size[x]) for x in "sq"}
    for block in schedule:
        count = max(len(layers.attn) for stage in block for layers in stage.values())
        for i in range(count):
            for stage in block:
                old, old_kept = dict(r), dict(kept)
                for (x, y), layers in stage.items():
                    if i >= len(layers.attn):
                        continue
                    a, other = abar(layers, i, b), "q" if x == "s" else "s"
                    alpha, beta = branch_weights(layers, i, b, importance)
                    if x == y:
                        own, across = a @ old[x + x], a @ old[x + other]
                    else:
                        mine, theirs = (rbar(old[z + z], old_kept[z]) for z in (x, y))
                        own, across = a @ old[y + x], mine.T @ a @ theirs
                    r[x + x] = alpha * old[x + x] + beta * own
                    r[x + other] = alpha * old[x + other] + beta * across
                    kept[x] = alpha * old_kept[x]
    if not residual:
        r |= {x + x: r[x + x] - kept[x] for x in "sq"}
    return r


def random_layers(rng, count, query, key, batch=2, heads=2, width=3):
    attn = rng.dirichlet(np.ones(key), (count, batch, heads, query))
    values = (rng.normal(size=(count, batch, query, width)) for _ in range(3))
    return Layers(attn, rng.normal(size=attn.shape), *values)


def random_schedule(seed=0, s=3, q=4, layers=3, reads=True):
    """CLIPmapper's: two towers, then the mapper, whose last layer lacks the image's part."""
    rng = np.random.default_rng(seed)

    def kind(count, pair):
        sizes = {"s": s, "q": q}
        return random_layers(rng, count, sizes[pair[0]], sizes[pair[1]])

    read = {"qs": kind(layers - 1, "qs")} if reads else {}
    return [
        [{"qq": kind(2, "qq")}],
        [{"ss": kind(1, "ss")}],
        [
            {"ss": kind(layers, "ss"), "qq": kind(layers, "qq")},
            {"sq": kind(layers, "sq"), **read},
            {"ss": kind(layers, "ss"), "qq": kind(layers - 1, "qq")},
        ],
    ]


def float32(schedule):
    return jax.tree.map(lambda x: x.astype(np.float32), schedule)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("importance", "residual", "reads"),
    [
        (None, True, True),
        (None, False, False),
        ("grad_value", True, True),
        ("grad_value", False, True),
    ],
)
def test_two_streams_is_the_loop(importance, residual, reads):
    schedule = random_schedule(reads=reads)
    maps = two_streams(schedule, importance=importance, residual=residual)
    for b in range(2):
        for pair, expected in by_loop(schedule, b, importance, residual).items():
            # float64: sums in another order, and R - kept cancels in the loop.
            np.testing.assert_allclose(getattr(maps, pair)[b], expected, rtol=1e-9, atol=1e-9)


def test_known_models_are_schedules():
    def assert_same(found, expected):
        # The same sums in another program: they may be fused, and so rounded, differently.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

    rng = np.random.default_rng(1)
    sizes = ((2, 3, 3), (1, 4, 4), (3, 3, 3), (3, 4, 4), (3, 3, 4), (3, 4, 3))
    s, q, of_s, of_q, s_cross, q_cross = (float32(random_layers(rng, *size)) for size in sizes)
    expected = attention.bimodal(s, q, attention.CoAttention(s_cross, of_s, q_cross, of_q))
    short = [jax.tree.map(lambda x: x[:2], layers) for layers in (q_cross, of_q)]
    stages = [{"sq": s_cross, "qs": short[0]}, {"ss": of_s, "qq": short[1]}]
    # A block without stages has no layers.
    maps = two_streams([[{"ss": s}], [], [{"qq": q}], stages])
    jax.tree.map(assert_same, maps, expected)
    expected = attention.encoder_decoder(q, of_s, s_cross, importance="norm")
    maps = two_streams([[{"qq": q}], [{"ss": of_s}, {"sq": s_cross}]], importance="norm")
    jax.tree.map(assert_same, maps, expected)


@pytest.mark.usefixtures("x64")
def test_equal_importance_is_equal_accumulation():
    schedule = random_schedule(2)
    same = two_streams(schedule, importance=lambda value, grad: jnp.ones(value.shape[:-1]))
    for weighted, equal in zip(same, two_streams(schedule), strict=True):
        # The weights are exactly 1; only fusion of float64 sums may differ.
        np.testing.assert_allclose(weighted, equal, rtol=1e-12, atol=1e-12)


def error(match):
    return pytest.raises(ValueError, match=match)


def test_schedules_that_do_not_fit():
    schedule = float32(random_schedule(3))
    towers, mapper = schedule[:2], schedule[2]
    ss, sq, qq = mapper[0]["ss"], mapper[1]["sq"], mapper[0]["qq"]
    for stage, got in (({"st": ss}, "st"), ({"ss": ss, "sq": sq}, "ss, sq"), ({}, "none")):
        with error(rf"two_streams: a stage maps pairs .* the pairs are ss, sq, qq, qs; got {got}$"):
            two_streams([*towers, [stage]])
    with error(r"two_streams: no stream attends to the other; use equal or weighted"):
        two_streams(towers)
    with error(r"two_streams: sq: expected maps \[layers, batch, .* got \(2, 2, 3, 4\)"):
        two_streams([[{"sq": Layers(sq.attn[0], sq.grad[0])}]])
    with error(
        r"two_streams: ss: expected maps \(3 or 2, 2, heads, 3, 3\) to fit .* \(3, 2, 2, 4, 4\)"
    ):
        two_streams([[{"ss": qq}, {"sq": sq}]])
    with error(
        r"two_streams: ss: expected maps \(3 or 2, 2, heads, 3, 3\) to fit .* \(1, 2, 2, 3, 3\)"
    ):
        two_streams([[{"ss": jax.tree.map(lambda x: x[:1], ss)}, {"sq": sq}]])
    with error(r"two_streams: ss: weighted accumulation needs before, after, value_grad; give"):
        two_streams([[{"ss": Layers(ss.attn, ss.grad)}, {"sq": sq}]], importance="norm")
    with error(r"importance: 'size' is unknown; expected one of"):
        two_streams(schedule, importance="size")
    broken = sq.grad.copy()
    broken[1, 0, 0, 0, 0] = np.nan
    with error(r"two_streams: sq: grad: NaN or infinity in layer 1 of 3"):
        two_streams([[{"ss": ss}, {"sq": sq._replace(grad=broken)}]])


# ---- all methods on CLIPmapper


def tags_of(schedule):
    return tuple(tag for block in schedule for stage in block for _, tag in stage)


@pytest.fixture(scope="module")
def vqa():
    return random_mapper("vqa", layers=3)


@pytest.fixture(scope="module")
def caption():
    return random_mapper("caption", layers=2)


@pytest.fixture(scope="module")
def questions(vqa):
    return answered(vqa.prepare(image=random_images(), text=TEXTS))


def all_methods(model, inputs, methods=TWO_STREAM_METHODS):
    """Scores and rows of the methods, and what goes into them, in one program."""
    schedule, made_of = model.layout.schedule, {}

    def recorded(name, transformation):
        def transform(*args, **kwargs):
            def function(*inputs):
                made_of[name] = transformation(*args, **kwargs)(*inputs)
                return made_of[name]

            return function

        return transform

    explain = attention.value_and_two_stream_relevance(
        lambda model, inputs: model.score(inputs),
        schedule,
        method=methods,
        target_token=model.target_tokens(inputs)["text"],
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("capture_with_grad", "lrp"):
            transformation = getattr(bimodal_methods, name)
            patch.setattr(bimodal_methods, name, recorded(name, transformation))
        return explain(model, inputs), made_of


def rolled_out(maps, b):
    flow = np.eye(maps[0].shape[-1])
    for attn in maps:
        step = np.asarray(attn[b], np.float64).mean(0) + np.eye(len(flow))
        flow = step / step.sum(-1, keepdims=True) @ flow
    return flow


def transformer_attribution(layers, b):
    flow = np.eye(layers[0].attn.shape[-1])
    for one in layers:
        flow = flow + abar(one, 0, b) @ flow
    return flow


def rows_by_hand(name, schedule, layers, b, seen):
    """The maps ss and sq of one example; `seen` tokens of s reach what is explained."""
    if name in ("equal", "weighted", "equal_lrp"):
        blocks = [[{p: layers[tag] for p, tag in stage} for stage in block] for block in schedule]
        maps = by_loop(blocks, b, "grad_value" if name == "weighted" else None, residual=False)
        return maps["ss"], maps["sq"]

    def kind(pair):
        for block in schedule:
            there = [layers[tag] for stage in block for p, tag in stage if p == pair]
            for i in range(max((len(x.attn) for x in there), default=0)):
                for x in there:
                    if i < len(x.attn):
                        yield Layers(x.attn[i : i + 1], x.grad[i : i + 1])

    ss, sq, qq = (list(kind(pair)) for pair in ("ss", "sq", "qq"))
    last = [[np.asarray(x[0, b], np.float64) for x in kind[-1][:2]] for kind in (ss, sq)]
    if name in ("raw", "partial_lrp"):
        return [attn.mean(0) for attn, _ in last]
    if name == "grad_cam":
        last = [(attn, np.where(attn > 0, grad, 0)) for attn, grad in last]
        of_heads = [grad.mean((1, 2), keepdims=True) * attn for attn, grad in last]
        return [np.maximum(x.mean(0), 0) for x in of_heads]
    if name == "rollout":
        text, image = (rolled_out([x.attn[0] for x in kind], b) for kind in (ss, qq))
        return text, text[:seen].T @ last[1][0].mean(0)[:seen] @ image
    text, image = (transformer_attribution(kind, b) for kind in (ss, qq))
    return text, text.T @ abar(sq[-1], 0, b) @ image


ALL_METHODS = jax.jit(all_methods)
WITHOUT_LRP = tuple(name for name in TWO_STREAM_METHODS if name not in BY_LRP)


@pytest.fixture(scope="module")
def explained(vqa, questions):
    return ALL_METHODS(vqa, questions)


def test_methods_are_what_they_say(vqa, questions, explained):
    (score, rows), made_of = explained
    of_capture, values, grads = made_of["capture_with_grad"]
    np.testing.assert_array_equal(score, of_capture)
    schedule = vqa.layout.schedule
    plain = {
        tag: Layers(
            values[tag],
            grads[tag],
            values[f"{tag}/before"],
            values[f"{tag}/after"],
            grads[f"{tag}/after"],
        )
        for tag in tags_of(schedule)
    }
    target_token = np.asarray(vqa.target_tokens(questions)["text"])
    assert set(rows) == set(TWO_STREAM_METHODS)
    for name, of_method in rows.items():
        layers = plain
        if name in BY_LRP:
            layers = {tag: x._replace(attn=made_of["lrp"][tag]) for tag, x in plain.items()}
        for b, token in enumerate(target_token):
            maps = rows_by_hand(name, schedule, layers, b, seen=token + 1)
            for row, expected in zip(of_method, maps, strict=True):
                scale = np.abs(expected[token]).max()
                # The heads' weights may all be negative, and then no attention is left.
                assert scale > 0 or name == "grad_cam", name
                # float32 through about 20 layers, against float64.
                np.testing.assert_allclose(
                    row[b], expected[token], rtol=0, atol=1e-4 * scale, err_msg=name
                )


def test_padding_does_not_matter(vqa, questions, explained):
    """It has no relevance, and what it is changes that of nothing else."""
    (_, rows), _ = explained
    padding = np.arange(9) > np.asarray(vqa.target_tokens(questions)["text"])[:, None]
    changed = {**questions, "text": jnp.where(padding, 5, questions["text"])}
    (_, others), _ = ALL_METHODS(vqa, changed)
    for name, of_method in rows.items():
        np.testing.assert_array_equal(np.asarray(of_method[0])[padding], 0, err_msg=name)
        for row, other in zip(of_method, others[name], strict=True):
            atol = 1e-5 * np.abs(row).max()  # sums over zeros in another order
            np.testing.assert_allclose(other, row, rtol=0, atol=atol, err_msg=name)


def test_one_layer():
    """The values of a single layer, tagged outside a scan, have no layer axis."""
    model = random_mapper("vqa", layers=1)
    inputs = answered(model.prepare(image=random_images(), text=TEXTS))
    (_, rows), _ = jax.eval_shape(lambda: all_methods(model, inputs, WITHOUT_LRP))
    assert {(text.shape, image.shape) for text, image in rows.values()} == {((2, 9), (2, 5))}


def test_methods_that_do_not_fit(vqa, questions):
    fun = attention.value_and_two_stream_relevance
    schedule = vqa.layout.schedule
    with error(r"unknown attention method 'lrp'; there are equal, weighted, raw"):
        fun(lambda x: x, schedule, method="lrp", target_token=0)
    with error(r"importance: 'size' is unknown"):
        fun(lambda x: x, schedule, method="weighted", target_token=0, importance="size")
    other = [[(("sq", "text_to_image"),)]]
    with error(r"tags nothing named 'text_to_image'; its tags: .*'text_to_image'"):
        fun(lambda x: vqa.score(x), other, method="equal", target_token=0)(questions)
    alone = [[(("sq", "text_to_image"),)]]
    with error(r"the schedule has no attention of the kind 'ss'"):
        jax.eval_shape(fun(lambda x: vqa.score(x), alone, method="raw", target_token=0), questions)


# ---- explain


def assert_close(one, text, image):
    """The relevance of an explanation, of the words and of the patches."""
    for found, expected in ((one.text, text), (one.image, image)):
        scale = np.abs(expected).max()
        # float32, fused in another program or over other zeros.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale, err_msg=one.method)


def test_explain_questions(vqa, questions, explained):
    one = jaxrel.explain(
        vqa, image=random_images(), text=TEXTS, target=["two", "red"], method="weighted"
    )
    (score, rows), _ = explained
    text, image = (np.asarray(x) for x in rows["weighted"])
    words = np.asarray(vqa.content(questions)["text"])
    assert_close(one, np.where(words, text, 0), image[:, 1:].reshape(2, 2, 2))
    np.testing.assert_allclose(one.score, score, rtol=1e-4)
    assert [target.split(" (")[0] for target in one.target] == ["two", "red"]
    assert one.settings == "all layers, all heads, importance grad_value"
    assert one.report["text"]["tokens"] == [5, 3]
    assert [word for word, _ in one.words(1)] == ["a", "blue", "square"]
    assert not one.signed


def test_explain_the_words_of_captions(caption):
    """Each word as if it were alone: later words and other captions change nothing."""
    images = random_images(3)

    def explain(images, text):
        return jaxrel.explain(caption, image=images, text=text, method=WITHOUT_LRP)

    maps = explain(images[:2], TEXTS)
    others = explain(images[:2], ["what is a red square", "a red square"])
    beside = explain([images[2], images[1]], ["is a circle above what", TEXTS[1]])
    for one, other, another in zip(maps, others, beside, strict=True):
        assert (one.image.shape, one.text.shape) == ((8, 2, 2), (8, 9))
        assert one.report["image"] == [0, 0, 0, 0, 0, 1, 1, 1]
        assert one.target[4] == "what is a red [circle]"
        np.testing.assert_array_equal(one.pixels[7], caption.seen(images[1]))
        for i in (0, 1, 2, 3, 5):
            assert_close(other[i], one[i].text, one[i].image)
            # A word has the relevance of those before it.
            before = int(one.target[i].count(" "))
            assert not one.text[i, before + 1 :].any()
        assert_close(another[5:], one[5:].text, one[5:].image)
    equal = maps[WITHOUT_LRP.index("equal")]
    assert (equal.text[4] > 0).tolist() == [False, *[True] * 4, *[False] * 4]
    assert np.ptp(equal.image[4]) > 0


def test_what_explain_refuses():
    model, image = random_mapper("vqa", layers=1), random_images(1)[0]
    known = "equal, weighted, raw, rollout, grad_cam, transformer_attribution, equal_lrp"
    with error(rf"unknown method 'no_aggregation'; there are {known}"):
        jaxrel.explain(model, image=image, text="what is red", method="no_aggregation")
    for choice in ({"layers": [-1]}, {"heads": [0]}):
        with error(r"layers and heads choose .* in CLIPMapperVQA they attend to each other"):
            jaxrel.explain(model, image=image, text="what is red", **choice)
    with error(r"this model has no answer 'purple'; it has 4 answers: red, blue, two, yes"):
        jaxrel.explain(model, image=image, text="what is red", target="purple")


def test_explain_whole_captions(caption):
    """The mean of the words' logits, and of what is linear in them."""
    images = random_images()
    words = jaxrel.explain(caption, image=images, text=TEXTS, method=["raw", "lrp"])
    whole = jaxrel.explain(
        caption, image=images, text=TEXTS, target="caption", method=["raw", "lrp"]
    )
    for one, by_word in zip(whole, words, strict=True):
        assert one.target == tuple(TEXTS)
        assert one.report["image"] == [0, 1]
        of = np.asarray(by_word.report["image"])
        image = np.stack([by_word.image[of == i].mean(0) for i in (0, 1)])
        score = [by_word.score[of == i].mean() for i in (0, 1)]
        np.testing.assert_allclose(one.score, score, rtol=1e-5)
        np.testing.assert_allclose(one.image, image, rtol=0, atol=1e-4 * np.abs(image).max())
