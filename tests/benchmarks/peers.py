"""The comparison: the same networks in torch, explained by zennit and by LXT.

Both are called as their documentation says, on plain eager modules with the weights of
`lrp_models`. Importing this module needs torch; `zennit_peers` and `lxt_peers` need zennit, and
the latter lxt.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.benchmarks import lrp_models
from tests.benchmarks.lrp_models import HIGH, LOW, Network, Params

torch.set_num_threads(os.cpu_count() or 1)

Explain = Callable[[], np.ndarray]


def zennit_peers(network: Network, targets: np.ndarray) -> dict[str, Explain]:
    """By composite: the relevance of the network's images for a class of each, by zennit.

    What a canonizer does is done beforehand, and not timed: batch normalisation is folded into
    the weights, and sums are modules.
    """
    zennit = load_zennit()
    model, x, seed = twin(network, zennit.layer.Sum), tensor(network.x), one_hot(targets)
    presets, rules, types = zennit.composites, zennit.rules, zennit.types
    epsilon = [*presets.layer_map_base(), (types.Linear, rules.Epsilon())]
    composites = {
        "epsilon": presets.LayerMapComposite(epsilon),
        "epsilon_plus": presets.EpsilonPlus(),
        "epsilon_plus_flat": presets.EpsilonPlusFlat(),
        "epsilon_gamma_box": presets.EpsilonGammaBox(low=LOW, high=HIGH),
        "epsilon_alpha2_beta1": presets.EpsilonAlpha2Beta1(),
    }

    def explain(composite: Any) -> np.ndarray:
        attribute = zennit.attribution.Gradient(model, composite)
        _, relevance = attribute(x.clone(), lambda out: out * seed(out))
        return array(relevance)

    return {name: partial(explain, composite) for name, composite in composites.items()}


def lxt_peers(network: Network, targets: np.ndarray) -> dict[str, Explain]:
    """By composite: the relevance of the network's input for a class of each, by LXT."""
    patches = load_lxt("patches")
    x, seed = tensor(network.x), one_hot(targets)
    mixed = {
        "attn_lrp": (patches.wrap_attention_forward, patches.gated_mlp_forward),
        "cp_lrp": (patches.cp_wrap_attention_forward, patches.cp_gated_mlp_forward),
    }
    mixed["cp_lrp, gamma"] = mixed["cp_lrp"]
    models = {name: patched(twin(network), patches, *forms) for name, forms in mixed.items()}
    add_gamma(models["cp_lrp, gamma"])

    def explain(model: nn.Module) -> np.ndarray:
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        (grad,) = torch.autograd.grad(out, leaf, seed(out))
        return array(x * grad)

    return {name: partial(explain, model) for name, model in models.items()}


def patched(model: nn.Module, patches: ModuleType, attention: Callable, mlp: Callable) -> nn.Module:
    """LXT's forward methods in the places of a model's own, in this model alone."""
    forwards = {
        nn.LayerNorm: patches.layer_norm_forward,
        RMSNorm: patches.rms_norm_forward,
        nn.GELU: patches.non_linear_forward,
        GatedMLP: mlp,
    }
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attention(module.attend)
        elif type(module) in forwards:
            module.original_forward = module.forward
            module.forward = MethodType(forwards[type(module)], module)
    return model


def add_gamma(model: nn.Module) -> None:
    """Zennit's Gamma on the dense layers of all MLPs, in the form that LXT gives its hooks."""
    zennit, changes = load_zennit(), load_lxt("zennit_patches")
    methods = {"forward": changes.forward, "backward": changes.backward}
    gamma = type("Gamma", (zennit.rules.Gamma,), methods)
    names = [name for name, module in model.named_modules() if ".mlp." in name]
    zennit.composites.NameMapComposite([(names, gamma())]).register(model)


def load_zennit() -> ModuleType:
    """zennit; without torchvision, whose networks it only names, too."""
    parents = [] if find_spec("torchvision") else ["torchvision", "torchvision.models"]
    for name in parents:
        sys.modules[name] = ModuleType(name)
    if parents:
        resnet = ModuleType("torchvision.models.resnet")
        resnet.Bottleneck = resnet.BasicBlock = type("Absent", (), {})  # type: ignore
        sys.modules[resnet.__name__] = resnet
        parents.append(resnet.__name__)
    zennit = importlib.import_module("zennit")
    for name in parents:
        del sys.modules[name]
    return zennit


def load_lxt(name: str) -> ModuleType:
    """A module of `lxt.efficient`, without the package's own imports.

    Those bring patches of many networks, some of which recent versions of transformers lack.
    """
    package = "lxt.efficient"
    if package not in sys.modules:
        bare = ModuleType(package)
        bare.__path__ = [str(Path(importlib.import_module("lxt").__path__[0]) / "efficient")]
        sys.modules[package] = bare
    return importlib.import_module(f"{package}.{name}")


def twin(network: Network, total: Callable[[], nn.Module] = nn.Identity) -> nn.Module:
    """A network in torch; `total` makes the modules that sum a last axis."""
    make = {
        lrp_models.apply_vgg: VGG,
        lrp_models.apply_resnet: partial(ResNet, total=total),
        lrp_models.apply_vit: ViT,
        lrp_models.apply_decoder: Decoder,
    }
    fun = network.fun.func if isinstance(network.fun, partial) else network.fun
    return make[fun](network.params, **network.options).eval().requires_grad_(False)


def VGG(params: Params) -> nn.Module:
    """VGG16."""
    modules: list[nn.Module] = []
    for stage in params["stages"]:
        for layer in stage:
            modules += [convolution(layer, padding=1), nn.ReLU()]
        modules.append(nn.MaxPool2d(2))
    modules.append(nn.Flatten())
    first, *others = params["dense"]
    modules += [flat(first, channels=params["stages"][-1][-1]["bias"].shape[0])]
    for layer in others:
        modules += [nn.ReLU(), dense(layer)]
    return nn.Sequential(*modules)


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
        self.shortcut = convolution(block["shortcut"], stride=stride) if has else nn.Identity()
        self.total = total

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv3(self.relu2(self.conv2(self.relu1(self.conv1(x)))))
        return self.relu3(self.total(torch.stack([y, self.shortcut(x)], dim=-1)))


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
    """A layer of the ViT."""

    def __init__(self, layer: Params, heads: int) -> None:
        super().__init__()
        mlp = layer["mlp"]
        self.norm1, self.norm2 = layer_norm(layer["norm1"]), layer_norm(layer["norm2"])
        self.attention = Attention(layer["attention"], heads, heads, causal=False)
        self.mlp = nn.Sequential(dense(mlp["expand"]), nn.GELU(), dense(mlp["contract"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


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
        bias = layer["bias"]
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


def layer_norm(layer: Params) -> nn.LayerNorm:
    """Layer normalisation."""
    module = nn.LayerNorm(len(layer["scale"]), eps=1e-6)
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


def one_hot(targets: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of the output: 1 for each example's target."""
    return lambda out: F.one_hot(torch.tensor(targets), out.shape[-1]).to(out)
