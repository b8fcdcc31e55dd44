"""The training loop: what it computes, what survives a kill, and what it says when it stops."""

import dataclasses
import json
import math
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh

from jaxrel.train.loop.batches import Arrays, batches
from jaxrel.train.loop.fit import fit
from jaxrel.train.loop.optimiser import adamw, warmup_cosine
from tests.paths import ROOT

EXAMPLES, FEATURES, BATCH = 80, 6, 16
ONE = Mesh(np.array(jax.devices()[:1]), ("data",))


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 0
    steps: int = 14
    sizes: tuple[int, ...] = (FEATURES, 8)


class Net(nnx.Module):
    """Two parts and something that is no parameter."""

    def __init__(self, rngs, width=8):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.second = nnx.Linear(width, 1, dtype=jnp.bfloat16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


GRAPH, PARAMS, REST = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)


def loss(params, batch, key):
    """Regression in bfloat16, with noise that shows whether the keys are right."""
    net = nnx.merge(GRAPH, params, REST)
    noise = 0.01 * jax.random.normal(key, batch["x"].shape)
    error = net.second(jax.nn.relu(net.first(batch["x"] + noise)))[:, 0] - batch["y"]
    return (error**2).mean(), {"error": jnp.abs(error).mean()}


def exact(params, batch, key):
    """The regression in float32 and without noise."""
    hidden = jax.nn.relu(batch["x"] @ params["first"])
    error = (hidden @ params["second"])[:, 0] - batch["y"]
    return (error**2).mean(), {"error": jnp.abs(error).mean()}


WEIGHTS = {
    "first": np.linspace(-1, 1, FEATURES * 8, dtype=np.float32).reshape(FEATURES, 8),
    "second": np.linspace(-1, 0.9, 8, dtype=np.float32).reshape(8, 1),
}


def source(**changes):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EXAMPLES, FEATURES)).astype(np.float32)
    return Arrays(**{"x": x, "y": np.sin(x.sum(1)), **changes})


RATE = warmup_cosine(0.05, Settings.steps, 2)


def run(folder, settings=Settings(), **options):
    """A small training on one device; `options` replace any argument of `fit`."""
    options = {
        "loss": exact,
        "params": WEIGHTS,
        "optimiser": optax.sgd(0.1),
        "data": batches(source(), batch=BATCH, seed=settings.seed),
        "steps": settings.steps,
        "mesh": ONE,
        "log_every": 2,
        "checkpoint_every": 4,
        **options,
    }
    return fit(key=jax.random.key(settings.seed), settings=settings, folder=folder, **options)


def run_net(folder, settings=Settings(), **options):
    """The training of `Net` with all that has a state, on all devices."""
    options = {"loss": loss, "params": PARAMS, "mesh": None, "schedule": RATE, **options}
    return run(folder, settings, optimiser=adamw(RATE, weight_decay=0.1), **options)


def stuck(folder):
    """A training that stops for ever at step 12, where the log asks for the learning rate."""
    run_net(folder, schedule=lambda n: RATE(n) if n < 11 else threading.Event().wait())


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def lines(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def without_times(entries):
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in entries]


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and its parameters."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "whole"
    return folder, run_net(folder)


def test_a_killed_run_goes_on_bit_by_bit(whole, tmp_path):
    folder = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.train.loop.test_fit", folder],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    log = folder / "train.jsonl"
    while not (log.exists() and '"step": 10' in log.read_text()):
        assert child.poll() is None, child.stderr.read().decode()
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    assert steps_in(folder) == [4, 8]
    # What a kill within a save, and one within a line of the log, leave behind.
    (folder / "9.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    log.write_text(log.read_text() + '{"step": 1')

    equal(run_net(folder), whole[1])
    assert without_times(lines(folder)) == without_times(lines(whole[0]))
    assert steps_in(folder) == [12, 14]
    assert not list(folder.glob("*tmp*"))


def test_the_log_and_what_is_kept(whole):
    folder, params = whole
    entries = lines(folder)
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12, 14]
    assert entries[-1]["loss"] < entries[0]["loss"] / 2
    assert [e["learning_rate"] for e in entries] == [float(RATE(e["step"] - 1)) for e in entries]
    assert all(e["seconds"] > 0 for e in entries)
    for entry in entries:
        per_second = 2 * BATCH / entry["seconds"]
        assert math.isclose(entry["examples_per_second"], per_second)
    assert steps_in(folder) == [12, 14]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    nnx.merge(GRAPH, params, REST)
    jax.block_until_ready(PARAMS)  # given, and not donated


