"""Metrics of explanations word by word: hand examples, naive float64 references, parity, errors.

The fixture holds inputs and outputs of the reference implementation of Sun et al. 2022: of its
evaluation functions on made-up data, and of its evaluation run on one image of 40 x 40 pixels.
Where it computes otherwise than the paper says (thresholds in place, the largest of true and the
smallest of hallucinated mentions, quantiles of another word), the test feeds the metric
accordingly. Of the run, what lacks its inputs is not here: words are ablated by a relevance that
was not kept, relevance per channel was not kept either, and new captions need the model.
"""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.metrics import bootstrap, bootstrap_many, bootstrap_ratio
from jaxrel.metrics.ablation import (
    MEASURES,
    ablate,
    ablated_prefixes,
    ablation_summary,
    patch_mask,
    patch_scores,
)
from jaxrel.metrics.correctness import (
    THRESHOLDS,
    box_masks,
    correctness,
    scale_boxes,
)
from jaxrel.metrics.frequent_words import frequent_words
from jaxrel.metrics.word_statistics import (
    QUANTILES,
    auc_differences,
    auc_intervals,
    best_threshold,
    map_statistics,
    roc_auc,
)
from jaxrel.metrics.words import (
    COCO_FREQUENT,
    FLICKR30K_FREQUENT,
    OBJECTS,
    STOP_WORDS,
    match,
    singulars,
)
from tests.paths import FIXTURES

FIXTURE = dict(np.load(FIXTURES / "word_metrics.npz"))
# Sums of some thousand float32 numbers, in another order.
close = dict(rtol=2e-5, atol=1e-7)
# Float64 sums in another order.
exact = dict(rtol=1e-12, atol=1e-12)


def case(prefix):
    return {k.removeprefix(prefix): v for k, v in FIXTURE.items() if k.startswith(prefix)}


def rng(seed=0):
    return np.random.default_rng(seed)


# Words.


def test_lists_have_the_papers_words():
    assert [len(x) for x in (FLICKR30K_FREQUENT, COCO_FREQUENT, OBJECTS, STOP_WORDS)] == [
        20,
        25,
        101,
        179,
    ]
    assert {"dogs", "children", "woman"} <= set(FLICKR30K_FREQUENT)
    assert not OBJECTS & STOP_WORDS


PLURALS = {
    "dogs": "dog",
    "buses": "bus",
    "glasses": "glass",
    "couches": "couch",
    "toothbrushes": "toothbrush",
    "knives": "knife",
    "babies": "baby",
    "planes": "plane",
    "ties": "tie",
    "shoes": "shoe",
    "gloves": "glove",
    # Words that end in s, and are in the list themselves.
    "glass": "glass",
    "bus": "bus",
    "skis": "skis",
    "scissors": "scissors",
    # What stripping the characters of "es" or "s" would find or lose.
    "chess": None,
    "tees": None,
    "s": None,
}


@pytest.mark.parametrize("word", PLURALS)
def test_plurals_are_told_by_their_ending(word):
    assert match(word, OBJECTS) == PLURALS[word]
    assert singulars(word)[0] == word


def test_an_ending_goes_only_where_a_plural_has_it():
    assert singulars("planes") == ("planes", "plane")
    assert singulars("boxes") == ("boxes", "boxe", "box")
    assert singulars("grass") == ("grass",)


def test_a_word_stands_for_the_only_category_it_is_a_part_of():
    categories = ["person", "sports ball", "baseball bat", "baseball glove", "bear", "teddy bear"]
    assert match("balls", categories) == "sports ball"
    assert match("baseball", categories) is None
    assert match("bear", categories) == "bear"
    assert match("man", categories) is None
    assert match("ball", FIXTURE["run/categories"].tolist()) == "sports ball"


# Patches.


def naive_patch_scores(x, patch):
    height, width = x.shape
    return np.array(
        [
            [x[r : r + patch, c : c + patch].sum() for c in range(0, width, patch)]
            for r in range(0, height, patch)
        ]
    )


