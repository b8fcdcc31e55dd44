"""The embedded run: killed at any moment it goes on, and no row is lost, twice, or another."""

import contextlib
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from jaxrel.batch import embedded, folder
from jaxrel.batch.explainer import Explainer, Loaded
from jaxrel.batch.folder import Folder, read_manifest
from jaxrel.batch.sources import Source
from jaxrel.explanations.tables import COLUMNS

pq = pytest.importorskip("pyarrow.parquet")

ROWS, SHARD, BATCH = 60, 8, 3


class Squares(Explainer):
    """An explainer whose relevance of row i is i squared; every fifth row is bad."""

    shapes = {(2, 2)}

    def __init__(self):
        pass

    def split(self, rows):
        return (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))

    def prepare(self, rows):
        time.sleep(0.001)
        return Loaded(rows, [], {}, None, None)

    def results(self, loaded):
        numbers = [int(row["id"]) for row in loaded.rows]
        found = {name: [None] * len(numbers) for name in COLUMNS}
        found["id"] = [row["id"] for row in loaded.rows]
        found["row"] = [0] * len(numbers)
        found["image_relevance"] = [np.full((2, 2), i**2, np.float32) for i in numbers]
        found["error"] = ["bad" if i % 5 == 0 else None for i in numbers]
        return [], found


def source():
    ids = [str(i) for i in range(ROWS)]
    rows = [{"id": i, "image": None, "text": None, "target": None} for i in ids]
    return Source(ids, lambda start, stop: rows[start:stop])


def job(path, **changes):
    settings = {"method": ["equal"], "model_digest": "abc"} | changes
    return Folder(path, ROWS, SHARD, settings, {"command": "jaxrel batch"})


def run(path, **changes):
    made = job(path, **changes)
    made.open()
    return embedded.run(Squares(), source(), made)


def rows_of(path):
    parts = [pq.read_table(part) for part in sorted(path.glob("*.parquet"))]
    return [row for part in parts for row in part.to_pylist()]


def assert_whole(path):
    rows = rows_of(path)
    assert [row["id"] for row in rows] == [str(i) for i in range(ROWS)]
    assert [row["image_relevance"] for row in rows] == [[float(i**2)] * 4 for i in range(ROWS)]
    assert not [*path.glob(".jaxrel-*")]


def test_a_whole_run(tmp_path):
    assert run(tmp_path / "out") == ROWS // 5
    assert_whole(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["rows"] == ROWS
    # What is there is neither read nor written again.
    before = {part: part.stat().st_mtime_ns for part in (tmp_path / "out").glob("*.parquet")}
    assert run(tmp_path / "out") == 0
    assert before == {part: part.stat().st_mtime_ns for part in before}


KILLED = """
    import os, signal, sys, time, warnings
    from pathlib import Path
    from tests.batch.test_embedded import run
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    # Imported once: each line starts a run in a process of its own, which may be killed.
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            moment = line.strip()
            replace = os.replace
            def killed(a, b):
                if "part" in str(b) and moment in ("before", "after"):
                    if moment == "after":
                        replace(a, b)
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(a, b)
            os.replace = killed
            run(Path(sys.argv[1]))
            os._exit(0)
        if line.strip() not in ("before", "after", "never"):
            time.sleep(float(line))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, flush=True)
"""


def test_killed_at_any_moment_it_goes_on(tmp_path):
    moments = random.Random(0)
    kills = 0
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"

        def start(moment):
            process.stdin.write(f"{moment}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        for moment in ("before", "after", *(moments.uniform(0, 0.12) for _ in range(22)), "before"):
            kills += start(moment) == signal.SIGKILL
            rows = rows_of(tmp_path / "out")  # what is there can always be read
            ids = [row["id"] for row in rows]
            assert len(ids) == len(set(ids))
            if len(ids) == ROWS:  # done: the next moments kill a new job
                assert_whole(tmp_path / "out")
                for part in (tmp_path / "out").glob("*.parquet"):
                    part.unlink()
        assert start("never") == 0
        process.stdin.close()
    assert kills >= 20
    assert_whole(tmp_path / "out")


def test_a_full_disk_ends_clearly_and_what_is_there_stays(tmp_path, monkeypatch):
    write = folder.write_atomically

    def full(path, data):
        if "part-00002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(folder, "write_atomically", full)
    with pytest.raises(OSError, match=r"the disk is full; 2 of 8 parts are complete in .* again"):
        run(tmp_path / "out")
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [str(i) for i in range(2 * SHARD)]
    monkeypatch.undo()
    run(tmp_path / "out")
    assert_whole(tmp_path / "out")


def test_another_job_is_refused_by_name(tmp_path):
    run(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"another job: method was \['equal'\] and is \['weighted'\]"
    ):
        run(tmp_path / "out", method=["weighted"])
    message = "model_digest was 'abc' and is 'xyz'.* go on, once the model's weights are as they"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", model_digest="xyz")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        run(tmp_path / "other")
    assert [x.name for x in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_a_damaged_manifest(tmp_path):
    run(tmp_path / "out")
    (tmp_path / "out" / folder.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path / "out")
    (tmp_path / "out" / folder.MANIFEST).write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="has another format than 1"):
        read_manifest(tmp_path / "out")
    for held in ([], {"format": 1}, {"format": 1, "rows": 1, "shard_rows": 1, "settings": []}):
        (tmp_path / "out" / folder.MANIFEST).write_text(json.dumps(held))
        with pytest.raises(ValueError, match=r"is damaged \(it (lacks|holds) "):
            run(tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder that `jaxrel batch` wrote"):
        read_manifest(tmp_path / "out" / folder.MANIFEST)
    with pytest.raises(ValueError, match="is no folder that `jaxrel batch` wrote"):
        read_manifest(tmp_path)


def test_progress_counts_what_is_there(tmp_path):
    made = job(tmp_path / "out")
    made.open()
    embedded.explain_shard(Squares(), source(), made, 0)
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        embedded.run(Squares(), source(), made)
    assert f"{ROWS}/{ROWS}" in shown.getvalue()
    assert f" 0/{ROWS}" not in shown.getvalue()
    assert os.listdir(tmp_path / "out").count("part-00000.parquet") == 1
