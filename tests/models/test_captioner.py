"""Captioners: equal to the reference implementation, and what they say to bad input."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel.models import Processor, captions, decoding, word_tokenizer
from jaxrel.models.captioner import Captioner, CaptionerConfig, reference_order
from tests.zoo.captioners import (
    CONFIG,
    REFERENCES,
    REGIONS,
    RESNET,
    TEXTS,
    WORDS,
    biased,
    captioner,
    load,
    processor,
    random_regions,
    reference,
    reference_config,
    tensors,
)
from tests.zoo.images import random_images

# float32 values of order 1 to 10 after a few layers, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}

FORWARD = jax.jit(lambda model, inputs: model(inputs, return_attention=True))
ENCODE = jax.jit(Captioner.encode)


@pytest.fixture(scope="module", params=["adaptive", "gridtd", "aoa"])
def model(request):
    return captioner(request.param)


@pytest.fixture(scope="module")
def inputs(model):
    return model.prepare(image=random_images(), text=TEXTS)


def close(actual, expected):
    """Within 1e-5 of the largest value: the logits reach 46."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ---- the reference implementation


@pytest.mark.parametrize("name", REFERENCES)
def test_teacher_forced_as_the_reference(name):
    (model, inputs), arrays, order = reference(name), load(name), reference_order(20)
    logits, maps = FORWARD(model, inputs)
    close(logits, arrays["fwd/predictions"][..., order])
    heads = 2 if name.startswith("aoa") else 1
    positions = 6 if name.endswith("regions") else 16
    assert maps["attention"].shape == (3, 10, heads, positions)
    np.testing.assert_allclose(maps["attention"].sum(-1), 1, rtol=1e-5)
    if "fwd/alphas" in arrays:
        close(maps["attention"][:, :, 0], arrays["fwd/alphas"])
        close(maps["sentinel"], arrays["fwd/betas"][..., 0])
    else:
        assert set(maps) == {"attention"}


@pytest.mark.parametrize("name", REFERENCES)
def test_scheduled_sampling_as_the_reference(name):
    model, inputs = reference(name)
    own = load(name)["fwd/predictions_ss1"][..., reference_order(20)]
    mixed = jax.jit(Captioner.scheduled_logits)(model, inputs, jnp.array([True, False, True]))
    close(mixed[::2], own[::2])
    close(mixed[1], FORWARD(model, inputs)[0][1])


def test_scheduled_sampling_begins_at_the_step_given():
    model = captioner("adaptive")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    given = FORWARD(model, inputs)[0]
    text = np.asarray(inputs["text"]).copy()
    assert (text[:, 2] != given[:, 1].argmax(-1)).all()
    text[:, 2] = given[:, 1].argmax(-1)
    expected = FORWARD(model, inputs | {"text": text})[0][:, :3]
    scheduled = jax.jit(Captioner.scheduled_logits, static_argnames="from_step")
    found = scheduled(model, inputs, jnp.array([True, True]), from_step=2)
    close(found[:, :3], expected)


@pytest.mark.parametrize("name", REFERENCES)
def test_decoding_as_the_reference(name):
    """It forbids no token, and these captions hold none that is forbidden here."""
    (model, inputs), arrays, order = reference(name), load(name), reference_order(20)
    features = jax.jit(lambda model, x: model._features(x))(model, inputs)

    @functools.partial(jax.jit, static_argnames="beams")
    def write(model, features, beams):
        step, state = model.decoder(features)
        if beams == 1:
            return decoding.greedy(step, state, model.caption_format())
        return decoding.beam_search(step, state, model.caption_format(), beams=beams)

    def words(row):
        ids = order[row]
        return ids[(ids > 0) & (ids < 17)].tolist()

    found = write(model, features, 1)
    for row, ids in zip(np.asarray(found.ids), arrays["dec/sample_greedy_seq"], strict=True):
        assert words(row) == ids[ids > 0].tolist()
        if "dec/greedy_ids_raw" in arrays:
            assert words(row) in [
                r[(r > 0) & (r < 17)].tolist() for r in arrays["dec/greedy_ids_raw"]
            ]
    # The end is the first 0 there, with its own log-probability; what follows does not count.
    sequence = arrays["dec/sample_greedy_seq"]
    counted = np.cumsum(sequence == 0, axis=1) - (sequence == 0) == 0
    total = (arrays["dec/sample_greedy_logprobs"] * counted).sum(-1)
    np.testing.assert_allclose(found.log_probability, total, rtol=1e-4)
    assert found.ended.all()
    for beams in (2, 3):
        found = write(model, features[:1], beams)
        assert words(np.asarray(found.ids[0])) == arrays[f"dec/beam{beams}_ids"].tolist()


