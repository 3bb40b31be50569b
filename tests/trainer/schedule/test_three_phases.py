"""A job of three phases with two sizes, interrupted in each: the same run as the unbroken one, also on two ranks."""

import signal
from pathlib import Path

import pytest
import torch

from tests.kit.runs import (
    digits_manifest,
    fork_ranks,
    go,
    numbers,
    planned_hash,
    ranks,
    result,
    wait_for_step,
    write_job,
)
from tests.kit.toy import same
from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import check
from thawline.trainer.checkpoints import checkpoint

pytestmark = pytest.mark.slow
PHASES = """
[[phases]]
name = "head"
epochs = 1
freeze_to = -1
lr = 3e-3
size_px = 24
[[phases]]
name = "all"
epochs = 1
lr = [1e-4, 1e-3]
[[phases]]
name = "large"
recipe = "flat_cos"
steps = 12
lr = 5e-4
size_px = 32
"""
STEPS = 10 + 10 + 12  # 240 training images in batches of 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_manifest(tmp_path_factory.mktemp("digits"))


def three_phases(folder: Path, manifest: Path) -> Path:
    folder.mkdir()
    file = write_job(folder, manifest)
    text = file.read_text().replace("log_every = 2", "log_every = 5").replace("epochs = 2\n", "")
    file.write_text(text + PHASES)
    return file


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    saved, skipped = checkpoint.newest(run_dir / "checkpoints")
    assert saved is not None
    assert (saved.step, skipped) == (STEPS, [])
    return saved.load("model")


def test_stopped_in_each_phase_it_equals_the_unbroken_run_bit_by_bit(tmp_path: Path, manifest: Path) -> None:
    whole = check(jobs.load(three_phases(tmp_path / "whole", manifest)))
    broken = check(jobs.load(three_phases(tmp_path / "broken", manifest)))
    unbroken = go(whole)
    assert (unbroken["status"], unbroken["steps"]) == ("finished", STEPS)
    phases = []
    for last in (1, 3, 4, 5):  # of the first window; within a validation, which asks three times; later phases' windows
        life = go(broken, stop_at_ask=last)
        assert life["status"] == "stopped"
        phases.append(numbers(tmp_path / "broken/runs/run")[-1][1])
    assert phases == ["head", "head", "all", "large"]
    finished = go(broken)
    assert finished["stream_hash"] == unbroken["stream_hash"] == planned_hash(manifest, STEPS)
    assert same(weights(tmp_path / "broken/runs/run"), weights(tmp_path / "whole/runs/run"))
    assert numbers(tmp_path / "broken/runs/run") == numbers(tmp_path / "whole/runs/run")


def test_sigterm_to_one_of_two_ranks_in_each_phase_stops_both_with_a_checkpoint(tmp_path: Path, manifest: Path) -> None:
    ranks(2, "train", three_phases(tmp_path / "whole", manifest))
    job, run_dir = three_phases(tmp_path / "broken", manifest), tmp_path / "broken/runs/run"
    for victim, step in ((1, 5), (0, 15), (1, 25)):
        both = fork_ranks(2, "train", job, step_s=0.1)
        wait_for_step(run_dir, step, both[0])
        both[victim].send_signal(signal.SIGTERM)
        _, talk = both[0].communicate(timeout=120)
        both[1].communicate(timeout=120)
        assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2
        assert "the same command resumes it" in talk
        saved, _ = checkpoint.newest(run_dir / "checkpoints")
        assert saved is not None
        assert step <= saved.step < STEPS
    ranks(2, "train", job)
    made, unbroken = result(run_dir), result(tmp_path / "whole/runs/run")
    assert (made["status"], made["world_size"], made["steps"]) == ("finished", 2, STEPS)
    assert made["stream_hash"] == unbroken["stream_hash"] == planned_hash(manifest, STEPS)
    assert same(weights(run_dir), weights(tmp_path / "whole/runs/run"))
    assert numbers(run_dir) == numbers(tmp_path / "whole/runs/run")
