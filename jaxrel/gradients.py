"""Gradient methods, each a function transformation as `jaxrel.lrp` is one.

All explain a function that returns one real array whose first axis is the batch, `[batch]` or
`[batch, classes]`, say; examples do not mix. `seed` says which part of the output is explained: it
is the cotangent that goes backward, an array of the output's shape or a function of the output that
returns one. By default it is ones, which gives the gradient of `sum(out)`. `target` says the same
by an index along the output's last axis, one for all examples or one each: `target=3` is
`seed=one_hot(3)`. Nothing is differentiated through the seed.

`at` names tags, `jaxrel.tag(x, name)`, whose values are explained beside the argument or, with
`argnums=None`, alone: a result is then `(of the argument, {name: of the tag})`, or the dict, as of
`jaxrel.lrp`. Where a method changes its input (noise, a path from a baseline) it changes the tagged
value in the same way.

Results have the structure of the explained argument and are float32 (float64 for float64
values); integers in it get zeros. Wrap the transformed function in `jit`: tracing happens at
every call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.propagation import composites
from jaxrel.propagation.convolutions import quick_steps
from jaxrel.propagation.lrp import explained_vjp
from jaxrel.tracing.capture import find_tags, gather, tap_names
from jaxrel.tracing.evaluate import Edits, Step, evaluate, tap_shapes
from jaxrel.tracing.flow import dependents
from jaxrel.tracing.graph import Graph, Node, Value, trace
from jaxrel.tracing.pullback import Call, check_output, pullback, seed_cotangent, seed_of

Argnums = int | Sequence[int]
At = Any


def gradient(fun: Callable, *, argnums: Argnums | None = 0, at: At = ()) -> Callable:
    """The gradient of a function's output by its input (Simonyan et al. 2014).

    It says what a small change of the input would change; `input_x_gradient`, what the input
    itself contributes.

    Args:
      fun: a JAX function that returns one real array.
      argnums: the argument or arguments that are explained; None for tags alone.
      at: names of tags that are explained too.

    Returns:
      A function `(*args, seed=None, target=None)`; see the module for these and the result.

    Raises:
      TypeError: (when called) the output is not one real array; nothing explained is real.
      ValueError: (when called) an argument or a tag that is not there; a seed of the wrong shape.
    """

    def transform(fun: Callable, argnums: Argnums) -> Callable:
        def explained(*args, seed: Any = None, target: Any = None):
            call = Call.of("gradient", fun, args, argnums)
            seed = seed_of("gradient", seed, target, relevance=False)
            return _gather(call, _gradient(call, _explained(call), seed))

        return explained

    return _explains("gradient", transform, fun, argnums, at)


def input_x_gradient(fun: Callable, *, argnums: Argnums | None = 0, at: At = ()) -> Callable:
    """The input times the gradient (Shrikumar et al. 2016).

    For functions that scale with their input, such as ReLU networks without biases, it sums to
    the explained output. The arguments, results and errors are those of `gradient`.
    """

    def transform(fun: Callable, argnums: Argnums) -> Callable:
        def explained(*args, seed: Any = None, target: Any = None):
            call = Call.of("input_x_gradient", fun, args, argnums)
            xs = _explained(call)
            seed = seed_of("input_x_gradient", seed, target, relevance=False)
            gradients = _gradient(call, xs, seed)
            return _gather(call, [_wide(x) * g for x, g in zip(xs, gradients, strict=True)])

        return explained

    return _explains("input_x_gradient", transform, fun, argnums, at)


def smooth_grad(
    fun: Callable,
    *,
    argnums: Argnums | None = 0,
    at: At = (),
    noise: float = 0.15,
    samples: int = 32,
    squared: bool = False,
) -> Callable:
    """The mean gradient at noisy copies of the input (Smilkov et al. 2017, section 3).

    Gaussian noise with a standard deviation of `noise * (max(x) - min(x))`, where the range is
    each example's own in each array. All examples of a batch get the same draws, scaled, so that
    an explanation does not depend on what else is in the batch. One compiled loop: the memory is
    that of one gradient, whatever the number of samples.

    Args:
      fun: as in `gradient`. If it returns a scalar, the whole input is one example.
      argnums: as in `gradient`. The explained arrays have the batch as their first axis.
      at: as in `gradient`.
      noise: the noise's standard deviation, relative to the range; the paper uses 0.1 to 0.2.
      samples: the number of noisy copies.
      squared: average the squared gradients (SmoothGrad-squared, Hooker et al. 2019).

    Returns:
      A function `(key, *args, seed=None, target=None)`; `key` is a PRNG key, which may be given by
      name, and `argnums` count the arguments after it. A seed that is a function is called once,
      with the output at the input itself.

    Raises:
      TypeError: (when called) as for `gradient`; `key` is not a PRNG key.
      ValueError: `noise` is negative or `samples` less than 1; (when called) as for `gradient`;
        the batch sizes of the input and the output differ.
    """
    if not noise >= 0:
        raise ValueError(f"smooth_grad: noise must be 0 or more, got {noise}")
    _check_count("smooth_grad", "samples", samples)

    def transform(fun: Callable, argnums: Argnums) -> Callable:
        def explained(*args, key: Any, seed: Any = None, target: Any = None):
            call = Call.of("smooth_grad", fun, args, argnums)
            seed = seed_of("smooth_grad", seed, target, relevance=False)
            xs, seed = _explained(call), _fixed(call, seed)
            scales = [noise * span for span in _ranges(call)]
            batched = len(_out(call).shape) > 0
            quick = quick_steps(call.traced.graph)

            def step(total, key):
                keys = jax.random.split(key, len(xs))
                noisy = [
                    x + (scale * _draw(key, x, batched)).astype(x.dtype)
                    for key, x, scale in zip(keys, xs, scales, strict=True)
                ]
                gradients = _gradient(call, noisy, seed, quick)
                return _add(total, [g * g for g in gradients] if squared else gradients), None

            total, _ = lax.scan(step, _zeros(xs), jax.random.split(key, samples))
            return _gather(call, [x / samples for x in total])

        return explained

    explain = _explains("smooth_grad", transform, fun, argnums, at)

    def explained(*args, key: Any = None, seed: Any = None, target: Any = None):
        if key is None and args:
            key, args = args[0], args[1:]
        _check_key(key)
        return explain(*args, key=key, seed=seed, target=target)

    return explained


def integrated_gradients(
    fun: Callable,
    *,
    argnums: Argnums | None = 0,
    at: At = (),
    steps: int = 64,
    baseline: Any = 0.0,
) -> Callable:
    """Gradients integrated on the straight line from a baseline (Sundararajan et al. 2017).

    `(x - b) * mean over a of grad(b + a (x - b))` (equations 1 and 3), with `a` at the midpoints
    of `steps` equal intervals. Complete: it sums to the explained output at the input less that
    at the baseline, up to an error that falls with the square of `steps` where the function is
    smooth. One compiled loop: the memory is that of one gradient, whatever the number of steps.

    Args:
      fun: as in `gradient`.
      argnums: as in `gradient`; several arguments move on the line together.
      at: as in `gradient`; each tagged value moves on a line of its own, from the same baseline.
      steps: the number of gradients.
      baseline: what stands for the absence of a signal: a number, an array that broadcasts to
        the explained argument, or a pytree of these whose structure is the argument's or a
        prefix of it (a tuple, for several arguments).

    Returns:
      A function `(*args, seed=None, target=None)`; see the module. A seed that is a function is
      called once, with the output at the input itself.

    Raises:
      TypeError: (when called) as for `gradient`.
      ValueError: `steps` is less than 1; (when called) as for `gradient`; a baseline that does
        not fit.
    """
    _check_count("integrated_gradients", "steps", steps)

    def transform(fun: Callable, argnums: Argnums) -> Callable:
        def explained(*args, seed: Any = None, target: Any = None):
            call = Call.of("integrated_gradients", fun, args, argnums)
            seed = seed_of("integrated_gradients", seed, target, relevance=False)
            xs, seed = _explained(call), _fixed(call, seed)
            starts = _starts(call, baseline)
            ways = [_wide(x) - start for x, start in zip(xs, starts, strict=True)]
            quick = quick_steps(call.traced.graph)

            def step(total, a):
                points = [
                    (start + a.astype(way.dtype) * way).astype(x.dtype)
                    for x, start, way in zip(xs, starts, ways, strict=True)
                ]
                return _add(total, _gradient(call, points, seed, quick)), None

            total, _ = lax.scan(step, _zeros(xs), (jnp.arange(steps) + 0.5) / steps)
            return _gather(call, [way * x / steps for way, x in zip(ways, total, strict=True)])

        return explained

    return _explains("integrated_gradients", transform, fun, argnums, at)


def guided_backprop(fun: Callable, *, argnums: Argnums | None = 0, at: At = ()) -> Callable:
    """Guided backpropagation (Springenberg et al. 2015, section 3.4).

    The gradient, but every activation function passes only positive cotangents on. It shows
    edges rather than reasons: it depends little on the seed, and little on the weights above
    (Adebayo et al. 2018).

    Args:
      fun: a JAX function that returns one real array.
      argnums: the argument or arguments that are explained; None for tags alone.
      at: names of tags that are explained too.

    Returns:
      A function `(*args, seed=None, target=None)`; see the module for these and the result.

    Raises:
      TypeError, ValueError, NotImplementedError: (when called) as for `jaxrel.lrp`.
    """
    return _modified("guided_backprop", fun, composites.guided_backprop(), argnums, at)


def deconvnet(fun: Callable, *, argnums: Argnums | None = 0, at: At = ()) -> Callable:
    """The deconvolutional network's backward pass (Zeiler and Fergus 2014).

    The gradient, but every activation function's derivative is replaced: it passes positive
    cotangents on, whatever its input was. The arguments, results and errors are those of
    `guided_backprop`.
    """
    return _modified("deconvnet", fun, composites.deconvnet(), argnums, at)


def grad_cam(fun: Callable, layer: str, *, size: tuple[int, ...] | None = None) -> Callable:
    """Grad-CAM: where a layer's feature maps speak for the output (Selvaraju et al. 2017).

    `max(sum over c of w_c A_c, 0)` with `w_c` the mean over positions of the gradient by `A_c`
    (equations 1 and 2). One forward and one backward pass.

    Args:
      fun: a JAX function that returns one real array. In it, `A = jaxrel.tag(A, layer)` marks
        the feature maps `[batch, *positions, channels]`: `[batch, h, w, channels]` of images,
        `[batch, tokens, channels]` of tokens or sequences, `[batch, d, h, w, channels]` of
        volumes or videos.
      layer: the tag's name.
      size: resize the maps to (H, W), or to (D, H, W), linearly along each axis; by default they
        have the layer's resolution.

    Returns:
      A function `(*args, seed=None, target=None)`, which returns maps, 0 or more, `[batch,
      *positions]`, in float32 (float64 for float64 values). See the module for the seed.

    Raises:
      TypeError: (when called) the output or what is tagged is not one real array.
      ValueError: `size` is not two or more positive integers; (when called) no value, or several,
        or one in a scan, has the tag; the value has other axes, or the output does not depend on
        it; a seed of the wrong shape; `size` was given for tokens, or has not a number for each
        axis of the positions.
      NotImplementedError: (when called) as for `jaxrel.capture`.
    """
    return _grad_cam("grad_cam", fun, layer, size)


def guided_grad_cam(fun: Callable, layer: str, *, argnums: int = 0) -> Callable:
    """Guided backpropagation times Grad-CAM (Selvaraju et al. 2017, section 3.2).

    The details are those of `guided_backprop`, the place is that of `grad_cam`, resized to the
    image bilinearly. Two forward and two backward passes.

    Args:
      fun: as in `grad_cam`, with feature maps `[batch, h, w, channels]`.
      layer: the tag's name.
      argnums: the argument that holds the images, `[batch, height, width, channels]`, or the
        volumes, `[batch, depth, height, width, channels]`.

    Returns:
      A function `(*args, seed=None, target=None)`, which returns relevance of the image's shape.
      See the module for the seed.

    Raises:
      TypeError, ValueError, NotImplementedError: (when called) as for `guided_backprop` and
        `grad_cam`; the explained argument is not one array with these axes.
    """
    guided = _modified("guided_grad_cam", fun, composites.guided_backprop(), argnums)

    def explained(*args, seed: Any = None, target: Any = None):
        seed = seed_of("guided_grad_cam", seed, target, relevance=False)
        details = guided(*args, seed=seed)
        shape = getattr(details, "shape", None)
        if shape is None or len(shape) not in (4, 5):
            raise ValueError(
                "guided_grad_cam: the explained argument must be images [batch, height, width, "
                f"channels], got {jax.tree.map(jnp.shape, details)}"
            )
        place = _grad_cam("guided_grad_cam", fun, layer, shape[1:-1])(*args, seed=seed)
        return details * place[..., None]

    return explained


def class_activation(maps: Array, gradients: Array) -> Array:
    """Grad-CAM of feature maps whose gradients are known (Selvaraju et al. 2017, eq. 1 and 2).

    Args:
      maps: [batch, *positions, channels].
      gradients: of their shape, with further axes in front if several outputs are explained.

    Returns:
      `max(sum over c of w_c A_c, 0)`, `w_c` the mean gradient over positions, of the gradients'
      shape without channels.
    """
    weights = gradients.mean(tuple(range(1 - maps.ndim, -1)), keepdims=True)
    return jnp.maximum((weights * maps).sum(-1), 0)


def _out(call: Call) -> Any:
    """Shape and dtype of the output."""
    return call.traced.graph.outs[0].aval


def _explained(call: Call) -> list:
    """The real arrays that are explained."""
    return [call.traced.args[i] for i in call.explained()]


def _gradient(call: Call, xs: list, seed: Any, steps: Mapping[Node, Step] | None = None) -> list:
    """The gradient at other values of the explained arrays, wide enough to be summed."""
    args, by = [*call.traced.args], call.explained()
    for i, x in zip(by, xs, strict=True):
        args[i] = x
    evaluated, back = pullback(call.traced.graph, args, Edits(steps or {}), by=by)
    return [_wide(g) for g in back(seed_cotangent(call.caller, evaluated.outs[0], seed)).args]


def _fixed(call: Call, seed: Any) -> Any:
    """The seed for the unchanged input: what is explained must not change on the way."""
    if not callable(seed):
        return seed
    out = evaluate(call.traced.graph, call.traced.args).outs[0]
    return seed_cotangent(call.caller, out, seed)


def _gather(call: Call, relevance: list) -> Any:
    """Relevance of the explained arrays in the structure of what is explained."""
    return call.gather(dict(zip(call.explained(), relevance, strict=True)))


def _ranges(call: Call) -> list:
    """max - min of each array: of each example, or of all where the output is a scalar."""
    found, out = [], _out(call)
    for x in _explained(call):
        if out.shape and x.shape[:1] != out.shape[:1]:
            raise ValueError(
                f"{call.caller}: the input has shape {x.shape} and the output {out.shape}; the "
                "first axis of both must be the batch, as noise is relative to each example's "
                "range. For a function of one example, give it a batch of one: "
                "lambda x: fun(x[0])[None], called with x[None]"
            )
        axes = tuple(range(1 if out.shape else 0, x.ndim))
        x = _wide(x)
        found.append(x.max(axes, keepdims=True) - x.min(axes, keepdims=True))
    return found


def _starts(call: Call, baseline: Any) -> list:
    """The baseline of every explained array, of its shape."""
    args, chosen = call.traced.args, call.chosen()
    whole = jax.tree.unflatten(call.structure(), chosen)
    try:
        leaves = jax.tree.leaves(jax.tree.broadcast(baseline, whole))
        pairs = zip(chosen, leaves, strict=True)
        spread = {i: jnp.broadcast_to(leaf, args[i].shape) for i, leaf in pairs}
    except ValueError as error:
        shapes = jax.tree.map(lambda i: args[i].shape, whole)
        raise ValueError(
            f"{call.caller}: the baseline, {jax.tree.map(jnp.shape, baseline)}, does not "
            f"broadcast to the explained argument, {shapes}"
        ) from error
    return [spread[i].astype(_wide(args[i]).dtype) for i in call.explained()]


def _modified(
    name: str, fun: Callable, composite: Any, argnums: Argnums | None, at: At = ()
) -> Callable:
    def transform(fun: Callable, argnums: Argnums) -> Callable:
        run = explained_vjp(name, fun, composite, argnums=argnums, gradient=True)

        def explained(*args, seed: Any = None, target: Any = None):
            seed = seed_of(name, seed, target, relevance=False)
            return jax.tree.map(_wide, run(*args)[1](seed))

        return explained

    return _explains(name, transform, fun, argnums, at)


def _explains(
    name: str, transform: Callable, fun: Callable, argnums: Argnums | None, at: At
) -> Callable:
    """A method of arguments, as one of arguments and of tagged values."""
    names = (at,) if isinstance(at, str) else tuple(at)
    if argnums is None and not names:
        raise ValueError(f"{name}: argnums=None explains no argument; name a tag with at='...'")
    if not all(isinstance(one, str) for one in names):
        raise TypeError(f"{name}: at must be names of tags, jaxrel.tag(x, name), got {at!r}")

    def explained(*args, **options):
        result = None if argnums is None else transform(fun, argnums)(*args, **options)
        if not names:
            return result
        places = _at_tags(name, transform, fun, names, args, options)
        return places if argnums is None else (result, places)

    return explained


def _at_tags(
    name: str, transform: Callable, fun: Callable, names: Sequence[str], args: tuple, options: dict
) -> dict[str, Any]:
    """The same method of the function from the tagged values on, which are its first argument."""
    traced = trace(fun, *args)
    check_output(name, traced)
    tagged = find_tags(traced.graph, names, name)
    for tag, value in tagged:
        if not jnp.issubdtype(value.aval.dtype, jnp.floating):
            raise TypeError(f"{name}: {tag!r} holds {value.aval.dtype}, not real numbers")
    edits = Edits(taps=tap_names(tagged))
    found = evaluate(traced.graph, traced.args, edits).taps

    def rest(values: dict) -> Any:
        # What is added to a tagged value makes it the one that is given.
        probes = {tap: values[tap] - lax.stop_gradient(found[tap]) for tap in found}
        (out,) = evaluate(traced.graph, traced.args, edits, probes=probes).outs
        return out

    return gather(tagged, transform(rest, 0)(found, **options))


def _grad_cam(name: str, fun: Callable, layer: str, size: Any) -> Callable:
    size = None if size is None else tuple(size)
    if size is not None and not (len(size) >= 2 and all(_is_count(n) for n in size)):
        raise ValueError(
            f"{name}: size must be (height, width), or (depth, height, width) of volumes: "
            f"two positive ints, got {size}"
            if len(size) < 3
            else f"{name}: size must be positive ints, got {size}"
        )

    def explained(*args, seed: Any = None, target: Any = None):
        traced = trace(fun, *args)
        check_output(name, traced)
        seed = seed_of(name, seed, target, relevance=False)
        taps = {_feature_maps(name, traced.graph, layer, size): layer}
        evaluated, back = pullback(traced.graph, traced.args, Edits(taps=taps))
        gradients = back(seed_cotangent(name, evaluated.outs[0], seed)).taps
        cam = class_activation(_wide(evaluated.taps[layer]), _wide(gradients[layer]))
        return cam if size is None else jax.image.resize(cam, (len(cam), *size), "bilinear")

    return explained


def _feature_maps(name: str, graph: Graph, layer: str, size: Any) -> Value:
    """The one value with the tag, checked."""
    tagged = [value for _, value in find_tags(graph, layer, name)]
    value = tagged[0]
    if len(tagged) > 1:
        raise ValueError(
            f"{name}: {len(tagged)} values are tagged {layer!r}; give the layer that is wanted "
            "a name of its own"
        )
    shape = tap_shapes(graph, {value: layer})[layer].shape
    if len(shape) > len(value.shape):
        raise ValueError(
            f"{name}: {layer!r} is tagged inside a scan, in each of its {shape[0]} steps; tag what "
            "is wanted after the scan"
        )
    if not jnp.issubdtype(value.aval.dtype, jnp.floating):
        raise TypeError(f"{name}: {layer!r} holds {value.aval.dtype}, not real numbers")
    out = graph.outs[0]
    batch_differs = out.shape and value.shape[:1] != out.shape[:1]
    if len(value.shape) < 3 or batch_differs:
        raise ValueError(
            f"{name}: {layer!r} must be feature maps [batch, *positions, channels], such as "
            f"[batch, h, w, channels] or tokens [batch, tokens, channels], got shape "
            f"{value.shape} for an output of shape {out.shape}"
        )
    if size is not None and len(value.shape) == 3:
        raise ValueError(
            f"{name}: {layer!r} holds tokens, shape {value.shape}, and only feature maps "
            "[batch, h, w, channels] can be resized; reshape the tokens to a grid and tag that"
        )
    if size is not None and len(size) != len(value.shape) - 2:
        raise ValueError(
            f"{name}: size {size} must have a number for each axis of the positions in {layer!r}, "
            f"shape {value.shape}"
        )
    if out not in dependents(graph, [value]):
        raise ValueError(
            f"{name}: the output does not depend on the value tagged {layer!r}; go on with what "
            f"tag returns: x = jaxrel.tag(x, {layer!r})"
        )
    return value


def _wide(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _zeros(xs: list) -> list:
    return [jnp.zeros_like(_wide(x)) for x in xs]


def _add(total: list, more: list) -> list:
    return [x + y for x, y in zip(total, more, strict=True)]


def _draw(key: Any, x: Any, batched: bool) -> Any:
    """Gaussian noise for one example, to be shared by all of them."""
    return jax.random.normal(key, x.shape[1:] if batched else x.shape, _wide(x).dtype)


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and key.ndim == 0) and not (dtype == jnp.uint32 and key.ndim == 1):
        got = jax.typeof(key).str_short() if dtype is not None else type(key).__name__
        raise TypeError(
            f"smooth_grad: the first argument must be a PRNG key, jax.random.key(0), got {got}"
        )


def _check_count(name: str, what: str, count: Any) -> None:
    if not _is_count(count):
        raise ValueError(f"{name}: {what} must be an int, 1 or more, got {count!r}")


def _is_count(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count >= 1