def test_weights_of_the_reference_that_do_not_fit():
    given, config = tensors("gridtd"), reference_config("gridtd")
    with error(r"trains with attention='as coded', and the config has 'paper'"):
        Captioner.from_reference(replace(config, attention="paper"), given)
    with error(r"missing: decoder_aoa_linear.bias.* unexpected: AdaAttention.W_g_proj.weight"):
        Captioner.from_reference(replace(config, kind="aoa"), given)
    without = {name: x for name, x in given.items() if name != "LanguageLSTM.bias_hh"}
    with error(r"missing: LanguageLSTM.bias, LanguageLSTM.weight.* unexpected: LanguageLSTM.bias_"):
        Captioner.from_reference(config, without)
    with error(r"embedding.weight has shape \[20, 8\], and config.json says \[21, 8\]"):
        Captioner.from_reference(replace(config, vocab_size=21), given)
    cut = given | {"LanguageLSTM.weight_hh": given["LanguageLSTM.weight_hh"][:8]}
    with error(r"LanguageLSTM.weight_ih and LanguageLSTM.weight_hh have 32 and 8 rows"):
        Captioner.from_reference(config, cut)
    nan = given | {"fc.bias": np.full(20, np.nan, np.float32)}
    with error(r"fc.bias has 20 values of 20 that are NaN"):
        Captioner.from_reference(config, nan)
    with error(r"img_encoder.encoder"):
        Captioner.from_reference(
            config, {name: x for name, x in given.items() if "encoder" not in name}
        )


def test_the_order_of_the_vocabulary():
    theirs = ["<pad>", "x", "y", "z", "<unk>", "<start>", "<end>"]
    ours = [theirs[i] for i in reference_order(7)]
    assert ours == word_tokenizer(["x", "y", "z"], 5).convert_ids_to_tokens(range(7))


# ---- the forms of adaptive attention


@pytest.mark.parametrize("form", ["paper", "as coded"])
def test_forms_of_attention(form):
    """Against loops over positions (Lu et al. 2017, eq. 6 to 13)."""
    attention = captioner("adaptive", attention=form).cell.attention
    rng = np.random.default_rng(1)
    values, hidden, sentinel = (rng.normal(size=shape) for shape in ((2, 16, 8), (2, 8), (2, 8)))
    context = captioner("adaptive").cell.start(jnp.asarray(values), jnp.zeros((2, 6)))[0]
    context = context._replace(keys=attention.image(jnp.asarray(values)))
    found, maps = attention(context, jnp.asarray(hidden), jnp.asarray(sentinel))
    p = {n: np.float64(x[...]) for n, x in flat(attention).items()}
    w = p["score.kernel"][:, 0]
    for b in range(2):
        u = hidden[b] @ p["hidden.kernel"]
        keys = values[b] @ p["image.kernel"] + p["image.bias"]
        added = [u if form == "paper" else u[k] for k in range(16)]
        scores = np.array([np.tanh(keys[k] + added[k]) @ w for k in range(16)])
        last = np.tanh(sentinel[b] @ p["sentinel.kernel"] + p["sentinel.bias"] + u) @ w
        alpha = np.exp(scores) / np.exp(scores).sum()
        beta = np.exp(last) / (np.exp(scores).sum() + np.exp(last))
        np.testing.assert_allclose(maps["attention"][b, 0], alpha, rtol=1e-4)
        np.testing.assert_allclose(maps["sentinel"][b], beta, rtol=1e-4)
        mixed = beta * sentinel[b] + (1 - beta) * alpha @ values[b]
        np.testing.assert_allclose(found[b], mixed, rtol=1e-4, atol=1e-5)


