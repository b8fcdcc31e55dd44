"""LRP against the numbers of other implementations, on functions written as a user would.

Nothing here is prepared for LRP: batch normalisation is written out, residuals are plain sums.
Fixtures: relevance computed in float64 by zennit (CNNs) and LXT (transformers).
"""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import composites
from jaxrel.propagation.rules import Epsilon, Gamma, Gradient, ZPlus
from tests.paths import FIXTURES

EPS = 1e-6


def load(name):
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def under(arrays, prefix):
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return {
        k: jnp.asarray(v, jnp.float64 if v.dtype.kind == "f" else None) for k, v in found.items()
    }


def close(actual, expected, tolerance):
    expected = np.asarray(expected)
    error = np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))
    assert error < tolerance, f"{error:.1e} of the maximum"


def conv(x, w, b=None, stride=1, pad=1):
    y = lax.conv_general_dilated(
        x, w, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return y if b is None else y + b[:, None, None]


def max_pool(x, size=2):
    shape = (1, 1, size, size)
    return lax.reduce_window(x, -jnp.inf, lax.max, shape, shape, "VALID")


def vgg(p, x):
    x = jax.nn.relu(conv(x, p["conv1.weight"], p["conv1.bias"]))
    x = max_pool(jax.nn.relu(conv(x, p["conv2.weight"], p["conv2.bias"])))
    x = max_pool(jax.nn.relu(conv(x, p["conv3.weight"], p["conv3.bias"])))
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ p["fc1.weight"].T + p["fc1.bias"])
    return x @ p["fc2.weight"].T + p["fc2.bias"]


def batch_norm(p, name, x):
    mean, var, scale, bias = (
        p[f"{name}.{what}"][:, None, None]
        for what in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def block(p, name, x, stride):
    y = conv(x, p[f"{name}.conv1.weight"], stride=stride)
    y = jax.nn.relu(batch_norm(p, f"{name}.bn1", y))
    y = batch_norm(p, f"{name}.bn2", conv(y, p[f"{name}.conv2.weight"]))
    if f"{name}.downsample.0.weight" in p:
        x = conv(x, p[f"{name}.downsample.0.weight"], stride=stride, pad=0)
        x = batch_norm(p, f"{name}.downsample.1", x)
    return jax.nn.relu(x + y)


def resnet(p, x):
    x = max_pool(jax.nn.relu(batch_norm(p, "bn1", conv(x, p["conv1.weight"]))))
    x = block(p, "layer2", block(p, "layer1", x, 1), 2)
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]


def cnn_composites(low, high):
    conv, linear = jaxrel.op("conv"), jaxrel.op("dense")
    shares = (jaxrel.op("add", "mean"), Epsilon(EPS))
    without_bias = [(conv, ZPlus(bias="ignored")), (linear, Epsilon(bias="ignored")), shares]
    return {
        "epsilon_plus": composites.epsilon_plus(),
        "epsilon_plus_flat": composites.epsilon_plus_flat(),
        "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
        "epsilon_alpha2_beta1_flat": composites.epsilon_alpha2_beta1_flat(),
        "epsilon_gamma_box": composites.epsilon_gamma_box(low, high),
        "epsilon_gamma_box_eps01_gamma1": composites.epsilon_gamma_box(
            low, high, epsilon=0.1, gamma=1.0
        ),
        "epsilon_plus_zero_bias": jaxrel.Composite(without_bias),
        "excitation_backprop": composites.excitation_backprop(),
    }


GRADIENTS = ("guided_backprop", "deconvnet", "beta_smooth")
CNNS = {"vgg": (vgg, "vgg/"), "res": (resnet, "res/canon_exact/")}
NAMES = tuple(cnn_composites(0.0, 1.0))