def naive_patch_mask(scores, count):
    order = sorted(range(scores.size), key=lambda i: (-scores.ravel()[i], i))
    mask = np.zeros(scores.size, bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def test_patches_by_hand():
    relevance = np.array([[1.0, 1, -9, 0], [1, 1, 9, 1], [2, 0, 0, 0], [0, 0, 0, 3]])
    scores = patch_scores(relevance, 2)
    np.testing.assert_array_equal(scores, [[4, 1], [2, 3]])
    mask = patch_mask(scores, 2)
    np.testing.assert_array_equal(mask, [[True, False], [False, True]])
    image = np.full((4, 4, 3), 5.0, np.float32)
    gone = np.array(ablate(image, mask))
    np.testing.assert_array_equal(gone[:2, :2], 0)
    np.testing.assert_array_equal(gone[2:, 2:], 0)
    np.testing.assert_array_equal(gone[:2, 2:], 5)
    np.testing.assert_array_equal(gone[2:, :2], 5)
    np.testing.assert_array_equal(image, 5)
    colour = np.array([1.0, 2, 3], np.float32)
    np.testing.assert_array_equal(ablate(image, mask, colour)[0, 0], colour)


@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_patches_are_those_of_the_naive_reference(x64, count):
    maps = rng().normal(size=(2, 3, 12, 18))
    scores = patch_scores(maps, 3)
    assert scores.dtype == jnp.float64
    mask = patch_mask(scores, count)
    for i in np.ndindex(2, 3):
        want = naive_patch_scores(maps[i], 3)
        np.testing.assert_allclose(scores[i], want, **exact)
        np.testing.assert_array_equal(mask[i], naive_patch_mask(want, count))


def test_equal_scores_go_first_come_first_and_in_the_right_number():
    mask = patch_mask(np.zeros((2, 3, 4)), 5)
    np.testing.assert_array_equal(mask[1].ravel(), np.arange(12) < 5)
    # All negative: the least negative patches go all the same.
    mask = patch_mask(-np.arange(1.0, 13).reshape(3, 4), 5)
    np.testing.assert_array_equal(mask.ravel(), np.arange(12) < 5)


def test_patches_of_the_reference_implementation():
    data = case("block/")
    mask = patch_mask(patch_scores(data["relevance"], 8), 20)
    kept = ablate(np.ones((64, 48, 1), np.float32), mask)[..., 0]
    np.testing.assert_array_equal(kept, data["mask"])


@pytest.mark.parametrize("method", ["lrp", "attention", "GradCam", "GuidedGradCam"])
def test_patches_of_the_reference_run(method):
    data = case(f"run/{method}/")
    scores = np.array(patch_scores(data["maps"], 8))
    gone = np.array(patch_mask(scores, 20))
    # One bool per patch of the reference's pixels; of equal scores its sort takes any.
    theirs = ~data["masks"].reshape(-1, 5, 8, 5, 8).any((2, 4))
    last = np.sort(scores.reshape(len(scores), -1))[:, -20][:, None, None]
    np.testing.assert_array_equal(gone | (scores == last), theirs | (scores == last))
    assert (gone.sum((1, 2)) == theirs.sum((1, 2))).all()
    equal = [(scores[i] == last[i]).sum() for i in range(len(scores))]
    # The second Grad-CAM map is 0 in 16 patches; all other maps leave no choice.
    assert equal == ([1, 16] if method == "GradCam" else [1] * len(scores))


def test_ablation_under_jit_and_vmap_is_that_of_each():
    maps = rng().normal(size=(5, 16, 16)).astype(np.float32)
    images = rng(1).normal(size=(5, 16, 16, 3)).astype(np.float32)

    def gone(one, image):
        return ablate(image, patch_mask(patch_scores(one, 4), 3))

    batch = ablate(images, patch_mask(patch_scores(maps, 4), 3))
    np.testing.assert_array_equal(jax.jit(jax.vmap(gone))(maps, images), batch)
    for i in range(5):
        np.testing.assert_array_equal(gone(maps[i], images[i]), batch[i])
    one = patch_mask(patch_scores(maps[0], 4), 3)
    np.testing.assert_array_equal(ablate(images, one)[0], batch[0])


# Prefixes.


def naive_prefix(ids, length, relevance, count, pad):
    words = sorted(range(1, length), key=lambda i: (-relevance[i], i))
    kept = [ids[i] for i in range(length) if i not in words[:count]]
    return kept + [pad] * (len(ids) - len(kept)), len(kept)


def test_prefixes_by_hand():
    # <start> a man with a, then padding. Signed: -9 is not a high relevance.
    ids = np.array([[18, 1, 2, 3, 1, 0, 0]])
    relevance = np.array([[99.0, 0.1, -9, 0.5, 0.3, np.nan, 99]])
    found = ablated_prefixes(ids, np.array([5]), relevance, count=2)
    np.testing.assert_array_equal(found.ids, [[18, 1, 2, 0, 0, 0, 0]])
    assert found.lengths.tolist() == [3]
    np.testing.assert_array_equal(ids, [[18, 1, 2, 3, 1, 0, 0]])
    everything = ablated_prefixes(ids, np.array([5]), relevance, count=9, pad=7)
    np.testing.assert_array_equal(everything.ids, [[18, 7, 7, 7, 7, 7, 7]])
    nothing = ablated_prefixes(ids, np.array([5]), relevance, count=0)
    np.testing.assert_array_equal(nothing.ids, ids)
    alone = ablated_prefixes(ids, np.array([1]), np.full((1, 7), np.nan), count=3)
    np.testing.assert_array_equal(alone.ids, [[18, 0, 0, 0, 0, 0, 0]])


def test_prefixes_are_those_of_the_naive_reference():
    random = rng()
    ids = random.integers(1, 20, (4, 30, 11))
    lengths = random.integers(1, 12, (4, 30))
    # Few values, so that many are equal.
    relevance = random.integers(-3, 4, (4, 30, 11)).astype(np.float32)
    found = ablated_prefixes(ids, lengths, relevance, count=3, pad=-1)
    one = jax.vmap(jax.vmap(lambda *x: ablated_prefixes(*x, count=3, pad=-1)))
    mapped = jax.jit(one)(ids, lengths, relevance)
    for i in np.ndindex(4, 30):
        want, length = naive_prefix(ids[i].tolist(), lengths[i], relevance[i], 3, -1)
        assert found.ids[i].tolist() == want
        assert found.lengths[i] == length
    np.testing.assert_array_equal(mapped.ids, found.ids)
    np.testing.assert_array_equal(mapped.lengths, found.lengths)


# Summary of ablations.


def naive_measures(drop, there):
    n, m = len(drop), int(there.sum())
    kept = drop[there]
    return {
        "disappeared": (n - m) / n,
        "share_there": (kept >= 0).sum() / m,
        "drop_there": kept.sum() / m,
        "share_all": (kept >= 0).sum() / n,
        "drop_all": kept.sum() / n,
    }


def test_summary_by_hand():
    drops = {"lrp": np.array([0.5, -0.25, np.nan, 0.0]), "random": np.array([0.0, -0.5, -0.5, 0.1])}
    there = {"lrp": np.array([True, True, False, True]), "random": np.ones(4, bool)}
    found = ablation_summary(drops, there=there, baseline="random")
    assert (found["cases"], found["images"], found["baseline"]) == (4, 4, "random")
    lrp, control = found["methods"]["lrp"], found["methods"]["random"]
    assert lrp["there"] == 3
    got = {name: lrp[name]["mean"] for name in MEASURES}
    want = dict(disappeared=1 / 4, share_there=2 / 3, drop_there=1 / 12)
    assert got == pytest.approx({**want, "share_all": 1 / 2, "drop_all": 1 / 16})
    assert lrp["difference"]["drop_all"]["mean"] == pytest.approx(1 / 16 + 0.9 / 4)
    assert "difference" not in control
    assert json.loads(json.dumps(found)) == found


def test_summary_is_that_of_the_other_bootstraps():
    random = rng()
    drops = {name: random.normal(size=60) for name in ("lrp", "random")}
    there = {name: random.random(60) < 0.7 for name in drops}
    image = random.integers(0, 15, 60) * 7
    alone = ablation_summary(drops, there=there, baseline="random")["methods"]
    together = ablation_summary(drops, there=there, image=image, baseline="random")
    assert together["images"] == len(set(image))
    filled = {name: np.where(there[name], drops[name], 0) for name in drops}
    for name in drops:
        rows = bootstrap_many(np.stack([~there[name], filled[name]]))
        for i, measure in enumerate(("disappeared", "drop_all")):
            assert tuple(alone[name][measure].values()) == pytest.approx(tuple(rows.at(i)))
        by = [[rows[image == p].sum() for p in np.unique(image)]
              for rows in (filled[name], there[name], np.ones(60))]  # fmt: skip
        one = together["methods"][name]
        part, still, whole = map(np.array, by)
        want = bootstrap_ratio(part, whole)
        assert tuple(one["drop_all"].values()) == pytest.approx(tuple(want))
        want = bootstrap_ratio(part, still)
        assert tuple(one["drop_there"].values()) == pytest.approx(tuple(want))
        got = {measure: one[measure]["mean"] for measure in MEASURES}
        assert got == pytest.approx(naive_measures(drops[name], there[name]))
    paired = bootstrap(filled["lrp"] - filled["random"])
    assert tuple(alone["lrp"]["difference"]["drop_all"].values()) == pytest.approx(tuple(paired))


def test_a_measure_of_no_word_is_none():
    found = ablation_summary({"lrp": np.zeros(3)}, there={"lrp": np.zeros(3, bool)})["methods"]
    assert found["lrp"]["drop_there"] is None
    assert found["lrp"]["share_there"] is None
    assert found["lrp"]["disappeared"]["mean"] == 1


def test_words_all_there_unless_told_otherwise():
    found = ablation_summary({"lrp": np.array([0.1, -0.1])})["methods"]["lrp"]
    assert found["drop_there"] == found["drop_all"]
    assert found["disappeared"] == {"mean": 0, "low": 0, "high": 0}


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["stop words", "objects", "patches"])
def test_summary_of_the_reference_implementation(kind):
    data = case("ablation/")
    for i, method in enumerate(data["methods"]):
        mine = (data["method"] == i) & (data["kind"] == kind)
        assert mine.sum() == data["counts"][i, kind]
        if not mine.any():
            continue  # the reference reports NaN of no cases; here they are an error
        drop = data["drop"][mine]
        found = ablation_summary(
            {method: drop}, there={method: np.isfinite(drop)}, image=data["picture"][mine]
        )["methods"][method]
        # The reference counts a word that disappeared among the cases, at a drop of 0.
        assert found["share_all"]["mean"] == pytest.approx(data["shares"][i, kind], rel=1e-12)
        assert found["drop_all"]["mean"] == pytest.approx(data["means"][i, kind], rel=1e-12)
        if kind == 2:
            assert found["disappeared"]["mean"] == pytest.approx(data["shares"][i, 3], rel=1e-12)


