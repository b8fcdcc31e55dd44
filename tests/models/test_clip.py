"""CLIP: parity with stored reference values, scores, layout, structure, preprocessing."""

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from PIL import Image

import jaxrel
from jaxrel.models import (
    CLIP,
    CLIPConfig,
    Processor,
    Stream,
    image_processing,
    word_tokenizer,
)
from jaxrel.models.clip import end_of_text, interpolate_positions
from jaxrel.models.transformer import Transformer
from tests.zoo.clips import SMALL, WORDS, small_clip

# The reference values are float64 results rounded to float32; ours run in float32 through three
# layers, which costs a few float32 roundings of values of order 1 to 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SCORE = jax.jit(CLIP.score)
FORWARD = jax.jit(CLIP.__call__, static_argnames="return_attention")
GRADIENTS = jax.jit(CLIP.attention_gradients)


@pytest.fixture(scope="module")
def small():
    return small_clip()


@pytest.fixture(scope="module")
def inputs(small):
    image = np.random.default_rng(0).integers(0, 256, (2, 20, 16, 3), np.uint8)
    return small.prepare(image=list(image), text=["a red circle", "a blue square"])


def stacked(golden, prefix, layers):
    return np.stack([golden[f"{prefix}/{layer}"] for layer in range(layers)])


def test_parity_outputs_and_maps(golden, reference, reference_inputs):
    output, attention = FORWARD(reference, reference_inputs, return_attention=True)
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        np.testing.assert_allclose(output[name], golden[name], **TOLERANCE)
    np.testing.assert_allclose(attention["vision"], stacked(golden, "vision/attn", 3), **TOLERANCE)
    np.testing.assert_allclose(attention["text"], stacked(golden, "text/attn", 2), **TOLERANCE)


@pytest.mark.parametrize("remat", [False, True])
def test_parity_gradients(golden, reference, reference_inputs, remat):
    model = nnx.clone(reference)
    model.config = replace(model.config, remat=remat)
    score, maps, grads = GRADIENTS(model, reference_inputs)
    np.testing.assert_allclose(score, np.diag(golden["logits_per_image"]), **TOLERANCE)
    for name, layers in (("vision", 3), ("text", 2)):
        attn, grad = (stacked(golden, f"{name}/{kind}", layers) for kind in ("attn", "attn_grad"))
        np.testing.assert_allclose(maps[name], attn, **TOLERANCE)
        np.testing.assert_allclose(grads[name], grad, **TOLERANCE)


def test_parity_one_image_with_all_texts(golden, reference, reference_inputs):
    one = reference_inputs | {"image": reference_inputs["image"][:1]}
    expected = golden["shared/logits_per_image"][0]
    np.testing.assert_allclose(SCORE(reference, one), expected, **TOLERANCE)


def test_target_token_and_content(golden, reference, reference_inputs):
    target_token = reference.target_tokens(reference_inputs)
    assert target_token["vision"].tolist() == [0, 0, 0]
    assert target_token["text"].tolist() == golden["eot_index"].tolist()
    content = reference.content(reference_inputs)
    assert content["vision"].tolist() == [[False] + [True] * 16] * 3
    for row, end in zip(np.asarray(content["text"]), golden["eot_index"], strict=True):
        assert np.flatnonzero(row).tolist() == list(range(1, end))


def test_end_of_text_conventions():
    text = np.array([[1, 5, 9, 0], [1, 9, 9, 9], [1, 4, 2, 3]])
    assert end_of_text(text, 9)[:2].tolist() == [2, 1]
    # 2 is the old convention: the highest id ends the text, wherever a 2 may be.
    assert end_of_text(text, 2).tolist() == [2, 1, 1]


def test_old_eos_convention_reads_the_highest_id(golden, reference, reference_inputs):
    old = nnx.clone(reference)
    old.config = replace(old.config, text=replace(old.config.text, eos_token_id=2))
    assert old.target_tokens(reference_inputs)["text"].tolist() == golden["eot_index"].tolist()


def test_layout(small):
    assert small.layout["vision"] == Stream("vision", "image", 5, (2, 2), 1)
    assert small.layout["text"] == Stream("text", "text", 8, None, 1)
    with pytest.raises(KeyError, match="no stream 'audio'; this model has vision, text"):
        small.layout["audio"]


def test_layers_are_stacked_and_run_by_one_scan_each(small, inputs):
    shape = small.vision.transformer.blocks.attention.query.kernel.shape
    assert shape == (2, 16, 16)
    jaxpr = jax.make_jaxpr(lambda m, x: m(x))(small, inputs)
    scans = [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert scans == [2, 3]


def test_trace_does_not_grow_with_depth(inputs):
    def equations(layers):
        config = replace(SMALL, vision=replace(SMALL.vision, layers=layers))
        model = nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0)))
        return str(jax.make_jaxpr(lambda m, x: m(x))(model, inputs)).count("\n")

    assert equations(2) == equations(7)