def flat(module):
    paths = nnx.to_flat_state(nnx.state(module, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in paths}


# ---- logits, scores and maps


def test_batch_is_one_by_one_and_padding_does_not_matter(model, inputs):
    logits, maps = FORWARD(model, inputs)
    assert (logits.shape, logits.dtype) == ((2, 9, 11), jnp.float32)
    for i in range(2):
        one = {"image": inputs["image"][i : i + 1], "text": inputs["text"][i : i + 1, :7]}
        alone, of_one = FORWARD(model, one)
        np.testing.assert_allclose(alone[0], logits[i, :7], **ROUNDING)
        for name, x in of_one.items():
            np.testing.assert_allclose(x[0], maps[name][i, :7], **ROUNDING)


def test_later_words_change_no_earlier_logit(model, inputs):
    logits, _ = FORWARD(model, inputs)
    other, _ = FORWARD(model, {**inputs, "text": inputs["text"].at[:, 4].set(9)})
    np.testing.assert_array_equal(other[:, :4], logits[:, :4])
    assert np.abs(other[:, 4] - logits[:, 4]).min() > 0


def test_steps_are_the_scan(model, inputs):
    """The pieces, one by one and compiled, give what the whole gives."""
    logits, maps = FORWARD(model, inputs)
    context, state = model.start(ENCODE(model, inputs["image"]))
    step = jax.jit(lambda model, *args: model.step(*args))
    for place in range(4):
        word = model.embed(inputs["text"][:, place])
        state, found, at = step(model, context, state, word)
        np.testing.assert_allclose(found, logits[:, place], **ROUNDING)
        for name, x in at.items():
            np.testing.assert_allclose(x, maps[name][:, place], **ROUNDING)


def test_scores_are_the_logits_of_words(model, inputs, monkeypatch):
    logits, maps = FORWARD(model, inputs)
    text = np.asarray(inputs["text"])
    scores = jax.jit(Captioner.word_scores)(model, inputs)
    expected = np.zeros((2, 9))
    for b in range(2):
        for i in range(1, 9):
            expected[b, i] = logits[b, i - 1, text[b, i]]
    np.testing.assert_allclose(scores, expected, **ROUNDING)
    pairs = model.pairs(inputs)
    of_rows = jax.jit(Captioner.score)(model, pairs)
    example, position = pairs["example"], pairs["position"]
    np.testing.assert_allclose(of_rows, expected[example, position], **ROUNDING)
    one = jax.jit(Captioner.score)(model, inputs, np.array([5, 3]))
    np.testing.assert_allclose(one, expected[[0, 1], [5, 3]], **ROUNDING)
    aligned = jax.jit(Captioner.attention_maps)(model, inputs)
    for name, x in aligned.items():
        np.testing.assert_array_equal(x[:, 0], 0)
        np.testing.assert_allclose(x[:, 1:], maps[name][:, :-1], **ROUNDING)
    monkeypatch.setattr(Captioner, "__call__", lambda *_: logits)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    mean = [
        np.mean([log_p[b, i - 1, text[b, i]] for i in range(1, length)])
        for b, length in enumerate((7, 5))
    ]
    np.testing.assert_allclose(model.log_probability(inputs), mean, rtol=1e-5)


def test_tags(model, inputs):
    names = ("features", "features/tokens", "text/tokens", "attention")
    names += () if model.config.kind == "aoa" else ("sentinel",)
    _, tagged = jax.jit(jaxrel.capture(lambda m, x: m(x), names))(model, inputs)
    features = ENCODE(model, inputs["image"])
    np.testing.assert_allclose(tagged["features"].reshape(features.shape), features, **ROUNDING)
    assert tagged["features"].shape == (2, 4, 4, 6)
    np.testing.assert_allclose(tagged["features/tokens"], features, **ROUNDING)
    np.testing.assert_array_equal(tagged["text/tokens"], model.embed(inputs["text"]))
    assert tagged["attention"].shape[0] == 9


def test_relevance_reaches_pixels_and_words(model, inputs):
    """Every operation has a rule, and the attention maps and gates are constants."""
    rows = jax.tree.map(lambda x: x[:2], model.pairs(inputs, [3]))

    def score(image, model, rest):
        return model.score({**rest, "image": image})

    explain = jaxrel.lrp(score, jaxrel.composites.captioning(), at=("text/tokens",))
    rest = {name: x for name, x in rows.items() if name != "image"}
    pixels, places = jax.jit(explain)(rows["image"], model, rest)
    words = places["text/tokens"].sum(-1)
    assert np.isfinite(pixels).all()
    assert (np.abs(pixels).sum((1, 2, 3)) > 0).all()
    assert (np.abs(words[:, :3]).sum(-1) > 0).all()
    np.testing.assert_array_equal(words[:, 3:], 0)


def test_heads_are_explained_apart():
    """The output is the same, and the gradients of the heads' values add up."""
    model = captioner("aoa")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    features = ENCODE(model, inputs["image"])
    # The image also counts as a whole, and as keys: that gradient is in each of the sums.
    choices = jnp.array([[True, True], [True, False], [False, True], [False, False]])

    @jax.jit
    def gradients(model, features, text):
        def total(features, heads):
            given = {"features": features, "text": text, "heads": jnp.stack([heads] * 2)}
            scores = model.word_scores(given)
            return scores.sum(), scores

        return jax.vmap(jax.grad(total, has_aux=True), in_axes=(None, 0))(features, choices)

    (both, first, second, none), scores = gradients(model, features, inputs["text"])
    np.testing.assert_allclose(both - none, first + second - 2 * none, **ROUNDING)
    assert np.abs(first - none).max() > 1e-3
    assert np.abs(second - none).max() > 1e-3
    np.testing.assert_allclose(scores[3], model.word_scores(inputs), **ROUNDING)


def test_features_in_the_place_of_images(model, inputs):
    features = ENCODE(model, inputs["image"])
    found, _ = FORWARD(model, {"features": features, "text": inputs["text"]})
    np.testing.assert_allclose(found, FORWARD(model, inputs)[0], **ROUNDING)


def test_dropout_only_with_a_key(model, inputs):
    logits, _ = FORWARD(model, inputs)
    dropped = jax.jit(lambda model, x, key: model(x, dropout_key=key))
    first = dropped(model, inputs, jax.random.key(0))
    np.testing.assert_array_equal(first, dropped(model, inputs, jax.random.key(0)))
    assert np.abs(first - dropped(model, inputs, jax.random.key(1))).max() > 1e-3
    still = nnx.clone(model)
    still.config = replace(model.config, dropout=0.0)
    only_maps = dropped(still, inputs, jax.random.key(0))
    # What is left is the dropout of the attention maps, and only "aoa" has it.
    if model.config.kind == "aoa":
        assert np.abs(only_maps - logits).max() > 1e-3
    else:
        np.testing.assert_allclose(only_maps, logits, **ROUNDING)


def test_dropout_keeps_the_mean():
    """Half of the values are doubled, and half are 0."""
    read = jnp.ones((20000, 8)), jnp.zeros((20000, 8))
    model = nnx.clone(captioner("aoa"))
    model.head.kernel.set_value(jnp.zeros((8, 11)).at[:, 0].set(1))
    model.head.bias.set_value(jnp.zeros(11))
    sums = model.word_logits(*read, dropout_key=jax.random.key(0))[:, 0]
    assert set(np.unique(sums)) <= set(range(0, 17, 2))
    # Five standard deviations of a mean of 20000; each sum varies by 8.
    assert abs(float(sums.mean()) - 8) < 5 * (8 / 20000) ** 0.5


def test_bfloat16(model, inputs):
    half = nnx.merge(
        nnx.graphdef(
            nnx.eval_shape(
                lambda: Captioner(replace(model.config, dtype="bfloat16"), rngs=nnx.Rngs(0))
            )
        ),
        nnx.state(model),
    )
    logits, maps = FORWARD(half, inputs)
    expected, _ = FORWARD(model, inputs)
    assert {x.dtype for x in (logits, *maps.values())} == {jnp.dtype("float32")}
    # 8 bits of precision, through up to nine steps.
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max())
    assert np.abs(logits - expected).max() > 1e-5


