"""Tables of where a model's parameters are in a file: their entries, and the layers of a tower."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrel.models.checkpoint import Parameter

Path = tuple[str, ...]


@dataclass(frozen=True)
class Part(Parameter):
    """A parameter that shares a tensor with others, such as the query of a fused projection.

    Args:
      part: which of the equal parts along the tensor's first axis it is, from 0. A table has the
        parts of a tensor in their order.
      parts: how many there are.
    """

    part: int = 0
    parts: int = 1

    def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in the file of the tensor that holds all parts."""
        first, *rest = super().tensor_shape(shape)
        return (self.parts * first, *rest)

    def from_tensors(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the model's parameter, float32."""
        return super().from_tensors([np.split(x, self.parts)[self.part] for x in tensors])


def kernel(path: Path, name: str) -> Parameter:
    """A matrix, which files have as [outputs, inputs]."""
    return Parameter((*path, "kernel"), f"{name}.weight", axes=(1, 0))


def bias(path: Path, name: str) -> Parameter:
    """A bias."""
    return Parameter((*path, "bias"), f"{name}.bias")


def linear(path: Path, name: str) -> list[Parameter]:
    """A matrix and its bias."""
    return [kernel(path, name), bias(path, name)]


def norm(path: Path, name: str) -> list[Parameter]:
    """The factor and the bias of a norm."""
    return [Parameter((*path, "scale"), f"{name}.weight"), bias(path, name)]


def convolution(path: Path, name: str) -> Parameter:
    """The kernel of a convolution, which files have as OIHW."""
    return Parameter((*path, "kernel"), f"{name}.weight", axes=(2, 3, 1, 0))


def fused(paths: Sequence[Path], name: str, separator: str = ".") -> list[Parameter]:
    """Linear maps of one input whose matrices, and whose biases, are one tensor each.

    Args:
      paths: the maps, in the order of the tensor's parts.
      name: of the tensors, without `separator` and "weight" or "bias".
      separator: what is between; torch's attention has "in_proj_weight".
    """
    count = len(paths)
    table: list[Parameter] = []
    for part, path in enumerate(paths):
        weight, offset = f"{name}{separator}weight", f"{name}{separator}bias"
        table.append(Part((*path, "kernel"), weight, (1, 0), part=part, parts=count))
        table.append(Part((*path, "bias"), offset, None, part=part, parts=count))
    return table


def layers(
    block: Path, linears: Mapping[Any, str], norms: Mapping[Any, str], prefix: str
) -> list[Parameter]:
    """The layers of a `Transformer`.

    Args:
      block: the path of the stacked layers.
      linears: by path in a layer, the name of each linear map.
      norms: the same of the norms.
      prefix: begins all names; holds "{layer}".
    """
    found = []
    for kind, names in ((linear, linears), (norm, norms)):
        for path, name in names.items():
            found += kind((*block, *path), f"{prefix}{name}")
    return found