def test_initial_layers_differ():
    config = replace(SMALL.text, width=4, layers=2, heads=2, mlp_width=4)
    transformer = Transformer(config, "text", dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    kernels = transformer.blocks.expand.kernel[...]
    assert not np.array_equal(kernels[0], kernels[1])


def test_text_attention_is_causal(small, inputs):
    _, attention = FORWARD(small, inputs, return_attention=True)
    future = ~np.tril(np.ones((8, 8), bool))
    assert np.all(np.asarray(attention["text"])[..., future] == 0)
    np.testing.assert_allclose(attention["text"].sum(-1), 1, rtol=1e-6)  # 8 float32 additions


def test_tags(small, inputs):
    score, tags = jax.jit(lambda m, x: jaxrel.capture(m.score)(x))(small, inputs)
    _, attention = FORWARD(small, inputs, return_attention=True)
    rounding = {"rtol": 1e-5, "atol": 1e-6}  # two programs, fused differently
    assert tags["vision"].shape == (2, 2, 2, 5, 5)
    assert tags["text/before"].shape == tags["text/after"].shape == (3, 2, 8, 12)
    np.testing.assert_allclose(tags["text"], attention["text"], **rounding)
    np.testing.assert_allclose(score, SCORE(small, inputs), **rounding)

    @jax.jit
    def first_layer(transformer, x):
        graph, stacked = nnx.split(transformer.blocks)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], stacked))(x, None, "vision")[0]

    out = first_layer(small.vision.transformer, tags["vision/before"][0])
    np.testing.assert_allclose(out, tags["vision/before"][1], **rounding)


def test_score_is_the_logit_of_the_pair(small, inputs):
    @jax.jit
    def all_of_them(model, inputs):
        one_text = inputs | {"text": inputs["text"][:1]}
        logits = model(inputs)["logits_per_image"]
        return {
            "diagonal": (model.score(inputs), jnp.diag(logits)),
            "crossed": (model.score(inputs, jnp.array([1, 0])), jnp.diag(logits[:, ::-1])),
            "second text": (model.score(inputs, 1), logits[:, 1]),
            "one text": (model.score(one_text), logits[:, 0]),
            "predict": (model.predict(inputs), jax.nn.softmax(logits, axis=1)),
        }

    for case, (actual, expected) in all_of_them(small, inputs).items():
        # Another order of float32 additions.
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, err_msg=case)


def test_one_image_with_many_texts_has_gradients_of_its_own_for_each(small, inputs):
    one = {"image": inputs["image"][:1], "text": inputs["text"]}
    other = one | {"text": inputs["text"][jnp.array([0, 0])]}
    grads, expected = (GRADIENTS(small, x)[2]["vision"] for x in (one, other))
    assert grads.shape == (2, 2, 2, 5, 5)
    np.testing.assert_array_equal(grads[:, 0], expected[:, 0])
    assert not np.allclose(grads[:, 1], expected[:, 1])


def test_score_under_vmap(small, inputs):
    @jax.jit
    def rows(model, inputs):
        one = lambda x: model.score(jax.tree.map(lambda leaf: leaf[None], x))[0]
        return jax.vmap(one)(inputs)

    # Batched and mapped matrix products add in different orders.
    np.testing.assert_allclose(rows(small, inputs), SCORE(small, inputs), rtol=1e-5)


def test_score_rejects_what_makes_no_pairs(small, inputs):
    three = inputs | {"text": jnp.concatenate([inputs["text"], inputs["text"][:1]])}
    with pytest.raises(ValueError, match="2 images and 3 texts make no pairs: give as many"):
        small.score(three)
    with pytest.raises(ValueError, match=r"target 2 names no text: there are 2, 0\.\.1"):
        small.score(inputs, 2)
    with pytest.raises(ValueError, match="target must be the text's index, one or one per image"):
        small.score(inputs, 0.5)


@pytest.mark.parametrize("remat", [False, True])
def test_remat_is_in_the_trace_when_asked_for(small, inputs, remat):
    model = nnx.clone(small)
    model.config = replace(small.config, remat=remat)
    jaxpr = str(jax.make_jaxpr(CLIP.score)(model, inputs))
    assert ("remat" in jaxpr or "checkpoint" in jaxpr) == remat


