"""Attention relevance of a function as it stands, over the self-attention of each stream."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.attention.discovery import (
    Site,
    Stack,
    data_values,
    find_stacks,
    tagged_stack,
    trace_attention,
)
from jaxrel.attention.followed import of_stacks
from jaxrel.attention.importance import measure
from jaxrel.attention.lrp_of_maps import lrp_of_maps
from jaxrel.attention.maps import as_indices, is_mask, only, relevance_dtype, row, token_index
from jaxrel.attention.methods import METHODS, TABLE, Method, check_methods
from jaxrel.attention.pooling import Pooling, find_pooling, pooled_row, start_row
from jaxrel.attention.streaming import Carrier, accumulate, seed, weigh_sum
from jaxrel.propagation.composites import as_composite, attn_lrp
from jaxrel.renamed import renamed_keywords
from jaxrel.tracing.axes import same
from jaxrel.tracing.capture import taps_with_grad
from jaxrel.tracing.evaluate import Edits, Interceptor
from jaxrel.tracing.graph import Traced
from jaxrel.tracing.pullback import check_output, leaf_paths, pullback
from jaxrel.tracing.sharding import shaped_like

# None, indices, or a bool array; or one of these by stack.
Choice = slice | Sequence[int] | Array | np.ndarray | Mapping[str, Any] | None

STREAMING = tuple(name for name in METHODS if TABLE[name].streaming)


@renamed_keywords(readout="target_token")
def relevance(
    fun: Callable,
    *,
    method: str | Sequence[str] = "weighted",
    target_token: Any = 0,
    attention: str | Sequence[str] | None = None,
    layers: Choice = None,
    heads: Choice = None,
    importance: str | Callable = "grad_value",
    form: Literal["auto", "streaming", "stacked"] = "auto",
    rules: Any = None,
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
      method: one of `METHODS`, or several.
      target_token: the token whose row of the relevance matrix is returned: an int, an int array
        `[batch]`, `Pooling(tag)` where an attention with a query of its own pools the tokens, a
        mapping from stack names to these, or None for the whole matrix.
      attention: the names of the attention stacks: tags of the maps, or the names that `sites`
        lists. By default the function's only self-attention stack.
      layers: the layers accumulated; all, by default. `slice(-1, None)` is the last alone. A bool
        array `[layers]` may be traced, so that one program serves every choice; a mapping gives
        one by stack.
      heads: the attention heads averaged; all, by default. As `layers`, `[heads]`.
      importance: the measure of the weighted method: 'grad_value', 'norm', 'abs_grad_value',
        or a function `(value, grad) -> [batch, tokens]`.
      form: 'streaming', 'stacked', or 'auto', which streams where it can.
      rules: for the methods that read the maps' relevance by LRP, 'equal_lrp' (on one stream
        the same as transformer attribution, Chefer et al. 2021 CVPR) and 'partial_lrp' (Voita
        et al. 2019, signed): see `jaxrel.lrp`; AttnLRP by default.
      argnums: which arguments hold the data (what tells an attention map from a weight): by
        default every argument that is not an NNX module.

    Returns:
      A function `(*args) -> relevance`, float32 (float64 for float64 maps), to be wrapped in
      `jit` by the caller: `[batch, tokens]`, or `[batch, tokens, tokens]` for `target_token=None`.
      Several methods give a dict by method, several stacks a dict by stack of these.

    Raises:
      ValueError: (when called) unknown method, measure, stack, layer or target token; no or several
        attention stacks where one is needed; no residual stream found for 'weighted'.
      TypeError: (when called) `fun` returns something other than one real array.
      NotImplementedError: (when called) attention inside a kernel or a hand-written derivative,
        within windows, or in a form that is not recognised, so that its layer would be missing.
    """
    explain = value_and_relevance(
        fun,
        method=method,
        target_token=target_token,
        attention=attention,
        layers=layers,
        heads=heads,
        importance=importance,
        form=form,
        rules=rules,
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
    importance: str | Callable = "grad_value",
    form: Literal["auto", "streaming", "stacked"] = "auto",
    rules: Any = None,
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
        importance=importance,
        form=form,
        rules=rules,
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
    methods = check_methods(method)

    def told(*args):
        traced = trace_attention(fun, *args)
        _check_scalars(traced)
        found = find_stacks(traced, args, argnums)
        stacks = _choose(traced, found, attention, "weighted" in methods)
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
    importance: str | Callable = "grad_value",
    form: Literal["auto", "streaming", "stacked"] = "auto",
    rules: Any = None,
    argnums: int | Sequence[int] | None = None,
) -> Callable:
    """Like `value_and_relevance`, with the coverage of each method as a third result."""
    methods = check_methods(method)
    measure(importance)
    composite = attn_lrp() if rules is None else as_composite(rules)
    some = {"layers": layers, "heads": heads}
    streaming = _choose_form(form, methods, target_token, some)

    def explained(*args):
        traced = trace_attention(fun, *args)
        _check_scalars(traced)
        everything = find_stacks(traced, args, argnums)
        stacks = _choose(traced, everything, attention, "weighted" in methods)
        target_tokens = {s.name: _target_token(traced, target_token, s) for s in stacks}
        pooled = {n: site for n, site in target_tokens.items() if isinstance(site, Site)}
        coverage = {
            name: of_stacks(TABLE[name], stacks, everything, layers, pooled) for name in methods
        }
        mapped = _mapped(stacks)
        if mapped is not None and form == "streaming":
            raise NotImplementedError(
                f"form='streaming': the heads at {mapped.where} are computed one after another "
                "in a loop, and relevance must see them together; use form='auto'"
            )
        if streaming and mapped is None:
            out, result = _stream(traced, stacks, methods[0], target_tokens, importance)
            result = {methods[0]: result}
        else:
            _check_branches(stacks, methods, layers)
            by_lrp = None
            if any(TABLE[name].by_lrp for name in methods):
                data = data_values(traced, args, argnums)
                paths = [path for _, path in leaf_paths(fun, args)]
                by_lrp = functools.partial(
                    lrp_of_maps, traced, rules=composite, data=data, paths=paths
                )
            out, result = _stacked(traced, stacks, methods, target_tokens, some, importance, by_lrp)
        if attention is None or isinstance(attention, str):
            result = {name: found[stacks[0].name] for name, found in result.items()}
        return out, result[method] if isinstance(method, str) else result, coverage

    return explained


