"""Captioners with the weights of the reference implementation give its numbers."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxrel.models import decoding, word_tokenizer
from jaxrel.models.captioner import Captioner, reference_order
from tests.errors import error
from tests.zoo.captioners import FORWARD, REFERENCES, load, reference, reference_config, tensors


def close(actual, expected):
    """Within 1e-5 of the largest value: the logits reach 46."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


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