# ---- regions


@pytest.fixture(scope="module", params=["adaptive", "gridtd", "aoa"])
def of_regions(request):
    return captioner(request.param, **REGIONS)


def test_captions_of_regions(of_regions):
    features = random_regions()
    features[1, 3] = 0
    inputs = of_regions.prepare(image=features, text=TEXTS)
    for given in (list(features), [features[0], features[1].astype(np.float64)]):
        again = of_regions.prepare(image=given, text=TEXTS)
        jax.tree.map(np.testing.assert_array_equal, again, inputs)
    assert of_regions.prepare(image=features[0], text=TEXTS[0])["features"].shape == (1, 4, 6)
    pairs = of_regions.pairs(inputs)
    assert pairs["features"].shape == (8, 4, 6)
    content = of_regions.content(pairs)
    assert content["features"][0].tolist() == [True] * 4
    assert content["features"][7].tolist() == [True, True, True, False]
    stream = of_regions.layout["features"]
    assert (stream.tokens, stream.grid, stream.prefix) == (4, None, 0)
    written = of_regions.prepare(image=features)
    assert of_regions.predict({"features": features}) == of_regions.sentences(written["text"])
    np.testing.assert_array_equal(of_regions.seen(features[0]), features[0])
    capture = jaxrel.capture(lambda m, x: m(x), ("features/tokens",))
    _, tagged = jax.jit(capture)(of_regions, inputs)
    np.testing.assert_array_equal(tagged["features/tokens"], features)


