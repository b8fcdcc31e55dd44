"""Models of Keras with JAX behind it."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
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

WIDTH, TOKENS = 8, 5


def stateless(model: keras.Model, x) -> Model:
    """A Keras model as a function of its variables, at inference."""
    parts = model.trainable_variables, model.non_trainable_variables
    params = [{v.path: jnp.asarray(v.value) for v in variables} for variables in parts]

    def fun(params, x):
        # A dict that has gone through JAX is sorted.
        ordered = [[p[v.path] for v in part] for p, part in zip(params, parts, strict=True)]
        return model.stateless_call(*ordered, x, training=False)[0]

    return Model(fun, random_like(params), x)


def application(build, side: int = 32, **options) -> Model:
    keras.backend.set_floatx(str(jnp.result_type(float)))
    keras.utils.set_random_seed(0)
    model = build(
        weights=None,
        input_shape=(side, side, 3),
        classes=CLASSES,
        classifier_activation=None,
        **options,
    )
    return stateless(model, normal(BATCH, side, side, 3))


def mobilenet_v3() -> Model:
    return application(keras.applications.MobileNetV3Small, alpha=0.25, minimalistic=False)


def transformer() -> Model:
    keras.backend.set_floatx(str(jnp.result_type(float)))
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = layers.Input((TOKENS, WIDTH))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, WIDTH // 2, flash_attention=False)(y, y)])
        y = layers.Dense(2 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    out = layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x))
    return stateless(keras.Model(inputs, out), normal(BATCH, TOKENS, WIDTH))


F32 = "float32"  # what Keras computes softmaxes and means in
# Its hard sigmoid, and hard swish, are ReLU6 of x + 3, and times x.
HARD = Slopes(gate="sigmoid").plus("jax.nn.relu6")
EXHIBITS = [
    Exhibit("MobileNet v3", "keras", mobilenet_v3, "epsilon_plus", slopes=HARD, dtype="float32"),
    Exhibit("Transformer", "keras", transformer, attention=Attention(2, dtype=F32), dtype=F32),
]