# Correctness.


def naive_correctness(relevance, boxes, thresholds, sign):
    """A map [height, width, channels] and its boxes, pixel by pixel."""
    height, width, channels = relevance.shape
    part = np.zeros((height, width))
    for r, c, k in np.ndindex(height, width, channels):
        part[r, c] += max(sign * float(relevance[r, c, k]), 0) / channels
    if part.max() > 0:
        part = part / part.max()
    values = []
    for threshold in thresholds:
        shares = [0.0]
        total = sum(v for v in part.ravel() if v > threshold)
        for left, top, right, bottom in boxes:
            inside = [
                part[r, c]
                for r, c in np.ndindex(height, width)
                if top <= r < bottom and left <= c < right and part[r, c] > threshold
            ]
            shares.append(sum(inside) / total if total else 0)
        values.append(max(shares))
    return values


def test_correctness_by_hand():
    relevance = np.array([[8.0, -5, 0], [4, 0, 2], [0, 2, -7]])[..., None]
    boxes = np.array([[0, 0, 1, 2], [1, 1, 3, 3], [2, 2, 2, 2]])
    masks = box_masks(boxes, 3, 3)
    np.testing.assert_array_equal(masks[0], [[1, 0, 0], [1, 0, 0], [0, 0, 0]])
    found = correctness(relevance, masks, thresholds=(0, 0.25, 0.5, 0.9))
    # 12 of 16; the two 2s, a quarter of the maximum, are not above it; 4 is half of it.
    np.testing.assert_allclose(found, [12 / 16, 1, 1, 1])
    found = correctness(relevance, masks[1:], thresholds=(0, 0.25))
    np.testing.assert_allclose(found, [4 / 16, 0])
    found = correctness(relevance, masks, thresholds=(0, 0.8), negative=True)
    np.testing.assert_allclose(found, [7 / 12, 1])


