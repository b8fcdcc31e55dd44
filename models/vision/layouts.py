"""Weights of image encoders, in the layouts of torchvision, timm and transformers."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax import numpy as jnp

from jaxrel.models.checkpoint import (
    CONFIG,
    PICKLES,
    Parameter,
    fill,
    find_folder,
    read_any_config,
    read_file,
    read_parameters,
    read_tensors,
    shapes_of,
    some,
)
from jaxrel.models.vision.config import (
    PRESETS,
    EncoderConfig,
    ResNetConfig,
    VGGConfig,
    encoder_config,
)
from jaxrel.models.vision.encoders import Encoder, make_encoder


@dataclass(frozen=True)
class _Layout:
    """A naming of tensors.

    Args:
      name: name of the layout, in words.
      kind: kind of encoder that it names.
      first: the name of the first convolution's kernel, by which the layout is known.
      table: where each parameter is; it may have parameters that these sizes do not.
      ignored: how the names of a classifier's tensors begin.
    """

    name: str
    kind: type[EncoderConfig]
    first: str
    table: Callable[[Any], list[Parameter]]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Later(Parameter):
    """A parameter of the blocks after the first of a stage: "{layer}" begins at 1."""

    def names(self, shape: Sequence[int]) -> list[str]:
        return [self.name.format(layer=1 + index) for index in range(shape[0])]


def _kernel(kind: type[Parameter], path: tuple[str, ...], name: str) -> Parameter:
    # Kernels are OIHW in the files, and HWIO here.
    return kind((*path, "kernel"), f"{name}.weight", (2, 3, 1, 0))


def _vgg_table(config: VGGConfig, *, prefix: str) -> list[Parameter]:
    """The modules are numbered, and ReLUs and poolings count."""
    table, module = [], 0
    for stage, widths in enumerate(config.stages):
        for index in range(len(widths)):
            path, name = ("stages", str(stage), str(index)), f"{prefix}{module}"
            table.append(_kernel(Parameter, path, name))
            table.append(Parameter((*path, "bias"), f"{name}.bias"))
            module += 2
        module += 1
    return table


def _resnet_table(
    config: ResNetConfig,
    *,
    stem: tuple[str, ...],
    block: str,
    conv: tuple[str, ...],
    shortcut: tuple[str, ...],
) -> list[Parameter]:
    """Names are of pairs, a convolution and its normalisation; {index} is from 0, {number} from 1.

    Every stage gets a shortcut and later blocks, whether or not it has them.
    """
    stages = stages_table(config.stages, config.convolutions, block, conv, shortcut)
    return [*conv_norm(Parameter, ("stem",), "", stem), *stages]


def stages_table(
    stages: Sequence[int],
    convolutions: int,
    block: str,
    conv: tuple[str, ...],
    shortcut: tuple[str, ...],
) -> list[Parameter]:
    """The stages of a ResNet.

    Args:
      stages: the number of blocks of each.
      convolutions: of a block, without its shortcut's.
      block: begins the names of a block; as of `_resnet_table`, as are the others.
      conv: names of a convolution and its normalisation.
      shortcut: the same of the shortcut's.
    """
    table: list[Parameter] = []
    for stage in range(len(stages)):
        for kind, part, layer in ((Parameter, "first", "0"), (_Later, "rest", "{layer}")):
            path = ("stages", str(stage), part)
            prefix = block.format(index=stage, number=stage + 1, layer=layer) + "."
            for i in range(convolutions):
                names = tuple(name.format(index=i, number=i + 1) for name in conv)
                table += conv_norm(kind, (*path, "convs", str(i)), prefix, names)
            table += conv_norm(kind, (*path, "shortcut"), prefix, shortcut)
    return table


def conv_norm(
    kind: type[Parameter], path: tuple[str, ...], prefix: str, names: tuple[str, ...]
) -> list[Parameter]:
    """A convolution without bias and its normalisation, whose names begin with `prefix`."""
    conv, norm = (prefix + name for name in names)
    ours = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return [
        _kernel(kind, (*path, "conv"), conv),
        *(kind((*path, "norm", key), f"{norm}.{name}") for key, name in ours.items()),
    ]


def _hugging_face(prefix: str) -> _Layout:
    names = ("convolution", "normalization")
    table = partial(
        _resnet_table,
        stem=tuple(f"{prefix}embedder.embedder.{name}" for name in names),
        block=f"{prefix}encoder.stages.{{index}}.layers.{{layer}}",
        conv=tuple(f"layer.{{index}}.{name}" for name in names),
        shortcut=tuple(f"shortcut.{name}" for name in names),
    )
    first = f"{prefix}embedder.embedder.convolution.weight"
    return _Layout("a ResNet of transformers", ResNetConfig, first, table, ("classifier.",))


_LAYOUTS = (
    _Layout(
        "a VGG of torchvision or timm",
        VGGConfig,
        "features.0.weight",
        partial(_vgg_table, prefix="features."),
        ("classifier.", "pre_logits.", "head."),
    ),
    _Layout("the features of a VGG", VGGConfig, "0.weight", partial(_vgg_table, prefix="")),
    _Layout(
        "a ResNet of torchvision or timm",
        ResNetConfig,
        "conv1.weight",
        partial(
            _resnet_table,
            stem=("conv1", "bn1"),
            block="layer{number}.{layer}",
            conv=("conv{number}", "bn{number}"),
            shortcut=("downsample.0", "downsample.1"),
        ),
        ("fc.",),
    ),
    _hugging_face("resnet."),
    _hugging_face(""),
)

# The number of batches that a normalisation has seen, which is no value of the model.
COUNTER = "num_batches_tracked"

# What the tensors of a Hugging Face ResNet do not show.
_HUGGING_FACE_VARIANTS = {
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}


def load_encoder(
    config: str | Mapping[str, Any] | EncoderConfig,
    source: str | os.PathLike,
    *,
    prefix: str = "",
    dtype: Any = jnp.float32,
    allow_pickle: bool = False,
) -> Encoder:
    """Load an encoder from weights in one of the common layouts.

    The layout is seen from the names of the tensors: torchvision's and timm's of VGG and ResNet,
    that of ResNet in transformers, and that of torchvision's `vgg.features` alone. A classifier
    in the file is ignored.

    Args:
      config: a preset's name or the sizes; see `encoder_config`.
      source: a file of weights, or a folder or hub name, such as "timm/vgg16.tv_in1k".
      prefix: start of the encoder's names in the file of a larger model, such as
        "img_encoder.encoder." in the reference implementation of Sun et al. 2022; all others are
        ignored then.
      dtype: dtype of the computation; parameters are float32.
      allow_pickle: read a pickled checkpoint where there is nothing else; needs torch.

    Returns:
      A `VGG` or a `ResNet`.

    Raises:
      FileNotFoundError: no such file, folder or model.
      OSError: the hub did not answer, or a file is truncated.
      ImportError: pickled weights were allowed, and torch is not installed.
      ValueError: the weights have an unknown layout, are not those of an encoder of these sizes,
        are pickled, or hold values that are not finite.
    """
    config = encoder_config(config)
    path = Path(source).expanduser()
    if path.is_dir() or not any(map(path.match, ("*.safetensors", *PICKLES))):
        path = find_folder(source)
        _check_variant(path)
        tensors = read_tensors(path, allow_pickle=allow_pickle)
    else:
        tensors = read_file(path, allow_pickle=allow_pickle)
    try:
        return encoder_from_tensors(config, tensors, prefix=prefix, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_variant(folder: Path) -> None:
    """Refuse a ResNet of transformers with strides or activations that are not this model's."""
    config = read_any_config(folder) if (folder / CONFIG).is_file() else {}
    if config.get("model_type") != ResNetConfig.model_type:
        return
    for key, value in _HUGGING_FACE_VARIANTS.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{folder / CONFIG}: {key} is {config[key]!r}, and this ResNet has {value!r}; "
                "use another checkpoint"
            )


