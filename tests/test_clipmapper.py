"""CLIPmapper: its maps, masks, captions, files, and what it says to bad input."""

import functools
import json
import shutil
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel import models
from jaxrel.models import (
    CLIP,
    CLIPConfig,
    CLIPMapper,
    CLIPMapperCaption,
    CLIPMapperConfig,
    CLIPMapperVQA,
    Processor,
    TextConfig,
    VisionConfig,
    image_processing,
    word_tokenizer,
)
from jaxrel.models.transformer import causal_mask

WORDS = ("a", "red", "blue", "circle", "square", "above", "what", "is")
STAGE1 = CLIPConfig(
    vision=VisionConfig(width=16, layers=2, heads=2, mlp_width=32, image_size=16, patch_size=8),
    text=TextConfig(
        width=12, layers=2, heads=3, mlp_width=24, vocab_size=12, context=9, eos_token_id=3
    ),
    projection=4,
)
ANSWERS = ("red", "blue", "two", "yes")
# Two texts of different length: 7 and 5 of the 9 tokens are no padding.
TEXTS = ["what is a red circle", "a blue square"]
LENGTH = 7
# float32 values of order 1 to 10 after a few layers, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}

FORWARD = jax.jit(lambda model, inputs: model(inputs, return_attention=True))
GRADIENTS = jax.jit(lambda model, inputs: model.attention_gradients(inputs))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The programs run once, and briefly: they take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def processor():
    return Processor(word_tokenizer(WORDS, STAGE1.text.context), image_processing(16))


