"""CLIPmapper: its maps, masks, captions, files, and what it says to bad input."""

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
    CLIPMapper,
    CLIPMapperCaption,
    CLIPMapperConfig,
    CLIPMapperVQA,
    Processor,
    word_tokenizer,
)
from jaxrel.models.transformer import causal_mask, key_mask
from jaxrel.train.data.shapes import Shapes
from tests.zoo.clipmappers import (
    ANSWERS,
    STAGE1,
    TEXTS,
    WORDS,
    answered,
    processor,
    random_mapper,
    random_values,
)
from tests.zoo.images import random_images

LENGTH = 7
# float32 values of order 1 to 10 after a few layers, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}

FORWARD = jax.jit(lambda model, inputs: model(inputs, return_attention=True))
GRADIENTS = jax.jit(lambda model, inputs: model.attention_gradients(inputs))


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
    return vqa.prepare(image=random_images(), text=TEXTS)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp(model.task) / "model"
    model.save_pretrained(path)
    return path


# ---- attention maps and their gradients


def shapes(task, layers):
    patches, words = 5, 9
    to_itself = {"image": (patches, patches), "text": (words, words)}
    maps = {"vision": (2, 2, 2, patches, patches), "text": (2, 2, 3, words, words)}
    maps |= {f"{name}_single": (layers, 2, 2, *size) for name, size in to_itself.items()}
    maps |= {"text_to_image": (layers, 2, 2, words, patches)}
    maps |= {"text_self": (layers, 2, 2, words, words)}
    if layers > 1:
        maps |= {"image_self": (layers - 1, 2, 2, patches, patches)}
        if task == "vqa":
            maps |= {"image_to_text": (layers - 1, 2, 2, patches, words)}
    return maps


def test_returned_maps_are_the_tagged_ones(model, inputs):
    logits, maps = FORWARD(model, inputs)
    names = tuple(shapes(model.task, model.config.layers))
    _, tagged = jax.jit(jaxrel.capture(lambda m, x: m(x), names))(model, inputs)
    assert {name: x.shape for name, x in maps.items()} == shapes(model.task, model.config.layers)
    assert set(tagged) == set(maps)
    for name, value in maps.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-5)  # rounding of a softmax
        np.testing.assert_allclose(tagged[name], value, **ROUNDING)
    expected = (2, 4) if model.task == "vqa" else (2, 9, 12)
    assert (logits.shape, logits.dtype) == (expected, jnp.float32)


def python_scan(step, carry, xs):
    outs = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, out = step(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        outs.append(out)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outs)


def test_gradients_by_maps_and_scan_and_remat(vqa, inputs, monkeypatch):
    """What is added to a map in a plain Python loop has the gradient of a scan with remat."""
    model = nnx.clone(vqa)
    model.config = replace(vqa.config, clip=replace(STAGE1, remat=True))
    score, maps, grads = GRADIENTS(model, answered(inputs))

    def by_loop(addends, model, inputs):
        counter = Counter()

        def add(x, name):
            if name not in addends:
                return x
            counter[name] += 1
            return x + addends[name][counter[name] - 1]

        monkeypatch.setattr(jax.lax, "scan", python_scan)
        monkeypatch.setattr("jaxrel.models.transformer.tag", add)
        score = model.score(inputs)
        monkeypatch.undo()
        assert counter == {name: len(x) for name, x in addends.items()}
        return score.sum(), score

    zeros = {name: jnp.zeros(shape) for name, shape in shapes("vqa", 3).items()}
    gradient = jax.jit(jax.grad(by_loop, has_aux=True))
    expected, of_loop = gradient(zeros, vqa, answered(inputs))
    np.testing.assert_allclose(of_loop, score, **ROUNDING)
    assert set(expected) == set(grads) == set(maps)
    for name, value in expected.items():
        scale = np.abs(value).max()
        assert scale > 1e-4
        np.testing.assert_allclose(grads[name], value, rtol=1e-4, atol=1e-4 * scale)


def test_one_layer(inputs):
    """No scan runs, and the maps have their layer axis nevertheless."""
    model = random_mapper("vqa", layers=1)
    _, maps, grads = jax.eval_shape(model.attention_gradients, answered(inputs))
    for found in (maps, grads):
        assert {name: x.shape for name, x in found.items()} == shapes("vqa", 1)


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
    (_, out), _ = model.mapper(
        model.vision_in(model.vision_norm(image)),
        model.text_in(model.text_norm(tokens)),
        None,
        None if model.task == "vqa" else causal,
    )
    logits = model.head(model.final_norm(out))
    return logits[:, -1] if model.task == "vqa" else logits