@pytest.mark.parametrize("negative", [False, True])
def test_correctness_is_that_of_the_naive_reference(x64, negative):
    random = rng()
    relevance = random.normal(size=(2, 3, 7, 9, 3))
    corners = random.integers(-2, 10, (2, 3, 4, 2, 2))
    # Left above right for some, and over the edge for others: boxes of any kind.
    boxes = np.concatenate([corners[..., 0, :], corners[..., 1, :]], -1)
    found = correctness(relevance, box_masks(boxes, 7, 9), negative=negative)
    assert found.dtype == jnp.float64
    sign = -1 if negative else 1
    for i in np.ndindex(2, 3):
        want = naive_correctness(relevance[i], boxes[i], THRESHOLDS, sign)
        np.testing.assert_allclose(found[i], want, **exact)


def test_correctness_under_jit_and_vmap_is_that_of_each():
    relevance = rng().normal(size=(4, 8, 8, 3)).astype(np.float32)
    masks = rng(1).random((4, 2, 8, 8)) < 0.4
    batch = correctness(relevance, masks)
    np.testing.assert_allclose(jax.jit(jax.vmap(correctness))(relevance, masks), batch, **close)
    for i in range(4):
        np.testing.assert_allclose(correctness(relevance[i], masks[i]), batch[i], **close)


def test_maps_and_boxes_of_nothing_have_no_share():
    masks = box_masks(np.array([[0, 0, 2, 2], [0, 0, 0, 0]]), 4, 4)
    empty, negative = np.zeros((4, 4, 1)), np.full((4, 4, 3), -1.0)
    np.testing.assert_array_equal(correctness(empty, masks), 0)
    np.testing.assert_array_equal(correctness(negative, masks), 0)
    np.testing.assert_allclose(correctness(negative, masks, negative=True), 4 / 16)
    np.testing.assert_array_equal(correctness(np.ones((4, 4, 1)), masks[1:]), 0)
    # Very small relevance is relevance: the maximum is divided out.
    np.testing.assert_allclose(correctness(np.full((4, 4, 1), 1e-30), masks), 4 / 16, **close)


def test_nan_is_seen_under_jit():
    relevance = np.ones((2, 4, 4, 1), np.float32)
    relevance[0, 1, 1] = np.nan
    masks = np.zeros((2, 1, 4, 4), bool)
    found = jax.jit(correctness)(relevance, masks)
    assert np.isnan(found[0]).all()
    assert not np.isnan(found[1]).any()
    found = jax.jit(map_statistics)(relevance[..., 0])
    assert len(found) == 104
    assert all(np.isnan(value[0]) and not np.isnan(value[1]) for value in found.values())


def test_boxes_in_the_pixels_of_the_map():
    boxes = np.array([[10.9, 20, 100, 50], [0, 0, 640, 480], [100, 100, 1, 1]])
    found = scale_boxes(boxes, size=(640, 480), to=(224, 224))
    want = [[3, 9, 38, 32], [0, 0, 224, 224], [35, 46, 35, 47]]
    np.testing.assert_array_equal(found, want)
    assert not np.array(box_masks(found[2], 224, 224)).any()


def test_correctness_of_the_reference_implementation():
    data = case("correct/")
    relevance = data["relevance_img"].transpose(0, 2, 3, 1)
    masks = box_masks(data["boxes_xyxy"], 32, 32)
    per_box = np.stack([correctness(relevance[0], mask[None]) for mask in masks])
    np.testing.assert_allclose(per_box, data["per_box_fresh_map"], **close)
    found = correctness(relevance, masks[None])[0]
    np.testing.assert_allclose(found, data["final_fresh"], **close)