# ---- captions


@pytest.fixture(scope="module", params=["adaptive", "gridtd", "aoa"])
def trained(request):
    """The weights of the reference implementation know a few captions, and when they end."""
    return reference(request.param)[0]


def greedy(model, image):
    """One word after the other; after the words lie tokens that are not padding."""
    text = np.full((len(image), 12), 7, np.int32)
    text[:, 0] = 2
    ended = np.zeros(len(image), bool)
    for i in range(1, 12):
        logits, _ = FORWARD(model, {"image": image, "text": jnp.asarray(text)})
        words = [token for token in range(20) if token not in (0, 2)]
        best = np.array(words)[np.asarray(logits)[:, i - 1, words].argmax(-1)]
        best[...] = 3 if i == 11 else best
        text[:, i] = np.where(ended, 0, best)
        ended |= best == 3
    return text


@pytest.mark.parametrize(("bias", "ends"), [(0.0, "early"), (-100.0, "never")])
def test_generate_is_greedy(trained, bias, ends):
    # Start and padding are tempting, and never written.
    model = biased(trained, end=bias, start=3.0, pad=3.0)
    generated = model.prepare(image=random_images(6))
    text = np.asarray(generated["text"])
    np.testing.assert_array_equal(text, greedy(model, generated["image"]))
    end = (text == 3).argmax(-1)
    assert (end == 11).all() if ends == "never" else (end < 11).any()
    words = [[token for token in row if token] for row in model.tokens(generated)]
    assert model.predict(generated) == [" ".join(row) for row in words]
    assert all(len(row) > 1 for row in words)


def test_beams(trained):
    """What a search says of a caption is what teacher forcing says: a sum, and not a mean."""
    image = trained.prepare(image=random_images(6), text=["a man"] * 6)["image"]
    features = ENCODE(trained, image)
    one, three = jax.jit(searched, static_argnums=2)(trained, features, 3)
    assert trained.predict({"image": image}, beams=3) == trained.sentences(three.ids)
    assert (three.ids != one.ids).any()
    assert (three.log_probability > one.log_probability - 1e-4).mean() > 0.7
    judge = jax.jit(Captioner.log_probability)
    for found in (one, three):
        count = (found.ids == 3).argmax(-1)
        mean = judge(trained, {"features": features, "text": found.ids})
        np.testing.assert_allclose(mean * count, found.log_probability, rtol=1e-4, atol=1e-4)
    assert trained.predict({"features": features}) == trained.sentences(one.ids)


def searched(model, features, beams):
    step, state = model.decoder(features)
    return (
        decoding.greedy(step, state, model.caption_format()),
        decoding.beam_search(step, state, model.caption_format(), beams=beams),
    )


def test_unknown_words_are_written_or_not(trained):
    model = biased(trained, unknown=30.0)
    image = model.prepare(image=random_images(3), text=["a man"] * 3)["image"]
    write = jax.jit(Captioner.generate, static_argnames="unknown")
    free = write(model, image)
    assert (free == 1).any()
    assert not (write(model, image, unknown=False) == 1).any()
    assert "unk" not in " ".join(model.sentences(free))


