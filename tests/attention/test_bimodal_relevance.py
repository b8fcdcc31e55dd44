"""All methods for a function of two streams, on CLIPmapper."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention import BIMODAL_METHODS, Layers, bimodal_relevance
from jaxrel.attention.methods import TABLE
from tests.attention.naive import rows_by_hand
from tests.zoo.clipmappers import TEXTS, answered, random_mapper
from tests.zoo.images import random_images


def tags_of(schedule):
    return tuple(tag for block in schedule for stage in block for _, tag in stage)


@pytest.fixture(scope="module")
def vqa():
    return random_mapper("vqa", layers=3)


@pytest.fixture(scope="module")
def questions(vqa):
    return answered(vqa.prepare(image=random_images(), text=TEXTS))


def all_methods(model, inputs, methods=BIMODAL_METHODS):
    """Scores and rows of the methods, and what goes into them, in one program."""
    schedule, made_of = model.layout.schedule, {}

    def recorded(name, transformation):
        def transform(*args, **kwargs):
            def function(*inputs):
                made_of[name] = transformation(*args, **kwargs)(*inputs)
                return made_of[name]

            return function

        return transform

    explain = attention.value_and_bimodal_relevance(
        lambda model, inputs: model.score(inputs),
        schedule,
        method=methods,
        target_token=model.target_tokens(inputs)["text"],
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("capture_with_grad", "lrp"):
            transformation = getattr(bimodal_relevance, name)
            patch.setattr(bimodal_relevance, name, recorded(name, transformation))
        return explain(model, inputs), made_of


ALL_METHODS = jax.jit(all_methods)


WITHOUT_LRP = tuple(name for name in BIMODAL_METHODS if not TABLE[name].by_lrp)


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
    assert set(rows) == set(BIMODAL_METHODS)
    for name, of_method in rows.items():
        layers = plain
        if TABLE[name].by_lrp:
            layers = {tag: x._replace(attn=made_of["lrp"][tag]) for tag, x in plain.items()}
        for b, token in enumerate(target_token):
            maps = rows_by_hand(name, schedule, layers, b, seen=slice(token + 1))
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


def error(match):
    return pytest.raises(ValueError, match=match)


def test_methods_that_do_not_fit(vqa, questions):
    fun = attention.value_and_bimodal_relevance
    schedule = vqa.layout.schedule
    with error(r"unknown attention method 'lrp'; there are equal, weighted, raw"):
        fun(lambda x: x, schedule, method="lrp", target_token=0)
    with error(r"importance: 'size' is unknown"):
        fun(lambda x: x, schedule, method="weighted", target_token=0, importance="size")
    other = [[(("sq", "text_to_sound"),)]]
    with error(r"tags nothing named 'text_to_sound'; its tags: .*'text_to_image'"):
        jax.eval_shape(
            fun(lambda x: vqa.score(x), other, method="equal", target_token=0), questions
        )
    alone = [[(("sq", "text_to_image"),)]]
    with error(r"the schedule has no attention of the kind 'ss'"):
        jax.eval_shape(fun(lambda x: vqa.score(x), alone, method="raw", target_token=0), questions)
