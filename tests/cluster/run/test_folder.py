"""Is a run in an object store the same as one in a folder? Every test here is made on both, the store moto's S3."""

import json
import os
import re
import shutil
import signal
import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.kit.runs import digits_manifest, fork, planned_hash, thawline, write_job
from thawline import models
from thawline.cluster import doctor
from thawline.cluster.errors import StorageError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.job import Job
from thawline.cluster.observe.discovery import clear_targets, targets_file, write_targets
from thawline.cluster.run import claim
from thawline.cluster.run import folder as storage
from thawline.dataio.errors import ManifestError, SourceError
from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest
from thawline.models import bundle
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.records.recorder import write_parquet

pytest_plugins = ["tests.kit.stores"]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage that does not exist yet, as a job names it; a claim on it is soon nobody's."""
    monkeypatch.setattr(claim, "_SETTLE_S", 0.1)
    monkeypatch.setattr(claim, "claimed", partial(claim.claimed, beat_s=0.1))
    if request.param == "folder":
        return str(tmp_path / "storage" / "runs")
    uri: str = request.getfixturevalue("s3").format("runs")
    return uri


@pytest.fixture
def job(place: str, flat: Manifest, tmp_path: Path) -> Job:
    flat.save(tmp_path / "flat.parquet")
    return jobs.resolved(Job(name="pets #1", manifest=str(tmp_path / "flat.parquet"), storage=place))


def begin(job: Job) -> None:
    """The job has a checkpoint."""
    checkpoint.save(Root.of(storage.run_dir(job)).full("checkpoints"), 10, {"model": {"w": torch.ones(1)}}, keep=1)


def test_a_run_lies_below_its_storage_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.run_dir(Job(name="pets #1", storage="runs")) == f"{tmp_path}/runs/pets #1"
    remote = Job(name="pets #1", storage="s3://bucket/runs/?region=us-east-1")
    assert storage.run_dir(remote) == "s3://bucket/runs/pets%20%231?region=us-east-1"
    with pytest.raises(SourceError, match="carries a password"):
        storage.run_dir(replace(remote, storage="s3://key:secret@bucket/runs"))


def test_looking_writes_nothing_and_opening_says_what_runs(job: Job, place: str) -> None:
    for _ in range(2):
        assert storage.inspect(job) is None
    assert Root.of(place).listing() == {}
    for workers in (1, 2):
        changed = replace(job, workers=workers)
        assert storage.open_run(changed) is None
        folder = storage.run_dir(job)
        assert sorted(Root.of(folder).listing()) == ["job.toml", "manifest.hash"]
        written = jobs.from_dict(tomllib.loads(Root.of(folder).read("job.toml").decode()))
        assert written == changed
    assert list(Root.of(place).listing()) == ["pets #1"]


def test_a_run_with_checkpoints_goes_on_with_the_same_settings_only(job: Job) -> None:
    longer = replace(job, fit=replace(job.fit, epochs=7))
    storage.open_run(longer)
    assert storage.open_run(job) is None, "nothing was trained yet, so nothing can be mixed"
    begin(job)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"fit\.epochs: 5 -> 7.*another --name"):
            storage.open_run(longer)
        assert storage.open_run(replace(job, workers=2)) is None, "a run may go on with other workers"


def test_a_run_goes_on_with_the_same_data_only(job: Job, tmp_path: Path) -> None:
    storage.open_run(job)
    begin(job)
    assert storage.inspect(job) is None
    indexed_anew(job, tmp_path / "other.parquet")
    with pytest.raises(
        StorageError, match=r"other data \(its manifest was .*flat.parquet, and .*other.parquet has other"
    ):
        storage.inspect(replace(job, manifest=str(tmp_path / "other.parquet")))


SHOWN = {"images_per_s": 1.0, "data_wait_fraction": 0, "wall_s": 2.5, "stream_hash": "ab"}
RESULT = {"status": "finished", "metrics": {"error_rate": 0.25}, **SHOWN}


