"""Explaining captions word by word: what each word costs over one forward pass."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from jaxrel.explanations.words import word_relevance
from jaxrel.models import Captioner, CaptionerConfig, Processor, VGGConfig, word_tokenizer
from tests.benchmarks.table import Table, targets
from tests.benchmarks.timing import MIB, Candidate, compiled, measure
from tests.zoo.plain_captioner import plain_word_relevance

# What is aimed at for ten words on two CPU cores.
SECONDS = 3.5
PER_WORD = 1.3

LOOP = "plain Python loop, word by word"
# On a CPU, XLA hands the forward pass of the encoder to a library as one call, and does not count
# the layers' values, which that call allocates: it says 1 MiB in the place of 25. The other
# programs keep these values, and are counted. A loop is no program.
UNCOUNTED = ("forward", LOOP)

NOTE = """\
Captioner "{kind}": VGG16 on {side} x {side} pixels, {hidden} features, {vocabulary} words, {count}
words explained by LRP in pixels and in the words before. "backward pass" is the time over that of
the forward pass of one word's `jax.grad`. "per word" is what each word adds to the first. The plain
loop runs the rules' operations one at a time, back over the steps and layers for each word; it
computes the values of the forward pass once. "difference" is the most by which its relevance of the
last word is another, over the largest relevance.

Targets: {count} words in {seconds} s, and a word more for {per_word} backward passes."""


def run(kind: str, *, quick: bool, repeats: int) -> Table:
    """Time the forward pass, a gradient, one word and all words, in different ways."""
    count = 3 if quick else 10
    model, inputs = model_and_inputs(kind, quick)
    positions = jnp.arange(1, count + 1)[None]

    def scores(model: Any, image: Any) -> Any:
        return model.word_scores({**inputs, "image": image})

    def gradient(model: Any, image: Any) -> Any:
        return jax.grad(lambda image: scores(model, image)[0, count])(image)

    def words(model: Any, image: Any, positions: Any, at_once: int | None = None) -> Any:
        return word_relevance(model, {**inputs, "image": image}, positions, at_once=at_once)

    image = inputs["image"]
    one = compiled("1 word", words, model, image, positions[:, -1:])
    together = compiled(f"{count} words, together", words, model, image, positions)

    def loop(asked: Sequence[int] = range(1, count + 1)) -> Any:
        found = plain_word_relevance(model, image[0], inputs["text"][0], asked)
        return jax.block_until_ready(found)

    candidates = [
        compiled("forward", scores, model, image),
        compiled("jax.grad of 1 word", gradient, model, image),
        one,
        together,
        compiled(
            f"{count} words, one after another", partial(words, at_once=1), model, image, positions
        ),
        Candidate(
            f"{count} programs of 1 word", lambda: [one.run() for _ in range(count)], one.temp
        ),
        Candidate(LOOP, loop, 0),
    ]
    found = measure(candidates, repeats=repeats, what=f"captioner {kind}")
    difference = _difference(together.run()[1]["lrp"], loop([count]))
    forward, grad, first = (found[c.name].milliseconds for c in candidates[:3])
    backward = grad - forward
    rows = []
    for candidate in candidates:
        measured = found[candidate.name]
        row: dict[str, Any] = {
            "": candidate.name,
            "seconds": measured.milliseconds / 1e3,
            "over forward": measured.slower(found["forward"]),
            "temp MiB": None if candidate.name in UNCOUNTED else measured.temp / MIB,
        }
        if candidate.name.startswith(f"{count} "):
            row["loop / this"] = found[LOOP].slower(measured)
        if candidate.name == LOOP:
            row["difference"] = f"{difference:.0e}"
        if candidate.name.startswith(f"{count} words"):
            each = (measured.milliseconds - first) / (count - 1) / backward
            row |= {
                "per word, in backward passes": each,
                "target": targets(
                    time=measured.milliseconds <= 1e3 * SECONDS, **{"per word": each <= PER_WORD}
                ),
            }
        rows.append(row)
    config = model.config
    note = NOTE.format(
        kind=kind,
        side=config.image_size,
        hidden=config.hidden,
        vocabulary=config.vocab_size,
        count=count,
        seconds=SECONDS,
        per_word=PER_WORD,
    )
    return Table(f"Captions explained word by word: {kind}", note, rows)


def _difference(found: Any, loop: Any) -> float:
    """Of the last word: `found` is by caption, and `loop` of one caption and this word alone."""
    pairs = zip(found, loop, strict=True)
    return max(float(abs(x[0, -1] - y[0]).max() / abs(y[0]).max()) for x, y in pairs)


def model_and_inputs(kind: str, quick: bool) -> tuple[Captioner, dict[str, Any]]:
    """A captioner of the paper's size with random weights, and one image with a caption."""
    width, side, vocabulary = (16, 32, 40) if quick else (512, 224, 9586)
    tokenizer = word_tokenizer([f"word{i}" for i in range(vocabulary - 4)], 12)
    config = CaptionerConfig(
        kind=kind,
        encoder=VGGConfig(((4,), (8,))) if quick else VGGConfig(),
        image_size=side,
        vocab_size=vocabulary,
        embed=width,
        hidden=width,
        context=12,
    )
    model = Captioner(config, rngs=nnx.Rngs(0), processor=Processor(tokenizer))
    rng = np.random.default_rng(0)
    text = rng.integers(4, vocabulary, (1, 12))
    text[0, 0], text[0, -1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    image = rng.normal(size=(1, side, side, 3)).astype(np.float32)
    return model, {"image": jnp.asarray(image), "text": jnp.asarray(text, jnp.int32)}
