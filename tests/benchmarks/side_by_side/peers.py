"""Torch's side: the gradient, and each peer, called as its documentation says.

A peer that is not installed is not among the candidates; nor is one that has no such method for
such a network. Importing this module needs torch.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.benchmarks import torch_clip
from tests.benchmarks.lrp import GAMMA
from tests.benchmarks.side_by_side.networks import (
    ATTENTION,
    CAPTIONER,
    CLIP_B32,
    CONVOLUTIONAL,
    GRAD_CAM,
    INTEGRATED,
    STEPS,
    TRANSFORMER,
    VIT,
    Network,
    by_patch,
)
from tests.benchmarks.side_by_side.twins import (
    Attention,
    GatedMLP,
    Normalise,
    QuickGELU,
    RMSNorm,
    array,
    tensor,
    twin,
)

BASE, PER_LAYER, ONCE, HOOKS = "torch", "torch, grad per layer", "torch, grad once", "torch, hooks"
ZENNIT, LXT, CAPTUM, AUTOLRP, CAM = "zennit", "LXT", "captum", "autolrp", "pytorch-grad-cam"
# What is imported for each, and what it is called by its installer.
MODULES = {
    ZENNIT: ("zennit", "zennit"),
    LXT: ("lxt", "lxt"),
    CAPTUM: ("captum", "captum"),
    AUTOLRP: ("autolrp", "autolrp"),
    CAM: ("pytorch_grad_cam", "grad-cam"),
}
EPSILON = 1e-6

Run = Callable[[], Any]
Prepare = Callable[[], tuple[Run, dict[str, float]]]


def candidates(network: Network, method: str) -> dict[str, Prepare]:
    """By tool: what prepares it, and gives a function to time, and nothing known beforehand."""
    found = {BASE: gradient} | by_method(network, method)
    installed = {
        tool: make
        for tool, make in found.items()
        if tool not in MODULES or find_spec(MODULES[tool][0])
    }
    return {tool: partial(prepared, make, network) for tool, make in installed.items()}


def prepared(make: Callable[[Network], Run], network: Network) -> tuple[Run, dict[str, float]]:
    """A function to time."""
    return make(network), {}


def by_method(network: Network, method: str) -> dict[str, Callable[[Network], Run]]:
    """Who has the method for the network, and what makes the function to time."""
    tokens = network.name in (VIT, CLIP_B32)
    if method == ATTENTION:
        ways = {PER_LAYER: torch_clip.grad_per_layer, ONCE: torch_clip.grad_once}
        made = {tool: partial(attention_relevance, how=how) for tool, how in ways.items()}
        return {BASE: clip_gradient, **made} if network.name == CLIP_B32 else made
    if method == GRAD_CAM:
        # captum takes the last axes of a layer's output for positions, where tokens have channels.
        by_layer = {} if tokens else {CAPTUM: captum_cam}
        return {HOOKS: hooked_cam, **by_layer, CAM: grad_cam}
    if method == INTEGRATED:
        return {CAPTUM: captum_integrated, ZENNIT: zennit_integrated}
    if network.rules[method] is TRANSFORMER.get(method):
        auto = {} if method == "gamma" else {AUTOLRP: partial(autolrp, method=method)}
        return {LXT: partial(lxt, method=method), **auto}
    if network.rules[method] is CONVOLUTIONAL.get(method):
        # Its only rule of two signs has alpha 1 and beta 0.
        found = {} if method == "alpha-beta" else {CAPTUM: partial(captum_lrp, method=method)}
        rest = {ZENNIT: zennit, AUTOLRP: autolrp}
        return {tool: partial(make, method=method) for tool, make in rest.items()} | found
    return {}


def gradient(network: Network) -> Run:
    """A forward and a backward pass: the gradient of the chosen logits by the input."""
    model, x = twin(network), tensor(network.x)

    def run() -> np.ndarray:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(chosen(network, model(leaf)).sum(), leaf)
        return array(grad)

    return run


def clip_gradient(network: Network) -> Run:
    """As `jaxrel.train.evaluate.flops.gradient`: by the position embeddings of both towers."""
    model, inputs = torch_clip.TorchCLIP(network.params), network.options["inputs"]
    places = [model.weights[name]["position_embedding"] for name in ("text", "vision")]

    def run() -> list[np.ndarray]:
        score, _ = model.score(*torch_clip.tensors(inputs, ends(network)))
        return [grad.numpy() for grad in torch.autograd.grad(score.sum(), places)]

    return run


def attention_relevance(network: Network, *, how: Callable) -> Run:
    """Equal accumulation over maps that attention keeps, by gradients of all of them."""
    if network.name == CLIP_B32:
        clip, inputs = torch_clip.TorchCLIP(network.params), network.options["inputs"]

        def both() -> list[np.ndarray]:
            found = torch_clip.relevance(clip, inputs, ends(network), how)
            return [found[name] for name in sorted(found)]

        return both
    maps: list[torch.Tensor] = []
    model, x = twin(network), tensor(network.x)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = partial(plain_attention, kept=maps)

    def run() -> np.ndarray:
        maps.clear()
        score = chosen(network, model(x.clone().requires_grad_()))
        rows = torch.full((len(x),), network.token)
        return torch_clip.accumulate(maps, how(score, maps), rows)

    return run


def ends(network: Network) -> np.ndarray:
    """Where CLIP's texts end."""
    return np.array(network.params.target_tokens(network.options["inputs"])["text"])


def plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    kept: list[torch.Tensor],
) -> torch.Tensor:
    """Of [batch, heads, tokens, head], with the maps, which a fused function has not."""
    times = module.heads // module.shared
    if times > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if module.causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    kept.append(logits.softmax(-1))
    return kept[-1] @ value


def zennit(network: Network, *, method: str) -> Run:
    """LRP by zennit.

    What a canonizer does is done beforehand, and not timed: batch normalisation is folded into
    the weights, and sums are modules.
    """
    from zennit import attribution, composites, layer, rules, types

    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = layer.Sum()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.sum(torch.stack([x, y], dim=-1))

    conv = {
        "epsilon": rules.Epsilon(EPSILON),
        "z+": rules.ZPlus(),
        "gamma": rules.Gamma(GAMMA),
        "alpha-beta": rules.AlphaBeta(2, 1),
    }[method]
    chosen_rules = [(types.Convolution, conv), (types.Linear, rules.Epsilon(EPSILON))]
    composite = composites.LayerMapComposite([*composites.layer_map_base(), *chosen_rules])
    model, x = twin(network, Total), tensor(network.x)
    attribute = attribution.Gradient(model, composite)

    def run() -> np.ndarray:
        _, relevance = attribute(x.clone(), lambda out: out * one_hot(network, out))
        return array(relevance)

    return run


def zennit_integrated(network: Network) -> Run:
    """Integrated gradients by zennit, whose points are the ends of equal intervals."""
    from zennit import attribution

    x = tensor(network.x)
    attribute = attribution.IntegratedGradients(twin(network), n_iter=STEPS)
    return lambda: array(attribute(x.clone(), partial(one_hot, network))[1])


def captum_lrp(network: Network, *, method: str) -> Run:
    """LRP by captum, whose rules are attributes of modules that each call removes."""
    from captum.attr import LRP
    from captum.attr._utils.custom_modules import Addition_Module
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule

    conv = {
        "epsilon": partial(EpsilonRule, EPSILON),
        "z+": Alpha1_Beta0_Rule,
        "gamma": partial(GammaRule, GAMMA),
    }[method]
    model, x = twin(network, Addition_Module), tensor(network.x)

    def run() -> np.ndarray:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.rule = conv()
        return array(LRP(model).attribute(x.clone(), target=network.classes.tolist()).detach())

    return run


def captum_integrated(network: Network) -> Run:
    """Integrated gradients by captum, at midpoints, all of which are one batch."""
    from captum.attr import IntegratedGradients

    x, attribute = tensor(network.x), IntegratedGradients(twin(network)).attribute
    options = {"n_steps": STEPS, "method": "riemann_middle", "target": network.classes.tolist()}
    return lambda: array(attribute(x.clone(), **options).detach().to(x.dtype))


def captum_cam(network: Network) -> Run:
    """Grad-CAM by captum."""
    from captum.attr import LayerGradCam

    model, x = twin(network), tensor(network.x)
    attribute = LayerGradCam(model, cam_layer(network, model)).attribute
    options = {"target": network.classes.tolist(), "relu_attributions": True}
    return lambda: attribute(x.clone().requires_grad_(), **options).detach()[:, 0].numpy()


def autolrp(network: Network, *, method: str) -> Run:
    """LRP by autolrp, with its table of rules and the preset of the method's name in it."""
    from autolrp import ATTNLRP, BASE, CPLRP, LRPConfig
    from autolrp import tensor as wrapped

    entries: dict[str, Any] = {
        "epsilon": {},
        "z+": {"ConvolutionBackward": "zplus"},
        "gamma": {"ConvolutionBackward": ("gamma", {"gamma": GAMMA})},
        "alpha-beta": {"ConvolutionBackward": ("alpha_beta", {"alpha": 2.0, "beta": 1.0})},
        "AttnLRP": ATTNLRP,
        "CP-LRP": CPLRP,
    }[method]
    config = LRPConfig(rule={**BASE, **entries}, eps=EPSILON)
    model, x = twin(network), tensor(network.x)

    def run() -> np.ndarray:
        leaf = wrapped(x.clone())
        out = model(leaf)
        (out * one_hot(network, out)).sum().lrp(config=config)
        return array(leaf.relevance.as_subclass(torch.Tensor))

    return run


