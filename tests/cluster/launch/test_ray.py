"""Ray Train on this machine: same stream, a killed worker costs little, a real Prometheus reads every rank."""

import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.kit.prometheus import ask, serving, settings
from tests.kit.runs import counted_error_rate, digits_manifest, planned_hash, result, start, wait_for_step, write_job

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 20, 200  # of the tiny body: long enough to be killed in their middle


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_manifest(tmp_path_factory.mktemp("digits"))


def processes_with(mark: str, name: bytes = b"") -> list[int]:
    """The processes that carry this mark in their environment, so ours alone, and `name` in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"THAWLINE_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes()
            if ours and name in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended while we looked
            continue
    return found


def test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = uuid.uuid4().hex
    job = write_job(tmp_path, manifest)
    # A folder that is called as one of ours, where the user stands, must not be taken for it.
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/__init__.py").write_text("raise RuntimeError('foreign code ran')")
    monkeypatch.chdir(tmp_path)
    command = ("train", job, "--workers", "2", "--fit.epochs", str(EPOCHS))
    process = start(*command, out=subprocess.PIPE, THAWLINE_TEST_MARK=mark)
    run = tmp_path / "runs/run"
    wait_for_step(run, 10, process)
    victims = processes_with(mark, b"ray::TrainWorker")
    assert len(victims) == 2
    os.kill(victims[-1], signal.SIGKILL)
    out, talk = process.communicate(timeout=200)
    assert process.returncode == 0, talk
    assert "resumed at step" in talk
    assert "died (killed, out of memory, or the machine is gone): going on from the last checkpoint, and 2 more" in talk
    assert json.loads(out)["stream_hash"] == planned_hash(manifest, STEPS), "nothing else is said on stdout"

    made = result(run)
    assert (made["status"], made["world_size"], made["steps"]) == ("finished", 2, STEPS)
    assert made["stream_hash"] == planned_hash(manifest, STEPS)
    images, errors = counted_error_rate(run)
    assert images == 60
    assert made["metrics"]["error_rate"] == pytest.approx(errors, abs=1e-12)
    deadline = time.monotonic() + 30  # Ray tells its processes to end, and on a busy machine they take a while
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == [], "the run's Ray must end with it"


def test_prometheus_sees_the_rate_that_the_recorder_wrote(tmp_path: Path, manifest: Path) -> None:
    job, run = write_job(tmp_path, manifest), tmp_path / "runs/run"
    with serving(tmp_path, settings(scrape_s=0.5)) as prometheus:
        process = start(
            *("train", job, "--workers", "2", "--fit.epochs", "2000"),
            *("--checkpoint.every_s", "5", "--log_every", "5"),
        )
        wait_for_step(run, 5, process)  # the first checkpoint comes 5 s into training
        time.sleep(18)
        now = time.time() - 1.0
        total = ask(prometheus, "sum(rate(thawline_images_total[15s]))", now)
        each = ask(prometheus, "thawline_images_total", now)
    process.send_signal(signal.SIGINT)  # ends with a checkpoint, and the rows written
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 130, talk
    assert "the same command resumes it" in talk
    assert {(row["metric"]["run"], row["metric"]["rank"]) for row in each} == {("run", "0"), ("run", "1")}

    rows = [row for row in pq.read_table(run / "rows.parquet").to_pylist() if row["kind"] == "train"]
    when, images = np.array([row["unix_s"] for row in rows]), np.cumsum([row["images"] for row in rows])
    assert when[0] < now - 15, "the run was too short to compare"
    recorded = (np.interp(now, when, images) - np.interp(now - 15, when, images)) / 15
    assert float(total[0]["value"][1]) == pytest.approx(recorded, rel=0.05)
    assert json.loads((tmp_path / "runs/run.targets.json").read_text()) == []
