"""The one module that knows JAX's primitives: its names exist, and no other module has any."""

import ast
import functools
import gc
import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.experimental.pallas as pl
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

import jaxrel
from jaxrel import attention, composites
from jaxrel.propagation.rules import KINDS
from jaxrel.tracing import primitives
from tests.paths import ROOT

RUNNING = tuple(map(int, jax.__version__.split(".")[:2]))
FAMILIES = {
    name: value for name, value in vars(primitives).items() if name[0] != "_" and name.isupper()
}
NAMES = frozenset().union(*FAMILIES.values())
W = jax.random.normal(jax.random.key(0), (2, 6, 6)) * 0.4
X = jax.random.normal(jax.random.key(1), (2, 5, 6))


def known_names() -> set[str]:
    """The names of all primitives that the running JAX has made."""
    importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    gc.unfreeze()  # see tests/conftest.py
    # `isinstance` would ask each object for its class, which some libraries' objects warn of.
    found = {one.name for one in gc.get_objects() if issubclass(type(one), Primitive)}
    gc.freeze()
    return found


def test_names_that_no_primitive_has_say_which_version_needs_them():
    unknown = NAMES - known_names()
    later = {name for name, since in primitives.SINCE.items() if since > RUNNING}
    gone = {name for name, until in primitives.UNTIL.items() if until <= RUNNING}
    assert unknown == later | gone


def test_no_other_file_reads_a_primitives_parameter_or_asks_jax_for_its_own():
    own = re.compile(
        r"\.params(\[|\.get\()|jax\.(extend|interpreters|_src)"
        r"|from jax import (extend|interpreters)"
    )
    for path in files():
        assert not own.search(path.read_text(encoding="utf-8")), path


def test_no_other_file_names_a_primitive():
    known = known_names() | NAMES
    for path in files():
        for text, line in strings(path):
            # One word that is a primitive's name, or a list of them; prose has more that is not.
            words = set(text.split()) - {"and", "or", *KINDS, *PLAIN.get(room_of(path), ())}
            assert not words or not words <= known, f"{path}:{line} names primitives: {text!r}"


# What else these words mean, by room.
PLAIN = {
    "cli": ("split",),
    "explanations": ("composite",),
    "metrics": ("max", "pad"),
    "report": ("name",),
}


def room_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[1]


def files() -> list[Path]:
    """The library's modules but the one that may."""
    found = sorted((ROOT / "jaxrel").rglob("*.py"))
    assert len(found) > 40
    return [path for path in found if path.name != "primitives.py"]


def strings(path: Path):
    """The texts of a module that are neither docstrings nor parts of f-strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    prose |= {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value, node.lineno


# The same function, written with each of JAX's ways to call a part of it.


def attend(x, w):
    """One layer of self-attention with its residual sum."""
    maps = jax.nn.softmax(x @ w @ x.swapaxes(1, 2))
    return x + checkpoint_name(maps, "maps") @ x


def plain(f):
    return f


def rematerialised(f):
    return jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)


def rematerialised_in_part(f):
    return jax.checkpoint(f, prevent_cse=False)


def with_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *xs: jax.vjp(f, *xs), lambda pullback, c: pullback(c))
    return wrapped


def with_jvp(f):
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda xs, ts: jax.jvp(f, xs, ts))
    return wrapped


def with_vmap(f):
    wrapped = jax.custom_batching.custom_vmap(f)

    def rule(size, batched, *xs):
        return jax.vmap(f, [0 if mapped else None for mapped in batched])(*xs), True

    wrapped.def_vmap(rule)
    return wrapped


def traced(f):
    return lambda *xs: jax.jit(f).trace(*xs)(*xs)


def grouped(f):
    return jax.jit(f, inline=False)


CALLS = {
    call.__name__: call
    for call in (
        rematerialised,
        rematerialised_in_part,
        with_vjp,
        with_jvp,
        with_vmap,
        traced,
        grouped,
    )
}
FLAGS = ("jax_remat3", "jax_custom_vjp3")


@pytest.fixture(params=[(), FLAGS], ids=["today", "coming"])
def flags(request):
    """JAX's coming implementations of remat and custom_vjp, where it has them."""
    if any(flag not in jax.config.values for flag in request.param):
        pytest.skip("this JAX has no such flag")
    for flag in request.param:
        jax.config.update(flag, True)
    yield
    for flag in request.param:
        jax.config.update(flag, False)


def network(call, *, scanned):
    """Layers of attention, each called in the way that is tested, and a score per example."""
    layer = call(attend)

    def fun(x):
        if scanned:
            x, _ = lax.scan(lambda x, w: (layer(x, w), None), x, W)
        else:
            for w in W:
                x = layer(x, w)
        return jnp.tanh(x[:, 0]).sum(-1)

    return fun


