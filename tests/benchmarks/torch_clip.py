"""The comparison: CLIP in eager torch, explained by equal accumulation as the field does it.

The attention maps of the forward pass are kept, `autograd.grad` gives their gradients, and the
whole relevance matrix is multiplied up layer by layer (Chefer, Gur and Wolf 2021). The weights
are those of a `jaxrel.models.CLIP`, so both compute the same numbers.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter

import jax
import numpy as np
import torch
from flax import nnx
from torch.nn import functional as F

from jaxrel.models.clip import CLIP

Tensors = Mapping[str, Any]


class TorchCLIP:
    """The functions of the towers, on the weights of a JAX model."""

    def __init__(self, model: CLIP) -> None:
        self.config = model.config
        self.weights = _tensors(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    def score(
        self, image: torch.Tensor, text: torch.Tensor, ends: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Similarity of each pair, and the attention maps of all layers by tower."""
        image, seen = self._image(image)
        text, read = self._text(text, ends)
        score = self.weights["logit_scale"].exp() * (image * text).sum(-1)
        return score, {"vision": seen, "text": read}

    def _image(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        config, weights = self.config.vision, self.weights["vision"]
        patches = F.conv2d(image, weights["patch_embedding"]["kernel"], stride=config.patch_size)
        patches = patches.flatten(2).mT
        first = weights["class_embedding"].expand(len(patches), 1, -1)
        x = torch.cat([first, patches], 1) + weights["position_embedding"]
        x, maps = _layers(_norm(x, weights["pre_norm"], config), weights, config, None)
        return _embed(_norm(x[:, 0], weights["post_norm"], config), weights), maps

    def _text(
        self, text: torch.Tensor, ends: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        config, weights = self.config.text, self.weights["text"]
        tokens = text.shape[1]
        x = weights["token_embedding"]["embedding"][text] + weights["position_embedding"][:tokens]
        mask = torch.full((tokens, tokens), torch.finfo(x.dtype).min).triu(1)
        x, maps = _layers(x, weights, config, mask)
        read = x[torch.arange(len(x)), ends]
        return _embed(_norm(read, weights["final_norm"], config), weights), maps


def _layers(
    x: torch.Tensor, weights: Tensors, config: Any, mask: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    maps = []
    for block in weights["transformer"]["blocks"]:
        attended, attn = _attention(
            _norm(x, block["norm1"], config), block["attention"], config, mask
        )
        x = x + attended
        hidden = _linear(_norm(x, block["norm2"], config), block["expand"])
        x = x + _linear(hidden * torch.sigmoid(1.702 * hidden), block["contract"])
        maps.append(attn)
    return x, maps


def _attention(
    x: torch.Tensor, weights: Tensors, config: Any, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = (
        _linear(x, weights[name]).unflatten(-1, (config.heads, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    logits = query @ key.mT * query.shape[-1] ** -0.5
    attn = (logits if mask is None else logits + mask).softmax(-1)
    return _linear((attn @ value).transpose(1, 2).flatten(2), weights["out"]), attn


def _linear(x: torch.Tensor, weights: Tensors) -> torch.Tensor:
    return F.linear(x, weights["kernel"], weights.get("bias"))


def _norm(x: torch.Tensor, weights: Tensors, config: Any) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights["scale"], weights["bias"], config.layer_norm_eps)


def _embed(x: torch.Tensor, weights: Tensors) -> torch.Tensor:
    return F.normalize(_linear(x, weights["projection"]), dim=-1)


def _tensors(weights: Any, path: tuple[str, ...] = ()) -> Any:
    """The same tree of tensors in torch's axes, the layers as a list."""
    if path and path[-1] == "blocks":
        layers = len(jax.tree.leaves(weights)[0])
        return [
            _tensors(jax.tree.map(lambda x, i=i: x[i], weights), (*path, "layer"))
            for i in range(layers)
        ]
    if isinstance(weights, Mapping):
        return {name: _tensors(x, (*path, name)) for name, x in weights.items()}
    array = np.asarray(weights)
    if path[-1] == "kernel":
        array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
    return torch.tensor(array, requires_grad=True)


def grad_per_layer(score: torch.Tensor, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """One walk through the graph for every layer, as the paper's code does it."""
    total = score.sum()
    return [torch.autograd.grad(total, attn, retain_graph=True)[0] for attn in maps]


def grad_once(score: torch.Tensor, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """One walk for all layers."""
    return list(torch.autograd.grad(score.sum(), maps))


def relevance(
    model: TorchCLIP, inputs: Mapping[str, np.ndarray], ends: np.ndarray, grad: Callable
) -> dict[str, np.ndarray]:
    """Rows of equal accumulation, by tower.

    Args:
      model: the model.
      inputs: those of the JAX model.
      ends: where each text ends.
      grad: `grad_per_layer` or `grad_once`.
    """
    image, text, last = tensors(inputs, ends)
    score, maps = model.score(image, text, last)
    every = grad(score, [*maps["vision"], *maps["text"]])
    grads = {"vision": every[: len(maps["vision"])], "text": every[len(maps["vision"]) :]}
    rows = {"vision": torch.zeros_like(last), "text": last}
    return {name: accumulate(maps[name], grads[name], rows[name]) for name in maps}


def tensors(inputs: Mapping[str, np.ndarray], ends: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Images, texts and where they end, as the model takes them."""
    image = torch.from_numpy(inputs["image"]).permute(0, 3, 1, 2)
    return image, *(torch.from_numpy(x).long() for x in (inputs["text"], ends))


def accumulate(
    maps: list[torch.Tensor], grads: list[torch.Tensor], rows: torch.Tensor
) -> np.ndarray:
    """The given row of equal accumulation over maps [batch, heads, tokens, tokens]."""
    batch, _, tokens, _ = maps[0].shape
    matrix = torch.eye(tokens).expand(batch, tokens, tokens)
    for attn, grad in zip(maps, grads, strict=True):
        matrix = matrix + (attn.detach() * grad).clamp(min=0).mean(1) @ matrix
    return matrix[torch.arange(batch), rows].numpy()


def peak(run: Callable[[], Any]) -> int:
    """The most bytes of tensors that `run` holds at a time, beyond those there before."""
    profiler = torch.profiler
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    return int(np.cumsum([size for _, size in changes]).max())
