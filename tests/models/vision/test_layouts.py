"""Every layout of the weights of encoders, and weights that do not fit."""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from safetensors.numpy import save_file

from jaxrel.models.vision import PRESETS, encoder_from_tensors, load_encoder
from tests.zoo.encoders import (
    BASIC,
    BOTTLENECK,
    TINY,
    VGG_TINY,
    hugging_face,
    resnet_tensors,
    tensors_of,
    vgg_tensors,
)


def save(tensors, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def same(model, other):
    leaves = jax.tree.leaves(model), jax.tree.leaves(other)
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_file_folder_and_sizes_as_a_mapping(name, loaded, tmp_path):
    path = save(tensors_of(name), tmp_path / "weights.safetensors")
    save(tensors_of(name), tmp_path / "folder" / "model.safetensors")
    for source in (path, str(path), tmp_path / "folder"):
        assert same(load_encoder(TINY[name].to_dict(), source), loaded[name])


def test_parameters_lie_where_they_should(loaded):
    tensors = resnet_tensors(BASIC)
    stage = loaded["basic"].stages[1]
    kernel = tensors["layer2.2.conv1.weight"]
    np.testing.assert_array_equal(stage.rest.convs[0].conv.kernel[1], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        stage.first.shortcut.norm.var[...], tensors["layer2.0.downsample.1.running_var"]
    )


@pytest.mark.parametrize("prefix", ["resnet.", ""])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_layout_of_transformers(name, prefix, loaded):
    tensors = hugging_face(resnet_tensors(TINY[name]), prefix)
    assert f"{prefix}encoder.stages.1.layers.0.shortcut.normalization.running_var" in tensors
    assert same(encoder_from_tensors(TINY[name], tensors), loaded[name])


def test_layout_of_timm(loaded):
    tensors = vgg_tensors()
    head = {"pre_logits.fc1.weight": "classifier.0.weight", "head.fc.bias": "classifier.0.bias"}
    tensors |= {new: tensors.pop(old) for new, old in head.items()}
    assert same(encoder_from_tensors(VGG_TINY, tensors), loaded["vgg"])


def test_prefix_in_the_file_of_a_larger_model(loaded, tmp_path):
    features = {k: v for k, v in vgg_tensors().items() if k.startswith("features.")}
    alone = {name.removeprefix("features."): value for name, value in features.items()}
    assert same(encoder_from_tensors(VGG_TINY, alone), loaded["vgg"])
    inside = {f"img_encoder.encoder.{name}": value for name, value in alone.items()}
    path = save(inside | {"fc.weight": np.zeros((2, 2))}, tmp_path / "captioner.safetensors")
    model = load_encoder(VGG_TINY, path, prefix="img_encoder.encoder.")
    assert same(model, loaded["vgg"])
    inside = {f"encoder.{name}": value for name, value in resnet_tensors(BASIC).items()}
    assert same(encoder_from_tensors(BASIC, inside, prefix="encoder."), loaded["basic"])


def test_half_precision_file(tmp_path):
    tensors = {name: x.astype(np.float16) for name, x in vgg_tensors().items()}
    model = load_encoder(VGG_TINY, save(tensors, tmp_path / "half.safetensors"))
    kernel = model.stages[0][0].kernel[...]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel[..., 0, 1], tensors["features.0.weight"][1, 0])


