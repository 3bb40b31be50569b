"""Ray Train on this machine: the same stream, and a killed worker costs little."""

import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

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