def finish(job: Job) -> None:
    """The job has finished."""
    storage.open_run(job)
    begin(job)
    storage.write_text(storage.run_root(job), "result.json", json.dumps(RESULT))


def indexed_anew(job: Job, file: Path) -> None:
    """The job's manifest with other images."""
    other = Manifest.load(job.manifest)
    column = other.rows.schema.get_field_index("id")
    ids = pa.array([number + 1 for number in other.rows["id"].to_pylist()], other.rows.schema.field("id").type)
    replace(other, rows=other.rows.set_column(column, "id", ids)).save(file)


def test_a_finished_run_is_no_other_datas_result(job: Job, tmp_path: Path) -> None:
    finish(job)
    assert storage.inspect(job) == RESULT
    (tmp_path / "other").mkdir()
    indexed_anew(job, tmp_path / "other/flat.parquet")  # of the same name, so that the run is called the same
    for changed, told in (
        (
            replace(job, manifest=str(tmp_path / "other/flat.parquet")),
            "other/flat.parquet has other images, labels or splits",
        ),
        (replace(job, data=replace(job.data, valid=job.manifest)), "data.valid: none -> .*flat.parquet"),
    ):
        with pytest.raises(StorageError, match=rf"{told}\): its result is not this job's; .*--name, or --fresh"):
            storage.inspect(changed)
    shutil.copy(job.manifest, tmp_path / "moved.parquet")
    assert storage.inspect(replace(job, manifest=str(tmp_path / "moved.parquet"))) == RESULT, "the same data elsewhere"
    indexed_anew(job, Path(job.manifest))
    with pytest.raises(StorageError, match=r"its manifest .*flat.parquet was made anew since"):
        storage.inspect(job)
    Root.of(storage.run_dir(job)).remove("manifest.hash")
    assert storage.inspect(job) == RESULT, "a run from before there was a fingerprint"


def test_fresh_moves_what_is_there_aside_and_begins(job: Job, place: str, tmp_path: Path) -> None:
    finish(job)
    folder = storage.run_dir(job)
    before = dict(Root.of(folder).walk()) if "://" in folder else sorted(Path(folder).rglob("*"))
    indexed_anew(job, Path(job.manifest))
    told: list[str] = []
    assert storage.inspect(job, fresh=True) is None
    with ExitStack() as holding:
        assert storage.open_run(job, holding, fresh=True, tell=told.append) is None
        with pytest.raises(StorageError, match="is held by process"):
            storage.open_run(job, holding, fresh=True)
    (aside,) = set(Root.of(place).listing()) - {"pets #1"}
    assert re.fullmatch(r"pets #1\.\d{4}-\d\d-\d\d_\d{6}", aside)
    moved = storage.run_dir(replace(job, name=aside))
    assert told == [f"what was in {folder} is now in {moved}"]
    assert sorted(Root.of(folder).listing()) == ["job.toml", "manifest.hash"]
    assert json.loads(Root.of(moved).read("result.json")) == RESULT
    after = dict(Root.of(moved).walk()) if "://" in folder else sorted(Path(moved).rglob("*"))
    assert len(after) == len(before), "nothing was lost"
    assert checkpoint.newest(Root.of(moved).full("checkpoints"))[0] is not None


def test_a_finished_run_returns_its_result_whether_or_not_its_data_are_still_there(job: Job) -> None:
    finish(job)
    Path(job.manifest).unlink()
    assert storage.inspect(job) == RESULT
    assert storage.open_run(job) == RESULT
    with pytest.raises(ManifestError, match=r"no manifest at .*other.parquet"):
        storage.inspect(replace(job, manifest=str(Path(job.manifest).with_name("other.parquet"))))
    with pytest.raises(StorageError, match="seed: 42 -> 1"):
        storage.inspect(replace(job, seed=1))


