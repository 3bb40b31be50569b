"""A finished run that goes on: is it the run that would have been made at once, also when it is interrupted?"""

import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit.networks import untrained
from tests.kit.runs import counted_error_rate, digits_manifest, go, numbers, result, write_job
from tests.kit.toy import same
from thawline.cluster.cli import photos
from thawline.cluster.cli.index import make_manifest
from thawline.cluster.cli.index_options import SourceOptions
from thawline.cluster.cli.train import Train
from thawline.cluster.cli.verbs import with_job
from thawline.cluster.errors import JobError, StorageError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.job import Augment, Data, Fit, Job, PhaseJob
from thawline.cluster.job.model import Model
from thawline.cluster.job.recipes import longer, phases
from thawline.cluster.observe.settings import Metrics
from thawline.cluster.run import growing
from thawline.cluster.run.folder import write_text
from thawline.cluster.run.more import going_on
from thawline.cluster.run.preflight import preflight
from thawline.dataio.samples import write_digits
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest
from thawline.models.errors import WeightsError
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.settings import CheckpointSettings

SMALL = Job(
    data=Data(size_px=32, presize_px=40, global_batch=24),
    augment=Augment(flip=False),
    model=Model("tiny", "none"),
    fit=Fit("one_cycle", epochs=1),
    metrics=Metrics(port=0),
    checkpoint=CheckpointSettings(every_s=0.0),
    log_every=2,
)


