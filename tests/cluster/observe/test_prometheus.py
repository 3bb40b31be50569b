"""Does a real Prometheus read every rank, and the rate that the run itself recorded?"""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.kit.prometheus import ask, serving, settings
from tests.kit.runs import digits_manifest, fork_ranks, wait_for_step, write_job


@pytest.mark.slow
def test_prometheus_sees_the_rate_that_the_recorder_wrote(tmp_path: Path) -> None:
    job, run = write_job(tmp_path, digits_manifest(tmp_path)), tmp_path / "runs/run"
    with serving(tmp_path, settings(scrape_s=0.5)) as prometheus:
        both = fork_ranks(
            *(2, "train", job, "--fit.epochs", "2000", "--checkpoint.every_s", "5", "--log_every", "5"), step_s=0.2
        )
        wait_for_step(run, 5, both[0])  # the first checkpoint comes 5 s into training
        time.sleep(18)
        now = time.time() - 1.0
        total = ask(prometheus, "sum(rate(thawline_images_total[15s]))", now)
        each = ask(prometheus, "thawline_images_total", now)
    both[0].send_signal(signal.SIGINT)  # ends with a checkpoint, and the rows written
    talk = [process.communicate(timeout=120)[1] for process in both]
    assert both[0].returncode == 130, talk
    assert "the same command resumes it" in talk[0]
    assert {(row["metric"]["run"], row["metric"]["rank"]) for row in each} == {("run", "0"), ("run", "1")}

    rows = [row for row in pq.read_table(run / "rows.parquet").to_pylist() if row["kind"] == "train"]
    when, images = np.array([row["unix_s"] for row in rows]), np.cumsum([row["images"] for row in rows])
    assert when[0] < now - 15, "the run was too short to compare"
    recorded = (np.interp(now, when, images) - np.interp(now - 15, when, images)) / 15
    assert float(total[0]["value"][1]) == pytest.approx(recorded, rel=0.05)
    assert json.loads((tmp_path / "runs/run.targets.json").read_text()) == []