def random_values(make, seed=0):
    """A model with values from NumPy, which needs no compilation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
        nnx.eval_shape(make),
    )


def random_mapper(task, layers, stage1=STAGE1, processor=processor):
    config = CLIPMapperConfig(
        task=task,
        clip=stage1,
        answers=ANSWERS if task == "vqa" else (),
        width=16,
        layers=layers,
        heads=2,
        mlp_width=24,
    )
    kind = CLIPMapperVQA if task == "vqa" else CLIPMapperCaption
    return random_values(lambda: kind(config, rngs=nnx.Rngs(0), processor=processor()))


def random_pictures(count=2, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 20, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def vqa():
    return random_mapper("vqa", layers=3)


@pytest.fixture(scope="module")
def caption():
    return random_mapper("caption", layers=2)


@pytest.fixture(scope="module", params=["vqa", "caption"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def inputs(vqa):
    return vqa.prepare(image=random_pictures(), text=TEXTS)


@pytest.fixture(scope="module")
def read(model, inputs):
    """Inputs that say what is read: an answer, or the last word of a caption."""
    if model.task == "vqa":
        return {**inputs, "answer": jnp.array([2, 0])}
    return {**inputs, "position": jnp.array([5, 3])}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp(model.task) / "model"
    model.save_pretrained(path)
    return path


# ---- attention maps and their gradients


@pytest.fixture(scope="module")
def explained(model, read):
    return GRADIENTS(model, read)


def test_returned_maps_are_the_tagged_ones(model, inputs, explained):
    logits, maps = FORWARD(model, inputs)
    _, tagged, grads = explained
    assert set(maps) == set(tagged) == set(grads)
    layers, patches, words = model.config.layers, 5, 9
    shape = {
        "vision": (2, 2, 2, patches, patches),
        "text": (2, 2, 3, words, words),
        "image_single": (layers, 2, 2, patches, patches),
        "text_single": (layers, 2, 2, words, words),
        "text_to_image": (layers, 2, 2, words, patches),
        "image_self": (layers - 1, 2, 2, patches, patches),
        "text_self": (layers, 2, 2, words, words),
    }
    if model.task == "vqa":
        shape["image_to_text"] = (layers - 1, 2, 2, patches, words)
    assert {name: value.shape for name, value in maps.items()} == shape
    for name, value in maps.items():
        assert value.dtype == grads[name].dtype == jnp.float32
        np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-5)  # rounding of a softmax
        np.testing.assert_allclose(tagged[name], value, **ROUNDING)
    expected = (2, 4) if model.task == "vqa" else (2, words, 12)
    assert (logits.shape, logits.dtype) == (expected, jnp.float32)


def python_scan(step, carry, xs):
    outs = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, out = step(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        outs.append(out)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outs)


def test_scan_is_a_loop_and_gradients_are_of_what_is_added_to_the_maps(
    model, read, explained, monkeypatch
):
    """Layers in a Python loop, and an addend of 0 to each map in the place of its tag."""
    score, maps, grads = explained

    @jax.jit
    def by_loop(model, read, addends):
        counter = Counter()

        def add(x, name):
            if name not in addends:
                return x
            counter[name] += 1
            return x + addends[name][counter[name] - 1]

        monkeypatch.setattr(jax.lax, "scan", python_scan)
        monkeypatch.setattr("jaxrel.models.transformer.tag", add)
        score = model.score(read)
        monkeypatch.undo()
        assert counter == {name: len(x) for name, x in addends.items()}
        return score.sum(), score

    zeros = jax.tree.map(jnp.zeros_like, maps)
    gradient = jax.jit(jax.grad(by_loop, argnums=2, has_aux=True))
    expected, of_loop = gradient(model, read, zeros)
    np.testing.assert_allclose(of_loop, score, **ROUNDING)
    for name, value in expected.items():
        assert np.abs(value).max() > 1e-3
        np.testing.assert_allclose(grads[name], value, rtol=1e-4, atol=1e-5)


def test_remat_is_plain(vqa, inputs):
    model = nnx.clone(vqa)
    model.config = replace(vqa.config, clip=replace(STAGE1, remat=True))
    read = {**inputs, "answer": jnp.array([2, 0])}
    for one, other in zip(GRADIENTS(model, read), GRADIENTS(vqa, read), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDING), one, other)


def test_one_layer(inputs):
    """No scan runs, and the maps have their layer axis nevertheless."""
    model = random_mapper("vqa", layers=1)
    read = {**inputs, "answer": jnp.array([2, 0])}
    _, maps, grads = GRADIENTS(model, read)
    assert "image_to_text" not in maps
    assert "image_self" not in maps
    assert {x.shape for x in (maps["text_to_image"], grads["text_to_image"])} == {(1, 2, 2, 9, 5)}


# ---- masks, padding, batch, dtype


def only(model, inputs, patches, words):
    """The logits of the tokens of these indices alone, each at its own position."""

    def take(x, index):
        return jnp.take_along_axis(x, index[..., None], axis=1)

    vision, text = model.vision, model.text
    image = vision.patch_embedding(inputs["image"])
    image = image.reshape(len(image), -1, image.shape[-1])
    first = jnp.broadcast_to(vision.class_embedding[...], (len(image), 1, image.shape[-1]))
    image = jnp.concatenate([first, image], axis=1) + vision.position_embedding[...]
    image, _ = vision.transformer(vision.pre_norm(take(image, patches)))
    embedded = text.token_embedding(inputs["text"]) + text.position_embedding[...]
    causal = causal_mask(words.shape[1])
    tokens, _ = text.transformer(take(embedded, words), causal)
    out, _ = model.mapper(
        model.vision_in(model.vision_norm(image)),
        model.text_in(model.text_norm(tokens)),
        None,
        None if model.task == "vqa" else causal,
    )
    logits = model.head(model.final_norm(out))
    return logits[:, -1] if model.task == "vqa" else logits


@pytest.mark.parametrize(
    ("patches", "words"),
    [([[0, 1, 3], [0, 2, 4]], [[0, 1, 2, 3, 4]] * 2), ([range(5)] * 2, [[0, 2, 4], [0, 1, 4]])],
    ids=["image", "text"],
)
def test_hidden_is_removed(model, patches, words):
    """Two texts of 5 tokens: what is not kept counts as little as if it were not there."""
    text = ["is a circle", "a blue square"]
    inputs = model.prepare(image=random_pictures(), text=text)
    patches, words = (jnp.asarray([list(row) for row in rows]) for rows in (patches, words))
    expected = jax.jit(only)(model, inputs, patches, words)
    rows = jnp.arange(2)[:, None]
    keep = {
        "image_keep": jnp.zeros((2, 5), bool).at[rows, patches].set(True),
        "text_keep": jnp.zeros((2, 9), bool).at[rows, words].set(True),
    }
    logits, _ = FORWARD(model, {**inputs, **keep})
    seen = logits if model.task == "vqa" else logits[rows, words]
    np.testing.assert_allclose(seen, expected, **ROUNDING)
    plain, _ = FORWARD(model, {**inputs, **jax.tree.map(jnp.ones_like, keep)})
    plain = plain if model.task == "vqa" else plain[rows, words]
    assert np.abs(plain - seen).max() > 0.01


def test_batch_is_one_by_one_and_padding_does_not_matter(model, inputs):
    logits, maps = FORWARD(model, inputs)
    for i in range(2):
        one = {"image": inputs["image"][i : i + 1], "text": inputs["text"][i : i + 1, :LENGTH]}
        alone, of_one = FORWARD(model, one)
        expected = logits[i : i + 1] if model.task == "vqa" else logits[i : i + 1, :LENGTH]
        np.testing.assert_allclose(alone, expected, **ROUNDING)
        to_image = maps["text_to_image"][:, i : i + 1, :, :LENGTH]
        np.testing.assert_allclose(of_one["text_to_image"], to_image, **ROUNDING)


def test_bfloat16(vqa, inputs, tmp_path):
    vqa.save_pretrained(tmp_path / "model")
    half = CLIPMapper.from_pretrained(tmp_path / "model", dtype="bfloat16")
    logits, maps = FORWARD(half, inputs)
    expected, plain = FORWARD(vqa, inputs)
    assert {x.dtype for x in (logits, *maps.values())} == {jnp.dtype("float32")}
    # 8 bits of precision, through 17 additions to each stream.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=0.05 * scale)
    assert np.abs(logits - expected).max() > 1e-5
    np.testing.assert_allclose(maps["text_self"], plain["text_self"], atol=0.1)


# ---- answers


def test_score_and_predict(vqa, inputs):
    logits, _ = FORWARD(vqa, inputs)
    score, predict = jax.jit(CLIPMapperVQA.score), jax.jit(CLIPMapperVQA.predict)
    np.testing.assert_allclose(score(vqa, inputs), logits.max(-1), **ROUNDING)
    asked = score(vqa, {**inputs, "answer": jnp.array([2, 0])})
    np.testing.assert_allclose(asked, logits[[0, 1], [2, 0]], **ROUNDING)
    np.testing.assert_allclose(score(vqa, inputs, 1), logits[:, 1], **ROUNDING)
    np.testing.assert_allclose(predict(vqa, inputs).sum(-1), 1, rtol=1e-5)
    several = nnx.clone(vqa)
    several.config = replace(vqa.config, several=True)
    np.testing.assert_allclose(predict(several, inputs), jax.nn.sigmoid(logits), **ROUNDING)


def test_pairs_of_questions(vqa, inputs):
    best = np.asarray(FORWARD(vqa, inputs)[0]).argmax(-1)
    pairs = vqa.pairs(inputs)
    assert pairs["answer"].tolist() == best.tolist()
    probability = np.asarray(jax.nn.softmax(FORWARD(vqa, inputs)[0]))[[0, 1], best]
    named = [f"{ANSWERS[i]} ({p:.0%})" for i, p in zip(best, probability, strict=True)]
    assert vqa.describe(pairs) == named
    assert vqa.readout(pairs)["text"].tolist() == [6, 4]
    content = vqa.content(pairs)
    assert content["vision"].tolist() == [[False] + [True] * 4] * 2
    assert [np.flatnonzero(row).tolist() for row in content["text"]] == [
        [1, 2, 3, 4, 5],
        [1, 2, 3],
    ]
    assert vqa.tokens(pairs)[1] == ["", "a", "blue", "square", "", "", "", "", ""]


@pytest.mark.parametrize(
    ("target", "answers"),
    [("two", [2, 2]), (3, [3, 3]), (["yes", 0], [3, 0]), (jnp.array([1, 2]), [1, 2])],
)
def test_answers_in_words_or_as_indices(vqa, inputs, target, answers):
    one = {"image": inputs["image"][:1], "image_keep": jnp.ones((1, 5), bool)}
    pairs = vqa.pairs({**one, "text": inputs["text"]}, target)
    assert pairs["answer"].tolist() == answers
    np.testing.assert_array_equal(pairs["image"], inputs["image"][[0, 0]])
    assert pairs["image_keep"].shape == (2, 5)


# ---- captions


def test_later_words_change_no_earlier_logit(caption, inputs):
    logits, _ = FORWARD(caption, inputs)
    changed = {**inputs, "text": inputs["text"].at[:, 4].set(9)}
    other, _ = FORWARD(caption, changed)
    np.testing.assert_array_equal(other[:, :4], logits[:, :4])
    assert np.abs(other[:, 4] - logits[:, 4]).min() > 0


def test_log_probability_and_score(caption, inputs):
    logits, _ = FORWARD(caption, inputs)
    text, logp = np.asarray(inputs["text"]), np.asarray(jax.nn.log_softmax(logits))
    expected = [np.mean([logp[b, i - 1, text[b, i]] for i in range(1, n)]) for b, n in ((0, 7), (1, 5))]
    found = jax.jit(CLIPMapperCaption.log_probability)(caption, inputs)
    np.testing.assert_allclose(found, expected, **ROUNDING)
    score = jax.jit(CLIPMapperCaption.score)(caption, inputs, jnp.array([5, 3]))
    np.testing.assert_allclose(score, [logits[b, i - 1, text[b, i]] for b, i in ((0, 5), (1, 3))], **ROUNDING)


def with_bias_of_the_end(caption, bias):
    model = nnx.clone(caption)
    model.head.bias.set_value(model.head.bias[...].at[3].add(bias))
    return model


def greedy(model, image):
    """One word after the other; after the words lie tokens that are not padding."""
    text = np.full((len(image), 9), 7, np.int32)
    text[:, 0] = 2
    ended = np.zeros(len(image), bool)
    for i in range(1, 9):
        logits, _ = FORWARD(model, {"image": image, "text": jnp.asarray(text)})
        best = np.asarray(logits[:, i - 1]).argmax(-1)
        best[...] = 3 if i == 8 else best
        text[:, i] = np.where(ended, 0, best)
        ended |= best == 3
    return text


@pytest.mark.parametrize(("bias", "ends"), [(2.5, "early"), (-100, "never")])
def test_generate_is_greedy(caption, bias, ends):
    model = with_bias_of_the_end(caption, bias)
    image = model.prepare(image=random_pictures(2, seed=1), text=TEXTS)["image"]
    generated = model.prepare(image=random_pictures(2, seed=1))
    text = np.asarray(generated["text"])
    np.testing.assert_array_equal(text, greedy(model, image))
    np.testing.assert_array_equal(generated["image"], image)
    ended = (text == 3).argmax(-1)
    assert (ended == 8).all() if ends == "never" else (ended < 8).any()
    words = [[token for token in row if token] for row in model.tokens(generated)]
    assert model.predict(generated) == [" ".join(row) for row in words]


def test_generate_knows_the_end_of_old_configurations(caption):
    """There the id 2 stands for the highest id, which is the tokenizer's end token."""
    old = nnx.clone(caption)
    tokenizer = word_tokenizer(WORDS, 9)
    tokenizer.eos_token = "is"
    text = replace(STAGE1.text, eos_token_id=2)
    old.config = replace(caption.config, clip=replace(STAGE1, text=text))
    old.processor = Processor(tokenizer, processor().images)
    old.head.bias.set_value(old.head.bias[...].at[11].add(100))
    assert old.prepare(image=random_pictures(1))["text"].tolist() == [[2, 11, *[0] * 7]]