def test_correctness_as_coded_in_place():
    data = case("correct/")
    masks = box_masks(data["boxes_xyxy"], 32, 32)
    part = np.maximum(data["relevance_img"][0], 0).mean(0)
    part /= part.max()
    # After the first box, the map has met every threshold in place.
    left = jnp.where(part <= THRESHOLDS[-1], 0, part)
    shared = np.stack(
        [correctness((left if i else part)[..., None], m[None]) for i, m in enumerate(masks)]
    )
    np.testing.assert_allclose(shared, data["per_box_shared_map_as_coded"], **close)
    np.testing.assert_allclose(shared.max(0), data["final_as_coded"], **close)


@pytest.mark.parametrize(
    ("method", "word", "category"),
    [
        ("attention", 1, "dog"),
        ("attention", 2, "sports ball"),
        ("GradCam", 1, "dog"),
    ],
)
def test_correctness_of_the_reference_run(method, word, category):
    ends = FIXTURE[f"run/box_{category}"]
    boxes = np.concatenate([ends[:, :2], ends[:, 2:] - ends[:, :2]], -1)
    width, height = FIXTURE["run/size"].tolist()
    masks = box_masks(scale_boxes(boxes, size=(width, height), to=(40, 40)), 40, 40)
    found = correctness(FIXTURE[f"run/{method}/maps"][word][..., None], masks)
    np.testing.assert_allclose(found, FIXTURE[f"run/{method}/correctness {category}"], **close)


# Statistics of mentions.


def naive_statistics(x, quantiles):
    x = x.ravel().astype(np.float64)
    positive = [v for v in x if v > 0]
    ordered = np.sort(x)
    found = {
        "mean": sum(x) / len(x),
        "mean_abs": sum(abs(v) for v in x) / len(x),
        "mean_positive": sum(positive) / len(positive) if positive else 0,
        "max": max(x),
    }
    for q in quantiles:
        place = q * (len(x) - 1)
        low = int(place)
        high = min(low + 1, len(x) - 1)
        found[f"quantile {q:g}"] = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return found


def test_statistics_are_those_of_the_naive_reference(x64):
    maps = rng().normal(size=(2, 3, 5, 7))
    maps[0, 0] = 0
    maps[0, 1] = -abs(maps[0, 1])
    assert list(map_statistics(maps, quantiles=())) == ["mean", "mean_abs", "mean_positive", "max"]
    found = map_statistics(maps)
    assert len(found) == 104
    assert found["mean_positive"][0, 1] == 0
    for i in np.ndindex(2, 3):
        want = naive_statistics(maps[i], QUANTILES)
        assert list(found) == list(want)
        np.testing.assert_allclose([found[k][i] for k in want], list(want.values()), **exact)


@pytest.mark.parametrize("method", ["lrp", "attention", "GradCam", "GuidedGradCam"])
def test_statistics_of_the_reference_run(method):
    data = case(f"run/{method}/")
    names = ["mean", "mean_abs", "mean_positive", "max"]
    maps, want = data["maps"], data["statistics"]
    if method == "attention":
        # The attention was kept after division by its maximum.
        names = ["mean", "max"]
        maps = maps * want[:, 1, None, None].astype(np.float32)
    found = map_statistics(maps)
    names += [f"quantile {q:g}" for q in QUANTILES]
    got = np.stack([found[name] for name in names], axis=1)
    # Relative to a map's largest value. A quantile's place among 1600 pixels, in float32, is
    # right to about 1e-4 of the way from one pixel to the next.
    scale = np.abs(maps).max((1, 2))[:, None]
    np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=5e-6)


def naive_auc(scores, true):
    pairs = [(a > b) + (a == b) / 2 for a in scores[true] for b in scores[~true]]
    return sum(pairs) / len(pairs)


def test_auc_by_hand():
    true = np.array([True, True, False, False])
    assert roc_auc(np.array([3.0, 1, 2, 1]), true) == (1 + 1 + 0 + 0.5) / 4
    assert roc_auc(np.array([2.0, 2, 2, 2]), true) == 0.5
    np.testing.assert_array_equal(roc_auc(np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]]), true), [1, 0])


def test_auc_is_that_of_the_naive_reference():
    random = rng()
    scores = random.integers(0, 9, (2, 3, 40)).astype(np.float64)
    true = random.random(40) < 0.6
    found = roc_auc(scores, true)
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(found[i], naive_auc(scores[i], true), **exact)


def clustered(seed=0):
    random = rng(seed)
    image = np.sort(random.integers(0, 12, 50)) * 3
    true = random.random(50) < 0.5
    scores = {
        "mean": np.round(random.normal(size=50) + true, 1),
        "max": np.round(random.normal(size=50), 1),
    }
    return scores, true, image


def naive_resampled_aucs(scores, true, image, resamples):
    """Images drawn one by one, and the mentions of each copied; as `bootstrap` draws them."""
    groups, random = np.unique(image), rng()
    found = []
    for _ in range(resamples):
        drawn = groups[random.integers(0, len(groups), len(groups))]
        rows = np.concatenate([np.flatnonzero(image == p) for p in drawn])
        kinds = true[rows]
        if kinds.any() and not kinds.all():
            found.append([naive_auc(one[rows], kinds) for one in scores])
    return np.array(found).T


