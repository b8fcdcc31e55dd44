"""Which stacks of attention are explained, and which cannot be."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrel.attention.discovery import Site, Stack
from jaxrel.attention.maps import token_index
from jaxrel.attention.methods import TABLE
from jaxrel.attention.pooling import Pooling, find_pooling
from jaxrel.attention.tagged import tagged_stack
from jaxrel.tracing.axes import roots, same
from jaxrel.tracing.graph import Traced


def check_branches(stacks: list[Stack], methods: tuple[str, ...], layers: Any) -> None:
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


def choose_stacks(
    traced: Traced, everything: Sequence[Stack], attention: Any, methods: Sequence[str]
) -> list[Stack]:
    """The stacks that are explained.

    Args:
      traced: the call.
      everything: the stacks that were found in it.
      attention: the names asked for; None for the only self-attention there is.
      methods: names of `methods.TABLE`; those that read token values need a residual stream.

    Raises:
      ValueError, NotImplementedError: as `attention.relevance`.
    """
    needing = next((name for name in methods if "values" in TABLE[name].needs), None)
    found = {stack.name: stack for stack in everything}
    if attention is None:
        names = [name for name, stack in found.items() if stack.is_self]
        for name in names:
            _check_tokens(name, found[name])
        # Parts of tokens that are not known may be another stream's self-attention.
        parts = [name for name, stack in found.items() if name not in names and _in_parts(stack)]
        if len(names) != 1 or parts:
            problem = "no self-attention was found" if not names else "several were found"
            if len(names) == 1:
                problem = f"whether {parts[0]!r} is self-attention beside {names[0]!r} is not known"
            raise ValueError(
                f"attention.relevance: {problem}; name what is meant with attention=..., a tag of "
                f"the maps or one of these: {_listing(found)}{_hints(found.values())}"
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
        if needing and not stack.has_residual:
            raise ValueError(
                f"attention.relevance: method {needing!r} needs the residual stream around "
                f"{name!r}, and none was found near {stack.sites[0].where}; tag the map {name!r}, "
                f"the stream before the attention {name + '/before'!r} and the attention's output "
                f"{name + '/after'!r}, both [batch, tokens, width], where they are added (all in "
                "one scan or remat body: put the sum inside the jax.checkpoint), and say "
                f"attention={name!r}; or say with argnums which arguments are data, or use method "
                "'equal'"
            )
        if needing and whole:
            _check_streams(name, stack)
        stacks.append(stack)
    if needing:
        _check_sums(stacks, needing)
    for stack in stacks:
        _check_examples(traced, stack)
    return stacks


def _hints(stacks: Collection[Stack]) -> str:
    """What else is to be done where no stack can be chosen for the user."""
    hints = ""
    totals = [site.residual.total for stack in stacks for site in stack.sites if site.residual]
    if len({*totals}) < len(totals):
        hints += (
            ". Those that meet in one sum may be heads of one layer, and one of them is not the "
            "layer: compute the heads together, with einsum or jax.vmap"
        )
    if any(not stack.is_self for stack in stacks):
        hints += (
            ". For two streams of which one reads the other use "
            "attention.value_and_bimodal_relevance(fun, method=..., target_token=...)"
        )
    return hints


def _in_parts(stack: Stack) -> bool:
    """Whether its maps may be self-attention within parts of the tokens that are not known."""
    return any(site.in_parts and site.shape[-1] == site.shape[-2] for site in stack.sites)


def _check_streams(name: str, stack: Stack) -> None:
    """Tagged values are read as [batch, tokens, width]; none may be in another order unsaid."""
    for site in stack.sites:
        batch, _, tokens, _ = site.shape
        shape = site.residual.before.shape if site.residual else ()
        fits = batch * tokens == math.prod(shape[:-1])
        if not fits or batch not in (1, shape[0], shape[0] / tokens):
            raise ValueError(
                f"attention.relevance: the values tagged {name + '/before'!r} and "
                f"{name + '/after'!r} must be [batch, tokens, width] = ({batch}, {tokens}, width), "
                f"got {shape}; move their axes before the tag"
            )


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


def _check_examples(traced: Traced, stack: Stack) -> None:
    """Warn of a score whose examples look like parts of the tokens, since it is summed over them.

    Windows lie in one axis of the data, or move from layer to layer; examples do neither.
    """
    windows = [site.windows for site in stack.sites]
    first = windows[0]
    if first is None or traced.graph.outs[0].shape or len(first.rows) == 1:
        return
    alike = all(one is not None and np.array_equal(one.rows, first.rows) for one in windows)
    begun = {(root.source, root.axis) for root in roots(first.stream[:1])}
    if alike and begun <= {(value, 0) for value in traced.graph.ins}:
        count, tokens = first.rows.shape
        warnings.warn(
            f"attention.relevance: the function returns one scalar, and {stack.name!r} attends "
            f"within {count} parts of {tokens} tokens, which are explained as one example of "
            f"{first.tokens} tokens: if the parts are examples, return one score for each, as in "
            "lambda x: fun(x)[:, target], without the sum over the batch",
            stacklevel=2,
        )


def _check_sums(stacks: list[Stack], method: str) -> None:
    """Two branches are weighed against each other; a sum of three has no such weights."""
    sums: dict[Any, Site] = {}
    for site in (site for stack in stacks for site in stack.sites):
        total = site.residual and site.residual.total
        if total in sums:
            raise ValueError(
                f"attention.relevance: method {method!r} weighs one attention against the stream, "
                f"and those at {sums[total].where} and {site.where} meet in one sum; add them to "
                "the stream one after the other, or use method 'equal'"
            )
        sums[total] = site


def _listing(found: Mapping[str, Stack]) -> str:
    return "; ".join(map(str, found.values())) or "none (see jaxrel.attention.sites)"


def target_token_of(traced: Traced, target_token: Any, stack: Stack) -> Any:
    """The target token of each example of a stack; None for all tokens, or a pooling map's site.

    Raises:
      ValueError: the stack is not named, or a token does not exist.
    """
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
    index = token_index(target_token, batch=batch, tokens=tokens)
    if not isinstance(target_token, jax.core.Tracer):
        _check_read(stack, np.unique(np.asarray(target_token) % tokens))
    return index


def _check_read(stack: Stack, asked: np.ndarray) -> None:
    """Warn of target tokens where the function reads its output from others."""
    read = stack.read
    if read is None or len(asked) != 1 or (read == asked).all():
        return
    if len(read) == 1:
        what, cure = f"token {read[0]} alone", f"give target_token={read[0]}"
    else:
        some = ", ".join(map(str, read[:3])) + (", ..." if len(read) > 3 else "")
        what = f"{len(read)} tokens ({some})"
        rows = "" if len(read) == stack.sites[0].shape[-1] else f"[:, {read.tolist()}]"
        cure = (
            "give target_token=None, which returns the row of each token; where their mean is "
            f"read, its relevance is the mean of their rows, relevance{rows}.mean(axis=1)"
        )
    warnings.warn(
        f"attention.relevance: after the last layer of {stack.name!r} the function reads {what}, "
        f"and target_token={asked[0]} gives the relevance of token {asked[0]}: {cure}",
        stacklevel=2,
    )