def test_a_finished_run_gives_its_parameters_at_once(whole):
    folder, params = whole
    before = (folder / "train.jsonl").read_text()

    def never(*_):
        raise AssertionError("nothing is left to train")

    equal(run_net(folder, loss=never), params)
    assert (folder / "train.jsonl").read_text() == before


def test_the_loss_is_the_mean_of_the_steps_and_the_step_is_compiled_once(tmp_path):
    traced = []

    def counted(params, batch, key):
        traced.append(key)
        return exact(params, batch, key)

    got = run(tmp_path, loss=counted, steps=4, log_every=4)
    assert len(traced) == 1
    params, losses = WEIGHTS, []
    data = iter(batches(source(), batch=BATCH, seed=0))
    for _ in range(4):
        (value, _), grads = jax.value_and_grad(exact, has_aux=True)(params, next(data), None)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        losses.append(value)
    (entry,) = lines(tmp_path)
    # Rounding of float32 in a step that is compiled, and one that is not.
    np.testing.assert_allclose(entry["loss"], np.mean(losses), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, params)


def test_devices_and_micro_batches_change_nothing(tmp_path):
    want = run(tmp_path / "plain", steps=4)
    for devices, accumulate in ((8, 1), (1, 4), (8, 2)):
        folder = tmp_path / f"{devices} {accumulate}"
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        got = run(folder, steps=4, mesh=mesh, accumulate=accumulate)
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(got)} == {devices}
        # SGD does not enlarge differences: float32 sums in another order over four steps.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
        for one, other in zip(lines(tmp_path / "plain"), lines(folder), strict=True):
            np.testing.assert_allclose(one["error"], other["error"], rtol=1e-5)


def test_each_micro_batch_has_a_key_of_its_own(tmp_path):
    def drawn(params, batch, key):
        return params["w"] @ jax.random.normal(key, (3,)), {}

    params = {"w": np.zeros(3, np.float32)}
    got = run(tmp_path, loss=drawn, params=params, steps=2, accumulate=2)
    steps = [jax.random.fold_in(jax.random.key(0), n) for n in (1, 2)]
    noise = [jax.random.normal(jax.random.fold_in(key, i), (3,)) for key in steps for i in (0, 1)]
    # SGD at a rate of 0.1; rounding of float32.
    np.testing.assert_allclose(got["w"], -0.1 * np.sum(noise, 0) / 2, rtol=1e-5)


def test_another_run_is_refused(whole):
    folder, _ = whole
    with pytest.raises(
        ValueError, match=r"other settings: seed is 0 there and 1 here, steps is 14"
    ):
        run_net(folder, Settings(seed=1, steps=15))
    wide = nnx.split(Net(nnx.Rngs(0), 9), nnx.Param, ...)[1]
    with pytest.raises(
        ValueError, match=r"params/first/kernel is 'float32\[6, 8\]' there"
    ) as error:
        run_net(folder, params=wide)
    assert f"choose another folder, or delete {folder} to start over" in str(error.value)
    with pytest.raises(ValueError, match="holds a run of 14 steps, more than steps=4"):
        run_net(folder, steps=4)
    assert steps_in(folder) == [12, 14]


def test_a_damaged_checkpoint_can_be_deleted_to_use_the_one_before(tmp_path):
    want = run(tmp_path, steps=8)
    for file in (tmp_path / "8" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"8 cannot be read; delete it to go on from the one befor"
    ):
        run(tmp_path, steps=8)
    (tmp_path / "8").rename(tmp_path / "damaged")
    equal(run(tmp_path, steps=8), want)