def weights(folder: Path) -> dict[str, Any]:
    saved, _ = checkpoint.newest(folder / "checkpoints")
    assert saved is not None
    return saved.load("model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    job = jobs.from_toml(write_job(folder, digits_manifest(folder, count=120)))
    job = replace(job, fit=Fit("one_cycle", epochs=1), log_every=2, checkpoint=replace(job.checkpoint, every_s=0.0))
    go(job)
    return folder / "runs/run"


def copied(finished: Path, folder: Path) -> Job:
    """The job of a copy of the run."""
    shutil.copytree(finished, folder)
    return replace(jobs.from_toml(folder / "job.toml"), storage=str(folder.parent), name=folder.name)


@pytest.mark.slow
def test_more_epochs_are_the_run_with_both_phases_interrupted_or_not(finished: Path, tmp_path: Path) -> None:
    whole = replace(jobs.from_toml(finished / "job.toml"), storage=str(tmp_path), name="whole")
    go(replace(whole, phases=(PhaseJob("one_cycle", epochs=1.0), PhaseJob("more", epochs=2.0))))
    for last in (0, 2, 5):
        job = copied(finished, tmp_path / str(last))
        before = result(tmp_path / str(last))
        if last:
            assert go(going_on(job, 2), stop_at_ask=last)["status"] == "stopped"
            assert result(tmp_path / str(last)) == before, "until the new one is there"
        made = go(going_on(job, 2))
        assert (made["status"], made["epochs"], made["appended"]) == ("finished", 3, 1)
        assert made["stream_hash"] == result(tmp_path / "whole")["stream_hash"] != before["stream_hash"]
        assert numbers(tmp_path / str(last)) == numbers(tmp_path / "whole")
        assert same(weights(tmp_path / str(last)), weights(tmp_path / "whole"))
        assert counted_error_rate(tmp_path / str(last))[1] == pytest.approx(made["metrics"]["error_rate"])
        assert [p.name for p in phases(jobs.from_toml(tmp_path / str(last) / "job.toml"))] == ["one_cycle", "more"]
    assert go(job) == made, "the job of before shows the run as it is"
    again = go(going_on(job, 1))
    assert (again["epochs"], again["appended"]) == (4, 2)


@pytest.mark.slow
def test_what_cannot_go_on_gets_a_sentence(finished: Path, tmp_path: Path) -> None:
    job = copied(finished, tmp_path / "run")
    with pytest.raises(JobError, match="--more -1 is no number of epochs above 0"):
        going_on(job, -1)
    go(going_on(job, 2), stop_at_ask=2)
    with pytest.raises(StorageError, match=r"has not finished --more 2, .* give --more 2 again, and then --more 3"):
        going_on(job, 3)
    sized = replace(job, data=replace(job.data, stages=((0.0, 24), (0.5, 32))))
    with pytest.raises(JobError, match=r"--more with new images, and images of 24 and 32 px: .* --model.weights this"):
        growing.grown(sized, 2, Manifest.load(job.manifest), tell=print)
    (tmp_path / "run/result.json").unlink()
    with pytest.raises(StorageError, match="has not finished, and --more is for a run that has"):
        going_on(job, 2)
    shutil.copytree(finished, tmp_path / "moved/pets")
    words = ["train", str(tmp_path / "moved/pets"), "--more", "3"]
    verb = with_job(Train(job=words[1], more=3.0), words)
    assert isinstance(verb, Train)
    assert (verb.fields.storage, verb.fields.name) == (str(tmp_path / "moved"), "pets"), "the folder, not what it says"


@pytest.mark.slow
def test_a_run_goes_on_without_the_weights_that_it_began_with(tmp_path: Path) -> None:
    began = tmp_path / "began.pt"
    torch.save(untrained("tiny", 10, seed=7).state_dict(), began)
    plain = jobs.from_toml(write_job(tmp_path, digits_manifest(tmp_path, count=120)))
    plain = replace(plain, fit=Fit("one_cycle", epochs=2), log_every=2, checkpoint=CheckpointSettings(every_s=0.0))
    job = replace(plain, model=replace(plain.model, weights=str(began)))
    whole = go(replace(job, name="whole"))
    assert go(job, stop_at_ask=2)["status"] == "stopped"
    began.unlink()
    assert preflight(job) is None
    made = go(job)
    assert (made["status"], made["metrics"]) == ("finished", whole["metrics"])
    assert same(weights(tmp_path / "runs/run"), weights(tmp_path / "runs/whole"))
    for anew, fresh in ((replace(job, name="anew"), False), (job, True)):
        with pytest.raises(WeightsError, match="does not exist"):
            preflight(anew, fresh=fresh)


def test_what_is_appended_is_the_last_schedule_over_again() -> None:
    plain = longer(Job(manifest="a.parquet"), 3)
    assert [(p.name, p.epochs, p.freeze_to) for p in phases(plain)] == [
        ("frozen", 1, -1),
        ("unfrozen", 5, 0),
        ("more", 3, 0),
    ]
    assert phases(plain)[2] == replace(phases(plain)[1], name="more", epochs=3)
    two = (PhaseJob(epochs=1.0, size_px=128), PhaseJob("end", "flat_cos", steps=7, lr=1e-4, freeze_to=-1, size_px=224))
    twice = longer(longer(Job(manifest="a.parquet", phases=two), 3), 0.5)
    *_, end, more, more_2 = phases(twice)
    assert more == replace(end, name="more", epochs=3, steps=0)
    assert more_2 == replace(more, name="more 2", epochs=0.5)
    assert jobs.from_dict(tomllib.loads(jobs.to_toml(twice))) == twice
    assert jobs.differences(twice, replace(twice, appended=())) == []


@pytest.mark.slow
def test_new_images_and_classes_join_and_an_interruption_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = tmp_path / "all"
    digits = tmp_path / "photos"
    write_digits(everything, size_px=40)
    files = sorted(everything.iterdir(), key=lambda file: file.stem.split("_")[1])
    for file in files[:150]:
        take(file, digits, classes="1234")
    job = replace(SMALL, storage=str(tmp_path / "runs"), name="broken")
    options = SourceOptions()
    job = replace(job, manifest=photos.indexed(job, str(digits), options, fresh=False))
    go(job)
    old, head = Manifest.load(job.manifest), weights(tmp_path / "runs/broken")
    for file in files[:250]:
        take(file, digits, classes="01234")
    shutil.copytree(tmp_path / "runs/broken", tmp_path / "runs/whole")
    make_manifest(digits).save(tmp_path / "new.parquet")
    whole = replace(job, name="whole", manifest=str(tmp_path / "new.parquet"))  # as `--manifest new.parquet` says it
    made = {"whole": go(going_on(whole, 2))}

    def again() -> Job:
        there = replace(job, manifest=photos.indexed(job, str(digits), options, fresh=False))
        return going_on(there, 2, photos.renewed(there, str(digits), options))

    with monkeypatch.context() as patched:

        def killed(root: Root, name: str, text: str) -> None:
            assert name != "job.toml", "killed"
            write_text(root, name, text)

        patched.setattr(growing, "write_text", killed)
        with pytest.raises(AssertionError, match="killed"):
            again()
    longer_job = again()
    for key, value in weights(tmp_path / "runs/broken").items():
        assert torch.equal(value[: len(head[key])] if value.ndim else value, head[key]), (
            "old classes keep their outputs"
        )
    assert go(longer_job, stop_at_ask=3)["status"] == "stopped"
    made["broken"] = go(again())
    new = Manifest.load(jobs.from_toml(tmp_path / "runs/broken/job.toml").manifest)
    assert (old.classes, new.classes) == (("1", "2", "3", "4"), ("1", "2", "3", "4", "0"))
    assert {*new.subset("train").ids} >= {*old.subset("train").ids}
    assert {*new.subset("valid").ids} >= {*old.subset("valid").ids}
    assert (made["broken"]["status"], made["broken"]["epochs"]) == ("finished", 3)
    assert made["broken"]["stream_hash"] == made["whole"]["stream_hash"]
    assert made["broken"]["metrics"] == made["whole"]["metrics"]
    assert same(weights(tmp_path / "runs/broken"), weights(tmp_path / "runs/whole"))
    assert made["broken"]["valid_samples"] == len(new.subset("valid").ids)


def take(file: Path, into: Path, *, classes: str) -> None:
    """Copy a digit into its class's folder, if it is one of these."""
    kind, number = file.stem.split("_")
    if kind in classes:
        (into / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, into / kind / f"{number}.jpg")
