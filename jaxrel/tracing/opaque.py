"""Programs that no transformation can enter, and what to do instead."""

import re

from jaxrel.tracing.graph import Node
from jaxrel.tracing.primitives import CALLBACKS, CUSTOM, CUSTOM_JVP, KERNELS, SHARD_MAP

# Libraries that choose a kernel for their users, by their files, and how to switch that off.
_SWITCHES = {
    r"[/\\]tokamax[/\\]": "call tokamax with implementation='xla'",
    r"[/\\]keras[/\\]": "build the layer with flash_attention=False, or call "
    "keras.config.disable_flash_attention()",
    r"[/\\]jax[/\\](_src|experimental)[/\\].*(attention|cudnn)|[/\\]jax[/\\]_src[/\\]nn[/\\]": (
        "call jax.nn.dot_product_attention(..., implementation='xla')"
    ),
}


def cure(node: Node) -> str | None:
    """Why an operation is closed to transformations, and what to do; None if it is not known to be.

    A kernel that a library chose for its user is cured by that library's own switch.
    """
    if node.loop:
        return (
            "a while_loop has no fixed number of steps and no reverse derivative; "
            "use lax.scan, or fori_loop with static bounds"
        )
    if node.name in SHARD_MAP:
        return "call jaxrel inside the shard_map, on the per-device function"
    if node.name in CALLBACKS:
        return "Python code is opaque; use JAX operations"
    if node.name in KERNELS:
        return f"a kernel is opaque; {_switch(node) or 'use the plain JAX form of the operation'}"
    return None


def custom_derivative(node: Node) -> str | None:
    """Why nothing inside a function with a derivative of its own can be tapped."""
    if node.name not in CUSTOM:
        return None
    decorator = "custom_jvp" if node.name in CUSTOM_JVP else "custom_vjp"
    return (
        "its derivative is written by hand for the function as a whole; move the tag outside, or "
        f"call the function without its {decorator}"
    )


def _switch(node: Node) -> str | None:
    """How to switch off the kernel in the outermost library that is known to have a switch."""
    found = None
    for frame in node.frames():
        for pattern, advice in _SWITCHES.items():
            if re.search(pattern, frame.file_name):
                found = advice
    return found
