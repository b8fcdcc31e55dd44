"""LRP: what composites cost over `jax.grad`, and against zennit and LXT in eager torch."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel import Composite, composites, lrp, op, path, rules
from tests.benchmarks import lrp_models
from tests.benchmarks.lrp_models import HIGH, LOW, Network
from tests.benchmarks.table import Table, targets
from tests.benchmarks.timing import MIB, Candidate, Measured, measure

CONVOLUTIONAL = {
    "epsilon": Composite([(op("conv", "dense", "add", "mean"), rules.Epsilon())]),
    "epsilon_plus": composites.epsilon_plus(),
    "epsilon_plus_flat": composites.epsilon_plus_flat(),
    "epsilon_gamma_box": composites.epsilon_gamma_box(LOW, HIGH),
    "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
}
TRANSFORMER = {
    "attn_lrp": composites.attn_lrp(),
    "cp_lrp": composites.cp_lrp(),
    "cp_lrp, gamma": Composite([(path("*/mlp"), rules.Gamma(0.25))]) + composites.cp_lrp(),
}
PEERS = {
    "VGG16": ("zennit", CONVOLUTIONAL),
    "ResNet-50": ("zennit", CONVOLUTIONAL),
    "ViT-B/16": ("LXT", TRANSFORMER),
    "12-layer decoder": ("LXT", TRANSFORMER),
}

# Most times the time of jax.grad; cp_lrp has no target of its own.
MOST = {
    "epsilon": 1.1,
    "attn_lrp": 1.1,
    "epsilon_plus": 1.5,
    "epsilon_plus_flat": 1.5,
    "epsilon_gamma_box": 1.5,
    "cp_lrp, gamma": 1.5,
    "epsilon_alpha2_beta1": 2.1,
}
# Least times this one's time that a peer takes. LXT is to be level, which is within 5 %.
FASTER = {"zennit": 1.5, "LXT": 0.95}
COMPILED_WITHIN = 2.0
UNCOUNTED = "(again)"

NOTE = """\
{batch} inputs of {shape} in float32, explained for one class each. `jax.grad` is of the same
function's logits by the same input, with remat for the rows with remat. Memory is XLA's temporary
memory; for torch, the most bytes of tensors held at a time. Trace and compile are what the first
call costs, once.

Targets over `jax.grad`: 1.1 times the time for epsilon and attn_lrp, 1.5 for z+ and gamma, 2.1 for
alpha-beta; trace and compile under 2 s together where the layers are a scan.

{peer}"""
WITH_PEER = """\
{peer} (eager torch, {threads} threads) computes the same relevance with the same weights;
"difference" is the greatest one, over the greatest relevance. {least}"""
LEAST = {
    "zennit": "Target: at least 1.5 times zennit's speed.",
    "LXT": "Target: level with LXT (within 5 %) or better.",
}


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled function to time, its result, and the seconds that making it took."""

    candidate: Candidate
    result: np.ndarray
    trace: float
    compile: float


def run(name: str, *, batch: int, quick: bool, repeats: int) -> Table:
    """All composites of one network.

    Args:
      name: of `lrp_models.NETWORKS`.
      batch: inputs at a time.
      quick: tiny sizes, only to see that it works.
      repeats: rounds of measurements.
    """
    network = lrp_models.build(name, batch=batch, quick=quick)
    peer, chosen = PEERS[name]
    classes = np.arange(batch)
    built = build(network, chosen, classes)
    found, differences, note = peer_candidates(peer, network, classes, built)
    what = f"{name}{', tiny' if quick else ''}, batch {batch}"
    ours = [one.candidate for one in built.values()]
    measured = take_turns(ours, found, repeats=repeats, what=what)
    shape = " x ".join(map(str, network.x.shape[1:]))
    rows = [row(name, measured, built, peer, network.scanned, differences) for name in measured]
    return Table(what, NOTE.format(batch=batch, shape=shape, peer=note), rows)


def build(network: Network, chosen: Mapping[str, Composite], classes: Any) -> dict[str, Built]:
    """`jax.grad` and all composites, of the function and of its form with remat."""
    built = {}
    for form, fun in (("", network.fun), (", remat", network.remat)):
        if fun is not None:
            built["jax.grad" + form] = compiled("jax.grad" + form, grad(fun, classes), network)
            for name, composite in chosen.items():
                explained = explain(fun, composite, classes)
                built[name + form] = compiled(name + form, explained, network)
    return built