METHODS = ("equal", "weighted", "raw", "rollout")
EXPLANATIONS = {
    "lrp": lambda fun: jaxrel.value_and_lrp(fun, composites.attn_lrp()),
    "attention": lambda fun: attention.relevance(fun, method=METHODS),
    "capture": lambda fun: jaxrel.capture_with_grad(fun, "maps"),
}


def explained(kind, call, scanned):
    return jax.tree.leaves(jax.jit(EXPLANATIONS[kind](network(call, scanned=scanned)))(X))


@functools.cache
def expected(kind, scanned):
    return explained(kind, plain, scanned)


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", EXPLANATIONS)
def test_however_a_part_is_called_the_explanation_is_that_of_the_function(kind, name, scanned):
    if kind == "capture" and name in ("with_vjp", "with_jvp"):
        pytest.skip("a tag inside is refused: the derivative is written for the whole")
    pairs = zip(explained(kind, CALLS[name], scanned), expected(kind, scanned), strict=True)
    for got, wanted in pairs:
        # The same operations in float32, which XLA fuses differently.
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)
        assert np.ptp(np.asarray(wanted)) > 0.01


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("make", [with_vjp, with_jvp])
def test_a_tag_in_a_function_with_a_derivative_of_its_own_is_refused(make):
    tagged = make(lambda x: jaxrel.tag(jnp.tanh(x), "out"))
    with pytest.raises(NotImplementedError, match="call the function without its custom_"):
        jaxrel.capture(lambda x: tagged(x).sum(), "out")(X)


def test_the_settings_of_remat_are_kept():
    node = lambda f: next(n for n in jaxrel.tracing.trace(f, X[0]).graph.nodes if n.remat)
    policy = jax.checkpoint_policies.everything_saveable
    assert node(jax.checkpoint(jnp.sin, policy=policy)).remat == (policy, True)
    assert node(jax.checkpoint(jnp.sin, prevent_cse=False)).remat.prevent_cse is False


# Kernels, which stay closed.

LIBRARY = """
import jax
from jax.experimental import pallas as pl

def attention(q, k, v, implementation="mosaic"):
    def kernel(q, k, v, out):
        out[...] = jax.nn.softmax(q[...] @ k[...].T) @ v[...]
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(q, k, v)
"""


@pytest.fixture
def library(request, tmp_path):
    """An installed library that computes attention by a kernel."""
    path = tmp_path / "site-packages" / request.param / "api.py"
    path.parent.mkdir(parents=True)
    path.write_text(LIBRARY)
    spec = importlib.util.spec_from_file_location(f"{request.param}_api", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(explain, library):
    """What explaining a function that calls the library says; and the line that calls it."""
    fun = lambda x: (x + library.attention(x, x, x)).sum()
    line = sys._getframe().f_lineno - 1
    with pytest.raises(NotImplementedError) as error:
        explain(fun)
    return str(error.value), f"test_primitives.py:{line} "


EXPLAIN = {
    "lrp": lambda fun: jaxrel.lrp(fun, composites.attn_lrp())(X[0]),
    "attention": lambda fun: attention.relevance(fun)(X[0]),
}


@pytest.mark.parametrize("explain", EXPLAIN.values(), ids=EXPLAIN)
@pytest.mark.parametrize(
    ("library", "switch"),
    [
        ("tokamax", "call tokamax with implementation='xla'"),
        ("keras", "flash_attention=False"),
        ("fastattention", "use the plain JAX form of the operation"),
    ],
    indirect=["library"],
)
def test_a_kernel_is_refused_at_the_users_line_with_the_librarys_switch(library, switch, explain):
    text, line = refusal(explain, library)
    assert line in text
    assert switch in text
    assert "api.py" not in text


def test_cudnn_attention_is_refused_with_the_argument_of_jax(monkeypatch):
    # Traced as on a GPU: nothing is compiled or run.
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    heads = jnp.ones((2, 64, 2, 64), jnp.bfloat16)
    fun = lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn").sum()
    for explain in (jaxrel.lrp(fun, composites.attn_lrp()), attention.relevance(fun)):
        with pytest.raises(NotImplementedError, match=r"test_primitives.*implementation='xla'"):
            explain(heads)


def test_a_kernel_keeps_its_own_derivative_elsewhere():
    def double(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    def fun(x):
        scale = pl.pallas_call(
            double, out_shape=jax.ShapeDtypeStruct((6,), jnp.float32), interpret=True
        )(jnp.arange(6.0))
        return (jnp.tanh(x * scale)).sum()

    # The kernel carries no relevance here, so it is bound as it stands.
    relevance = jaxrel.lrp(fun, composites.attn_lrp())(X[0, 0])
    np.testing.assert_allclose(relevance, np.tanh(X[0, 0] * 2 * np.arange(6)), rtol=1e-5)
