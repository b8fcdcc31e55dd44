"""The definitions in NumPy, one example and one layer at a time, and random maps to try them on."""

import jax
import numpy as np

from jaxrel.attention import Layers

# The measures of importance.
MEASURES = {
    "grad_value": lambda value, grad: np.maximum(grad * value, 0).sum(-1),
    "norm": lambda value, grad: np.linalg.norm(value, axis=-1),
    "abs_grad_value": lambda value, grad: abs((grad * value).sum(-1)),
}


def random_layers(rng, count, query, key, batch=2, heads=2, width=3, dtype=np.float64):
    """Layers of one kind, with their token values."""
    attn = rng.dirichlet(np.ones(key), (count, batch, heads, query)).astype(dtype)
    values = (rng.normal(size=(count, batch, query, width)).astype(dtype) for _ in range(3))
    return Layers(attn, rng.normal(size=attn.shape).astype(dtype), *values)


def random_maps(seed, layers=3, batch=2, heads=2, tokens=5, width=4, dtype=np.float64):
    """Maps, their gradients, and by name the token values of self-attention layers."""
    rng = np.random.default_rng(seed)
    attn, grad, *values = random_layers(rng, layers, tokens, tokens, batch, heads, width, dtype)
    return attn, grad, dict(zip(Layers._fields[2:], values, strict=True))


def random_inputs(seed, layers=3, batch=2, heads=2, tokens=5, width=4, dtype=np.float64):
    """Maps, their gradients, and by name all that any method takes beside them."""
    attn, grad, values = random_maps(seed, layers, batch, heads, tokens, width, dtype)
    rng = np.random.default_rng(seed + 100)
    values["following"] = rng.normal(size=values["before"].shape).astype(dtype)
    for name in ("query", "key", "value", "mixed_grad"):
        values[name] = rng.normal(size=(layers, batch, tokens, heads, 3)).astype(dtype)
    return attn, grad, values


def one_head(*layers):
    """Maps [layers, 1, 1, T, T]; with a gradient of 1 they are their own head mean."""
    attn = np.array(layers, np.float32)[:, None, None]
    return attn, np.ones_like(attn)


def float32(tree):
    return jax.tree.map(lambda x: x.astype(np.float32), tree)


def abar(layers, i, b):
    """Eq. 5 for one example and one layer, in float64."""
    product = np.asarray(layers.attn[i, b], np.float64) * np.asarray(layers.grad[i, b], np.float64)
    return np.maximum(product, 0).mean(0)


def branch_weights(layers, i, b, importance):
    """Alpha and beta by a measure's name, one column each; 1 and 1 for equal accumulation."""
    if importance is None:
        return 1.0, 1.0
    before, after, grad = (np.asarray(x[i, b], np.float64) for x in layers[2:])
    u, v = (MEASURES[importance](x, grad)[:, None] for x in (before, after))
    total = np.where(u + v == 0, 1, u + v)
    return np.where(u + v == 0, 1, 2 * u / total), np.where(u + v == 0, 1, 2 * v / total)


def rbar(r, kept):
    """Eq. 8 and 9."""
    moved = r - kept
    total = moved.sum(-1, keepdims=True)
    return np.divide(moved, total, out=np.zeros_like(moved), where=total > 0) + np.eye(len(r))


def by_loop(schedule, b, importance=None, residual=True):
    """Equations 5 to 11 over a schedule; `kept` is the diagonal that residuals carry."""
    size = {}
    for stage in (stage for block in schedule for stage in block):
        for pair, layers in stage.items():
            size[pair[0]], size[pair[1]] = layers.attn.shape[-2:]
    r = {x + y: np.eye(size[x]) * (x == y) for x in "sq" for y in "sq"}
    r |= {x + y: np.zeros((size[x], size[y])) for x, y in ("sq", "qs")}
    kept = {x: np.eye(size[x]) for x in "sq"}
    for block in schedule:
        count = max(len(layers.attn) for stage in block for layers in stage.values())
        for i in range(count):
            for stage in block:
                old, old_kept = dict(r), dict(kept)
                for (x, y), layers in stage.items():
                    if i >= len(layers.attn):
                        continue
                    a, other = abar(layers, i, b), "q" if x == "s" else "s"
                    alpha, beta = branch_weights(layers, i, b, importance)
                    if x == y:
                        own, across = a @ old[x + x], a @ old[x + other]
                    else:
                        mine, theirs = (rbar(old[z + z], old_kept[z]) for z in (x, y))
                        own, across = a @ old[y + x], mine.T @ a @ theirs
                    r[x + x] = alpha * old[x + x] + beta * own
                    r[x + other] = alpha * old[x + other] + beta * across
                    kept[x] = alpha * old_kept[x]
    if not residual:
        r |= {x + x: r[x + x] - kept[x] for x in "sq"}
    return r


def rolled_out(maps, b):
    flow = np.eye(maps[0].shape[-1])
    for attn in maps:
        step = np.asarray(attn[b], np.float64).mean(0) + np.eye(len(flow))
        flow = step / step.sum(-1, keepdims=True) @ flow
    return flow


def transformer_attribution(layers, b):
    flow = np.eye(layers[0].attn.shape[-1])
    for one in layers:
        flow = flow + abar(one, 0, b) @ flow
    return flow


def rows_by_hand(name, schedule, layers, b, seen):
    """The maps ss and sq of one example by a bimodal method.

    The tokens `seen` of s, a slice or indices, reach what is explained. Where q does not attend to
    itself its rollout is the identity.
    """
    if name in ("equal", "weighted", "equal_lrp"):
        blocks = [[{p: layers[tag] for p, tag in stage} for stage in block] for block in schedule]
        maps = by_loop(blocks, b, "grad_value" if name == "weighted" else None, residual=False)
        return maps["ss"], maps["sq"]

    def kind(pair):
        for block in schedule:
            there = [layers[tag] for stage in block for p, tag in stage if p == pair]
            for i in range(max((len(x.attn) for x in there), default=0)):
                for x in there:
                    if i < len(x.attn):
                        yield Layers(x.attn[i : i + 1], x.grad[i : i + 1])

    ss, sq, qq = (list(kind(pair)) for pair in ("ss", "sq", "qq"))
    last = [[np.asarray(x[0, b], np.float64) for x in kind[-1][:2]] for kind in (ss, sq)]
    if name in ("raw", "partial_lrp"):
        return [attn.mean(0) for attn, _ in last]
    if name == "grad_cam":
        last = [(attn, np.where(attn > 0, grad, 0)) for attn, grad in last]
        of_heads = [grad.mean((1, 2), keepdims=True) * attn for attn, grad in last]
        return [np.maximum(x.mean(0), 0) for x in of_heads]
    if name == "rollout":
        text = rolled_out([x.attn[0] for x in ss], b)
        image = rolled_out([x.attn[0] for x in qq], b) if qq else np.eye(last[1][0].shape[-1])
        return text, text[seen].T @ last[1][0].mean(0)[seen] @ image
    text = transformer_attribution(ss, b)
    image = transformer_attribution(qq, b) if qq else np.eye(last[1][0].shape[-1])
    return text, text.T @ abar(sq[-1], 0, b) @ image
