"""The comparison with other libraries, at tiny sizes."""

import json
import math
from importlib.util import find_spec

import pytest

from tests.benchmarks.side_by_side import ours, page
from tests.benchmarks.side_by_side.__main__ import main
from tests.benchmarks.side_by_side.networks import (
    CONVOLUTIONAL,
    GRAD_CAM,
    INTEGRATED,
)

# Two float32 programs whose sums have another order; LRP also divides by values near zero.
GRADIENT, LRP = 1e-4, 2e-2
# By tool, or by tool and method; all others define something else, as README.md says.
MOST = {
    "torch": GRADIENT,
    "torch, grad per layer": GRADIENT,
    "torch, grad once": GRADIENT,
    "torch, hooks": GRADIENT,
    "pytorch-grad-cam": GRADIENT,
    "LXT": LRP,
    **{("captum", method): GRADIENT for method in (GRAD_CAM, INTEGRATED)},
    **{("zennit", method): LRP for method in CONVOLUTIONAL},
    ("captum", "epsilon"): LRP,
}
PAGE = "Before.\n\n<!-- side by side: begin -->\nold\n<!-- side by side: end -->\n\nAfter.\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(PAGE)
    return tmp_path


def measured(folder, *names):
    main([*names, "--tiny", "--rounds", "1", "--folder", str(folder)])
    return json.loads((folder / "side_by_side.json").read_text())["groups"]


def test_what_is_kept_is_not_measured_again(folder):
    name = "12-layer decoder: AttnLRP"
    tools = measured(folder, name)[name]["tools"]
    assert set(tools) >= {ours.BASE, ours.COMPILED, ours.EAGER}
    assert tools[ours.EAGER]["difference"] < 1e-4  # float32
    text = (folder / "README.md").read_text()
    assert text.startswith("Before.\n\n<!-- side by side: begin -->\n\n")
    assert text.endswith("\n<!-- side by side: end -->\n\nAfter.\n")
    assert "old" not in text
    assert "| AttnLRP | jaxrel, eager |" in text
    assert (folder / page.PLOT).read_text().startswith("<?xml")
    assert measured(folder, name)[name]["tools"] == tools
    assert measured(folder, name, "--again", name)[name]["tools"] != tools


@pytest.mark.torch
@pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
# All peers occur in these two.
@pytest.mark.parametrize("network", ["ViT-B/16", "VGG16"])
def test_tools_agree(folder, network):
    for name, group in measured(folder, network).items():
        for tool, found in group["tools"].items():
            assert "error" not in found, (name, tool)
            most = MOST.get(tool, MOST.get((tool, name.split(": ")[1]), math.inf))
            assert found.get("difference", 0) < most, (name, tool)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tiny"], "--tiny needs --folder"),
        (["VGG"], "unknown name 'VGG'; there are CLIP ViT-B/32; ViT-B/16; "),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
    ],
)
def test_wrong_options_are_refused(argv, said, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert said in capsys.readouterr().err
