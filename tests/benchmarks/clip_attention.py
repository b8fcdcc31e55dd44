"""CLIP ViT-B/32: what attention relevance costs over `jax.grad`, and against eager torch."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxrel import attention
from jaxrel.attention.methods import METHODS, TABLE
from jaxrel.models.clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from jaxrel.train.evaluate.flops import gradient
from tests.benchmarks.table import Table, targets
from tests.benchmarks.timing import MIB, Candidate, Measured, compiled, measure

STREAMS = ("vision", "text")
TINY = CLIPConfig(
    vision=VisionConfig(width=32, layers=3, heads=4, mlp_width=64, image_size=16, patch_size=4),
    text=TextConfig(
        width=24, layers=3, heads=3, mlp_width=48, vocab_size=64, context=9, eos_token_id=63
    ),
    projection=16,
)
PER_LAYER, ONCE = "torch, grad per layer", "torch, grad once"
# What shares a pass: all methods that read maps and gradients have one forward and backward pass,
# and those that read LRP's relevance of the maps have another by its rules.
ONE_PASS = tuple(name for name in METHODS if not TABLE[name].by_lrp)
BY_LRP = tuple(name for name in METHODS if TABLE[name].by_lrp)
SHARED = f"{', '.join(ONE_PASS)} (one gradient pass)"
ALL = f"the same and {', '.join(BY_LRP)} (a gradient pass and one of LRP)"

NO_TORCH = " Torch is not compared: it is not installed, or JAX is not on a CPU."
NOTE = """\
The score of each of {batch} pairs of an image ({vision} tokens) and a text ({text} tokens) is
explained in both towers. `jax.grad` is of the same model's summed score by the position
embeddings of both towers: the backward pass goes through all layers and computes no other
parameter's gradient. Rows with remat are compared with `jax.grad` with remat; ratios are medians of
the rounds' ratios, not ratios of the medians. Memory is XLA's temporary memory; for torch, the most
bytes of tensors held at a time.{torch}

Targets: with remat, streaming takes at most 1.1 times the time and the memory of `jax.grad`; it
is at least 3 times faster than torch with one `autograd.grad` per layer."""


def run(*, batch: int, quick: bool, repeats: int) -> Table:
    """All methods on one batch.

    Args:
      batch: pairs of an image and a text.
      quick: tiny sizes, only to see that it works.
      repeats: rounds of measurements.
    """
    config = TINY if quick else CLIPConfig()
    inputs = random_inputs(config, batch)
    model = CLIP(dataclasses.replace(config, remat=True), rngs=nnx.Rngs(0))
    plain = nnx.clone(model)
    plain.config = config
    streamed = {method: explain(method, "streaming") for method in ("equal", "weighted")}
    candidates = [
        compiled("jax.grad, remat", gradient, model, inputs),
        compiled("streaming equal, remat", streamed["equal"], model, inputs),
        compiled("streaming weighted, remat", streamed["weighted"], model, inputs),
        compiled("stacked equal, remat", explain("equal", "stacked"), model, inputs),
        compiled("stacked weighted, remat", explain("weighted", "stacked"), model, inputs),
        compiled(f"{SHARED}, remat", explain(ONE_PASS, "stacked"), model, inputs),
        compiled(f"{ALL}, remat", explain(METHODS, "stacked"), model, inputs),
        compiled("jax.grad", gradient, plain, inputs),
        compiled("streaming equal", streamed["equal"], plain, inputs),
        compiled("streaming weighted", streamed["weighted"], plain, inputs),
        compiled(SHARED, explain(ONE_PASS, "stacked"), plain, inputs),
        compiled(ALL, explain(METHODS, "stacked"), plain, inputs),
    ]
    has_torch = importlib.util.find_spec("torch") is not None and jax.default_backend() == "cpu"
    if has_torch:
        candidates += torch_candidates(plain, inputs, streamed["equal"])
    what = f"CLIP {'tiny' if quick else 'ViT-B/32'}, batch {batch}"
    measured = measure(candidates, repeats=repeats, what=what)
    note = NOTE.format(
        batch=batch,
        vision=config.vision.tokens,
        text=config.text.context,
        torch="" if has_torch else NO_TORCH,
    )
    return Table(what, note, [row(name, measured) for name in measured])


def random_inputs(config: CLIPConfig, batch: int) -> dict[str, np.ndarray]:
    """Noise, and texts of random words and lengths."""
    rng = np.random.default_rng(0)
    size, text = config.vision.image_size, config.text
    ids = rng.integers(1, text.eos_token_id, (batch, text.context), dtype=np.int32)
    ends = rng.integers(text.context // 2, text.context, batch)
    ids[np.arange(batch), ends] = text.eos_token_id
    return {
        "image": rng.normal(size=(batch, size, size, 3)).astype(np.float32),
        "text": ids,
    }


def explain(method: Any, form: Any) -> Callable:
    """Attention relevance of both towers, as a user asks for it."""

    def explained(model: CLIP, inputs: Mapping) -> Any:
        relevance = attention.relevance(
            lambda model, inputs: model.score(inputs),
            method=method,
            target_token=model.target_tokens(inputs),
            attention=STREAMS,
            form=form,
        )
        return relevance(model, inputs)

    return explained


def torch_candidates(model: CLIP, inputs: Mapping, streamed: Callable) -> list[Candidate]:
    """Both ways to get the gradients in torch; they must agree with the streamed relevance."""
    from tests.benchmarks import torch_clip

    twin = torch_clip.TorchCLIP(model)
    ends = np.array(model.target_tokens(inputs)["text"])
    expected = jax.jit(streamed)(model, inputs)
    candidates = []
    for name, how in ((PER_LAYER, torch_clip.grad_per_layer), (ONCE, torch_clip.grad_once)):

        def compute(how=how):
            return torch_clip.relevance(twin, inputs, ends, how)

        for stream, found in compute().items():
            # Two float32 programs with sums in another order, through 12 layers and back.
            np.testing.assert_allclose(found, expected[stream], rtol=1e-3, atol=1e-6)
        candidates.append(Candidate(name, compute, torch_clip.peak(compute)))
    return candidates


def row(name: str, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """One line of the table."""
    this = measured[name]
    rematted, plain = measured["jax.grad, remat"], measured["jax.grad"]
    base = rematted if name.endswith("remat") else plain
    cells = {
        "method": name,
        "ms": this.milliseconds,
        "x jax.grad": this.slower(base),
        "temp MiB": this.temp / MIB,
        "x jax.grad temp": this.larger(base),
    }
    met = {}
    if name.startswith("streaming") and base is rematted:
        met = {"time": this.slower(base) <= 1.1, "memory": this.larger(base) <= 1.1}
    if PER_LAYER in measured:
        cells["torch per layer / this"] = measured[PER_LAYER].slower(this)
        cells["torch once / this"] = measured[ONCE].slower(this)
        if name.startswith("streaming"):
            met["torch"] = measured[PER_LAYER].slower(this) >= 3
    return cells | {"targets": targets(**met)}