def _mapped(stacks: list[Stack]) -> Site | None:
    """A site whose heads are computed in a loop, if there is one."""
    sites = (site for stack in stacks for site in stack.sites)
    return next((site for site in sites if site.mapped), None)


def _check_scalars(traced: Traced) -> None:
    check_output("attention.relevance", traced)
    shape = traced.graph.outs[0].shape
    if len(shape) > 1:
        raise TypeError(
            f"attention.relevance: the function returned shape {shape}; return the scalar to "
            "explain, or one per example, as in lambda x: fun(x)[:, target]"
        )


def _check_branches(stacks: list[Stack], methods: tuple[str, ...], layers: Any) -> None:
    """Refuse methods that count layers where a layer may not run, and so has a map of zeros."""
    counted = [name for name in methods if not TABLE[name].skips]
    for stack in stacks:
        if any(site.in_cond for site in stack.sites) and (counted or layers is not None):
            what = f"method {counted[0]!r}" if counted else "a choice of layers"
            raise NotImplementedError(
                f"attention.relevance: {what} counts the layers of {stack.name!r}, some of which "
                f"lie in a cond and may not run ({stack.sites[0].where}); use 'equal', "
                "'weighted' or 'rollout' over all layers"
            )


def _choose_form(form: str, methods: tuple, target_token: Any, some: Mapping[str, Any]) -> bool:
    everything = all(choice is None for choice in some.values())
    rows = target_token.values() if isinstance(target_token, Mapping) else (target_token,)
    row = all(index is not None for index in rows)
    can = len(methods) == 1 and methods[0] in STREAMING and row and everything
    if form == "streaming" and not can:
        raise ValueError(
            "form='streaming' computes one target token row of one of the methods "
            f"{' and '.join(STREAMING)} over all layers and heads; got method={methods}, "
            f"target_token={target_token}, {some}. Use form='auto'"
        )
    if form not in ("auto", "streaming", "stacked"):
        raise ValueError(f"form must be 'auto', 'streaming' or 'stacked', got {form!r}")
    return can and form != "stacked"