@pytest.mark.parametrize("net", CNNS)
@pytest.mark.parametrize("name", NAMES + GRADIENTS)
def test_cnn_equals_zennit(x64, net, name):
    arrays = load("lrp_cnn")
    fun, prefix = CNNS[net]
    p = under(arrays, f"{net}/state/")
    x, low, high = (jnp.asarray(arrays[f"{net}/{k}"], jnp.float64) for k in ("x", "low", "high"))
    seed = jax.nn.one_hot(arrays[f"{net}/target"], 5)
    close(fun(p, x), arrays[f"{net}/logits64"], 1e-12)
    if name in GRADIENTS:
        explain = jaxrel.modified_gradient(fun, getattr(composites, name)(), argnums=1)
    else:
        explain = jaxrel.lrp(fun, cnn_composites(low, high)[name], argnums=1)
    # Both are float64 from end to end: what is left is the order of additions.
    close(jax.jit(explain)(p, x, seed=seed), arrays[f"{prefix}rel64/{name}"], 1e-12)


def layer_norm(x, scale, bias, eps=1e-5):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + eps) * scale + bias


def rms_norm(x, scale, eps=1e-6):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def attention(p, name, x, heads, causal=False):
    def project(which):
        y = x @ p[f"{name}.{which}.weight"].T
        y = y + p[f"{name}.{which}.bias"] if f"{name}.{which}.bias" in p else y
        return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    q, k, v = map(project, "qkv")
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    if causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    out = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    out = out @ p[f"{name}.o.weight"].T
    return out + p[f"{name}.o.bias"] if f"{name}.o.bias" in p else out


def mlp(p, name, x):
    hidden = jax.nn.gelu(x @ p[f"{name}.fc1.weight"].T + p[f"{name}.fc1.bias"], approximate=False)
    return hidden @ p[f"{name}.fc2.weight"].T + p[f"{name}.fc2.bias"]


def encoder(p, x, heads, layers, pre):
    def norm(name, x):
        return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"])

    for i in range(layers):
        name = f"blocks.{i}"
        if pre:
            x = x + attention(p, f"{name}.attn", norm(f"{name}.ln1", x), heads)
            x = x + mlp(p, name, norm(f"{name}.ln2", x))
        else:
            x = norm(f"{name}.ln1", x + attention(p, f"{name}.attn", x, heads))
            x = norm(f"{name}.ln2", x + mlp(p, name, x))
    x = norm("lnf", x[:, 0]) if pre else x[:, 0]
    return x @ p["head.weight"].T + p["head.bias"]


def decoder(p, x, heads, layers):
    for i in range(layers):
        name = f"blocks.{i}"
        normed = rms_norm(x, p[f"{name}.ln1.weight"])
        x = x + attention(p, f"{name}.attn", normed, heads, causal=True)
        normed = rms_norm(x, p[f"{name}.ln2.weight"])
        gate = jax.nn.silu(normed @ p[f"{name}.mlp.gate_proj.weight"].T)
        up = normed @ p[f"{name}.mlp.up_proj.weight"].T
        x = x + (gate * up) @ p[f"{name}.mlp.down_proj.weight"].T
    return rms_norm(x[:, -1], p["lnf.weight"]) @ p["head.weight"].T


# LXT's attention and cp modes keep the plain derivative of linear maps.
MODES = {
    "input_x_gradient": Gradient(),
    "attnlrp": composites.attn_lrp(epsilon=0.0),
    "cplrp": composites.cp_lrp(epsilon=0.0),
}


def transformer(arrays, net):
    layers = int(arrays[f"{net}/config/layers"])
    heads = int(arrays[f"{net}/config/heads"])
    if net == "dec":
        return lambda p, x: decoder(p, x, heads, layers)
    return lambda p, x: encoder(p, x, heads, layers, net.startswith("pre"))


@functools.cache
def explained(net, mode):
    """Logits, what is explained of them, and its relevance."""
    arrays = load("lrp_transformer")
    fun = transformer(arrays, net)
    p, x = under(arrays, f"{net}/state/"), jnp.asarray(arrays[f"{net}/x"], jnp.float64)
    logits = jax.jit(fun)(p, x)
    seed = jax.nn.one_hot(arrays[f"{net}/target"], logits.shape[-1]) * logits
    return logits, seed, jax.jit(jaxrel.lrp(fun, MODES[mode], argnums=1))(p, x, seed=seed)