def test_pairs_of_words(caption, inputs):
    pairs = caption.pairs({**inputs, "text_keep": jnp.ones((2, 9), bool)})
    assert pairs["position"].tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert pairs["example"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(pairs["text"], inputs["text"][pairs["example"]])
    np.testing.assert_array_equal(pairs["image"], inputs["image"][pairs["example"]])
    assert pairs["text_keep"].shape == (8, 9)
    assert caption.readout(pairs)["text"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert caption.describe(pairs)[4:] == [
        "what is a red [circle]",
        "[a]",
        "a [blue]",
        "a blue [square]",
    ]
    before = [np.flatnonzero(row).tolist() for row in caption.content(pairs)["text"]]
    assert before[3:7] == [[1, 2, 3], [1, 2, 3, 4], [], [1]]
    some = caption.pairs(inputs, [3, 1])
    assert some["position"].tolist() == [3, 1, 3, 1]
    assert caption.pairs(inputs, 2)["position"].tolist() == [2, 2]


# ---- files


def values(model):
    return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def test_save_and_load(model, folder, tmp_path):
    loaded = CLIPMapper.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    again = models.from_pretrained(folder, dtype="bfloat16")
    assert (type(again), again.config.clip.dtype) == (type(model), "bfloat16")
    model.save_pretrained(tmp_path / "half", dtype="float16")
    half = type(model).from_pretrained(tmp_path / "half")
    files = [path / "model.safetensors" for path in (folder, tmp_path / "half")]
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    for path, value in values(model).items():
        np.testing.assert_array_equal(values(loaded)[path][...], value[...])
        # float16 has 11 bits, and steps of 2^-24 near 0.
        np.testing.assert_allclose(values(half)[path][...], value[...], rtol=2**-11, atol=2**-25)
    np.testing.assert_array_equal(
        loaded.prepare(image=random_pictures(), text=TEXTS)["text"],
        model.prepare(image=random_pictures(), text=TEXTS)["text"],
    )


def test_stage_1_from_a_clip(vqa, inputs, tmp_path):
    text = replace(STAGE1.text, context=12)
    tokens = word_tokenizer(WORDS, 12)
    config = replace(STAGE1, text=text)
    clip = random_values(
        lambda: CLIP(config, rngs=nnx.Rngs(0), processor=Processor(tokens, processor().images)), 5
    )
    model = nnx.clone(vqa)
    model.init_from_clip(clip)

    @jax.jit
    def both(model, clip, inputs):
        theirs = clip.vision(inputs["image"])[0], clip.text(inputs["text"])[0]
        ours = model.encode_image(inputs["image"])[0], model.text(inputs["text"])[0]
        return ours, theirs

    for ours, theirs in zip(*both(model, clip, inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for path, value in values(vqa).items():
        if path[0] not in ("vision", "text"):
            np.testing.assert_array_equal(values(model)[path][...], value[...])
    clip.save_pretrained(tmp_path / "clip")
    assert type(models.from_pretrained(tmp_path / "clip")) is CLIP
    narrow = replace(STAGE1, vision=replace(STAGE1.vision, mlp_width=8))
    other = random_values(lambda: CLIP(narrow, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"init_from_clip: vision/.* has shape \[2, 8, 16\] in the CLIP"):
        model.init_from_clip(other)


# ---- errors


def error(match, kind=ValueError):
    return pytest.raises(kind, match=match)


def test_configurations_that_do_not_fit():
    with error(r"mapper: task must be one of vqa, caption, got 'captions'"):
        CLIPMapperConfig(task="captions")
    with error(r"mapper: task 'vqa' with 0 answers; 'vqa' needs the answers"):
        CLIPMapperConfig(task="vqa")
    with error(r"mapper: task 'caption' with 1 answers; .* 'caption' has none"):
        CLIPMapperConfig(task="caption", answers=("yes",))
    with error(r"mapper: answers are repeated: no, yes$"):
        CLIPMapperConfig(answers=("yes", "no", "yes", "no", "two"))
    with error(r"mapper: answers must be strings, got \(1, 2\)"):
        CLIPMapperConfig(answers=(1, 2))
    with error(r"mapper: width 10 is not a multiple of its 4 heads"):
        CLIPMapperConfig(answers=("yes",), width=10, heads=4)
    with error(r"mapper: layers must be a positive integer, got 0"):
        CLIPMapperConfig(answers=("yes",), layers=0)
    with error(r"mapper: unknown activation 'relu', known are quick_gelu, gelu"):
        CLIPMapperConfig(answers=("yes",), activation="relu")
    big = word_tokenizer([f"w{i}" for i in range(20)], 9)
    with error(r"the tokenizer has 24 tokens and the model 12"):
        random_mapper("caption", 1, processor=lambda: Processor(big))


def edited(folder, tmp_path, edit):
    """A copy of the model folder with another config.json."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    edit(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_folders_that_do_not_fit(model, folder, tmp_path):
    other = CLIPMapperCaption if model.task == "vqa" else CLIPMapperVQA
    with error(rf"holds a model for the task '{model.task}', and {other.__name__} does"):
        other.from_pretrained(folder)
    with error(r"describes a model of type 'clipmapper', and this class loads 'clip'"):
        CLIP.from_pretrained(folder)
    copy = edited(folder, tmp_path, lambda config: config["mapper_config"].pop("heads"))
    with error(r"config.json: mapper_config must hold activation, .*missing or unknown: heads"):
        CLIPMapper.from_pretrained(copy)
    copy = edited(folder, tmp_path, lambda config: config["mapper_config"].update(answers="yes"))
    with error(r"config.json: mapper_config.answers must be a list, got 'yes'"):
        CLIPMapper.from_pretrained(copy)
    copy = edited(folder, tmp_path, lambda config: config.pop("clip_config"))
    with error(r"config.json: expected objects clip_config and mapper_config"):
        CLIPMapper.from_pretrained(copy)
    copy = edited(folder, tmp_path, lambda config: config.update(model_type="bert"))
    with error(r"describes a model of type 'bert'; known are clip, clipmapper"):
        models.from_pretrained(copy)
    with error(r"no model folder 'nowhere'", FileNotFoundError):
        models.from_pretrained("nowhere")


def test_weights_that_do_not_fit(vqa, tmp_path):
    folder = tmp_path / "model"
    vqa.save_pretrained(folder)
    copy = edited(folder, tmp_path, lambda config: config["mapper_config"].update(mlp_width=8))
    with error(r"mapper\.blocks\.image_self\.contract\.kernel has shape \[2, 24, 16\], .*\[2, 8, 16\]"):
        CLIPMapper.from_pretrained(copy)
    copy = edited(folder, tmp_path, lambda config: config["mapper_config"].update(layers=1))
    with error(r"\d+ tensors are unexpected: mapper\.blocks\."):
        CLIPMapper.from_pretrained(copy)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with error(r"model.safetensors .* is truncated or no safetensors file", OSError):
        CLIPMapper.from_pretrained(folder)
    with error(r"dtype must be 'float32' or 'float16', got 'int8'"):
        vqa.save_pretrained(tmp_path / "small", dtype="int8")
    assert not (tmp_path / "small").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with error(r"notes exists and is no model folder", FileExistsError):
        vqa.save_pretrained(tmp_path / "notes")


@pytest.mark.parametrize(
    ("wrong", "match", "kind"),
    [
        ({"image": None}, r"inputs lack image; they hold text\. Make them with", ValueError),
        ({"image": np.zeros((2, 16, 16, 3), np.uint8)}, r"normalised floats, got uint8", TypeError),
        ({"image": np.zeros((2, 8, 8, 3), np.float32)}, r"\[batch, 16, 16, 3\], got", ValueError),
        ({"image": np.zeros((3, 16, 16, 3), np.float32)}, r"3 pictures and 2 texts", ValueError),
        ({"text": np.zeros((2, 10), np.int32)}, r"at most 9 tokens, got \[2, 10\]", ValueError),
        ({"text": np.zeros((2, 9), np.float32)}, r"integer token ids, got float32", TypeError),
        ({"image_keep": np.ones((2, 4), bool)}, r"image_keep must be bool \[2, 5\]", ValueError),
        ({"text_keep": np.ones((2, 9))}, r"text_keep .*, got float64 \[2, 9\]", ValueError),
    ],
)
def test_inputs_that_do_not_fit(model, inputs, wrong, match, kind):
    given = {name: x for name, x in {**inputs, **wrong}.items() if x is not None}
    with error(match, kind):
        model(given)


def test_questions_that_do_not_fit(vqa, inputs):
    three = jnp.concatenate([inputs["text"], inputs["text"][:1]])
    with error(r"2 pictures and 3 questions make no pairs: give as many"):
        vqa.pairs({**inputs, "text": three})
    for target in ("purple", -1, 4, 1.5, None.__class__):
        with error(r"this model has no answer .*; it has 4 answers: red, blue, two, yes"):
            vqa.pairs(inputs, target)
    with error(r"3 answers for 2 questions; give one for each"):
        vqa.pairs(inputs, ["yes", "two", "red"])
    with error(r"has 10 tokens with its start and end token, .* at most 9: shorten it by 1"):
        vqa.prepare(image=random_pictures(), text=["what is above a red circle is it"] * 2)
    with error(r"the text is empty"):
        vqa.prepare(image=random_pictures(1), text="")
    with error(r"no image: pass image="):
        vqa.prepare(text="what is above")
    other = nnx.clone(vqa)
    text = replace(STAGE1.text, eos_token_id=5)
    other.config = replace(vqa.config, clip=replace(STAGE1, text=text))
    with error(r"ends a text with the id 3, and the model looks for the id 5"):
        other.prepare(image=random_pictures(1), text="what is above")


def test_captions_that_do_not_fit(caption, inputs):
    with error(r"the caption of picture 1 has words 1 to 3, and no word 4"):
        caption.pairs(inputs, 4)
    with error(r"has words 1 to 5, and no word 0"):
        caption.pairs(inputs, [0])
    for target in ("circle", 1.5, [], [[1]]):
        with error(r"target must be the position of a word in its caption, from 1"):
            caption.pairs(inputs, target)
    empty = inputs["text"].at[1].set(jnp.array([2, 3, *[0] * 7]))
    with error(r"the caption of picture 1 has no words"):
        caption.pairs({**inputs, "text": empty})
    with error(r"2 pictures and 1 captions: give one caption per picture"):
        caption.pairs({**inputs, "text": inputs["text"][:1]})
    with error(r"which word of the caption\? Pass target= its position"):
        caption.score(inputs)
    plain = nnx.clone(caption)
    plain.processor = Processor(None, processor().images)
    with error(r"this model has no tokenizer, and does not know how captions start"):
        plain.prepare(image=random_pictures(1))
    with error(r"this model has no tokenizer: its folder holds no tokenizer.json"):
        jaxrel.explain(plain, image=random_pictures(1), text="a circle")
