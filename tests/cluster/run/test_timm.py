"""Is a run of timm's body the same run wherever it is made, and does its bundle answer as validation did?"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.kit.runs import (
    counted_error_rate,
    digits_manifest,
    fork,
    planned_hash,
    ranks,
    result,
    thawline,
    wait_for_step,
    write_job,
)
from thawline import models
from thawline.dataio import ImageSpec, Manifest, render

pytest.importorskip("timm", reason="the extra timm is not installed")

BODY = "timm/test_efficientnet"
"""270,000 parameters, with BatchNorm, squeeze and excitation."""
STEPS, VALID = 10, 30  # two epochs of 120 digits in batches of 24


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in pq.read_table(run / "rows.parquet").to_pylist() if row["kind"] == "train"]


def answers_as_validation_did(run: Path, manifest: Path) -> None:
    model, about = models.load(run)
    assert (about.model, about.image["mean"]) == (BODY, models.normalisation(BODY)[0])
    rows = Manifest.load(manifest)
    paths = dict(zip(rows.rows["id"].to_pylist(), rows.rows["path"].to_pylist(), strict=True))
    image: Any = about.image
    engine: Any = about.engine
    for row in pq.read_table(run / "valid.parquet").to_pylist()[::4]:
        pixels = render(Path(rows.root, paths[row["id"]]).read_bytes(), ImageSpec(**image), engine=engine)
        with torch.no_grad():
            probability, top = model(pixels)[0].softmax(0).max(0)
        assert about.classes[int(top)] == row["prediction"]
        assert float(probability) == pytest.approx(row["probability"], abs=1e-5)


@pytest.mark.slow
def test_it_is_one_run_in_one_process_on_two_ranks_and_after_a_kill(tmp_path: Path) -> None:
    manifest, jobs = digits_manifest(tmp_path, count=150), dict[str, Path]()
    for name in ("whole", "two", "killed"):
        (tmp_path / name).mkdir()
        jobs[name] = write_job(tmp_path / name, manifest, model=BODY)
    whole, two, killed = (tmp_path / name / "runs/run" for name in jobs)

    done = thawline("train", jobs["whole"])
    assert done.returncode == 0, done.stderr
    ranks(2, "train", jobs["two"])
    process = fork("train", jobs["killed"], step_s=0.2)
    wait_for_step(killed, 4, process)
    process.kill()
    process.communicate()
    assert not (killed / "result.json").exists(), "it was too quick to be killed"
    done = thawline("train", jobs["killed"])
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr

    for run, world_size in ((whole, 1), (two, 2), (killed, 1)):
        made = result(run)
        assert (made["world_size"], made["steps"]) == (world_size, STEPS)
        assert made["stream_hash"] == planned_hash(manifest, STEPS)
        images, error = counted_error_rate(run)
        assert images == VALID
        assert made["metrics"]["error_rate"] == pytest.approx(error, abs=1e-12)
    assert losses(killed) == losses(whole)
    weights, resumed = (models.load(run).model.state_dict() for run in (whole, killed))
    assert weights.keys() == resumed.keys()
    assert [name for name in weights if not torch.equal(weights[name], resumed[name])] == []
    assert pq.read_table(killed / "valid.parquet").equals(pq.read_table(whole / "valid.parquet"))
    for run in (whole, two):
        answers_as_validation_did(run, manifest)
