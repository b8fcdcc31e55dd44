"""Everything that depends on the names, parameters and versions of JAX's primitives.

No other module names a primitive, reads an equation's parameters, or imports from `jax.extend`
and `jax.interpreters`; they ask here. With `JAX_REMAT3` and `JAX_CUSTOM_VJP3`, JAX traces
`jax.checkpoint` and `jax.custom_vjp` as one primitive, `call_hi_primitive`, that holds an object (a
"hijax primitive"). Such an equation has the name that the operation has without these flags.

`SINCE` and `UNTIL` list the names that not all supported versions of JAX have.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The first JAX that has a name, and the first that no longer has it.
SINCE = dict.fromkeys(_names("log2 one_minus_square xla_metadata_call"), (0, 11))
UNTIL = dict.fromkeys(_names("call closed_call core_map"), (0, 11))

# Calls that group operations and mean nothing else; the rule that `custom_vmap` adds is another
# way of computing the same function.
INLINED = _names("jit call closed_call eval_jaxpr custom_vmap_call xla_metadata_call")

# Control flow whose bodies can be run again with changes inside.
SCAN, WHILE, COND, REMAT = map(_names, ("scan", "while", "cond", "remat2"))
CONTROL = SCAN | WHILE | COND | REMAT

# Functions with a derivative of their own.
CUSTOM_JVP = _names("custom_jvp_call")
CUSTOM_VJP = _names("custom_vjp_call")
CUSTOM = CUSTOM_JVP | CUSTOM_VJP

# Programs whose operations cannot be seen, or not be replaced.
KERNELS = _names(
    """pallas_call core_map mpmd_map ffi_call cudnn_fusion call_exported
    dot_product_attention_fwd dot_product_attention_fwd_wrapper dot_product_attention_bwd
    dot_product_attention_bwd_wrapper dot_product_attention_fp8_fwd
    dot_product_attention_fp8_fwd_wrapper dot_product_attention_fp8_bwd
    dot_product_attention_fp8_bwd_wrapper scaled_matmul scaled_matmul_wrapper"""
)
CALLBACKS = _names("pure_callback io_callback")
SHARD_MAP = _names("shard_map")
# Programs that hold others and may stand beside attention without hiding any.
TRANSPARENT = CUSTOM | _names(
    """custom_lin reduce reduce_window scatter scatter-add scatter-sub scatter-mul scatter-max
    scatter-min"""
)

# Families of operations; each module combines those it needs.
ADD = _names("add add_any")
SUB = _names("sub")
SUMS = ADD | SUB
NEG, MUL, DIV, EXP, EXPM1 = map(_names, ("neg", "mul", "div", "exp", "expm1"))
SCALES = MUL | DIV
# A constant to the power of a value: `exponent` says which operand that is.
EXPONENTIALS = EXP | _names("exp2 pow")
LOG, ABS, MAX, MIN = map(_names, ("log", "abs", "max", "min"))
SCATTER_ADD = _names("scatter-add")
SCATTER_EXTREMA = _names("scatter-max scatter-min")
SELECT = _names("select_n")
SIGMOID = _names("logistic")
ROOTS = _names("sqrt rsqrt pow")
DOT = _names("dot_general")
CONV = _names("conv_general_dilated")
LINEAR = DOT | CONV
REDUCE_SUM = _names("reduce_sum")
CUMSUM = _names("cumsum")
MEANS = REDUCE_SUM | _names("reduce_window_sum")
MAXIMA = _names("reduce_max reduce_window_max")
REDUCE_PROD = _names("reduce_prod")
TRANSPOSE = _names("transpose")
BROADCAST, IOTA = map(_names, ("broadcast_in_dim", "iota"))
SLICES = _names("slice dynamic_slice split")
CONCATENATE = _names("concatenate")
RESHAPES = _names("reshape squeeze")
# What picks entries by indices: which axis is which afterwards is not said by their order.
PICKS = _names("gather stack unstack top_k")
# Where arrays are stored, and what keeps the compiler from moving operations.
KEEPS = _names("sharding_constraint reshard optimization_barrier device_put")
CUTS = _names("slice")
# What may put the entries of an axis into another order and leave as many of them.
REORDERS = _names("rev pad")
POWERS = _names("integer_pow pow")
LOOKUPS = _names("gather dynamic_slice")
TAG, STOP_GRADIENT = map(_names, ("jaxrel_tag name", "stop_gradient"))
RANDOM = _names("random_bits threefry2x32 rng_bit_generator")

# Operations that move or retype values and change none of them.
MOVES = (
    TAG | TRANSPOSE | BROADCAST | RESHAPES | _names("copy convert_element_type reduce_precision")
)
# One output value per position, computed from the inputs at that position alone. Tags are not
# among them, so that a tagged value is never in the middle of what counts as one function.
ELEMENTWISE = (
    SUMS
    | SCALES
    | ROOTS
    | _names(
        """abs neg sign exp exp2 expm1 log log1p log2 tanh tan sin cos sinh cosh asin acos atan
        asinh acosh atanh logistic cbrt square one_minus_square integer_pow erf erfc erf_inv
        lgamma digamma floor ceil round max min rem select_n clamp convert_element_type copy
        reduce_precision nextafter atan2"""
    )
)
# Elementwise and affine in the one input that varies.
AFFINE = SUMS | SCALES | _names("neg copy convert_element_type reduce_precision select_n")
EQUAL, SORT = map(_names, ("eq", "sort"))
# Constant but for jumps: of a statistic, such a value is a mask.
STEPS = _names("sign floor ceil round")
COMPARISONS = _names("eq ne lt le gt ge and or not xor is_finite")
REDUCTIONS = MEANS | MAXIMA | REDUCE_PROD | _names("reduce_min cumsum cummax cumprod cumlogsumexp")
# Each output is the input at its place, moved.
SIDE_BY_SIDE = SORT | _names("optimization_barrier device_put psum pmax pmin")
# What picks and places values, whole or in part.
PLACES = _names(
    """rev slice dynamic_slice split concatenate stack unstack tile pad gather
    optimization_barrier device_put"""
)
SCATTERS = _names("scatter scatter-add dynamic_update_slice")
# Values that are clipped or compared with a constant keep their place.
CLIPS = MAX | MIN | _names("clamp")
# What may stand between a softmax and the product with the values: masks, dropout, clips, a
# sink cut off.
MASKING = MOVES | SELECT | SCALES | CLIPS | KEEPS | SLICES
SHAPES = MOVES | PLACES | SORT | STOP_GRADIENT
# Relevance passes these by their derivative, exactly: they add, move or select.
EXACT = (
    SHAPES
    | SUMS
    | CLIPS
    | SCATTERS
    | MEANS
    | MAXIMA
    | _names(
        """neg select_n scatter-sub scatter-max scatter-min reduce_min reduce_window_min cumsum
        cummax cummin top_k sharding_constraint reshard select_and_scatter_add
        select_and_gather_add psum psum_invariant pvary pmax pmin ppermute pbroadcast all_gather
        all_to_all reduce_scatter"""
    )
)
# What may bring in a constant beside the values that it moves or adds.
BRINGS = SUMS | SELECT | MAX | SCATTERS | _names("concatenate min pad")
# Results that are never negative; and results that are not if no input is.
NONNEG = ABS | EXP | SIGMOID | _names("exp2 square sqrt rsqrt erfc")
NONNEG_IF_ALL = SHAPES | REDUCTIONS | LINEAR | ADD | SCALES | _names("min")
# Of complex values alone, given or returned.
COMPLEX = _names("fft real imag conj complex")
# 0 at 0.
KEEPS_ZERO = _names("tanh neg square slice split")
# Linear in the operand at this place, as long as the others are constants.
LINEAR_IN = {"triangular_solve": 1, "scatter-mul": 0}


class Scan(NamedTuple):
    """The counts and settings of a scan: its inputs are constants, state and scanned arrays."""

    consts: int
    carries: int
    length: int
    reverse: bool
    unroll: int | bool


class While(NamedTuple):
    """The inputs of a while loop: constants of its test, constants of its body, then its state."""

    test_consts: int
    consts: int


class Remat(NamedTuple):
    """What is kept for the backward pass, and whether the rest must be computed again."""

    policy: Any
    prevent_cse: bool


# The hijax primitives that stand for others, by class; the rest are functions with a derivative
# of their own.
_HIJAX = {
    "RematTraced": "remat2",
    "CheckpointName": "name",
    "CheckpointNameFwd": "name",
    "CustomJVPTraced": "custom_jvp_call",
}


def _hijax(equation: Any) -> Any:
    """The hijax primitive that an equation applies, or None."""
    return equation.params.get("_prim")


def _params(equation: Any) -> dict[str, Any]:
    hijax = _hijax(equation)
    return equation.params if hijax is None else hijax.params


def name_of(equation: Any) -> str:
    """The name of an equation's operation."""
    hijax = _hijax(equation)
    if hijax is None:
        return equation.primitive.name
    return _HIJAX.get(type(hijax).__name__, "custom_vjp_call")


