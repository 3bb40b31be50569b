"""Ray Train on this machine: same stream, a killed worker costs little, a real Prometheus reads every rank."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests.runs import counted_error_rate, digits_manifest, planned_hash, result, start, wait_for_step, write_job

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 6, 60


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
    process = start("train", job, "--workers", "2", "--fit.epochs", str(EPOCHS), THAWLINE_TEST_MARK=mark)
    run = tmp_path / "runs/run"
    wait_for_step(run, 10, process)
    victims = processes_with(mark, b"RayTrainWorker")
    assert len(victims) == 2
    os.kill(victims[-1], signal.SIGKILL)
    _, talk = process.communicate(timeout=200)
    assert process.returncode == 0, talk
    assert "resumed at step" in talk

    made = result(run)
    assert (made["status"], made["world_size"], made["steps"]) == ("finished", 2, STEPS)
    assert made["stream_hash"] == planned_hash(manifest, STEPS)
    images, errors = counted_error_rate(run)
    assert images == 60
    assert made["metrics"]["error_rate"] == pytest.approx(errors, abs=1e-12)
    assert processes_with(mark) == [], "the run's Ray must end with it"


def find_prometheus() -> str | None:
    beside = Path(sys.executable).with_name("prometheus")
    return str(beside) if beside.exists() else shutil.which("prometheus")


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """A real Prometheus on loopback that reads runs/*.targets.json as deploy/prometheus.yml says; its address."""
    binary = find_prometheus()
    if binary is None:
        reason = "no Prometheus here: `make prometheus` brings Debian's"
        if os.environ.get("THAWLINE_REQUIRE_PROMETHEUS"):
            pytest.fail(reason)
        pytest.skip(reason)
    stock = yaml.safe_load((Path(__file__).parent.parent / "deploy/prometheus.yml").read_text())
    stock["global"]["scrape_interval"] = "1s"
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/prometheus.yml").write_text(yaml.safe_dump(stock))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    server = subprocess.Popen(
        [
            *(binary, f"--config.file={tmp_path / 'deploy/prometheus.yml'}", f"--web.listen-address={address}"),
            *(f"--storage.tsdb.path={tmp_path / 'tsdb'}", "--log.level=error"),
        ]
    )
    try:
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


def ask(address: str, query: str, at: float) -> list[dict[str, Any]]:
    words = urllib.parse.urlencode({"query": query, "time": f"{at:.3f}"})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{words}", timeout=10) as answer:
        rows: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return rows


def test_prometheus_sees_the_rate_that_the_recorder_wrote(tmp_path: Path, manifest: Path, prometheus: str) -> None:
    job = write_job(tmp_path, manifest)
    process = start(
        *("train", job, "--workers", "2", "--fit.epochs", "400"),
        *("--checkpoint.every_s", "20", "--log_every", "5"),
    )
    run = tmp_path / "runs/run"
    wait_for_step(run, 5, process)  # the first checkpoint comes 20 s into training
    time.sleep(20)
    now = time.time() - 1.0
    total = ask(prometheus, "sum(rate(thawline_images_total[30s]))", now)
    each = ask(prometheus, "thawline_images_total", now)
    process.send_signal(signal.SIGINT)  # ends with a checkpoint, and the rows written
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    assert "the same command resumes it" in talk
    assert {(row["metric"]["run"], row["metric"]["rank"]) for row in each} == {("run", "0"), ("run", "1")}

    rows = [row for row in pq.read_table(run / "rows.parquet").to_pylist() if row["kind"] == "train"]
    when, images = np.array([row["unix_s"] for row in rows]), np.cumsum([row["images"] for row in rows])
    assert when[0] < now - 30, "the run was too short to compare"
    recorded = (np.interp(now, when, images) - np.interp(now - 30, when, images)) / 30
    assert float(total[0]["value"][1]) == pytest.approx(recorded, rel=0.05)
    assert json.loads((tmp_path / "runs/run.targets.json").read_text()) == []