def test_hidden_is_removed(model):
    """What is not kept counts as little as if it were not there."""
    inputs = model.prepare(image=random_images(), text=["is a circle", "a blue square"])
    patches, words = jnp.array([[0, 1, 3], [0, 2, 4]]), jnp.array([[0, 2, 4], [0, 1, 4]])
    expected = jax.jit(only)(model, inputs, patches, words)
    rows = jnp.arange(2)[:, None]
    everything = {"image_keep": jnp.ones((2, 5), bool), "text_keep": jnp.ones((2, 9), bool)}
    of_image = {"image_keep": jnp.zeros((2, 5), bool).at[rows, patches].set(True)}
    of_text = {"text_keep": jnp.zeros((2, 9), bool).at[rows, words].set(True)}

    def logits(keep):
        found, _ = FORWARD(model, inputs | everything | keep)
        return found if model.task == "vqa" else found[rows, words]

    both = logits(of_image | of_text)
    np.testing.assert_allclose(both, expected, **ROUNDING)
    # Neither mask is without effect.
    assert np.abs(logits(of_image) - both).max() > 1e-3
    assert np.abs(logits(of_text) - both).max() > 1e-3

    @jax.jit
    def left_out(model, inputs):
        tokens, _ = model.encode_image(inputs["image"], patches)
        encoded, _ = model.encode_text(inputs["text"])
        words, _ = model.map(tokens, inputs["text"], encoded=encoded)
        return words, model.map(tokens, inputs["text"])[0]

    outputs, again = left_out(model, inputs)
    if model.task == "vqa":
        found = model.answer_logits(outputs, inputs["text"])
    else:
        found = model.word_logits(outputs)[rows, words]
    np.testing.assert_allclose(found, logits(of_image), **ROUNDING)
    np.testing.assert_allclose(again, outputs, **ROUNDING)


def test_batch_is_one_by_one_and_padding_does_not_matter(model, inputs):
    logits, maps = FORWARD(model, inputs)
    for i in range(2):
        one = {"image": inputs["image"][i : i + 1], "text": inputs["text"][i : i + 1, :LENGTH]}
        alone, of_one = FORWARD(model, one)
        expected = logits[i : i + 1] if model.task == "vqa" else logits[i : i + 1, :LENGTH]
        np.testing.assert_allclose(alone, expected, **ROUNDING)
        to_image = maps["text_to_image"][:, i : i + 1, :, :LENGTH]
        np.testing.assert_allclose(of_one["text_to_image"], to_image, **ROUNDING)