def lxt(network: Network, *, method: str) -> Run:
    """LRP by LXT: its forward methods in the places of a model's own, in this model alone."""
    patches = load_lxt("patches")
    attention, mlp = (
        (patches.wrap_attention_forward, patches.gated_mlp_forward)
        if method == "AttnLRP"
        else (patches.cp_wrap_attention_forward, patches.cp_gated_mlp_forward)
    )
    forwards = {
        nn.LayerNorm: patches.layer_norm_forward,
        RMSNorm: patches.rms_norm_forward,
        nn.GELU: patches.non_linear_forward,
        QuickGELU: patches.non_linear_forward,
        Normalise: lambda _, x: x * patches.stop_gradient(x.norm(dim=-1, keepdim=True) ** -1),
        GatedMLP: mlp,
    }
    model, x = twin(network), tensor(network.x)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attention(module.attend)
        elif type(module) in forwards:
            module.original_forward = module.forward
            module.forward = MethodType(forwards[type(module)], module)
    if method == "gamma":
        add_gamma(model)

    def run() -> np.ndarray:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(chosen(network, model(leaf)).sum(), leaf)
        return array(x * grad)

    return run


def add_gamma(model: nn.Module) -> None:
    """Zennit's Gamma on the dense layers of all MLPs, in the form that LXT gives its hooks."""
    from zennit import composites, rules

    changes = load_lxt("zennit_patches")
    methods = {"forward": changes.forward, "backward": changes.backward}
    gamma = type("Gamma", (rules.Gamma,), methods)
    names = [name for name, module in model.named_modules() if ".mlp." in name]
    composites.NameMapComposite([(names, gamma())]).register(model)


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


def hooked_cam(network: Network) -> Run:
    """Grad-CAM by hand: a hook makes the layer's output the beginning of the backward pass."""
    model, x, kept = twin(network), tensor(network.x), []

    def keep(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        kept.append(out.requires_grad_())
        return kept[-1]

    cam_layer(network, model).register_forward_hook(keep)

    def run() -> np.ndarray:
        kept.clear()
        score = chosen(network, model(x)).sum()
        (grad,) = torch.autograd.grad(score, kept)
        maps, grad = as_images(kept[0].detach()), as_images(grad)
        return (grad.mean((2, 3), keepdim=True) * maps).sum(1).relu().numpy()

    return run


def grad_cam(network: Network) -> Run:
    """Grad-CAM by pytorch-grad-cam, which scales its maps: see `as_grad_cam`."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = twin(network), tensor(network.x)
    shape = as_images if network.name in (VIT, CLIP_B32) else None
    cam = GradCAM(model, [cam_layer(network, model)], reshape_transform=shape)
    targets = [ClassifierOutputTarget(index) for index in network.classes]
    return lambda: cam(input_tensor=x.clone().requires_grad_(), targets=targets)


def as_grad_cam(maps: np.ndarray, side: int) -> np.ndarray:
    """Maps as pytorch-grad-cam gives them: in the image's size, each from 0 to 1."""
    from pytorch_grad_cam.utils.image import scale_cam_image

    return scale_cam_image(scale_cam_image(maps, (side, side)))


def cam_layer(network: Network, model: Any) -> nn.Module:
    """The module whose output JAX's function tags for Grad-CAM."""
    if network.name == VIT:
        return model.layers[-1].norm1
    if network.name == CLIP_B32:
        return model.layers[-2]
    if network.name == "ResNet-50":
        return model.blocks
    # Of a VGG with its last pooling, what is pooled.
    return model.features[-1 if network.name == CAPTIONER else -2]


def as_images(x: torch.Tensor) -> torch.Tensor:
    """Feature maps as they are, and tokens as a square grid of patches, channels first."""
    return x if x.ndim == 4 else by_patch(x).permute(0, 3, 1, 2)


def chosen(network: Network, out: torch.Tensor) -> torch.Tensor:
    """The logits of the chosen classes, [batch]."""
    return out[torch.arange(len(out)), torch.from_numpy(network.classes)]


def one_hot(network: Network, out: torch.Tensor) -> torch.Tensor:
    """1 for each example's class, of the output's shape."""
    return F.one_hot(torch.from_numpy(network.classes), out.shape[-1]).to(out)


def arrays(result: Any) -> list[np.ndarray]:
    """The arrays of a result."""
    return result if isinstance(result, list) else [result]