@pytest.mark.parametrize("net", ["pre", "post", "pre_nobias", "post_nobias", "dec"])
@pytest.mark.parametrize("mode", MODES)
def test_transformer_equals_lxt(x64, net, mode):
    arrays = load("lrp_transformer")
    logits, _, relevance = explained(net, mode)
    # LXT computes the decoder's RMSNorm in float32, and divides by x + 1e-10 in an identity.
    tolerance = 1e-6 if net == "dec" else 1e-8
    close(logits, arrays[f"{net}/logits"], tolerance)
    close(relevance, arrays[f"{net}/rel/{mode}"], tolerance)


@pytest.mark.parametrize("net", ["pre_nobias", "post_nobias", "dec"])
def test_cp_lrp_conserves_without_biases(x64, net):
    _, seed, relevance = explained(net, "cplrp")
    # GELU's identity rule and the constant norms lose nothing: float64 rounding.
    np.testing.assert_allclose(relevance.sum((1, 2)), seed.sum(1), rtol=1e-12)


def vit(p, x, heads, layers):
    x = lax.conv_general_dilated(
        x, p["conv_proj.weight"], (4, 4), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    x = x + p["conv_proj.bias"][:, None, None]
    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    token = jnp.broadcast_to(p["class_token"], (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([token, x], axis=1) + p["encoder.pos_embedding"]

    def norm(name, x):
        return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)

    for i in range(layers):
        name = f"encoder.layers.encoder_layer_{i}"
        y = norm(f"{name}.ln_1", x)
        y = y @ p[f"{name}.self_attention.in_proj_weight"].T
        y = y + p[f"{name}.self_attention.in_proj_bias"]
        split = y.reshape(*y.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
        q, k, v = split
        maps = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]))
        y = (maps @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        y = y @ p[f"{name}.self_attention.out_proj.weight"].T
        x = x + (y + p[f"{name}.self_attention.out_proj.bias"])
        y = norm(f"{name}.ln_2", x)
        y = jax.nn.gelu(
            y @ p[f"{name}.mlp.0.weight"].T + p[f"{name}.mlp.0.bias"], approximate=False
        )
        x = x + (y @ p[f"{name}.mlp.3.weight"].T + p[f"{name}.mlp.3.bias"])
    x = norm("encoder.ln", x)[:, 0]
    return x @ p["heads.head.weight"].T + p["heads.head.bias"]


def cp_gamma(conv, linear):
    projections = jaxrel.path("*self_attention*")
    gamma = [
        (jaxrel.op("conv"), Gamma(conv)),
        (jaxrel.path("*mlp*") | jaxrel.path("heads*"), Gamma(linear)),
        (projections, Gradient()),
    ]
    return jaxrel.Composite(gamma) + composites.cp_lrp(epsilon=0.0)


VIT = {
    "input_x_gradient": Gradient(),
    "cp_lrp": composites.cp_lrp(epsilon=0.0),
    "cp_lrp_gamma_conv0.25_lin0.05": cp_gamma(0.25, 0.05),
    "cp_lrp_gamma_conv1_lin0.25": cp_gamma(1.0, 0.25),
}


@pytest.mark.parametrize("mode", VIT)
def test_vit_with_gamma_by_path_equals_lxt(x64, mode):
    arrays = load("lrp_vit")
    p, x = under(arrays, "state/"), jnp.asarray(arrays["x"], jnp.float64)

    def fun(p, x):
        return vit(p, x, heads=2, layers=2)

    logits = fun(p, x)
    close(logits, arrays["logits"], 1e-12)
    seed = jax.nn.one_hot(arrays["target"], 5) * logits
    relevance = jax.jit(jaxrel.lrp(fun, VIT[mode], argnums=1))(p, x, seed=seed)
    # LXT's Gamma divides by x + 1e-10 sign(x) on its way between gradient and relevance.
    close(relevance, arrays[f"rel/{mode}"], 1e-8)