def test_pairs_of_words(model, inputs):
    pairs = model.pairs(inputs)
    assert pairs["position"].tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert pairs["example"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(pairs["text"], inputs["text"][pairs["example"]])
    np.testing.assert_array_equal(pairs["image"], inputs["image"][pairs["example"]])
    assert model.target_tokens(pairs)["text"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert model.describe(pairs)[3:] == [
        "a small red [circle]",
        "a small red circle [above]",
        "[a]",
        "a [blue]",
        "a blue [square]",
    ]
    content = model.content(pairs)
    before = [np.flatnonzero(row).tolist() for row in content["text"]]
    assert before[3:7] == [[1, 2, 3], [1, 2, 3, 4], [], [1]]
    assert content["features"].all()
    assert content["features"].shape == (8, 16)
    assert model.pairs(inputs, [3, 1])["position"].tolist() == [3, 1, 3, 1]
    # Rows can be brought to other rows.
    assert model.pairs(pairs, 2)["position"].tolist() == [2] * 8
    unknown = inputs["text"].at[0, 2].set(1)
    assert model.pairs({**inputs, "text": unknown})["position"].tolist()[:4] == [1, 3, 4, 5]
    stream = model.layout["features"]
    assert (stream.modality, stream.tokens, stream.grid, stream.prefix) == ("image", 16, (4, 4), 0)
    assert model.layout["text"].tokens == 9
    image = model.seen(random_images(1)[0])
    assert image.size == (16, 16)


def test_shared_parts_of_captions():
    text = np.array([[2, 5, 3, 3], [2, 5, 6, 7]])
    assert captions.end_of_caption(text, 3).tolist() == [2, 4]
    assert captions.special_ids(word_tokenizer(WORDS, 9)) == (2, 3, 0)
    tokenizer = word_tokenizer(WORDS, 9)
    tokenizer.pad_token = None
    assert captions.special_ids(tokenizer) == (2, 3, 3)
    tokenizer.bos_token = None
    with error(r"tokenizer has no start or no end token"):
        captions.special_ids(tokenizer)
    with error(r"the tokenizer knows no word of the caption of image 1"):
        captions.word_rows([["", "a", ""], ["", "", ""]], [1, 1])


# ---- files


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gridtd", {}),
        ("adaptive", {"encoder": RESNET, "attention": "as coded", "dropout": 0.25}),
        ("aoa", REGIONS),
    ],
)
def test_save_and_load(kind, changes, tmp_path):
    model = captioner(kind, **changes)
    model.save_pretrained(tmp_path / "model")
    loaded = Captioner.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert len(flat(model)) == len(flat(loaded))
    for path, variable in flat(loaded).items():
        assert type(variable) is type(flat(model)[path])
        np.testing.assert_array_equal(variable[...], flat(model)[path][...])
    np.testing.assert_array_equal(loaded.processor.text(TEXTS, 9), model.processor.text(TEXTS, 9))
    seen = random_images() if model.encoder is not None else random_regions()
    inputs = loaded.prepare(image=seen, text=TEXTS)
    again, _ = FORWARD(loaded, inputs)
    np.testing.assert_array_equal(again, FORWARD(model, inputs)[0])


def test_half_a_file(tmp_path):
    model = captioner("gridtd")
    model.save_pretrained(tmp_path / "half", dtype="float16")
    half = Captioner.from_pretrained(tmp_path / "half", dtype="bfloat16")
    assert half.config == replace(model.config, dtype="bfloat16")
    for path, value in flat(model).items():
        assert flat(half)[path].dtype == jnp.float32
        # float16 has 11 bits, and steps of 2^-24 near 0.
        np.testing.assert_allclose(flat(half)[path][...], value[...], rtol=2**-11, atol=2**-25)
    whole = tmp_path / "float32"
    model.save_pretrained(whole)
    size, half_size = (
        (folder / "model.safetensors").stat().st_size for folder in (whole, tmp_path / "half")
    )
    assert half_size < 0.7 * size


def test_a_folder_appears_as_a_whole(tmp_path, monkeypatch):
    model = captioner("gridtd")
    with error(r"dtype must be 'float32' or 'float16', got 'int8'"):
        model.save_pretrained(tmp_path / "model", dtype="int8")
    monkeypatch.setattr(Processor, "save", fails)
    with error(r"the disk is full", OSError):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with error(r"notes exists and is no model folder", FileExistsError):
        model.save_pretrained(tmp_path / "notes")


def fails(*_):
    raise OSError("the disk is full")


