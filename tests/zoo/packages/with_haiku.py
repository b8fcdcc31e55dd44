"""Models of dm-haiku, and of jraph with its layers."""

import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jraph
import numpy as np
from jax import numpy as jnp

from tests.zoo.packages.exhibit import (
    BATCH,
    CLASSES,
    Attention,
    Exhibit,
    Model,
    Slopes,
    normal,
    random_like,
)

WIDTH, HEADS, TOKENS = 8, 2, 5
NODES, EDGES = 6, 14


def transformed(apply: Callable, x: Any) -> Model:
    """A function of haiku's modules and of whether it is training, explained at inference."""
    model = hk.without_apply_rng(hk.transform_with_state(apply))
    init = jax.jit(functools.partial(model.init, is_training=True))
    params = random_like(init(jax.random.PRNGKey(0), x))
    return Model(lambda params, x: model.apply(*params, x, is_training=False)[0], params, x)


def resnet() -> Model:
    def apply(x, is_training):
        net = hk.nets.ResNet(
            blocks_per_group=(1, 1, 1, 1),
            num_classes=CLASSES,
            bottleneck=True,
            channels_per_group=(8, 8, 12, 12),
            use_projection=(True, True, True, True),
            initial_conv_config={"output_channels": 6},
        )
        return net(x, is_training)

    return transformed(apply, normal(BATCH, 16, 16, 3))


def mobilenet() -> Model:
    def apply(x, is_training):
        net = hk.nets.MobileNetV1(strides=(1, 2), channels=(6, 8), num_classes=CLASSES, use_bn=True)
        return net(x, is_training)

    return transformed(apply, normal(BATCH, 16, 16, 3))


def transformer() -> Model:
    """Pre-norm layers of `hk.MultiHeadAttention`, as in haiku's own examples."""

    def norm(x):
        return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

    def apply(x, is_training):
        for _ in range(2):
            attention = hk.MultiHeadAttention(
                HEADS, WIDTH // HEADS, w_init=hk.initializers.VarianceScaling(1.0)
            )
            y = norm(x)
            x = x + attention(y, y, y)
            x = x + hk.nets.MLP([2 * WIDTH, WIDTH], activation=jax.nn.gelu)(norm(x))
        return hk.Linear(CLASSES)(norm(x).mean(1))

    return transformed(apply, normal(BATCH, TOKENS, WIDTH))


def lstm() -> Model:
    def apply(x, is_training):
        core = hk.DeepRNN([hk.LSTM(WIDTH), jax.nn.relu, hk.GRU(WIDTH)])
        outs, _ = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)
        return hk.Linear(CLASSES)(outs[:, -1])

    return transformed(apply, normal(BATCH, TOKENS, WIDTH))


def graphs(layers: Callable) -> Model:
    """A classifier of graphs of one shape: layers, then the mean over nodes."""
    rng = np.random.default_rng(0)
    senders, receivers = rng.integers(0, NODES, (2, EDGES - NODES))
    ends = [np.concatenate([part, np.arange(NODES)]) for part in (senders, receivers)]
    edges = rng.normal(size=(EDGES, 2))

    def apply(nodes):
        graph = jraph.GraphsTuple(
            nodes=nodes,
            edges=jnp.asarray(edges),
            senders=jnp.asarray(ends[0]),
            receivers=jnp.asarray(ends[1]),
            n_node=jnp.array([NODES]),
            n_edge=jnp.array([EDGES]),
            globals=jnp.ones((1, 2)),
        )
        return hk.Linear(CLASSES)(layers(graph).nodes.mean(0))

    one = hk.without_apply_rng(hk.transform(apply))
    x = normal(BATCH, NODES, WIDTH)
    params = random_like(jax.jit(one.init)(jax.random.PRNGKey(0), x[0]))
    return Model(jax.vmap(one.apply, in_axes=(None, 0)), params, x)


def gat() -> Model:
    def layers(graph):
        for _ in range(2):
            layer = jraph.GAT(
                attention_query_fn=lambda nodes: hk.Linear(WIDTH)(nodes),
                attention_logit_fn=lambda sent, received, _: jax.nn.leaky_relu(
                    hk.Linear(1)(jnp.concatenate([sent, received], axis=-1))
                ),
            )
            graph = layer(graph)
        return graph

    return graphs(layers)


def gcn() -> Model:
    def layers(graph):
        for _ in range(2):
            update = lambda nodes: jax.nn.relu(hk.Linear(WIDTH)(nodes))
            graph = jraph.GraphConvolution(update, add_self_edges=True)(graph)
        return graph

    return graphs(layers)


def interaction() -> Model:
    def layers(graph):
        update = lambda width: jraph.concatenated_args(hk.nets.MLP([WIDTH, width]))
        return jraph.InteractionNetwork(update(3), update(WIDTH))(graph)

    return graphs(layers)


EXHIBITS = [
    Exhibit("ResNet (bottleneck)", "dm-haiku", resnet, "epsilon_plus_flat"),
    Exhibit("MobileNet v1", "dm-haiku", mobilenet, "epsilon_plus_flat"),
    Exhibit("Transformer", "dm-haiku", transformer, attention=Attention(2)),
    Exhibit("LSTM and GRU", "dm-haiku", lstm, "captioning", slopes=Slopes(gate="sigmoid")),
    Exhibit("GAT", "jraph", gat, slopes=Slopes().plus("jraph._src.utils.segment_softmax")),
    Exhibit("GCN", "jraph", gcn, "epsilon_plus"),
    Exhibit("Interaction network", "jraph", interaction, "epsilon_plus"),
]
