"""The methods of attention relevance: one table of what each needs, reads, costs and stems from.

What else is said of methods (which one may ask for, which are signed, which stream) derives from
`TABLE`; a new method is a row here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxrel.attention.accumulate import equal, weighted
from jaxrel.attention.baselines import grad_cam, no_aggregation, raw, rollout
from jaxrel.attention.encoder_methods import grad_eclip, legrad
from jaxrel.attention.token_changes import token_tm

Need = Literal["maps", "gradients", "values", "LRP", "projections", "layer scores"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of attention relevance.

    Attributes:
      name: what `relevance` and `jaxrel.explain` call it.
      matrix: the function that makes the relevance matrix of one stream; see `relevance_matrix`.
      needs: what it is made of: the attention "maps", the "gradients" with respect to them, the
        token "values" around the residual sum (with their gradient), and the relevance of the
        maps by "LRP", which stands in the place of the maps. "projections" are the queries, keys
        and values, and the gradient with respect to the mixed values; "layer scores" the gradient
        of each layer's own score with respect to its map.
      source: the paper that it is from.
      layers: whether it accumulates over "all" layers or reads the "last" alone.
      streams: the models it is defined for: of "one" stream of tokens, "bimodal", or both;
        "encoder" are models of one stream that tell more of themselves than their maps.
      takes: the keyword arguments that `matrix` takes of what is tapped beside the maps.
      signed: whether its relevance may be negative.
      streaming: whether one row of it can be accumulated in the backward pass.
      skips: whether a layer that does not run (a branch not taken) changes nothing.
      residual: whether relevance stays where attention does not move it.
      averages: whether it is the mean over the layers.
    """

    name: str
    matrix: Callable
    needs: tuple[Need, ...]
    source: str
    layers: Literal["all", "last"] = "all"
    streams: tuple[Literal["one", "bimodal", "encoder"], ...] = ("one", "bimodal")
    takes: tuple[str, ...] = ()
    signed: bool = False
    streaming: bool = False
    skips: bool = False
    residual: bool = True
    averages: bool = False

    @property
    def by_lrp(self) -> bool:
        """Whether it reads the relevance of the maps by LRP in the place of the maps."""
        return "LRP" in self.needs

    @property
    def cost(self) -> str:
        """What it costs; all methods that are asked for together share their passes."""
        if "layer scores" in self.needs:
            return "one forward and backward pass of its own"
        passes = "one forward pass" if self.needs == ("maps",) else "one forward and backward pass"
        return f"{passes}, and another by the rules of LRP" if self.by_lrp else passes

    def relevance_matrix(self, maps: Any, grad: Any, values: Mapping[str, Any], **some: Any) -> Any:
        """Its relevance matrix from what it needs; the rest is not used.

        Args:
          maps: attention maps `[layers, batch, heads, query, key]`, their relevance by LRP, or the
            gradient of layer scores by them.
          grad: the gradient with respect to the maps.
          values: by name, those of `takes` and others: token values, their gradient, the measure.
          **some: a choice of `layers` and `heads`, as in `equal`.

        Returns:
          `[batch, query, key]`, in float32 (float64 for float64 maps).
        """
        gradients = (grad,) if "gradients" in self.needs else ()
        taken = {name: x for name, x in values.items() if name in self.takes}
        return self.matrix(maps, *gradients, **taken, **some)


_GAE = "Chefer, Gur and Wolf 2021"
_ROWS = (
    Method(
        "equal", equal, ("maps", "gradients"), f"{_GAE}, eq. 5 to 11", streaming=True, skips=True
    ),
    Method(
        "weighted",
        weighted,
        ("maps", "gradients", "values"),
        "our reading of Huang, Jia, Zhang and Zhang 2023",
        takes=("before", "after", "value_grad", "importance"),
        streaming=True,
        skips=True,
    ),
    Method("raw", raw, ("maps",), "the attention itself, averaged over heads", "last"),
    Method("rollout", rollout, ("maps",), "Abnar and Zuidema 2020", skips=True),
    Method(
        "grad_cam",
        grad_cam,
        ("maps", "gradients"),
        f"Selvaraju et al. 2017, as {_GAE} compare with it",
        "last",
    ),
    Method(
        "no_aggregation",
        no_aggregation,
        ("maps", "gradients"),
        f"{_GAE}, the ablation of eq. 6",
        streams=("one",),
        residual=False,
    ),
    # On one stream it is 'equal_lrp'.
    Method(
        "transformer_attribution",
        equal,
        ("LRP", "gradients"),
        "Chefer, Gur and Wolf, CVPR 2021",
        streams=("bimodal",),
    ),
    Method(
        "equal_lrp",
        equal,
        ("LRP", "gradients"),
        f"{_GAE}, eq. 5 to 11 with R(A) for A; on one stream Chefer, Gur and Wolf, CVPR 2021",
    ),
    Method("partial_lrp", raw, ("LRP",), "Voita et al. 2019", "last", signed=True),
    Method(
        "token_tm",
        token_tm,
        ("maps", "gradients", "values"),
        "Wu et al., CVPR 2024, as Mehri et al., CVPR 2025 compute it",
        streams=("one",),
        takes=("before", "after", "following"),
    ),
    Method(
        "legrad",
        legrad,
        ("layer scores",),
        "Bousselham et al., ICCV 2025",
        streams=("encoder",),
        averages=True,
    ),
    Method(
        "grad_eclip",
        grad_eclip,
        ("maps", "projections"),
        "Zhao et al., ICML 2024",
        "last",
        streams=("encoder",),
        takes=("query", "key", "value", "mixed_grad"),
    ),
)

TABLE: dict[str, Method] = {method.name: method for method in _ROWS}
METHODS = tuple(name for name, method in TABLE.items() if "one" in method.streams)
ENCODER_METHODS = tuple(name for name, method in TABLE.items() if "encoder" in method.streams)
BIMODAL_METHODS = tuple(name for name, method in TABLE.items() if "bimodal" in method.streams)


def check_methods(
    method: str | Sequence[str], known: Sequence[str] = METHODS, what: str = "attention method"
) -> tuple[str, ...]:
    """The methods asked for.

    Args:
      method: one name, or several.
      known: the names there are.
      what: what the error calls them.

    Returns:
      The names as a tuple.

    Raises:
      ValueError: a name is unknown, or there is none; the message says which are known.
    """
    methods = (method,) if isinstance(method, str) else tuple(method)
    for name in methods:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; there are {', '.join(known)}")
    if not methods:
        raise ValueError(f"no {what} given; there are {', '.join(known)}")
    return methods