@pytest.mark.parametrize(
    "described", [{"checkpoint": "checkpoints/step_00000048"}, {"steps": 48}]
)  # old ones name none
def test_a_result_is_not_shown_for_the_weights_of_another_step(job: Job, described: dict[str, Any]) -> None:
    storage.open_run(job)
    begin(job)
    wanted = {**RESULT, **described}
    storage.write_text(storage.run_root(job), "result.json", json.dumps(wanted))
    with pytest.raises(
        StorageError, match=r"weights of checkpoints/step_00000048.*newest is step_00000010.*remove res"
    ):
        storage.inspect(job)
    checkpoint.save(Root.of(storage.run_dir(job)).full("checkpoints"), 48, {"model": {"w": torch.ones(1)}}, keep=1)
    assert storage.inspect(job) == wanted


@pytest.mark.parametrize(
    ("field", "value"), [("status", "stopped"), ("wall_s", None), ("notes", 5), ("checkpoint", 7), ("stream_hash", 3)]
)
def test_a_result_that_lacks_what_is_shown_of_it_is_no_result(job: Job, field: str, value: object) -> None:
    storage.open_run(job)
    begin(job)
    storage.write_text(storage.run_root(job), "result.json", json.dumps({**RESULT, field: value}))
    with pytest.raises(StorageError, match=r"result.json.* cannot be understood.*--fresh"):
        storage.inspect(job)


def test_a_fingerprint_that_was_written_over_is_other_data(job: Job) -> None:
    storage.open_run(job)
    begin(job)
    with atomic_write(storage.run_root(job), "manifest.hash") as sink:
        sink.write(b"\xdc\x00\xff")
    with pytest.raises(StorageError, match=r"other data"):
        storage.inspect(job)


@pytest.mark.parametrize("name", ["job.toml", "result.json"])
@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"a = " + 1200 * b"[" + 1200 * b"]", 1200 * b"[" + 1200 * b"]"])
def test_a_file_of_the_run_that_cannot_be_understood_is_named(job: Job, name: str, text: bytes) -> None:
    storage.open_run(job)
    begin(job)
    filesystem, base = Root.of(storage.run_dir(job)).opened
    with filesystem.open_output_stream(f"{base}/{name}") as out:
        out.write(text)
    with pytest.raises(StorageError, match=rf"{name}.* cannot be understood"):
        storage.inspect(job)


def test_a_manifest_whose_files_moved_is_refused_before_anything_is_written(job: Job, place: str) -> None:
    moved = replace(job, data=replace(job.data, root="/nowhere/at/all"))
    with pytest.raises(ManifestError, match="48"):
        storage.open_run(moved)
    assert Root.of(place).listing() == {}


def test_a_storage_that_is_not_there_is_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    nowhere = job.storage.replace("s3://", "s3://no-such-") if "://" in job.storage else str(tmp_path / "file")
    for check in (storage.inspect, storage.open_run):
        with pytest.raises(StorageError, match=r"cannot be written \((there is no no-such-|Not a dir).*--storage"):
            check(replace(job, storage=nowhere))