def grad(fun: Callable, classes: np.ndarray) -> Callable:
    """The baseline: the gradient of the chosen logits by the input."""

    def total(params, x):
        logits = fun(params, x)
        return jnp.sum(logits * jax.nn.one_hot(classes, logits.shape[-1]))

    return jax.grad(total, argnums=1)


def explain(fun: Callable, composite: Composite, classes: np.ndarray) -> Callable:
    """Relevance of the input for the chosen logits, as a user asks for it."""

    def seed(logits):
        return logits * jax.nn.one_hot(classes, logits.shape[-1])

    return partial(lrp(fun, composite, argnums=1), seed=seed)


def compiled(name: str, fun: Callable, network: Network) -> Built:
    """A function of the network's arguments, compiled ahead."""
    args = (network.params, network.x)
    start = time.perf_counter()
    lowered = jax.jit(fun).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    analysis: Any = program.memory_analysis()
    temp = analysis.temp_size_in_bytes
    candidate = Candidate(name, lambda: jax.block_until_ready(program(*args)), temp)
    return Built(candidate, np.asarray(program(*args)), traced - start, done - traced)


def peer_candidates(
    peer: str, network: Network, classes: np.ndarray, built: Mapping[str, Built]
) -> tuple[list[Candidate], dict[str, float], str]:
    """The peer's candidates, how far each is from the composite of its name, and a note."""
    needed = dict.fromkeys(["torch", "zennit", peer.lower()])
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        return [], {}, f"{missing[0]} not installed: pip install 'jaxrel[bench]'"
    if jax.default_backend() != "cpu":
        return [], {}, f"{peer} is not compared: torch runs on the CPU, JAX does not."
    import torch

    from tests.benchmarks import peers, torch_clip

    explained = {"zennit": peers.zennit_peers, "LXT": peers.lxt_peers}[peer]
    candidates, differences = [], {}
    for name, compute in explained(network, classes).items():
        theirs = compute()
        differences[name] = float(np.abs(built[name].result - theirs).max() / np.abs(theirs).max())
        temp = torch_clip.peak(compute)
        candidates.append(Candidate(f"{peer} {name}", compute, temp))
    threads = torch.get_num_threads()
    note = WITH_PEER.format(peer=peer, threads=threads, least=LEAST[peer])
    return candidates, differences, note


def take_turns(
    ours: Sequence[Candidate], theirs: Sequence[Candidate], *, repeats: int, what: str
) -> dict[str, Measured]:
    """Measure JAX's candidates and torch's in the same rounds, each the next of its own kind.

    What runs first after the other library shares the cores with that library's threads, which
    wait spinning: there the first candidate runs once more, and does not count.
    """
    turns = []
    for group in filter(None, (ours, theirs)):
        turns += [dataclasses.replace(group[0], name=f"{UNCOUNTED} {group[0].name}"), *group]
    measured = measure(turns, repeats=repeats, what=what)
    return {name: one for name, one in measured.items() if not name.startswith(UNCOUNTED)}


def row(
    name: str,
    measured: Mapping[str, Measured],
    built: Mapping[str, Built],
    peer: str,
    scanned: bool,
    differences: Mapping[str, float],
) -> dict[str, Any]:
    """One line of the table."""
    this = measured[name]
    composite = name.removesuffix(", remat")
    base = measured["jax.grad, remat" if name != composite else "jax.grad"]
    cells = {
        "method": name,
        "ms": this.milliseconds,
        "x jax.grad": this.slower(base),
        "temp MiB": this.temp / MIB,
        "x jax.grad temp": this.larger(base),
    }
    met = {}
    if composite in MOST:
        met["time"] = this.slower(base) <= MOST[composite]
    if name in built:
        made = built[name]
        cells |= {"trace s": made.trace, "compile s": made.compile}
        if scanned and composite != "jax.grad":
            met["compile"] = made.trace + made.compile < COMPILED_WITHIN
    if composite in differences:
        theirs = measured[f"{peer} {composite}"]
        cells[f"{peer} / this"] = theirs.slower(this)
        cells["difference"] = f"{differences[composite]:.0e}"
        met[peer] = theirs.slower(this) >= FASTER[peer]
    return cells | {"targets": targets(**met)}
