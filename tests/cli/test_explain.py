"""The command line end to end: what it writes, and one clear line for each kind of bad input."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image
from safetensors.numpy import load_file, save_file

import jaxrel
from jaxrel import attention, cli
from jaxrel.cli import doctor
from jaxrel.explanations.explain import METHODS
from jaxrel.models import CLIP
from tests.paths import ROOT


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the model folder, to be broken."""
    return shutil.copytree(saved, tmp_path / "model")


def make_image(path, size=(40, 30), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def open_image(path):
    with Image.open(path) as image:
        return image.copy()


@pytest.fixture
def scene(tmp_path):
    return make_image(tmp_path / "scene.png")


@pytest.fixture
def run(saved, tmp_path, capsys):
    """Run `jaxrel explain`; returns (status, standard output, standard error)."""

    def run(*arguments, out=tmp_path / "out", model=saved):
        command = ["explain", *map(str, arguments), "--model", str(model), "--out", str(out)]
        try:
            status = cli.main(command)
        except SystemExit as exit:  # argparse
            status = exit.code
        return status, *capsys.readouterr()

    return run


# -- what it does ----------------------------------------------------------------------------


def test_explain_writes_an_image_and_a_page(run, scene, tmp_path):
    status, printed, _ = run(scene, "--text", "a red circle")
    assert status == 0
    assert "a red circle: score" in printed
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["explanation.html", "explanation.png"]
    assert open_image(tmp_path / "out" / "explanation.png").size[0] > 320
    assert "a red circle" in (tmp_path / "out" / "explanation.html").read_text()


def test_nothing_is_overwritten_unless_asked(run, scene, tmp_path):
    asked = (scene, "--text", "a circle", "--method", "raw")
    _, printed, _ = run(*asked)
    assert "explanation.png" in printed
    before = (tmp_path / "out" / "explanation.png").read_bytes()
    _, printed, _ = run(*asked, "--format", "png,svg,pdf")
    assert "explanation-2.png" in printed
    _, printed, _ = run(*asked, "--format", "html")
    assert "explanation-3.html" not in printed  # explanation-2.html is free
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [
        *("explanation-2.html", "explanation-2.pdf", "explanation-2.png", "explanation-2.svg"),
        *("explanation.html", "explanation.png"),
    ]
    (tmp_path / "out" / "explanation.png").write_bytes(b"old")
    run(*asked, "--overwrite", "--format", "png")
    assert (tmp_path / "out" / "explanation.png").read_bytes() == before
    assert len([*(tmp_path / "out").iterdir()]) == 6


def test_what_is_unusual_is_said_everywhere(scene, tmp_path, capsys):
    """A noisy image, and a word that the bundled model does not know."""
    out = ["--method", "raw", "--out", str(tmp_path / "out")]
    assert cli.main(["explain", str(scene), "--text", "a red banana", *out]) == 0
    printed = capsys.readouterr().out
    assert "  note: This image is unlike those the model was trained on (Shapes)" in printed
    assert "  note: The model does not know 'banana'." in printed
    page = (tmp_path / "out" / "explanation.html").read_text()
    assert 'role="note">This image is unlike' in page
    assert "scene.png" in page
    assert cli.main(["explain", str(scene), "--text", "a red banana", *out, "--json"]) == 0
    (example,) = json.loads(capsys.readouterr().out)["explanations"][0]["examples"]
    assert example["familiarity"]["unlike"] is True
    assert example["unknown_words"] == ["banana"]
    assert len(example["notes"]) == 2


def test_all_methods_side_by_side_as_json(run, scene):
    status, printed, _ = run(scene, "--text", "a red circle", "--method", "all", "--json")
    assert status == 0
    result = json.loads(printed)
    assert [one["method"] for one in result["explanations"]] == list(METHODS)
    (example,) = result["explanations"][0]["examples"]
    assert example["file"] == example["picture"] == str(scene)
    assert np.shape(example["image"]) == (2, 2)
    assert [word for word, _ in example["words"]] == ["a", "red", "circle"]


def test_json_has_a_line_per_row_and_the_shortest_numbers(run, scene, saved):
    status, printed, _ = run(scene, "--text", "a red circle", "--method", "raw", "--json")
    assert status == 0
    (example,) = json.loads(printed)["explanations"][0]["examples"]
    lines = [line.strip(" ,") for line in printed.splitlines()]
    for row in [*example["image"], *example["words"]]:
        assert json.dumps(row) in lines
    model = CLIP.from_pretrained(saved)
    one = jaxrel.explain(model, image=open_image(scene), text="a red circle", method="raw")
    given = [one.score[0], *one.image[0].ravel(), *(value for _, value in one.words(0))]
    found = [example["score"], *np.ravel(example["image"]), *(x for _, x in example["words"])]
    np.testing.assert_array_equal(np.float32(found), np.float32(given))
    assert found == [float(str(x)) for x in np.float32(given)]


def test_many_images_and_one_text_or_one_each(run, tmp_path):
    images = [make_image(tmp_path / f"{i}.jpg", seed=i) for i in range(3)]
    of_attention = ("--method", "raw")
    status, printed, _ = run(*images, "--text", "a circle", *of_attention)
    assert (status, printed.count("a circle: score")) == (0, 3)
    texts = [part for word in ("red", "blue", "square") for part in ("--text", f"a {word}")]
    status, printed, _ = run(*images, *texts, *of_attention)
    assert status == 0
    assert [line.split(": score")[0].split(", ")[1] for line in printed.splitlines()[:3]] == [
        "a red",
        "a blue",
        "a square",
    ]
    status, printed, _ = run(images[0], *texts, *of_attention)
    assert (status, printed.count("score")) == (0, 3)


def test_layers_heads_and_importance(run, scene):
    options = ("--layers", "-1", "--heads", "1", "--importance", "norm", "--json")
    status, printed, _ = run(scene, "--text", "a circle", *options)
    assert status == 0
    assert json.loads(printed)["explanations"][0]["settings"] == (
        "layers -1, heads 1, importance norm"
    )


def test_unknown_words_are_warned_about(saved, scene, tmp_path):
    # In a process of its own: a warning is shown by the module it comes from, and checked types
    # put modules of their own between.
    command = ["explain", scene, "--text", "a purple circle", "--method", "raw"]
    run = [
        sys.executable,
        "-m",
        "jaxrel.cli",
        *command,
        "--model",
        saved,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.startswith("jaxrel: warning: ")
    assert "purple" in done.stderr


def test_explain_equals_the_matrix_form_on_the_models_own_maps(model, scene):
    image = open_image(scene)
    result = jaxrel.explain(model, image=image, text="a red circle", method="equal")
    inputs = model.prepare(image=image, text="a red circle")
    _, maps, grads = jax.jit(CLIP.attention_gradients)(model, inputs)
    vision = attention.equal(maps["vision"], grads["vision"])[:, 0, 1:]
    # Another order of the same float32 sums.
    np.testing.assert_allclose(result.image.reshape(1, -1), vision, rtol=1e-4, atol=1e-6)
    text = attention.equal(maps["text"], grads["text"])[0, 4]
    np.testing.assert_allclose(result.text[0, 1:4], text[1:4], rtol=1e-4, atol=1e-6)
    assert not result.text[0, 0]
    assert not result.text[0, 4:].any()


IMAGES = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(3)]
TEXTS = ["a red circle", "a square", "a circle above a square"]


@pytest.fixture(scope="module")
def explained(model):
    """A batch by all methods, in one program; and its examples one by one, in another."""
    batch = jaxrel.explain(model, image=IMAGES, text=TEXTS, method=METHODS)
    apart = [
        jaxrel.explain(model, image=image, text=text, method=METHODS)
        for image, text in zip(IMAGES, TEXTS, strict=True)
    ]
    return batch, apart


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_explained_as_one_by_one(explained, method):
    which = METHODS.index(method)
    batch, apart = explained[0][which], [found[which] for found in explained[1]]
    assert {one.method for one in (batch, *apart)} == {method}
    for i, (one, text) in enumerate(zip(apart, TEXTS, strict=True)):
        # XLA sums batches of another size in another order.
        np.testing.assert_allclose(batch.image[i], one.image[0], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(batch.text[i], one.text[0], rtol=1e-3, atol=1e-6)
        assert batch.target[i] == one.target[0] == text


def test_the_image_shown_is_the_part_the_model_sees(model):
    wide = Image.fromarray(np.zeros((20, 60, 3), np.uint8))
    result = jaxrel.explain(model, image=wide, text="a circle")
    assert result.pixels[0].shape == (20, 20, 3)


def test_target_chooses_the_text(model, scene):
    image = open_image(scene)
    result = jaxrel.explain(model, image=image, text=["a circle", "a square"], target=1)
    assert result.target == ("a square",)


def test_doctor_names_versions_devices_and_models(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("jaxrel ", "python ", "jax ", "flax ", "devices: ", "bundled models: "):
        assert word in printed


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "no-such-package", "report")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    how = "(extra report: pip install 'jaxrel[report]')"
    assert f"no-such-package is not installed {how}" in lines
    for package in ("pyarrow", "duckdb", "pandas", "ray", "scikit-image", "playwright"):
        (line,) = (line for line in lines if line.startswith(f"{package} "))
        assert line.startswith(f"{package} {_held(package)}")


def _held(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed (extra "


def test_doctor_knows_the_packages_of_each_extra():
    """All but those that only developers of jaxrel install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    users = ("train", "report", "batch", "ray", "photographs", "torch", "browser")
    listed = {
        re.match(r"[\w-]+", requirement)[0]: extra
        for extra in users
        for requirement in project["optional-dependencies"][extra]
        if not requirement.startswith("jaxrel[")
    }
    assert listed == doctor.EXTRAS


def test_debug_shows_where(scene):
    with pytest.raises(ValueError, match="unknown method"):
        cli.main(["--debug", "explain", str(scene), "--text", "a", "--method", "x"])


def test_train_refuses_a_folder_that_is_no_model_before_any_work(capsys, tmp_path):
    make_image(tmp_path / "scene.png")
    for out, text in (
        (tmp_path, "is no model folder"),
        (tmp_path / "scene.png" / "x", "is a file"),
    ):
        assert cli.main(["train", "clip-shapes", "--out", str(out)]) == 2
        assert text in capsys.readouterr().err


def test_train_refuses_bad_settings_before_any_work(capsys, tmp_path):
    out = tmp_path / "model"
    assert cli.main(["train", "clip-shapes", "--out", str(out), "--steps", "0"]) == 2
    assert "steps must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["train", "clip-shapes", "--out", str(out), "--scenes", "8"]) == 2
    assert "batch 128 is more than the 8 scenes" in capsys.readouterr().err
    assert not out.exists()


# -- bad input -------------------------------------------------------------------------------


def broken_png(path):
    make_image(path)
    path.write_bytes(path.read_bytes()[:200])


def bomb(path):
    Image.new("1", (20_000, 20_000)).save(path)


FILES = {
    "missing": (lambda path: None, "scene.png"),
    "folder": (lambda path: path.mkdir(), "folder"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text file": (lambda path: path.write_text("hello"), "not an image"),
    "truncated": (broken_png, "truncated"),
    "bomb": (bomb, "too large: 400,000,000 pixels"),
}

WEIGHTS = "model.safetensors"


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def spoil(tensors):
    name = "visual_projection.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = np.nan


def reshape(tensors):
    tensors["visual_projection.weight"] = np.zeros((3, 3), np.float32)


def other_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


MODELS = {
    "no folder": (shutil.rmtree, "no model"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "other architecture": (other_architecture, "bert"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "model.safetensors"),
    "truncated weights": (truncate, "truncated"),
    "pickled weights": (pickled, "pickle"),
    "NaN in weights": (lambda f: rewrite(f, spoil), "visual_projection.weight"),
    "wrong shape": (
        lambda f: rewrite(f, reshape),
        "has shape [3, 3], and config.json says [10, 16]",
    ),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop("visual_projection.weight")),
        "visual_projection.weight",
    ),
    "foreign tensor": (
        lambda f: rewrite(f, lambda t: t.update(extra=np.zeros(1, np.float32))),
        "extra",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
    "no preprocessing": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        "preprocessor_config.json",
    ),
}

OPTIONS = {
    "empty text": (("--text", ""), "the text is empty"),
    "white text": (("--text", " \n"), "the text is empty"),
    "long text": (("--text", "a red circle above a blue square"), "8"),
    "unknown words only": (("--text", "xyzzy plugh"), "xyzzy"),
    "method": (("--text", "a", "--method", "magic"), "unknown method 'magic'"),
    "no method": (("--text", "a", "--method", ""), "no method given"),
    "layer": (("--text", "a", "--layers", "7"), "7"),
    "layers": (("--text", "a", "--layers", "last"), "expected whole numbers with commas"),
    "head": (("--text", "a", "--heads", "5"), "5"),
    "importance": (("--text", "a", "--importance", "size"), "grad_value"),
    "no text": ((), "--text"),
    "format": (("--text", "a", "--format", "gif"), "unknown format 'gif'; there are png, html"),
}


def refuse(result, text, out):
    status, printed, errors = result
    assert status == 2
    assert printed == ""
    assert "Traceback" not in errors
    assert text in errors
    assert not out.exists()


@pytest.mark.parametrize(("make", "text"), FILES.values(), ids=FILES.keys())
def test_bad_images(run, tmp_path, make, text):
    make(tmp_path / "scene.png")
    refuse(run(tmp_path / "scene.png", "--text", "a circle"), text, tmp_path / "out")


@pytest.mark.parametrize(("spoil", "text"), MODELS.values(), ids=MODELS.keys())
def test_bad_models(run, scene, folder, tmp_path, spoil, text):
    spoil(folder)
    refuse(run(scene, "--text", "a circle", model=folder), text, tmp_path / "out")


@pytest.mark.parametrize(("options", "text"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(run, scene, tmp_path, options, text):
    refuse(run(scene, *options), text, tmp_path / "out")


def test_numbers_of_images_and_texts_must_fit(run, scene, tmp_path):
    result = run(scene, scene, scene, "--text", "a", "--text", "red")
    refuse(result, "3 images and 2 texts", tmp_path / "out")


def test_out_must_not_be_a_file(run, scene):
    status, _, errors = run(scene, "--text", "a circle", out=scene)
    assert (status, "is a file; name a folder" in errors) == (2, True)
    assert open_image(scene).size == (40, 30)


def test_nothing_is_written_when_relevance_is_not_finite(model, scene):
    broken = jax.tree.map(lambda x: x, model)
    broken.logit_scale[...] = jnp.float32(1e6)
    with pytest.raises(ValueError, match=r"NaN|infin|finite"):
        jaxrel.explain(broken, image=open_image(scene), text="a circle")