def _choose(
    traced: Traced, everything: Sequence[Stack], attention: Any, weighted: bool
) -> list[Stack]:
    found = {stack.name: stack for stack in everything}
    if attention is None:
        names = [name for name, stack in found.items() if stack.is_self]
        for name in names:
            _check_tokens(name, found[name])
        if len(names) != 1:
            problem = "no self-attention was found" if not names else "several were found"
            two = (
                ". For two streams of which one reads the other use "
                "attention.value_and_bimodal_relevance(fun, method=..., target_token=...)"
            )
            across = any(not stack.is_self for stack in found.values())
            raise ValueError(
                f"attention.relevance: {problem}; name what is meant with attention=..., a tag of "
                f"the maps or one of these: {_listing(found)}{two if across else ''}"
            )
    else:
        names = [attention] if isinstance(attention, str) else list(attention)
    stacks = []
    for name in names:
        # Tags of a whole residual sum say more than structure; a tag of the map alone, less.
        tagged = None if attention is None else tagged_stack(traced, name)
        whole = tagged is not None and tagged.has_residual
        stack = tagged if whole else found.get(name) or tagged
        if stack is None:
            raise ValueError(
                f"attention.relevance: no attention is named {name!r}; there is {_listing(found)}"
            )
        _check_tokens(name, stack)
        _check_whole(name, found)
        if weighted and not stack.has_residual:
            raise ValueError(
                f"attention.relevance: method 'weighted' needs the residual stream around "
                f"{name!r}, and none was found near {stack.sites[0].where}; tag the stream "
                f"before the attention {name + '/before'!r} and the attention's output "
                f"{name + '/after'!r} where they are added (all in one scan or remat body: put the "
                "sum inside the jax.checkpoint), say with argnums which arguments are data, or use "
                "method 'equal'"
            )
        stacks.append(stack)
    if weighted:
        _check_sums(stacks)
    return stacks


def _check_tokens(name: str, stack: Stack) -> None:
    """Refuse maps whose rows and columns are not the tokens of one stream."""
    site = stack.sites[0]
    if any(one.in_parts for one in stack.sites):
        query = site.size(site.query)
        raise NotImplementedError(
            f"attention.relevance: {name!r} at {site.where} attends within parts of the tokens "
            f"(windows, or chunks of queries) of {query} each, and which tokens these are is not "
            "known; relevance accumulates over maps of all tokens. Cut windows with reshape, "
            "transpose, roll and pad, or compute the map of all tokens, masked outside of the "
            "windows"
        )
    *_, query, key = site.shape
    streams = not site.own_keys and same(site.tokens, site.keys) is False
    if streams or (query != key and not site.own_keys):
        raise ValueError(
            f"attention.relevance: {name!r} at {site.where} maps {query} queries to {key} keys; "
            f"{'the keys are another stream, and ' if streams else ''}relevance accumulates over "
            "self-attention. For two streams use attention.value_and_bimodal_relevance(fun, "
            "method=..., target_token=...)"
        )


def _check_whole(name: str, found: Mapping[str, Stack]) -> None:
    """Refuse a tag that some layers of a stream have and others have not."""
    stack = found.get(name)
    if stack is None or stack.sites[0].name is None:
        return
    for other in found.values():
        site = other.sites[0]
        alike = same(site.tokens, stack.sites[0].tokens)
        if site.name is None and other.is_self and alike:
            raise ValueError(
                f"attention.relevance: the tag {name!r} marks {stack.layers} of the layers that "
                f"attend over these tokens, and {other.layers} are not tagged, at {site.where}; "
                f"tag the maps of all layers, attn = jaxrel.tag(attn, {name!r}), or of none"
            )


