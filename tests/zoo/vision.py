"""Convolutional networks: VGG16, ResNet-18, ResNet-50, and one with group norms."""

from functools import partial

import jax
from flax import nnx
from jax import numpy as jnp

from tests.zoo.case import BATCH, CLASSES, Case, call, filled, generator, normal

SIDE = 32


class VGG16(nnx.Module):
    def __init__(self, width, *, use_bias, rngs):
        sizes = [width] * 2 + [2 * width] * 2 + [4 * width] * 3 + [8 * width] * 6
        self.convolutions = nnx.List(
            nnx.Conv(inputs, outputs, (3, 3), use_bias=use_bias, rngs=rngs)
            for inputs, outputs in zip([3, *sizes[:-1]], sizes, strict=True)
        )
        hidden = 2 * sizes[-1]
        self.dense1 = nnx.Linear(sizes[-1], hidden, use_bias=use_bias, rngs=rngs)
        self.dense2 = nnx.Linear(hidden, hidden, use_bias=use_bias, rngs=rngs)
        self.dense3 = nnx.Linear(hidden, CLASSES, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        for index, convolution in enumerate(self.convolutions):
            x = nnx.relu(convolution(x))
            if index in (1, 3, 6, 9, 12):
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return self.dense3(nnx.relu(self.dense2(nnx.relu(self.dense1(x)))))


def convolution(inputs, outputs, side, stride, rngs):
    return nnx.Conv(inputs, outputs, (side, side), stride, use_bias=False, rngs=rngs)


def batch_norm(features, rngs):
    return nnx.BatchNorm(features, use_running_average=True, rngs=rngs)


class Basic(nnx.Module):
    expansion = 1

    def __init__(self, inputs, width, stride, *, rngs):
        self.conv1 = convolution(inputs, width, 3, stride, rngs)
        self.norm1 = batch_norm(width, rngs)
        self.conv2 = convolution(width, width, 3, 1, rngs)
        self.norm2 = batch_norm(width, rngs)
        self.shortcut = Shortcut(inputs, width, stride, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nnx.Module):
    expansion = 4

    def __init__(self, inputs, width, stride, *, rngs):
        self.conv1 = convolution(inputs, width, 1, 1, rngs)
        self.norm1 = batch_norm(width, rngs)
        self.conv2 = convolution(width, width, 3, stride, rngs)
        self.norm2 = batch_norm(width, rngs)
        self.conv3 = convolution(width, 4 * width, 1, 1, rngs)
        self.norm3 = batch_norm(4 * width, rngs)
        self.shortcut = Shortcut(inputs, 4 * width, stride, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        return nnx.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class Shortcut(nnx.Module):
    def __init__(self, inputs, outputs, stride, *, rngs):
        self.identity = inputs == outputs and stride == 1
        if not self.identity:
            self.conv = convolution(inputs, outputs, 1, stride, rngs)
            self.norm = batch_norm(outputs, rngs)

    def __call__(self, x):
        return x if self.identity else self.norm(self.conv(x))


class ResNet(nnx.Module):
    def __init__(self, block, depths, width, *, use_bias, rngs):
        self.stem = convolution(3, width, 7, 2, rngs)
        self.norm = batch_norm(width, rngs)
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(block(inputs, width * 2**stage, stride, rngs=rngs))
                inputs = block.expansion * width * 2**stage
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, CLASSES, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


class GroupNormNet(nnx.Module):
    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.norm1 = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
        self.norm2 = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = nnx.silu(self.norm2(self.conv2(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))


def images(key, dtype, side=SIDE):
    return normal(generator(key), (BATCH, side, side, 3), dtype)


def network(build, key, dtype, *, biased):
    weights, inputs = jax.random.split(key)
    params = filled(lambda: build(rngs=nnx.Rngs(0)), weights, dtype, biased=biased)
    return Case(call, params, images(inputs, dtype), "rectifier", conserves=not biased)


def vgg16(key, dtype, *, biased=True):
    return network(partial(VGG16, 2, use_bias=biased), key, dtype, biased=biased)


def resnet18(key, dtype, *, biased=True):
    build = partial(ResNet, Basic, (2, 2, 2, 2), 4, use_bias=biased)
    return network(build, key, dtype, biased=biased)


def resnet50(key, dtype, *, biased=True):
    build = partial(ResNet, Bottleneck, (3, 4, 6, 3), 2, use_bias=biased)
    return network(build, key, dtype, biased=biased)


def group_norm(key, dtype):
    return network(GroupNormNet, key, dtype, biased=True)


ZOO = {
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "group_norm": group_norm,
}
BIAS_FREE = {
    f"{make.__name__}_bias_free": partial(make, biased=False)
    for make in (vgg16, resnet18, resnet50)
}