@pytest.fixture(scope="module")
def half(vqa, tmp_path_factory):
    """Saved in float16, to compute in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    vqa.save_pretrained(folder, dtype="float16")
    return CLIPMapperVQA.from_pretrained(folder, dtype="bfloat16")


def test_bfloat16(vqa, half, inputs):
    logits, maps = FORWARD(half, inputs)
    expected, plain = FORWARD(vqa, inputs)
    assert {x.dtype for x in (logits, *maps.values())} == {jnp.dtype("float32")}
    # 8 bits of precision, through 16 additions to the stream of the text.
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max())
    assert np.abs(logits - expected).max() > 1e-5
    np.testing.assert_allclose(maps["text_self"], plain["text_self"], atol=0.1)


# ---- answers


def test_score_and_predict(vqa, inputs, monkeypatch):
    logits, _ = FORWARD(vqa, inputs)
    monkeypatch.setattr(CLIPMapperVQA, "__call__", lambda *_: logits)
    np.testing.assert_array_equal(vqa.score(inputs), logits.max(-1))
    np.testing.assert_array_equal(vqa.score(answered(inputs)), logits[[0, 1], [2, 0]])
    np.testing.assert_array_equal(vqa.score(answered(inputs), 1), logits[:, 1])
    np.testing.assert_allclose(vqa.predict(inputs).sum(-1), 1, rtol=1e-6)
    several = nnx.clone(vqa)
    several.config = replace(vqa.config, several=True)
    np.testing.assert_array_equal(several.predict(inputs), jax.nn.sigmoid(logits))


def test_pairs_of_questions(vqa, inputs):
    best = np.asarray(FORWARD(vqa, inputs)[0]).argmax(-1)
    pairs = vqa.pairs(inputs)
    assert pairs["answer"].tolist() == best.tolist()
    probability = np.asarray(jax.nn.softmax(FORWARD(vqa, inputs)[0]))[[0, 1], best]
    named = [f"{ANSWERS[i]} ({p:.0%})" for i, p in zip(best, probability, strict=True)]
    assert vqa.describe(pairs) == named
    assert vqa.target_tokens(pairs)["text"].tolist() == [6, 4]
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
    np.testing.assert_array_equal(pairs["image"], np.repeat(inputs["image"][:1], 2, axis=0))
    assert pairs["image_keep"].shape == (2, 5)


# ---- captions


def test_later_words_change_no_earlier_logit(caption, inputs):
    logits, _ = FORWARD(caption, inputs)
    changed = {**inputs, "text": inputs["text"].at[:, 4].set(9)}
    other, _ = FORWARD(caption, changed)
    np.testing.assert_array_equal(other[:, :4], logits[:, :4])
    assert np.abs(other[:, 4] - logits[:, 4]).min() > 0


def test_log_probability_and_score(caption, inputs, monkeypatch):
    logits, _ = FORWARD(caption, inputs)
    monkeypatch.setattr(CLIPMapperCaption, "__call__", lambda *_: logits)
    text, logp = np.asarray(inputs["text"]), np.asarray(jax.nn.log_softmax(logits))
    expected = []
    for b, length in enumerate((7, 5)):
        words = [logp[b, i - 1, text[b, i]] for i in range(1, length)]
        expected.append(np.mean(words))
    np.testing.assert_allclose(caption.log_probability(inputs), expected, rtol=1e-5)
    expected = [logits[0, 4, text[0, 5]], logits[1, 2, text[1, 3]]]
    np.testing.assert_array_equal(caption.score(inputs, np.array([5, 3])), expected)
    of_words = caption.score({**inputs, "position": jnp.array([5, 3])})
    np.testing.assert_array_equal(of_words, expected)


def with_bias_of_the_end(caption, bias):
    model = nnx.clone(caption)
    # Start and padding are tempting too, and never written.
    model.head.bias.set_value(
        model.head.bias[...].at[jnp.array([0, 2, 3])].add(jnp.array([3.0, 3.0, bias]))
    )
    return model


LOGITS = jax.jit(lambda model, inputs: model(inputs))
GENERATE = jax.jit(lambda model, image, keep=None: model.generate(image, keep))


def greedy(model, image, keep=None):
    """One word after the other, each from all tokens; after the words lie some that are no words.

    Start, end and padding are 2, 3 and 0, as `word_tokenizer` has them.
    """
    sizes = model.config.clip.text
    words = np.array([token for token in range(sizes.vocab_size) if token not in (0, 2)])
    text = np.full((len(image), sizes.context), 7, np.int32)
    text[:, 0] = 2
    ended = np.zeros(len(image), bool)
    for i in range(1, sizes.context):
        logits = LOGITS(model, {"image": image, "text": jnp.asarray(text), "image_keep": keep})
        best = words[np.asarray(logits)[:, i - 1, words].argmax(-1)]
        best[...] = 3 if i == sizes.context - 1 else best
        text[:, i] = np.where(ended, 0, best)
        ended |= best == 3
    return text


@pytest.mark.parametrize(("bias", "ends"), [(2.5, "early"), (-100, "never")])
def test_generate_is_greedy(caption, bias, ends):
    model = with_bias_of_the_end(caption, bias)
    image = model.prepare(image=random_images(2, seed=1), text=TEXTS)["image"]
    generated = model.prepare(image=random_images(2, seed=1))
    text = np.asarray(generated["text"])
    np.testing.assert_array_equal(text, greedy(model, image))
    np.testing.assert_array_equal(generated["image"], image)
    ended = (text == 3).argmax(-1)
    assert (ended == 8).all() if ends == "never" else (ended < 8).any()
    words = [[token for token in row if token] for row in model.tokens(generated)]
    assert model.predict(generated) == [" ".join(row) for row in words]


def hidden_and_left_out(tokens, kept):
    """The same choice of tokens for two images, as a mask and as indices."""
    indices = np.sort([np.random.default_rng(i).permutation(tokens)[:kept] for i in range(2)])
    return jnp.asarray((indices[..., None] == np.arange(tokens)).any(1)), jnp.asarray(indices)


def test_generate_from_some_patches():
    model = random_mapper("caption", layers=3)
    for path, value in values(model).items():
        # Random biases would choose the words of all images.
        if path[-1] == "bias":
            value.set_value(jnp.zeros_like(value[...]))
    image = jnp.asarray(processor().image(random_images(2, seed=2)))
    mask, indices = hidden_and_left_out(5, 3)
    expected = greedy(model, image, mask)
    np.testing.assert_array_equal(GENERATE(model, image, mask), expected)
    np.testing.assert_array_equal(GENERATE(model, image, indices), expected)
    assert (expected[0] != expected[1]).any()


def test_the_bundled_model_captions_as_without_a_memory():
    model = models.from_pretrained("caption-shapes")
    scenes = [Shapes().scene("test", i).image for i in (0, 1, 0, 1)]
    image = jnp.asarray(model.processor.image(scenes))
    mask, indices = hidden_and_left_out(65, 30)
    some = jnp.concatenate([jnp.ones_like(mask), mask])
    expected = greedy(model, image, some)
    assert len({tuple(row) for row in expected}) == 4
    np.testing.assert_array_equal(GENERATE(model, image, some), expected)
    np.testing.assert_array_equal(GENERATE(model, image[:2], indices), expected[2:])


@pytest.mark.parametrize("layers", [1, 3])
def test_word_by_word_the_logits_are_those_of_all_tokens(layers):
    model = random_mapper("caption", layers)
    image = jnp.asarray(processor().image(random_images()))
    text = jnp.asarray(np.random.default_rng(0).integers(0, 12, (2, 9)))
    mask, _ = hidden_and_left_out(5, 3)

    @jax.jit
    def by_word(model, image, text):
        tokens, _ = model.encode_image(image, mask)

        def step(memory, place):
            logits, memory = model.next_word(text[:, place], memory, place, key_mask(mask))
            return memory, logits

        places = jnp.arange(text.shape[1])
        logits = jax.lax.scan(step, model.begin(tokens, key_mask(mask)), places)[1]
        return logits.swapaxes(0, 1)

    expected = LOGITS(model, {"image": image, "text": text, "image_keep": mask})
    # float32, summed in another order.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(by_word(model, image, text), expected, atol=1e-5 * scale)


def test_generate_knows_the_end_of_old_configurations(caption):
    """There the id 2 stands for the highest id, which is the tokenizer's end token."""
    old = nnx.clone(caption)
    tokenizer = word_tokenizer(WORDS, 9)
    tokenizer.eos_token, tokenizer.pad_token = "is", None
    text = replace(STAGE1.text, eos_token_id=2)
    old.config = replace(caption.config, clip=replace(STAGE1, text=text))
    old.processor = Processor(tokenizer, processor().images)
    old.head.bias.set_value(old.head.bias[...].at[11].add(100))
    assert old.prepare(image=random_images(1))["text"].tolist() == [[2, *[11] * 8]]