def test_folders_that_do_not_fit(tmp_path):
    folder = tmp_path / "model"
    captioner("gridtd").save_pretrained(folder)
    config = (folder / "config.json").read_text()

    def edited(edit):
        changed = json.loads(config)
        edit(changed)
        (folder / "config.json").write_text(json.dumps(changed))
        return folder

    with error(r"captioner_config must hold attention, .*; missing or unknown: hidden"):
        Captioner.from_pretrained(edited(lambda c: c["captioner_config"].pop("hidden")))
    with error(r"config.json: expected an object captioner_config"):
        Captioner.from_pretrained(edited(lambda c: c.pop("captioner_config")))
    with error(r"config.json: unknown type of encoder 'vit'"):
        Captioner.from_pretrained(edited(lambda c: c["encoder_config"].update(model_type="vit")))
    with error(r"describes a model of type 'clip', and this class loads 'captioner'"):
        Captioner.from_pretrained(edited(lambda c: c.update(model_type="clip")))
    with error(r"the tokenizer has 11 tokens and the model 12: this is the tokenizer of another"):
        Captioner.from_pretrained(edited(lambda c: c["captioner_config"].update(vocab_size=12)))
    with error(r"cell.attention.hidden.kernel has shape \[8, 16\], and config.json says \[8, 64\]"):
        Captioner.from_pretrained(edited(lambda c: c["captioner_config"].update(image_size=32)))
    with error(r"missing: cell.gate.bias"):
        Captioner.from_pretrained(edited(lambda c: c["captioner_config"].update(kind="aoa")))
    weights = edited(lambda c: None) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with error(r"model.safetensors .* is truncated or no safetensors file", OSError):
        Captioner.from_pretrained(folder)


# ---- errors


def error(match, kind=ValueError):
    return pytest.raises(kind, match=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "lstm"}, r"captioner: kind must be one of adaptive, gridtd, aoa, got 'lstm'"),
        ({"attention": "coded"}, r"attention must be one of paper, as coded, got 'coded'"),
        ({"dtype": "float16"}, r"dtype must be one of float32, bfloat16, got 'float16'"),
        ({"hidden": 0}, r"captioner: hidden must be a positive integer, got 0"),
        ({"embed": True}, r"captioner: embed must be a positive integer, got True"),
        ({"context": 2}, r"context is 2: start, one word and end need at least 3"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must be at least 0 .* got -0.1"),
        ({"kind": "aoa", "heads": 3}, r"hidden 8 is not a multiple of its 3 heads"),
        ({"encoder": None}, r"give encoder= for images, or encoder=None and regions=.*None"),
        ({"regions": (4, 6)}, r"got encoder VGGConfig.* and regions \(4, 6\)"),
        (REGIONS | {"regions": (4, 0)}, r"regions must be a positive integer, got 0"),
        ({"image_size": 2}, r"vgg: an image of 2 x 2 pixels is too small"),
    ],
)
def test_configurations_that_do_not_fit(changes, match):
    with error(match):
        replace(CONFIG, **changes)


def test_sizes_are_stored():
    for config in (CONFIG, replace(CONFIG, **REGIONS), replace(CONFIG, encoder=RESNET)):
        stored = json.loads(json.dumps(config.to_dict()))
        assert CaptionerConfig.from_dict(stored) == config
    assert replace(CONFIG, **REGIONS).positions == 4
    assert (CONFIG.grid, CONFIG.positions, CONFIG.features) == ((4, 4), 16, 6)


def test_a_tokenizer_of_another_model():
    big = Processor(word_tokenizer([*WORDS, "green"], 9))
    with error(r"the tokenizer has 12 tokens and the model 11: this is the tokenizer of another"):
        nnx.eval_shape(lambda: Captioner(CONFIG, rngs=nnx.Rngs(0), processor=big))


@pytest.mark.parametrize(
    ("wrong", "match", "kind"),
    [
        ({"image": None}, r"must hold image \(or features\), and hold neither", ValueError),
        ({"features": np.zeros((2, 16, 6))}, r"and hold image and features", ValueError),
        ({"text": None}, r"inputs lack text; they hold image\. Make them with", ValueError),
        ({"image": np.zeros((2, 16, 16, 3), np.uint8)}, r"normalised floats, got uint8", TypeError),
        ({"image": np.zeros((2, 8, 8, 3), np.float32)}, r"\[batch, 16, 16, 3\], got", ValueError),
        ({"image": np.zeros((3, 16, 16, 3), np.float32)}, r"3 images and 2 captions", ValueError),
        ({"text": np.zeros((2, 10), np.int32)}, r"at most 9 tokens, got \[2, 10\]", ValueError),
        ({"text": np.zeros((2, 9), np.float32)}, r"integer token ids, got float32", TypeError),
        (
            {"text": np.full((2, 9), 11)},
            r"the id 11, and this model has the ids 0 to 10",
            ValueError,
        ),
        ({"text": np.full((2, 9), -1)}, r"text holds the id -1, and this model has", ValueError),
        ({"heads": np.ones((2, 2), bool)}, r"heads to choose, and .* 'gridtd' has one", ValueError),
    ],
)
def test_inputs_that_do_not_fit(wrong, match, kind):
    model = captioner("gridtd")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    given = {name: x for name, x in {**inputs, **wrong}.items() if x is not None}
    with error(match, kind):
        model(given)