def test_auc_intervals_draw_images():
    scores, true, image = clustered()
    found = auc_intervals(scores, true, image=image, resamples=60)
    want = naive_resampled_aucs(list(scores.values()), true, image, 60)
    for i, name in enumerate(scores):
        ends = np.percentile(want[i], [2.5, 97.5])
        np.testing.assert_allclose(found[name], [naive_auc(scores[name], true), *ends], **exact)


def test_resamples_of_one_kind_are_left_out():
    # Two images, one of each kind: half of the resamples have no area.
    true = np.array([True, True, False])
    found = auc_intervals(
        {"mean": np.array([2.0, 0, 1])}, true, image=np.array([5, 5, 9]), resamples=40
    )
    assert tuple(found["mean"]) == (0.5, 0.5, 0.5)


def test_auc_intervals_in_pieces_are_those_of_one(monkeypatch):
    scores, true, image = clustered()
    whole = auc_intervals(scores, true, image=image, resamples=50)
    monkeypatch.setattr("jaxrel.metrics.word_statistics._WEIGHTS_AT_ONCE", 350)
    assert auc_intervals(scores, true, image=image, resamples=50) == whole


def test_auc_differences_are_paired():
    scores, true, image = clustered()
    other, _, _ = clustered(1)
    found = auc_differences(scores, other, true, image=image, resamples=60)
    rows = [*scores.values(), *other.values()]
    want = naive_resampled_aucs(rows, true, image, 60)
    for i, name in enumerate(scores):
        mean = naive_auc(scores[name], true) - naive_auc(other[name], true)
        ends = np.percentile(want[i] - want[i + 2], [2.5, 97.5])
        np.testing.assert_allclose(found[name], [mean, *ends], **exact)
    same = auc_differences(scores, scores, true, image=image)
    assert all(tuple(one) == (0, 0, 0) for one in same.values())


def test_auc_of_the_reference_implementation_as_coded():
    data = case("roc/")
    key = list(zip(data["picture"], data["true"], data["word"], strict=True))
    for name, want, row in zip(
        data["statistics"], data["auc_as_coded"], data["scores"], strict=True
    ):
        scores, kinds = [], []
        for image, true, word in dict.fromkeys(key):
            # Quantiles are those of the file's last word; a file is an image's words of a kind.
            last = [w for p, t, w in key if (p, t) == (image, true)][-1]
            taken = last if "quantile" in name else word
            own = [v for v, k in zip(row, key, strict=True) if k == (image, true, taken)]
            scores.append(max(own) if true else min(own))
            kinds.append(true)
        # Another order of sums of twelve or so numbers.
        assert roc_auc(np.array(scores), np.array(kinds)) == pytest.approx(want, abs=1e-12)


def test_the_largest_against_the_smallest_separates_what_is_alike():
    """Why there is one statistic per mention: a score that knows nothing, three mentions each."""
    scores = rng().normal(size=(600, 3))
    true = np.arange(600) % 2 == 0
    # 1 less the probability that three all lie below three others, which is 1 of 20 choices.
    coded = np.where(true, scores.max(1), scores.min(1))
    # Standard errors of 300 against 300 words, and of 900 against 900 mentions: below 0.015.
    assert roc_auc(coded, true) == pytest.approx(0.95, abs=0.05)
    assert roc_auc(scores.ravel(), np.repeat(true, 3)) == pytest.approx(0.5, abs=0.05)


def naive_threshold(scores, true):
    best = None
    for threshold in sorted(set(scores), reverse=True):
        told = scores >= threshold
        rates = told[true].mean(), (~told[~true]).mean()
        # Beyond rounding: the first of equal ones.
        if best is None or sum(rates) > sum(best[1:]) + 1e-12:
            best = (threshold, *rates)
    return best


def test_threshold_by_hand():
    true = np.array([True, True, True, False, False])
    statistics = {"max": np.array([0.0, 1, 0, 1, 0]), "mean": np.array([5.0, 4, 1, 3, 0])}
    found = best_threshold(statistics, true)
    assert found == ("mean", 4, pytest.approx(2 / 3), 1)
    # As good at 2 as at 4: the higher one.
    found = best_threshold({"mean": np.array([4.0, 3, 2, 1])}, np.arange(4) % 2 == 0)
    assert found == ("mean", 4, 0.5, 1)


@pytest.mark.parametrize("seed", range(5))
def test_threshold_is_that_of_the_naive_reference(seed):
    scores, true, _ = clustered(seed)
    found = best_threshold(scores, true)
    assert found.statistic == max(scores, key=lambda name: naive_auc(scores[name], true))
    want = naive_threshold(scores[found.statistic], true)
    np.testing.assert_allclose(found[1:], want, **exact)


# Frequent words.


def corpus():
    data = case("frequent/")
    captions = [text.split() for text in data["captions"].tolist()]
    references = [[r.split() for r in text.split("|")] for text in data["references"].tolist()]
    return captions, references, data["words"].tolist()