def _check_sums(stacks: list[Stack]) -> None:
    """Alpha and beta weigh two branches; a sum of three has no such weights."""
    sums: dict[Any, Site] = {}
    for site in (site for stack in stacks for site in stack.sites):
        total = site.residual and site.residual.total
        if total in sums:
            raise ValueError(
                "attention.relevance: method 'weighted' weighs one attention against the stream, "
                f"and those at {sums[total].where} and {site.where} meet in one sum; add them to "
                "the stream one after the other, or use method 'equal'"
            )
        sums[total] = site


def _listing(found: Mapping[str, Stack]) -> str:
    return "; ".join(map(str, found.values())) or "none (see jaxrel.attention.sites)"


def _target_token(traced: Traced, target_token: Any, stack: Stack) -> Any:
    if isinstance(target_token, Mapping):
        if stack.name not in target_token:
            raise ValueError(
                f"target_token names {sorted(target_token)} but not the stack {stack.name!r}"
            )
        target_token = target_token[stack.name]
    if target_token is None:
        return None
    if isinstance(target_token, Pooling):
        return find_pooling(traced, target_token, stack)
    batch, _, tokens, _ = stack.sites[0].shape
    if isinstance(target_token, str):
        raise ValueError(
            f"target_token must be a token's index, or one per example, got {target_token!r}"
        )
    if isinstance(target_token, list | tuple):
        target_token = np.asarray(target_token)
    return token_index(target_token, batch=batch, tokens=tokens)


def _stream(
    traced: Traced, stacks: list[Stack], method: str, target_tokens: Mapping, importance: Any
) -> tuple[Any, dict]:
    """Walk back through the layers with one row of relevance per example."""
    interceptors: dict = {}
    for name, target in target_tokens.items():
        if isinstance(target, Site):
            interceptors[target.value] = Interceptor(_start_at(name, target))
    for stack in stacks:
        for site in stack.sites:
            interceptors[site.value] = Interceptor(_accumulate_at(stack.name, site))
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
    edits = Edits(interceptors=interceptors)
    evaluated, back = pullback(traced.graph, traced.args, edits, carrier=carrier)
    (out,) = evaluated.outs
    rows = back(jnp.ones_like(out), seeds).carrier
    return traced.unflatten([out]), {stack.name: rows[stack.name].keep for stack in stacks}


def _start_at(name: str, site: Site) -> Callable:
    def interceptor(carriers, value):
        carrier, attn = start_row(carriers[name], site.standard(value))
        return {**carriers, name: carrier}, site.restore(attn, value)

    return interceptor


def _accumulate_at(name: str, site: Site) -> Callable:
    def interceptor(carriers, value):
        carrier, attn = accumulate(carriers[name], site.standard(value))
        return {**carriers, name: carrier}, site.restore(attn, value)

    def in_windows(carriers, value):
        windows = site.windows
        assert windows is not None
        rows = jax.tree.map(windows.gather, carriers[name])
        maps = jnp.moveaxis(windows.apart(value), 2, 1)
        moved, attn = accumulate(rows, maps.reshape(-1, *maps.shape[2:]))
        carrier = jax.tree.map(windows.scatter, moved, carriers[name])
        attn = jnp.moveaxis(attn.reshape(maps.shape), 1, 2)
        return {**carriers, name: carrier}, windows.together(attn, value.shape)

    by_window = site.windows is not None and site.windows.is_partition
    return in_windows if by_window else interceptor


def _weigh_at(name: str, site: Site, importance: Callable) -> Callable:
    batch, _, tokens, _ = site.shape

    def interceptor(carriers, total, before, after):
        rows = [x.reshape(batch, tokens, -1) for x in (total, before, after)]
        carrier, weighed = weigh_sum(carriers[name], rows[0], rows[1], rows[2], importance)
        return {**carriers, name: carrier}, weighed.reshape(total.shape)

    return interceptor


