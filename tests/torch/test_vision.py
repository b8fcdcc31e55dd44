"""VGG and ResNet agree with torch: modules in torchvision's layout, and transformers' ResNet."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrel.models.vision import PRESETS, ResNetConfig, VGGConfig, load_encoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
nn = torch.nn

pytestmark = pytest.mark.torch

# The published sizes, and others where no two numbers are equal.
CONFIGS = {
    "vgg": VGGConfig(((4, 5), (6,), (7, 8))),
    "basic": ResNetConfig("basic", (1, 3), (4, 6), 5),
    "bottleneck": ResNetConfig("bottleneck", (3, 2, 2), (2, 3, 4), 8),
    "vgg16": PRESETS["vgg16"],
    "resnet18": PRESETS["resnet18"],
    "resnet50": PRESETS["resnet50"],
}
RESNETS = {name: config for name, config in CONFIGS.items() if isinstance(config, ResNetConfig)}


def vgg(config):
    layers, inputs = [], 3
    for stage in config.stages:
        for width in stage:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.ModuleDict({"features": nn.Sequential(*layers)})


class Block(nn.Module):
    def __init__(self, basic, inputs, width, stride):
        super().__init__()
        outputs = width if basic else 4 * width
        if basic:
            sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        else:
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.count = len(sizes)
        for i, (before, after, side, step) in enumerate(sizes, 1):
            conv = nn.Conv2d(before, after, side, step, side // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(after))
        self.downsample = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.count else y
        return (y + self.downsample(x)).relu()


class ResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = config.stem
        for stage, depth in enumerate(config.stages):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                basic = config.block == "basic"
                blocks.append(Block(basic, inputs, config.widths[stage], stride))
                inputs = config.outputs[stage]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(config.stages)
        self.fc = nn.Linear(inputs, 3)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x


def in_use(module):
    """Values that no name or axis can be swapped for, and normalisation by them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return module.eval()


def agree(config, source, run, side=64, **options):
    images = np.random.default_rng(0).normal(size=(2, side, side + 9, 3)).astype(np.float32)
    with torch.no_grad():
        expected = run(torch.tensor(images.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    model = load_encoder(config, source, **options)
    actual = np.asarray(jax.jit(lambda model, x: model(x))(model, images))
    assert actual.shape[1:3] == config.grid(images.shape[1:3])
    # float32 on both sides, through up to fifty convolutions.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def saved(module, path):
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    save_file(state, path)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_layout_of_torchvision(name, tmp_path):
    config = CONFIGS[name]
    if isinstance(config, VGGConfig):
        module = in_use(vgg(config))
        run = module["features"][:-1]
    else:
        module = run = in_use(ResNet(config))
    agree(config, saved(module, tmp_path / "weights.safetensors"), run)


@pytest.mark.parametrize("name", RESNETS)
def test_agrees_with_transformers(name, tmp_path):
    config = RESNETS[name]
    theirs = transformers.ResNetConfig(
        embedding_size=config.stem,
        hidden_sizes=list(config.outputs),
        depths=list(config.stages),
        layer_type=config.block,
    )
    model = in_use(transformers.ResNetForImageClassification(theirs))
    model.save_pretrained(tmp_path / "classifier")
    model.resnet.save_pretrained(tmp_path / "encoder")
    run = lambda x: model.resnet(x).last_hidden_state
    agree(config, tmp_path / "classifier", run)
    agree(config, tmp_path / "encoder", run)


def test_pickled_weights_when_allowed(tmp_path):
    module = in_use(vgg(CONFIGS["vgg"]))
    torch.save(module.state_dict(), tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"vgg.pth is a pickled checkpoint"):
        load_encoder(CONFIGS["vgg"], tmp_path / "vgg.pth")
    run = module["features"][:-1]
    agree(CONFIGS["vgg"], tmp_path / "vgg.pth", run, allow_pickle=True)
    agree(CONFIGS["vgg"], tmp_path, run, allow_pickle=True)