def naive_frequent(captions, references, words):
    rows = []
    for word in words:
        said = [word in tokens for tokens in captions]
        expected = [any(word in r for r in image) for image in references]
        pairs = list(zip(said, expected, strict=True))
        tp, fp, fn = (pairs.count(kind) for kind in ((True, True), (True, False), (False, True)))
        precision = tp / (tp + fp) if tp + fp else 0
        recall = tp / (tp + fn) if tp + fn else 0
        both = precision + recall
        rows.append((tp, fp, fn, precision, recall, 2 * precision * recall / both if both else 0))
    return np.array(rows, np.float64).T


def test_frequent_words_by_hand():
    captions = [["a", "dog", "dog"], ["man"], ["man", "dog"]]
    references = [[["dog"], ["cat"]], [["cat"]], [["man"], ["dog"]]]
    found = frequent_words(captions, references, ["dog", "man", "cat", "zebra"])
    assert found.true_positives.tolist() == [2, 1, 0, 0]
    assert found.false_positives.tolist() == [0, 1, 0, 0]
    assert found.false_negatives.tolist() == [0, 0, 2, 0]
    assert found.precision.tolist() == [1, 0.5, 0, 0]
    assert found.recall.tolist() == [1, 1, 0, 0]
    assert found.f1.tolist() == [1, pytest.approx(2 / 3), 0, 0]
    assert found.mean_precision.mean == pytest.approx(1.5 / 4)


def test_frequent_words_of_the_reference_implementation():
    found = frequent_words(*corpus())
    got = [found.mean_precision.mean, found.mean_recall.mean, found.mean_f1.mean]
    np.testing.assert_allclose(got, FIXTURE["frequent/means"], **exact)
    want = naive_frequent(*corpus())
    np.testing.assert_allclose(np.array(found[1:7], np.float64), want, **exact)


def test_frequent_words_intervals_draw_images():
    captions, references, words = corpus()
    found = frequent_words(captions, references, words, resamples=50)
    random, drawn = rng(), []
    for _ in range(50):
        rows = random.integers(0, len(captions), len(captions))
        chosen = [[one[i] for i in rows] for one in (captions, references)]
        drawn.append(naive_frequent(*chosen, words)[3:].mean(1))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    np.testing.assert_allclose([one.low for one in found[-3:]], low, **exact)
    np.testing.assert_allclose([one.high for one in found[-3:]], high, **exact)


# Errors.

MAP = np.ones((4, 4))
BAD = np.where(np.arange(16).reshape(4, 4) == 6, np.nan, 1.0)
BOX = np.ones((1, 4, 4), bool)
TRUE = np.array([True, False])
ONE, TWO = np.zeros(1), np.zeros(2)
IDS, LENGTHS = np.array([[9, 1, 2]]), np.array([3])
RELEVANCE = np.zeros((1, 3))
WORDS = [["a"]], [[["a"]]]