def scan_of(equation: Any) -> Scan | None:
    """What a scan's parameters say; None for another operation."""
    if name_of(equation) not in SCAN:
        return None
    params = equation.params
    if "ft_in" in params:  # since JAX 0.11
        consts, carries, _ = map(len, params["ft_in"].unpack())
    else:
        consts, carries = params["num_consts"], params["num_carry"]
    return Scan(consts, carries, params["length"], params["reverse"], params["unroll"])


def while_of(equation: Any) -> While | None:
    """What a while loop's parameters say; None for another operation."""
    if name_of(equation) not in WHILE:
        return None
    return While(equation.params["cond_nconsts"], equation.params["body_nconsts"])


def remat_of(equation: Any) -> Remat | None:
    """What `jax.checkpoint` was told; None for another operation."""
    if name_of(equation) not in REMAT:
        return None
    params = _params(equation)
    cse = params.get("prevent_cse", True)
    # Flags by input only guide the compiler; one flag for all computes the same.
    return Remat(params["policy"], any(cse) if isinstance(cse, Sequence) else cse)


def tag_of(equation: Any) -> str | None:
    """The name that `jaxrel.tag` or `checkpoint_name` gives; None for another operation."""
    return _params(equation)["name"] if name_of(equation) in TAG else None


def function_name(equation: Any) -> str:
    """The name of a function with a derivative of its own, or of the operation."""
    if name_of(equation) not in CUSTOM:
        return name_of(equation)
    hijax = _hijax(equation)
    if hijax is not None:
        return getattr(hijax.params.get("traced"), "fun_name", type(hijax).__name__)
    info = program(equation.params["call_jaxpr"]).jaxpr.debug_info
    return info.func_name or name_of(equation)


