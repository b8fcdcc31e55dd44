"""The table of the zoo: what was measured of every model."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

import jaxrel
from jaxrel import attention
from tests.zoo.packages import load
from tests.zoo.packages.checks import CHECKS, Case, applies, tolerance
from tests.zoo.packages.exhibit import Exhibit

REPEATS = 2


def row(name: str) -> dict[str, str]:
    """What was measured of one model, by column."""
    exhibit = load()[name]
    with exhibit.world():
        case = Case(exhibit)
        cells = {"model": exhibit.name, "package": f"{exhibit.package} {exhibit.version}"}
        cells |= {"dtype": exhibit.dtype, "LRP": _rules(exhibit)}
        # These programs run once; those that are timed are compiled as users' are.
        jax.config.update("jax_disable_most_optimizations", True)
        cells["operations"] = str(_operations(case))
        cells["layers found"], cells["methods"] = _found(case), _methods(case)
        cells |= {name: _checked(case, name) for name in CHECKS}
        jax.config.update("jax_disable_most_optimizations", False)
        return cells | dict(zip(("trace", "compile"), _times(case), strict=True))


def _rules(exhibit: Exhibit) -> str:
    return " ".join(
        [exhibit.rules, *(f"with {rule} for {where}" for where, rule in exhibit.entries)]
    )


def _operations(case: Case) -> int:
    plan = jaxrel.plan(case.fun, case.exhibit.composite, argnums=1)
    return len(list(plan(case.params, case.x)))


def _found(case: Case) -> str:
    known = case.exhibit.attention
    return f"{layers_found(case)} of {known.layers + known.others}" if known else "-"


def _methods(case: Case) -> str:
    if case.exhibit.attention is None:
        return "-"
    return f"{len(list(methods(case)))} of {len(attention.METHODS)}"


def layers_found(case: Case) -> int:
    """How many layers of attention are in stacks."""
    found = attention.sites(case.score, argnums=1)(case.params, case.x)
    return sum(stack.layers for stack in found)


def methods(case: Case) -> Iterator[str]:
    """The methods of attention relevance that the model can be traced with."""
    for name in attention.METHODS:
        explain = attention.relevance(case.score, method=name, argnums=1)
        try:
            jax.eval_shape(explain, case.params, case.x)
        except (NotImplementedError, ValueError):
            continue
        yield name


def _checked(case: Case, name: str) -> str:
    if not applies(case.exhibit, name):
        return "-"
    found = CHECKS[name](case)
    return f"{found:.0e}" if found <= tolerance(case.exhibit, name) else f"**{found:.0e}**"


def _times(case: Case) -> tuple[str, str]:
    """Time to trace and to compile, as multiples of the gradient's: the least of several."""
    gradient = jax.grad(lambda x, params: case.fun(params, x).sum())
    if case.model.table is not None:
        gradient = jax.grad(lambda params, x: case.fun(params, x).sum())
        args: tuple[Any, ...] = (case.params, case.x)
    else:
        args = (case.x, case.params)
    rounds = [
        (_time(gradient, *args), _time(case.explain(), case.params, case.x)) for _ in range(REPEATS)
    ]
    least = lambda which, part: min(times[which][part] for times in rounds)
    trace, compiling = (least(1, part) / least(0, part) for part in (0, 1))
    return f"{trace:.1f}", f"{compiling:.1f}"


def _time(fun: Callable, *args) -> tuple[float, float]:
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(functools.partial(fun)).trace(*args)
    middle = time.perf_counter()
    traced.lower().compile()
    return middle - start, time.perf_counter() - middle


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def read(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