ERRORS = {
    "match: text": (lambda: match("a", "cat"), "the names are the text 'cat'"),
    "patches: divide": (lambda: patch_scores(MAP, 3), "patches of 3 x 3 do not divide maps of 4 x"),
    "patches: none": (lambda: patch_scores(MAP, 0), "patches of 0 x 0 do not divide"),
    "patches: NaN": (
        lambda: patch_scores(BAD, 2),
        r"patch_scores: 1 of 16 values are not finite, first at \[1, 2\] of \[4, 4\]",
    ),
    "mask: too many": (lambda: patch_mask(MAP, 17), "expected a count of 0 to 16, got 17"),
    "mask: negative": (lambda: patch_mask(MAP, -1), "expected a count of 0 to 16, got -1"),
    "mask: NaN": (lambda: patch_mask(BAD, 2), "patch_mask: 1 of 16 values are not finite"),
    "ablate: shape": (
        lambda: ablate(np.ones((2, 4, 4, 3)), np.ones((3, 2, 2), bool)),
        r"a mask of \[3, 2, 2\] does not fit .* expected \[2, rows, columns\]",
    ),
    "ablate: divide": (lambda: ablate(np.ones((4, 4, 3)), np.ones((3, 2), bool)), "does not fit"),
    "ablate: dtype": (lambda: ablate(np.ones((4, 4, 3)), np.ones((2, 2))), "must be bool, True wh"),
    "prefixes: shapes": (
        lambda: ablated_prefixes(IDS, LENGTHS, np.zeros((1, 4))),
        r"ids of \[1, 3\], lengths of \[1\] and relevance of \[1, 4\]",
    ),
    "prefixes: count": (
        lambda: ablated_prefixes(IDS, LENGTHS, RELEVANCE, count=-1),
        "ablated_prefixes: expected a count of 0 or more, got -1",
    ),
    "prefixes: lengths": (
        lambda: ablated_prefixes(IDS, np.array([4]), RELEVANCE),
        "lengths count the start token and lie from 1 to 3, got 4 to 4",
    ),
    "prefixes: NaN": (
        lambda: ablated_prefixes(IDS, LENGTHS, np.array([[0, np.nan, 0]])),
        r"ablated_prefixes: relevance: 1 of 3 values are not finite, first at \[0, 1\]",
    ),
    "summary: methods": (lambda: ablation_summary({}), "expected drops per method, got no methods"),
    "summary: cases": (
        lambda: ablation_summary({"lrp": np.zeros(0)}),
        r"at least one case, the same for all methods, got {'lrp': \[0\]}",
    ),
    "summary: shapes": (
        lambda: ablation_summary({"lrp": ONE, "random": TWO}),
        r"got {'lrp': \[1\], 'random': \[2\]}",
    ),
    "summary: NaN": (
        lambda: ablation_summary({"lrp": np.array([np.nan])}),
        "drops of 'lrp': 1 of 1 values are not finite",
    ),
    "summary: there": (
        lambda: ablation_summary({"lrp": ONE}, there={"cam": TRUE[:1]}),
        "drops of lrp, but `there` of cam",
    ),
    "summary: there's dtype": (
        lambda: ablation_summary({"lrp": ONE}, there={"lrp": ONE}),
        r"`there` of 'lrp' must be bool of \[1\], got float64 of \[1\]",
    ),
    "summary: images": (
        lambda: ablation_summary({"lrp": ONE}, image=np.array([1, 2])),
        r"images of \[2\] for 1 cases",
    ),
    "summary: baseline": (
        lambda: ablation_summary({"lrp": ONE}, baseline="random"),
        "baseline 'random' is not among the methods lrp",
    ),
    "correctness: shapes": (
        lambda: correctness(MAP[..., None], np.ones((1, 4, 5), bool)),
        r"masks of \[1, 4, 5\] for relevance of \[4, 4, 1\]; expected \['masks', 4, 4\]",
    ),
    "correctness: no masks": (
        lambda: correctness(MAP[..., None], BOX[:0]),
        "with at least one mask per word",
    ),
    "correctness: dtype": (
        lambda: correctness(MAP[..., None], BOX.astype(int)),
        "masks must be bool, True inside, got int64",
    ),
    "correctness: threshold": (
        lambda: correctness(MAP[..., None], BOX, thresholds=(0, 1)),
        r"thresholds must lie in \[0, 1\), got \(0, 1\)",
    ),
    "correctness: NaN": (
        lambda: correctness(BAD[..., None], BOX),
        "correctness: 1 of 16 values are not finite",
    ),
    "boxes: size": (
        lambda: scale_boxes(np.ones(4), size=(0, 3), to=(4, 4)),
        r"expected positive \(width, height\), got \(0, 3\) and \(4, 4\)",
    ),
    "statistics: NaN": (lambda: map_statistics(BAD), "map_statistics: 1 of 16 values are not fini"),
    "statistics: empty": (lambda: map_statistics(MAP[:0]), r"with pixels, got \[0, 4\]"),
    "statistics: quantile": (
        lambda: map_statistics(MAP, quantiles=(0.5, 1.5)),
        r"quantiles lie from 0 to 1, got \(0.5, 1.5\)",
    ),
    "auc: one kind": (
        lambda: roc_auc(TWO, np.array([True, True])),
        "needs true and hallucinated mentions, got 2 true ones of 2",
    ),
    "auc: none": (lambda: roc_auc(TWO[:0], TRUE[:0]), "got 0 true ones of 0"),
    "auc: dtype": (lambda: roc_auc(TWO, np.array([1, 0])), "`true` must be bool, False for hall"),
    "auc: shapes": (lambda: roc_auc(ONE, TRUE), r"scores of \[1\] and `true` of \[2\]"),
    "auc: NaN": (lambda: roc_auc(np.array([0, np.nan]), TRUE), "roc_auc: scores: 1 of 2 values"),
    "intervals: none": (lambda: auc_intervals({}, TRUE), "expected scores by statistic, got none"),
    "intervals: name": (
        lambda: auc_intervals({"mean": TWO, "max": ONE}, TRUE),
        "auc_intervals: 'max': scores of",
    ),
    "intervals: rows": (
        lambda: auc_intervals({"mean": np.zeros((3, 2))}, TRUE),
        r"expected one score per mention, got shapes {'mean': \[3, 2\]}",
    ),
    "intervals: images": (
        lambda: auc_intervals({"mean": TWO}, TRUE, image=np.array([1])),
        r"images of \[1\] for 2 mentions",
    ),
    "intervals: resamples": (
        # Seed 0 draws one of the two images twice.
        lambda: auc_intervals({"mean": TWO}, TRUE, resamples=1, seed=0),
        "none of 1 resamples of 2 images has both true and hallucinated mentions",
    ),
    "differences: names": (
        lambda: auc_differences({"mean": TWO}, {"max": TWO}, TRUE),
        "statistics mean of the first and max of the second",
    ),
    "threshold: one kind": (
        lambda: best_threshold({"mean": TWO}, ~np.ones(2, bool)),
        "best_threshold: 'mean': an area needs true and hallucinated mentions, got 0 true ones",
    ),
    "frequent: text": (lambda: frequent_words(*WORDS, "cat"), "a list of different words, got 'c"),
    "frequent: twice": (lambda: frequent_words(*WORDS, ["a", "a"]), "of different words, got"),
    "frequent: none": (lambda: frequent_words(*WORDS, []), r"of different words, got \[\]"),
    "frequent: numbers": (
        lambda: frequent_words([], [[["a"]]], ["a"]),
        "frequent_words: 0 candidates and references of 1 images",
    ),
}


@pytest.mark.parametrize(("call", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