def test_pairs_of_words(caption, inputs):
    pairs = caption.pairs({**inputs, "text_keep": jnp.ones((2, 9), bool)})
    assert pairs["position"].tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert pairs["example"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(pairs["text"], inputs["text"][pairs["example"]])
    np.testing.assert_array_equal(pairs["image"], inputs["image"][pairs["example"]])
    assert pairs["text_keep"].shape == (8, 9)
    assert caption.target_tokens(pairs)["text"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
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


def test_save_and_load(model, folder):
    loaded = models.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    for path, value in values(model).items():
        np.testing.assert_array_equal(values(loaded)[path][...], value[...])
    np.testing.assert_array_equal(loaded.processor.text(TEXTS, 9), model.processor.text(TEXTS, 9))
    image = random_images(1)
    np.testing.assert_array_equal(loaded.processor.image(image), model.processor.image(image))


def test_half_a_file(vqa, half):
    assert half.config == replace(vqa.config, clip=replace(STAGE1, dtype="bfloat16"))
    for path, value in values(vqa).items():
        assert values(half)[path].dtype == jnp.float32
        # float16 has 11 bits, and steps of 2^-24 near 0.
        np.testing.assert_allclose(values(half)[path][...], value[...], rtol=2**-11, atol=2**-25)


def test_stage_1_from_a_clip(vqa, tmp_path):
    text = replace(STAGE1.text, context=12)
    tokens = word_tokenizer(WORDS, 12)
    config = replace(STAGE1, text=text)
    clip = random_values(
        lambda: CLIP(config, rngs=nnx.Rngs(0), processor=Processor(tokens, processor().images)), 5
    )
    model = nnx.clone(vqa)
    model.init_from(clip)
    theirs, before = values(clip), values(vqa)
    context = ("text", "position_embedding")
    for path, value in values(model).items():
        expected = theirs[path][...] if path[0] in ("vision", "text") else before[path][...]
        np.testing.assert_array_equal(value[...], expected[:9] if path == context else expected)
    clip.save_pretrained(tmp_path / "clip")
    assert type(models.from_pretrained(tmp_path / "clip")) is CLIP
    narrow = replace(STAGE1, vision=replace(STAGE1.vision, mlp_width=8))
    other = random_values(lambda: CLIP(narrow, rngs=nnx.Rngs(0)))
    with error(r"init_from: vision/.* has shape \[2, 8, 16\] there"):
        model.init_from(other)
    taken = ("vision", "class_embedding")
    np.testing.assert_array_equal(values(model)[taken][...], values(clip)[taken][...])


def test_beginning_as_another_mapper(vqa, caption):
    """What both have in one size is taken: not the head, nor stacks of another depth."""
    model = nnx.clone(vqa)
    model.init_from(caption)
    theirs, before = values(caption), values(vqa)
    taken = set()
    for path, value in values(model).items():
        kept = np.array_equal(value[...], before[path][...])
        if not kept:
            np.testing.assert_array_equal(value[...], theirs[path][...])
            taken.add(path[:2])
    assert {("vision", "transformer"), ("mapper", "last"), ("text_in", "kernel")} <= taken
    assert not taken & {("head", "kernel"), ("mapper", "blocks")}


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
    for wrong in ("yes", [1, 2]):
        change = {"answers": wrong}
        copy = edited(folder, tmp_path, lambda x, change=change: x["mapper_config"].update(change))
        with error(r"config.json: mapper_config.answers must be a list of strings, got ['\[]"):
            CLIPMapper.from_pretrained(copy)
    copy = edited(folder, tmp_path, lambda config: config.pop("clip_config"))
    with error(r"config.json: expected objects clip_config and mapper_config"):
        CLIPMapper.from_pretrained(copy)
    copy = edited(folder, tmp_path, lambda config: config.update(model_type="bert"))
    with error(r"describes a model of type 'bert'; known are captioner, clip, clipmapper"):
        models.from_pretrained(copy)
    with error(r"no model folder 'nowhere'", FileNotFoundError):
        models.from_pretrained("nowhere")


def test_weights_that_do_not_fit(vqa, tmp_path):
    folder = tmp_path / "model"
    vqa.save_pretrained(folder)
    copy = edited(folder, tmp_path, lambda config: config["mapper_config"].update(mlp_width=8))
    with error(
        r"mapper\.blocks\.image_self\.contract\.kernel has shape \[2, 24, 16\], .*\[2, 8, 16\]"
    ):
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
        ({"image": np.zeros((3, 16, 16, 3), np.float32)}, r"3 images and 2 texts", ValueError),
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
    with error(r"2 images and 3 questions make no pairs: give as many"):
        vqa.pairs({**inputs, "text": three})
    for target in ("purple", -1, 4, 1.5, None.__class__):
        with error(r"this model has no answer .*; it has 4 answers: red, blue, two, yes"):
            vqa.pairs(inputs, target)
    with error(r"3 answers for 2 questions; give one for each"):
        vqa.pairs(inputs, ["yes", "two", "red"])
    with error(r"has 10 tokens with its start and end token, .* at most 9: shorten it by 1"):
        vqa.prepare(image=random_images(), text=["what is above a red circle is it"] * 2)
    with error(r"the text is empty"):
        vqa.prepare(image=random_images(1), text="")
    with error(r"no image: pass image="):
        vqa.prepare(text="what is above")
    other = nnx.clone(vqa)
    text = replace(STAGE1.text, eos_token_id=5)
    other.config = replace(vqa.config, clip=replace(STAGE1, text=text))
    with error(r"ends a text with the id 3, and the model looks for the id 5"):
        other.prepare(image=random_images(1), text="what is above")


def test_captions_that_do_not_fit(caption, inputs):
    with error(r"the caption of image 1 has words 1 to 3, and no word 4"):
        caption.pairs(inputs, 4)
    with error(r"has words 1 to 5, and no word 0"):
        caption.pairs(inputs, [0])
    for target in ("circle", 1.5, [], [[1]]):
        with error(r"target must be the position of a word in its caption, from 1"):
            caption.pairs(inputs, target)
    empty = inputs["text"].at[1].set(jnp.array([2, 3, *[0] * 7]))
    with error(r"the caption of image 1 has no words"):
        caption.pairs({**inputs, "text": empty})
    with error(r"2 images and 1 captions: give one caption per image"):
        caption.pairs({**inputs, "text": inputs["text"][:1]})
    with error(r"which word of the caption\? Pass target= its position"):
        caption.score(inputs)
    plain = nnx.clone(caption)
    plain.processor = Processor(None, processor().images)
    with error(r"this model has no tokenizer, and does not know how captions start"):
        plain.prepare(image=random_images(1))
    with error(r"this model has no tokenizer: its folder holds no tokenizer.json"):
        jaxrel.explain(plain, image=random_images(1), text="a circle")