def encoder_from_tensors(
    config: EncoderConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    prefix: str = "",
    dtype: Any = jnp.float32,
) -> Encoder:
    """Make an encoder of tensors that have been read already; see `load_encoder`.

    Args:
      config: the sizes.
      tensors: tensors by name.
      prefix: start of the encoder's names; tensors without it are ignored.
      dtype: dtype of the computation; parameters are float32.

    Returns:
      A `VGG` or a `ResNet`.

    Raises:
      ValueError: an unknown layout, or tensors that are not those of an encoder of these sizes or
        are not finite.
    """
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.endswith(COUNTER)
    }
    layout = _find_layout(config, found, prefix)
    found = {name: x for name, x in found.items() if not name.startswith(layout.ignored)}
    model = nnx.eval_shape(lambda: make_encoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    shapes = shapes_of(model)
    table = [parameter for parameter in layout.table(config) if parameter.path in shapes]
    wanted = f"{layout.name} with the sizes of {_name(config)}"
    fill(model, read_parameters(found, table, shapes, wanted=wanted))
    return model


def _find_layout(config: EncoderConfig, tensors: Mapping[str, np.ndarray], prefix: str) -> _Layout:
    layout = next((layout for layout in _LAYOUTS if layout.first in tensors), None)
    if layout is None:
        under = f" under the prefix {prefix!r}" if prefix else ""
        raise ValueError(
            f"no layout of weights that is known here{under}: expected one of the tensors "
            f"{', '.join(layout.first for layout in _LAYOUTS)}, got "
            f"{some(sorted(tensors)) or 'no tensor'}. Convert the weights, or name the tensors' "
            "prefix with prefix="
        )
    if not isinstance(config, layout.kind):
        raise ValueError(
            f"these are the tensors of {layout.name}, and the sizes those of {_name(config)}; "
            "give the sizes of the encoder in the file"
        )
    statistics = [name for name in tensors if name.endswith("running_mean")]
    if layout.kind is VGGConfig and statistics:
        raise ValueError(
            f"this VGG has batch normalisation ({some(sorted(statistics))}), which is not "
            "supported; use the weights of a VGG without it"
        )
    return layout


def _name(config: EncoderConfig) -> str:
    return next((name for name, preset in PRESETS.items() if preset == config), repr(config))
