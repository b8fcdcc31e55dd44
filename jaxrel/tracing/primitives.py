"""Everything that depends on the names, parameters and versions of JAX's primitives."""

from typing import Any, NamedTuple


class Scan(NamedTuple):
    """The counts and settings of a scan: its inputs are constants, state and scanned arrays."""

    consts: int
    carries: int
    length: int
    reverse: bool
    unroll: int | bool


def scan_of(equation: Any) -> Scan | None:
    """What a scan's parameters say; None for another operation."""
    if equation.primitive.name != "scan":
        return None
    params = equation.params
    if "ft_in" in params:  # jax 0.11
        consts, carries, _ = map(len, params["ft_in"].unpack())
    else:
        consts, carries = params["num_consts"], params["num_carry"]
    return Scan(consts, carries, params["length"], params["reverse"], params["unroll"])
