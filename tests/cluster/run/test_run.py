"""Whole runs: does a job become the files it promises, and is it the same run wherever and however it is made?"""

import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.kit.ranks import Here, Outcome, worlds_of
from tests.kit.runs import (
    counted_error_rate,
    digits_manifest,
    fork,
    planned_hash,
    ranks,
    result,
    thawline,
    torchrun,
    wait_for_step,
    write_job,
)
from thawline import models
from thawline.cluster.errors import USER_ERRORS, LaunchError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.flags import override
from thawline.cluster.launch.launch import ProcessContext, in_process
from thawline.cluster.observe.settings import Metrics
from thawline.cluster.run.folder import run_dir
from thawline.cluster.run.run import run
from thawline.dataio import ImageSpec, Manifest, render
from thawline.dataio.batch import Batch
from thawline.dataio.stream.loader import ImageLoader
from thawline.trainer.checkpoints import checkpoint, keeper
from thawline.trainer.errors import CheckpointError

VALID = 60  # of 300 digits
STEPS = 20  # two epochs of 240 in batches of 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_manifest(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, manifest: Path) -> Path:
    """The folder of a run that nothing disturbed, made by the command line in one process."""
    folder = tmp_path_factory.mktemp("whole")
    done = thawline("train", write_job(folder, manifest))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "run"


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(run / f"checkpoints/step_{STEPS:08d}/model.pt", weights_only=True)
    return weights


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(whole: Path, manifest: Path) -> None:
    made = result(whole)
    wanted = {
        *("name", "status", "seed", "world_size", "engine", "device", "precision", "epochs", "steps"),
        *("samples_seen", "metrics", "images_per_s", "data_wait_fraction", "wall_s", "stream_hash"),
        *("versions", "hardware", "commit"),
    }
    assert wanted <= set(made)
    assert (made["status"], made["steps"], made["samples_seen"]) == ("finished", STEPS, STEPS * 24)
    assert made["epochs"] == 2
    rows = pq.read_table(whole / "rows.parquet").to_pylist()
    assert [row["step"] for row in rows if row["kind"] == "valid"] == [10, 20]
    trained = [row for row in rows if row["kind"] == "train"]
    assert sum(row["images"] for row in trained) == STEPS * 24
    assert made["images_per_s"] == pytest.approx(STEPS * 24 / sum(row["window_s"] for row in trained))
    last = [row for row in rows if row["kind"] == "valid"][-1]
    assert made["metrics"]["valid_loss"] == last["valid_loss"]
    assert jobs.differences(jobs.from_toml(whole / "job.toml"), jobs.from_toml(whole.parent.parent / "job.toml")) == []
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    text = re.sub(r"base64,[\w+/=]+", "", page)  # in which "http" stands by chance, once in some forty reports
    assert "http" not in text.replace("http-equiv", ""), "the report must not need a network"


@pytest.mark.slow
def test_the_hash_is_over_the_planned_stream(whole: Path, manifest: Path) -> None:
    assert result(whole)["stream_hash"] == planned_hash(manifest, STEPS)


@pytest.mark.slow
def test_validation_counts_every_image_once(whole: Path) -> None:
    images, errors = counted_error_rate(whole)
    assert images == VALID
    assert result(whole)["metrics"]["error_rate"] == pytest.approx(errors, abs=1e-12)


