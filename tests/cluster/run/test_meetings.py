"""Where several options of a run meet: is what each promises still so beside the others?"""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.kit.runs import (
    digits_manifest,
    fork_ranks,
    numbers,
    planned_hash,
    ranks,
    result,
    thawline,
    wait_for_step,
    write_job,
)
from tests.kit.toy import same
from thawline.dataio.stream.plan import Training
from thawline.dataio.table.manifest import Manifest
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.step.window import extend_hash

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits, 96 of them for training: four steps an epoch."""
    return digits_manifest(tmp_path_factory.mktemp("digits"), count=120)


def weights(run: Path) -> dict[str, Any]:
    saved, _ = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    parts = ("model", "ema") if "ema" in saved.parts else ("model",)
    return {f"{part}.{name}": value for part in parts for name, value in saved.load(part).items()}


ALL = (
    *("--fit.recipe", "fine_tune", "--fit.frozen_epochs", "3", "--fit.epochs", "2", "--log_every", "2"),
    *("--data.balance", "1", "--fit.class_weights", "3", "2.0", "--fit.ema", "0.9"),
    *("--fit.batch_norm", "frozen", "--fit.cache_features", "2"),
    *("--fit.patience", "2", "--fit.restore_best", "--checkpoint.every_s", "0"),
)


def test_balance_cached_features_patience_and_average_killed_in_both_phases(tmp_path: Path, manifest: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    jobs = {name: write_job(tmp_path / name, manifest) for name in ("whole", "broken")}
    run = {name: tmp_path / name / "runs/run" for name in jobs}

    ranks(2, "train", jobs["whole"], *ALL)
    for step in (6, 14):  # the head alone, from features in memory; and all
        both = fork_ranks(2, "train", jobs["broken"], *ALL, step_s=0.1)
        wait_for_step(run["broken"], step, both[0])
        for process in both:
            process.kill()
        for process in both:
            process.communicate()
        assert not (run["broken"] / "result.json").exists(), "it was too quick to be killed"
    ranks(2, "train", jobs["broken"], *ALL)
    made, unbroken = result(run["broken"]), result(run["whole"])
    assert (made["status"], made["world_size"], made["steps"]) == ("finished", 2, unbroken["steps"])
    assert made["stream_hash"] == unbroken["stream_hash"]
    assert made["metrics"] == unbroken["metrics"]
    assert numbers(run["broken"]) == numbers(run["whole"])
    assert same(weights(run["broken"]), weights(run["whole"]))


PHASES = '[[phases]]\nname = "one_cycle"\nepochs = 1\n[[phases]]\nname = "more"\nepochs = 2\n'


def test_more_on_two_ranks_killed_and_then_with_new_images(tmp_path: Path, manifest: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole, job = write_job(tmp_path / "whole", manifest), write_job(tmp_path, manifest)
    whole.write_text(whole.read_text().replace("epochs = 2\n", "") + PHASES)
    ranks(2, "train", whole)
    ranks(2, "train", job, "--fit.epochs", "1")
    run, unbroken = tmp_path / "runs/run", tmp_path / "whole/runs/run"
    before = result(run)
    both = fork_ranks(2, "train", run, "--more", "2", step_s=0.2)
    wait_for_step(run, 6, both[0])
    for process in both:
        process.kill()
    for process in both:
        process.communicate()
    assert result(run) == before, "until the new one is there"
    ranks(2, "train", run, "--more", "2")
    made = result(run)
    assert (made["status"], made["world_size"], made["steps"], made["appended"]) == ("finished", 2, 12, 1)
    assert made["stream_hash"] == result(unbroken)["stream_hash"] == planned_hash(manifest, 12)
    assert numbers(run) == numbers(unbroken)
    assert same(weights(run), weights(unbroken))

    (tmp_path / "more").mkdir()
    more = digits_manifest(tmp_path / "more", count=160)
    done = thawline("train", run, "--more", "1", "--workers", "1", "--manifest", more)  # torchrun's ranks may not
    assert done.returncode == 0, done.stderr
    assert "33 train, 7 valid images are new" in done.stderr
    grown = Manifest.load(tomllib.loads((run / "job.toml").read_text())["manifest"])
    assert grown.usable().sum() == 160
    ids, digest = grown.subset("train").ids, made["stream_hash"]
    plan = Training(n=len(ids), global_batch=24, seed=7)
    for step in range(12, 12 + plan.steps(1)):
        digest = extend_hash(digest, ids[plan.at(plan.positions(step))[1]])
    made = result(run)
    assert (made["status"], made["world_size"], made["epochs"]) == ("finished", 1, 4)
    assert made["stream_hash"] == digest
    assert made["valid_samples"] == len(grown.subset("valid").ids)