def test_a_folder_without_the_right_to_write_is_refused(
    tmp_path: Path, flat: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat.save(tmp_path / "flat.parquet")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    job = Job(manifest=str(tmp_path / "flat.parquet"), storage=str(tmp_path / "runs"))
    with pytest.raises(StorageError, match=r"no folder that this user may write"):
        storage.inspect(job)


def test_tables_are_written_whole_to_either(place: str) -> None:
    home = Root.of(place).full("pets")
    for values in ([1, 2, 3], [4]):
        write_parquet(pa.table({"x": values}), Root.of(home).full("rows.parquet"))
        assert pq.read_table(pa.BufferReader(Root.of(home).read("rows.parquet"))).to_pydict() == {"x": values}
    assert list(Root.of(home).listing()) == ["rows.parquet"]


def test_prometheus_finds_the_workers_in_a_local_file_whatever_the_storage(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = targets_file(place, "pets #1")
    local = Path(place) if "://" not in place else tmp_path / "cache/thawline/targets"
    assert file == local / "pets #1.targets.json"
    write_targets(file, "pets #1", ["a:9400"])
    assert json.loads(file.read_text())[0]["targets"] == ["a:9400"]
    clear_targets(file)
    assert json.loads(file.read_text()) == []
    assert [each.name for each in local.iterdir()] == [file.name]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert "://" not in place or targets_file(place, "a") == tmp_path / "home/.cache/thawline/targets/a.targets.json"


def test_the_doctor_tells_a_storage_that_answers_from_one_that_is_not_there(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    nowhere = place.replace("s3://", "s3://no-such-") if "://" in place else str(tmp_path / "file" / "runs")
    found = [check for each in (place, nowhere) for check in doctor.collect(storage=each) if check.name == "storage"]
    assert [check.ok for check in found] == [True, False]
    assert "cannot be used" in found[1].value


# Whole runs -----------------------------------------------------------------------------------------------


def outcome(folder: str) -> tuple[str, dict[str, torch.Tensor], list[float]]:
    """(stream hash, final weights, training losses) of a run that has finished."""
    result = json.loads(Root.of(folder).read("result.json"))
    assert result["status"] == "finished"
    saved, skipped = checkpoint.newest(Root.of(folder).full("checkpoints"))
    assert saved is not None
    assert skipped == []
    assert saved.step == result["steps"]
    rows = pq.read_table(pa.BufferReader(Root.of(folder).read("rows.parquet"))).to_pylist()
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    return result["stream_hash"], saved.load("model"), losses


def until(happened: Callable[[], bool], *, timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_in_a_store_that_is_killed_and_resumed_equals_an_unbroken_one_in_a_folder(
    tmp_path: Path, s3: str
) -> None:
    manifest = digits_manifest(tmp_path)
    file = write_job(tmp_path, manifest)
    short = ("--fit.epochs", "4")
    rarely = (*short, "--checkpoint.every_s", "1000")
    cache: Any = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    local = thawline("train", file, *rarely, **cache)
    assert local.returncode == 0, local.stderr
    there = ("--storage", s3.format("runs"))
    folder = s3.format("runs/run")
    checkpoints = Root.of(folder).full("checkpoints")
    process = fork("train", file, *short, *there, step_s=0.2, **cache)
    until(lambda: process.poll() is not None or checkpoint.newest(checkpoints)[0] is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "result.json" not in Root.of(folder).listing(), "it was too quick to be killed"
    done = thawline("train", file, *rarely, *there, **cache)
    assert done.returncode == 0, done.stderr
    assert "waiting up to 30 s to see whether it is alive" in done.stderr
    assert "which is gone: taken over" in done.stderr
    assert "resumed at step" in done.stderr
    names = ["checkpoints", "job.toml", "manifest.hash", "model"]
    names += ["report.html", "result.json", "rows.parquet", "valid.parquet"]
    assert sorted(Root.of(folder).listing()) == names
    assert sorted(Root.of(str(tmp_path / "runs/run")).listing()) == names
    digest, weights, losses = outcome(folder)
    expected_digest, expected_weights, expected_losses = outcome(str(tmp_path / "runs/run"))
    assert digest == expected_digest == planned_hash(manifest, 40)
    assert losses == expected_losses
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())
    stored = Root.of(folder).child("model")
    model, _ = bundle.unpacked({name: stored.read(name) for name in stored.listing()}, where=folder)
    (ours, _), expected = models.load(tmp_path / "runs/run"), model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    before = dict(Root.of(folder).walk())
    again = thawline("train", file, *short, *there, **cache)
    assert again.returncode == 0, again.stderr
    assert f"{folder} has finished" in again.stderr
    assert json.loads(again.stdout)["stream_hash"] == digest
    assert dict(Root.of(folder).walk()) == before
    assert (tmp_path / "cache/thawline/targets/run.targets.json").read_text() == "[]\n"