def contraction(equation: Any) -> tuple[tuple, tuple]:
    """The axes that a matrix product sums over, and its batch axes; each (left, right)."""
    return equation.params["dimension_numbers"]


def is_inner(equation: Any) -> bool:
    """Whether a matrix product sums over all axes but its batch axes, as a sum of squares does."""
    contracted, batch = contraction(equation)
    sides = zip((atom.aval.shape for atom in equation.invars), contracted, batch, strict=True)
    return all(
        size == 1 or axis in (*summed, *kept)
        for shape, summed, kept in sides
        for axis, size in enumerate(shape)
    )


def is_outer(equation: Any) -> bool:
    """Whether a matrix product sums over nothing, as `einsum("bd,bd->bd")` does: a product."""
    return name_of(equation) in DOT and not any(contraction(equation)[0])


def permutation(equation: Any) -> tuple[int, ...]:
    """Where each axis of a transposed array comes from."""
    return tuple(equation.params["permutation"])


def broadcast_axes(equation: Any) -> tuple[int, ...]:
    """Where the axes of a broadcast array go."""
    return tuple(map(int, equation.params["broadcast_dimensions"]))


def reduced_axes(equation: Any) -> tuple[int, ...] | None:
    """The axes that a reduction drops; None for another operation."""
    name = name_of(equation)
    reduces = name.startswith("reduce_") or name in ("argmax", "argmin")
    return (
        tuple(map(int, equation.params["axes"])) if reduces and "axes" in equation.params else None
    )


