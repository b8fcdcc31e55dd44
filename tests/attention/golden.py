"""The reference's maps, gradients and numbers, stored in tests/fixtures."""

import functools

import numpy as np

from jaxrel import attention
from tests.paths import FIXTURES


@functools.cache
def load(name):
    """The arrays of `attention_{name}.npz`, by name."""
    with np.load(FIXTURES / f"attention_{name}.npz", allow_pickle=False) as file:
        return dict(file)


def clip_maps(tower, kind):
    """What a tower of the small CLIP computed, [layers, batch, heads, query, key]."""
    clip = load("clip")
    layers = sum(name.startswith(f"{tower}/attn/") for name in clip)
    return np.stack([clip[f"{tower}/{kind}/{layer}"] for layer in range(layers)])


def stack(data, prefix, modules, attn="attn", grads=None):
    """Layers from the stored maps [heads, query, key], with a batch of one."""
    maps = [data[f"{prefix}maps/{m}/{attn}"] for m in modules]
    grads = [(grads or {}).get(m, data.get(f"{prefix}maps/{m}/grad")) for m in modules]
    return attention.Layers(np.stack(maps)[:, None], np.stack(grads)[:, None])


def lxmert_layers(prefix="", attn="attn", cross_layers=None, grads=None):
    """What `bimodal` takes, from the stored maps of an LXMERT; s is the text."""
    data = load("bimodal")
    count = cross_layers or int(data[f"{prefix}config/cross_layers"])

    def kind(name, layers):
        return stack(data, prefix, [name.format(i) for i in range(layers)], attn, grads)

    return (
        kind("lang_self/{}", int(data[f"{prefix}config/lang_layers"])),
        kind("image_self/{}", int(data[f"{prefix}config/image_layers"])),
        attention.CoAttention(
            s_cross=kind("cross/{}/lang_cross", count),
            s_self=kind("cross/{}/lang_self", count),
            q_cross=kind("cross/{}/image_cross", count),
            q_self=kind("cross/{}/image_self", count),
        ),
    )


def detr_layers(prefix="", target="", attn="attn", grads=None):
    """What `encoder_decoder` takes, from the stored maps of a DETR."""
    data = load("encdec")
    maps = dict(data)
    # attn does not depend on the target, the gradients and the LRP relevance do.
    for name in data:
        if target and name.startswith(f"{target}maps/"):
            maps[name.removeprefix(target)] = data[name]

    def kind(name, count):
        modules = [f"{name}/{i}" for i in range(int(data[f"{prefix}config/{count}"]))]
        return stack(maps, prefix, modules, attn, grads)

    return (
        kind("enc_self", "enc_layers"),
        kind("dec_self", "dec_layers"),
        kind("dec_cross", "dec_layers"),
    )
