"""BLEU, ROUGE-L, CIDEr-D and CHAIR: pycocoevalcap's numbers, the papers' examples, errors.

The fixture holds sentences of the Shapes grammar (candidates with words changed, dropped or
repeated, or of another scene) and odd cases, with the numbers of pycocoevalcap 1.2. Where the
package is installed, they are computed again.
"""

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxrel.metrics import CiderD, bleu, chair, cider_d, rouge_l, tokenise
from tests.paths import FIXTURES

FIXTURE = json.loads((FIXTURES / "caption_metrics.json").read_text())
CORPORA = FIXTURE["corpora"]
METRICS = {"bleu": bleu, "rouge_l": rouge_l, "cider_d": cider_d}
# Float64 sums in another order; the specification asks for 1e-6.
close = dict(rtol=1e-9, atol=1e-12)


def tokens(corpus):
    return [c.split() for c in corpus["candidates"]], [
        [r.split() for r in image] for image in corpus["references"]
    ]


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("corpus", CORPORA)
def test_numbers_are_those_of_pycocoevalcap(corpus, name):
    scores = METRICS[name](*tokens(CORPORA[corpus]))
    want = CORPORA[corpus]["scores"][name]
    assert scores.examples.dtype == np.float64
    np.testing.assert_allclose(scores.corpus, want["corpus"], **close)
    np.testing.assert_allclose(scores.examples, want["examples"], **close)


@pytest.mark.parametrize("corpus", CORPORA)
def test_fixture_is_what_the_installed_pycocoevalcap_gives(corpus):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references = dict(enumerate(CORPORA[corpus]["references"]))
    candidates = {i: [text] for i, text in enumerate(CORPORA[corpus]["candidates"])}
    want = CORPORA[corpus]["scores"]
    for name, scorer in (("bleu", Bleu(4)), ("rouge_l", Rouge()), ("cider_d", Cider())):
        options = {"verbose": 0} if name == "bleu" else {}
        total, examples = scorer.compute_score(references, candidates, **options)
        examples = np.array(examples).T if name == "bleu" else examples
        np.testing.assert_allclose(total, want[name]["corpus"], **close)
        np.testing.assert_allclose(examples, want[name]["examples"], **close)


def test_cider_d_of_a_few_takes_its_frequencies_from_the_corpus():
    candidates, references = tokens(CORPORA["shapes"])
    want = CORPORA["shapes"]["scores"]["cider_d"]["examples"][3:8]
    cider = CiderD.from_references(references)
    weighed = [[cider.weigh(r) for r in image] for image in references[3:8]]
    np.testing.assert_allclose(cider.score(candidates[3:8], references[3:8]), want, **close)
    np.testing.assert_allclose(cider.score(candidates[3:8], weighed), want, **close)
    assert np.abs(cider_d(candidates[3:8], references[3:8]).examples - want).max() > 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        cider.images = 1
    assert repr(cider) == f"CiderD(images={len(references)})"


def test_bleu_example_of_the_paper():
    """Papineni et al. 2002, section 2.1: the modified unigram precision is 2/7."""
    references = [["the cat is on the mat".split(), "there is a cat on the mat".split()]]
    scores = bleu([["the"] * 7], references)
    assert scores.corpus[0] == pytest.approx(2 / 7)
    # Three words against the six of the closest reference: exp(1 - 6 / 3).
    np.testing.assert_allclose(bleu(["the cat is".split()], references).corpus[:3], math.exp(-1))


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["long", "short"])
def test_bleu_takes_the_shorter_of_equally_close_references(order):
    """Four words against five or three: no brevity penalty."""
    references = ["a red big ring above".split(), "a red ring".split()][order]
    assert bleu(["a red big ring".split()], [references]).corpus[0] == pytest.approx(1)


def test_rouge_l_example_of_the_paper():
    """Lin 2004, section 3.1: subsequences of 3 and of 2 of 4 words."""
    reference = [["police killed the gunman".split()]]
    candidates = [["police kill the gunman".split()], ["the gunman kill police".split()]]
    found = [rouge_l(candidate, reference).corpus for candidate in candidates]
    assert found == pytest.approx([0.75, 0.5])


def test_cider_d_by_hand():
    """Two images: an n-gram of one weighs log 2, one of both weighs nothing."""
    references = [["a red big ring".split()], ["a blue star".split()]]
    scores = cider_d(["a red big ring".split(), "a blue ring".split()], references)
    # The second, in units of log 2: of the words "blue" is shared, "a" weighs nothing; of the
    # two bigrams "a blue" is shared; no trigram is. All four vectors have the norm sqrt(2).
    np.testing.assert_allclose(scores.examples, [10, 10 * (1 / 2 + 1 / 2) / 4])
    # One word six times: its weight of 6 is clipped to the reference's 1, and the five bigrams
    # against two cost exp(-9 / 72).
    repeated = CiderD.from_references(references).score([["blue"] * 6], references[1:])
    np.testing.assert_allclose(repeated, 10 / (6 * math.sqrt(2)) / 4 * math.exp(-9 / 72))


def test_tokenise():
    assert tokenise("A red circle, and the man's T-shirt: 2 'stars'.") == (
        "a red circle and the man's t-shirt 2 stars".split()
    )
    assert tokenise("don\u2019t!") == ["don't"]
    assert tokenise(" ... ") == []


def test_chair_counts_mentions_and_captions():
    found = chair(
        [["dog", "dog", "cat"], {"cat"}, [], ["ball", "dog", "dog", "dog"]],
        [{"dog"}, {"cat", "dog"}, {"dog"}, {"ball"}],
    )
    assert found.instances == 4 / 8
    assert found.captions == 2 / 4
    assert found.mentions.tolist() == [3, 1, 0, 4]
    assert found.hallucinated.tolist() == [1, 0, 0, 3]
    silent = chair([[]], [{"dog"}])
    assert math.isnan(silent.instances)
    assert silent.captions == 0


RED = ["a", "red", "ring"]


@pytest.mark.parametrize("metric", [*METRICS.values(), CiderD({}, 2).score])
@pytest.mark.parametrize(
    ("candidates", "references", "error"),
    [
        ([RED, RED], [[RED]], r"2 candidates and references of 1 images; give one list"),
        ([], [], r"expected references of at least one image, got none"),
        ([RED], [[]], r"references of image 0 are \[\]; expected a list of at least one"),
        ([RED], ["a red ring"], r"references of image 0 are 'a red ring'; expected"),
        ([RED, "a ring"], [[RED]] * 2, r"candidate 1 is the text 'a ring'; .*tokenise\(text\)"),
        ([RED], [[RED, "a ring"]], r"a reference of image 0 is the text 'a ring'; expected"),
    ],
)
def test_bad_captions_are_refused(metric, candidates, references, error):
    with pytest.raises(ValueError, match=error):
        metric(candidates, references)


def test_bad_objects_are_refused():
    with pytest.raises(ValueError, match=r"chair: 2 captions and 1 images; expected one"):
        chair([["dog"], []], [["dog"]])
    with pytest.raises(ValueError, match=r"chair: 0 captions and 0 images"):
        chair([], [])
    with pytest.raises(ValueError, match=r"objects of image 1 are the text 'dog'; expected a"):
        chair([["dog"], []], [["dog"], "dog"])