def picked_axes(equation: Any, rank: int) -> list[int | None]:
    """By axis of what is picked, the axis of the operand that it is whole; None for others."""
    name, params = name_of(equation), equation.params
    if name == "unstack" and "axis" in params:
        axes = range(len(equation.invars[0].aval.shape))
        return [axis for axis in axes if axis != params["axis"] % len(axes)]
    found: list[int | None] = [None] * rank
    if name == "stack" and "axis" in params:
        place = params["axis"] % rank
        return [None if i == place else i - (i > place) for i in range(rank)]
    if name == "gather":
        numbers, shape = params["dimension_numbers"], equation.invars[0].aval.shape
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [axis for axis in range(len(shape)) if axis not in gone]
        for place, axis in zip(numbers.offset_dims, kept, strict=True):
            if params["slice_sizes"][axis] == shape[axis]:
                found[place] = axis
    return found


def index_axes(equation: Any, rank: int) -> list[int | None]:
    """By axis of what is picked, the axis of the indices that it is; None for others."""
    found: list[int | None] = [None] * rank
    if name_of(equation) == "gather":
        offset = equation.params["dimension_numbers"].offset_dims
        places = (place for place in range(rank) if place not in offset)
        for axis, place in enumerate(places):
            found[place] = axis
    return found


def sorted_axis(equation: Any) -> int | None:
    """The axis that a sort sorts along; None for another operation."""
    return equation.params["dimension"] if name_of(equation) in SORT else None


def picked_along(equation: Any) -> int | None:
    """The one axis along which a gather picks single entries, whole in all others; else None."""
    if name_of(equation) != "gather":
        return None
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    axes, shape = numbers.start_index_map, equation.invars[0].aval.shape
    plain = len(axes) == 1 and axes == numbers.collapsed_slice_dims
    whole = all(a == b for i, (a, b) in enumerate(zip(sizes, shape, strict=True)) if i not in axes)
    return axes[0] if plain and whole and not numbers.operand_batching_dims else None


def conv_axes(equation: Any) -> tuple[tuple[int, ...], ...]:
    """A convolution's axes in image, kernel and result: batch (or output), features, space."""
    return tuple(map(tuple, equation.params["dimension_numbers"]))


def side_by_side(equation: Any) -> dict[str, Any] | None:
    """Options of the same product of patches, of a convolution whose windows fill the image."""
    params, kernel = equation.params, equation.invars[1].aval.shape
    groups = params["feature_group_count"], params["batch_group_count"]
    ones = {*groups, *params["lhs_dilation"], *params["rhs_dilation"]}
    fill = params["window_strides"] == tuple(kernel[axis] for axis in conv_axes(equation)[1][2:])
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    return options if fill and ones == {1} and not any(map(any, params["padding"])) else None


def with_kernel_order(equation: Any) -> tuple[tuple[int, ...], Callable] | None:
    """The same convolution of a kernel whose axes are in the order space, output, input.

    Returns the order that its own kernel's axes are put in, and the function of image and kernel;
    None for a convolution in groups, whose kernel holds parts.
    """
    params, numbers = equation.params, equation.params["dimension_numbers"]
    if {params["feature_group_count"], params["batch_group_count"]} != {1}:
        return None
    out, into, *space = numbers.rhs_spec
    last = len(space)
    changed = {"dimension_numbers": numbers._replace(rhs_spec=(last, last + 1, *range(last)))}
    return (*space, out, into), lambda *ins: bind(equation, ins, changed)[0]


