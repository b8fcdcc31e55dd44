"""JAX's side: `jax.grad`, and jaxrel as a compiled program and operation by operation."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel import attention, capture_with_grad, gradients
from jaxrel.train.evaluate import flops
from tests.benchmarks import clip_attention, lrp
from tests.benchmarks.side_by_side.networks import (
    ATTENTION,
    CAPTIONER,
    CLIP_B32,
    GRAD_CAM,
    INTEGRATED,
    STEPS,
    WORD,
    Network,
    by_patch,
)
from tests.zoo.plain_captioner import plain_word_relevance

BASE, COMPILED, EAGER, LOOP = "jax.grad", "jaxrel", "jaxrel, eager", "plain loop in JAX"

Run = Callable[[], Any]
Prepare = Callable[[], tuple[Run, dict[str, float]]]


def candidates(network: Network, method: str) -> dict[str, Prepare]:
    """By tool: what prepares it, and gives a function to time and what is known beforehand."""
    base, fun, args = programs(network, method)
    found: dict[str, Prepare] = {
        BASE: partial(compiled, base, base, args),
        COMPILED: partial(compiled, fun, base, args),
        EAGER: lambda: (partial(eager, fun, args), {}),
    }
    if network.name == CAPTIONER and method in network.rules:
        found[LOOP] = lambda: (partial(loop, network), {})
    return found


def compiled(fun: Callable, base: Callable, args: tuple) -> tuple[Run, dict[str, float]]:
    """A program compiled ahead; the seconds that took, and its operations over those of `base`."""
    start = time.perf_counter()
    program = jax.jit(fun).lower(*args).compile()
    seconds = time.perf_counter() - start
    ratio = 1.0 if fun is base else flops.flops(fun, *args) / flops.flops(base, *args)
    return partial(eager, program, args), {"compile": seconds, "flops": ratio}


def eager(fun: Callable, args: tuple) -> Any:
    """Call a function and wait for its result."""
    return jax.block_until_ready(fun(*args))


def loop(network: Network) -> Any:
    """The captioner's word by `tests.zoo.plain_captioner`."""
    text = network.options["text"]
    return jax.block_until_ready(
        plain_word_relevance(network.params, network.x[0], text[0], [WORD])[0]
    )


def programs(network: Network, method: str) -> tuple[Callable, Callable, tuple]:
    """The gradient that a method is held against, the method, and the arguments of both."""
    fun, classes, args = network.fun, network.classes, (network.params, network.x)
    base = lrp.grad(fun, classes)
    if method == ATTENTION:
        if network.name == CLIP_B32:
            explained = clip_attention.explain("equal", "auto")
            return flops.gradient, explained, (network.params, network.options["inputs"])
        score = partial(chosen, network)
        options = {"method": "equal", "target_token": network.token, "argnums": 1}
        return base, attention.relevance(score, **options), args
    if method == INTEGRATED:
        explained = gradients.integrated_gradients(fun, argnums=1, steps=STEPS)
        return base, partial(explained, target=classes), args
    if method != GRAD_CAM:
        return base, lrp.explain(fun, network.rules[method], classes), args
    if network.token is not None:
        return base, partial(token_cam, network), args
    return base, partial(gradients.grad_cam(fun, network.features), target=classes), args


def chosen(network: Network, params: Any, x: Any) -> Any:
    """The logits of the chosen classes, [batch]."""
    logits = network.fun(params, x)
    return jnp.take_along_axis(logits, jnp.asarray(network.classes)[:, None], axis=1)[:, 0]


def token_cam(network: Network, params: Any, x: Any) -> Any:
    """Grad-CAM of the patches among tokens."""
    name = network.features
    _, values, slopes = capture_with_grad(partial(chosen, network), name)(params, x)
    tokens, grads = values[name], slopes[name]
    if tokens.ndim == 4:  # of the layers of a scan, the last
        tokens, grads = tokens[-1], grads[-1]
    return gradients.class_activation(by_patch(tokens), by_patch(grads))


def arrays(result: Any) -> list[np.ndarray]:
    """The arrays of a result."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]
