"""Attention relevance of a function as it stands, over the self-attention of each stream."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.attention.blocks import by_blocks
from jaxrel.attention.choice import check_branches, choose_stacks, target_token_of
from jaxrel.attention.discovery import Site, Stack, data_values, find_stacks, trace_attention
from jaxrel.attention.followed import of_stacks
from jaxrel.attention.importance import measure
from jaxrel.attention.lrp_of_maps import lrp_of_maps
from jaxrel.attention.maps import relevance_dtype
from jaxrel.attention.methods import ENCODER_METHODS, METHODS, TABLE, check_methods
from jaxrel.attention.pooling import start_row
from jaxrel.attention.reweighing import sink_tokens
from jaxrel.attention.stacked import How, layer_gradients, stacked_relevance
from jaxrel.attention.streaming import Carrier, accumulate, seed, weigh_sum
from jaxrel.propagation.composites import as_composite, attn_lrp
from jaxrel.renamed import renamed_keywords
from jaxrel.tracing.evaluate import Edits, Interceptor
from jaxrel.tracing.graph import Traced
from jaxrel.tracing.pullback import check_output, leaf_paths, pullback
from jaxrel.tracing.sharding import shaped_like

# None, indices, or a bool array; or one of these by stack.
Choice = slice | Sequence[int] | Array | np.ndarray | Mapping[str, Any] | None

STREAMING = tuple(name for name in METHODS if TABLE[name].streaming)
EVERY_METHOD = (*METHODS, *ENCODER_METHODS)
Form = Literal["auto", "streaming", "stacked", "blockwise"]
BLOCK = 128


@renamed_keywords(readout="target_token")
def relevance(
    fun: Callable,
    *,
    method: str | Sequence[str] = "weighted",
    target_token: Any = 0,
    attention: str | Sequence[str] | None = None,
    layers: Choice = None,
    heads: Choice = None,
    sinks: Any = None,
    layer_weights: Any = None,
    importance: str | Callable = "grad_value",
    form: Form = "auto",
    block: int = BLOCK,
    rules: Any = None,
    layer_scores: Callable | None = None,
    argnums: int | Sequence[int] | None = None,
) -> Callable:
    """Make a function return the relevance of its tokens instead of its output.

    The model is not changed: its attention maps are found by structure (see `sites`), or by
    the names it tags them with. Equal (Chefer et al. 2021, eq. 5 and 6) and weighted
    accumulation (Huang et al. 2023) for one target token are streamed: relevance rides in the
    backward pass, and no map or gradient is kept beyond its layer. Other methods, whole
    matrices and a choice of layers or heads stack the maps; all methods together share one
    forward and one backward pass. `methods.TABLE` says what each method needs and its source.

    Args:
      fun: a JAX function that returns the scalar to explain, or one per example `[batch]`;
        examples must be independent of each other, dropout off.
      method: one of `METHODS` or `ENCODER_METHODS`, or several.
      target_token: the token whose row of the relevance matrix is returned: an int, an int array
        `[batch]`, `Pooling(tag)` where an attention with a query of its own pools the tokens, a
        mapping from stack names to these, or None for the whole matrix.
      attention: the names of the attention stacks: tags of the maps, or the names that `sites`
        lists. By default the function's only self-attention stack.
      layers: the layers accumulated; all, by default. `slice(-1, None)` is the last alone. A bool
        array `[layers]` may be traced, so that one program serves every choice; a mapping gives
        one by stack.
      heads: the attention heads averaged; all, by default. As `layers`, `[heads]`.
      sinks: tokens that attention rests on for want of something else (the first of a decoder):
        their columns are left out of every map, but for what a sink has of itself, and so out of
        what normalises rows. Indices, or a bool array, `[tokens]` or `[batch, tokens]`, which may
        be traced; a mapping gives them by stack. None by default.
      layer_weights: what each layer's map is multiplied by before it is accumulated, `[layers]`, 0
        or more, which may be traced; a mapping gives them by stack. All 1, by default.
      importance: the measure of the weighted method: 'grad_value', 'norm', 'abs_grad_value',
        or a function `(value, grad) -> [batch, tokens]`.
      form: 'streaming', 'stacked', or 'auto', which streams where it can; 'blockwise' streams and
        computes the attention itself by blocks of queries, forward and backward, so that memory
        is tokens x block and no map of all tokens is ever there.
      block: of 'blockwise', how many queries at a time.
      rules: for the methods that read the maps' relevance by LRP, 'equal_lrp' (on one stream
        the same as transformer attribution, Chefer et al. 2021 CVPR) and 'partial_lrp' (Voita
        et al. 2019, signed): see `jaxrel.lrp`; AttnLRP by default.
      layer_scores: for 'legrad', a function of the same arguments that returns the sum over the
        layers of the score of each layer's own tokens, of which each layer's map reaches its own
        score alone (`jax.lax.stop_gradient` before each layer).
      argnums: which arguments hold the data (what tells an attention map from a weight): by
        default every argument that is not an NNX module.

    Returns:
      A function `(*args) -> relevance`, float32 (float64 for float64 maps), to be wrapped in
      `jit` by the caller: `[batch, tokens]`, or `[batch, tokens, tokens]` for `target_token=None`.
      Several methods give a dict by method, several stacks a dict by stack of these.

    Raises:
      ValueError: (when called) unknown method, measure, stack, layer or target token; no or several
        attention stacks where one is needed; no residual stream found for 'weighted' or 'token_tm',
        no tags for 'grad_eclip', or no `layer_scores` for 'legrad'.
      TypeError: (when called) `fun` returns something other than one real array.
      NotImplementedError: (when called) attention inside a kernel or a hand-written derivative,
        within windows, or in a form that is not recognised, so that its layer would be missing;
        of 'blockwise', attention whose rows are not computed apart.
    """
    explain = value_and_relevance(
        fun,
        method=method,
        target_token=target_token,
        attention=attention,
        layers=layers,
        heads=heads,
        sinks=sinks,
        layer_weights=layer_weights,
        importance=importance,
        form=form,
        block=block,
        rules=rules,
        layer_scores=layer_scores,
        argnums=argnums,
    )

    def explained(*args):
        return explain(*args)[1]

    return explained


@renamed_keywords(readout="target_token")
def value_and_relevance(
    fun: Callable,
    *,
    method: str | Sequence[str] = "weighted",
    target_token: Any = 0,
    attention: str | Sequence[str] | None = None,
    layers: Choice = None,
    heads: Choice = None,
    sinks: Any = None,
    layer_weights: Any = None,
    importance: str | Callable = "grad_value",
    form: Form = "auto",
    block: int = BLOCK,
    rules: Any = None,
    layer_scores: Callable | None = None,
    argnums: int | Sequence[int] | None = None,
) -> Callable:
    """Like `relevance`, but the function returns `(fun(*args), relevance)`."""
    explain = covered_relevance(
        fun,
        method=method,
        target_token=target_token,
        attention=attention,
        layers=layers,
        heads=heads,
        sinks=sinks,
        layer_weights=layer_weights,
        importance=importance,
        form=form,
        block=block,
        rules=rules,
        layer_scores=layer_scores,
        argnums=argnums,
    )

    def explained(*args):
        return explain(*args)[:2]

    return explained


def layers_followed(
    fun: Callable,
    *,
    method: str | Sequence[str] = "weighted",
    attention: str | Sequence[str] | None = None,
    layers: Choice = None,
    argnums: int | Sequence[int] | None = None,
) -> Callable:
    """Say what share of a function's attention `relevance` follows, and what it leaves out.

    It traces the function and computes nothing.

    Args:
      fun, method, attention, layers, argnums: as in `relevance`.

    Returns:
      A function `(*args) -> Coverage`, with `followed`, `layers`, `share` and `left_out`; for
      several methods a dict by method. Of a choice of layers by a traced array `followed` is traced
      too.

    Raises:
      ValueError, TypeError, NotImplementedError: as `relevance`.
    """
    methods = check_methods(method, EVERY_METHOD)

    def told(*args):
        traced = trace_attention(fun, *args)
        _check_scalars(traced)
        found = find_stacks(traced, args, argnums)
        stacks = choose_stacks(traced, found, attention, methods)
        coverage = {name: of_stacks(TABLE[name], stacks, found, layers) for name in methods}
        return coverage[method] if isinstance(method, str) else coverage

    return told


def covered_relevance(
    fun: Callable,
    *,
    method: str | Sequence[str],
    target_token: Any = 0,
    attention: str | Sequence[str] | None = None,
    layers: Choice = None,
    heads: Choice = None,
    sinks: Any = None,
    layer_weights: Any = None,
    importance: str | Callable = "grad_value",
    form: Form = "auto",
    block: int = BLOCK,
    rules: Any = None,
    layer_scores: Callable | None = None,
    argnums: int | Sequence[int] | None = None,
) -> Callable:
    """Like `value_and_relevance`, with the coverage of each method as a third result."""
    methods = check_methods(method, EVERY_METHOD)
    measure(importance)
    _check_layer_scores(methods, layer_scores)
    composite = attn_lrp() if rules is None else as_composite(rules)
    some = {"layers": layers, "heads": heads, "layer_weights": layer_weights}
    streaming = _choose_form(form, methods, target_token, some)
    how = How(methods, layers, heads, layer_weights, importance)
    size = _block_size(form, block, sinks)

    def explained(*args):
        traced = trace_attention(fun, *args)
        _check_scalars(traced)
        everything = find_stacks(traced, args, argnums)
        stacks = choose_stacks(traced, everything, attention, methods)
        target_tokens = {s.name: target_token_of(traced, target_token, s) for s in stacks}
        pooled = {n: site for n, site in target_tokens.items() if isinstance(site, Site)}
        coverage = {
            name: of_stacks(TABLE[name], stacks, everything, layers, pooled) for name in methods
        }
        rests = {s.name: sink_tokens(sinks, s) for s in stacks}
        if streaming and not _mapped(stacks, form):
            out, result = _stream(
                traced, stacks, methods[0], target_tokens, rests, importance, size
            )
            result = {methods[0]: result}
        else:
            check_branches(stacks, methods, layers)
            passes: dict[str, Any] = {}
            if any(TABLE[name].by_lrp for name in methods):
                passes["by_lrp"] = _by_lrp(traced, fun, args, argnums, composite)
            if layer_scores is not None:
                passes["by_layer"] = functools.partial(layer_gradients, layer_scores, args, argnums)
            out, result = stacked_relevance(traced, stacks, target_tokens, rests, how, **passes)
        if attention is None or isinstance(attention, str):
            result = {name: found[stacks[0].name] for name, found in result.items()}
        return out, result[method] if isinstance(method, str) else result, coverage

    return explained


def _by_lrp(traced: Traced, fun: Callable, args: tuple, argnums: Any, rules: Any) -> Callable:
    """The pass by the rules of LRP: from taps to the relevance of the maps."""
    data = data_values(traced, args, argnums)
    paths = [path for _, path in leaf_paths(fun, args)]
    return functools.partial(lrp_of_maps, traced, rules=rules, data=data, paths=paths)


def _mapped(stacks: list[Stack], form: Form) -> bool:
    """Whether some heads are computed in a loop, which some forms cannot follow."""
    sites = (site for stack in stacks for site in stack.sites)
    mapped = next((site for site in sites if site.mapped), None)
    if mapped is not None and form in ("streaming", "blockwise"):
        raise NotImplementedError(
            f"form={form!r}: the heads at {mapped.where} are computed one after another in a "
            "loop, and relevance must see them together; use form='auto'"
        )
    return mapped is not None


def _block_size(form: Form, block: int, sinks: Any) -> int | None:
    """How many queries are computed at a time; None where all are."""
    if operator.index(block) < 1:
        raise ValueError(f"block must be 1 or more queries, got {block}")
    if form == "blockwise" and sinks is not None:
        raise ValueError(
            "form='blockwise' leaves no columns out of the maps, and sinks= asks for that; use "
            "form='streaming'"
        )
    return operator.index(block) if form == "blockwise" else None


def _check_scalars(traced: Traced) -> None:
    check_output("attention.relevance", traced)
    shape = traced.graph.outs[0].shape
    if len(shape) > 1:
        raise TypeError(
            f"attention.relevance: the function returned shape {shape}; return the scalar to "
            "explain, or one per example, as in lambda x: fun(x)[:, target]"
        )


def _check_layer_scores(methods: tuple[str, ...], layer_scores: Any) -> None:
    for name in methods:
        if "layer scores" in TABLE[name].needs and layer_scores is None:
            raise ValueError(
                f"attention.relevance: method {name!r} scores the tokens of every layer by the "
                "model's head, and where that is cannot be told from the function; give "
                "layer_scores=, a function of the same arguments that returns the sum of these "
                "scores. For CLIP, jaxrel.explain(model, ...) does so"
            )


def _choose_form(form: str, methods: tuple, target_token: Any, some: Mapping[str, Any]) -> bool:
    everything = all(choice is None for choice in some.values())
    rows = target_token.values() if isinstance(target_token, Mapping) else (target_token,)
    row = all(index is not None for index in rows)
    can = len(methods) == 1 and methods[0] in STREAMING and row and everything
    if form in ("streaming", "blockwise") and not can:
        raise ValueError(
            f"form={form!r} computes one target token row of one of the methods "
            f"{' and '.join(STREAMING)} over all layers and heads; got method={methods}, "
            f"target_token={target_token}, {some}. Use form='auto'"
        )
    if form not in get_args(Form):
        names = ", ".join(map(repr, get_args(Form)))
        raise ValueError(f"form must be one of {names}, got {form!r}")
    return can and form != "stacked"


def _stream(
    traced: Traced,
    stacks: list[Stack],
    method: str,
    target_tokens: Mapping,
    sinks: Mapping,
    importance: Any,
    block: int | None,
) -> tuple[Any, dict]:
    """Walk back through the layers with one row of relevance per example."""
    interceptors: dict = {}
    steps = {} if block is None else by_blocks(traced.graph, stacks, block)
    for name, target in target_tokens.items():
        if isinstance(target, Site):
            interceptors[target.value] = Interceptor(_start_at(name, target))
    for stack in stacks:
        for site in stack.sites:
            if block is None:
                interceptor = _accumulate_at(stack.name, site, sinks[stack.name])
                interceptors[site.value] = Interceptor(interceptor)
            if method == "weighted" and site.residual is not None:
                before, after, total = site.residual
                interceptor = _weigh_at(stack.name, site, measure(importance))
                interceptors[total] = Interceptor(interceptor, (before, after))

    seeds = {}
    for stack in stacks:
        site = stack.sites[0]
        batch, _, tokens, _ = site.shape
        pooled = isinstance(target_tokens[stack.name], Site)
        first = seed(
            0 if pooled else target_tokens[stack.name],
            batch=batch,
            tokens=tokens,
            dtype=relevance_dtype(site.value.aval),
            like=shaped_like(site.value.aval, (site.batch,), shape=(batch,)),
        )
        # Where tokens are pooled, the pooling map makes the row.
        seeds[stack.name] = Carrier(*(jnp.zeros_like(x) for x in first)) if pooled else first
    carrier = jax.tree.map(jnp.zeros_like, seeds)
    edits = Edits(steps, interceptors=interceptors)
    evaluated, back = pullback(traced.graph, traced.args, edits, carrier=carrier)
    (out,) = evaluated.outs
    rows = back(jnp.ones_like(out), seeds).carrier
    return traced.unflatten([out]), {stack.name: rows[stack.name].keep for stack in stacks}


def _start_at(name: str, site: Site) -> Callable:
    def interceptor(carriers, value):
        carrier, attn = start_row(carriers[name], site.standard(value))
        return {**carriers, name: carrier}, site.restore(attn, value)

    return interceptor


def _accumulate_at(name: str, site: Site, sinks: Any) -> Callable:
    def interceptor(carriers, value):
        carrier, attn = accumulate(carriers[name], site.standard(value), sinks)
        return {**carriers, name: carrier}, site.restore(attn, value)

    def in_windows(carriers, value):
        windows = site.windows
        assert windows is not None
        rows = jax.tree.map(windows.gather, carriers[name])
        rests = None
        if sinks is not None:
            # As zeros of the carrier's own, they are of the whole batch and sharded as it is.
            whole = jnp.zeros_like(carriers[name].keep, dtype=bool) | sinks
            rests = windows.gather(whole)
        maps = jnp.moveaxis(windows.apart(value), 2, 1)
        moved, attn = accumulate(rows, maps.reshape(-1, *maps.shape[2:]), rests)
        carrier = jax.tree.map(windows.scatter, moved, carriers[name])
        attn = jnp.moveaxis(attn.reshape(maps.shape), 1, 2)
        return {**carriers, name: carrier}, windows.together(attn, value.shape)

    by_window = site.windows is not None and site.windows.is_partition
    return in_windows if by_window else interceptor


def _weigh_at(name: str, site: Site, importance: Callable) -> Callable:
    batch, _, tokens, _ = site.shape

    def interceptor(carriers, total, before, after):
        ordered = [site.in_order(x) for x in (total, before, after)]
        rows = [x.reshape(batch, tokens, -1) for x in ordered]
        carrier, weighed = weigh_sum(carriers[name], rows[0], rows[1], rows[2], importance)
        return {**carriers, name: carrier}, site.as_it_was(weighed.reshape(ordered[0].shape))

    return interceptor