def placed(equation: Any, axis: int) -> list[tuple[int, int | None]] | None:
    """Which inputs an operation puts side by side along an axis, and where each starts.

    None for an operation that does no such thing, or for an axis along which it does not.
    """
    name, params, ins = name_of(equation), equation.params, equation.invars
    if name == "pad":
        low, _, inner = params["padding_config"][axis]
        return [(0, int(low))] if low >= 0 and inner == 0 else None
    if name == "concatenate" and params["dimension"] == axis:
        starts: list[tuple[int, int | None]] = []
        start = 0
        for number, atom in enumerate(ins):
            starts.append((number, start))
            start += atom.aval.shape[axis]
        return starts
    if name == "dynamic_update_slice":
        start = ins[2 + axis]
        return [(0, 0), (1, int(start.val) if literal(start) else None)]
    return None


def cut(equation: Any, axis: int) -> int | None:
    """Where a slice begins along an axis; None for another operation, or one with gaps."""
    if name_of(equation) not in CUTS:
        return None
    strides = equation.params["strides"]
    whole = strides is None or strides[axis] == 1
    return int(equation.params["start_indices"][axis]) if whole else None


def selected(equation: Any, axis: int, number: int) -> slice | None:
    """What a slice, a split or a reversal takes along an axis of its input for an output.

    None for another operation.
    """
    name, params = name_of(equation), equation.params
    if name == "slice":
        step = None if params["strides"] is None else params["strides"][axis]
        return slice(params["start_indices"][axis], params["limit_indices"][axis], step)
    if name == "split":
        start = sum(params["sizes"][:number])
        along = axis == params["axis"]
        return slice(start, start + params["sizes"][number]) if along else slice(None)
    if name == "rev":
        return slice(None, None, -1 if axis in params["dimensions"] else None)
    return None


def reduced(equation: Any, shape: tuple[int, ...]) -> int:
    """How many values of an array of this shape a reduction takes together."""
    return math.prod(shape[axis] for axis in equation.params["axes"])


def is_even_power(equation: Any) -> bool:
    """Whether the operation is x ** n with an even integer n."""
    return name_of(equation) == "integer_pow" and equation.params["y"] % 2 == 0


def is_reciprocal(equation: Any) -> bool:
    """Whether the operation is x ** -1."""
    return name_of(equation) == "integer_pow" and equation.params["y"] == -1


def exponent(equation: Any) -> int:
    """Which operand of an exponential is the exponent."""
    return 1 if name_of(equation) == "pow" else 0


def same_as(equation: Any) -> Any:
    """What operations have in common that are one function of their operands, or None.

    Operations with bodies or effects, and tags, are never taken for one.
    """
    if equation.effects or name_of(equation) in TAG | CONTROL | CUSTOM | KERNELS | CALLBACKS:
        return None
    key = equation.primitive, tuple(sorted(equation.params.items())), equation.ctx
    try:
        hash(key)
    except TypeError:
        return None
    return key


# The parameter, of operations that have one, that says how long the axes of the output are.
_LENGTHS = {
    "broadcast_in_dim": "shape",
    "iota": "shape",
    "reshape": "new_sizes",
    "slice": "limit_indices",
    "dynamic_slice": "slice_sizes",
}


def acts_along(equation: Any) -> frozenset[int] | None:
    """The axes along which an operation that leaves all others in place mixes; None for others."""
    name, params = name_of(equation), equation.params
    if name in ("concatenate", "sort"):
        return frozenset([params["dimension"]])
    if name in ("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp", "split"):
        return frozenset([params["axis"]])
    if name == "rev":
        return frozenset(params["dimensions"])
    if name == "pad":
        return frozenset(i for i, width in enumerate(params["padding_config"]) if any(width))
    if name in ("slice", "dynamic_slice"):
        shapes = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return frozenset(i for i, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b)
    return None


