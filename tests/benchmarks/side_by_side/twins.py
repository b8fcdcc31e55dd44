"""The same networks in torch, as plain eager modules with the same weights."""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

from tests.benchmarks import lrp_models
from tests.benchmarks.lrp_models import Params
from tests.benchmarks.side_by_side.networks import CAPTIONER, CLIP_B32, DECODER, VIT, Network

torch.set_num_threads(os.cpu_count() or 1)


def twin(network: Network, total: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A network in torch; `total` makes the modules that add two values, of the ResNet."""
    make: dict[str, Callable] = {
        "VGG16": VGG,
        "ResNet-50": partial(ResNet, total=total or Add),
        VIT: ViT,
        DECODER: Decoder,
    }
    if network.name == CLIP_B32:
        model: nn.Module = ClipScore(network.params, network.options["texts"])
    elif network.name == CAPTIONER:
        model = Captioner(network.params, network.options["text"])
    else:
        model = make[network.name](network.params, **network.options)
    return model.eval().requires_grad_(False)


class VGG(nn.Module):
    """VGG16."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.features = convolutions(params["stages"])
        self.features.append(nn.MaxPool2d(2))
        first, *others = params["dense"]
        modules: list[nn.Module] = [flat(first, channels=len(params["stages"][-1][-1]["bias"]))]
        for layer in others:
            modules += [nn.ReLU(), dense(layer)]
        self.classifier = nn.Sequential(*modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def convolutions(stages: Iterable[Iterable[Params]]) -> nn.Sequential:
    """The convolutions of a VGG, with pooling between the stages."""
    modules: list[nn.Module] = []
    for stage in stages:
        if modules:
            modules.append(nn.MaxPool2d(2))
        for layer in stage:
            modules += [convolution(layer, padding=1), nn.ReLU()]
    return nn.Sequential(*modules)


class Add(nn.Module):
    """The sum of two values."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class ResNet(nn.Module):
    """ResNet-50, its normalisations folded."""

    def __init__(self, params: Params, total: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = convolution(params["stem"], stride=2, padding=3)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        steps = lrp_models.strides(params["blocks"])
        blocks = zip(params["blocks"], steps, strict=True)
        self.blocks = nn.Sequential(*(Bottleneck(block, step, total()) for block, step in blocks))
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = dense(params["head"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.pool(self.relu(self.stem(x))))
        return self.head(self.mean(x).flatten(1))


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, block: Params, stride: int, total: nn.Module) -> None:
        super().__init__()
        self.conv1 = convolution(block["conv1"])
        self.conv2 = convolution(block["conv2"], stride=stride, padding=1)
        self.conv3 = convolution(block["conv3"])
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        has = "shortcut" in block
        self.shortcut = convolution(block["shortcut"], stride=stride) if has else None
        self.total = total

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv3(self.relu2(self.conv2(self.relu1(self.conv1(x)))))
        return self.relu3(self.total(y, x if self.shortcut is None else self.shortcut(x)))


class ViT(nn.Module):
    """ViT-B/16."""

    def __init__(self, params: Params, heads: int) -> None:
        super().__init__()
        patch = params["patches"]["kernel"].shape[0]
        self.patches = convolution(params["patches"], stride=patch)
        self.class_token = parameter(params["class_token"])
        self.positions = parameter(params["positions"])
        self.layers = nn.Sequential(*(EncoderLayer(layer, heads) for layer in params["layers"]))
        self.norm = layer_norm(params["norm"])
        self.head = dense(params["head"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x).flatten(2).mT
        first = self.class_token.expand(len(x), 1, -1)
        x = self.layers(torch.cat([first, patches], 1) + self.positions)
        return self.head(self.norm(x[:, 0]))


class EncoderLayer(nn.Module):
    """A layer of the ViT, or of CLIP's image tower."""

    def __init__(
        self, layer: Params, heads: int, activation: type[nn.Module] = nn.GELU, eps: float = 1e-6
    ) -> None:
        super().__init__()
        mlp = layer["mlp"]
        self.norm1, self.norm2 = layer_norm(layer["norm1"], eps), layer_norm(layer["norm2"], eps)
        self.attention = Attention(layer["attention"], heads, heads, causal=False)
        self.mlp = nn.Sequential(dense(mlp["expand"]), activation(), dense(mlp["contract"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class QuickGELU(nn.Module):
    """CLIP's activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Normalise(nn.Module):
    """To length 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1)


class ClipScore(nn.Module):
    """CLIP's image tower, and the similarity [batch, 1] of images and embedded texts."""

    def __init__(self, model: Any, texts: np.ndarray) -> None:
        super().__init__()
        config = model.config.vision
        weights = nnx.to_pure_dict(nnx.state(model.vision, nnx.Param))
        stacked, eps = weights["transformer"]["blocks"], config.layer_norm_eps
        self.patches = convolution(weights["patch_embedding"], stride=config.patch_size)
        self.class_token = parameter(weights["class_embedding"])
        self.positions = parameter(weights["position_embedding"])
        layers = []
        for index in range(config.layers):
            layer = unstacked(stacked, index)
            layer |= {"mlp": {name: layer[name] for name in ("expand", "contract")}}
            layers.append(EncoderLayer(layer, config.heads, QuickGELU, eps))
        self.before = layer_norm(weights["pre_norm"], eps)
        self.layers = nn.Sequential(*layers)
        self.after = layer_norm(weights["post_norm"], eps)
        self.projection, self.normalise = dense(weights["projection"]), Normalise()
        self.texts = parameter(texts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x).flatten(2).mT
        first = self.class_token.expand(len(x), 1, -1)
        x = self.before(torch.cat([first, patches], 1) + self.positions)
        embedded = self.normalise(self.projection(self.after(self.layers(x)[:, 0])))
        # Several copies of the batch, as integrated gradients asks for, meet the same texts.
        texts = self.texts.repeat(len(x) // len(self.texts), 1)
        return (embedded * texts).sum(-1, keepdim=True)


class Captioner(nn.Module):
    """The captioner with multi-head attention; the logit [batch, 1] of the last word of `text`."""

    def __init__(self, model: Any, text: np.ndarray) -> None:
        super().__init__()
        weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        cell, self.heads = weights["cell"], model.config.heads
        stages = weights["encoder"]["stages"]
        self.features = convolutions(stage.values() for stage in stages.values())
        self.project, self.gates = dense(weights["project"]), dense(cell["lstm"]["gates"])
        self.query, self.key, self.value = (dense(cell[name]) for name in ("query", "key", "value"))
        self.out, self.gate = dense(cell["out"]), dense(cell["gate"])
        self.words = parameter(np.asarray(weights["embedding"]["embedding"])[text[0, :-1]])
        # Only the column of the one word.
        last = slice(text[0, -1], text[0, -1] + 1)
        head = {name: np.asarray(array)[..., last] for name, array in weights["head"].items()}
        self.head = dense(head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = F.relu(self.project(self.features(x).flatten(2).mT))
        mean = values.mean(1)
        hidden = cell = torch.zeros_like(mean)
        for word in self.words:
            read = torch.cat([word.expand(len(x), -1), mean, hidden], -1)
            i, f, g, o = self.gates(read).chunk(4, -1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
        query = self.query(hidden).unflatten(-1, (self.heads, 1, -1))
        key, value = (
            layer(values).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        found = F.scaled_dot_product_attention(query, key, value).flatten(1)
        return self.head(torch.sigmoid(self.gate(hidden)) * self.out(found) + hidden)


class Decoder(nn.Module):
    """The Llama-like decoder."""

    def __init__(self, params: Params, heads: int, shared: int) -> None:
        super().__init__()
        depth = len(params["layers"]["norm1"]["scale"])
        layers = [unstacked(params["layers"], i) for i in range(depth)]
        self.layers = nn.Sequential(*(DecoderLayer(layer, heads, shared) for layer in layers))
        self.norm = RMSNorm(params["norm"])
        self.head = dense(params["head"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(x)[:, -1]))


class DecoderLayer(nn.Module):
    """A layer of the decoder."""

    def __init__(self, layer: Params, heads: int, shared: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(layer["norm1"]), RMSNorm(layer["norm2"])
        self.attention = Attention(layer["attention"], heads, shared, causal=True)
        self.mlp = GatedMLP(layer["mlp"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Attention by torch's fused function; `causal` ones have rotary positions.

    `attend` is a function of (module, query, key, value), as the transformers library has it.
    """

    def __init__(self, params: Params, heads: int, shared: int, *, causal: bool) -> None:
        super().__init__()
        self.query, self.key = dense(params["query"]), dense(params["key"])
        self.value, self.out = dense(params["value"]), dense(params["out"])
        self.heads, self.shared, self.causal = heads, shared, causal
        self.attend: Callable = fused_attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.key(x).unflatten(-1, (self.shared, -1)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (self.shared, -1)).transpose(1, 2)
        if self.causal:
            query, key = rotated(query), rotated(key)
        mixed = self.attend(self, query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


def fused_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Of [batch, heads, tokens, head]."""
    times = module.heads // module.shared
    if times > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=module.causal)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of [batch, heads, tokens, head]."""
    cos, sin = map(torch.from_numpy, lrp_models.rotary(*x.shape[-2:]))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GatedMLP(nn.Module):
    """The MLP of the decoder; its members have the names that LXT's forward methods read."""

    def __init__(self, mlp: Params) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = dense(mlp["gate"]), dense(mlp["up"])
        self.down_proj = dense(mlp["down"])
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Of the decoder; its members have the names that LXT's forward methods read."""

    def __init__(self, layer: Params) -> None:
        super().__init__()
        self.weight = parameter(layer["scale"])
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        return self.weight * (x * size.rsqrt())


def convolution(layer: Params, *, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """A convolution, with the normalisation that follows it."""
    kernel = np.asarray(layer["kernel"])
    if "norm" in layer:
        stats = {name: np.asarray(value) for name, value in layer["norm"].items()}
        scale = stats["scale"] / np.sqrt(stats["var"] + np.float32(1e-5))
        kernel, bias = kernel * scale, stats["bias"] - stats["mean"] * scale
    else:
        bias = layer.get("bias", np.zeros(kernel.shape[-1], np.float32))
    side, _, inputs, outputs = kernel.shape
    module = nn.utils.skip_init(nn.Conv2d, inputs, outputs, side, stride=stride, padding=padding)
    module.weight, module.bias = parameter(kernel.transpose(3, 2, 0, 1)), parameter(bias)
    return module


def dense(layer: Params) -> nn.Linear:
    """A dense layer."""
    kernel, biased = np.asarray(layer["kernel"]), "bias" in layer
    module = nn.utils.skip_init(nn.Linear, *kernel.shape, bias=biased)
    module.weight = parameter(kernel.T)
    if biased:
        module.bias = parameter(layer["bias"])
    return module


def flat(layer: Params, *, channels: int) -> nn.Linear:
    """The dense layer after a flattening, which in torch has the channels first."""
    kernel = np.asarray(layer["kernel"])
    reordered = kernel.reshape(-1, channels, kernel.shape[-1]).swapaxes(0, 1)
    return dense({"kernel": reordered.reshape(kernel.shape), "bias": layer["bias"]})


def layer_norm(layer: Params, eps: float = 1e-6) -> nn.LayerNorm:
    """Layer normalisation."""
    module = nn.LayerNorm(len(layer["scale"]), eps=eps)
    module.weight, module.bias = parameter(layer["scale"]), parameter(layer["bias"])
    return module


def parameter(value: Any) -> nn.Parameter:
    """A copy of an array."""
    return nn.Parameter(torch.tensor(np.ascontiguousarray(value)), requires_grad=False)


def unstacked(params: Any, index: int) -> Any:
    """One layer's part of stacked parameters."""
    if isinstance(params, Mapping):
        return {name: unstacked(value, index) for name, value in params.items()}
    return params[index]


def tensor(x: Any) -> torch.Tensor:
    """Images with the channels first; all else as it is."""
    x = torch.tensor(np.asarray(x))
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def array(x: torch.Tensor) -> np.ndarray:
    """The way back."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).numpy()
