"""One batch shared among the devices of two processes, as where a slice spans hosts."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np

from jaxrel import Explainer
from tests.zoo.clips import small_clip

PROGRAM = """
    import json, os, sys
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
    from tests.batch.test_processes import explained
    found = explained(jax.make_mesh((jax.device_count(),), ("data",)))
    print("found", json.dumps([jax.device_count(), found]))
"""


def explained(mesh):
    rng = np.random.default_rng(0)
    seen = [*rng.integers(0, 256, (5, 16, 16, 3), np.uint8)]
    explain = Explainer(small_clip(), "equal", batch_size=8, mesh=mesh)
    found = explain({"image": seen, "text": ["a red circle"] * 5})
    return [found["score"], [x.tolist() for x in found["image_relevance"]]]


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def test_every_process_has_the_whole_result():
    port = str(free_port())
    # They compile as this process does: see `quick_compile`.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), port, str(number)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for number in range(2)
    ]
    wanted = explained(None)
    for process in processes:
        (line,) = [x for x in process.communicate()[0].splitlines() if x.startswith("found ")]
        devices, found = json.loads(line.removeprefix("found "))
        assert devices == 4
        for mine, whole in zip(found, wanted, strict=True):
            # float32: each device sums two rows, and not eight.
            scale = np.abs(whole).max()
            np.testing.assert_allclose(mine, whole, rtol=1e-4, atol=1e-5 * scale)