def test_bfloat16_is_close_and_keeps_float32_maps(golden, golden_folder, reference_inputs):
    model = CLIP.from_pretrained(golden_folder, dtype="bfloat16")
    output, attention = FORWARD(model, reference_inputs, return_attention=True)
    assert attention["vision"].dtype == output["logits_per_image"].dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4% per operation, on cosines times 10.
    np.testing.assert_allclose(output["logits_per_image"], golden["logits_per_image"], atol=0.15)
    np.testing.assert_allclose(attention["vision"][0], golden["vision/attn/0"], atol=0.02)


def test_a_model_is_a_jit_argument_whose_leaves_are_arrays(small, inputs):
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(small))
    traces = []

    @jax.jit
    def score(model, inputs):
        traces.append(1)
        return model.score(inputs)

    score(small, inputs)
    score(jax.tree.map(lambda leaf: leaf + 0, small), inputs)
    assert len(traces) == 1


def test_inputs_are_checked(small, inputs):
    with pytest.raises(ValueError, match=r"inputs lack text; they hold image\. Make them"):
        small({"image": inputs["image"]})
    with pytest.raises(ValueError, match=r"shape \[batch, 16, 16, 3\], got \[2, 8, 8, 3\]"):
        small(inputs | {"image": inputs["image"][:, :8, :8]})
    with pytest.raises(TypeError, match="image must be normalised floats, got uint8"):
        small(inputs | {"image": inputs["image"].astype(jnp.uint8)})
    with pytest.raises(ValueError, match=r"at most 8 tokens, got \[2, 9\]"):
        small(inputs | {"text": jnp.zeros((2, 9), int)})
    with pytest.raises(TypeError, match="text must be integer token ids, got float32"):
        small(inputs | {"text": inputs["text"].astype(jnp.float32)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"heads": 5}, "vision: width 16 is not a multiple of its 5 heads"),
        ({"layers": 0}, "vision: layers must be a positive integer, got 0"),
        ({"activation": "relu"}, "unknown activation 'relu', known are quick_gelu, gelu"),
        ({"image_size": 4}, "image_size 4 is smaller than one patch of 8 pixels"),
    ],
)
def test_config_is_checked(change, text):
    with pytest.raises(ValueError, match=text):
        replace(SMALL.vision, **change)


def test_config_round_trip():
    assert CLIPConfig.from_dict(SMALL.to_dict()) == SMALL
    assert CLIPConfig.from_dict({}) == CLIPConfig()
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16', got 'int8'"):
        replace(SMALL, dtype="int8")
    with pytest.raises(ValueError, match=r"vision_config.patch_size must be one integer, got \[8"):
        CLIPConfig.from_dict({"vision_config": {"patch_size": [8, 16]}})
    wide = replace(SMALL, vision=replace(SMALL.vision, image_size=(8, 16)))
    assert CLIPConfig.from_dict(wide.to_dict()) == wide
    assert wide.vision.grid == (1, 2)


def test_interpolated_positions_keep_a_constant_and_a_same_sized_grid():
    positions = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    same = interpolate_positions(positions, (3, 3), (3, 3))
    np.testing.assert_allclose(same, positions, rtol=1e-6)  # one rounding to float32
    constant = interpolate_positions(np.ones((10, 4), np.float32), (3, 3), (5, 2))
    np.testing.assert_allclose(constant, np.ones((11, 4)), rtol=1e-6)


def test_prepare(small):
    image = Image.new("RGB", (32, 16), (255, 0, 0))
    inputs = small.prepare(image=image, text="a RED circle.")
    assert inputs["image"].shape == (1, 16, 16, 3)
    np.testing.assert_allclose(inputs["image"][0, 0, 0], [1, -1, -1], atol=1e-6)
    assert inputs["text"].tolist() == [[2, 4, 5, 7, 1, 3, 0, 0]]
    assert small.tokens(inputs) == [["", "a", "red", "circle", ".", "", "", ""]]
    array = small.prepare(image=np.asarray(image), text="a RED circle.")
    np.testing.assert_array_equal(array["image"], inputs["image"])


def test_prepare_reads_other_image_modes(small):
    palette = Image.new("P", (16, 16))
    palette.info["transparency"] = b"\x00\x01"
    for image in (palette, Image.new("RGBA", (16, 16)), Image.new("L", (1, 1))):
        assert small.prepare(image=image, text="red")["image"].shape == (1, 16, 16, 3)


