"""The engine of Ray Data: the same files as the embedded engine writes, also when workers die."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from jaxrel.batch.folder import read_manifest

pytest.importorskip("ray")
pandas = pytest.importorskip("pandas")
# Ray and datasets warn of their own.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

JAXREL = [sys.executable, "-m", "jaxrel.cli"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(96):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i:03d}.png")
    (folder / "050.png").write_bytes(b"no image")
    return folder


def command(images, out, *more):
    asked = ["--text", "a red circle", "--batch-size", "8", "--shard-rows", "12"]
    return [*JAXREL, "batch", str(images), *asked, "--out", str(out), *more]


@pytest.fixture(scope="module")
def wanted(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("jobs") / "embedded"
    subprocess.run(command(images, out), check=True)
    return pandas.read_parquet(out)


def assert_same(out, wanted):
    frame = pandas.read_parquet(out)
    assert frame.id.tolist() == wanted.id.tolist()
    assert frame.error.isna().tolist() == wanted.error.isna().tolist()
    good = frame.error.isna()
    assert good.sum() == 95
    np.testing.assert_array_equal(frame.score[good], wanted.score[good])
    for a, b in zip(frame.image_relevance[good], wanted.image_relevance[good], strict=True):
        np.testing.assert_array_equal(a, b)


def workers():
    """Processes of Ray that run our actor."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if b"ray::MapWorker" in file.read():
                    found.append(int(name))
        except OSError:
            continue
    return found


def test_a_worker_that_is_killed_is_replaced(images, wanted, tmp_path):
    out = tmp_path / "ray"
    process = subprocess.Popen(command(images, out, "--engine", "ray", "--num-cpus", "1"))
    killed = []

    def kill():
        while process.poll() is None and not killed:
            if len([*out.glob("*.parquet")]) >= 2 and (found := workers()):
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    assert process.wait() == 0
    thread.join()
    assert killed
    assert_same(out, wanted)


def test_a_job_goes_on_after_the_driver_was_killed(images, wanted, tmp_path):
    """Also what the command line does when it is killed itself, with a real model."""
    out = tmp_path / "job"
    process = subprocess.Popen(command(images, out))
    while not len([*out.glob("*.parquet")]) >= 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len([*out.glob("*.parquet")]) < 8
    subprocess.run(command(images, out), check=True)
    assert_same(out, wanted)
    assert read_manifest(out)["provenance"]["engine"] == "embedded"


def test_the_explainer_in_ray_data_and_in_a_function_of_ones_own(images, wanted):
    import ray

    from jaxrel import Explainer
    from jaxrel.models import CLIP

    class Mine:
        def __init__(self):
            self.explain = Explainer(CLIP.from_pretrained("clip-shapes"), batch_size=8)

        def __call__(self, batch):
            return self.explain(batch)

    rows = [
        {"id": path.name, "image": str(path), "text": "a red circle"}
        for path in sorted(images.iterdir())[:16]
    ]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = ray.data.from_items(rows).map_batches(
            Mine, batch_format="pyarrow", batch_size=8, compute=ray.data.ActorPoolStrategy(size=1)
        )
        frame = found.to_pandas().sort_values("id")
    finally:
        ray.shutdown()
    np.testing.assert_allclose(frame.score, wanted.score[:16], rtol=1e-5)


def test_the_explainer_in_datasets_map(images, wanted):
    datasets = pytest.importorskip("datasets")

    from jaxrel import Explainer
    from jaxrel.models import CLIP

    explain = Explainer(CLIP.from_pretrained("clip-shapes"), batch_size=8)
    paths = [str(path) for path in sorted(images.iterdir())[:16]]
    given = datasets.Dataset.from_dict({"image": paths, "text": ["a red circle"] * 16})
    found = given.map(explain, batched=True, batch_size=16, remove_columns=given.column_names)
    np.testing.assert_allclose(found["score"], wanted.score[:16], rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(found["image_relevance"]).reshape(16, -1),
        np.stack(wanted.image_relevance[:16]),
        rtol=1e-4,
        atol=1e-7,
    )
