"""Explaining captions word by word: what each word costs over one forward pass."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from jaxrel.models import Captioner, CaptionerConfig, Processor, VGGConfig, word_tokenizer
from jaxrel.word_relevance import word_relevance
from tests.benchmarks.table import Table, targets
from tests.benchmarks.timing import MIB, Candidate, compiled, measure

# What is aimed at for ten words on two CPU cores.
SECONDS = 3.5
PER_WORD = 1.3

NOTE = """\
A {kind} captioner: VGG16 on {side} x {side} pixels, {hidden} features, {vocabulary} words, {count}
words explained by LRP in pixels and in the words before. "backward pass" is the time over that of
the forward pass of one word's `jax.grad`. "per word" is what each word adds to the first.

Targets: {count} words in {seconds} s, and a word more for {per_word} backward passes."""


def run(kind: str, *, quick: bool, repeats: int) -> Table:
    """Time the forward pass, a gradient, one word and all words, in different ways."""
    count = 3 if quick else 10
    model, inputs = _model(kind, quick)
    positions = jnp.arange(1, count + 1)[None]

    def scores(model: Any, image: Any) -> Any:
        return model.word_scores({**inputs, "image": image})

    def gradient(model: Any, image: Any) -> Any:
        return jax.grad(lambda image: scores(model, image)[0, count])(image)

    def words(model: Any, image: Any, positions: Any, at_once: int | None = None) -> Any:
        return word_relevance(model, {**inputs, "image": image}, positions, at_once=at_once)

    image = inputs["image"]
    one = compiled("1 word", words, model, image, positions[:, -1:])
    candidates = [
        compiled("forward", scores, model, image),
        compiled("jax.grad of 1 word", gradient, model, image),
        one,
        compiled(f"{count} words, together", words, model, image, positions),
        compiled(
            f"{count} words, one after another", partial(words, at_once=1), model, image, positions
        ),
        Candidate(
            f"{count} programs of 1 word", lambda: [one.run() for _ in range(count)], one.temp
        ),
    ]
    found = measure(candidates, repeats=repeats, what=f"captioner {kind}")
    forward, grad, first = (found[c.name].milliseconds for c in candidates[:3])
    backward = grad - forward
    rows = []
    for candidate in candidates:
        measured = found[candidate.name]
        row: dict[str, Any] = {
            "": candidate.name,
            "seconds": measured.milliseconds / 1e3,
            "over forward": measured.slower(found["forward"]),
            "temp MiB": measured.temp / MIB,
        }
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


def _model(kind: str, quick: bool) -> tuple[Captioner, dict[str, Any]]:
    """A captioner of the paper's size with random weights, and one picture with a caption."""
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