def test_prepare_names_unknown_words(small):
    with pytest.warns(UserWarning, match="this model does not know 'Zebra'; the text is read"):
        inputs = small.prepare(image=Image.new("RGB", (16, 16)), text="a red Zebra")
    assert inputs["text"].tolist() == [[2, 4, 5, 1, 3, 0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "the text is empty: ''"),
        (["a", " \n"], ValueError, "the text is empty: ' "),
        ([], ValueError, "no text: pass text="),
        (None, ValueError, "no text: pass text="),
        (7, TypeError, "text must be a string or a list of strings, got 7"),
        ("red " * 9, ValueError, "has 11 tokens .* at most 8: shorten it by 3"),
        ("zebra lion", ValueError, "knows none of the words of 'zebra lion'; .* red, blue"),
        ("a <end> circle", ValueError, "contains '<end>', which is a special token"),
        ("<pad>", ValueError, "holds no word"),
    ],
)
def test_prepare_rejects_text(small, text, error, message):
    with pytest.raises(error, match=message):
        small.prepare(image=Image.new("RGB", (16, 16)), text=text)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, ValueError, "no image: pass image="),
        ([], ValueError, "no image: pass image="),
        ("a.png", TypeError, "a PIL image or a uint8 array, got str; open a file with"),
        (np.zeros((4, 4, 3)), TypeError, "must be uint8 with values 0..255, got float64"),
        (np.zeros((4, 4), np.uint8), ValueError, r"\[height, width, 3\], got \[4, 4\]"),
        (Image.new("F", (4, 4)), ValueError, "mode 'F', which have no sure colour .* 8-bit RGB"),
    ],
)
def test_prepare_rejects_images(small, image, error, message):
    with pytest.raises(error, match=message):
        small.prepare(image=image, text="red")


def test_prepare_needs_a_processor_of_this_model():
    bare = nnx.eval_shape(lambda: CLIP(SMALL, rngs=nnx.Rngs(0)))
    image = Image.new("RGB", (16, 16))
    with pytest.raises(ValueError, match=r"no tokenizer: its folder holds no tokenizer.json"):
        bare.prepare(image=image, text="red")
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.tokens({"text": jnp.zeros((1, 8), int)})
    tokenizer = word_tokenizer(WORDS, 8)
    bare.processor = Processor(tokenizer)
    with pytest.raises(ValueError, match=r"holds no preprocessor_config.json; copy that file"):
        bare.prepare(image=image, text="red")
    wrong = replace(SMALL, text=replace(SMALL.text, eos_token_id=7))
    processor = Processor(tokenizer, image_processing(16))
    model = nnx.eval_shape(lambda: CLIP(wrong, rngs=nnx.Rngs(0), processor=processor))
    with pytest.raises(ValueError, match=r"the id 3, and the model looks for the id 7"):
        model.prepare(image=image, text="red")
    larger = Processor(word_tokenizer([*WORDS, "one", "two", "three"], 8))
    with pytest.raises(
        ValueError, match="the tokenizer has 13 tokens and the model 12, which lacks three"
    ):
        CLIP(SMALL, rngs=nnx.Rngs(0), processor=larger)


@pytest.mark.parametrize(
    ("words", "context", "message"),
    [
        ([], 8, "the vocabulary is empty"),
        (["red"], 2, "need at least 3"),
        (["red", "red"], 8, r"repeated .* \['red'\]"),
        (["Red", "t-shirt"], 8, r"not one lower-case token.* \['Red', 't-shirt'\]"),
    ],
)
def test_word_tokenizer_rejects(words, context, message):
    with pytest.raises(ValueError, match=message):
        word_tokenizer(words, context)


def test_tokens_rebuild_words_of_a_byte_pair_tokenizer(small):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # "é" is the two bytes "Ã©" in a byte-level vocabulary.
    vocabulary = ["<s>", "c", "a", "f", "Ã", "©</w>", "a</w>", "ca", "<e>"]
    backend = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(vocabulary)}, [("c", "a")], end_of_word_suffix="</w>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("<e>", 8), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<e>", unk_token="<e>"
    )
    processor = Processor(tokenizer)
    ids = processor.text("a ca café", 9)
    assert ids.tolist() == [[0, 6, 1, 6, 7, 3, 4, 5, 8]]
    # A character of two tokens is shown at the first.
    expected = ["", "a", "c", "##a", "ca", "##f", "##é", "##", ""]
    assert processor.tokens(ids) == [expected]
    # Cut in the middle of a word.
    assert processor.tokens(ids[:, :6]) == [["", "a", "c", "##a", "ca", "##f"]]


def test_importing_the_models_says_nothing():
    code = (
        "from jaxrel.models import word_tokenizer, image_processing\n"
        "word_tokenizer(['red'], 4), image_processing(8)\n"
        "import os; assert 'TRANSFORMERS_NO_ADVISORY_WARNINGS' not in os.environ\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""