def _stacked(
    traced: Traced,
    stacks: list[Stack],
    methods: tuple[str, ...],
    target_tokens: Mapping,
    some: Mapping[str, Any],
    importance: Any,
    by_lrp: Callable | None,
) -> tuple[Any, dict]:
    """All maps and gradients of all layers, and every method's rows or matrices from them."""
    weighted = "weighted" in methods
    taps: dict[Any, str] = {}
    for what in ("value", "before", "after", "total") if weighted else ("value",):
        for site in (site for stack in stacks for site in stack.sites):
            # One value may serve twice: a stream is often the sum of the layer before.
            taps.setdefault(_value(site, what), f"{len(taps)}:{what}")
    for pooling in (x for x in target_tokens.values() if isinstance(x, Site)):
        taps.setdefault(pooling.value, f"{len(taps)}:value")
    out, values, grads = taps_with_grad(traced, taps, "attention.relevance")
    found = {}
    if by_lrp is not None:
        found = by_lrp({value: name for value, name in taps.items() if name.endswith(":value")})
    result: dict = {method: {} for method in methods}
    for stack in stacks:
        layers = functools.partial(_layers, stack, taps)
        grad, given = layers(grads, "value"), {}
        if weighted:
            given = {
                "before": layers(values, "before"),
                "after": layers(values, "after"),
                "value_grad": layers(grads, "total"),
            }
        index = target_tokens[stack.name]
        for method in (TABLE[name] for name in methods):
            read = found if method.by_lrp else values
            maps = layers(read, "value")
            chosen = {what: _of_stack(one, stack) for what, one in some.items()}
            matrix = functools.partial(_matrix, method, maps, grad, given, importance, chosen)
            if isinstance(index, Site):
                map_of, grad_of = (index.standard(x[taps[index.value]]) for x in (read, grads))
                last = chosen["layers"] is None
                relevance = pooled_row(method, matrix, map_of, grad_of, last=last)
            else:
                relevance = matrix() if index is None else row(matrix(), index)
            result[method.name][stack.name] = relevance
    return out, result


def _of_stack(chosen: Any, stack: Stack) -> Any:
    return chosen[stack.name] if isinstance(chosen, Mapping) else chosen


def _matrix(
    method: Method, maps: Any, grad: Any, values: Mapping, importance: Any, chosen: Mapping
) -> Any:
    """A method's relevance matrix, of layers and heads that are named or masked."""
    masks = {what: x for what, x in chosen.items() if is_mask(x)}
    named = {what: as_indices(x, what) for what, x in chosen.items() if what not in masks}
    counts = None
    if masks:
        kept, counts = only({"attn": maps, "grad": grad, **values}, **masks)
        maps, grad = kept.pop("attn"), kept.pop("grad")
        values = kept
    if counts is not None and not method.residual:
        # Without a residual stream a layer of zeros would take all; the identity changes nothing.
        counts = counts[:, None, None, None, None]
        maps = jnp.where(counts, maps, jnp.eye(maps.shape[-1], dtype=maps.dtype))
        grad = jnp.where(counts, grad, 1)
    options = {**values, "importance": importance} if values else {}
    return method.relevance_matrix(maps, grad, options, **named)


def _value(site: Site, what: str) -> Any:
    return site.value if what == "value" else getattr(site.residual, what)


def _layers(stack: Stack, taps: Mapping, found: Mapping, what: str) -> Any:
    """Tapped values of a stack as [layers, batch, ...], in order of execution."""
    values, stages = [], []
    for site in stack.sites:
        value = _value(site, what)
        x = found[taps[value]]
        values.append(site.stacked(x) if what == "value" else site.stacked_values(x))
        stages += list(site.stages())
    stacked = jnp.concatenate(values)
    order = sorted(range(len(stages)), key=stages.__getitem__)
    return stacked if order == list(range(len(order))) else stacked[np.asarray(order)]