@pytest.mark.slow
def test_a_run_goes_through_the_validation_images_once_an_epoch(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictions of `valid.parquet` are those of the last epoch's validation, and not of another one."""
    passes, stream = list[int](), ImageLoader.stream

    def counted(loader: ImageLoader, first_step: int = 0) -> Iterator[Batch]:
        passes.append(loader.samples)
        return stream(loader, first_step)

    monkeypatch.setattr(ImageLoader, "stream", counted)
    job = jobs.load(write_job(tmp_path, manifest))
    in_process(jobs.resolved(replace(job, fit=replace(job.fit, epochs=1))))
    assert passes == [300 - VALID, VALID]
    images, errors = counted_error_rate(tmp_path / "runs/run")
    assert images == VALID
    assert result(tmp_path / "runs/run")["metrics"]["error_rate"] == pytest.approx(errors, abs=1e-12)


@pytest.mark.slow
def test_a_finished_run_says_so_and_trains_no_more(whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    again = thawline("train", whole.parent.parent / "job.toml")
    assert again.returncode == 0
    assert "has finished" in again.stderr
    assert result(whole)["stream_hash"] in again.stdout
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_the_reference_engine_sees_the_same_stream(tmp_path: Path, manifest: Path, whole: Path) -> None:
    done = thawline("train", write_job(tmp_path, manifest), "--data.engine", "reference")
    assert done.returncode == 0, done.stderr
    made = result(tmp_path / "runs/run")
    assert made["engine"] == "reference"
    assert made["stream_hash"] == result(whole)["stream_hash"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_more_ranks_see_the_same_stream_and_count_exactly(
    tmp_path: Path, manifest: Path, whole: Path, workers: int
) -> None:
    if workers == 2:
        done = torchrun(workers, "train", write_job(tmp_path, manifest))
        assert done.returncode == 0, done.stderr
    else:
        ranks(workers, "train", write_job(tmp_path, manifest))
    made = result(tmp_path / "runs/run")
    assert made["world_size"] == workers
    assert made["stream_hash"] == result(whole)["stream_hash"]
    images, errors = counted_error_rate(tmp_path / "runs/run")
    assert images == VALID
    assert made["metrics"]["error_rate"] == pytest.approx(errors, abs=1e-12)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_by_bit(tmp_path: Path, manifest: Path, whole: Path) -> None:
    """`python -m tests.campaigns.kills` kills at every kind of moment."""
    job = write_job(tmp_path, manifest)
    process = fork("train", job, step_s=0.1)
    wait_for_step(tmp_path / "runs/run", 8, process)
    process.send_signal(signal.SIGSTOP)  # or it would have finished meanwhile
    second = thawline("train", job)
    assert second.returncode == 1
    assert f"{tmp_path / 'runs/run'} is held by process {process.pid} on" in second.stderr
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "runs/run/result.json").exists(), "it was too quick to be killed"
    done = thawline("train", job)  # at once
    assert done.returncode == 0, done.stderr
    assert "which is gone: taken over" in done.stderr
    assert "waiting up to" not in done.stderr, "a lock ends with its process"
    assert "resumed at step" in done.stderr
    run = tmp_path / "runs/run"
    assert result(run)["stream_hash"] == result(whole)["stream_hash"]
    assert result(run)["samples_seen"] == STEPS * 24
    weights, unbroken = final_weights(run), final_weights(whole)
    assert weights.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(weights[name], tensor), name
    mine, theirs = (pq.read_table(folder / "rows.parquet").to_pylist() for folder in (run, whole))
    assert [row["loss"] for row in mine if row["kind"] == "train"] == [
        row["loss"] for row in theirs if row["kind"] == "train"
    ]


@pytest.mark.slow
def test_a_run_on_loose_files_goes_on_from_shards_bit_by_bit(tmp_path: Path, manifest: Path, whole: Path) -> None:
    packed = thawline("pack", manifest, tmp_path / "packed")
    assert packed.returncode == 0, packed.stderr
    assert packed.stdout.strip() == str(tmp_path / "packed/manifest.arrow")
    job, run = write_job(tmp_path, manifest), tmp_path / "runs/run"
    process = fork("train", job, step_s=0.1)
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "result.json").exists(), "it was too quick to be killed"
    done = thawline("train", job, "--manifest", tmp_path / "packed/manifest.arrow")
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert result(run)["stream_hash"] == result(whole)["stream_hash"]
    weights, unbroken = final_weights(run), final_weights(whole)
    for name, tensor in unbroken.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.slow
def test_an_interrupted_run_checkpoints_and_resumes(tmp_path: Path, manifest: Path, whole: Path) -> None:
    job = write_job(tmp_path, manifest, model="resnet18")
    process = fork("train", job, "--checkpoint.every_s", "1000")
    while "training and" not in process.said() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate()
    assert process.returncode == 130, talk
    assert "the same command resumes it" in talk
    assert not (tmp_path / "runs/run/result.json").exists()
    done = thawline("train", job)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "runs/run")["stream_hash"] == result(whole)["stream_hash"]


def loaded(tmp_path: Path, manifest: Path) -> jobs.Job:
    return jobs.resolved(jobs.load(write_job(tmp_path, manifest)))


@pytest.mark.slow
def test_fine_tune_runs_both_phases(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[float, ...]] = []
    from thawline.trainer.optimisers import optim

    real = optim.set_hyper

    def spy(optimizer: torch.optim.Optimizer, lrs: Any, momentum: float) -> None:
        rates.append(tuple(lrs))
        real(optimizer, lrs, momentum)

    monkeypatch.setattr(optim, "set_hyper", spy)
    job = loaded(tmp_path, manifest)
    job = replace(job, fit=replace(job.fit, recipe="fine_tune", epochs=1, frozen_epochs=1, lr=3e-3))
    made = in_process(job)
    assert made["epochs"] == 2
    second = np.array(rates[10:])
    np.testing.assert_allclose(second.max(0), [1.5e-5, 1.5e-4, 1.5e-3], rtol=1e-9)