def bind_part(equation: Any, values: Sequence, axis: int, start: Any, size: int) -> list:
    """Apply an operation to operands of which those with an axis of the output are cut along it.

    The part of the axis begins at `start` and has `size` entries.
    """
    name = name_of(equation)
    if name not in _LENGTHS:
        return bind(equation, values)
    lengths = list(equation.params[_LENGTHS[name]])
    lengths[axis] = size
    (out,) = bind(equation, values, {_LENGTHS[name]: tuple(lengths)})
    counts = name in IOTA and equation.params["dimension"] == axis
    return [out + jnp.asarray(start).astype(out.dtype) if counts else out]


def bind(equation: Any, values: Sequence, changed: Mapping[str, Any] | None = None) -> list:
    """Apply an operation, parameters `changed`, as the user wrote it, with its own derivative."""
    primitive = equation.primitive
    params = primitive.get_bind_params({**equation.params, **(changed or {})})
    apply: Callable = functools.partial(primitive.bind, **params)
    if any(_explicit(atom.aval) for atom in equation.invars):
        # Op by op, JAX cannot differentiate all operations of an explicit mesh (a maximum).
        apply = jax.jit(apply)
    with equation.ctx.manager:
        out = apply(*values)
    return list(out) if primitive.multiple_results else [out]


def _explicit(aval: Any) -> bool:
    """Whether an array's type says how it is sharded over a mesh."""
    sharding = getattr(aval, "sharding", None)
    return sharding is not None and bool(sharding.mesh.explicit_axes)


class Program(NamedTuple):
    """A jaxpr and the arrays that it closes over."""

    jaxpr: Any
    consts: Sequence


def program(closed: Any) -> Program:
    """A closed jaxpr, or since JAX 0.11 one that has its constants, as both of its parts."""
    return Program(closed if ClosedJaxpr is Jaxpr else closed.jaxpr, closed.consts)


def make_program(fun: Callable, *args, **kwargs) -> tuple[Program, Any]:
    """A function traced for these arguments, and the shapes that it returns."""
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args, **kwargs)
    return program(closed), shapes


def bodies(equation: Any) -> Iterator[Program]:
    """The programs that an operation holds, whatever their parameter is called."""
    hijax = _hijax(equation)
    if hijax is not None:
        if name_of(equation) not in TAG:
            yield _expanded(hijax)
        return
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield program(item)
            elif isinstance(item, Jaxpr):
                yield Program(item, ())


def _expanded(hijax: Any) -> Program:
    """What a hijax primitive computes, written with the operations that it stands for."""

    def expand(*flat):
        return jax.tree.leaves(hijax.expand(*jax.tree.unflatten(hijax.in_tree, flat)))

    return make_program(expand, *hijax.in_avals_flat)[0]


def literal(atom: Any) -> bool:
    """Whether an equation's input is a number written into the program."""
    return isinstance(atom, Literal)


def frames(equation: Any) -> Iterator[Any]:
    """The stack that wrote an equation, innermost frame first."""
    traceback = equation.source_info.traceback
    yield from () if traceback is None else traceback.frames


def summary(equation: Any) -> str:
    """JAX's own account of where an equation comes from."""
    return source_info_util.summarize(equation.source_info)


def hide(file: str) -> None:
    """Keep a file's lines out of JAX's accounts."""
    source_info_util.register_exclusion(file)


# The primitive of `jaxrel.tag`: an identity that moves a mapped axis to the front.
tag_p = Primitive("jaxrel_tag")
tag_p.def_impl(lambda x, *, name: x)
tag_p.def_abstract_eval(lambda x, *, name: x)
mlir.register_lowering(tag_p, lambda ctx, x, *, name: [x])
ad.deflinear2(tag_p, lambda cotangent, x, *, name: [cotangent])


def _batch(args, dims, *, name):
    (x,), (dim,) = args, dims
    return tag_p.bind(jnp.moveaxis(x, dim, 0), name=name), 0


batching.primitive_batchers[tag_p] = _batch
