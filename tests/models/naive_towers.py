"""Towers as their papers have them, from tensors as they are published: float64, plain loops."""

import math

import numpy as np


def layer_norm(x, tensors, name, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x, tensors, name):
    y = x @ tensors[f"{name}.weight"].T.astype(np.float64)
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def gelu(x):
    return x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def attend(query, key, value, heads, hidden=None):
    """Attention of one example, head by head: [queries, width], and the maps."""
    out, maps = np.zeros((len(query), value.shape[1])), []
    features = query.shape[1] // heads
    for head in range(heads):
        part = slice(head * features, (head + 1) * features)
        scores = query[:, part] @ key[:, part].T / math.sqrt(features)
        if hidden is not None:
            scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        maps.append(weights / weights.sum(1, keepdims=True))
        out[:, part] = maps[-1] @ value[:, part]
    return out, np.stack(maps)


def patches(image, tensors, name, size):
    """The embedded patches of one image, row by row."""
    kernel = tensors[f"{name}.weight"].astype(np.float64)
    rows, columns = image.shape[0] // size, image.shape[1] // size
    found = []
    for i in range(rows):
        for j in range(columns):
            patch = image[i * size : (i + 1) * size, j * size : (j + 1) * size]
            found.append(np.einsum("hwc,ochw->o", patch, kernel))
    bias = tensors.get(f"{name}.bias", 0)
    return np.stack(found) + bias


def siglip_layer(x, tensors, name, heads, eps=1e-6):
    normed = layer_norm(x, tensors, f"{name}.layer_norm1", eps)
    q, k, v = (linear(normed, tensors, f"{name}.self_attn.{n}_proj") for n in "qkv")
    attended, maps = attend(q, k, v, heads)
    x = x + linear(attended, tensors, f"{name}.self_attn.out_proj")
    hidden = gelu_tanh(
        linear(layer_norm(x, tensors, f"{name}.layer_norm2", eps), tensors, f"{name}.mlp.fc1")
    )
    return x + linear(hidden, tensors, f"{name}.mlp.fc2"), maps


def siglip_image(image, tensors, *, layers, heads, patch, eps=1e-6):
    """What SigLIP pools of an image, before it is normalised, and the pooling map."""
    name = "vision_model"
    x = patches(image, tensors, f"{name}.embeddings.patch_embedding", patch)
    x = x + tensors[f"{name}.embeddings.position_embedding.weight"]
    for layer in range(layers):
        x, _ = siglip_layer(x, tensors, f"{name}.encoder.layers.{layer}", heads)
    x = layer_norm(x, tensors, f"{name}.post_layernorm", eps)
    head = f"{name}.head"
    weight, bias = (tensors[f"{head}.attention.in_proj_{n}"] for n in ("weight", "bias"))
    width = x.shape[1]
    q, k, v = (
        source @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width]
        for i, source in enumerate((tensors[f"{head}.probe"][0], x, x))
    )
    pooled, maps = attend(q, k, v, heads)
    pooled = linear(pooled, tensors, f"{head}.attention.out_proj")
    hidden = gelu_tanh(
        linear(layer_norm(pooled, tensors, f"{head}.layernorm", eps), tensors, f"{head}.mlp.fc1")
    )
    return (pooled + linear(hidden, tensors, f"{head}.mlp.fc2"))[0], maps


def siglip_text(ids, tensors, *, layers, heads, eps=1e-6):
    """SigLIP's embedding of a text, before it is normalised: every token sees all."""
    name = "text_model"
    x = tensors[f"{name}.embeddings.token_embedding.weight"][ids].astype(np.float64)
    x = x + tensors[f"{name}.embeddings.position_embedding.weight"]
    for layer in range(layers):
        x, _ = siglip_layer(x, tensors, f"{name}.encoder.layers.{layer}", heads)
    x = layer_norm(x, tensors, f"{name}.final_layer_norm", eps)
    return linear(x[-1], tensors, f"{name}.head")


def rotated(x, grid, heads, theta):
    """Queries or keys of patches, each pair of features turned by its place: one by one."""
    x, features = x.copy(), x.shape[1] // heads
    rows, columns = grid
    before = len(x) - rows * columns
    for place in range(rows * columns):
        centre = [
            2 * (place // columns + 0.5) / rows - 1,
            2 * (place % columns + 0.5) / columns - 1,
        ]
        for head in range(heads):
            for i in range(features // 2):
                axis, number = divmod(i, features // 4)
                angle = 2 * math.pi * centre[axis] / theta ** (4 * number / features)
                first, second = head * features + i, head * features + i + features // 2
                a, b = x[before + place, first], x[before + place, second]
                x[before + place, first] = a * math.cos(angle) - b * math.sin(angle)
                x[before + place, second] = b * math.cos(angle) + a * math.sin(angle)
    return x


def dino(image, tensors, *, layers, heads, patch, v3, act=gelu, eps, registers, theta=100.0):
    """All tokens of a DINO ViT after its last norm, of one image."""
    table = "embeddings.patch_embeddings" + ("" if v3 else ".projection")
    x = patches(image, tensors, table, patch)
    grid = image.shape[0] // patch, image.shape[1] // patch
    first = tensors["embeddings.cls_token"][0]
    x = np.concatenate([first, x])
    if not v3:
        x = x + tensors["embeddings.position_embeddings"][0]
    if registers:
        x = np.concatenate([x[:1], tensors["embeddings.register_tokens"][0], x[1:]])
    names = ("q_proj", "k_proj", "v_proj") if v3 else ("query", "key", "value")
    for layer in range(layers):
        name = f"layer.{layer}" if v3 else f"encoder.layer.{layer}"
        inner = f"{name}.attention" if v3 else f"{name}.attention.attention"
        normed = layer_norm(x, tensors, f"{name}.norm1", eps)
        q, k, v = (linear(normed, tensors, f"{inner}.{n}") for n in names)
        if v3:
            q, k = (rotated(one, grid, heads, theta) for one in (q, k))
        out = f"{name}.attention.o_proj" if v3 else f"{name}.attention.output.dense"
        added = linear(attend(q, k, v, heads)[0], tensors, out)
        x = x + added * tensors[f"{name}.layer_scale1.lambda1"]
        added = dino_mlp(layer_norm(x, tensors, f"{name}.norm2", eps), tensors, f"{name}.mlp", act)
        x = x + added * tensors[f"{name}.layer_scale2.lambda1"]
    return layer_norm(x, tensors, "norm" if v3 else "layernorm", eps)


def dino_mlp(x, tensors, name, act):
    if f"{name}.weights_in.weight" in tensors:
        gate, up = np.split(linear(x, tensors, f"{name}.weights_in"), 2, axis=-1)
        return linear(silu(gate) * up, tensors, f"{name}.weights_out")
    if f"{name}.gate_proj.weight" in tensors:
        gate, up = (linear(x, tensors, f"{name}.{n}_proj") for n in ("gate", "up"))
        return linear(act(gate) * up, tensors, f"{name}.down_proj")
    first, last = (
        ("up_proj", "down_proj") if f"{name}.up_proj.weight" in tensors else ("fc1", "fc2")
    )
    return linear(act(linear(x, tensors, f"{name}.{first}")), tensors, f"{name}.{last}")
