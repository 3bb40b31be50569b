"""Files break while two workers train: does the run end well, name them, and stay defined on every rank?"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.kit.runs import (
    counted_error_rate,
    digits_manifest,
    fork,
    fork_ranks,
    result,
    thawline,
    wait_for_step,
    write_job,
)
from thawline.dataio.stream.plan import Training
from thawline.dataio.table.manifest import Manifest
from thawline.trainer.step.window import extend_hash

pytestmark = pytest.mark.slow
EPOCHS, STEPS, BATCH = 4, 40, 24  # 240 training images: ten steps an epoch


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Its own: the tests spoil files."""
    return digits_manifest(tmp_path)


def path_of(manifest: Manifest, number: int) -> Path:
    (name,) = manifest.rows.slice(number, 1)["path"].to_pylist()
    return Path(manifest.root) / name


def expected_hash(manifest: Manifest, bad: set[int]) -> str:
    """Of a run in which the files were good in the first epoch and filled, by the rule, in all others."""
    ids = manifest.subset("train").ids
    plan, digest = Training(n=len(ids), global_batch=BATCH, seed=7), ""
    for step in range(STEPS):
        attempts = np.zeros(BATCH, np.int64)
        while True:
            stream = ids[plan.at(plan.positions(step), attempts)[1]]
            holes = np.isin(stream, list(bad)) & (step >= STEPS // EPOCHS)
            if not holes.any():
                break
            attempts[holes] += 1
        digest = extend_hash(digest, stream)
    return digest


def test_a_file_truncated_and_two_deleted_while_two_workers_train(tmp_path: Path, manifest: Path) -> None:
    data = Manifest.load(manifest)
    plan = Training(n=240, global_batch=BATCH, seed=7)
    early = data.subset("train").ids[plan.at(plan.positions(0))[1]]  # read by now in the first epoch, on either rank
    truncated, deleted, unseen = int(early[3]), int(early[20]), int(data.subset("valid").ids[7])
    job, run = write_job(tmp_path, manifest), tmp_path / "runs/run"
    both = fork_ranks(2, "train", job, "--fit.epochs", str(EPOCHS), step_s=0.2)
    wait_for_step(run, 2, both[0])
    file = path_of(data, truncated)
    file.write_bytes(file.read_bytes()[:200])
    path_of(data, deleted).unlink()
    path_of(data, unseen).unlink()
    assert not (run / "checkpoints/step_00000010").exists(), "the second epoch has begun: nothing would be known"
    talk = "".join(process.communicate()[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], talk

    made = result(run)
    assert (made["status"], made["world_size"], made["steps"]) == ("finished", 2, STEPS)
    assert made["stream_hash"] == expected_hash(data, {truncated, deleted})
    assert made["valid_samples"] == 59
    images, errors = counted_error_rate(run)
    assert images == 59
    assert made["metrics"]["error_rate"] == pytest.approx(errors, abs=1e-12)
    rows = [row for row in pq.read_table(run / "rows.parquet").to_pylist() if row["kind"] == "quarantine"]
    assert sorted((row["split"], row["id"]) for row in rows) == sorted(
        [("train", truncated), ("train", deleted), ("valid", unseen)]
    )
    assert [row["quarantined"] for row in rows] == [1, 2, 3]
    reasons = {row["id"]: row["reason"] for row in rows}
    assert reasons[truncated] == f"{path_of(data, truncated)}: changed since it was indexed (it has 200 bytes now)"
    assert reasons[deleted] == f"{path_of(data, deleted)}: missing"
    assert sorted(made["quarantined"]) == sorted(reasons.values())
    for why in reasons.values():
        assert f": {why}" in talk, "each is named to whoever watches"


def test_a_run_that_lost_files_goes_on_from_its_checkpoint_without_them(tmp_path: Path, manifest: Path) -> None:
    """The files come back before the run goes on: it does not take them up in the middle."""
    data = Manifest.load(manifest)
    plan = Training(n=240, global_batch=BATCH, seed=7)
    victim = int(data.subset("train").ids[plan.at(plan.positions(1))[1]][3])
    file = path_of(data, victim)
    content = file.read_bytes()
    job = write_job(tmp_path, manifest)
    process = fork("train", job, "--fit.epochs", str(EPOCHS), step_s=0.1)
    run = tmp_path / "runs/run"
    wait_for_step(run, 4, process)
    file.unlink()
    wait_for_step(run, 24, process)
    process.kill()
    process.communicate()
    assert not (run / "result.json").exists(), "it was too quick to be killed"
    file.write_bytes(content)
    done = thawline("train", job, "--fit.epochs", str(EPOCHS))
    assert done.returncode == 0, done.stderr
    assert result(run)["stream_hash"] == expected_hash(data, {victim})
    assert result(run)["quarantined"] == [f"{file}: missing"]


def test_more_broken_files_than_allowed_end_the_run_with_a_sentence(tmp_path: Path, manifest: Path) -> None:
    data = Manifest.load(manifest)
    job = write_job(tmp_path, manifest)
    process = fork("train", job, "--fit.epochs", "900", "--data.max_quarantined", "0.02")
    wait_for_step(tmp_path / "runs/run", 2, process)
    for number in data.subset("train").ids[::7]:
        path_of(data, int(number)).unlink()
    _, talk = process.communicate(timeout=200)
    assert process.returncode == 1, talk
    assert "training images turned out unusable since they were indexed" in talk.splitlines()[-1]
    assert "more than the 5 that max_quarantined=0.02 allows" in talk.splitlines()[-1]
    assert "Traceback" not in talk
    assert (tmp_path / "runs/run/checkpoints").exists()
    assert not (tmp_path / "runs/run/result.json").exists()