def test_a_full_disk_keeps_what_was_saved(tmp_path):
    """After the first checkpoint no file may grow beyond 16 kB, and the parameters are 64 kB."""
    # One array in all: Orbax complains of the others after it has reported the first.
    params = np.random.default_rng(0).random((128, 128), np.float32)
    linear = lambda w, batch, key: (((batch["x"] @ w[:FEATURES, 0]) ** 2).mean(), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_the_disk(number):
        if number == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
        return 0.1

    options = {"loss": linear, "params": params, "steps": 4, "checkpoint_every": 2}
    try:
        with pytest.raises(
            OSError, match=r"step 4 could not be written to .*; that of step 2 is k"
        ):
            run(tmp_path, schedule=fills_the_disk, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps_in(tmp_path) == [2]
    run(tmp_path, **options)
    assert steps_in(tmp_path) == [2, 4]


def test_a_loss_that_is_not_finite_names_step_and_examples(tmp_path):
    order = ids(batches(source(), batch=BATCH, seed=0), 5)
    y = source()._arrays["y"].copy()
    y[order[4][3]] = np.inf
    data = batches(source(y=y), batch=BATCH, seed=0)
    with pytest.raises(FloatingPointError, match="the loss is inf at step 5") as error:
        run(tmp_path, data=data, name="regression")
    message = str(error.value)
    assert message.startswith("regression: ")
    assert ", ".join(map(str, order[4])) in message
    assert f"The checkpoint of step 4 is kept in {tmp_path}" in message
    assert "lower learning rate" in message
    assert steps_in(tmp_path) == [4]
    assert [entry["step"] for entry in lines(tmp_path)] == [2, 4]


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    rate = lambda count: jnp.where(count == 3, jnp.inf, 0.01)
    with pytest.raises(FloatingPointError, match=r"parameters .* no longer finite at step 4"):
        run(tmp_path, optimiser=optax.sgd(rate))
    assert steps_in(tmp_path) == []


def test_each_step_has_its_key_and_a_metric_without_a_value_is_null(tmp_path):
    def drawn(params, batch, key):
        return exact(params, batch, key)[0], {"draw": jax.random.uniform(key), "share": jnp.nan}

    run(tmp_path, loss=drawn, steps=3, log_every=1, show="share")
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in (1, 2, 3)]
    assert [entry["draw"] for entry in lines(tmp_path)] == [jax.random.uniform(k) for k in keys]
    assert [entry["share"] for entry in lines(tmp_path)] == [None] * 3


WRONG = {
    "steps must be at least 1, got 0": {"steps": 0},
    "accumulate must be at least 1, got -1": {"accumulate": -1},
    "checkpoint_every must be a multiple of log_every 3, got 4": {"log_every": 3},
    "data must be a Grain dataset or its iterator, .* got list": {"data": [{}]},
    r"a batch of 16 examples .* multiple of 32 \(8 devices x accumulate 4\)": {
        "accumulate": 4,
        "mesh": None,
    },
    "must share their first axis, got {'x': .16, 6., 'y': ..}": {
        "data": grain.MapDataset.source([{"x": np.zeros((16, 6)), "y": 1.0}]).to_iter_dataset()
    },
    "the data ended before step 6 of 14": {
        "data": batches(source(), batch=BATCH, seed=0, repeat=False)
    },
    "params must be float32 .* but first is float16": {
        "params": {**WEIGHTS, "first": np.zeros(3, np.float16)}
    },
    "params must be float32 .* but dropout/rngs/count is uint32": {
        "params": nnx.split(Net(nnx.Rngs(0)))[1]
    },
    "the optimiser's state must be float32 .* but 0/mu/first is bfloat16": {
        "optimiser": optax.adam(0.1, mu_dtype=jnp.bfloat16)
    },
    "loss must return scalars, but error has shape": {
        "loss": lambda p, b, k: (exact(p, b, k)[0], {"error": b["y"]})
    },
    r"loss must return \(scalar, dict of scalars\)": {"loss": lambda p, b, k: exact(p, b, k)[0]},
    "metrics of the loss cannot be named seconds": {
        "loss": lambda p, b, k: (exact(p, b, k)[0], {"seconds": 1.0})
    },
    r"show must be one of the metrics \['error'\], got 'accuracy'": {"show": "accuracy"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input(tmp_path, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(tmp_path, **WRONG[message])


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; checkpoints need a folder"):
        run(tmp_path / "file")


# The optimiser.


def test_only_matrices_decay_and_factors_scale_or_freeze():
    ones = lambda *shape: np.ones(shape, np.float32)
    # Two axes each: layers stacked for a scan have them even in a bias.
    part = {"kernel": ones(2, 3), "bias": ones(2, 3), "scale": ones(2, 3), "token": ones(3)}
    params = {"clip": {"text": part, "vision": part}, "clipmapper": part}
    optimiser = adamw(0.5, weight_decay=0.1, factors={"clip": 0.1, "clip/text": 0.0})
    state = optimiser.init(params)
    nothing = jax.tree.map(np.zeros_like, params)
    updates, _ = optimiser.update(nothing, state, params)
    for name, factor in (("clip/text", 0.0), ("clip/vision", 0.1), ("clipmapper", 1.0)):
        found = updates
        for key in name.split("/"):
            found = found[key]
        # Rounding of 0.5 x 0.1 x factor in float32.
        np.testing.assert_allclose(found["kernel"], -0.05 * factor, rtol=1e-6)
        for other in ("bias", "scale", "token"):
            np.testing.assert_array_equal(found[other], 0)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("vision" in name for name in names)
    assert not any("text" in name for name in names)


def test_what_is_frozen_does_not_count_in_the_norm():
    params = {"frozen": np.ones(4, np.float32), "free": np.ones(4, np.float32)}
    grads = {"frozen": np.full(4, 1e3, np.float32), "free": np.full(4, 0.1, np.float32)}
    freeze = adamw(0.1, clip=1.0, factors={"frozen": 0.0})
    updates, _ = freeze.update(grads, freeze.init(params), params)
    alone, part = adamw(0.1, clip=1.0), {"free": params["free"]}
    want, _ = alone.update({"free": grads["free"]}, alone.init(part), part)
    np.testing.assert_array_equal(updates["frozen"], 0)
    np.testing.assert_array_equal(updates["free"], want["free"])


def test_wrong_rates():
    with pytest.raises(ValueError, match=r"no parameter is in 'clip'.*parts are first, second"):
        adamw(0.1, factors={"clip": 0.1}).init(PARAMS)
    with pytest.raises(ValueError, match="no parameter is in 'fir'"):
        adamw(0.1, factors={"fir": 0.1}).init(PARAMS)
    with pytest.raises(ValueError, match="factor of 'first' must be 0 or more, got -1"):
        adamw(0.1, factors={"first": -1.0})
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        warmup_cosine(0.0, 10)


# The pipeline.


def ids(data, count):
    return [tuple(batch["id"].tolist()) for batch, _ in zip(iter(data), range(count), strict=False)]


def test_order_is_fixed_and_every_epoch_is_another_permutation():
    data = lambda seed: batches(source(), batch=BATCH, seed=seed)
    epochs = EXAMPLES // BATCH
    got = ids(data(3), 2 * epochs)
    assert got == ids(data(3), 2 * epochs)
    assert got != ids(data(4), 2 * epochs)
    first, second = sum(got[:epochs], ()), sum(got[epochs:], ())
    assert sorted(first) == sorted(second) == list(range(EXAMPLES))
    assert first != second


@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_share_out_each_step(shuffle):
    options = {"batch": 27, "seed": 0, "shuffle": shuffle}
    whole = ids(batches(source(), **options), 7)
    shards = [ids(batches(source(), shard=(i, 3), **options), 7) for i in range(3)]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert {len(part) for part in parts} == {9}
        assert sorted(sum(parts, ())) == sorted(batch)
    # 80 examples are two full batches of 27; a shard of 27 examples could fill a third.
    assert len(set(sum(whole[:2], ()))) == 54


def test_a_single_pass_gives_every_example_once():
    data = batches(source(), batch=24, seed=0, shuffle=False, repeat=False, drop_remainder=False)
    assert [len(batch["x"]) for batch in data] == [24, 24, 24, 8]
    assert sum(ids(data, 9), ()) == tuple(range(EXAMPLES))


def test_the_place_within_an_epoch_is_saved():
    twice = lambda example: {**example, "x": 2 * example["x"]}
    data = batches(source(), batch=BATCH, seed=0, transform=twice)
    one, other = iter(data), iter(data)
    for _ in range(7):
        next(one)
    other.set_state(json.loads(json.dumps(one.get_state())))
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, next(one), next(other))
    batch = next(one)
    np.testing.assert_array_equal(batch["x"], 2 * source()._arrays["x"][batch["id"]])


def test_wrong_batches():
    with pytest.raises(ValueError, match="80 examples, fewer than one batch of 81; give more"):
        batches(source(), batch=81, seed=0)
    with pytest.raises(ValueError, match="the source is empty: list has no examples"):
        batches([], batch=1, seed=0)
    with pytest.raises(ValueError, match=r"multiple of the 3 shards \(processes\), got 16"):
        batches(source(), batch=16, seed=0, shard=(0, 3))
    with pytest.raises(ValueError, match=r"0 <= index < count, got \(3, 3\)"):
        batches(source(), batch=3, seed=0, shard=(3, 3))
    with pytest.raises(ValueError, match="seed must be from 0"):
        batches(source(), batch=3, seed=-1)
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        batches(source(), batch=3, seed=0, workers=-1)
    with pytest.raises(ValueError, match=r"one common length, got {'x': 2, 'y': 3}"):
        Arrays(x=np.zeros(2), y=np.zeros(3))


if __name__ == "__main__":
    # As `quick_compile` in the process that compares: other programs round otherwise.
    jax.config.update("jax_disable_most_optimizations", True)
    stuck(Path(sys.argv[1]))