def test_heads_that_do_not_fit():
    model = captioner("aoa")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    for heads in (np.ones((2, 3), bool), np.ones((2, 2))):
        with error(r"heads must be bool \[2, 2\], got (bool \[2, 3\]|float64 \[2, 2\])"):
            model({**inputs, "heads": heads})


def test_regions_that_do_not_fit():
    model, features = captioner("gridtd", **REGIONS), random_regions()
    with error(r"the features of image 0 are float32 \[5, 6\], and this model reads floats \[4, 6"):
        model.prepare(image=[np.zeros((5, 6), np.float32)], text=TEXTS[0])
    with error(r"the features of image 1 are float32 \[3, 6\].*zeros where there are fewer"):
        model.prepare(image=[features[0], features[1, :3]], text=TEXTS)
    with error(r"the features of image 0 are <U1 \[1\]"):
        model.prepare(image=[["x"]], text=TEXTS)
    for none in (None, []):
        with error(r"no features: pass image= those of the regions, \[4, 6\] for each image"):
            model.prepare(image=none, text=TEXTS)
    nan = features.copy()
    nan[1, 2, :2] = np.nan
    text = model.prepare(image=features, text=TEXTS)["text"]
    with error(r"the features of image 1 have 2 values that are NaN or infinite"):
        model.prepare(image=nan, text=TEXTS)
    with error(r"the features of image 1 have 2 values that are NaN or infinite"):
        model({"features": nan, "text": text})
    with error(r"features must have shape \[batch, 4, 6\], got \[2, 4, 5\]"):
        model({"features": features[..., :5], "text": text})
    with error(r"features must be finite floats, got int64", TypeError):
        model({"features": features.astype(int), "text": text})
    with error(r"inputs must hold features, and hold image"):
        model({"image": np.zeros((2, 16, 16, 3), np.float32), "text": text})
    with error(r"this model has no encoder: it reads features of regions"):
        model.encode(jnp.zeros((2, 16, 16, 3)))


def test_captions_that_do_not_fit():
    model = captioner("gridtd")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    image = random_images(1)
    with error(r"does not know 'Green', 'dog' in the caption 'a Green circle, dog'; it knows 11"):
        model.prepare(image=image, text=["a red circle", "a Green circle, dog"])
    with error(r"does not know 'cat' in the caption 'cat'"):
        model.prepare(image=image, text="cat")
    # Unknown punctuation is no word.
    comma = model.prepare(image=image, text="red, blue")["text"]
    assert comma[0, :6].tolist() == [2, 5, 1, 6, 3, 0]
    with error(r"the text is empty"):
        model.prepare(image=image, text=["a circle", " "])
    with error(r"has 10 tokens with its start and end token, .* at most 9: shorten it by 1"):
        model.prepare(image=image, text=" ".join(["red"] * 8))
    with error(r"text must be a string or a list of strings", TypeError):
        model.prepare(image=image, text=3)
    with error(r"text must be a string or a list of strings", TypeError):
        model.prepare(image=image, text=["red", 3])
    with error(r"no image: pass image="):
        model.prepare(text="a circle")
    with error(r"the caption of image 1 has words 1 to 3, and no word 4"):
        model.pairs(inputs, 4)
    for target in ("circle", 1.5, [], [[1]]):
        with error(r"target must be the position of a word in its caption, from 1"):
            model.pairs(inputs, target)
    empty = inputs["text"].at[1].set(jnp.array([2, 3, *[0] * 7]))
    with error(r"the caption of image 1 has no words"):
        model.pairs({**inputs, "text": empty})
    with error(r"2 images and 1 captions: give one caption per image"):
        model.pairs({**inputs, "text": inputs["text"][:1]})
    with error(r"which word of the caption\? Pass target= its position"):
        model.score(inputs)
    plain = nnx.clone(model)
    plain.processor = Processor(None, processor().images)
    with error(r"this model has no tokenizer, and does not know how captions start"):
        plain.prepare(image=image)
    with error(r"this model has no tokenizer: its folder holds no tokenizer.json"):
        plain.prepare(image=image, text="a circle")