@pytest.mark.slow
def test_tiny_learns_digits_and_its_bundle_answers_as_validation_did(tmp_path: Path, manifest: Path) -> None:
    flags = ["--model.name", "tiny", "--model.weights", "imagenet", "--fit.lr", "1e-2", "--fit.epochs", "4"]
    job = override(jobs.from_toml(write_job(tmp_path, manifest)), [*flags, "--fit.ema", "0.5"])
    larger_later = replace(job.data, size_px=40, stages=((0.0, 32), (9.0, 40)))  # than this run ever comes to
    made = in_process(replace(job, data=larger_later))
    assert (made["status"], made["model"]) == ("finished", "tiny")
    run = tmp_path / "runs/run"
    images, error = counted_error_rate(run)
    assert images == VALID
    assert error == pytest.approx(made["metrics"]["error_rate"])
    assert error < 0.5  # a guess is wrong nine times of ten

    model, about = models.load(run)
    assert (about.engine, about.precision, about.step) == (made["engine"], made["precision"], made["steps"])
    assert (about.metrics, about.image["size_px"]) == (made["metrics"], 32)
    rows = Manifest.load(manifest)
    paths = dict(zip(rows.rows["id"].to_pylist(), rows.rows["path"].to_pylist(), strict=True))
    assert about.classes == rows.classes
    engine: Any = about.engine
    for row in pq.read_table(run / "valid.parquet").to_pylist()[::6]:
        pixels = render(Path(rows.root, paths[row["id"]]).read_bytes(), ImageSpec(**about.image), engine=engine)
        with torch.no_grad():
            probability, top = model(pixels)[0].softmax(0).max(0)
        assert about.classes[int(top)] == row["prediction"]
        assert float(probability) == pytest.approx(row["probability"], abs=1e-6)


def test_what_cannot_be_drawn_decides_over_no_result(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert (tmp_path / "runs/run/result.json").exists(), "the result comes first"
        raise ValueError("\nno such font")

    monkeypatch.setattr("thawline.cluster.results.report.write_report", fail)
    job = loaded(tmp_path, manifest)
    made = in_process(replace(job, fit=replace(job.fit, epochs=1)))
    assert made["status"] == "finished"
    assert result(tmp_path / "runs/run")["metrics"] == made["metrics"]
    assert "report.html could not be made (ValueError: no such font)" in capsys.readouterr().err


def images_that_one_rank_lacks(here: Here) -> Outcome:
    job = jobs.resolved(jobs.load(here.folder.parent / "job.toml"))
    if here.last:
        job = replace(job, data=replace(job.data, root="/nowhere"))
    try:
        run(job, ProcessContext(run_dir(job), torch.device("cpu"), here.rank, here.size, here.rank))
    except USER_ERRORS as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


@pytest.mark.slow
def test_what_one_rank_cannot_do_all_ranks_refuse_together(tmp_path: Path, manifest: Path) -> None:
    write_job(tmp_path, manifest)
    for rank in worlds_of(images_that_one_rank_lacks, tmp_path, sizes=(2,))[2]:
        assert rank["error"].startswith("ManifestError: ")
        assert "/nowhere" in rank["error"]


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_refused_has_no_result_and_goes_on_when_started_again(
    tmp_path: Path, manifest: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, job = checkpoint.save, loaded(tmp_path, manifest)

    def full(folder: str, step: int, *args: Any, **options: Any) -> str:
        if step > STEPS // 2:
            raise CheckpointError("no space")
        return write(folder, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        patch.setattr(keeper, "_AGAIN_S", (0.1,))
        with pytest.raises(CheckpointError, match=r"no space\. It is the run's last and was tried 2 times"):
            in_process(job)
    run = tmp_path / "runs/run"
    assert not (run / "result.json").exists()
    assert not (run / f"checkpoints/step_{STEPS:08d}").exists()
    made = in_process(job)
    assert made["status"] == "finished"
    assert made["stream_hash"] == result(whole)["stream_hash"]
    assert made["checkpoint"] == f"checkpoints/step_{STEPS:08d}"
    assert (run / made["checkpoint"] / "manifest.json").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_job_is_not_taken(
    tmp_path: Path, manifest: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would be taken for the end of this run, which is of one epoch with another rate."""
    shutil.copytree(whole / "checkpoints", tmp_path / "runs/run/checkpoints")
    job = jobs.resolved(jobs.load(write_job(tmp_path, manifest)))
    made = in_process(replace(job, fit=replace(job.fit, epochs=1, lr=1e-3)))
    assert made["steps"] == made["samples_seen"] // 24 == 10
    assert made["checkpoint"] == "checkpoints/step_00000010"
    said = capfd.readouterr().err
    assert "step_00000020 is skipped: it is another run's (fit.epochs is 2 there and 1 here; fit.lr is 0.003 th" in said


def test_an_address_that_is_not_here_is_refused(tmp_path: Path, manifest: Path) -> None:
    job = loaded(tmp_path, manifest)
    with pytest.raises(LaunchError, match=r"metrics\.host='192\.0\.2\.1'.*0\.0\.0\.0"):
        in_process(replace(job, metrics=Metrics(host="192.0.2.1")))


@pytest.mark.slow
def test_signals_are_left_as_they_were(tmp_path: Path, manifest: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    in_process(replace(loaded(tmp_path, manifest), fit=jobs.Fit(recipe="one_cycle", epochs=1)))
    assert signal.getsignal(signal.SIGTERM) is before