def edited(tensors, **changes):
    """The tensors with others in their place; None takes a tensor out."""
    tensors = tensors | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("config", "tensors", "match"),
    [
        (
            VGG_TINY,
            {"backbone.features.0.weight": zeros(4, 3, 3, 3)},
            "no layout of weights that is known here: expected one of the tensors "
            r"features.0.weight, .* got backbone.features.0.weight. .* prefix=",
        ),
        (
            VGG_TINY,
            resnet_tensors(BASIC),
            "the tensors of a ResNet of torchvision or timm, and the sizes those of "
            r"VGGConfig\(stages=\(\(4, 4\), \(5,\), \(6, 7\)\)\); give the sizes",
        ),
        (
            PRESETS["resnet18"],
            vgg_tensors(),
            "the tensors of a VGG of torchvision or timm, and the sizes those of resnet18",
        ),
        (
            VGG_TINY,
            edited(vgg_tensors(), features__1__running_mean=zeros(4)),
            r"has batch normalisation \(features.1.running_mean\), which is not supported",
        ),
        (
            VGG_TINY,
            edited(vgg_tensors(), features__10__bias=None, features__13__bias=zeros(7)),
            "weights are not those of a VGG of torchvision or timm with the sizes of VGGConfig"
            r".*\. 1 tensors are missing: features.10.bias\. 1 tensors are unexpected: "
            r"features.13.bias\. Give the sizes of the model in the file$",
        ),
        (
            BASIC,
            {n: x for n, x in resnet_tensors(BASIC).items() if not n.startswith("layer2.2.")},
            r"10 tensors are missing: layer2.2.bn1.bias, .*, .* and 5 more\. Give the sizes",
        ),
        (
            BOTTLENECK,
            edited(hugging_face(resnet_tensors(BOTTLENECK)), resnet__pooler__weight=zeros(2)),
            "of a ResNet of transformers .* 1 tensors are unexpected: resnet.pooler.weight",
        ),
        (
            VGG_TINY,
            edited(vgg_tensors(), features__2__weight=zeros(4, 5, 3, 3)),
            r"the tensor features.2.weight has shape \[4, 5, 3, 3\], and a VGG .* has "
            r"\[4, 4, 3, 3\]; give the sizes",
        ),
        (
            BASIC,
            edited(resnet_tensors(BASIC), layer2__1__bn2__weight=zeros(5)),
            r"the tensor layer2.1.bn2.weight has shape \[5\], and a ResNet .* has \[6\]",
        ),
        (
            BASIC,
            edited(resnet_tensors(BASIC), bn1__running_var=np.full(5, np.nan, np.float32)),
            "the tensor bn1.running_var has 5 values of 5 that are NaN or infinite",
        ),
        (
            VGG_TINY,
            edited(vgg_tensors(), features__0__bias=zeros(4, dtype=np.int8)),
            "the tensor features.0.bias has dtype int8; quantised",
        ),
    ],
)
def test_wrong_weights(config, tensors, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        encoder_from_tensors(config, tensors)
    path = save(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"weights.safetensors: .*{match}"):
        load_encoder(config, path)


def test_prefix_without_tensors():
    match = "known here under the prefix 'encoder.': expected .*, got no tensor"
    with pytest.raises(ValueError, match=match):
        encoder_from_tensors(VGG_TINY, vgg_tensors(), prefix="encoder.")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none.safetensors; check the path"):
        load_encoder("vgg16", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_encoder("vgg16", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_encoder("vgg16", tmp_path)
    with pytest.raises(ValueError, match="no encoder is named 'vgg'"):
        load_encoder("vgg", tmp_path / "none.safetensors")
    broken = save(vgg_tensors(), tmp_path / "broken.safetensors")
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(OSError, match=r"broken.safetensors \(\d+ bytes\) is truncated"):
        load_encoder(VGG_TINY, broken)
    pickled = tmp_path / "vgg16-397923af.pth"
    pickled.write_bytes(b"")
    match = (
        r"vgg16-397923af.pth is a pickled checkpoint, .*save_file\(torch.load\("
        r"'vgg16-397923af.pth', weights_only=True\), 'vgg16-397923af.safetensors'\).*allow_pickle"
    )
    with pytest.raises(ValueError, match=match):
        load_encoder("vgg16", pickled)


def test_variants_that_tensors_do_not_show(loaded, tmp_path):
    save(hugging_face(resnet_tensors(BASIC)), tmp_path / "model.safetensors")
    config = {"model_type": "resnet", "hidden_act": "relu", "downsample_in_bottleneck": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(load_encoder(BASIC, tmp_path), loaded["basic"])
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    assert same(load_encoder(BASIC, tmp_path), loaded["basic"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"downsample_in_bottleneck": True}))
    match = "downsample_in_bottleneck is True, and this ResNet has False; use another checkpoint"
    with pytest.raises(ValueError, match=match):
        load_encoder(BASIC, tmp_path)
